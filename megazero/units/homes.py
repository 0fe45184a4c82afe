"""Homes on disk of a rank's slices (plan/homes.py says which): a tensor keeps its address, and memory is behind a piece
of it only while somebody has brought it.

The file of a rank has no name: nobody else opens or shortens it, and it ends with the process, however that ends. What
was in it is then lost, and a run goes on from its last checkpoint. It is read and written around the page cache where
the file system allows that (O_DIRECT), in blocks, several at a time. A disk that fails ends the run with a sentence;
state of which a part was not written is torn, and is not given to anybody again.
"""

import errno
import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megazero.base import UserError, unwritable
from megazero.comm import Work
from megazero.plan import PAGE, STATE, WEIGHTS, Homes, Reach
from megazero.settings import Offload

Tensor = torch.Tensor
Key = tuple[tuple[str, str], Reach]      # (unit, STATE or another), a piece


class File:
    """A file without a name, `direct` if the page cache is passed by. Raises OSError."""

    def __init__(self, folder: Path, size: int) -> None:
        try:
            self.number, self.direct = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            self.number, self.direct = _nameless(folder), False
        weakref.finalize(self, os.close, self.number)
        os.posix_fallocate(self.number, 0, max(size, PAGE))
        if self.direct:
            self._try()

    def _try(self) -> None:
        """Are its pages those of the disk?"""
        with mmap.mmap(-1, PAGE) as page:
            try:
                os.pwritev(self.number, [page], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                fcntl.fcntl(self.number, fcntl.F_SETFL, fcntl.fcntl(self.number, fcntl.F_GETFL) & ~os.O_DIRECT)
                self.direct = False

    def read(self, into: memoryview, at: int) -> None:
        while into:
            count = os.preadv(self.number, [into], at)
            if count == 0:
                raise OSError(errno.EIO, "it is shorter than it was")
            into, at = into[count:], at + count

    def write(self, out: memoryview, at: int) -> None:
        while out:
            count = os.pwritev(self.number, [out], at)
            out, at = out[count:], at + count


def _nameless(folder: Path) -> int:
    """Where a file system knows no file without a name: one that loses it at once."""
    path = folder / f"megazero-{os.getpid()}-{os.urandom(4).hex()}"
    number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.unlink(path)
    return number


class Room(NamedTuple):
    """A tensor's memory, and where its bytes are in the file."""

    tensor: Tensor
    memory: mmap.mmap
    at: int
    low: int                            # which element of its unit's buffer is its first

    def bytes_of(self, span: Reach) -> tuple[int, int]:
        """In whole pages. A piece begins at one, or at the tensor's begin."""
        width = self.tensor.element_size()
        a, b = (span[0] - self.low) * width, (span[1] - self.low) * width
        return a // PAGE * PAGE, min(-(-b // PAGE) * PAGE, len(self.memory))


class Resident:
    """Everything is at home where it is used."""

    homes: Homes = {}

    def has(self, unit: str, kind: str) -> bool:
        """Is this kind elsewhere?"""
        return False

    def zeros(self, unit: str, kind: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor [count] of a kind: without memory behind it if its home is elsewhere."""
        return torch.zeros(count, dtype=dtype, device=device)

    def through(self, unit: str) -> Iterator[Reach]:
        """Each piece of a unit that is elsewhere, here in its turn."""
        raise AssertionError(f"{unit} is here")

    @contextmanager
    def present(self, unit: str, what: str, changed: bool = True, needed: bool = True) -> Iterator[None]:
        """Within, STATE, GRADIENTS or WEIGHTS of a unit are here. What is written there stays, if it is `changed`; what
        was there before comes, if it is `needed`."""
        yield

    def fetched(self, unit: str, gather: Callable[[], Work]) -> Work:
        """Weights that begin to be gathered; from home they come first, and are when somebody waits."""
        return gather()

    def copy(self, unit: str, kind: str, start: int, count: int) -> Tensor:
        """[count] elements of a kind that is elsewhere, from its `start`-th on."""
        raise AssertionError(f"{kind} of {unit} is here")

    def told(self) -> dict[str, float]:
        """What the log says of the way home, since this was asked last."""
        return {}

    def describe(self) -> list[str]:
        """Lines to be told at start."""
        return []


@dataclass(frozen=True)
class Fetched:
    """Whole weights whose slice is on its way from home."""

    home: Resident
    unit: str
    gather: Callable[[], Work]

    def wait(self) -> Tensor:
        with self.home.present(self.unit, WEIGHTS, changed=False):
            return self.gather().wait()

    def done(self) -> bool:
        return False


class Disk(Resident):
    """What of a rank's units is at home on disk.

    seconds     that somebody waited for the disk       read, written       bytes so far
    """

    def __init__(self, folder: Path, homes: Homes, depth: int, block: int, flag: str = "--offload-dir",
                 poison: bool = False) -> None:
        """`poison`: what is not here is NaN instead of no memory, so that a late reader shows (tests). Raises
        UserError."""
        self.homes, self.block, self.poison, self.where = dict(homes), block, poison, f"{flag} {folder}"
        self.order: list[Key] = [(of, piece) for of, home in homes.items() if of[1] == STATE for piece in home.pieces]
        self.kinds = {(of[0], kind): kept for of, home in homes.items() for kind, kept in home.kinds.items()}
        self.places = {key: i for i, key in enumerate(self.order)}
        size = sum(home.file_bytes for home in homes.values())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = File(folder, size)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise UserError(f"{self.where}: has no room for the {size:,} bytes of a rank "
                            f"({os.strerror(error.errno or 0)}); name a folder of a larger disk, or a smaller "
                            "--offload-fraction." if full else f"{self.where}: {unwritable(error)}.") from None
        self.pool = ThreadPoolExecutor(depth, "offload")
        self.rooms: dict[tuple[str, str], Room] = {}           # (unit, kind)
        self.used, self.read, self.written, self.seconds = 0, 0, 0, 0.0
        self.coming: dict[Key, list[Future[None]]] = {}
        self.going: dict[Key, list[Future[None]]] = {}
        self.inside: set[Key] = set()                           # somebody is within `present` of these
        self.torn: UserError | None = None
        self.before: dict[str, float] = {}

    @classmethod
    def of(cls, o: Offload, homes: Homes, poison: bool = False) -> Resident:
        """As the settings say. Raises UserError."""
        return (cls(Path(o.offload_dir or "."), homes, o.offload_queue_depth, o.offload_block_size, poison=poison)
                if homes else Resident())

    def zeros(self, unit: str, kind: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept = self.kinds.get((unit, kind))
        if kept is None:
            return super().zeros(unit, kind, count, dtype, device)
        assert count == kept.stop - kept.start and dtype.itemsize == kept.width, (unit, kind, count, dtype)
        memory = mmap.mmap(-1, max(-(-kept.bytes // PAGE), 1) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):                                 # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)                  # pages come back four times as fast
        tensor = torch.frombuffer(memory, dtype=dtype, count=count)
        self.rooms[unit, kind] = Room(tensor, memory, self.used, kept.start)
        self.used += len(memory)
        return tensor

    # ---- a piece comes and goes

    def through(self, unit: str) -> Iterator[Reach]:
        """The next one is read, and the one before written, meanwhile."""
        for key in self._keys(unit, STATE):
            at = self.places[key]
            for other in self.order[at:at + 2]:
                self._bring(other)
            self._arrive(key)
            yield key[1]
            self._leave(key)
            if at:
                self._gone(self.order[at - 1])

    def has(self, unit: str, kind: str) -> bool:
        return (unit, kind) in self.kinds

    def fetched(self, unit: str, gather: Callable[[], Work]) -> Work:
        if (unit, WEIGHTS) not in self.homes:
            return gather()
        for key in self._keys(unit, WEIGHTS):
            self._bring(key)
        return Fetched(self, unit, gather)

    @contextmanager
    def present(self, unit: str, what: str, changed: bool = True, needed: bool = True) -> Iterator[None]:
        keys = self._keys(unit, what)
        assert self.inside.isdisjoint(keys), f"{what} of {unit} would come twice, and lose what was written"
        self.inside |= {*keys}
        for key in keys if needed else ():
            self._bring(key)
        for key in keys:
            if needed:
                self._arrive(key)
            else:
                self._gone(key)                                 # what is still being written
        yield
        self.inside -= {*keys}
        for key in keys:
            self._leave(key, changed)
        for key in keys:
            self._gone(key)

    def _keys(self, unit: str, what: str) -> list[Key]:
        return [((unit, what), piece) for piece in self.homes[unit, what].pieces] if (unit, what) in self.homes else []

    def describe(self) -> list[str]:
        way = "around" if self.file.direct else "through"
        return [f"{'home':<12}{self.where}: read and written {way} the page cache"]

    def told(self) -> dict[str, float]:
        now = {"disk_seconds": self.seconds, "disk_bytes": float(self.read + self.written)}
        since, self.before = {name: value - self.before.get(name, 0) for name, value in now.items()}, now
        return since

    def settle(self) -> None:
        """Returns when nothing is being read or written."""
        for key in [*self.coming]:                              # brought ahead of an update that did not follow
            self._arrive(key)
            self._leave(key, changed=False)
        for key in [*self.going]:
            self._gone(key)

    def copy(self, unit: str, kind: str, start: int, count: int) -> Tensor:
        self.settle()
        room = self.rooms[unit, kind]
        width = room.tensor.element_size()
        a, b = start * width // PAGE * PAGE, -(-(start + count) * width // PAGE) * PAGE
        memory = mmap.mmap(-1, b - a)
        self._done(self._blocks(self.file.read, memory, 0, b - a, room.at + a))
        return torch.frombuffer(memory, dtype=room.tensor.dtype)[start - a // width:][:count]

    def _bring(self, key: Key) -> None:
        if key in self.coming:
            return
        self._gone(key)
        self.coming[key] = [work for room, a, b in self._ranges(key)
                            for work in self._blocks(self.file.read, room.memory, a, b, room.at + a)]

    def _arrive(self, key: Key) -> None:
        self._done(self.coming.pop(key))
        self.read += sum(b - a for _, a, b in self._ranges(key))

    def _leave(self, key: Key, changed: bool = True) -> None:
        ranges = self._ranges(key) if changed else []
        self.going[key] = [work for room, a, b in ranges
                           for work in self._blocks(self.file.write, room.memory, a, b, room.at + a)]
        self.written += sum(b - a for _, a, b in ranges)

    def _gone(self, key: Key) -> None:
        if key not in self.going:
            return
        self._done(self.going.pop(key))
        for room, a, b in self._ranges(key):
            if self.poison:
                memoryview(room.memory)[a:b] = b"\xff" * (b - a)
            else:
                room.memory.madvise(mmap.MADV_DONTNEED, a, b - a)

    def _ranges(self, key: Key) -> list[tuple[Room, int, int]]:
        """What a piece is of each tensor, in bytes."""
        (unit, what), piece = key
        return [(room, *room.bytes_of(span)) for kind, span in self.homes[unit, what].of_piece(piece).items()
                for room in [self.rooms[unit, kind]]]

    def _blocks(self, do: Callable[[memoryview, int], None], memory: mmap.mmap, a: int, b: int,
                at: int) -> list[Future[None]]:
        """Bytes [a, b) of memory begin to be read from, or written to, `at` in the file."""
        view, starts = memoryview(memory), range(a, b, self.block)
        return [self.pool.submit(do, view[x:min(x + self.block, b)], at + x - a) for x in starts]

    def _done(self, works: Sequence[Future[None]]) -> None:
        """Returns when they are. Raises UserError for what the disk said, and for ever after."""
        start = time.perf_counter()
        wait(works)
        self.seconds += time.perf_counter() - start
        error = next((error for work in works if (error := work.exception()) is not None), None)
        if isinstance(error, OSError):
            self.torn = UserError(f"{self.where}: what is at home there cannot be read or written ({error.strerror}); "
                                  "nothing is saved of this step. Go on from the last checkpoint, with another "
                                  "folder if that disk fails.")
        elif error is not None:
            raise error
        if self.torn is not None:
            raise self.torn
