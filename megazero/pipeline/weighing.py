"""What splits of a model's layers weigh, many at once: the time of a step on the clock of timeline.py, and the bytes of
the fullest rank. Pure. Counts are layers of each stage [n, s] of n splits."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megazero.pipeline.schedule import KINDS, Order, Pass, needs

# By kind of pass, how often it does: the forward of a layer, what a layer repeats, the forward of the embedding (whose
# backward adds as many rows), and of the head (which runs both ways at once in the backward pass).
TIMES = {"F": (1, 0, 1, 0), "B": (2, 1, 1, 3), "I": (1, 1, 0, 3), "W": (1, 0, 1, 0)}


class Load(NamedTuple):
    """What a layer, the embedding or the head costs: FLOPs of its forward per token, and bytes that stay behind F for
    the backward, and behind I for W. Whole numbers, so that ties are exact."""

    forward: int
    activations: int = 0
    operands: int = 0


class Loads(NamedTuple):
    """What the parts of a model cost, and how many FLOPs of its forward a layer's backward repeats (`again`)."""

    layer: Load
    embedding: Load
    head: Load
    again: int = 0

    def time(self, kind: str, counts: np.ndarray) -> np.ndarray:
        """FLOPs per token of a pass through each stage [n, s]."""
        layer, again, embedding, head = TIMES[kind]
        return _of_stages(counts, layer * self.layer.forward + again * self.again, embedding * self.embedding.forward,
                          head * self.head.forward)


def _of_stages(counts: np.ndarray, layer: int, embedding: int, head: int) -> np.ndarray:
    out = counts * float(layer)
    out[..., 0] += embedding
    out[..., -1] += head
    return out


class Weighing:
    """An order as a table. Of each pass: the one before it on its rank, the one whose output it takes, its (kind,
    stage); in waves of those that can run side by side, behind the start in row 0. Of each rank: its stages, and
    whenever it holds most, how many activations and how many operands of each."""

    def __init__(self, order: Order, stages: int, loads: Loads) -> None:
        self.loads, self.kinds = loads, sorted({p.kind for line in order for p in line})
        # the last of what a pass needs; the rest ran before it on its rank
        takes = {p: next(reversed(needs(p, stages)), None) for line in order for p in line}
        number: dict[Pass | None, int] = {None: 0}
        lines, last = [[*reversed(line)] for line in order], [0] * len(order)
        table, self.waves = [(0, 0, len(self.kinds) * stages)], []
        while ready := [rank for rank, line in enumerate(lines) if line and takes[line[-1]] in number]:
            for rank in ready:
                p = lines[rank].pop()
                table.append((last[rank], number[takes[p]], self.kinds.index(p.kind) * stages + p.stage))
                last[rank] = number[p] = len(number)
            self.waves.append(slice(len(table) - len(ready), len(table)))
        self.before, self.takes, self.what = np.array(table).T
        self.last = np.array(last)
        self.peaks = []
        for line in order:
            own, rows = sorted({p.stage for p in line}), set()
            held = {(left, s): 0 for left in ("activations", "operands", "") for s in own}
            for p, then in pairwise(line):
                kind = KINDS[p.kind]
                held[kind.leaves, p.stage] += 1
                held[KINDS[kind.after].leaves if kind.after else "", p.stage] -= 1
                if kind.leaves and KINDS[then.kind].after:
                    rows.add(tuple(held.values())[:2 * len(own)])
            self.peaks.append((own, np.array(sorted(rows), float)))

    def makespans(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Makespans [n], and what one layer more in each stage adds to the longest way through the passes [n, s]."""
        time = np.stack([self.loads.time(kind, counts) for kind in self.kinds], 1)
        layer = np.stack([self.loads.time(kind, counts + 1) for kind in self.kinds], 1) - time
        time = np.hstack([time.reshape(len(counts), -1), np.zeros((len(counts), 1))]).T
        end = np.zeros((len(self.what), len(counts)))
        for wave in self.waves:
            end[wave] = np.maximum(end[self.before[wave]], end[self.takes[wave]]) + time[self.what[wave]]
        at, each, ways = self.last[end[self.last].argmax(0)], np.arange(len(counts)), np.zeros((len(counts), len(time)))
        while at.any():
            ways[each, self.what[at]] += 1
            before, takes = self.before[at], self.takes[at]
            at = np.where(end[before, each] >= end[takes, each], before, takes)
        return end[self.last].max(0), (ways[:, :-1].reshape(layer.shape) * layer).sum(1)

    def held(self, counts: np.ndarray) -> np.ndarray:
        """Bytes of activations and operands on the fullest rank [n]."""
        each = [_of_stages(counts, *(getattr(load, left) for load in self.loads[:3]))
                for left in ("activations", "operands")]
        return np.max([(np.hstack([e[:, own] for e in each]) @ rows.T).max(1) for own, rows in self.peaks], axis=0)
