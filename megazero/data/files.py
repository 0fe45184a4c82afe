"""Files here or elsewhere.

A path with :// in it is a URL that fsspec understands (s3://, gs://, https://); the rest is local. Compressed files are
told by their last suffix. A library that is not always there is imported by the file that needs it.
"""

import bz2
import errno
import glob
import importlib
import io
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from megazero.base import LONGEST, UserError, printable, read_bytes

STDIN = "-"
PACKED = 1 << 10                # bytes that are unpacked at once: of a .zst they stand for 32 MiB at most
UNPACKED = 1 << 20              # bytes that the others make of them at once
UNPACKING = 1 << 29             # bytes of memory that an .xz may ask for; `xz -9` asks for 2^26


def library(name: str, extra: str, why: str) -> Any:
    """An optional library. Raises UserError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"{why}: needs {name.split('.')[0]}; pip install 'megazero[{extra}]'.") from None


def is_remote(path: str) -> bool:
    return "://" in path


def system(path: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of a URL. Raises UserError."""
    fsspec = library("fsspec", "remote", path)
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: fsspec cannot reach it ({error}); "
                        "install what it names, or copy the file here.") from None


def size_of(path: str) -> int:
    """Bytes of a file; 0 for standard input. Raises OSError."""
    if path == STDIN:
        return 0
    if is_remote(path):
        fs, there = system(path)
        return int(fs.size(there))
    return os.path.getsize(path)


def stamp_of(path: str) -> list[Any]:
    """What changes when a file does: path, bytes, time of the last change (of a local file)."""
    return [path, size_of(path), 0 if is_remote(path) or path == STDIN else os.stat(path).st_mtime_ns]


def expand(word: str) -> tuple[list[str], bool]:
    """(the files that a word means, was it a folder?):
    a file, a folder (walked by name, without hidden ones), a glob, a URL."""
    if is_remote(word):
        return _expand_remote(word)
    path = Path(word)
    if word == STDIN or (word and path.is_file()):
        return [word], False
    if word and path.is_dir():
        return [str(file) for file in _walk(path)], True
    if word and path.exists():                                       # a pipe or a device
        return [word], False
    return sorted(file for file in set(_matching(word)) if os.path.isfile(file)), False


def _hidden(name: str) -> bool:
    """Is a file or folder of this name left out of what a folder means?"""
    return name.startswith(".") or name == "__pycache__"


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, by name; links to folders are left out."""
    waiting = _inside(folder)
    while waiting:
        entry = waiting.pop()
        if entry.is_dir():
            waiting += [] if entry.is_symlink() else _inside(entry)
        elif entry.is_file():
            yield entry


def _inside(folder: Path) -> list[Path]:
    """The last first."""
    return sorted((entry for entry in folder.iterdir() if not _hidden(entry.name)), reverse=True)


def _matching(pattern: str) -> Iterator[str]:
    """The paths of a glob. ** enters each folder once: links to folders may lead in circles."""
    cut = re.match(r"((?:.*?/)?)\*\*(?:/+|$)", pattern, re.DOTALL)
    if cut is None:
        yield from glob.glob(pattern)
        return
    head, tail = cut[1], pattern[cut.end():]
    for top in glob.glob(head) if head else [""]:
        met: set[tuple[int, int]] = set()
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            found = os.stat(folder or ".")
            if (found.st_dev, found.st_ino) not in met:
                met.add((found.st_dev, found.st_ino))
                yield from _matching(glob.escape(folder) + (tail or "*"))
                waiting += glob.glob(f"{glob.escape(folder)}*/")


def _expand_remote(word: str) -> tuple[list[str], bool]:
    fs, path = system(word)
    try:
        if glob.has_magic(path):
            return sorted(fs.unstrip_protocol(p) for p in fs.glob(path) if fs.isfile(p)), False
        if fs.isdir(path):
            return sorted(fs.unstrip_protocol(p) for p in fs.find(path)
                          if not any(map(_hidden, p[len(path):].split("/")))), True
        return ([word] if fs.exists(path) else []), False
    except Exception as error:                                       # each backend has errors of its own
        raise UserError(f"{word}: cannot be listed ({error}).") from None


class _Frames(io.RawIOBase):
    """Compressed frames one after the other, unpacked a little at a time: some bytes may stand for gigabytes.
    A file that was cut short, and what is no frame behind one, is told; the libraries' own readers take some for whole
    ones. A file without a frame holds nothing."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any], padding: bytes, *most: int) -> None:
        """`new` makes the decompressor of a frame; `padding` may follow one. `most`: bytes unpacked at once, of one
        that can be told."""
        self._new, self._padding, self._most = new, padding, most
        self._file, self._packed, self._ready = file, b"", memoryview(b"")
        self._frame: Any = None
        self._broken: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if self._broken is not None:
            raise self._broken
        try:
            while not self._ready and self._fed():
                self._ready = memoryview(self._frame.decompress(self._packed, *self._most))
                self._packed = self._frame.unused_data if self._frame.eof else getattr(
                    self._frame, "unconsumed_tail", b"")
        except Exception as error:
            self._broken = error
            raise
        count = min(len(into), len(self._ready))
        into[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _fed(self) -> bool:
        """Packed bytes for a frame that waits for some; False at the end of the file."""
        if self._frame is not None and not self._frame.eof:
            if getattr(self._frame, "needs_input", True):       # else it has kept some of what it had
                self._packed = self._packed or self._file.read(PACKED)
                if not self._packed:
                    raise EOFError("the file ends within a frame")
            return True
        while self._packed or (more := self._file.read(PACKED)):
            self._packed = (self._packed or more).lstrip(b"" if self._frame is None else self._padding)
            if self._packed:
                self._frame = self._new()
                return True
        return False


def _zstd() -> Any:
    return library("zstandard", "data", "a .zst file").ZstdDecompressor().decompressobj()


# what unpacks a frame, what may fill up the file behind one, and bytes to be unpacked at once
COMPRESSIONS: Mapping[str, tuple[Any, ...]] = {
    ".gz": (lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), b"\0", UNPACKED),
    ".bz2": (bz2.BZ2Decompressor, b"", UNPACKED),
    ".xz": (lambda: lzma.LZMADecompressor(memlimit=UNPACKING), b"\0", UNPACKED),
    ".zst": (_zstd, b"")}


def is_packed(path: str) -> bool:
    return _pure(path).suffix in COMPRESSIONS


def suffix_of(path: str) -> str:
    """The suffix that tells what is in a file, that of a compression left out: `.jsonl` of `a.jsonl.gz`."""
    pure = _pure(path)
    return PurePosixPath(pure.stem).suffix if pure.suffix in COMPRESSIONS else pure.suffix


def _pure(path: str) -> PurePosixPath:
    """A path without what follows it in a URL: `https://h/a.jsonl?download=true` is a `.jsonl`."""
    return PurePosixPath(re.split("[?#]", path)[0] if is_remote(path) else path)


class Opened:
    """A file opened for reading, decompressed. `tell` is where the file itself has been read to, for progress."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        if path == STDIN:
            self._file: BinaryIO = sys.stdin.buffer
        elif is_remote(path):
            fs, there = system(path)
            self._file = fs.open(there, "rb")
        else:
            self._file = open(path, "rb")                            # noqa: SIM115  (__exit__ closes it)
        packed = COMPRESSIONS.get(_pure(path).suffix)
        self.bytes = io.BufferedReader(_Frames(self._file, *packed), 1 << 17) if packed else self._file
        self._seekable = path != STDIN and self._file.seekable()

    def tell(self) -> int:
        return self._file.tell() if self._seekable else 0

    def some(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end, and before what is broken, which the next call tells."""
        read = getattr(self.bytes, "read1", self.bytes.read)
        parts: list[bytes] = []
        try:
            while count > 0 and (part := read(count)):
                parts.append(part)
                count -= len(part)
        except Exception:
            if not parts:
                raise
        return b"".join(parts)

    def skip(self, count: int) -> None:
        """To byte `count` of what is inside. Raises EOFError."""
        if count and self._seekable and self.bytes is self._file:
            if self._file.seek(0, os.SEEK_END) < count:
                raise EOFError(f"it ends before byte {count:,}")
            self._file.seek(count)
            return
        while count > 0:
            part = self.bytes.read(min(count, 1 << 20))
            if not part:
                raise EOFError(f"it ends {count:,} bytes before the place to go on from")
            count -= len(part)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not sys.stdin.buffer:
            self._file.close()


def line_of(error: BaseException) -> str:
    """What an error says, on one line and without what a terminal would obey."""
    return printable(" ".join(str(error).split())[:500] or type(error).__name__)


class Damage(Exception):
    """What the reader of a table says of a broken file."""


def is_damage(error: BaseException) -> bool:
    """Is this what a decompressor or the reader of a table says of a broken file?"""
    if isinstance(error, OSError):
        return error.errno is None                                   # the system's own errors have a number
    return (isinstance(error, (EOFError, zlib.error, lzma.LZMAError, Damage)) or type(error).__name__ == "ZstdError")


class LocalFile:
    """A file of this disk, held open: whatever takes its name later is another file.

    It is read, not mapped: to touch a page of a map behind which a file was cut, or a disk failed, ends the process.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)               # a pipe would wait for its writer
        found = os.fstat(self._handle)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")

    def read(self, at: int, count: int) -> bytes:
        raw = os.pread(self._handle, count, at)
        while len(raw) < count and (more := os.pread(self._handle, count - len(raw), at + len(raw))):
            raw += more                                         # a call gives 2 GB at most
        return raw

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


class RemoteFile:
    """A file behind a URL."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.path = path
        self._fs, self._there = system(path)
        size = self._fs.size(self._there)
        if size is None:
            raise OSError(errno.EINVAL, "its server does not tell how long it is")
        self.size = int(size)

    def read(self, at: int, count: int) -> bytes:
        return self._fs.cat_file(self._there, at, at + count)


class Numbers:
    """Numbers of a file as an array that reads what is asked for and nothing else: `a[i]`, `a[i:j]`, `len(a)`."""

    def __init__(self, file: LocalFile | RemoteFile, dtype: np.dtype | str, at: int = 0, count: int = 0) -> None:
        """`count` numbers from byte `at`."""
        self.file, self.dtype, self.at, self.size = file, np.dtype(dtype), at, count
        self._width = self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self._width

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return self._read(range(self.size)[index], 1)[0]
        start, stop, step = index.indices(self.size)
        assert step == 1, "a file is read in order"
        return self._read(start, max(stop - start, 0))

    def _read(self, first: int, count: int) -> np.ndarray:
        """Raises UserError where the file no longer holds them."""
        at, size = self.at + first * self._width, count * self._width
        try:
            raw = self.file.read(at, size) if size else b""
        except Exception as error:                                   # each backend has errors of its own
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.file.path}: cannot be read at byte {at} ({why}).") from None
        if len(raw) != size:
            raise UserError(f"{self.file.path}: gave {len(raw)} of {size} bytes at byte {at}, it had {self.file.size} "
                            "when it was opened; was it cut or replaced while in use? Make it whole and start again.")
        return np.frombuffer(raw, self.dtype)


def content(path: str) -> bytes:
    """A small file as a whole. Raises OSError, or ValueError if it is none."""
    if not is_remote(path):
        return read_bytes(Path(path))
    file = RemoteFile(path)
    if file.size > LONGEST:
        raise ValueError(f"has {file.size:,} bytes, more than {LONGEST:,}")
    return file.read(0, file.size)


def bytes_of(path: str) -> Numbers:
    """A file's bytes, not read [bytes]. Raises OSError."""
    file = RemoteFile(path) if is_remote(path) else LocalFile(path)
    return Numbers(file, "u1", 0, file.size)


def window(raw: Numbers, at: int, count: int, dtype: np.dtype | str) -> Numbers:
    """`count` numbers of `dtype` from byte `at` of a file's bytes, still not read [count]."""
    return Numbers(raw.file, dtype, at, count)
