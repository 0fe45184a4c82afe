"""What a group of ranks is.

A `Group` is the ranks of one axis of the mesh. Its calls start at once and return a `Work`; the result is there, and
the input may change, after `wait()`. One is a size: a group of one hands back what it is given. Bytes sent are counted
by axis, as if by a ring: reduce-scatter and all-gather send (n - 1) / n of the whole, all-reduce twice that.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megazero.comm.marks import Marks

Tensor = torch.Tensor


class Stuck(RuntimeError):
    """A peer did not answer: the message names the rank that waited, for what, for whom and how long."""


class Work(Protocol):
    def wait(self) -> Tensor:
        """The result, when it is there."""
        ...

    def done(self) -> bool:
        """Would wait() return at once?"""
        ...


class Group(Protocol):
    """Calls on the ranks of one axis. Tensors are contiguous; dimension 0 is what is gathered and scattered.

    `into` is where the result goes, if given; it may be the whole that x is this rank's part of,
    or this rank's part of x. `about` names what the call is about (a unit): ranks that meet in calls about different
    things never take each other's message.
    """

    size: int
    rank: int

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        """[n, ...] on each rank -> [size n, ...] on all, in rank order."""
        ...

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        """[size n, ...] on each rank -> [n, ...]: this rank's part of the sum."""
        ...

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        """The sum (or `max`) over the ranks, in place."""
        ...

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        """[sum of out] -> [sum of back]: of x, out[r] elements go to rank r; what comes is in rank order, back[r] from
        rank r. Ranks agree: this one's back[r] is out[this one] of rank r."""
        ...


class Channel(Protocol):
    """The way from one rank to its neighbour. Messages arrive in the order in which they were sent."""

    def send(self, x: Tensor) -> Work:
        """x may change after wait()."""
        ...

    def receive(self, into: Tensor) -> Work:
        """The next message, of this shape."""
        ...


@dataclass
class Line:
    """What the groups of one rank share: counters, the time-out, and what the rank is doing now, for reports. `swap`
    tells others what this rank gave up in, and it what a peer did, or nothing."""

    rank: int = 0
    seconds: float = 600.0
    doing: str = "start"
    sent: Counter[str] = field(default_factory=Counter)         # bytes by axis
    marks: Marks = field(default_factory=Marks)
    swap: Callable[[str, int], str] = lambda doing, peer: ""


@dataclass(frozen=True)
class Done:
    result: Tensor

    def wait(self) -> Tensor:
        return self.result

    def done(self) -> bool:
        return True


class Alone:
    """A group of one rank."""

    size = 1
    rank = 0

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        return Done(placed(x, into))

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        return Done(placed(x, into))

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        return Done(x)

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        return Done(x)


def placed(x: Tensor, into: Tensor | None) -> Tensor:
    """x, in `into` if there is one; nothing moves when it is there already."""
    return x if into is None or same(x, into) else into.copy_(x)


def same(x: Tensor, y: Tensor) -> bool:
    """Are they one view of one storage? `Tensor.is_set_to` would ask the device, which fake tensors have not."""
    return (x.untyped_storage()._cdata == y.untyped_storage()._cdata and x.storage_offset() == y.storage_offset()
            and x.shape == y.shape and x.stride() == y.stride())


class Several:
    """What groups of several ranks have in common: who they are, and the count of what they send."""

    def __init__(self, axis: str, ranks: Sequence[int], line: Line) -> None:
        self.axis, self.ranks, self.line = axis, tuple(ranks), line
        self.size, self.rank = len(ranks), tuple(ranks).index(line.rank)

    def _count(self, part: Tensor, times: int = 1) -> None:
        """Each rank sends `part` to all others, `times` times."""
        self.line.sent[self.axis] += times * (self.size - 1) * part.numel() * part.element_size()

    def _count_parts(self, x: Tensor, out: Sequence[int]) -> None:
        """Each rank is sent a part of x of its own."""
        self.line.sent[self.axis] += (sum(out) - out[self.rank]) * x.element_size()
