"""tools/dataset.py: merged and split datasets byte for byte, the lines that are printed, the documents behind a step; remote datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import resolved
from test_dataset import make
from test_indexed import contents

from megazero.base.errors import UserError
from megazero.corpus import edit
from megazero.corpus.edit import document_lengths, merge_datasets, split_dataset
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.verify import problems
from megazero.data import indexed
from megazero.data.dataset import open_split
from megazero.data.indexed import IndexedDataset, IndexedWriter
from megazero.data.splits import samples

REPOSITORY = Path(__file__).parents[1]
TEXTS = ["one", "", "two words", "x" * 300, "", "end"] * 5


def written(folder: Path, texts: list[str], name: str = "d", **more: object) -> str:
    """A dataset of bytes with its sidecar."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(PreprocessSettings(input=(str(source),), output_prefix=str(folder / name), tokenizer_type="ByteTokenizer", append_eod=True))
    return str(folder / f"{name}_text_document")


def tool(*words: object, fails: bool = False) -> str:
    ran = subprocess.run([sys.executable, "tools/dataset.py", *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    assert ran.returncode == (2 if fails else 0), ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr if fails else ran.stdout


def test_merged_is_what_preprocessing_all_at_once_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (edit, indexed):
        monkeypatch.setattr(module, "BLOCK", 7)                         # many blocks of everything
    parts = [written(tmp_path, TEXTS[low:low + 6], f"part{low}") for low in range(0, 30, 6)]
    merged, whole = merge_datasets(parts, str(tmp_path / "merged")), written(tmp_path, TEXTS, "whole")
    assert contents(tmp_path / "merged") == contents(Path(whole)) and merged.document_count == 30
    assert list(problems(str(tmp_path / "merged"))) == []
    told, other = (json.loads(Path(f"{p}.json").read_text()) for p in (tmp_path / "merged", whole))
    assert told["sums"] == other["sums"] and told["tokenizer"] == other["tokenizer"] and told["sources"] == parts
    for bad, said in ((make(tmp_path / "other", [3], dtype="u2"), "other: was not made with the tokenizer of .*part0"),
                      (make(tmp_path / "wide", [3]), "wide: holds int32 tokens, .*part0_text_document uint16")):
        with pytest.raises(UserError, match=said):
            merge_datasets([parts[0], bad], str(tmp_path / "no"))
    with pytest.raises(UserError, match="--output-prefix .*: is one of the inputs; name another"):
        merge_datasets(parts, parts[2])
    assert contents(Path(parts[2])) == contents(Path(written(tmp_path, TEXTS[12:18], "again")))


def test_split_gives_the_documents_of_training(tmp_path: Path) -> None:
    whole = written(tmp_path, TEXTS)
    made = split_dataset(whole, str(tmp_path / "s"), "60,40")
    assert [(d.prefix, d.document_count) for d in made] == [(str(tmp_path / "s_train"), 18), (str(tmp_path / "s_valid"), 12)]
    for dataset, which in zip(made, ("train", "valid"), strict=True):
        assert list(problems(dataset.prefix)) == []
        same = open_split([whole], "60,40", which, 8, 3, shuffle=True), open_split([dataset.prefix], None, which, 8, 3, shuffle=True)
        assert all(np.array_equal(same[0].sample(k), same[1].sample(k)) for k in range(40))
    assert [length for block in document_lengths(made[0]) for length in block] == [len(t) + 1 if t else 0 for t in TEXTS[:18]]
    with IndexedWriter(tmp_path / "many", np.dtype("u2")) as writer:                # documents of several sequences
        for document in ([[1], [2, 3]], [], [[4] * 5, [5], [6]]):
            writer.add_document(document)
    assert [length for block in document_lengths(IndexedDataset(tmp_path / "many")) for length in block] == [3, 0, 7]


def test_the_commands(tmp_path: Path) -> None:
    prefix = written(tmp_path, TEXTS)
    said = tool("inspect", "--data-path", prefix)
    assert "documents   30\n" in said and "tokens      1,595\n" in said and '"type": "ByteTokenizer"' in said and "d.jsonl" in said
    said = tool("stats", "--data-path", prefix, "--output", tmp_path / "h.png")
    assert "30 documents (10 empty), 1,595 tokens; the others have 4 to 301, 79.8 in the mean" in said
    assert "            4 tokens or more            10 ##################################################\n" in said
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    said = tool("show", "--data-path", prefix, "--document", 2, "--tokenizer-type", "ByteTokenizer")
    assert f"document 2 of {prefix}: 10 tokens from 4 on\n116 119 111 32" in said and said.endswith("two words\n")
    assert "is whole: 30 documents, 1,595 tokens, every byte against its checksum" in tool("verify", "--data-path", prefix)
    assert "--document 30: " in tool("show", "--data-path", prefix, "--document", 30, fails=True)
    Path(f"{prefix}.bin").write_bytes(bytes(3190))
    assert "have CRC-32" in tool("verify", "--data-path", prefix, fails=True)
    assert "dataset.py vrify: write inspect or" in tool("vrify", fails=True)


def test_trace_takes_the_flags_as_the_run_does(tmp_path: Path) -> None:
    """Megatron's defaults, one of which is an order of samples, and its words."""
    flags = (f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 12 --lr 1 --train-iters 9 --global-batch-size 4 --eval-iters 0 "
             f"--tokenizer-type ByteTokenizer --train-data-path {written(tmp_path, TEXTS)}").split()
    megatrons = tool("trace", "--step", 5, *flags, "--megatron-defaults", "--use-distributed-optimizer", "--sequence-parallel")
    assert megatrons == tool("trace", "--step", 5, *flags, "--sample-order", "megatron") != tool("trace", "--step", 5, *flags)


@pytest.mark.parametrize("order", ["keyed", "megatron"])
def test_trace_names_the_documents_of_a_step(tmp_path: Path, order: str) -> None:
    prefix = written(tmp_path, TEXTS)
    flags = (f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 12 --lr 1 --train-iters 9 --global-batch-size 4 --eval-iters 0 "
             f"--tokenizer-type ByteTokenizer --train-data-path {prefix} --sample-order {order}")
    source, dataset = samples(resolved(f"{flags} --vocab-size 257"), "train", None), IndexedDataset(prefix)
    lines = [line for line in tool("trace", "--step", 5, "--text", 40, *flags.split()).splitlines() if line.startswith("sample ")]
    assert [line.split(":")[0] for line in lines] == [f"sample {k}" for k in range(16, 20)]
    for k, line in zip(range(16, 20), lines, strict=True):
        tokens: list[int] = []
        for piece in line.split(f"{prefix}: ")[1].split("; "):
            _, document, _, places, _, size = piece.split()
            low, high = map(int, places.split("-"))
            assert len(dataset.document(int(document))) == int(size)
            tokens += dataset.document(int(document))[low:high + 1].tolist()
        assert tokens == source.sample(k).tolist()
    assert "--step 10: the run has steps 1 to 9." in tool("trace", "--step", 10, *flags.split(), fails=True)


def test_datasets_behind_a_url(tmp_path: Path) -> None:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    prefix = written(tmp_path, TEXTS)
    for end in ("bin", "idx", "json"):
        fs.pipe(f"/far/d.{end}", Path(f"{prefix}.{end}").read_bytes())
    near, far = IndexedDataset(prefix), IndexedDataset("memory://far/d")
    assert all(np.array_equal(near.document(i), far.document(i)) for i in range(30)) and list(problems("memory://far/d")) == []
    here, there = (open_split([p], "60,40", "train", 8, 3, shuffle=True, tokenizer={"type": "ByteTokenizer", "vocab_size": 257, "eod": 256,
                                                                                  "files": {}}) for p in (prefix, "memory://far/d"))
    assert all(np.array_equal(here.sample(k), there.sample(k)) for k in range(40)) and "no sidecar" not in there.describe()
    fs.pipe("/far/d.bin", Path(f"{prefix}.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="memory://far/d.bin: gave|memory://far/d.bin: has 3188 bytes"):
        IndexedDataset("memory://far/d").document(29)
    with pytest.raises(UserError, match="memory://nowhere.idx: cannot be read"):
        IndexedDataset("memory://nowhere")


def test_damage_is_not_made_whole_and_floats_are_no_tokens(tmp_path: Path) -> None:
    data = written(tmp_path, TEXTS)
    raw = bytearray(Path(f"{data}.bin").read_bytes())
    raw[100] ^= 1
    Path(f"{data}.bin").write_bytes(raw)
    for make_ in (lambda: merge_datasets([data], str(tmp_path / "m")), lambda: split_dataset(data, str(tmp_path / "s"), "8,2")):
        with pytest.raises(UserError, match="_text_document.bin: bytes 0 to .* have CRC-32"):
            make_()
    assert not [*tmp_path.glob("[ms][._]*")]
    with IndexedWriter(tmp_path / "f", np.dtype("f8")) as writer:
        writer.add_document([np.ones(9)])
    assert [s for s in problems(str(tmp_path / "f")) if "holds float64, which are no token ids" in s]


def test_show_names_what_a_tokenizer_does_not_have(tmp_path: Path) -> None:
    for name, tokens in (("d", [5, 400]), ("e", [])):
        with IndexedWriter(tmp_path / name, np.dtype("i4")) as writer:
            if tokens:
                writer.add_document([np.array(tokens)])
    assert "document 0 holds token 400, which is no id of this ByteTokenizer" in tool("show", "--data-path", tmp_path / "d", "--document", 0, "--tokenizer-type", "ByteTokenizer", fails=True)
    assert "has no documents" in tool("show", "--data-path", tmp_path / "e", "--document", 0, fails=True)
