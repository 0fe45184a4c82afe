"""Damaged datasets: found at open, when read, or by verify; always one sentence, never a crash, never other tokens. fuzz/ draws more of them."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, TINY
from test_indexed import IDX_DAMAGE

from megazero.base.errors import UserError
from megazero.corpus.edit import document_lengths, merge_datasets
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.verify import problems
from megazero.data.dataset import Reading, open_stages
from megazero.data.indexed import IndexedDataset, IndexedWriter

S, D = 40, 44                   # sequences and documents of the dataset below; every tenth document or so is empty


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The three files of a good dataset."""
    folder = tmp_path_factory.mktemp("whole")
    lines = [json.dumps({"text": "" if i % 11 == 5 else "word " * (1 + i * 7 % 13)}) for i in range(D)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    preprocess(PreprocessSettings((str(folder / "in.jsonl"),), str(folder / "d"), "ByteTokenizer", append_eod=True))
    files = {end: (folder / f"d_text_document.{end}").read_bytes() for end in ("bin", "idx", "json")}
    assert struct.unpack("<QQ", files["idx"][18:34]) == (S, D + 1)
    return files


@pytest.mark.parametrize("kind", IDX_DAMAGE)
def test_verify_says_what_open_says(tmp_path: Path, whole: dict[str, bytes], kind: str) -> None:
    prefix = tmp_path / "d"
    with IndexedWriter(prefix, np.dtype("u2")) as writer:
        for document in ([[1, 2, 3], [4]], [], [[65535, 0]], [[7] * 1000], []):
            writer.add_document(document)
    at, data, sentence = IDX_DAMAGE[kind]
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw = bytearray(data) if at is None else raw[:at] + data + raw[at + len(data):]
    Path(f"{prefix}.idx").write_bytes(raw)
    assert [sentence in said for said in problems(str(prefix))] == [True]


def test_each_kind_that_only_verify_finds(tmp_path: Path, whole: dict[str, bytes]) -> None:
    prefix = str(tmp_path / "d")

    def said(end: str, at: int, data: bytes) -> str:
        for name, good in whole.items():
            Path(f"{prefix}.{name}").write_bytes(good)
        raw = bytearray(whole[end])
        raw[at:at + len(data)] = data
        Path(f"{prefix}.{end}").write_bytes(raw)
        return "\n".join(problems(prefix))

    assert f"{prefix}.bin: bytes 0 to {len(whole['bin']) - 1} have CRC-32 " in said("bin", 10, b"\x05")
    assert f"{prefix}.bin: token 5 is 2560, expected 0 to 256; the file is damaged" in said("bin", 10, b"\x00\x0a")
    assert "sequence 3 has -7 tokens from byte" in said("idx", 34 + 12, struct.pack("<i", -7))
    assert "sequence 3 has 9 tokens from byte" in said("idx", 34 + 12, struct.pack("<i", 9))
    assert "expected each to end where the next one starts" in said("idx", 34 + 4 * S + 24, struct.pack("<q", 2))
    assert "document 7 runs from sequence" in said("idx", 34 + 12 * S + 56, struct.pack("<q", 39))
    told = json.loads(whole["json"])
    for name, good in whole.items():
        Path(f"{prefix}.{name}").write_bytes(good)
    Path(f"{prefix}.json").write_text(json.dumps(told | {"tokens": 5}))
    assert f"{prefix}.json: tells of 5 tokens, {prefix}.idx of {told['tokens']}" in "\n".join(problems(prefix))
    Path(f"{prefix}.json").write_text(json.dumps({"vocab_size": 257}))
    assert "d.bin: its sidecar holds no checksum" in "\n".join(problems(prefix))


@pytest.mark.parametrize(("text", "said"), {
    "null": "it is None, not a mapping", "{}": "it has no vocab_size", '{"vocab_size": 0}': "vocab_size is 0", '{"vocab_size": 3.5}': "vocab_size is 3.5",
    '{"vocab_size": 99999999999}': "vocab_size is 99999999999", '{"vocab_size": 9, "vocab_size": 257}': "key 'vocab_size' stands twice", "[" * 9999: "deep",
    '{"vocab_size": 257, "sums": {"block": 1, "bin": [-1], "idx": []}}': "sums.bin[0] is -1", '{"vocab_size": 257, "tokens": -1}': "tokens is -1",
    '{"vocab_size": 257, "tokenizer": {"type": "ByteTokenizer"}}': "tokenizer has no vocab_size", '{"vocab_size": 257, "sources": [3]}': "sources[0] is 3",
}.items())
def test_a_sidecar_has_its_form(tmp_path: Path, whole: dict[str, bytes], text: str, said: str) -> None:
    for end in ("bin", "idx"):
        (tmp_path / f"d.{end}").write_bytes(whole[end])
    (tmp_path / "d.json").write_text(text)
    prefix = str(tmp_path / "d")
    for use in (lambda: open_stages([(0, [prefix])], None, "train", Reading(16, 1, True), 257), lambda: merge_datasets([prefix], f"{prefix}2")):
        with pytest.raises(UserError) as caught:
            use()
        assert f"{prefix}.json: is no sidecar (" in str(caught.value) and said in str(caught.value), caught.value
    assert [f"{prefix}.json: is no sidecar" in sentence for sentence in problems(prefix)] == [True]


def test_another_datasets_sidecar_is_told_at_open(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for end, data in whole.items():
        (tmp_path / f"d.{end}").write_bytes(data)
    (tmp_path / "d.json").write_text(json.dumps(json.loads(whole["json"]) | {"tokens": 5}))
    with pytest.raises(UserError, match="d.json: tells of 5 tokens, .*d.idx of [0-9]+; they belong to different datasets"):
        open_stages([(0, [str(tmp_path / "d")])], None, "train", Reading(16, 1, True), 257)


def test_a_run_whose_file_is_cut_ends_with_a_sentence(tmp_path: Path) -> None:
    """Not with SIGBUS, nor with a traceback."""
    with IndexedWriter(tmp_path / "d", np.dtype("u2")) as writer:
        writer.add_document([np.arange(20_000) % 101])
    words = [*TINY.replace("--mock-data --train-iters 5", "--train-iters 1000000").split(), "--train-data-path", str(tmp_path / "d"),
             "--log-dir", str(tmp_path / "log")]
    run = subprocess.Popen([sys.executable, "pretrain_gpt.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log" / "metrics.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    os.truncate(tmp_path / "d.bin", 3)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2 and "Traceback" not in said, said
    assert f"error: {tmp_path}/d.bin: gave " in said and "it had 40000 when it was opened; was it cut or replaced while in use?" in said, said


def test_whoever_reads_boundaries_looks_at_them(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for end, data in whole.items():
        Path(f"{tmp_path}/d.{end}").write_bytes(data)
    with open(tmp_path / "d.idx", "r+b") as index:
        index.seek(34 + 12 * S + 56)
        index.write(struct.pack("<q", 10**15))
    dataset, said = IndexedDataset(tmp_path / "d"), "document 6 runs from sequence 5 to 1000000000000000, expected"
    for read in (lambda: list(document_lengths(dataset)), lambda: dataset.document(6), lambda: dataset.boundaries(0, D),
                 lambda: merge_datasets([str(tmp_path / "d")], str(tmp_path / "new"))):
        with pytest.raises(UserError) as caught:
            read()
        assert said in str(caught.value) or "document 7 starts at sequence 1000000000000000" in str(caught.value)
    assert not list(tmp_path.glob("new*"))
