"""A unit's tensors: weights, gradients and masters, each one flat buffer that the weights' names are views of.

Nothing here is an nn.Parameter and autograd never sees a weight: an operation holds a `Weight`, a handle that says
which part of which unit it means, looks it up when it needs it, and hands its gradient over when it has it (ops.py).
So a gradient is written once, into the place where the optimizer and the wire read it,
and no pass clears buffers before a step.

Data-parallel ranks cut each flat buffer into equal slices (layout.cuts). The ZeRO level says of which tensors a rank
keeps only its slice; whole buffers of the others are borrowed for as long as the program (program.py) needs them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from megazero.base import DTYPES
from megazero.comm import Alone, Group, Work
from megazero.plan import (
    GRADIENT,
    GRADIENTS,
    MASTER,
    PUBLISHED,
    STATE,
    WEIGHTS,
    Box,
    Flat,
    Operand,
    Piece,
    Shard,
    cuts,
)
from megazero.units.buffers import Buffers, viewed
from megazero.units.homes import Resident
from megazero.units.random import fill_initial

TORCH_DTYPE: dict[str, torch.dtype] = {name: getattr(torch, d.torch) for name, d in DTYPES.items()}
Tensor = torch.Tensor
Begin = Callable[[], Callable[[], None]]         # starts something, and returns what ends it


def chunk(device: torch.device) -> int:
    """Elements that our own kernels change at a time: on a CPU a cache holds what they need for so many."""
    return 1 << 16 if device.type == "cpu" else 1 << 24


@dataclass(frozen=True)
class Sharing:
    """How data-parallel ranks share a unit: the ranks of `shard` hold its slices, those of `replicate` the same slice
    once more, and so do the `holders` of a tied unit, at several places of a pipeline. `tensor`: ranks that hold other
    boxes of its tensors; `stage`: all of replicate x shard x tensor, numbered so, where a rule sees whole matrices.

    level    1: optimizer state and masters are slices, 2: gradients too, 3: weights too.
             With a shard group of one, a slice is the whole
    """

    level: int = 0
    shard: Group = field(default_factory=Alone)
    replicate: Group = field(default_factory=Alone)
    holders: Group = field(default_factory=Alone)
    tensor: Group = field(default_factory=Alone)
    stage: Group = field(default_factory=Alone)
    buffers: Buffers = field(default_factory=Buffers)


class Unit:
    """The flat buffers of one unit on one rank.

    weights         [size], compute dtype: what forward and backward read; None while only the slice is here (level 3)
    grads           [size], the master's dtype: the sum that grows now; None while there is none (from level 2)
    weight_slice    [high - low], compute dtype: this rank's slice of the weights, a view of them below level 3
    grad_slice      [high - low]: this rank's slice of the step's gradient, a view of `grads` below level 2
    master          [high - low], fp32 (fp64 with fp64 weights): what the optimizer changes;
                    weight_slice itself if the dtypes agree

    One that is not trained has no room for gradients. Its master is weight_slice, and so it is without `masters`.
    `home`: where master and moments are between updates; who reads them elsewhere asks for them (`home.present`).
    """

    def __init__(self, flat: Flat, dtype: torch.dtype, device: torch.device, sharing: Sharing | None = None,
                 trained: bool = True, masters: bool = True, home: Resident | None = None) -> None:
        self.flat, self.sharing, self.trained, self.home = flat, sharing or Sharing(), trained, home or Resident()
        level, shard, ranks = (self.sharing.level, self.sharing.shard,
                               self.sharing.shard.size * self.sharing.replicate.size)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.size = cuts(flat.size, ranks)[-1]                  # so that every sum over ranks can be shared evenly
        self.low, self.high = (self.size // shard.size * (shard.rank + i) for i in (0, 1))
        self.weights = torch.zeros(self.size, dtype=dtype, device=device) if level < 3 else None
        self.grads = (torch.zeros(self.size if trained else 0, dtype=wide, device=device)
                      if level < 2 or not trained else None)
        own = dtype != wide and trained and masters
        self.weight_slice = self._slice(self.weights, PUBLISHED if own else MASTER, dtype, device)
        self.grad_slice = self._slice(self.grads, GRADIENT, wide, device)
        self.master = self._slice(None, MASTER, wide, device) if own else self.weight_slice
        self._operands = {o.name: o for o in flat.operands}
        self._fresh: set[str] = set(self._operands)             # operands without a gradient yet in this sum
        self.published = 0                                      # how often the weights became others
        self._stale = True                                      # the whole weights are older than the slices
        self._gathering: Work | None = None
        self.changing: Work | None = None                       # an update, up to its publish, beside what follows
        self.aside: list[Begin] | None = None                   # what adds to gradients later, in W

    def _slice(self, whole: Tensor | None, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return (self.home.zeros(self.flat.name, kind, self.high - self.low, dtype, device) if whole is None
                else whole[self.low:self.high])

    @property
    def away(self) -> bool:
        """Is the master elsewhere between updates, the weights' slice apart?"""
        return self.master is not self.weight_slice and self.home.has(self.flat.name, MASTER)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Within, master, moments and the slice of the weights are here; what is written there stays."""
        with self.home.present(self.flat.name, STATE), self.home.present(self.flat.name, WEIGHTS):
            yield

    def __contains__(self, operand: str) -> bool:
        return operand in self._operands

    @property
    def owner(self) -> bool:
        """Is this the rank whose copy of the slice counts in norms and is saved?"""
        return self.sharing.replicate.rank == self.sharing.holders.rank == 0

    def weight(self, operand: str) -> "Weight":
        return Weight(self, self._operands[operand])

    # ---- weights: slices are published, then gathered, and released where they do not stay

    def initialise(self, seed: int) -> None:
        """Draws this rank's masters from (seed, name, element index), then publishes them."""
        with self.present():
            for piece in self.flat.pieces:
                for start, box in piece.boxes(self.low, self.high):
                    fill_initial(self.master[start - self.low:][:box.numel], piece.shard.parameter, seed, box)
            self.publish()

    def publish(self, source: Tensor | None = None) -> None:
        """Masters, or a `source` like them, -> this rank's slice of the weights, after they changed.
        Other ranks see them with the next gather."""
        source = self.master if source is None else source
        if self.weight_slice is not source:
            self.weight_slice.copy_(source)
        self.changed()

    def changed(self) -> None:
        """This rank's slice of the weights is another."""
        self._stale, self.published = True, self.published + 1
        if self.sharing.buffers.poison and self.weights is not None:
            self.weights[:self.low].fill_(torch.nan)
            self.weights[self.high:].fill_(torch.nan)

    def updated(self) -> None:
        """Returns when the last update is published. Whoever reads weights or state, or overwrites gradients, asks."""
        work, self.changing = self.changing, None
        if work is not None:
            work.wait()

    @property
    def here(self) -> bool:
        """Are the whole weights here, and those of the last update?"""
        return not (self.weights is None or self._stale or self._gathering or self.changing)

    def gather(self) -> None:
        """The whole weights begin to arrive; `arrive` waits for them. Nothing travels when they are here."""
        self.updated()
        if self.weights is None:
            self.weights = self.sharing.buffers.take((self.flat.kind, "weights"), self.size, self.weight_slice)
        if self._stale:
            gather = partial(self.sharing.shard.all_gather, self.weight_slice, self.weights, self.flat.name)
            self._gathering = self.home.fetched(self.flat.name, gather)
            self._stale = False

    def arrive(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """Level 3: whoever needs the whole weights again must gather them. Who has a view of them keeps these."""
        assert self.weights is not None and self.sharing.level == 3, f"{self.flat.name} has nothing to release"
        self.arrive()
        if viewed(self.weights):
            self.sharing.buffers.lose(self.weights)
        else:
            self.sharing.buffers.give((self.flat.kind, "weights"), self.weights, self.flat)
        self.weights, self._stale = None, True

    # ---- gradients: a sum is opened, grows, is closed, and is reduced to this rank's slice

    def open(self) -> None:
        """A new sum of gradients: the first one to arrive overwrites what was there, later ones add."""
        self.updated()
        if self.grads is None:
            self.grads = self.sharing.buffers.take((self.flat.kind, "grads"), self.size, self.grad_slice)
        self._fresh = set(self._operands)

    def close(self) -> Tensor:
        """The sum is complete: what nothing was handed to is zero.
        Returns a number that is finite if all of them are."""
        assert self.grads is not None
        for name in self._fresh:
            o = self._operands[name]
            self.grads[o.start:o.stop].zero_()
        self._fresh = set()
        return self.grads.sum()

    def reduce(self) -> Work:
        """This rank's slice of the sum over the ranks that share this unit begins to arrive."""
        assert self.grads is not None
        into = self.grad_slice if self.sharing.level < 2 else self.grads[self.low:self.high]
        return self.sharing.shard.reduce_scatter(self.grads, into, self.flat.name)

    def land(self, arrived: Tensor, first: bool) -> None:
        """Adds a slice that arrived to those of this step before it; from level 2 the whole buffer goes back."""
        if self.sharing.level < 2:
            return
        with self.home.present(self.flat.name, GRADIENTS, needed=not first):
            (self.grad_slice.copy_ if first else self.grad_slice.add_)(arrived)
        assert self.grads is not None
        self.sharing.buffers.give((self.flat.kind, "grads"), self.grads, self.flat)
        self.grads = None

    def partial(self, cut: bool) -> list[Tensor]:
        """What of the gradient's slice is partial, of shards that are cut or not:
        tensor-parallel ranks must add theirs."""
        return [self.grad_slice[a:b] for p, a, b in self.pieces() if p.shard.partial and p.shard.cut == cut]

    def pieces(self) -> list[tuple[Piece, int, int]]:
        """(piece, from, to) of every piece of which this rank's slice holds something,
        counted from the slice's begin."""
        ranges = ((p, max(p.start, self.low), min(p.stop, self.high)) for p in self.flat.pieces)
        return [(p, a - self.low, b - self.low) for p, a, b in ranges if a < b]

    def claim(self, operand: Operand) -> bool:
        """Is this operand's gradient unwritten in this sum? Asked once for each gradient: it is written from now on."""
        first = operand.name in self._fresh
        self._fresh.discard(operand.name)
        return first

    def now_or_later(self, begin: Begin) -> Callable[[], None]:
        """Begins what adds to gradients, and returns what ends it; while gradients are put aside both wait for W."""
        if self.aside is None:
            return begin()
        self.aside.append(begin)
        return lambda: None


@torch.library.custom_op("megazero::add_wide", mutates_args={"grad"})
def add_wide(grad: Tensor, dy: Tensor, x: Tensor, keep: int) -> None:
    """grad = keep x grad + dyT x on CUDA, for a product of half precision that is added up in fp32. An operation of its
    own, since torch's with `out_dtype` and `out` is known to no tracer."""
    torch.addmm(grad, dy.T, x, beta=keep, out_dtype=grad.dtype, out=grad)


@add_wide.register_fake
def _(grad: Tensor, dy: Tensor, x: Tensor, keep: int) -> None:
    return None


@dataclass(frozen=True)
class Weight:
    """A handle: one operand of one unit. Cheap to hold across forward and backward; holds no tensor."""

    unit: Unit
    operand: Operand

    @property
    def value(self) -> Tensor:
        """The weight itself, a view of the unit's buffer. Look it up anew in backward; never save it."""
        o, weights = self.operand, self.unit.weights
        assert weights is not None, f"{o.name} is read while {self.unit.flat.name} is released"
        return weights[o.start:o.stop].view(o.shape)

    @property
    def grad(self) -> Tensor:
        o, grads = self.operand, self.unit.grads
        assert grads is not None, f"{o.name} gets a gradient while {self.unit.flat.name} has no sum open"
        return grads[o.start:o.stop].view(o.shape)

    @property
    def logical(self) -> tuple[Shard, ...]:
        """What it holds of each logical tensor, side by side."""
        return tuple(piece.shard for piece in self.operand.pieces)

    @property
    def box(self) -> Box:
        """That of its one logical tensor."""
        (shard,) = self.logical
        return shard.box

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """grad += dyT x, for dy [tokens, rows] and x [tokens, columns], now or in W; in one pass where dtypes
        agree."""
        self.unit.now_or_later(lambda: lambda: self._add_product(dy, x))()

    def _add_product(self, dy: Tensor, x: Tensor) -> None:
        # 0 overwrites: what was there, NaN included, does not count
        keep = 0 if self.unit.claim(self.operand) else 1
        grad = self.grad
        if grad.dtype == dy.dtype:
            grad.addmm_(dy.T, x, beta=keep)
        elif dy.is_cuda:
            add_wide(grad, dy, x, keep)
        else:
            self._merge(dy.T @ x, keep)

    def add(self, grad: Tensor) -> None:
        """grad += a whole gradient, now or in W."""
        self.unit.now_or_later(lambda: lambda: self._merge(grad, 0 if self.unit.claim(self.operand) else 1))()

    def add_sum(self, dy: Tensor) -> None:
        """grad += dy summed over tokens, for dy [tokens, width] and a vector."""
        self.add(dy.sum(0, dtype=self.unit.grad_slice.dtype))

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """grad[index] += rows, for index [n] and rows [n, columns], now or in W; rows that repeat add up, in a fixed
        order."""
        self.unit.now_or_later(lambda: lambda: self._add_rows(index, rows))()

    def _add_rows(self, index: Tensor, rows: Tensor) -> None:
        grad = self.grad
        if self.unit.claim(self.operand):
            grad.zero_()
        if grad.is_cuda:
            grad.index_put_((index,), rows.to(grad.dtype), accumulate=True)     # index_add_ sums in any order on CUDA
        else:
            grad.index_add_(0, index, rows.to(grad.dtype))                      # in order, and five times as fast

    def _merge(self, grad: Tensor, keep: int) -> None:
        if keep:
            self.grad.add_(grad)
        else:
            self.grad.copy_(grad)
