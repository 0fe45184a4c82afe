"""Every kind of input gives the same documents, from any place on; what is broken is named."""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import signal
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from megazero.base.errors import UserError
from megazero.corpus import sources
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.sources import Place, Unreadable, documents, find_sources, read_chunks
from megazero.corpus.tables import Misplaced, Question, TableReader
from megazero.data import files
from megazero.data.files import suffix_of

TEXTS = ["first", "", "emoji 😀", "nul \0 nul", "cr\r\nlf", "line\u2028separator", "x" * 20_000, *map(str, range(3000)), "last"]
JSONL = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(*inputs: object, start: Place = Place(), keys: tuple[str, ...] = ("text",), input_format: str = "auto") -> tuple[list, list[str]]:  # noqa: B008
    """(texts, sentences) of what the inputs hold."""
    found = [document for chunk in read_chunks(find_sources([str(i) for i in inputs], keys, input_format), keys, start)
             for document in documents(chunk, keys)]
    texts = [d["text"][0] if len(d["text"]) == 1 else d["text"] for d in found if not isinstance(d, Unreadable)]
    return texts, [d.sentence for d in found if isinstance(d, Unreadable)]


def zstd(data: bytes) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    half = len(data) // 2
    return compressor.compress(data[:half]) + compressor.compress(data[half:])          # two frames, as pzstd makes them


PACKED = {".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]), ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("end", PACKED)
def test_compressed_lines_and_texts(tmp_path: Path, end: str) -> None:
    (tmp_path / f"a.jsonl{end}").write_bytes(PACKED[end](JSONL))
    (tmp_path / f"b.txt{end}").write_bytes(PACKED[end](b"plain text\n"))
    assert read(tmp_path / f"a.jsonl{end}", tmp_path / f"b.txt{end}") == ([*TEXTS, "plain text\n"], [])
    assert (suffix_of(f"x/a.jsonl{end}"), suffix_of(f"s3://b/a.txt{end}")) == (".jsonl", ".txt")
    assert suffix_of(f"https://h/a.jsonl{end}?download=true") == ".jsonl"


@pytest.mark.parametrize("end", PACKED)
def test_a_cut_or_damaged_compressed_file_is_told_and_the_rest_goes_on(tmp_path: Path, end: str) -> None:
    whole = PACKED[end](JSONL)
    (tmp_path / "z.jsonl").write_bytes(b'{"text": "after"}\n')
    for damaged in (whole[:len(whole) * 2 // 3], whole[:50] + bytes(40) + whole[90:]):
        (tmp_path / f"a.jsonl{end}").write_bytes(damaged)
        texts, said = read(tmp_path / f"a.jsonl{end}", tmp_path / "z.jsonl")
        assert texts[-1] == "after" and texts[:-1] == TEXTS[:len(texts) - 1]
        assert len(said) == 1 and f"a.jsonl{end}:" in said[0] and "is damaged, nothing after this can be read" in said[0]


def tables(folder: Path) -> list[Path]:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    table = arrow.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    paths = [folder / name for name in ("a.parquet", "b.parquet", "c.arrow", "d.arrow", "e.feather")]
    pyarrow.parquet.write_table(table, paths[0], row_group_size=700)
    pyarrow.parquet.write_table(table.cast(arrow.schema({"n": arrow.int32(), "text": arrow.large_string()})), paths[1])
    for path, new in ((paths[2], arrow.ipc.new_stream), (paths[3], arrow.ipc.new_file), (paths[4], arrow.ipc.new_file)):
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=900)
    return paths


def test_tables(tmp_path: Path) -> None:
    paths = tables(tmp_path)
    assert read(*paths) == (TEXTS * len(paths), [])
    chunks = list(read_chunks(find_sources([str(path) for path in paths]), ["text"], Place()))
    assert max(len(chunk.raw) for chunk in chunks) < 600_000


def test_tables_with_holes_lists_and_wrong_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(arrow.table({"text": ["a", None, "b"], "q": [["x", "y"], [], ["z"]]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == (["a", "b"], [f"{tmp_path}/t.parquet:2: has a NoneType under 'text', expected a text"])
    _, said = read(tmp_path / "t.parquet", keys=("text", "none"))
    assert said == [f"{tmp_path}/t.parquet:{n}: has no column 'none'" for n in (1, 2, 3)]
    chunk, = read_chunks(find_sources([str(tmp_path / "t.parquet")], ["q"]), ["q"], Place())
    assert list(documents(chunk, ["q"])) == [{"q": ["x", "y"]}, {"q": []}, {"q": ["z"]}]
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(100))
    _, said = read(tmp_path / "t.parquet")
    assert len(said) == 1 and "t.parquet:1: is damaged" in said[0]


def test_blocks_end_at_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\none\ntwo \n\n \t\nthree\r\nfour\r\n\r\n\n" + b"word \n" * 30 + b"\nlast")
    expected = ["one\ntwo ", "three\r\nfour", "word \n" * 29 + "word ", "last"]
    for size in (1, 7, 50, 1 << 18):                                   # wherever a chunk is cut
        monkeypatch.setattr(sources, "CHUNK", size)
        assert read(tmp_path / "a.txt", input_format="blocks") == (expected, [])
    (tmp_path / "b.txt").write_bytes(b"good\n\nbad \xff\nline\n\ngood")
    assert read(tmp_path / "b.txt", input_format="blocks") == (["good", "good"], [f"{tmp_path}/b.txt:3: is not UTF-8 at byte 4"])


def test_reading_goes_on_from_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (tmp_path / "c.txt").write_text("whole")
    monkeypatch.setattr(sources, "CHUNK", 9_000)
    every = find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.txt"), *map(str, tables(tmp_path))])
    chunks = list(read_chunks(every, ["text"], Place()))
    assert len(chunks) > 50
    of_tables = next(i for i, c in enumerate(chunks) if c.source.kind == "parquet")      # each starts a process
    for i in (*range(0, of_tables, 12), *range(of_tables, len(chunks), 30)):
        later = [(c.source, c.first, c.raw) for c in read_chunks(every, ["text"], chunks[i].after)]
        assert [d for c in chunks[i + 1:] for d in documents(c, ["text"])] == [
            d for s, first, raw in later for d in documents(chunks[0]._replace(source=s, first=first, raw=raw), ["text"])]
    lines = [c for c in chunks if c.source.path.endswith("a.jsonl")]
    assert [c.first for c in lines] == [1 + JSONL[:sum(len(x.raw) for x in lines[:i])].count(b"\n") for i in range(len(lines))]


def test_globs_standard_input_and_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert read(f"{tmp_path}/*.jsonl")[0] == ["a.jsonl", "b.jsonl"]
    assert read(f"{tmp_path}/**/*.jsonl")[0] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert read(tmp_path / "a.jsonl", input_format="text")[0] == ['{"text": "a.jsonl"}\n']
    with pytest.raises(UserError, match=r"--input .*/\*\.txt: no such file or folder"):
        read(f"{tmp_path}/*.txt")
    for data, how, expected in ((JSONL, "auto", TEXTS), (b"a\n\nb", "blocks", ["a", "b"]), (b"a\n\nb", "text", ["a\n\nb"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read("-", input_format=how) == (expected, [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    assert read("-")[1][0].startswith("standard input:1: is not JSON")


def test_urls(tmp_path: Path) -> None:
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.pipe({"/corpus/a.jsonl.gz": gzip.compress(JSONL), "/corpus/deep/b.txt": b"text"})
    assert read("memory://corpus") == ([*TEXTS, "text"], [])
    assert read("memory://corpus/*.gz", "memory://corpus/deep/b.txt") == ([*TEXTS, "text"], [])
    with pytest.raises(UserError, match="--input memory://nothing: no such file or folder"):
        read("memory://nothing")
    with pytest.raises(UserError, match="nosuch://x: fsspec cannot reach it"):
        read("nosuch://x")


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('as if it were not there')")
    monkeypatch.syspath_prepend(str(tmp_path))                 # for the process that reads tables
    with pytest.raises(UserError, match=r"a.parquet: needs pyarrow; pip install 'megazero\[data\]'."):
        read(tmp_path / "a.parquet")


LONG = {"a.jsonl": b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "x" * 5000, "two", "y" * 700, "three")),
        "a.txt": b"one\n\n" + b"long \n" * 900 + b"\n \ntwo\n\n" + b"y" * 700 + b"\n\nthree\n"}


@pytest.mark.parametrize("chunk", [1, 40, 800])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_document_that_is_too_long_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, end: str) -> None:
    """Wherever chunks are cut, and from any of them on."""
    for name, value in {"CHUNK": chunk, "PIECE": 64, "LONGEST": 1000}.items():
        monkeypatch.setattr(sources, name, value)
    for name, line, how in (("a.jsonl", 2, "auto"), ("a.txt", 3, "blocks")):
        path = tmp_path / (name + end)
        path.write_bytes(gzip.compress(LONG[name]) if end else LONG[name])
        texts, said = read(path, input_format=how)
        assert [text[:1] + text[-1:] for text in texts] == ["oe", "to", "yy", "te"]
        assert said == [f"{path}:{line}: is longer than 1,000 bytes; cut it in pieces"]
        chunks = list(read_chunks(find_sources([str(path)], input_format=how), ["text"], Place()))
        assert max(len(c.raw) for c in chunks) <= chunk + 1000
        for i, c in enumerate(chunks):
            later = read_chunks(find_sources([str(path)], input_format=how), ["text"], c.after)
            assert [d for c in later for d in documents(c, ["text"])] == [d for c in chunks[i + 1:] for d in documents(c, ["text"])]
    (tmp_path / f"b.txt{end}").write_bytes(gzip.compress(b"z" * 1001) if end else b"z" * 1001)
    assert read(tmp_path / f"b.txt{end}") == ([], [f"{tmp_path}/b.txt{end}: is longer than 1,000 bytes; cut it in pieces"])


def test_a_row_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    monkeypatch.setattr(sources, "LONGEST", 1000)
    pyarrow.parquet.write_table(arrow.table({"text": ["a", "x" * 1001, "b"] + ["same"] * 5000}), tmp_path / "t.parquet")
    texts, said = read(tmp_path / "t.parquet")
    assert texts == ["a", "b"] + ["same"] * 5000 and len(said) == 1 and said[0].startswith(f"{tmp_path}/t.parquet:2: is longer than 1,000 bytes")
    pyarrow.parquet.write_table(arrow.table({"text": ["\1" * 150, "\1" * 180]}), tmp_path / "t.parquet", row_group_size=1)
    assert read(tmp_path / "t.parquet") == (["\1" * 150], [f"{tmp_path}/t.parquet:2: is longer than 1,000 bytes as JSON; cut it in pieces"])


@pytest.mark.parametrize("end", PACKED)
def test_a_few_bytes_that_stand_for_many_are_unpacked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    packed = PACKED[end](bytes(1 << 28 if end == ".zst" else 1 << 26))
    (tmp_path / f"a.jsonl{end}").write_bytes(packed)
    tracemalloc.start()
    texts, said = read(tmp_path / f"a.jsonl{end}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [] and said == [f"{tmp_path}/a.jsonl{end}:1: is longer than 1,048,576 bytes; cut it in pieces"] and len(packed) < 300_000
    assert peak < (100_000_000 if end in ('.zst', '.xz') else 10_000_000)


def test_an_archive_that_asks_for_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UNPACKING", 1 << 20)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text"))
    assert "is damaged, nothing after this can be read (Memory usage limit exceeded)" in read(tmp_path / "a.txt.xz")[1][0]
    monkeypatch.setattr(files, "UNPACKING", 1 << 29)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"text") + bytes(8) + lzma.compress(b" more") + bytes(4))
    assert read(tmp_path / "a.txt.xz") == (["text more"], [])


def test_the_death_of_what_reads_tables_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 9_000)
    every = find_sources([str(path) for path in tables(tmp_path)[:2]])
    with closing(read_chunks(every, ["text"], Place())) as chunks:
        assert next(documents(next(chunks), ["text"])) == {"text": ["first"]}
        child, = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        rest = [document for chunk in chunks for document in documents(chunk, ["text"])]
    said = [d.sentence for d in rest if isinstance(d, Unreadable)]
    assert len(said) == 1 and "a.parquet:" in said[0] and "is damaged, nothing after this can be read (what reads it ended with SIGKILL)" in said[0]
    assert [d["text"] for d in rest[-len(TEXTS):]] == [[text] for text in TEXTS] and not multiprocessing.active_children()
    with closing(TableReader()) as reader:
        question = Question("parquet", every[0].path, 0, ("text",), 9_000, 1 << 30)
        first = list(reader.rows(question))
        assert reader._process is not None
        reader._process.kill()                                  # between two files: no file is to blame
        reader._process.join()
        assert list(reader.rows(question)) == first


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_tables_are_counted_like_other_damage(tmp_path: Path, capfd: pytest.CaptureFixture, workers: int) -> None:
    for path in tables(tmp_path):
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64:len(whole) - 9])
    (tmp_path / "z.jsonl").write_bytes(b'{"text": "after"}\n')
    report, = preprocess(PreprocessSettings((f"{tmp_path}/*",), str(tmp_path / "out" / "d"), "ByteTokenizer", workers=workers))
    said = [line for line in capfd.readouterr().err.split("\n") if line.startswith("skipped ")]
    assert report.skipped == len(said) >= 5 and all(any(f"{name}:" in line for line in said) for name in ("a.parquet", "c.arrow", "d.arrow", "e.feather"))


def test_a_place_beyond_the_end_is_told(tmp_path: Path) -> None:
    for end in ("", ".gz"):
        (tmp_path / f"a.jsonl{end}").write_bytes(gzip.compress(JSONL) if end else JSONL)
        with pytest.raises(Misplaced, match=f"a.jsonl{end} ends before byte 1,000,000,000"):
            read(tmp_path / f"a.jsonl{end}", start=Place(0, 10**9, 3))
        with pytest.raises(Misplaced, match=f"no document begins at byte 3 of .*a.jsonl{end}"):
            read(tmp_path / f"a.jsonl{end}", start=Place(0, 3, 1))
        assert read(tmp_path / f"a.jsonl{end}", start=Place(0, len(JSONL), 3)) == ([], [])


def test_a_row_beyond_the_end_is_told(tmp_path: Path) -> None:
    for path in tables(tmp_path)[1::2]:
        with pytest.raises(Misplaced, match=f"{path.name} has {len(TEXTS):,} rows, it tells of {len(TEXTS) + 1:,}"):
            read(path, start=Place(0, len(TEXTS) + 1, len(TEXTS) + 2))


def test_a_block_begins_behind_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n \t\nthree\n")
    for at, rest in ((0, ["one\ntwo", "three"]), (11, ["three"]), (17, [])):
        assert read(tmp_path / "a.txt", input_format="blocks", start=Place(0, at, 1))[0] == rest
    for at in (2, 4, 8, 10, 12):
        with pytest.raises(Misplaced, match=f"no document begins at byte {at} of"):
            read(tmp_path / "a.txt", input_format="blocks", start=Place(0, at, 1))


def test_globs_are_those_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.x", "d/b.x", "d/e/c.x", "d/e/f/g.y", "d/.h/i.x", "[d]/j.x", "d2/e/k.x", ".l.x", "d/yx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in ("**", "**/*.x", "d/**", "d/**/*.x", "d*/**/e/*", "**/e/**/*.y", "**/e/**", "[[]d]/**/*", "d/**x", "*.x", f"{tmp_path}/**/*.x", "d//**//*.x"):
        assert files.expand(pattern)[0] == sorted(f for f in set(glob.glob(pattern, recursive=True)) if os.path.isfile(f)), pattern


def test_links_that_lead_in_circles_are_not_followed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a/one.txt", "a/b/two.txt", "elsewhere/three.txt"):
        (tmp_path / name).write_text(name)
    for i in range(20):
        (tmp_path / "a" / "b" / f"up{i}").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "z").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "self.txt").symlink_to("self.txt")
    (tmp_path / "a" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.txt")
    assert read(f"{tmp_path}/a/**/*.txt") == (["a/b/two.txt", "elsewhere/three.txt", "a/one.txt"], [])
    assert read(tmp_path / "a") == (["a/b/two.txt", "a/one.txt"], [])
    for word in ("a/self.txt", "a/gone.txt", "a/self.txt/x"):
        with pytest.raises(UserError, match=f"--input .*{word}: no such file or folder"):
            read(tmp_path / word)


def test_a_deep_folder_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["mkdir", "-p", "in/" + "a/" * 1100], check=True)
    Path("in/" + "a/" * 1100 + "x.txt").write_text("deep")
    assert read("in") == (["deep"], []) and read("in/**/*.txt") == (["deep"], [])
    subprocess.run(["rm", "-r", "in"], check=True)              # pytest's own way goes down by calls


@pytest.mark.parametrize("end", PACKED)
def test_lines_before_the_damage_of_a_compressed_file_are_read(tmp_path: Path, end: str) -> None:
    every = [f"{i} {hashlib.sha256(str(i).encode()).hexdigest()}" for i in range(40_000)]
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in every]
    whole = b"".join(PACKED[end](b"".join(rows[i:i + 4000])) for i in range(0, len(rows), 4000))
    path = tmp_path / f"a.jsonl{end}"
    for raw, least in ((whole[:len(whole) * 2 // 3], 24_000), (whole + b"garbage behind it", 40_000), (whole + b"\1", 40_000)):
        path.write_bytes(raw)
        texts, said = read(path)
        assert texts == every[:len(texts)] and len(texts) >= least and len(said) == 1
        assert said[0].startswith(f"{path}:{len(texts) + 1}: is damaged, nothing after this can be read (")


@pytest.mark.parametrize("end", PACKED)
def test_an_empty_compressed_file_holds_nothing(tmp_path: Path, end: str) -> None:
    (tmp_path / f"a.jsonl{end}").write_bytes(b"")
    (tmp_path / f"b.jsonl{end}").write_bytes(PACKED[end](b""))
    assert read(tmp_path / f"a.jsonl{end}", tmp_path / f"b.jsonl{end}") == ([], [])


@pytest.mark.parametrize("name", ["a.parquet.zst", "a.arrow.gz", "a.feather.xz", "a.ipc.bz2"])
def test_a_table_compressed_as_a_whole_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=f"{name}: a table is read at many places and cannot be compressed as a whole; unpack it first"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.arrow"])
def test_what_is_said_where_nothing_could_be_read(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"\xff\0 nothing of the kind\n")
    with pytest.raises(UserError) as told:
        preprocess(PreprocessSettings((str(tmp_path / name),), str(tmp_path / "d"), "ByteTokenizer"))
    hint = "; a .json or .jsonl file must hold one object per line" if name == "a.jsonl" else ""
    assert str(told.value) == f"--input {tmp_path / name}: nothing in it could be read (see above){hint}. Nothing was written."
