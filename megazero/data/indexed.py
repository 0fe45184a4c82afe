"""Megatron's indexed dataset, byte for byte: PREFIX.bin holds tokens,
PREFIX.idx says where sequences and documents are.

    PREFIX.bin   the tokens of all sequences back to back, no header

    PREFIX.idx   byte 0         magic            4d 4d 49 44 49 44 58 00 00 ("MMIDIDX", two zeros)
                 9              version          u64 = 1
                 17             dtype code       u8, see DTYPES
                 18             S                u64, sequences
                 26             D                u64, documents + 1
                 34             lengths          i32[S], tokens of each sequence
                 34 + 4 S       offsets          i64[S], first byte of each sequence in .bin
                 34 + 12 S      documents        i64[D], first sequence of each document; starts with 0, ends with S

All numbers are little-endian. An empty text is a document with no sequence. Opening costs the same for a kilobyte and
for a terabyte: it checks both sizes and both ends; the entries in between are checked when they are read.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from glob import escape, glob
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from megazero.base import Lease, UserError, opened, sync, unwritable
from megazero.data.files import Numbers, bytes_of, window

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name)
          for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)}
BLOCK = 1 << 20                               # lengths turned into offsets at a time: memory stays flat for any corpus
LONGEST = (1 << 31) - 1                       # tokens of a sequence
SUMMED = 1 << 26                              # bytes of a checksum
COUNT, CRC = range(2**62), range(2**32)       # what files may say of a count, of a checksum
AFRESH = "begin again under another --output-prefix, or remove the files of this one."


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron writes for a vocabulary: two bytes a token below 65,500 ids, else four."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


class Sums:
    """CRC-32 of each block of SUMMED bytes of a file, as it passes; the last one is of what there is."""

    def __init__(self, sums: Sequence[int] = (), size: int = 0) -> None:
        self.sums, self.size = list(sums), size

    def update(self, data: bytes | memoryview) -> None:
        view, at = memoryview(data).cast("B"), 0
        while at < len(view):
            if self.size % SUMMED == 0:
                self.sums.append(0)
            part = view[at:at + SUMMED - self.size % SUMMED]
            self.sums[-1] = zlib.crc32(part, self.sums[-1])
            at, self.size = at + len(part), self.size + len(part)


class Written(NamedTuple):
    """How far a dataset has been written: enough to go on after its process is gone."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    sums: tuple[int, ...] = ()                # of the .bin
    index_sums: tuple[int, ...] = ()          # CRC-32 of the lengths, of the documents; none in notes of before


def alone(prefix: str | Path, flag: str) -> Lease:
    """Nobody else makes a dataset of this prefix while it is held. Raises UserError."""
    path = Path(f"{prefix}.lease.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Lease(path, f"{flag} {prefix}")
    except OSError as error:
        raise UserError(f"{flag} {prefix}: {unwritable(error)}.") from None


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; a reader sees both complete or neither. Memory does not grow with the corpus.

        with IndexedWriter(prefix, best_dtype(vocab_size)) as writer:
            writer.add_document([tokens])

    An exception inside the block leaves no file behind. Who wants to go on after a killed process keeps `mark()` in a
    safe place and hands it over as `resume`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, resume: Written | None = None) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        assert codes, f"no dtype code for {self.dtype}"
        self._code = codes[0]
        self._limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        at = resume or Written()
        self.document_count, self.sequence_count, self.token_count = at.documents, at.sequences, at.tokens
        self._told = at.sequences                              # sequences that the documents so far have
        self._sums = Sums(at.sums, at.tokens * self.dtype.itemsize)
        self._files: dict[str, BinaryIO] = {}
        self._index = {"lengths": 0, "documents": 0}           # CRC-32 of what has been written to them
        sizes = {"bin": self._sums.size, "lengths": 4 * at.sequences, "documents": 8 * at.documents + 8}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            for name, size in sizes.items():
                self._files[name] = (self._reopened(name, size) if resume
                                     else opened(Path(self._partial(name)), "x+b"))
        except OSError as error:
            raise UserError(f"{self.prefix}.bin: cannot be written ({error.strerror}); "
                            "name a writable folder.") from None
        if resume is None:
            self._append("documents", struct.pack("<q", 0))
            return
        try:
            self._check_index(at)
        except UserError:
            self.suspend()
            raise

    def add_document(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Appends one document of any number of sequences (each [tokens]).
        Raises UserError for a token its dtype cannot hold."""
        parts = [self._checked(np.asarray(sequence)) for sequence in sequences]
        tokens = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
        self.add(tokens, np.array([len(part) for part in parts], "<i4"), np.array([len(parts)]))

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Appends tokens [t], lengths of sequences [s], and how many sequences each document has [d]. The three are
        streams of their own: they must agree in the end, not in each call.
        Raises UserError for what the format cannot hold."""
        if lengths.max(initial=0) > LONGEST:
            raise UserError(f"{self.prefix}.idx: a sequence after document {self.document_count} has {lengths.max()} "
                            f"tokens, the format holds up to {LONGEST}; cut the text in pieces.")
        raw = np.ascontiguousarray(self._checked(tokens)).view(np.uint8).data
        self._files["bin"].write(raw)
        self._sums.update(raw)
        self._append("lengths", lengths.astype("<i4").tobytes())
        self._append("documents", (self._told + np.cumsum(sequences, dtype="<i8")).tobytes())
        self.token_count += len(tokens)
        self.sequence_count += len(lengths)
        self.document_count += len(sequences)
        self._told += int(sequences.sum())

    def mark(self) -> Written:
        """How far it is, once that is on disk."""
        for file in self._files.values():
            _to_disk(file)
        return Written(self.document_count, self.sequence_count, self.token_count, self.sums,
                       tuple(self._index.values()))

    @property
    def sums(self) -> tuple[int, ...]:
        """CRC-32 of each block of SUMMED bytes of the .bin."""
        return tuple(self._sums.sums)

    def close(self) -> None:
        """Makes both files appear, the .idx last: an .idx that exists is complete."""
        assert self._told == self.sequence_count, (
            f"documents of {self._told} sequences, lengths of {self.sequence_count}")
        index = f"{self.prefix}.idx.partial"
        with opened(Path(index), "xb") as out:
            out.write(HEADER.pack(MAGIC, 1, self._code, self.sequence_count, self.document_count + 1))
            _copy(self._files["lengths"], out)
            for offsets in self._offsets():
                out.write(offsets.tobytes())
            _copy(self._files["documents"], out)
            _to_disk(out)
        _to_disk(self._files["bin"])
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)   # else an old .idx would describe the new .bin for a moment
        os.replace(self._partial("bin"), f"{self.prefix}.bin")
        os.replace(index, f"{self.prefix}.idx")
        sync(Path(self.prefix).parent)
        self.discard()

    def discard(self) -> None:
        """Removes what was written so far and has not been published."""
        self.suspend()
        for name in (*self._files, "idx"):
            Path(self._partial(name)).unlink(missing_ok=True)

    def suspend(self) -> None:
        """Lets go of the files and leaves them where they are, for a `resume`."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise

    def _partial(self, name: str) -> str:
        return f"{self.prefix}.{name}.partial"

    def _reopened(self, name: str, size: int) -> BinaryIO:
        """A file of an earlier process, cut to what it is known to hold."""
        path, published = Path(self._partial(name)), Path(f"{self.prefix}.{name}")
        if name == "bin" and not path.exists() and published.exists() and not Path(f"{self.prefix}.idx").exists():
            os.replace(published, path)                         # the process ended between the two renames of close
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise UserError(f"{path}: has {there} bytes, the unfinished run wrote {size}; {AFRESH}")
        file = opened(path, "r+b")                              # suspend closes it
        file.truncate(size)
        file.seek(size)
        return file

    def _append(self, name: str, raw: bytes) -> None:
        self._files[name].write(raw)
        self._index[name] = zlib.crc32(raw, self._index[name])

    def _check_index(self, at: Written) -> None:
        """Reads what an earlier process left of lengths and documents, and the end of the tokens. Raises UserError
        where it is not what it wrote."""
        last = 0
        for name in self._index:
            self._files[name].seek(0)
            while raw := self._files[name].read(BLOCK):
                self._index[name] = zlib.crc32(raw, self._index[name])
                last = int.from_bytes(raw[-8:], "little", signed=True)
        if last != at.sequences:                               # the documents so far end with it
            raise UserError(f"{self._partial('documents')}: ends at sequence {last}, the unfinished run wrote "
                            f"{at.sequences}; {AFRESH}")
        for (name, found), wrote in zip([*self._index.items(), ("bin", self._last_block())],
                                        [*at.index_sums, *at.sums[-1:]] if at.index_sums else (), strict=False):
            if found != wrote:
                raise UserError(f"{self._partial(name)}: is damaged, its checksum is not that of what the unfinished "
                                f"run wrote; {AFRESH}")

    def _last_block(self) -> int:
        """CRC-32 of the last block of the .bin so far, where a disk that failed would have lost something; `verify`
        reads the others, of the finished dataset."""
        file, sum_ = self._files["bin"], 0
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0) // SUMMED * SUMMED)
        while raw := file.read(BLOCK):
            sum_ = zlib.crc32(raw, sum_)
        return sum_

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens in the dataset's dtype, none of them changed by the cast."""
        if tokens.dtype == self.dtype:
            return tokens
        if self._limits and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < self._limits.min or high > self._limits.max:
                bad = low if low < self._limits.min else high
                raise UserError(f"{self.prefix}.bin: token {bad} of document {self.document_count} does not fit "
                                f"{self.dtype} ({self._limits.min} to {self._limits.max}); "
                                "give the tokenizer's true vocabulary size.")
        return tokens.astype(self.dtype)

    def _offsets(self) -> Iterator[np.ndarray]:
        """The byte offsets of all sequences, a block at a time, from the streamed lengths."""
        self._files["lengths"].seek(0)
        start = 0
        while block := self._files["lengths"].read(4 * BLOCK):
            ends = start + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
            yield np.concatenate([np.array([start], "<i8"), ends[:-1]])
            start = int(ends[-1])
        if start != self._sums.size:
            raise UserError(f"{self._partial('bin')}: has {self._sums.size} bytes, {self._partial('lengths')} tells of "
                            f"{start}; {AFRESH}")


class IndexedDataset:
    """A dataset opened for reading: arrays that read what is asked of them, from this disk or behind a URL.

    dtype        of a token
    lengths      i32[sequence_count], tokens of each sequence
    offsets      i64[sequence_count], bytes
    documents    i64[document_count + 1], boundaries in sequences
    tokens       [token_count], the whole .bin: documents lie back to back, so this is the token stream
    """

    def __init__(self, prefix: str | Path) -> None:
        """Raises UserError naming the file, the place and what was expected there."""
        self.prefix = str(prefix)
        index = _opened(f"{self.prefix}.idx")
        self.dtype, self.sequence_count, boundaries = self._read_header(index)
        self.document_count = boundaries - 1
        at = HEADER.size
        self.lengths = window(index, at, self.sequence_count, "<i4")
        self.offsets = window(index, at + 4 * self.sequence_count, self.sequence_count, "<i8")
        self.documents = window(index, at + 12 * self.sequence_count, boundaries, "<i8")
        raw = _opened(f"{self.prefix}.bin")
        self._check_ends(raw.size)
        self.token_count = raw.size // self.dtype.itemsize
        self.tokens = window(raw, 0, self.token_count, self.dtype)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i [tokens]."""
        first, last = self.document_token_boundaries(i), self.document_token_boundaries(i + 1)
        lengths = self.lengths[slice(*self.boundaries(i, i + 1).tolist())]
        told, least = int(lengths.sum(dtype=np.int64)), int(lengths.min(initial=0))
        if least < 0:
            raise self.damaged(f"a sequence of document {i} has {least} tokens", "0 or more")
        if told != last - first:
            raise self.damaged(f"the lengths of document {i} add up to {told} tokens",
                               f"{last - first}, as its offsets say")
        return self.tokens[first:last]

    def boundaries(self, first: int, last: int) -> np.ndarray:
        """The sequences at which documents [first, last) start, and the one after the last; none before the one before
        it [n + 1]."""
        found = self.documents[first:last + 1]
        wrong = np.flatnonzero((np.diff(found) < 0) | (found[:-1] < 0) | (found[1:] > self.sequence_count))
        if len(wrong):
            i = int(wrong[0])
            raise self.damaged(f"document {first + i} runs from sequence {found[i]} to {found[i + 1]}",
                               f"its end not before its start, both of 0 to {self.sequence_count}")
        return found

    def sequence_lengths(self, first: int, last: int) -> np.ndarray:
        """The lengths of sequences [first, last) in tokens, none negative,
        each sequence ending where the next one starts [n]."""
        found = np.empty(last - first, np.int64)
        for at in range(first, last, BLOCK):
            upto = min(at + BLOCK, last)
            found[at - first:upto - first] = self._lengths(at, upto)
        return found

    def _lengths(self, first: int, last: int) -> np.ndarray:
        lengths, size = self.lengths[first:last].astype(np.int64), self.dtype.itemsize
        starts = np.append(self.offsets[first:last], self.sequence_start(last) * size)
        wrong = np.flatnonzero((lengths < 0) | (starts[:-1] + lengths * size != starts[1:]))
        if len(wrong):
            i = int(wrong[0])
            raise self.damaged(f"sequence {first + i} has {lengths[i]} tokens from byte {starts[i]} on, "
                               f"the next starts at {starts[i + 1]}",
                               "each to end where the next one starts")
        return lengths

    def document_of(self, token: int) -> int:
        """The document that holds a place of the token stream: a search in the boundaries."""
        assert 0 <= token < self.token_count, f"token {token} of {self.token_count}"
        low, high = 0, self.document_count - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.document_token_boundaries(middle) <= token else (low, middle - 1)
        return low

    def document_token_boundaries(self, i: int) -> int:
        """The place in `tokens` where document i starts; for i = document_count, the end of the last one."""
        assert 0 <= i <= self.document_count, f"document {i} of {self.document_count}"
        sequence = int(self.documents[i])
        if not 0 <= sequence <= self.sequence_count:
            raise self.damaged(f"document {i} starts at sequence {sequence}", f"0 to {self.sequence_count}")
        return self.sequence_start(sequence)

    def sequence_start(self, sequence: int) -> int:
        """The place in `tokens` where a sequence starts; for sequence_count, the end of the last one."""
        if sequence == self.sequence_count:
            return self.token_count
        byte, size = int(self.offsets[sequence]), self.dtype.itemsize
        if byte % size or not 0 <= byte <= self.tokens.nbytes:
            raise self.damaged(f"sequence {sequence} starts at byte {byte}",
                               f"a multiple of {size} up to {self.tokens.nbytes}")
        return byte // size

    def _read_header(self, index: Numbers) -> tuple[np.dtype, int, int]:
        """(dtype, S, D) after checking them against the file's size."""
        if index.size < HEADER.size:
            raise self.damaged(f"the file has {index.size} bytes", f"at least the {HEADER.size} of its header")
        magic, version, code, sequences, boundaries = HEADER.unpack(bytes(index[:HEADER.size]))
        if magic != MAGIC:
            raise UserError(f"{self.prefix}.idx: starts with {magic!r}, expected {MAGIC!r}; "
                            "this is no indexed dataset.")
        if version != 1:
            raise self.damaged(f"byte 9 says version {version}", "version 1")
        if code not in DTYPES:
            raise self.damaged(f"byte 17 says dtype code {code}", "1 to 8")
        if boundaries == 0:
            raise self.damaged("byte 26 says 0 document boundaries", "documents + 1 of them")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if index.size == expected + sequences > expected:
            raise UserError(f"{self.prefix}.idx: holds a mode for each sequence, so it is multimodal; "
                            "give one of text alone.")
        if index.size != expected:
            raise self.damaged(f"the file has {index.size} bytes",
                                f"{expected} for the {sequences} sequences and {boundaries} boundaries of its header")
        return DTYPES[code], sequences, boundaries

    def _check_ends(self, size: int) -> None:
        """First and last entries, against each other and the size of the .bin in bytes."""
        first, last = int(self.documents[0]), int(self.documents[-1])
        if (first, last) != (0, self.sequence_count):
            raise self.damaged(f"its documents run from sequence {first} to {last}", f"0 to {self.sequence_count}")
        start = end = 0
        if self.sequence_count:
            start, end = int(self.offsets[0]), int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if (start, end) != (0, size):
            raise UserError(f"{self.prefix}.bin: has {size} bytes where {self.prefix}.idx describes bytes {start} to "
                            f"{end}; one of the two was cut short or belongs to another dataset, make them again.")

    def damaged(self, found: str, expected: str) -> UserError:
        """The sentence for a damaged .idx."""
        return UserError(f"{self.prefix}.idx: {found}, expected {expected}; the file is damaged, make it again.")


def _opened(path: str) -> Numbers:
    """A file's bytes, not read [bytes]."""
    try:
        return bytes_of(path)
    except OSError as error:
        near = sorted(glob(f"{escape(path.removesuffix('.idx'))}_*.idx")) if path.endswith(".idx") else []
        prefix, end = path.removesuffix(".idx"), Path(path.removesuffix(".idx")).suffix
        hint = (f"did you mean {near[0].removesuffix('.idx')}?" if near
                else f"write {prefix.removesuffix(end)}, without its suffix." if end in (".bin", ".idx")
                else "make a dataset of it first, with tools/preprocess_data.py." if end in (".jsonl", ".json", ".txt")
                else "a weight and its dataset are two words." if "," in Path(path).name
                else "name a dataset by its path without .bin or .idx.")
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from None


def _copy(source: BinaryIO, out: BinaryIO) -> None:
    source.seek(0)
    shutil.copyfileobj(source, out, 1 << 22)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
