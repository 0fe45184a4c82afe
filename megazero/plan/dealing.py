"""Whole logical matrices of which ranks hold pieces, dealt out for work that needs all of one at once. Pure."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import groupby
from math import prod

from megazero.plan.layout import Box, Flat, Piece, shard

ROOM = 1 << 28          # elements that a rank holds of matrices which travel at a time, where one is not more already


@dataclass(frozen=True)
class Ranks:
    """Those that share a stage's units, numbered along replicate, shard, tp."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1

    @property
    def each(self) -> int:
        """Ranks that hold all elements together."""
        return self.shard * self.tp

    @property
    def all(self) -> int:
        return self.replicate * self.each


@dataclass(frozen=True)
class Matrix:
    """A logical tensor of two dimensions, or more: then all but the first are one.

    holds       (which of the ranks that hold all together, where in its unit's buffer, box, does it count?)
    worker      the rank that is given all of it
    """

    name: str
    shape: tuple[int, ...]
    holds: tuple[tuple[int, int, Box, bool], ...]
    worker: int = 0

    @cached_property
    def _at(self) -> dict[int, list[tuple[int, Box, bool]]]:
        return {place: [hold[1:] for hold in own] for place, own in groupby(
            sorted(self.holds, key=lambda hold: hold[0]), key=lambda hold: hold[0])}

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def flops(self) -> int:
        """Of one Newton-Schulz iteration: X Xt, its square, and their product with X."""
        short, long = sorted((self.shape[0], self.numel // self.shape[0]))
        return 4 * short**2 * long + 2 * short**3

    def sent(self, rank: int, ranks: Ranks) -> list[tuple[int, Box]]:
        """What a rank gives to the worker: each element comes from one of those that have the worker's copy of it."""
        ours = rank // ranks.each == self.worker // ranks.each
        return [(at, box) for at, box, counts in self._at.get(rank % ranks.each, ()) if ours and counts]

    def held(self, rank: int, ranks: Ranks) -> list[tuple[int, Box]]:
        """What a rank has of it, and is given back."""
        return [(at, box) for at, box, _ in self._at.get(rank % ranks.each, ())]


Wave = tuple[Matrix, ...]


def deal(units: Iterable[tuple[Flat, int]], ranks: Ranks, has: Callable[[Piece], bool]) -> list[Wave]:
    """Matrices of units (layout, stored size), those that `has` says, dealt by FLOPs: the largest first, each
    to whoever has least to do. They travel in waves, at most one for each worker."""
    found = sorted((m for f, size in units for m in _matrices(f, size, ranks, has)),
                   key=lambda m: -m.flops)
    load = [(0, rank) for rank in range(ranks.all)]
    heapify(load)
    turns, dealt = [0] * ranks.all, list[tuple[int, Matrix]]()
    for matrix in found:
        work, rank = load[0]
        heapreplace(load, (work + matrix.flops, rank))
        dealt.append((turns[rank], replace(matrix, worker=rank)))
        turns[rank] += 1
    waves = (sorted((m for _, m in turn), key=lambda m: m.worker)
             for _, turn in groupby(sorted(dealt, key=lambda d: d[0]), key=lambda d: d[0]))
    return [part for wave in waves for part in _fitting(wave, ROOM * ranks.each)]


def _fitting(wave: Sequence[Matrix], room: int) -> Iterator[Wave]:
    part: list[Matrix] = []
    for m in wave:
        if part and sum(x.numel for x in part) + m.numel > room:
            yield tuple(part)
            part = []
        part.append(m)
    yield tuple(part)


def _matrices(f: Flat, size: int, ranks: Ranks, has: Callable[[Piece], bool]) -> Iterator[Matrix]:
    step = size // ranks.shard
    for piece in filter(has, f.pieces):
        p, holds = piece.shard.parameter, []
        for tp in range(ranks.tp):
            other = Piece(shard(p, {"tp": (tp, ranks.tp)}), piece.start)
            assert other.stop == piece.stop, f"{p.name}: ranks hold unlike parts of it"
            for s in range(other.start // step, -(-other.stop // step)):
                holds += [(s * ranks.tp + tp, at, box, other.shard.owner)
                          for at, box in other.boxes(s * step, (s + 1) * step)]
        yield Matrix(p.name, p.shape, tuple(holds))


def bytes_sent(waves: Sequence[Wave], ranks: Ranks, rank: int, width: int) -> int:
    """That one rank sends: what it holds to the workers, and results to all who hold pieces."""
    there = sum(box.numel for w in waves for m in w if m.worker != rank for _, box in m.sent(rank, ranks))
    # of each copy of a matrix all holders are given theirs, but the worker its own
    back = sum(box.numel * (ranks.replicate - (place == rank % ranks.each))
               for w in waves for m in w if m.worker == rank for place, _, box, _ in m.holds)
    return (there + back) * width
