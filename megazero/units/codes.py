"""Weights and moments in fewer bytes than the numbers they are computed in.

bf16    rounded up or down by chance, so that what is smaller than a step of bf16 counts on the average (Zamirai et al.
        2020, Revisiting BFloat16 Training). Chance is a hash of (seed, kind, name, step, logical element)
8bit    one of 255 numbers, dense near zero, times the largest of a block (Dettmers et al. 2022, 8-bit Optimizers via
        Block-wise Quantization, section 2): BLOCK successive elements of a logical tensor's last dimension. Ranks that
        share a block agree on its largest. What is decoded and coded again stays as it is, so checkpoints hold numbers

So the bits are the same however a tensor is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch

from megazero.comm import Group
from megazero.plan import BLOCK, Flat, MomentSpec, Piece, Tile, blocks_here, blocks_of, tiled
from megazero.units.random import hashed, key
from megazero.units.unit import chunk

Tensor = torch.Tensor


@dataclass(frozen=True)
class Moment:
    """What is kept beside a unit's masters of one kind (or these): the elements from `low` on of a buffer that is laid
    out as `flat` says. A `factor` is whole on every rank."""

    flat: Flat
    low: int
    tensor: Tensor
    factor: bool = False

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def part(self, start: int, stop: int) -> Tensor:
        return self.tensor[start - self.low:stop - self.low]

    def meets(self, start: int, stop: int) -> tuple[int, int]:
        """What of [start, stop) is here."""
        a, b = (min(max(at, self.low), self.low + len(self.tensor)) for at in (start, stop))
        return a, b

    def piece(self, name: str) -> Piece:
        """Of the logical tensor of that name."""
        return next(p for p in self.flat.pieces if p.shard.parameter.name == name)

    def read(self, tile: Tile) -> Tensor:
        """Its elements, as numbers."""
        return self.part(tile.start, tile.start + tile.numel)

    def write(self, tile: Tile, values: Tensor, go: Tensor, step: Tensor) -> None:
        """They become these values, if `go`; `step` counts what was written before."""
        now = self.read(tile)
        torch.where(go, values.to(now.dtype), now, out=now)

    def numbers(self) -> Tensor:
        """All that is here, to be read, or filled and handed to `take`."""
        return self.tensor

    def take(self, numbers: Tensor) -> None:
        """All that is here becomes these; all ranks together."""


@dataclass(frozen=True)
class ByChance(Moment):
    """In bf16. `streams`: a key of each piece."""

    streams: Sequence[int] = ()

    def write(self, tile: Tile, values: Tensor, go: Tensor, step: Tensor) -> None:
        now, rows = self.part(tile.start, tile.start + tile.numel), torch.arange(tile.rows, device=values.device)
        noise = hashed(self.streams[tile.piece], tile.row + rows, tile.columns, tile.column, step).view(-1)
        torch.where(go, by_chance(values, noise), now, out=now)


def by_chance(x: Tensor, noise: Tensor) -> Tensor:
    """bf16 above or below x, as 16 bits of noise say: the nearer, the likelier."""
    bits = x.float().view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
    return (bits & -0x10000).view(torch.float32).bfloat16()


@dataclass(frozen=True)
class InBlocks(Moment):
    """In 8 bits: `tensor` holds codes. `scales`: the largest of each block, tile by tile; `table`: what codes are of
    it, ascending; `ranks`: groups that hold others of the same tensors."""

    scales: Tensor = field(default_factory=lambda: torch.zeros(0))
    table: Tensor = field(default_factory=lambda: torch.zeros(0))
    ranks: Sequence[Group] = ()

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + self.scales.nbytes

    def read(self, tile: Tile) -> Tensor:
        codes = self.part(tile.start, tile.start + tile.numel)
        return self.table[codes.int()] * self._spread(tile)

    def write(self, tile: Tile, values: Tensor, go: Tensor, step: Tensor) -> None:
        """With the scales that are there."""
        scale, among = self._spread(tile), (self.table[1:] + self.table[:-1]) / 2
        codes = torch.bucketize(torch.where(scale > 0, values / scale, 0), among).to(torch.uint8)
        now = self.part(tile.start, tile.start + tile.numel)
        torch.where(go, codes, now, out=now)

    def nothing(self) -> Tensor:
        """The largest of each block of each tensor, on all ranks together: none yet."""
        return self.scales.new_zeros(sum(self._sizes))

    def note(self, largest: Tensor, tile: Tile, values: Tensor) -> None:
        """What this tile would hold."""
        index = self._block(tile).expand(tile.rows, -1)
        own = self.scales.new_zeros(tile.rows, tile.blocks[1] - tile.blocks[0])
        own.scatter_reduce_(1, index, values.abs().view(tile.rows, tile.columns), "amax")
        there = self._meant(largest, tile)
        torch.maximum(there, own, out=there)

    def settle(self, largest: Tensor, tile: Tile, go: Tensor) -> None:
        """The scales of a tile become these, which all ranks agree on, if `go`."""
        now = self._scales(tile)
        torch.where(go, self._meant(largest, tile), now, out=now)

    def numbers(self) -> Tensor:
        out = self.scales.new_zeros(len(self.tensor))
        for t in self._tiles:
            out[t.start - self.low:t.start - self.low + t.numel] = self.read(t)
        return out

    def take(self, numbers: Tensor) -> None:
        largest, go = self.nothing(), torch.ones((), dtype=torch.bool, device=numbers.device)
        parts = [(t, numbers[t.start - self.low:t.start - self.low + t.numel]) for t in self._tiles]
        for tile, values in parts:
            self.note(largest, tile, values)
        agreed(largest, self.ranks)
        for tile, values in parts:
            self.settle(largest, tile, go)
            self.write(tile, values, go, go)

    @cached_property
    def _tiles(self) -> list[Tile]:
        return list(tiled(self.flat, self.low, self.low + len(self.tensor), chunk(self.tensor.device)))

    @cached_property
    def _sizes(self) -> list[int]:
        """Blocks of each piece's tensor."""
        return [prod(blocks_of(piece.shard.parameter.shape)) for piece in self.flat.pieces]

    def _block(self, tile: Tile) -> Tensor:
        """Which of its blocks each column of a tile is in."""
        columns = torch.arange(tile.column, tile.column + tile.columns, device=self.scales.device)
        return columns // BLOCK - tile.blocks[0]

    def _scales(self, tile: Tile) -> Tensor:
        a, b = tile.blocks
        return self.scales[tile.block:tile.block + tile.rows * (b - a)].view(tile.rows, b - a)

    def _spread(self, tile: Tile) -> Tensor:
        """The scale of each element."""
        return self._scales(tile)[:, self._block(tile)].view(-1)

    def _meant(self, largest: Tensor, tile: Tile) -> Tensor:
        """The blocks of a tile, of those of all tensors."""
        whole = largest.split(self._sizes)[tile.piece]
        rows, blocks = blocks_of(self.flat.pieces[tile.piece].shard.parameter.shape)
        return whole.view(rows, blocks)[tile.row:tile.row + tile.rows, tile.blocks[0]:tile.blocks[1]]


def agreed(largest: Tensor, ranks: Sequence[Group]) -> Tensor:
    """Of all ranks that hold pieces of the same tensors."""
    for group in ranks:
        group.all_reduce(largest, "max").wait()
    return largest


def codebook(signed: bool, like: Tensor) -> Tensor:
    """255 numbers of [-1, 1], or 256 of [0, 1]: seven decades below 1, each with twice as many as the one before, and
    zero. The largest is 1, so that a block's largest stays what it is."""
    positive = [10.0**(decade - 6) * (0.1 + 0.9 * (i + 0.5) / n) for decade in range(7)
                for n in [2**decade if signed else 2**(decade + 1)] for i in range(n)]
    positive[-1] = 1.0
    both = [*(-x for x in reversed(positive)), 0.0, *positive] if signed else [0.0, *positive]
    return like.new_tensor(both)


def moment(spec: MomentSpec, like: Tensor, low: int, high: int, dtype: str, kind: str, seed: int,
           ranks: Sequence[Group], zeros: Callable[[int, torch.dtype], Tensor]) -> Moment:
    """Zeros of a kind, of a rank whose slice of the unit is [low, high) and whose numbers are like these."""
    start, stop = spec.on(low, high)
    if dtype == "bf16":
        streams = [key(seed, kind, piece.shard.parameter.name) for piece in spec.flat.pieces]
        return ByChance(spec.flat, start, zeros(stop - start, torch.bfloat16), streams=streams)
    if dtype == "8bit":
        signed = kind != "exp_avg_sq"
        return InBlocks(spec.flat, start, zeros(stop - start, torch.uint8).fill_(127 if signed else 0),
                        scales=like.new_zeros(blocks_here(spec.flat, start, stop)), table=codebook(signed, like),
                        ranks=ranks)
    return Moment(spec.flat, start, zeros(stop - start, like.dtype), spec.factor)
