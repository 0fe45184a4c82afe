"""late: around another backend, for tests. Results are NaN until waited for,
and inputs that change before that are an error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megazero.comm.group import Channel, Group, Work

Tensor = torch.Tensor


@dataclass
class Held:
    """A result that is handed over at wait(), into the tensor that was poisoned until then."""

    inner: Work
    what: str
    given: Tensor                                               # the input, and what it was
    copy: Tensor
    into: Tensor | None

    def wait(self) -> Tensor:
        result = self.inner.wait()
        if self.into is not None:
            return self.into.copy_(result)
        same = torch.equal(self.given.view(torch.uint8), self.copy.view(torch.uint8)) if self.given.numel() else True
        assert same, f"the input of {self.what} changed before it was waited for"
        return result

    def done(self) -> bool:
        return self.inner.done()


class Late:
    """Around another group: what overlap could break, breaks here."""

    def __init__(self, inner: Group) -> None:
        self.inner, self.size, self.rank = inner, inner.size, inner.rank

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        return self._held("all-gather", partial(self.inner.all_gather, about=about), x.contiguous(), into)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        return self._held("reduce-scatter", partial(self.inner.reduce_scatter, about=about), x.contiguous(), into)

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        return self._held("all-reduce", partial(self.inner.all_reduce, op=op, about=about), x, x)

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        return self._held("all-to-all", partial(self.inner.all_to_all, out=out, back=back, about=about), x, None)

    def _held(self, what: str, call: Callable[[Tensor], Work], x: Tensor, into: Tensor | None) -> Work:
        copy = x.clone()
        if into is not None:
            into.fill_(torch.nan if into.is_floating_point() else 1)        # x too where it is the result's memory
        return Held(call(copy), what, x, x.clone(), into)


@dataclass(frozen=True)
class LateChannel:
    """Around another channel."""

    inner: Channel

    def send(self, x: Tensor) -> Work:
        return Held(self.inner.send(x), "a send", x, x.clone(), None)

    def receive(self, into: Tensor) -> Work:
        apart = torch.empty_like(into)
        return Held(self.inner.receive(apart), "a receive", apart, apart, into.fill_(torch.nan))
