"""An order of passes played on a clock: when each rank runs what, what it holds,
where it stands for ever; and drawn."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from string import ascii_lowercase
from typing import NamedTuple

from megazero.pipeline.schedule import KINDS, Costs, Order, Pass, needs

HUES = {"F": 210, "B": 130, "I": 165, "W": 75}           # of the picture


class Played(NamedTuple):
    """A pass and when it runs."""

    step: Pass
    start: float
    end: float


class Wait(NamedTuple):
    """Where a rank stands for ever: before pass `at`, for the output of `on`;
    or behind it, to `send` its output to the rank of `on`."""

    rank: int
    at: Pass
    on: Pass
    of: int                             # the rank that runs `on`
    send: bool

    def __str__(self) -> str:
        if self.send:
            return (f"rank {self.rank} stands behind {self.at}, "
                    f"until rank {self.of} comes to {self.on} and takes its output")
        return f"rank {self.rank} stands before {self.at}, which needs {self.on} of rank {self.of}"


@dataclass(frozen=True)
class Timeline:
    """When each rank runs what. In a deadlock `waiting` says where ranks stand, and `ranks` how they came there."""

    ranks: tuple[tuple[Played, ...], ...]
    waiting: tuple[Wait, ...] = ()

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


@dataclass(frozen=True)
class _Graph:
    """What of an order is looked up more than once."""

    order: Order

    @cached_property
    def place(self) -> dict[Pass, tuple[int, int]]:
        """(rank, position in its line) of each pass."""
        return {p: (rank, position) for rank, line in enumerate(self.order) for position, p in enumerate(line)}

    @cached_property
    def needs(self) -> dict[Pass, list[Pass]]:
        stages = 1 + max(p.stage for p in self.place)
        return {p: needs(p, stages) for p in self.place}

    def messages(self) -> Iterator[tuple[Pass, Pass]]:
        """(output, the pass that takes it) for all that goes from rank to rank,
        in the order in which each rank takes them."""
        return ((n, p) for p, before in self.needs.items() for n in before if self.place[n][0] != self.place[p][0])


class _Play:
    """The state of a simulation: when each pass ended, and when each rank came to each of its passes."""

    def __init__(self, graph: _Graph, costs: Costs, ahead: int | None) -> None:
        self.order, self.place, self.needs, self.costs = graph.order, graph.place, graph.needs, costs
        # the (rank, position) that must be reached before a rank may leave a pass
        self.posts = {} if ahead is None else {
            output: (self.place[taker][0], max(0, self.place[taker][1] - ahead)) for output, taker in graph.messages()}
        self.spans: list[list[Played]] = [[] for _ in self.order]
        self.end: dict[Pass, float] = {}
        self.came = [[0.0] for _ in self.order]

    def obstacle(self, rank: int) -> Wait | None:
        """What keeps a rank from its next move, if anything."""
        at = len(self.came[rank]) - 1
        if at == len(self.order[rank]):
            return None
        p = self.order[rank][at]
        if p not in self.end:
            return next((Wait(rank, p, n, self.place[n][0], send=False)
                         for n in self.needs[p] if n not in self.end), None)
        taker, position = self.posts.get(p, (rank, 0))
        return (None if len(self.came[taker]) > position
                else Wait(rank, p, self.order[taker][position], taker, send=True))

    def advance(self, rank: int) -> bool:
        """Moves a rank as far as it can go. Did it move?"""
        moved = False
        while len(self.came[rank]) <= len(self.order[rank]) and not self.obstacle(rank):
            moved = True
            p = self.order[rank][len(self.came[rank]) - 1]
            if p not in self.end:
                self._run(p, rank)
            else:
                taker, position = self.posts.get(p, (rank, 0))
                self.came[rank].append(max(self.end[p], self.came[taker][position]))
        return moved

    def _run(self, p: Pass, rank: int) -> None:
        arrivals = [self.end[n] + (self.costs.communication if self.place[n][0] != rank else 0) for n in self.needs[p]]
        start = max(self.came[rank][-1], *arrivals, 0.0)
        self.end[p] = start + self.costs.of(p)
        self.spans[rank].append(Played(p, start, self.end[p]))


def simulate(order: Order, costs: Costs, ahead: int | None = None) -> Timeline:
    """Plays an order in which nothing is missing: each pass starts as soon as its rank is free and what it needs is
    there. `costs` are those of one stage, and positive.

    Sends never block, unless `ahead` says that they do (rendezvous): a rank then stands behind a pass
    until the receiver of its output posts its receive, which it does when it comes to the pass
    `ahead` passes before the one that needs it.
    """
    return _simulate(_Graph(order), costs, ahead)


def _simulate(graph: _Graph, costs: Costs, ahead: int | None) -> Timeline:
    play, ranks = _Play(graph, costs, ahead), range(len(graph.order))
    while sum(play.advance(rank) for rank in ranks):          # all of them, then again until none moves
        pass
    return Timeline(tuple(map(tuple, play.spans)), tuple(w for w in map(play.obstacle, ranks) if w))


def mistakes_of(order: Order, limit: Sequence[int], ahead: int | None = None) -> list[str]:
    """What is wrong with an order, a sentence each. Right is: every pass of every stage and micro-batch runs exactly
    once, a backward on the rank of its forward; no rank holds more than its `limit` of activations; between two ranks
    outputs of one kind are taken in the order they are sent, as wires without tags need it; and no rank waits for ever
    (`ahead` as in `simulate`)."""
    graph = _Graph(order)
    if wrong := list(_miscounted(graph)):
        return wrong                                       # the rest would only say it again
    holds = [(rank, _peak(line), most) for rank, (line, most) in enumerate(zip(order, limit, strict=True))]
    wrong = [f"rank {rank} holds {peak} activations, more than {most}" for rank, peak, most in holds if peak > most]
    wrong += _crossed(graph)
    timeline = _simulate(graph, Costs(), ahead)
    if timeline.waiting:
        wrong.append("\n".join(["no rank can move:", *map(str, timeline.waiting), draw(timeline)]))
    return wrong


def _miscounted(graph: _Graph) -> Iterator[str]:
    count, place = Counter(p for line in graph.order for p in line), graph.place
    stages, micros = 1 + max(p.stage for p in count), 1 + max(p.micro for p in count)
    split = any(p.kind in "IW" for p in count)
    for p in map(Pass._make, product("FIW" if split else "FB", range(stages), range(micros))):
        after = KINDS[p.kind].after
        if count[p] != 1:
            yield f"{p} runs {count[p]} times"
        elif after and count[own := p._replace(kind=after)] and place[own][0] != place[p][0]:
            yield f"{p} runs on rank {place[p][0]}, but {own} on rank {place[own][0]}"


def _crossed(graph: _Graph) -> Iterator[str]:
    # by (from, to, kind): the position of the last output that was taken
    newest: dict[tuple[int, int, str], int] = {}
    for output, taker in graph.messages():
        (source, at), (target, _) = graph.place[output], graph.place[taker]
        if at < newest.get((source, target, output.kind), at):
            yield f"rank {target} takes {output} behind a later output of rank {source}"
        newest[source, target, output.kind] = at


def _peak(line: Iterable[Pass]) -> int:
    now = peak = 0
    for p in line:
        now += (KINDS[p.kind].leaves == "activations") - (KINDS[p.kind].after == "F")
        peak = max(peak, now)
    return peak


def draw(timeline: Timeline, marked: Collection[Pass] = ()) -> str:
    """A row for each rank: `a3` is the forward of micro-batch 3 through the first stage of a rank, `B3` the backward
    through its second (after z comes a again), or the half of it that the stage before waits for, and `w3` the other;
    dots are idle time. A `?` follows `marked` passes, and those at which ranks wait for ever."""
    pp, marked = len(timeline.ranks), {*marked, *(w.at for w in timeline.waiting)}
    scale = ((1 + max((len(_label(s.step, pp)) for line in timeline.ranks for s in line), default=0))
             / _shortest(timeline))
    rows = []
    for rank, line in enumerate(timeline.ranks):
        row = ""
        for step, start, end in line:
            row = row.ljust(round(start * scale), ".")
            row = (row + _label(step, pp) + "?" * (step in marked)).ljust(round(end * scale))
        row += "".join(_label(w.at, pp) + "?" for w in timeline.waiting if w.rank == rank and not w.send)
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
