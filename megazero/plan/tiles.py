"""A slice of a unit's flat buffer, seen as matrices: which rows and blocks of each logical tensor it holds. Pure."""

from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

from megazero.plan.layout import Flat, Shape

BLOCK = 256             # successive elements of a tensor's last dimension that have one scale (--exp-avg-dtype 8bit)


class Tile(NamedTuple):
    """Rows of a logical tensor, all but its last dimension taken as one, from one column on.

    piece       number of the piece of the flat buffer       start      its first element there
    block       number of its first block in the slice
    """

    piece: int
    start: int
    row: int
    rows: int
    column: int
    columns: int
    block: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def blocks(self) -> tuple[int, int]:
        """Of a row those that it meets: [from, to)."""
        return self.column // BLOCK, ceil((self.column + self.columns) / BLOCK)


def tiled(f: Flat, low: int, high: int, most: int = 1 << 62) -> Iterator[Tile]:
    """What the slice [low, high) holds, in order, at most so many elements at a time where a row is not more."""
    block = 0
    for number, piece in enumerate(f.pieces):
        shape = piece.shard.parameter.shape
        for start, box in piece.boxes(low, high):
            first, rows, columns = 0, prod(box.size[:-1]), box.size[-1]
            for size, offset in zip(shape[:-1], box.offset[:-1], strict=True):
                first = first * size + offset
            step = max(most // columns, 1)
            for row in range(0, rows, step):
                tile = Tile(number, start + row * columns, first + row, min(step, rows - row), box.offset[-1], columns,
                            block)
                block += tile.rows * (tile.blocks[1] - tile.blocks[0])
                yield tile


def blocks_of(shape: Shape) -> tuple[int, int]:
    """Of a logical tensor: rows, and blocks of each."""
    return prod(shape[:-1]), ceil(shape[-1] / BLOCK)


def blocks_here(f: Flat, low: int, high: int) -> int:
    """That a slice meets."""
    return sum(t.rows * (t.blocks[1] - t.blocks[0]) for t in tiled(f, low, high))
