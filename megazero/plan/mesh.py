"""Which ranks form which group: one reshape of 0 .. world - 1, so that nobody computes strides. Pure.

Ranks are numbered pp (outermost) x dp x tp (innermost):
tensor-parallel neighbours, which talk most, are neighbours on a node.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where a rank stands on each axis."""

    pp: int
    dp: int
    tp: int


def all_reduce_bytes(elements: int, width: int, ranks: int) -> int:
    """Bytes that one rank sends in an all-reduce: two passes over the padded whole, less its own part."""
    return 2 * (ranks - 1) * ceil(elements / ranks) * width


@dataclass(frozen=True)
class Mesh:
    """The sizes of the axes.

    kv       how many neighbouring tensor-parallel ranks hold the same key-value heads (1: none do)
    shard    how many neighbouring data-parallel ranks share one copy of the ZeRO state; dp / shard copies replicate it
    looped   the last stage of a pipeline sends to the first (each rank has several stages)
    tied     the first and the last rank of a pipeline hold one tied unit
    """

    pp: int
    dp: int
    tp: int
    kv: int = 1
    shard: int = 1
    looped: bool = False
    tied: bool = False

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    def place(self, rank: int) -> Place:
        return Place(*(int(i) for i in np.unravel_index(rank, (self.pp, self.dp, self.tp))))

    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """Every group of every axis, in the order in which they are made."""
        ranks = np.arange(self.world).reshape(self.pp, self.dp, self.tp)
        rows = {
            "tp": ranks.reshape(-1, self.tp),
            "kv": ranks.reshape(-1, self.kv),
            "shard": ranks.transpose(0, 2, 1).reshape(-1, self.shard),
            "replicate": ranks.reshape(self.pp, -1, self.shard, self.tp).transpose(0, 3, 2, 1)
                         .reshape(-1, self.dp // self.shard),
            **({"tied": ranks[[0, -1]].reshape(2, -1).T} if self.tied else {}),
            "world": ranks.reshape(1, -1),
            # the same ranks once more: checkpoints are written beside training
            "saved": ranks.reshape(1, -1),
        }
        return {axis: [tuple(int(r) for r in row) for row in groups] for axis, groups in rows.items()}

    def channels(self) -> list[tuple[int, int]]:
        """(sender, receiver) of each neighbour pair of each pipeline, downstream; gradients take the same ways back."""
        ranks = np.arange(self.world).reshape(self.pp, -1)
        hops = 0 if self.pp == 1 else self.pp if self.looped else self.pp - 1
        return [(int(a), int(b)) for i in range(hops) for a, b in zip(ranks[i], ranks[(i + 1) % self.pp], strict=True)]

    def describe(self) -> list[str]:
        """Each axis of several ranks with its groups, the first few of many."""
        axes = {axis: rows for axis, rows in self.groups().items()
                if len(rows[0]) > 1 and axis not in ("world", "saved")}
        told = {axis: " ".join("(" + " ".join(map(str, row)) + ")" for row in rows[:4]) for axis, rows in axes.items()}
        return [f"{axis} {text}{f' and {len(axes[axis]) - 4} more' if len(axes[axis]) > 4 else ''}"
                for axis, text in told.items()]

    def members(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of an axis that a rank belongs to."""
        return next(group for group in self.groups()[axis] if rank in group)
