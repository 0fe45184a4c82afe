"""Megatron's indexed dataset, byte for byte: PREFIX.bin holds tokens, PREFIX.idx says where sequences and documents are.

    PREFIX.bin   the tokens of all sequences back to back, no header

    PREFIX.idx   byte 0         magic            4d 4d 49 44 49 44 58 00 00 ("MMIDIDX", two zeros)
                 9              version          u64 = 1
                 17             dtype code       u8, see DTYPES
                 18             S                u64, sequences
                 26             D                u64, documents + 1
                 34             lengths          i32[S], tokens of each sequence
                 34 + 4 S       offsets          i64[S], first byte of each sequence in .bin
                 34 + 12 S      documents        i64[D], first sequence of each document; starts with 0, ends with S

All numbers are little-endian. An empty text is a document with no sequence. Opening costs the same for a kilobyte and for a
terabyte: it checks both sizes and both ends; the entries in between are checked when they are read.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megazero.errors import UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)}
BLOCK = 1 << 20                               # lengths turned into offsets at a time: memory stays flat for any corpus


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron writes for a vocabulary: two bytes a token below 65,500 ids, else four."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; a reader sees both complete or neither. Memory does not grow with the corpus.

        with IndexedWriter(prefix, best_dtype(vocab_size)) as writer:
            writer.add_document([tokens])

    An exception inside the block leaves no file behind.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = str(prefix), np.dtype(dtype).newbyteorder("<")
        self.sequence_count = self.document_count = self.token_count = 0
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        assert codes, f"no dtype code for {self.dtype}"
        self._code = codes[0]
        self._limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        folder = Path(self.prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(f"{self.prefix}.bin.partial", "wb")         # noqa: SIM115  (close and discard close them)
            # nameless files: the system removes them however the process ends
            self._lengths: BinaryIO = tempfile.TemporaryFile(dir=folder)           # noqa: SIM115
            self._documents: BinaryIO = tempfile.TemporaryFile(dir=folder)         # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.prefix}.bin: cannot be written ({error.strerror}); name a writable folder.") from None
        self._documents.write(struct.pack("<q", 0))

    def add_document(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Appends one document of any number of sequences (each [tokens]). Raises UserError for a token its dtype cannot hold."""
        for sequence in sequences:
            tokens = self._checked(np.asarray(sequence))
            self._bin.write(tokens.tobytes())
            self._lengths.write(struct.pack("<i", len(tokens)))
            self.token_count += len(tokens)
        self.sequence_count += len(sequences)
        self.document_count += 1
        self._documents.write(struct.pack("<q", self.sequence_count))

    def close(self) -> None:
        """Makes both files appear, the .idx last: an .idx that exists is complete."""
        index = f"{self.prefix}.idx.partial"
        with open(index, "wb") as out:
            out.write(HEADER.pack(MAGIC, 1, self._code, self.sequence_count, self.document_count + 1))
            _copy(self._lengths, out)
            for offsets in self._offsets():
                out.write(offsets.tobytes())
            _copy(self._documents, out)
            _to_disk(out)
        _to_disk(self._bin)
        self._close_files()
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)        # else an old .idx would describe the new .bin for a moment
        os.replace(f"{self.prefix}.bin.partial", f"{self.prefix}.bin")
        os.replace(index, f"{self.prefix}.idx")
        _folder_to_disk(Path(self.prefix).parent)

    def discard(self) -> None:
        """Gives up: removes what was written so far."""
        self._close_files()
        for suffix in (".bin.partial", ".idx.partial"):
            Path(self.prefix + suffix).unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens in the dataset's dtype, none of them changed by the cast."""
        if tokens.dtype == self.dtype:
            return tokens
        if self._limits and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < self._limits.min or high > self._limits.max:
                bad = low if low < self._limits.min else high
                raise UserError(f"{self.prefix}.bin: token {bad} of document {self.document_count} does not fit {self.dtype} "
                                f"({self._limits.min} to {self._limits.max}); give the tokenizer's true vocabulary size.")
        return tokens.astype(self.dtype)

    def _offsets(self) -> Iterator[np.ndarray]:
        """The byte offsets of all sequences, a block at a time, from the streamed lengths."""
        self._lengths.seek(0)
        start = 0
        while block := self._lengths.read(4 * BLOCK):
            ends = start + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
            yield np.concatenate([np.array([start], "<i8"), ends[:-1]])
            start = int(ends[-1])

    def _close_files(self) -> None:
        for file in (self._bin, self._lengths, self._documents):
            file.close()


class IndexedDataset:
    """A dataset opened for reading through memory maps.

    dtype        of a token
    lengths      i32[sequence_count], tokens of each sequence
    offsets      i64[sequence_count], bytes
    documents    i64[document_count + 1], boundaries in sequences
    tokens       [token_count], the whole .bin: documents lie back to back, so this is the token stream
    """

    def __init__(self, prefix: str | Path) -> None:
        """Raises UserError naming the file, the place and what was expected there."""
        self.prefix = str(prefix)
        index = _map(f"{self.prefix}.idx")
        self.dtype, self.sequence_count, boundaries = self._read_header(index)
        self.document_count = boundaries - 1
        at = HEADER.size
        self.lengths = np.ndarray(self.sequence_count, "<i4", index, at)
        self.offsets = np.ndarray(self.sequence_count, "<i8", index, at + 4 * self.sequence_count)
        self.documents = np.ndarray(boundaries, "<i8", index, at + 12 * self.sequence_count)
        raw = _map(f"{self.prefix}.bin")
        self._check_ends(raw.size)
        self.tokens: np.ndarray = raw.view(self.dtype)
        self.token_count = len(self.tokens)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, a view of the file [tokens]."""
        first, last = self.document_token_boundaries(i), self.document_token_boundaries(i + 1)
        told = int(self.lengths[int(self.documents[i]):int(self.documents[i + 1])].sum(dtype=np.int64))
        if told != last - first or told < 0:
            raise self._damaged(f"the lengths of document {i} add up to {told} tokens", f"{last - first}, as its offsets say")
        return self.tokens[first:last]

    def document_token_boundaries(self, i: int) -> int:
        """The place in `tokens` where document i starts; for i = document_count, the end of the last one."""
        assert 0 <= i <= self.document_count, f"document {i} of {self.document_count}"
        sequence = int(self.documents[i])
        if not 0 <= sequence <= self.sequence_count:
            raise self._damaged(f"document {i} starts at sequence {sequence}", f"0 to {self.sequence_count}")
        if sequence == self.sequence_count:
            return self.token_count
        byte, size = int(self.offsets[sequence]), self.dtype.itemsize
        if byte % size or not 0 <= byte <= self.tokens.nbytes:
            raise self._damaged(f"sequence {sequence} starts at byte {byte}", f"a multiple of {size} up to {self.tokens.nbytes}")
        return byte // size

    def _read_header(self, index: np.ndarray) -> tuple[np.dtype, int, int]:
        """(dtype, S, D) after checking them against the file's size."""
        if index.size < HEADER.size:
            raise self._damaged(f"the file has {index.size} bytes", f"at least the {HEADER.size} of its header")
        magic, version, code, sequences, boundaries = HEADER.unpack(index[:HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{self.prefix}.idx: starts with {magic!r}, expected {MAGIC!r}; this is no indexed dataset.")
        if version != 1:
            raise self._damaged(f"byte 9 says version {version}", "version 1")
        if code not in DTYPES:
            raise self._damaged(f"byte 17 says dtype code {code}", "1 to 8")
        if boundaries == 0:
            raise self._damaged("byte 26 says 0 document boundaries", "documents + 1 of them")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if index.size == expected + sequences > expected:
            raise UserError(f"{self.prefix}.idx: holds a mode for each sequence, so it is multimodal; give one of text alone.")
        if index.size != expected:
            raise self._damaged(f"the file has {index.size} bytes",
                                f"{expected} for the {sequences} sequences and {boundaries} boundaries of its header")
        return DTYPES[code], sequences, boundaries

    def _check_ends(self, size: int) -> None:
        """First and last entries, against each other and the size of the .bin in bytes."""
        first, last = int(self.documents[0]), int(self.documents[-1])
        if (first, last) != (0, self.sequence_count):
            raise self._damaged(f"its documents run from sequence {first} to {last}", f"0 to {self.sequence_count}")
        start = end = 0
        if self.sequence_count:
            start, end = int(self.offsets[0]), int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if (start, end) != (0, size):
            raise UserError(f"{self.prefix}.bin: has {size} bytes where {self.prefix}.idx describes bytes {start} to {end}; "
                            "one of the two was cut short or belongs to another dataset, make them again.")

    def _damaged(self, found: str, expected: str) -> UserError:
        return UserError(f"{self.prefix}.idx: {found}, expected {expected}; the file is damaged, make it again.")


def _map(path: str) -> np.ndarray:
    """A file's bytes, mapped, not read [bytes]."""
    try:
        # mapping nothing is an error of the system; a dataset of empty documents is none
        return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.empty(0, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a dataset by its path without .bin or .idx.") from None


def _copy(source: BinaryIO, out: BinaryIO) -> None:
    source.seek(0)
    shutil.copyfileobj(source, out, 1 << 22)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """Renames are on disk only when their folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
