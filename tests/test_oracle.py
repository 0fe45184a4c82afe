"""An independent trainer gives our figures: transformers' models, torch.optim.AdamW, its own reading of the data.

Both start from our step-0 weights, exported. 30 steps with accumulation, warm-up, cosine decay, weight decay and clipping.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_models import in_float64, transformers
from support import SHARED, byte_dataset, train

from megazero.data.indexed import IndexedWriter
from megazero.hf.convert import export_folder
from megazero.state.checkpoint import Reader

S, MICRO, ACCUMULATE, STEPS = 32, 2, 3, 30
LR, MIN_LR, WARMUP, BETAS, EPS, DECAY, CLIP = 3e-3, 3e-4, 5, (0.9, 0.95), 1e-8, 0.1, 1.0
RUN = (f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length {S} --micro-batch-size {MICRO} "
       f"--global-batch-size {MICRO * ACCUMULATE} --lr {LR} --min-lr {MIN_LR} --lr-warmup-iters {WARMUP} --lr-decay-style cosine "
       f"--lr-decay-iters {STEPS} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]} --adam-eps {EPS} --weight-decay {DECAY} "
       f"--clip-grad {CLIP} --init-method-std 0.05 --tokenizer-type ByteTokenizer --split 1 --no-shuffle --eval-iters 0 --device cpu")
MODELS = {
    "gpt2": "--openai-gelu",
    "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --disable-bias-linear "
             "--untie-embeddings-and-output-weights --use-rope-scaling --rope-original-length 16",
}


def learning_rate(step: int) -> float:
    """Of step 1, 2 ...: a line up to LR at step WARMUP, then half a cosine that starts at LR with the next step and would end at MIN_LR
    with the step after the last."""
    if step <= WARMUP:
        return LR * step / WARMUP
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - 1 - WARMUP) / (STEPS - WARMUP)))


def oracle(model: Any, tokens: torch.Tensor) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a plain training loop over the token stream."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    figures, sample = [], 0
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(ACCUMULATE):
            block = torch.stack([tokens[k * S:k * S + S + 1] for k in range(sample, sample + MICRO)])
            sample += MICRO
            loss = F.cross_entropy(model(block[:, :-1]).logits.flatten(0, 1), block[:, 1:].flatten()) / ACCUMULATE
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        figures.append((total, norm.item()))
    return figures


def both(name: str, words: str, prefix: str, tmp_path: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(ours, theirs) figures of the same run."""
    run = f"{RUN} {MODELS[name]} --data-path {prefix} {words}"
    train(f"{run} --train-iters 0 --save {tmp_path / 'start'}")
    reader = Reader(tmp_path / "start")
    export_folder(reader, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", attn_implementation="sdpa").train()
    model = in_float64(copy.deepcopy(model)).train() if "fp64" in words else model
    tokens = torch.from_numpy(np.fromfile(prefix + ".bin", np.uint16).astype(np.int64))           # the file itself, not our reader
    ours = [(line["loss"], line["grad_norm"]) for line in train(f"{run} --train-iters {STEPS}", tmp_path / "log")]
    return ours, oracle(model, tokens)


def differences(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest relative difference of losses and of norms."""
    assert len(ours) == len(theirs) == STEPS
    norms = [norm for _, norm in theirs]
    assert any(norm > CLIP for norm in norms) and any(norm < CLIP for norm in norms), f"clipping must act in some steps, not all: {norms}"
    assert theirs[-1][0] < theirs[0][0] - 1, "nothing was learnt, so little was tested"
    return tuple(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-4), ("fp64", 1e-9)])
def test_losses_and_norms_are_those_of_a_plain_loop(name: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    loss, norm = differences(*both(name, f"--dtype {dtype}", byte_dataset(tmp_path), tmp_path))
    print(f"{name} {dtype}: largest relative difference of loss {loss:.1e}, of norm {norm:.1e}")
    assert loss < tolerance and norm < tolerance, (loss, norm)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_of_it(recompute: str, tmp_path: Path) -> None:
    loss, norm = differences(*both("llama", f"--dtype fp64 --recompute-granularity {recompute}", byte_dataset(tmp_path), tmp_path))
    assert loss < 1e-9 and norm < 1e-9, (loss, norm)


@pytest.mark.skipif(not (SHARED / "data" / "tinyshakespeare.txt").exists(), reason="tinyshakespeare.txt is not there")
def test_the_same_on_shakespeare(tmp_path: Path) -> None:
    prefix = str(tmp_path / "shakespeare")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_document([np.fromfile(SHARED / "data" / "tinyshakespeare.txt", np.uint8)[:60_000].astype(np.uint16)])
    loss, norm = differences(*both("gpt2", "--dtype fp64", prefix, tmp_path))
    assert loss < 1e-9 and norm < 1e-9, (loss, norm)
