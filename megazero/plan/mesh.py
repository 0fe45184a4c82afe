"""Which ranks form which group: one reshape of 0 .. world - 1, so that nobody computes strides. Pure.

Ranks are numbered along a table of axes, pp outermost, tp innermost: tensor-parallel neighbours, which talk most, are
neighbours on a node. Another axis is another row of the table.
"""

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

Tied = tuple[tuple[str, tuple[int, ...]], ...]


class Coordinates(dict[str, tuple[int, int]]):
    """Where a rank stands on each axis, and on dp, which is two of them: (its number there, how many there are).
    `place.tp` is the number alone."""

    def __getattr__(self, axis: str) -> int:
        if axis not in self:
            raise AttributeError(f"there is no axis {axis}")
        return self[axis][0]


def all_reduce_bytes(elements: int, width: int, ranks: int) -> int:
    """Bytes that one rank sends in an all-reduce: two passes over the padded whole, less its own part."""
    return 2 * (ranks - 1) * ceil(elements / ranks) * width


@dataclass(frozen=True)
class Mesh:
    """
    axes     (name, size), the outermost first: pp, then replicate, shard, tp and whatever else there is
    kv       how many neighbouring tensor-parallel ranks hold the same key-value heads (1: none do)
    looped   the last stage of a pipeline sends to the first (each rank has several stages)
    tied     kinds of groups whose ranks, at these places of a pipeline, hold a unit together
    stage    all ranks at one place of a pipeline are a group too
    """

    axes: tuple[tuple[str, int], ...]
    kv: int = 1
    looped: bool = False
    tied: Tied = ()
    stage: bool = False

    @classmethod
    def of(cls, *, pp: int = 1, dp: int = 1, tp: int = 1, shard: int = 1, kv: int = 1, looped: bool = False,
           tied: Tied = (), stage: bool = False) -> "Mesh":
        """Of dp data-parallel ranks, `shard` neighbours share one copy of the ZeRO state; dp / shard replicate it."""
        return cls((("pp", pp), ("replicate", dp // shard), ("shard", shard), ("tp", tp)), kv, looped, tied, stage)

    def size(self, *axes: str) -> int:
        """Ranks that differ on these axes alone."""
        return prod(n for axis, n in self.axes if axis in axes)

    @property
    def dp(self) -> int:
        return self.size("replicate", "shard")

    @property
    def world(self) -> int:
        return prod(n for _, n in self.axes)

    @property
    def _ranks(self) -> np.ndarray:
        return np.arange(self.world).reshape([n for _, n in self.axes])

    def place(self, rank: int) -> Coordinates:
        at = np.unravel_index(rank, self._ranks.shape)
        place = Coordinates({axis: (int(i), n) for (axis, n), i in zip(self.axes, at, strict=True)})
        return Coordinates(place | {"dp": (place.replicate * self.size("shard") + place.shard, self.dp)})

    def varying(self, *axes: str) -> list[tuple[int, ...]]:
        """The groups of ranks that differ on these axes alone. Those of one stage and one tensor-parallel place lie
        side by side."""
        names = [axis for axis, _ in self.axes]
        same = sorted((axis for axis in names if axis not in axes), key=lambda axis: axis not in ("pp", "tp"))
        order = [*same, *(axis for axis in names if axis in axes)]
        return _groups(self._ranks.transpose([names.index(axis) for axis in order]).reshape(-1, self.size(*axes)))

    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """Every group of every kind, in the order in which they are made. Stages have channels instead."""
        stages, everyone = self._ranks.reshape(self.size("pp"), -1), [tuple(range(self.world))]
        return {
            "tp": self.varying("tp"),
            "kv": [row[i:i + self.kv] for row in self.varying("tp") for i in range(0, len(row), self.kv)],
            **{axis: self.varying(axis) for axis, _ in reversed(self.axes) if axis not in ("tp", "pp")},
            **{kind: _groups(stages[list(places)].T) for kind, places in self.tied},
            **({"stage": self.varying(*(axis for axis, _ in self.axes if axis != "pp"))} if self.stage else {}),
            "world": everyone,
            # the same ranks once more: checkpoints are written beside training
            "saved": everyone,
        }

    def channels(self) -> list[tuple[int, int]]:
        """(sender, receiver) of each neighbour pair of each pipeline, downstream; gradients take the same ways back."""
        pp = self.size("pp")
        ranks = self._ranks.reshape(pp, -1)
        hops = 0 if pp == 1 else pp - (not self.looped)
        return [(int(a), int(b)) for i in range(hops) for a, b in zip(ranks[i], ranks[(i + 1) % pp], strict=True)]

    def describe(self) -> list[str]:
        """Each kind of groups of several ranks, the first few of many."""
        kinds = {kind: rows for kind, rows in self.groups().items()
                 if len(rows[0]) > 1 and kind not in ("world", "saved")}
        told = {kind: " ".join("(" + " ".join(map(str, row)) + ")" for row in rows[:4]) for kind, rows in kinds.items()}
        return [f"{kind} {text}{f' and {len(kinds[kind]) - 4} more' if len(kinds[kind]) > 4 else ''}"
                for kind, text in told.items()]


def _groups(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows.tolist()]
