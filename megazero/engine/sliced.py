"""Parameters of a module that no engine has yet, of which each rank keeps an even slice (see zero.py)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megazero.comm import Group
from megazero.engine.hidden import forget, hide, show

Tensor = torch.Tensor
INSTEAD = "read or write it within zero.GatheredParameters, on all ranks"


class Sliced:
    """One parameter: whole and as it was while `opened`, else hidden, with this rank's slice of its numbers here.

    slice       [numel / ranks, rounded up], on `device`; None while it is whole
    seen        memory in which it was whole and that somebody may still have a view of
    fetch       asked by who reads it while it is hidden: opens it, where that may be
    """

    def __init__(self, p: nn.Parameter, module: nn.Module, name: str, group: Group, device: torch.device,
                 fetch: Callable[["Sliced", Sequence[nn.Parameter]], bool]) -> None:
        self.p, self.module, self.name, self.group, self.device, self.fetch = p, module, name, group, device, fetch
        self.kind, self.shape = type(p), p.shape
        self.slice: Tensor | None = None
        self.seen: list[StorageWeakRef] = []
        p.home = self  # type: ignore[attr-defined]

    @property
    def width(self) -> int:
        return -(-self.shape.numel() // self.group.size)

    def take(self, writer: int) -> None:
        """While it is whole: it becomes that of one rank."""
        if self.group.rank != writer:
            self.p.data.zero_()
        self.p.data.copy_(self.group.all_reduce(self.p.data.contiguous(), about=self.name).wait())

    def close(self, writer: int | None) -> None:
        """Of the whole weights, those of rank `writer`, this rank keeps its slice; of its own if it is None, when all
        ranks have the same."""
        self.shape = self.p.shape                               # somebody may have given it other data
        self.seen = [ref for ref in self.seen if not ref.expired()] + [StorageWeakRef(self.p.data.untyped_storage())]
        whole = self.p.data.new_zeros(self.width * self.group.size, device=self.device)
        if writer in (None, self.group.rank):
            whole[:self.shape.numel()] = self.p.data.flatten()
        low = self.group.rank * self.width
        self.keep(whole[low:low + self.width].clone() if writer is None
                  else self.group.reduce_scatter(whole, about=self.name).wait())

    def keep(self, part: Tensor) -> None:
        """This rank's slice is known."""
        self.slice = part
        hide(self.p, self.name, part.new_zeros(()).expand(self.shape), lambda wanted: self.fetch(self, wanted),
             self.store, INSTEAD)

    def store(self, whole: Tensor) -> bool:
        """While it is hidden all ranks write the same whole weights: each keeps its slice."""
        if self.slice is None or whole.shape != self.shape:
            return False
        low, high = (min(self.width * (self.group.rank + i), self.shape.numel()) for i in (0, 1))
        part = torch.zeros_like(self.slice)
        part[:high - low] = whole.detach().reshape(-1)[low:high]
        self.keep(part)
        return True

    def open(self) -> None:
        if self.slice is not None:
            whole = self.group.all_gather(self.slice, about=self.name).wait()
            self.slice = None
            show(self.p, self.kind, whole[:self.shape.numel()].view(self.shape))

    def leave(self) -> None:
        """Whoever opened it keeps it from now on."""
        del self.p.home  # type: ignore[attr-defined]
        forget(self.p)


def sliced(parameters: Iterable[Tensor]) -> list[Sliced]:
    """The homes of those that have one."""
    found = [getattr(p, "home", None) for p in parameters]
    return [home for home in found if isinstance(home, Sliced)]
