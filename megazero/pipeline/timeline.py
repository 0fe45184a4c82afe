"""An order of passes played on a clock: when each rank runs what, and what it holds; and drawn."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

from megazero.pipeline.schedule import KINDS, Costs, Order, Pass, needs

HUES = {"F": 210, "B": 130, "I": 165, "W": 75}           # of the picture


class Played(NamedTuple):
    """A pass and when it runs."""

    step: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank runs what."""

    ranks: tuple[tuple[Played, ...], ...]

    @cached_property
    def makespan(self) -> float:
        return max((line[-1].end for line in self.ranks if line), default=0.0)

    @property
    def idle(self) -> tuple[float, ...]:
        """Time without a pass, by rank."""
        return tuple(self.makespan - sum(s.end - s.start for s in line) for line in self.ranks)

    @property
    def bubble_rate(self) -> float:
        """Idle time over all time."""
        return sum(self.idle) / (self.makespan * len(self.ranks))

    @property
    def held(self) -> tuple[int, ...]:
        """By rank, the most activations it holds at one time, each of one micro-batch in one stage."""
        return tuple(_peak(s.step for s in line) for line in self.ranks)


def simulate(order: Order, costs: Costs) -> Timeline:
    """Plays an order: each pass starts as soon as its rank is free and what it needs is there. `costs` are those of one
    stage, and positive. Sends do not block. Raises ValueError for an order in which ranks wait for ever."""
    home = {p: rank for rank, line in enumerate(order) for p in line}
    stages, end = 1 + max(p.stage for p in home), dict[Pass, float]()
    played: list[list[Played]] = [[] for _ in order]
    while len(end) < len(home):
        before = len(end)
        for rank, line in enumerate(order):
            for p in line[len(played[rank]):]:
                came = [(end.get(n), costs.communication * (home.get(n) != rank)) for n in needs(p, stages)]
                if any(at is None for at, _ in came):
                    break
                free = played[rank][-1].end if played[rank] else 0.0
                start = max([free, *(at + way for at, way in came if at is not None)])
                end[p] = start + costs.of(p)
                played[rank].append(Played(p, start, end[p]))
        if len(end) == before:
            stuck = [line[len(done)] for line, done in zip(order, played, strict=True) if len(done) < len(line)]
            raise ValueError(f"ranks wait for ever before {', '.join(map(str, stuck))}")
    return Timeline(tuple(map(tuple, played)))


def _peak(line: Iterable[Pass]) -> int:
    now = peak = 0
    for p in line:
        now += (KINDS[p.kind].leaves == "activations") - (KINDS[p.kind].after == "F")
        peak = max(peak, now)
    return peak


def draw(timeline: Timeline) -> str:
    """A row for each rank: `a3` is the forward of micro-batch 3 through the first stage of a rank, `B3` the backward
    through its second (after z comes a again), or the half of it that the stage before waits for, and `w3` the other;
    dots are idle time."""
    pp, rows = len(timeline.ranks), []
    scale = ((1 + max((len(_label(s.step, pp)) for line in timeline.ranks for s in line), default=0))
             / _shortest(timeline))
    for rank, line in enumerate(timeline.ranks):
        row = ""
        for step, start, end in line:
            row = row.ljust(round(start * scale), ".")
            row = (row + _label(step, pp)).ljust(round(end * scale))
        rows.append(f"rank {rank:<3}{row.ljust(round(timeline.makespan * scale), '.')}".rstrip())
    return "\n".join(rows)


def _label(p: Pass, pp: int) -> str:
    letter = ascii_lowercase[p.stage // pp % 26]
    return {"F": letter, "B": letter.upper(), "": "w"}[KINDS[p.kind].way] + str(p.micro)


def _shortest(timeline: Timeline) -> float:
    return min((s.end - s.start for line in timeline.ranks for s in line), default=1.0)


def svg(timeline: Timeline) -> str:
    """The same as a picture: forwards blue, backwards green (halves bluer and yellower), darker the later a rank's
    stage; numbers are micro-batches."""
    pp, scale = len(timeline.ranks), 24 / _shortest(timeline)
    virtual = (1 + max(s.step.stage for line in timeline.ranks for s in line)) / pp
    width, out = 60 + round(timeline.makespan * scale), []
    for rank, line in enumerate(timeline.ranks):
        y = 4 + 26 * rank
        out.append(f'<text x="30" y="{y + 16}">rank {rank}</text>')
        for step, start, end in line:
            x, w = 56 + start * scale, (end - start) * scale
            fill = f"hsl({HUES[step.kind]}, 60%, {82 - 40 * (step.stage // pp) / virtual:.0f}%)"
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="24" fill="{fill}" stroke="white">'
                       f'<title>{step}</title></rect><text x="{x + w / 2:.1f}" y="{y + 16}">{step.micro}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{8 + 26 * pp}" '
            'font-family="sans-serif" font-size="11" text-anchor="middle">\n' + "\n".join(out) + "\n</svg>\n")
