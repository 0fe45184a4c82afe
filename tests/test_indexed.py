"""The .bin/.idx files against a reader and a writer made from the format alone, and every kind of damage."""

import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from megazero.base.errors import UserError
from megazero.data import indexed
from megazero.data.indexed import IndexedDataset, IndexedWriter, best_dtype

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden" / "tiny_gpt2_text_document"
needs_golden = pytest.mark.skipif(not GOLDEN.with_suffix(".idx").exists(), reason=f"no golden files at {GOLDEN.parent}")
DOCUMENTS = [[[1, 2, 3], [4]], [], [[65535, 0]], [[7] * 1000], []]


def plain_bytes(documents: list[list[list[int]]], code: int, letter: str) -> tuple[bytes, bytes]:
    """The two files from the table of the format, with struct alone: (.bin, .idx)."""
    sequences = [sequence for document in documents for sequence in document]
    size, starts, boundaries = struct.calcsize("<" + letter), [0], [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence) * size)
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    idx += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    idx += struct.pack(f"<{len(sequences)}q", *starts[:-1]) + struct.pack(f"<{len(boundaries)}q", *boundaries)
    return b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences), idx


def write(prefix: Path, documents: list, dtype: object = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def contents(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize(("name", "code", "letter"), [
    ("u1", 1, "B"), ("i1", 2, "b"), ("i2", 3, "h"), ("i4", 4, "i"), ("i8", 5, "q"), ("f8", 6, "d"), ("f4", 7, "f"), ("u2", 8, "H"),
])
def test_bytes_are_those_of_the_format(tmp_path: Path, name: str, code: int, letter: str) -> None:
    documents = [[[t % 100 for t in s] for s in document] for document in DOCUMENTS]
    assert contents(write(tmp_path / "d", documents, name)) == plain_bytes(documents, code, letter)


@pytest.mark.parametrize("documents", [[], [[]], [[], []], [[[5]]], DOCUMENTS, [[[i]] for i in range(3000)]])
def test_reads_what_another_writer_wrote(tmp_path: Path, documents: list) -> None:
    for path, data in zip(("d.bin", "d.idx"), plain_bytes(documents, 8, "H"), strict=True):
        (tmp_path / path).write_bytes(data)
    dataset = IndexedDataset(tmp_path / "d")
    flat = [[t for sequence in document for t in sequence] for document in documents]
    assert (dataset.document_count, dataset.sequence_count) == (len(documents), sum(map(len, documents)))
    assert dataset.token_count == sum(map(len, flat)) and dataset.dtype == np.uint16
    assert [dataset.document(i).tolist() for i in range(len(documents))] == flat
    assert dataset.tokens[:].tolist() == [t for document in flat for t in document]
    assert [dataset.document_token_boundaries(i) for i in range(len(documents) + 1)] == np.cumsum([0, *map(len, flat)]).tolist()


def test_offsets_carry_over_from_block_to_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "BLOCK", 3)
    documents = [[[i] * (i % 5 + 1)] for i in range(20)]
    assert contents(write(tmp_path / "d", documents)) == plain_bytes(documents, 8, "H")


@needs_golden
def test_golden_dataset_written_again_gives_the_same_bytes(tmp_path: Path) -> None:
    golden = IndexedDataset(GOLDEN)
    assert (golden.document_count, golden.token_count, golden.dtype) == (7222, 330_807, np.uint16)
    again = write(tmp_path / "again", [[golden.document(i)] for i in range(golden.document_count)])
    assert contents(again) == contents(GOLDEN)


def test_dtype_rule() -> None:
    assert [best_dtype(v) for v in (257, 65_499, 65_500, 65_536)] == [np.uint16, np.uint16, np.int32, np.int32]


def test_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for tokens, bad in (([70_000], "70000"), ([-1], "-1"), (np.array([65_536]), "65536")):
        with pytest.raises(UserError, match=f"token {bad} of document 1 does not fit uint16") as caught:
            write(tmp_path / "d", [[[1]], [tokens]])
        assert str(tmp_path / "d.bin") in caught.value.sentences[0]
    assert list(tmp_path.iterdir()) == []


def test_sequence_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="d.idx: a sequence after document 0 has 2147483648 tokens, the format holds up to 2147483647"), \
            IndexedWriter(tmp_path / "d", np.dtype("u2")) as writer:
        writer.add(np.empty(0, np.uint16), np.array([5, 1 << 31]), np.array([2]))
    assert list(tmp_path.iterdir()) == []


def test_streams_may_come_apart_and_go_on_elsewhere(tmp_path: Path) -> None:
    """Tokens, lengths and documents in calls of their own, and a second writer where the first one's mark was."""
    first = IndexedWriter(tmp_path / "d", np.dtype("u2"))
    first.add_document([[1, 2], [3]])
    mark = first.mark()
    first.add_document([[9] * 50])
    first.suspend()
    with IndexedWriter(tmp_path / "d", np.dtype("u2"), mark) as second:
        second.add(np.array([4, 5, 6], np.uint16), np.empty(0), np.empty(0))
        second.add(np.empty(0, np.uint16), np.array([1]), np.array([0, 2]))
        second.add(np.empty(0, np.uint16), np.array([2]), np.empty(0, np.int64))
    assert contents(tmp_path / "d") == plain_bytes([[[1, 2], [3]], [], [[4], [5, 6]]], 8, "H")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_checksums_do_not_depend_on_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "SUMMED", 10)
    data = bytes(range(35))
    for cuts in ([0, 35], [0, 10, 20, 35], [0, 1, 9, 30, 35]):
        sums = indexed.Sums()
        for low, high in zip(cuts, cuts[1:], strict=False):
            sums = indexed.Sums(sums.sums, sums.size)                # as after a restart
            sums.update(data[low:high])
        assert sums.sums == [zlib.crc32(data[i:i + 10]) for i in range(0, 35, 10)]


def test_nothing_is_left_of_a_failed_writer(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "d", np.dtype("u2")) as writer:
        writer.add_document([[1]])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_an_index_never_describes_another_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The process ends at the first or second rename over an older dataset: no .idx is there to be believed."""
    write(tmp_path / "d", [[[1, 2, 3]]])
    calls, replace = [], os.replace

    def sometimes(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", [[[4]]])
    assert not (tmp_path / "d.idx").exists()
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="cannot be read"):
        IndexedDataset(tmp_path / "d")


def test_memory_of_the_writer_does_not_grow(tmp_path: Path) -> None:
    document = [np.array([1, 2], np.uint16)]
    with IndexedWriter(tmp_path / "d", np.dtype("u2")) as writer:
        writer.add_document(document)
        tracemalloc.start()
        for _ in range(30_000):
            writer.add_document(document)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100_000                                   # lists of lengths would take a megabyte
    assert IndexedDataset(tmp_path / "d").document_count == 30_001


# where, what is put there, what the sentence says; the dataset has S = 4 sequences, D = 6
IDX_DAMAGE = {
    "empty": (None, b"", "0 bytes, expected at least the 34"),
    "magic": (0, b"X", "starts with b'XMIDIDX"),
    "version": (9, struct.pack("<Q", 2), "byte 9 says version 2, expected version 1"),
    "dtype": (17, b"\x09", "byte 17 says dtype code 9, expected 1 to 8"),
    "sequence count": (18, struct.pack("<Q", 5), "expected 142 for the 5 sequences and 6 boundaries"),
    "huge count": (18, struct.pack("<Q", 1 << 63), "bytes, expected"),
    "document count": (26, struct.pack("<Q", 7), "expected 138 for the 4 sequences and 7 boundaries"),
    "no documents": (26, struct.pack("<Q", 0), "0 document boundaries"),
    "first document": (82, struct.pack("<q", 1), "documents run from sequence 1 to 4, expected 0 to 4"),
    "last document": (122, struct.pack("<q", 3), "documents run from sequence 0 to 3, expected 0 to 4"),
    "first offset": (50, struct.pack("<q", 2), "describes bytes 2 to"),
    "last length": (46, struct.pack("<i", 999), "describes bytes 0 to 2010"),
}


@pytest.mark.parametrize("kind", IDX_DAMAGE)
def test_damaged_index_is_refused_at_open(tmp_path: Path, kind: str) -> None:
    at, data, sentence = IDX_DAMAGE[kind]
    index = Path(f"{write(tmp_path / 'd', DOCUMENTS)}.idx")
    raw = bytearray(index.read_bytes())
    assert len(raw) == 34 + 12 * 4 + 8 * 6
    if at is None:
        raw = bytearray(data)
    else:
        raw[at:at + len(data)] = data
    index.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        IndexedDataset(tmp_path / "d")
    (said,) = caught.value.sentences
    assert sentence in said and str(index) in said and said.endswith(".")


def test_cut_or_longer_files_are_refused_at_open(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", DOCUMENTS)
    for suffix, change in ((".bin", -1), (".bin", -2), (".bin", 2), (".idx", -1), (".idx", 1)):
        path = Path(f"{prefix}{suffix}")
        whole = path.read_bytes()
        path.write_bytes(whole[:change] if change < 0 else whole + b"\0" * change)
        with pytest.raises(UserError) as caught:
            IndexedDataset(prefix)
        assert str(path) in str(caught.value) and f"{len(whole) + change} bytes" in str(caught.value)
        path.write_bytes(whole)
    Path(f"{prefix}.idx").write_bytes(contents(prefix)[1] + b"\0" * 4)
    with pytest.raises(UserError, match="multimodal"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("at", "data", "sentence"), [
    (34 + 4, struct.pack("<i", 9), "the lengths of document 0 add up to 12 tokens, expected 4"),
    (50 + 16, struct.pack("<q", -2), "sequence 2 starts at byte -2"),
    (50 + 16, struct.pack("<q", 9), "sequence 2 starts at byte 9, expected a multiple of 2"),
    (50 + 16, struct.pack("<q", 1 << 40), "sequence 2 starts at byte 1099511627776"),
    (82 + 8, struct.pack("<q", 99), "document 1 starts at sequence 99, expected 0 to 4"),
])
def test_damage_in_between_is_found_when_read(tmp_path: Path, at: int, data: bytes, sentence: str) -> None:
    index = Path(f"{write(tmp_path / 'd', DOCUMENTS)}.idx")
    raw = bytearray(index.read_bytes())
    raw[at:at + len(data)] = data
    index.write_bytes(raw)
    dataset = IndexedDataset(tmp_path / "d")
    with pytest.raises(UserError, match="damaged") as caught:
        dataset.document(0)
    assert sentence in str(caught.value) and str(index) in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="d.idx: cannot be read"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        IndexedWriter(tmp_path / "file" / "d", np.dtype("u2"))


def test_a_trillion_tokens_open_at_once(tmp_path: Path) -> None:
    """100,000 documents of 10 million tokens each in a sparse .bin of 2 TB."""
    count, length = 100_000, 10_000_000
    with open(tmp_path / "d.idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
        index.write(np.full(count, length, "<i4").tobytes())
        index.write((np.arange(count, dtype="<i8") * length * 2).tobytes() + np.arange(count + 1, dtype="<i8").tobytes())
    try:
        with open(tmp_path / "d.bin", "wb") as tokens:
            tokens.truncate(2 * count * length)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of 2 TB ({error})")
    began = time.perf_counter()
    dataset = IndexedDataset(tmp_path / "d")
    middle = dataset.tokens[123_456_789_012:123_456_789_012 + 4097]
    seconds = time.perf_counter() - began
    assert dataset.token_count == 10**12 and middle.sum() == 0
    assert dataset.document_token_boundaries(77_777) == 77_777 * length
    assert seconds < 0.1


def test_a_file_cut_while_in_use_is_one_sentence(tmp_path: Path) -> None:
    """A map of it would end the process with SIGBUS."""
    dataset = IndexedDataset(write(tmp_path / "d", DOCUMENTS))
    os.truncate(tmp_path / "d.bin", 100)
    assert dataset.tokens[:50].tolist() == [1, 2, 3, 4, 65535, 0, *[7] * 44]
    with pytest.raises(UserError, match=r"d.bin: gave 20 of 40 bytes at byte 80, it had 2012 when it was opened; was it cut or replaced while in use"):
        dataset.tokens[40:60]
    os.truncate(tmp_path / "d.idx", 84)
    with pytest.raises(UserError, match=r"d.idx: gave 0 of 8 bytes at byte 98, it had 130 when"):
        dataset.document(2)


def test_a_dataset_in_use_is_the_one_that_was_opened(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", DOCUMENTS))
    write(tmp_path / "d", [[[9]]])
    assert dataset.document(2).tolist() == [65535, 0] and IndexedDataset(tmp_path / "d").document(0).tolist() == [9]


def test_an_error_of_the_disk_names_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(write(tmp_path / "d", DOCUMENTS))

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(UserError, match=r"d.bin: cannot be read at byte 20 \(Input/output error\)."):
        dataset.tokens[10:20]


def test_what_is_no_file_is_refused_at_open(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", DOCUMENTS)
    for end in ("bin", "idx"):
        good = tmp_path / "good"
        os.rename(f"{prefix}.{end}", good)
        os.mkfifo(f"{prefix}.{end}")                           # whoever opens it would wait
        with pytest.raises(UserError, match=rf"d.{end}: cannot be read \(is not a regular file\)"):
            IndexedDataset(prefix)
        os.rename(good, f"{prefix}.{end}")


def test_an_array_of_a_file_is_like_numpys(tmp_path: Path) -> None:
    """Its ends, too: what lies outside is an error, not another entry."""
    numbers = IndexedDataset(write(tmp_path / "d", DOCUMENTS)).lengths
    expected = np.array([3, 1, 2, 1000])
    assert numbers[-1] == 1000 and numbers[0] == 3 and len(numbers) == 4 and numbers.nbytes == 16
    for part in (slice(None), slice(1, 3), slice(3, 1), slice(-2, 99), slice(7, 9)):
        assert numbers[part].tolist() == expected[part].tolist()
    for outside in (4, -5, 10**15):
        with pytest.raises(IndexError):
            numbers[outside]
