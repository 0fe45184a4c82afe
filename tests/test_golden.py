"""Curves of 200 steps that were committed once, one for each dtype: a change of numerics shows as a difference, and its diff in review.

`python tests/test_golden.py` makes them anew, with provenance; corpus.txt is a page of this project as it was when the first were made.

The tolerances are relative, for each step's loss. Another processor's kernels add in another order, and 200 steps of training amplify
that: with AVX2 kernels in place of AVX-512's the curves moved by 5e-14 (fp64), 1.3e-5 (fp32), 1.2e-2 (bf16) and 2.7e-2 (fp16, whose loss
scale may skip another step). Each is held to what leaves room for a processor that nobody tried; a wrong scale or a lost gradient moves
a loss by tenths.
"""

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import train

from megazero.data.indexed import IndexedWriter

FOLDER = Path(__file__).parent / "golden"
WORDS = ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 32 --micro-batch-size 4 "
         "--global-batch-size 8 --lr 3e-3 --lr-warmup-iters 10 --lr-decay-style cosine --train-iters 200 --eval-iters 0 --adam-eps 1e-4 "
         "--tokenizer-type ByteTokenizer --split 1 --swiglu --normalization RMSNorm --position-embedding-type rope --device cpu "
         "--log-interval 200")
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-3, "bf16": 5e-2, "fp16": 8e-2}


def curve(dtype: str, folder: Path) -> list[float]:
    """The losses of the run."""
    prefix = str(folder / "corpus_text_document")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([np.frombuffer((FOLDER / "corpus.txt").read_bytes(), np.uint8).astype(np.uint16)])
    return [line["loss"] for line in train(f"{WORDS} --dtype {dtype} --data-path {prefix}", folder / "log")]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_run_follows_the_curve_it_always_had(dtype: str, tmp_path: Path) -> None:
    want = json.loads((FOLDER / "curves.json").read_text())["losses"][dtype]
    assert len(want) == 200 and want[0] > want[-1] + 1          # it learns
    assert curve(dtype, tmp_path) == pytest.approx(want, rel=TOLERANCE[dtype], abs=0)


def main() -> None:
    losses = {}
    for dtype in TOLERANCE:
        with tempfile.TemporaryDirectory() as folder:
            losses[dtype] = curve(dtype, Path(folder))
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    made = {"words": WORDS, "processor": model or platform.processor(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "losses": losses}
    (FOLDER / "curves.json").write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    main()
