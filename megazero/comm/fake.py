"""fake: no peers, so any rank of any mesh runs in one process, also on torch's fake tensors. Shapes, bytes and memory
are right; sums are of one rank's share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megazero.comm.group import Done, Line, Several, Work, placed
from megazero.plan import all_reduce_bytes

Tensor = torch.Tensor


class Fake(Several):
    """No peers: shapes, bytes and memory are right, values are those of one rank's share."""

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        self._count(x)
        into = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        for part in into.chunk(self.size) if len(x) else ():
            placed(x, part)
        return Done(into)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        part = x.chunk(self.size)[self.rank]
        self._count(part)
        return Done(part.clone() if into is None else placed(part, into))

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        self.line.sent[self.axis] += all_reduce_bytes(x.numel(), x.element_size(), self.size)
        return Done(x)

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        self._count_parts(x, out)
        arrived = x.new_zeros(sum(back))
        arrived.split(list(back))[self.rank].copy_(x.split(list(out))[self.rank])
        return Done(arrived)


@dataclass(frozen=True)
class FakeChannel:
    """Nobody listens; zeros arrive."""

    line: Line

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        return Done(x)

    def receive(self, into: Tensor) -> Work:
        return Done(into.zero_())
