"""How many layers each stage of a pipeline has: as even as can be, as written, by Megatron's rule, or by cost. Pure.

By cost is: the shortest step on the clock of timeline.py; of those the one whose fullest rank keeps the fewest bytes of
activations; of those the one with fewer layers on early stages.
"""

import re
from collections.abc import Iterator
from functools import cache
from heapq import nsmallest
from itertools import combinations
from math import comb, inf

import numpy as np

from megazero.pipeline.schedule import passes
from megazero.pipeline.weighing import Loads, Weighing

# The clock plays 4 micro-batches for each rank, whatever a run has, for its stages must not move when its batch does:
# enough that the middle of a step counts for more than its ends, and that rounds follow each other in a loop.
MICRO_BATCHES = 4
SMALL = 10_000              # of up to so many splits all are weighed; of more, those one layer's move from the best
BATCH = 32                  # splits that are played at a time


# What speaks against a split, in this order: makespan, bytes on the fullest rank, layers of each stage.
Weighed = tuple[float, float, tuple[int, ...]]


def shares(layers: int, stages: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers of each stage: what `first` and `last` leave is shared as evenly as can be."""
    fixed = {0: first, stages - 1: last} if stages > 1 else {}
    free = [s for s in range(stages) if fixed.get(s) is None]
    rest = layers - sum(n for n in fixed.values() if n is not None)
    even = {s: rest * (i + 1) // len(free) - rest * i // len(free) for i, s in enumerate(free)}
    return tuple(even[s] if s in even else int(fixed[s] or 0) for s in range(stages))


def from_layout(text: str) -> tuple[int, ...]:
    """Layers of each stage of a layout in Megatron's words: E embedding, t layer, L loss, | between stages, *n repeats
    a letter or what is in brackets. Raises ValueError with what is wrong."""
    plain = re.sub(r"[\s,]", "", text)
    while plain != (once := re.sub(r"(\w)\*(\d+)|\(([^()]*)\)\*(\d+)",
                                   lambda m: (m[1] or m[3]) * int(m[2] or m[4]), plain)):
        plain = once
    stages = plain.split("|")
    if re.search(r"[^EtL|]", plain):
        raise ValueError("holds something else than E, t, L, |, * and brackets")
    if not (plain.startswith("E") and plain.endswith("L") and plain.count("E") == plain.count("L") == 1):
        raise ValueError("must begin with the one E and end with the one L")
    if not all(stages):
        raise ValueError("has a stage with nothing in it")
    return tuple(stage.count("t") for stage in stages)


def ends_as_layers(layers: int, stages: int, embedding: int, loss: int) -> tuple[int, ...]:
    """Megatron's rule: embedding and loss count as so many layers (0 or 1) of the first and the last stage, and every
    stage has as many. Raises ValueError with what is wrong."""
    each, over = divmod(layers + embedding + loss, stages)
    if over:
        counted = " and ".join([f"{layers} layers", *["the embedding"] * embedding, *["the loss"] * loss])
        raise ValueError(f"{counted} are {layers + embedding + loss} in all, which {stages} stages cannot share evenly")
    return tuple(each - embedding * (s == 0) - loss * (s == stages - 1) for s in range(stages))


@cache
def by_cost(layers: int, schedule: str, pp: int, virtual: int, loads: Loads, first: int | None = None,
            last: int | None = None) -> tuple[int, ...]:
    """Least makespan, then fewest bytes on the fullest rank, then fewer layers on early stages. The first and the last
    stage may have none. Raises ValueError if so many layers cannot be dealt.

    A makespan is the longest of many ways through the passes, each linear in the counts. So the longest way of a split
    that was played bounds all others from below, and only those that may still be better are played.
    """
    stages = pp * virtual
    ends = {0: first, stages - 1: last} if stages > 1 else {}
    least = np.array([ends.get(s, 1) or 0 for s in range(stages)])
    most = np.array([layers if (n := ends.get(s)) is None else n for s in range(stages)])
    rest, free = layers - least.sum(), np.flatnonzero(least < most)
    if rest < 0 or rest and not len(free):
        raise ValueError(f"{layers} layers cannot be dealt to {stages} stages, which need "
                         f"{'at least' if len(free) else 'just'} {least.sum()}")
    if not rest:
        return tuple(least.tolist())
    weighing = Weighing(passes(schedule, pp, MICRO_BATCHES * pp, virtual), stages, loads)
    every = _every(least, free, rest) if comb(rest + len(free) - 1, rest) <= SMALL else None
    splits = np.array([shares(layers, stages, first, last), *_dealt(least, most, rest, pp, loads)])
    splits = splits[((least <= splits) & (splits <= most)).all(1)]
    best: Weighed = (inf, inf, ())
    ways = np.zeros((0, stages + 1))
    while len(splits):
        spans, slopes = weighing.makespans(splits)
        best = min(best, *_weighed(spans, weighing.held(splits), splits))
        ways = np.unique(np.vstack([ways, np.column_stack([slopes, spans - (slopes * splits).sum(1)])]), axis=0)
        splits = _moves(np.array(best[2]), least, most) if every is None else every
        bounds = (splits @ ways[:, :-1].T + ways[:, -1]).max(1)
        splits, bounds = splits[bounds <= best[0]], bounds[bounds <= best[0]]
        better = (w for w in _weighed(bounds, weighing.held(splits), splits) if w < best)
        splits = np.array([counts for *_, counts in nsmallest(BATCH, better)])
    return best[2]


def _weighed(spans: np.ndarray, held: np.ndarray, splits: np.ndarray) -> Iterator[Weighed]:
    return zip(spans.tolist(), held.tolist(), map(tuple, splits.tolist()), strict=True)


def _dealt(least: np.ndarray, most: np.ndarray, rest: int, pp: int, loads: Loads) -> Iterator[np.ndarray]:
    """Splits to begin with: one layer after the other goes to the rank that has the least to do; of those that have
    equally little to the last, or to the first."""
    for towards in (-1, 1):
        counts = least.copy()
        for _ in range(rest):
            time = loads.time("F", counts) + loads.time("B", counts)
            counts[min(np.flatnonzero(counts < most),
                       key=lambda s: (time[s % pp::pp].sum(), time[s], towards * s))] += 1
        yield counts


def _every(least: np.ndarray, free: np.ndarray, rest: int) -> np.ndarray:
    """All ways to deal the rest to the free stages [n, s]."""
    places = rest + len(free) - 1
    bars = np.array([*combinations(range(places), len(free) - 1)], int)
    splits = np.tile(least, (len(bars), 1))
    splits[:, free] += np.diff(bars, prepend=-1, append=places) - 1
    return splits


def _moves(split: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """All that move one layer from a stage to another [n, s]."""
    one = np.eye(len(split), dtype=int)
    return (split - one[split > least][:, None] + one[split < most]).reshape(-1, len(split))
