"""Files that are whole or not there: safetensors written and read tensor by tensor,
folders that take their name when they are complete.

The format is that of the safetensors library, which reads all of it. By hand it can be written without being held in
memory, and read without a memory map, which would end the process when a file is cut short under it. Checksums are of
runs of whole rows, about 1 MiB each, so that a part of a tensor can be read and checked without the rest.
"""

import json
import re
import stat
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megazero.base import DTYPES, Form, UserError, checked, loads, said, sync

Tensor = torch.Tensor
RowSums = Mapping[str, list[int]]          # tensor -> the checksums of its runs of rows
CODES: dict[torch.dtype, str] = {getattr(torch, d.torch): d.code for d in DTYPES.values()}
OF_CODE = {code: dtype for dtype, code in CODES.items()}
RUN = 2**20                             # bytes that share a checksum, unless one row is longer
# of a header in bytes: a hundred thousand tensors have room, and reading it takes up to 35 times as many; of a shape
LONGEST, DIMENSIONS = 2**24, 6
ENTRY: Form = {"dtype": re.compile(r"\w{1,20}"), "shape": [range(2**62)], "data_offsets": [range(2**62)]}
# what a file may hold, ours or not
READABLE = OF_CODE | {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64}
OF_DTYPE = {dtype: code for code, dtype in READABLE.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that is known before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def run(self) -> int:
        """Rows that share a checksum."""
        return max(RUN // max(prod(self.shape[1:]) * self.dtype.itemsize, 1), 1)


@dataclass(frozen=True)
class Stored(Planned):
    """A tensor at its place in a file."""

    path: Path
    start: int

    def rows(self, low: int, high: int) -> Tensor:
        """Rows [low, high), [high - low, ...]; nothing else is read. Raises OSError."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, (high - low) * row, offset=self.start + low * row)
        if len(data) != (high - low) * row:
            raise OSError(0, "ends before its last tensor")
        return torch.from_numpy(data).view(self.dtype).view(high - low, *self.shape[1:])


def checksums(tensor: Tensor) -> list[int]:
    """CRC-32 of each run of rows, in order; the last may be shorter."""
    data, rows = raw(tensor), Planned("", tuple(tensor.shape), tensor.dtype).run
    step = rows * (len(data) // max(prod(tensor.shape[:1]), 1))
    return [zlib.crc32(data[at:at + step]) for at in range(0, len(data), step or 1)]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def stream(path: Path, plan: Sequence[Planned], make: Callable[[str], Tensor],
           metadata: Callable[[RowSums], dict[str, str]]) -> None:
    """Writes a safetensors file, each tensor made when its turn comes; returns when it is on the disk.
    `metadata` is told the checksums.

    Those are known last but stand in the header, which comes first: room is kept for the longest, spaces fill the rest.
    """
    sums = {p.name: [2**32 - 1] * ceil(prod(p.shape[:1]) / p.run) for p in plan}
    room = (len(_header(plan, metadata(sums))) + 7) // 8 * 8
    if room > LONGEST:
        raise UserError(f"{path}: its {len(plan):,} tensors need a header of {room:,} bytes, nobody reads more than "
                        f"{LONGEST:,}; save from more ranks.")
    with path.open("wb") as file:
        file.seek(8 + room)
        for p in plan:
            tensor = make(p.name)
            assert (tuple(tensor.shape), tensor.dtype) == (p.shape, p.dtype), f"{p}: made {tensor.shape} {tensor.dtype}"
            sums[p.name] = checksums(tensor)
            file.write(raw(tensor))
            del tensor                                          # before the next is made
        file.seek(0)
        file.write(struct.pack("<Q", room) + _header(plan, metadata(sums)).ljust(room))
    sync(path)


def _header(plan: Sequence[Planned], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for p in plan:
        header[p.name] = {"dtype": OF_DTYPE[p.dtype], "shape": p.shape, "data_offsets": (at, at + p.nbytes)}
        at += p.nbytes
    return json.dumps(header, separators=(",", ":")).encode()


def header_of(path: Path) -> bytes:
    """The header of a safetensors file with the eight bytes before it, which say how long it is. Raises OSError, or
    ValueError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):                         # a pipe would wait for ever
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(found.st_size - 8, LONGEST):
            raise ValueError(f"its header cannot have {length:,} bytes")
        return head + file.read(length)


def contents(path: Path, header: bytes) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors that a header lists, which fill the file to its last byte, and its metadata. Raises OSError, or
    ValueError for a header that says something else."""
    listed = checked(loads(header[8:]), dict, "its header")
    metadata = checked(listed.pop("__metadata__", {}), {str: str}, "__metadata__")
    at, stored = 0, {}
    for key, t in sorted(checked(listed, {str: ENTRY}).items(), key=lambda entry: entry[1]["data_offsets"]):
        if t["dtype"] not in READABLE:
            raise ValueError(f"{said(key)} is of dtype {t['dtype']}, which is not known here")
        found = Stored(key, tuple(t["shape"]), READABLE[t["dtype"]], path, len(header) + at)
        if len(found.shape) > DIMENSIONS or t["data_offsets"] != [at, at + found.nbytes]:
            raise ValueError(f"{said(key)} does not lie where the tensor before it ends, or has not the bytes of its "
                             f"shape {said(t['shape'])}")
        stored[key], at = found, at + found.nbytes
    if len(header) + at != path.stat().st_size:
        raise ValueError(f"has {path.stat().st_size:,} bytes, its tensors need {len(header) + at:,}")
    return stored, metadata
