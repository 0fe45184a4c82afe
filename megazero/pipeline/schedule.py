"""Pipeline schedules as data: which rank runs which pass, and in which order.

    F2,0    forward of stage 2 for micro-batch 0            B2,0    its backward
    I2,0    the half of the backward that the stage before waits for: gradients of inputs
    W2,0    the other half: gradients of weights

Stages are numbered through the model and lie on the ranks in a loop: rank r of pp holds stages r, r + pp, r + 2 pp, ...
Micro-batches go through the pipeline in rounds; within a round a rank takes all of them through one of its stages
before it takes the next stage, deepest last for forwards, deepest first for backwards. That gives each rank a line of
forwards and a line of backwards. One rule merges the two: run a forward if there is room for what it leaves behind,
else a backward; where backward is split, the W of an I follows it after `delay` more of them. A schedule is a row that
says how many rounds there are, how much room, and how long W waits.

No clock decides an order; timeline.py plays it on one.

Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019), interleaved (Narayanan et al. 2021),
breadth-first (Lamy-Poirier 2023), ZB-H1 (Qi et al. 2023, section 2.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """What a pass does.

    `way`       F or B: it takes what comes from the stage before (behind) it, and hands on; none: it talks to nobody
    `after`     the kind that must have run on the same stage and micro-batch
    `leaves`    what it leaves behind, for the kind that comes after it
    `reads`     which units' weights of a part it reads: those of its forward or of its backward pass
    `writes`    does it add to gradients of weights?
    """

    way: str = ""
    after: str = ""
    leaves: str = ""
    reads: str = ""
    writes: bool = False


KINDS = {
    "F": Kind(way="F", leaves="activations", reads="forward"),
    "B": Kind(way="B", after="F", reads="backward", writes=True),
    "I": Kind(way="B", after="F", leaves="operands", reads="backward"),         # x and dy of each product for a weight
    "W": Kind(after="I", writes=True),
    "L": Kind(way="B", reads="backward", writes=True),                          # head and loss, both ways at once
    "E": Kind(way="F", reads="forward"),                                        # evaluation: F that leaves nothing
}


class Pass(NamedTuple):
    """One micro-batch through one stage: kind F (forward), B (backward), or its halves I and W."""

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage},{self.micro}"


Order = Sequence[Sequence[Pass]]            # by rank, in the order it runs them


class Costs(NamedTuple):
    """Times, in any one unit: of a forward and a backward through one stage, and of a message to another rank;
    `split` is the part of the backward that W does."""

    forward: float = 1.0
    backward: float = 2.0
    communication: float = 0.0
    split: float = 0.5

    @property
    def weight(self) -> float:
        """Time of W."""
        return self.backward * self.split

    def of(self, p: Pass) -> float:
        return {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}[p.kind]

    def shared(self, virtual: int) -> "Costs":
        """The costs of one of the `virtual` stages that share a rank's layers. A message is as long as before."""
        return self._replace(forward=self.forward / virtual, backward=self.backward / virtual)


@dataclass(frozen=True)
class Schedule:
    """A row of the table.

    `looped`    a rank may hold several stages
    `rounds`    (pp, micro-batches) -> rounds; the micro-batches are shared among them evenly
    `room`      (rank, pp, virtual, micro-batches of the largest round)
                -> forwards that may wait for their backward at one time
    `bubble`    (pp, micro-batches, virtual, costs of one stage) -> how long each rank idles in a step when messages
                take no time
    `delay`     rank -> how many I run between an I and its W; None: backward is not split
    """

    looped: bool
    rounds: Callable[[int, int], int]
    room: Callable[[int, int, int, int], int]
    bubble: Callable[[int, int, int, Costs], float]
    delay: Callable[[int], int] | None = None


def _one_round(pp: int, micro_batches: int) -> int:
    return 1


def _full_rounds(pp: int, micro_batches: int) -> int:
    """Each of at least pp micro-batches, so that the first is back for the next stage
    when the last has left this one."""
    return max(1, micro_batches // pp)


def _room_for_all(rank: int, pp: int, virtual: int, size: int) -> int:
    return virtual * size


def _room_until_return(rank: int, pp: int, virtual: int, size: int) -> int:
    """What a rank must have started when its first backward comes back: the round through all its stages but the last,
    then one pass, and one for each hop to the last rank. In a loop two for each hop: one would do if messages took no
    time, the second hides them."""
    return (virtual - 1) * size + min(virtual, 2) * (pp - 1 - rank) + 1


def _bubble(pp: int, micro_batches: int, virtual: int, costs: Costs) -> float:
    """(pp - 1)(F + B). With fewer micro-batches than ranks each loop but the first also waits for the first micro-batch
    to come round."""
    return (pp - 1 + (virtual - 1) * max(0, pp - micro_batches)) * (costs.forward + costs.backward)


def _bubble_with_w(pp: int, micro_batches: int, virtual: int, costs: Costs) -> float:
    """(pp - 1)(F + I - W): a W fills each wait for the way to the last rank and back, if there is one, and as far as it
    fits."""
    filled = min(pp, micro_batches) - 1
    fits = min(costs.forward, costs.backward - costs.weight, costs.weight)
    return (pp - 1) * (costs.forward + costs.backward - costs.weight) - filled * fits


def _as_rank(rank: int) -> int:
    """The last rank puts off the most W and holds the fewest activations: no rank holds more than 1F1B's first."""
    return rank


SCHEDULES = {
    "gpipe": Schedule(looped=False, rounds=_one_round, room=_room_for_all, bubble=_bubble),
    "breadth-first": Schedule(looped=True, rounds=_one_round, room=_room_for_all, bubble=_bubble),
    "1f1b": Schedule(looped=False, rounds=_full_rounds, room=_room_until_return, bubble=_bubble),
    "interleaved": Schedule(looped=True, rounds=_full_rounds, room=_room_until_return, bubble=_bubble),
    "zb-h1": Schedule(looped=False, rounds=_full_rounds, room=_room_until_return, bubble=_bubble_with_w,
                      delay=_as_rank),
}


def needs(p: Pass, stages: int) -> list[Pass]:
    """The passes that must have ended before this one can start, of `stages` stages in all."""
    kind = KINDS[p.kind]
    own = [p._replace(kind=kind.after)] if kind.after else []
    neighbour = p.stage + {"F": -1, "B": 1, "": stages}[kind.way]
    return [*own, p._replace(stage=neighbour)] if 0 <= neighbour < stages else own


def passes(schedule: str, pp: int, micro_batches: int, virtual: int) -> tuple[tuple[Pass, ...], ...]:
    """What each of pp ranks runs, in order, with `virtual` stages on each rank. Any number of micro-batches."""
    row = SCHEDULES[schedule]
    assert row.looped or virtual == 1, f"{schedule} has one stage on each rank, not {virtual}"
    rounds, ranks = _rounds(row, pp, micro_batches), []
    for rank in range(pp):
        forwards, backwards = _lines(range(rank, pp * virtual, pp), rounds)
        line = _merged(forwards, backwards, _room(row, rank, pp, virtual, rounds))
        ranks.append(line if row.delay is None else _split(line, row.delay(rank)))
    return tuple(ranks)


def most_held(schedule: str, pp: int, micro_batches: int, virtual: int) -> tuple[int, ...]:
    """By rank, the most activations it holds at one time, each of one micro-batch in one stage."""
    row = SCHEDULES[schedule]
    rounds = _rounds(row, pp, micro_batches)
    return tuple(min(_room(row, rank, pp, virtual, rounds), virtual * micro_batches) for rank in range(pp))


def _rounds(row: Schedule, pp: int, micro_batches: int) -> list[range]:
    count = row.rounds(pp, micro_batches)
    return [range(micro_batches * i // count, micro_batches * (i + 1) // count) for i in range(count)]


def _room(row: Schedule, rank: int, pp: int, virtual: int, rounds: Sequence[range]) -> int:
    return row.room(rank, pp, virtual, max(map(len, rounds)))


def _lines(stages: Sequence[int], rounds: Sequence[range]) -> tuple[list[Pass], list[Pass]]:
    """All forwards of a rank, and all its backwards, each in order."""
    return ([Pass("F", s, m) for micros in rounds for s in stages for m in micros],
            [Pass("B", s, m) for micros in rounds for s in reversed(stages) for m in micros])


def _merged(forwards: list[Pass], backwards: list[Pass], room: int) -> tuple[Pass, ...]:
    """A forward if fewer than `room` wait for their backward, else a backward."""
    pairs = ([*forwards[i + room - 1:i + room], backward] for i, backward in enumerate(backwards))
    return tuple(chain(forwards[:room - 1], *pairs))


def _split(line: Sequence[Pass], delay: int) -> tuple[Pass, ...]:
    """Each backward in its halves, I where it was and W after `delay` more of them; what is left of W at the end."""
    out, waiting = [], []
    for p in line:
        out.append(p._replace(kind="I") if p.kind == "B" else p)
        waiting += [p._replace(kind="W")] if p.kind == "B" else []
        if len(waiting) > delay:
            out.append(waiting.pop(0))
    return (*out, *waiting)
