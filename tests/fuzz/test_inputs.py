"""Inputs of preprocessing from disks that fail and from strangers: each kind of file damaged, forged, or larger than it looks."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz.support import accident, bent, cases, forged, hunt, spoiled
from megazero.base.errors import UserError
from megazero.corpus import sources
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.sources import Input, Place, Unreadable, documents
from megazero.corpus.tables import TableReader
from megazero.corpus.verify import problems
from megazero.data.indexed import IndexedDataset

TEXTS = {name: [f"{name} {i} " + "é" * (i % 5) for i in range(12)] for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.jsonl.bz2", "e.jsonl.zst")}


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".gz": gzip.compress, ".xz": lambda data: lzma.compress(data, preset=0), ".bz2": bz2.compress, ".zst": zst}


def lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text, "n": i}).encode() for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "in"
    folder.mkdir()
    for name, texts in TEXTS.items():
        (folder / name).write_bytes(PACK[Path(name).suffix](b"\n".join(lines(texts))))
    (folder / "f.txt").write_text("f.txt 0 ")
    return folder


def damage(rng: Random, folder: Path) -> str:
    if rng.random() < 0.4:
        return accident(rng, folder)
    name = rng.choice(list(TEXTS))
    rows, at = lines(TEXTS[name]), rng.randrange(12)
    kind = rng.choice(("bent", "spoiled", "long", "deep", "many", "zeros"))
    if kind == "spoiled":
        rows[at], what = spoiled(rng, {"text": "x", "n": [1]})
    elif kind == "bent":
        rows[at], what = bent(rng, rows[at])
    else:
        rows[at], what = {"long": b'{"text": "' + b"x" * 2**20 + b'"}', "deep": b"[" * 200_000, "many": b"\n" * 300_000, "zeros": bytes(2**22)}[kind], kind
    (folder / name).write_bytes(PACK[Path(name).suffix](b"\n".join(rows)))
    return f"{name}:{at}: {what}"


def use(folder: Path) -> set[str]:
    """The documents that are written. A dataset is whole, or nothing is there."""
    out = folder.parent / "out"
    try:
        report, = preprocess(PreprocessSettings((f"{folder}/*",), str(out / "d"), "ByteTokenizer"))
    except UserError:
        assert not list(out.glob("*")), "something is left behind"
        raise
    assert not list(problems(report.prefix)) and sorted(p.suffix for p in out.iterdir()) == [".bin", ".idx", ".json"]
    dataset = IndexedDataset(report.prefix)
    return {bytes(dataset.document(i).astype("u1")).decode() for i in range(dataset.document_count)}


@cases(200, 2000)
def test_inputs(count: int, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One damaged file takes nothing from the others."""
    monkeypatch.setattr(sources, "LONGEST", 2**19)
    monkeypatch.setattr(sources, "CHUNK", 2**12)
    monkeypatch.setattr("os.fsync", lambda _: None)             # nobody pulls the plug here

    def right(found: Any) -> bool:
        return sum(not set(texts) <= found for texts in TEXTS.values()) <= 2 and not any(len(text) > 2**19 for text in found)

    hunt("input", count, good, tmp_path, damage, use, right)


# ---- what an unfinished run leaves

@cases(40, 400)
def test_notes(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A run goes on from its note to the bytes of one that was never stopped, or says why not; at worst verify tells. Who forges a note and
    its checksum can end a run early, no more."""
    module, words = sys.modules["megazero.corpus.preprocess"], [{"text": f"line {i} " + "é" * (i % 5)} for i in range(200)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(word) for word in words))
    for name, value in {"CHUNK": 256, "SAVE_SECONDS": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sources, "CHUNK", 256)
    monkeypatch.setattr("os.fsync", lambda _: None)

    def use(folder: Path) -> tuple[list[str], list[bytes]]:
        report, = preprocess(PreprocessSettings((str(tmp_path / "in.jsonl"),), str(folder / "d"), "ByteTokenizer"))
        return list(problems(report.prefix)), [Path(report.prefix + end).read_bytes() for end in (".bin", ".idx")]

    expected, batches = use(tmp_path / "whole"), iter(range(9))
    with monkeypatch.context() as stop, pytest.raises(StopIteration):
        stop.setattr(module, "_report_skipped", lambda *_: next(batches))
        use(tmp_path / "good")
    assert expected[0] == [] and (tmp_path / "good" / "d.progress.json").exists()

    def damage(rng: Random, folder: Path) -> str:
        return accident(rng, folder)

    def forge(rng: Random, folder: Path) -> str:
        note = folder / "d.progress.json"
        told = json.loads(note.read_text())
        told.pop("sum")
        found, what = forged(rng, told) if rng.random() < 0.7 else spoiled(rng, told)
        note.write_bytes(found if isinstance(found, bytes) else json.dumps({**found, "sum": module._sum(found)}).encode())
        return what

    hunt("note", count, tmp_path / "good", tmp_path, damage, use, lambda found: bool(found[0]) or found == expected)
    hunt("forged note", count, tmp_path / "good", tmp_path, forge, use, lambda found: True)


# ---- tables

ROWS = [f"row {i} " + "é" * (i % 5) for i in range(60)]
KINDS = {"a.parquet": "parquet", "b.parquet": "parquet", "c.arrow": "arrow", "d.arrow": "arrow", "e.arrow": "arrow"}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrow, folder = pytest.importorskip("pyarrow"), tmp_path_factory.mktemp("good") / "in"
    import pyarrow.parquet
    folder.mkdir()
    table = arrow.table({"n": list(range(60)), "text": ROWS, "list": [[text, text] for text in ROWS]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=25)
    pyarrow.parquet.write_table(table, folder / "b.parquet", compression="zstd", use_dictionary=False)
    for name, new, packed in (("c.arrow", arrow.ipc.new_stream, None), ("d.arrow", arrow.ipc.new_file, None), ("e.arrow", arrow.ipc.new_file, "zstd")):
        with new(folder / name, table.schema, options=arrow.ipc.IpcWriteOptions(compression=packed)) as writer:
            writer.write_table(table, max_chunksize=20)
    return folder


@pytest.fixture
def reader() -> Iterator[TableReader]:
    with closing(TableReader()) as found:
        yield found


def bend(rng: Random, folder: Path) -> str:
    path = folder / rng.choice(list(KINDS))
    data, what = bent(rng, path.read_bytes())
    path.write_bytes(data)
    for other in set(KINDS) - {path.name}:
        (folder / other).unlink()
    return f"{path.name}: {what}"


@cases(150, 1500)
def test_tables(count: int, tables: Path, tmp_path: Path, reader: TableReader) -> None:
    """Texts, or sentences; whatever becomes of the process that reads."""
    def use(folder: Path) -> list[Any]:
        path, = folder.iterdir()
        source, keys = Input(str(path), KINDS[path.name]), ("text", "list")
        chunks = sources._to_damage(source, Place(), sources._rows(source, Place(), keys, reader, sources.LONGEST))
        return [found for chunk in chunks for found in documents(chunk, keys)]

    def right(found: Any) -> bool:
        status = Path(f"/proc/{reader._process.pid}/status").read_text().splitlines() if reader._process else []
        return all(int(line.split()[1]) < 2**20 for line in status if line.startswith("VmHWM")) and len(found) < 2000 and all(
            len(one.sentence) < 900 and one.sentence.isprintable() if isinstance(one, Unreadable) else
            set(one) == {"text", "list"} and all(isinstance(text, str) for texts in one.values() for text in texts) for one in found)

    hunt("table", count, tables, tmp_path, bend, use, right, seconds=60, memory=2**31)        # a start takes long where much runs
