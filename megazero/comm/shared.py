"""Memory that the ranks of one host share: what a rank has for others is written once, and read where it lies.

A rank's file is anonymous (memfd_create of Linux): the others open it through /proc, and it is gone with the last
process that maps it, however that ends. It holds

    | proof, a page | letters: for each reader ROOM times (tag, start, size, at) | slots: what is to be read ...

The first page proves to a reader that it has the right file. A letter says where in which slot something lies; its tag
is written last and cleared by the reader when it has read. A slot without letters is used again; where none is free and
large enough the file grows. So nobody waits for a reader, and a training step, which sends the same every time, soon
finds all the slots it needs.
"""

import hashlib
import mmap
import os
import select
import struct
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from megazero.comm.marks import CALLS, Astray

Tensor = torch.Tensor

PAGE = mmap.ALLOCATIONGRANULARITY
ALIGN = 64                      # bytes: a cache line
NAME, CARD = "megazero", 5      # of our files; numbers that say where one is
ROOM = 1024                     # letters of one rank to another that may be unread
# seconds: to ask without a pause, a pause, and a pause once the wait has become long
SPIN, NAP, NIGHT = 2e-4, 5e-5, 1e-3


def supported() -> bool:
    return hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def domain() -> int:
    """Of this boot and this numbering of processes: in another container a number is another process, or none."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return int.from_bytes(hashlib.sha256(boot.encode()).digest()[:7], "little")


@dataclass
class Slot:
    """A stretch of a file, mapped; and the places of the letters that speak of it."""

    start: int
    bytes: Tensor               # uint8
    letters: list[int] = field(default_factory=list)

    def part(self, at: int, like: Tensor) -> Tensor:
        """What lies at a byte of it, as a tensor of that shape and dtype."""
        return self.bytes[at:at + like.nbytes].view(like.dtype).view(like.shape)


@dataclass
class Peer:
    """Another rank: its file, its letters, its process (a pidfd, readable when it has ended),
    and its slots seen so far."""

    file: BinaryIO
    letters: memoryview
    process: BinaryIO
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)


class Memory:
    """One rank's own file, and those of the other ranks of a group.
    Ranks are numbered within the group, tags count from 1."""

    def __init__(self, rank: int, ranks: int, seconds: float = 600.0) -> None:
        """`seconds`: how long to wait for a reader that is ROOM letters behind."""
        self.rank, self.ranks, self.seconds = rank, ranks, seconds
        self.own = os.fdopen(os.memfd_create(NAME), "r+b", buffering=0)
        self.proof = struct.unpack("qq", os.urandom(16))
        self.own.write(struct.pack("qq", *self.proof))
        self.end = PAGE + _pages(ranks * ROOM * 32)
        self.own.truncate(self.end)
        self.letters = _letters(self.own, ranks)
        self.slots: list[Slot] = []
        self.peers: dict[int, Peer] = {}

    def card(self) -> Tensor:
        """What the others need to find this rank's file: int64 [CARD]. Raises OSError where there is no telling."""
        return torch.tensor([domain(), os.getpid(), self.own.fileno(), *self.proof])

    def meet(self, cards: Tensor) -> bool:
        """Opens everyone's file, from the cards [ranks, CARD].
        False if one is out of reach: a rank on another host, say, or in another container."""
        for rank, (where, pid, number, *proof) in enumerate(cards.tolist()):
            try:
                path = f"/proc/{pid}/fd/{number}"
                # looked at before it is opened: to open somebody's pipe would wait, and to read it would take from it
                if where != domain() or not os.readlink(path).startswith(f"/memfd:{NAME}"):
                    return False
                # open as long as the group is
                file = open(path, "r+b", buffering=0)                                   # noqa: SIM115
                if file.read(16) != struct.pack("qq", *proof):
                    return False
                self.peers[rank] = Peer(file, _letters(file, self.ranks),
                                        os.fdopen(os.pidfd_open(pid), "rb", buffering=0))
            except OSError:
                return False
        return True

    def send(self, parts: Mapping[int, Tensor], tag: int, mark: int = 0) -> None:
        """Writes parts[r] for each reader r. The same tensor for many is written once."""
        places, end = {}, 0
        for part in parts.values():
            if part.data_ptr() not in places:
                places[part.data_ptr()] = end, part
                end += -(-part.nbytes // ALIGN) * ALIGN
        slot = self._free_slot(end)
        for at, part in places.values():
            slot.part(at, part).copy_(part)
        slot.letters = [self._place(reader, tag) for reader in parts]
        for place, (reader, part) in zip(slot.letters, parts.items(), strict=True):
            until(partial(self._vacant, place), self.seconds, self.peers[reader].process)
            self.letters[place + 1:place + 4] = array("q", (slot.start, len(slot.bytes), places[part.data_ptr()][0]))
            fence()
            self.letters[place] = tag * CALLS + mark

    def _vacant(self, place: int) -> bool:
        """Has the letter that was here ROOM letters ago been read?"""
        return not self.letters[place]

    def expect(self, rank: int, tag: int, mark: int = 0) -> "Letter":
        return Letter(self.peers[rank], self._place(self.rank, tag), tag, mark)

    @staticmethod
    def _place(reader: int, tag: int) -> int:
        return 4 * (reader * ROOM + tag % ROOM)

    def _free_slot(self, size: int) -> Slot:
        fitting = [s for s in self.slots if len(s.bytes) >= size and not any(self.letters[i] for i in s.letters)]
        if fitting:
            return min(fitting, key=lambda s: len(s.bytes))
        size = _pages(size)
        self.own.truncate(self.end + size)
        self.slots.append(_slot(self.own, self.end, size))
        self.end += size
        return self.slots[-1]


@dataclass
class Letter:
    """What a rank sends, which may not be there yet."""

    sender: Peer
    place: int
    tag: int
    mark: int

    def is_completed(self) -> bool:
        return self.sender.letters[self.place] // CALLS == self.tag

    def wait(self, timeout: timedelta) -> bool:
        """Raises RuntimeError when time is up or the sender has ended, Astray when it writes about something else."""
        until(self.is_completed, timeout.total_seconds(), self.sender.process)
        if (theirs := self.sender.letters[self.place] % CALLS) != self.mark:
            raise Astray(self.mark, theirs)
        return True

    def read(self, like: Tensor) -> Tensor:
        """The tensor, of the shape and dtype of `like`, where it lies: another's memory, there until `done`."""
        fence()
        start, size, at = self.sender.letters[self.place + 1:self.place + 4]
        if (start, size) not in self.sender.slots:
            self.sender.slots[start, size] = _slot(self.sender.file, start, size)
        return self.sender.slots[start, size].part(at, like)

    def done(self) -> None:
        fence()
        self.sender.letters[self.place] = 0


def until(there: Callable[[], bool], seconds: float, process: BinaryIO) -> None:
    """Waits for what another process writes. Raises RuntimeError when it has ended, or time is up."""
    begin, ended = time.perf_counter(), select.poll()
    ended.register(process)
    while not there():
        waited = time.perf_counter() - begin
        if waited < SPIN:
            os.sched_yield()
            continue
        if ended.poll(0) and not there():
            raise RuntimeError("its process has ended")
        if waited > seconds:
            raise RuntimeError("time is up")
        time.sleep(NAP if waited < 100 * NAP else NIGHT)


def fence() -> None:
    """What is written or read before comes before what is written or read after, also as other processors see it: a
    release of a lock followed by an acquisition orders both, and Python has no plainer way to say it."""
    lock = threading.Lock()
    for _ in range(2):
        with lock:
            pass


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _letters(file: BinaryIO, ranks: int) -> memoryview:
    return memoryview(mmap.mmap(file.fileno(), ranks * ROOM * 32, offset=PAGE)).cast("q")


def _slot(file: BinaryIO, start: int, size: int) -> Slot:
    return Slot(start, torch.frombuffer(mmap.mmap(file.fileno(), size, offset=start), dtype=torch.uint8))
