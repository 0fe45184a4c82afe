"""Memory that the ranks of one host share: what a rank has for others is written once, and read where it lies.

A rank's file is anonymous (memfd_create of Linux): the others open it through /proc, and it is gone with the last process that maps it,
however that ends. Behind its first page, which proves to a reader that it has the right file, lie slots:

    | marks, a page: a byte for each reader who has not read yet | what is to be read ...                        |

A slot whose marks are gone is used again; where none is free or large enough the file grows. So nobody waits for a reader, and a
training step, which sends the same every time, soon finds all the slots it needs.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

Tensor = torch.Tensor

PAGE = mmap.ALLOCATIONGRANULARITY
ALIGN = 64                      # bytes: a cache line


@dataclass(frozen=True)
class Slot:
    """A stretch of a file, mapped."""

    start: int
    size: int                   # marks included
    pages: mmap.mmap
    bytes: Tensor               # uint8 [size], the same memory

    def free(self, readers: int) -> bool:
        return not any(self.pages[:readers])


def mapped(file: BinaryIO, start: int, size: int) -> Slot:
    pages = mmap.mmap(file.fileno(), size, offset=start)
    return Slot(start, size, pages, torch.frombuffer(pages, dtype=torch.uint8))


class Memory:
    """One rank's own file, and those of the other ranks of a group. Ranks are numbered within the group."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.own = os.fdopen(os.memfd_create("megazero"), "r+b", buffering=0)
        self.proof = struct.unpack("qq", os.urandom(16))
        self.own.write(struct.pack("qq", *self.proof))
        self.end = PAGE
        self.slots: list[Slot] = []
        self.theirs: dict[int, BinaryIO] = {}
        self.seen: dict[tuple[int, int, int], Slot] = {}

    def card(self) -> Tensor:
        """What the others need to find this rank's file: int64 [4]."""
        return torch.tensor([os.getpid(), self.own.fileno(), *self.proof])

    def meet(self, cards: Tensor) -> bool:
        """Opens everyone's file, from the cards [ranks, 4]. False if one is out of reach: a rank on another host, say."""
        for rank, (pid, number, *proof) in enumerate(cards.tolist()):
            try:
                file = open(f"/proc/{pid}/fd/{number}", "r+b", buffering=0)             # noqa: SIM115  (open as long as the group is)
                found = file.read(16)
            except OSError:
                return False
            if found != struct.pack("qq", *proof):
                return False
            self.theirs[rank] = file
        return True

    def put(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Writes what each reader is to get; the address to tell each of them, int64 [3]. The same tensor for many is written once."""
        places, end = {}, 0
        for part in parts.values():
            if part.data_ptr() not in places:
                places[part.data_ptr()] = end, part
                end += -(-part.nbytes // ALIGN) * ALIGN
        slot = self._free_slot(PAGE + end)
        for at, part in places.values():
            self._read(slot, at, part).copy_(part)
        for reader in parts:
            slot.pages[reader] = 1
        return {r: torch.tensor([slot.start, slot.size, places[part.data_ptr()][0]]) for r, part in parts.items()}

    def get(self, rank: int, address: Tensor, like: Tensor) -> Tensor:
        """What a rank wrote at an address, in place, of the shape and dtype of `like`. Another's memory: only to be read, until `read`."""
        start, size, at = address.tolist()
        return self._read(self._slot(rank, start, size), at, like)

    def read(self, addresses: Iterable[tuple[int, Tensor]]) -> None:
        """(rank, address) of what this rank has read and does not need any more."""
        for rank, address in addresses:
            start, size, _ = address.tolist()
            self._slot(rank, start, size).pages[self.rank] = 0

    def _slot(self, rank: int, start: int, size: int) -> Slot:
        key = rank, start, size
        if key not in self.seen:
            self.seen[key] = mapped(self.theirs[rank], start, size)
        return self.seen[key]

    def _free_slot(self, size: int) -> Slot:
        fitting = [s for s in self.slots if s.size >= size and s.free(PAGE)]
        if fitting:
            return min(fitting, key=lambda s: s.size)
        size = -(-size // PAGE) * PAGE
        self.own.truncate(self.end + size)
        self.slots.append(mapped(self.own, self.end, size))
        self.end += size
        return self.slots[-1]

    @staticmethod
    def _read(slot: Slot, at: int, like: Tensor) -> Tensor:
        return slot.bytes[PAGE + at:PAGE + at + like.nbytes].view(like.dtype).view(like.shape)
