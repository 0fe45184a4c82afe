"""Which elements of which tensor a rank holds: plain values, no tensors.

A weight has one logical name and one full shape. A rank holds a `Box` of it, described by a `Shard`. The shards that
one matrix multiplication reads together lie side by side and form an `Operand` (q, k and v; gate and up). The operands
of a unit (a transformer block, an embedding) lie in one `Flat` buffer:

    flat    | qkv.weight          |pad| o.weight |pad| ... | norm.weight |pad| qkv.bias |pad|     |
            |  q   |  k   |  v    |   |          |   |     |             |   |          |   |     |
            ^ 0 matrices, then tables                      ^ vectors                              ^ size
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import NamedTuple, TypeVar

import numpy as np

from megazero.plan.rules import GROUPS

# elements: 128 bytes at two bytes each, whatever the dtype, so offsets are the same in every dtype
ALIGN = 64

T = TypeVar("T")
Shape = tuple[int, ...]
Axes = Mapping[str, tuple[int, int]]    # where a rank stands: axis -> (its number there, how many there are)
ALONE: Axes = {}                        # an axis that is not named has one rank


class Box(NamedTuple):
    """The elements [offset, offset + size) of a tensor, dimension by dimension."""

    offset: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    def moved(self, by: Shape) -> "Box":
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.size)


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor have in common, or None."""
    low = tuple(max(i, j) for i, j in zip(a.offset, b.offset, strict=True))
    high = tuple(min(i + n, j + m) for i, n, j, m in zip(a.offset, a.size, b.offset, b.size, strict=True))
    return (Box(low, tuple(h - o for o, h in zip(low, high, strict=True)))
            if all(o < h for o, h in zip(low, high, strict=True)) else None)


def tiles(shape: Shape, parts: Sequence[Box]) -> bool:
    """Do these boxes, each inside the tensor, hold every element exactly once? Hardly more than linear in their number:
    corners of a box, with signs that alternate along each edge, say all of it, and those of boxes side by side cancel.
    """
    low = np.array([(0,) * len(shape), *(p.offset for p in parts)], np.int64)
    high = low + np.array([shape, *(p.size for p in parts)], np.int64)
    corners, signs, stride = np.zeros(len(low), np.int64), np.array([-1] + [1] * len(parts)), 1
    for d in np.flatnonzero((high - low != shape).any(0)):      # dimensions that are cut
        times = len(corners) // len(low)
        corners = np.concatenate([corners + stride * np.tile(edge[:, d], times) for edge in (low, high)])
        signs, stride = np.concatenate([signs, -signs]), stride * (shape[d] + 1)
    _, place = np.unique(corners, return_inverse=True)
    return not np.bincount(place, signs).any()


def boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The flat range [start, stop) of a row-major tensor, in order, as at most 2 n - 1 boxes for n dimensions."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    whole = range(ceil(start / row), stop // row)               # rows that lie in the range completely
    if first < whole.start:
        yield from _in_row(shape, first, start - first * row, min(stop - first * row, row))
    if whole:
        yield Box((whole.start, *(0 for _ in shape[1:])), (len(whole), *shape[1:]))
    if whole.stop <= last and (first < last or first == whole.start):
        yield from _in_row(shape, last, max(start - last * row, 0), stop - last * row)


def _in_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, stop):
        yield Box((row, *box.offset), (1, *box.size))


@dataclass(frozen=True)
class Cut:
    """A cut of dimension `dim` into `parts` pieces that stay whole (heads, rows), among the ranks of an axis.

    Ranks share the pieces evenly. With fewer parts than ranks, neighbouring ranks hold the same part. `ragged` cuts
    (a vocabulary) need not divide: every rank stores the same number of rows, the last ones hold fewer real ones.
    `name` says what the parts are; cuts of one name share out the same thing.
    """

    dim: int
    parts: int
    ragged: bool = False
    name: str = ""
    axis: str = "tp"

    def bounds(self, extent: int, rank: int, ranks: int, pad_rows: int) -> tuple[int, int, int]:
        """What rank `rank` of `ranks` holds of a dimension of `extent`: (from, to, how many neighbours hold it)."""
        if self.ragged:
            rows = ragged_rows(self.parts, ranks, pad_rows)
            return min(rank * rows, self.parts), min((rank + 1) * rows, self.parts), 1
        distinct = min(ranks, self.parts)
        copies, step = ranks // distinct, extent // distinct
        low = rank // copies * step
        return low, low + step, copies


@dataclass(frozen=True)
class Parameter:
    """A logical weight: what it is on all ranks together. `std` 0 means the constant `mean`. Its `cuts` are of
    different axes and of different dimensions."""

    name: str
    shape: Shape
    std: float = 0.0
    mean: float = 0.0
    cuts: tuple[Cut, ...] = ()
    group: str = "matrix"               # of plan.rules.GROUPS: which rule changes it, and is it decayed?
    # each tensor-parallel rank sees part of its gradient: norms, row biases, positions
    partial: bool = False


@dataclass(frozen=True)
class OperandSpec:
    """Parameters stored side by side along dimension 0, and the multiple their sum of rows is padded to."""

    name: str
    parameters: tuple[Parameter, ...]
    pad_rows: int = 1

    @property
    def group(self) -> str:
        """That of its parameters."""
        return self.parameters[0].group


@dataclass(frozen=True)
class UnitSpec:
    """What is gathered, released, reduced and published together: a block, an embedding, the head."""

    name: str
    operands: tuple[OperandSpec, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(p for o in self.operands for p in o.parameters)


def joined(units: Sequence[UnitSpec], elements: int) -> list[UnitSpec]:
    """Neighbours joined into units of at most so many logical elements, where they are not larger by themselves."""
    out: list[list[UnitSpec]] = []
    for unit in units:
        if out and sum(prod(p.shape) for u in (*out[-1], unit) for p in u.parameters) <= elements:
            out[-1].append(unit)
        else:
            out.append([unit])
    return [g[0] if len(g) == 1 else UnitSpec(f"{g[0].name}-{g[-1].name}", tuple(o for u in g for o in u.operands))
            for g in out]


@dataclass(frozen=True)
class Shard:
    """One parameter as one rank holds it, beside those that differ from it on the axes of its cuts and on tp. (Ranks of
    other axes are data-parallel to it: they share a unit, not a parameter.)

    `cut`         tensor-parallel ranks hold boxes of their own
    `replicas`    how many of those ranks hold this same box; the lowest of them owns it
    `partial`     its gradient must be summed over those replicas before it means anything
    """

    parameter: Parameter
    box: Box
    cut: bool
    replicas: int
    owner: bool
    partial: bool


def shard(parameter: Parameter, place: Axes = ALONE, pad_rows: int = 1) -> Shard:
    """The part of a parameter that the rank of this place holds."""
    shape, by_axis = parameter.shape, {c.axis: c for c in parameter.cuts}
    assert len(by_axis) == len({c.dim for c in parameter.cuts}) == len(parameter.cuts), f"{parameter.name}: {by_axis}"
    bounds, replicas, owner, partial = [(0, n) for n in shape], 1, True, False
    for axis in dict.fromkeys(("tp", *by_axis)):
        (rank, ranks), cut = place.get(axis, (0, 1)), by_axis.get(axis)
        copies, summed = ranks, parameter.partial and ranks > 1
        if cut is not None:
            low, high, copies = cut.bounds(shape[cut.dim], rank, ranks, pad_rows)
            bounds[cut.dim], summed = (low, high), copies > 1
        replicas, owner, partial = replicas * copies, owner and rank % copies == 0, partial or summed
    box = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
    return Shard(parameter, box, "tp" in by_axis and place.get("tp", (0, 1))[1] > 1, replicas, owner, partial)


def ragged_rows(parts: int, ranks: int, pad_rows: int) -> int:
    """Rows that each rank stores of a ragged cut: enough for all, a multiple of `pad_rows`."""
    return ceil(parts / (ranks * pad_rows)) * pad_rows


def divisible(parameter: Parameter, ranks: int) -> bool:
    """Can `ranks` ranks share this parameter, on each axis that cuts it?"""
    return all(c.ragged or c.parts % ranks == 0 or ranks % c.parts == 0 for c in parameter.cuts)


@dataclass(frozen=True)
class Piece:
    """A shard at its place in the flat buffer."""

    shard: Shard
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shard.box.numel

    def boxes(self, low: int, high: int) -> Iterator[tuple[int, Box]]:
        """(flat start, box of the logical tensor) of what the flat range [low, high) holds of this shard."""
        at = max(low, self.start)
        for box in boxes(self.shard.box.size, at - self.start, min(high, self.stop) - self.start):
            yield at, box.moved(self.shard.box.offset)
            at += box.numel


@dataclass(frozen=True)
class Operand:
    """What one matrix multiplication or one norm reads: a tensor of `shape` at `start` of the flat buffer."""

    name: str
    start: int
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class Flat:
    """One unit's flat buffer on one rank, whole. Operands of one group lie together, in the order of GROUPS."""

    name: str
    operands: tuple[Operand, ...]
    size: int

    @property
    def kind(self) -> tuple[tuple[int, Shape], ...]:
        """Equal for units laid out alike, whose whole buffers can take each other's place."""
        return tuple((o.start, o.shape) for o in self.operands)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(p for o in self.operands for p in o.pieces)


def flat(unit: UnitSpec, place: Axes = ALONE) -> Flat:
    """Lays a unit out for the rank of this place."""
    placed, at = [], 0
    for group in GROUPS:
        for spec in unit.operands:
            if spec.group == group:
                placed.append(_place(spec, at, place))
                at = ceil(placed[-1].stop / ALIGN) * ALIGN
    return Flat(unit.name, tuple(placed), at)


def spans(f: Flat, size: int, of: Callable[[Piece], T]) -> list[tuple[T, int, int]]:
    """(what, from, to) of a flat buffer that is stored in `size` elements: neighbours of which `of` says the same as
    one, padding with what lies before."""
    said = [(of(piece), piece.start) for operand in f.operands for piece in operand.pieces]
    new = [i for i, (what, _) in enumerate(said) if i == 0 or what != said[i - 1][0]]
    starts = [said[i][1] for i in new]
    return [(said[i][0], a, b) for i, a, b in zip(new, starts, [*starts[1:], size], strict=True)]


def _place(spec: OperandSpec, start: int, place: Axes) -> Operand:
    pieces, rows, at = [], 0, start
    for parameter in spec.parameters:
        piece = Piece(shard(parameter, place, spec.pad_rows), at)
        pieces.append(piece)
        rows, at = rows + piece.shard.box.size[0], piece.stop
    for cut in (c for p in spec.parameters for c in p.cuts if c.ragged):        # then it is the only parameter
        rows = ragged_rows(cut.parts, place.get(cut.axis, (0, 1))[1], spec.pad_rows)
    return Operand(spec.name, start, (rows, *pieces[0].shard.box.size[1:]), tuple(pieces))


def cuts(size: int, ranks: int) -> tuple[int, ...]:
    """Where a flat buffer of `size` elements is cut among `ranks` ZeRO ranks: ranks + 1 bounds, equal slices.

    The last bound may lie beyond `size`: what a buffer holds there is padding.
    """
    step = ceil(size / (ranks * ALIGN)) * ALIGN
    return tuple(step * r for r in range(ranks + 1))
