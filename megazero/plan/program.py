"""A step as data: one list of actions, which can be printed, verified, costed and run (executor.py).

    F part,m      forward of a part for micro-batch m           B part,m    its backward
    L part,m      head and loss, forward and backward at once   E part,m    head and loss without gradients
    expect Fs,m   room is made for what comes into stage s for micro-batch m;
                  Bs,m: for the gradient of what goes out of it
    recv Fs,m     it is there
    send Fs,m     what goes out of stage s (B: back out of it) leaves
    gather U      the slices of unit U's weights begin to travel to every rank that needs the whole
    release U     the whole of them is not needed for now
    open U        a sum of gradients of unit U begins
    reduce U,k    it is complete for the k-th time in this step: its sum over the ranks of `shard` begins to travel
    land U,k      that sum has arrived, and joins the others of this step
    replicate U   the step's sum of this rank's slice begins to travel over the ranks of `replicate`;
                  settle U: it has arrived
    tie U         the sums of the two stages that hold a tied unit are added

A part is a number: 0 is the embedding, 1 .. n the blocks, n + 1 the head. Passes come from a schedule (pipeline.py);
what ZeRO and the neighbours need is woven in by pure functions that look only at which part reads and writes which
unit, so every schedule has every level.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megazero.pipeline import Pass


class Action(NamedTuple):
    kind: str
    part: int = -1                      # of expect, recv and send: the stage
    micro: int = -1
    unit: str = ""
    way: str = ""                       # of expect, recv and send: F or B

    def __str__(self) -> str:
        what = f" {self.unit}" if self.unit else f" {self.way}{self.part}" if self.way else str(self.part)
        return f"{self.kind}{what}{'' if self.micro < 0 else f',{self.micro}'}"


class Part(NamedTuple):
    """The units that a part reads going forward, and going backward; its gradients are those of the first."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


@dataclass(frozen=True)
class Zero:
    """What the data-parallel ranks share (Rajbhandari et al. 2020), and when it travels.

    level           1 optimizer state, 2 and gradients, 3 and weights
    keep            level 3: passes over its stage for which a unit's weights stay once gathered
    every           levels 2 and 3: micro-batches whose gradients are summed before they travel
    prefetch        weights are gathered one part ahead of their use
    lag             reductions that may be under way when the next one starts
    replicas        sums over `replicate` that may be under way when the next one starts: the second half of an
                    all-reduce travels when the first is waited for, so waiting for all of them at the end would leave
                    those halves without company
    """

    level: int = 0
    keep: int = 1
    every: int = 1
    prefetch: bool = True
    lag: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class Stages:
    """Which parts each of this rank's stages has (`own`), how many stages there are (`count`) and how many parts;
    do messages travel between them (`apart`), or are they all on one rank?
    `tied` are units that another rank holds too."""

    own: Mapping[int, range]
    count: int
    parts: Sequence[Part]
    apart: bool = False
    tied: tuple[str, ...] = ()


class Use(NamedTuple):
    """A computation or a message, and the units whose weights it reads and whose gradients it adds to, in a pass over
    its stage (its `turn`)."""

    action: Action
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    stage: int = 0
    turn: int = 0


class Span(NamedTuple):
    """From one use to another, both included."""

    unit: str
    first: int
    last: int


def training(passes: Sequence[Pass], stages: Stages, zero: Zero) -> list[Action]:
    """One training step of one rank, whose passes these are."""
    turns: Counter[int] = Counter()
    uses: list[Use] = []
    for i, p in enumerate(passes):
        coming = passes[:2] if i == 0 else passes[i + 1:i + 2]                          # a pass ahead
        uses += [Use(m._replace(kind="expect")) for q in coming for m in arrival(q, stages)]
        uses += [*map(Use, arrival(p, stages)), *computation(p, stages, turns[p.stage]),
                 *map(Use, departure(p, stages))]
        turns[p.stage] += 1
    return woven(uses, weights(uses, zero), gradients(uses, zero), zero) + [Action("tie", unit=u) for u in stages.tied]


def evaluation(stages: Stages, zero: Zero) -> list[Action]:
    """Forward of one micro-batch through the stages of one rank, and its loss."""
    uses: list[Use] = []
    for stage, own in stages.own.items():
        p = Pass("F", stage, 0)
        uses += [*(Use(m._replace(kind="expect")) for m in arrival(p, stages)), *map(Use, arrival(p, stages))]
        uses += [Use(Action("E" if i == len(stages.parts) - 1 else "F", i, 0), stages.parts[i].forward, (), stage)
                 for i in own]
        uses += map(Use, departure(p, stages))
    return woven(uses, weights(uses, zero), [], zero)


def computation(p: Pass, stages: Stages, turn: int) -> list[Use]:
    """A pass part by part. The head's forward waits for its backward: together they need the logits once."""
    parts, own, head = stages.parts, stages.own[p.stage], len(stages.parts) - 1
    if p.kind == "F":
        return [Use(Action("F", i, p.micro), parts[i].forward, (), p.stage, turn) for i in own if i != head]
    return [Use(Action("L" if i == head else "B", i, p.micro), parts[i].backward, parts[i].forward, p.stage, turn)
            for i in reversed(own)]


def arrival(p: Pass, stages: Stages) -> list[Action]:
    """The message that a pass needs from another rank, if any."""
    outermost = 0 if p.kind == "F" else stages.count - 1
    return [Action("recv", p.stage, p.micro, way=p.kind)] if stages.apart and p.stage != outermost else []


def departure(p: Pass, stages: Stages) -> list[Action]:
    """The message that another rank needs from a pass, if any."""
    outermost = stages.count - 1 if p.kind == "F" else 0
    return [Action("send", p.stage, p.micro, way=p.kind)] if stages.apart and p.stage != outermost else []


def weights(uses: Sequence[Use], zero: Zero) -> list[Span]:
    """For how long each unit's weights are whole: from their gathering to their release."""
    before, last = {}, 0                                        # of each use, the computation before it
    for i, use in enumerate(uses):
        before[i] = last if zero.prefetch else i
        last = last if use.action.way else i
    spans = []
    for unit, at in _where(uses, lambda use: use.reads).items():
        groups = _grouped([(i, (uses[i].stage, uses[i].turn // zero.keep) if zero.level == 3 else None) for i in at])
        spans += _merged([Span(unit, before[first], last) for first, last in groups])
    return spans


def gradients(uses: Sequence[Use], zero: Zero) -> list[Span]:
    """For how long each sum of gradients of a unit grows before it is reduced.
    A tied unit is complete when all its readers are."""
    spans = []
    for unit, at in _where(uses, lambda use: use.writes).items():
        turn = {m: k for k, m in enumerate(dict.fromkeys(uses[i].action.micro for i in at))}
        groups = _grouped([(i, turn[uses[i].action.micro] // zero.every if zero.level >= 2 else 0) for i in at])
        spans += _merged([Span(unit, first, last) for first, last in groups])
    return spans


def _where(uses: Sequence[Use], of: Callable[[Use], tuple[str, ...]]) -> dict[str, list[int]]:
    """The places at which each unit is used."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, use in enumerate(uses):
        for unit in of(use):
            found[unit].append(i)
    return found


def _grouped(places: Sequence[tuple[int, Hashable]]) -> list[tuple[int, int]]:
    """First and last place of each group of (place, group)."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in places:
        groups[group].append(place)
    return [(group[0], group[-1]) for group in groups.values()]


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Spans of one unit that overlap become one."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: s.first):
        if out and span.first <= out[-1].last:
            out[-1] = Span(span.unit, out[-1].first, max(out[-1].last, span.last))
        else:
            out.append(span)
    return out


def woven(uses: Sequence[Use], whole: Sequence[Span], sums: Sequence[Span], zero: Zero) -> list[Action]:
    """The uses with the actions of ZeRO between them."""
    program: list[Action] = []
    gathers, releases = _by(whole, "first"), _by(whole, "last")
    opens, reduces = _by(sums, "first"), _by(sums, "last")
    wire = _Wire(Counter(s.unit for s in sums), zero)
    for i, use in enumerate(uses):
        program += [Action("gather", unit=u) for u in gathers[i]]
        # its buffer is the one under way
        program += wire.land(0) if any(a.unit in opens[i] for a in wire.reducing) else []
        program += [Action("open", unit=u) for u in opens[i]]
        program.append(use.action)
        program += [Action("release", unit=u) for u in releases[i] if zero.level == 3]
        for unit in reduces[i]:
            program += wire.reduce(unit)
    return program + wire.land(0)


def _by(spans: Sequence[Span], end: str) -> Mapping[int, list[str]]:
    """The units whose spans begin (first) or end (last) at each use."""
    found: dict[int, list[str]] = defaultdict(list)
    for span in spans:
        found[getattr(span, end)].append(span.unit)
    return found


class _Wire:
    """The sums of gradients under way at one place of a program.
    `left` counts each unit's reductions that have not begun."""

    def __init__(self, left: Counter[str], zero: Zero) -> None:
        self.left, self.zero, self.begun = left, zero, Counter[str]()
        self.reducing: list[Action] = []
        self.replicating: list[str] = []

    def reduce(self, unit: str) -> list[Action]:
        """A reduction begins, when all but `lag` of those before it have landed; without overlap it lands at once."""
        before = self.land(max(self.zero.lag - 1, 0))
        self.reducing.append(Action("reduce", micro=self.begun[unit], unit=unit))
        self.begun[unit] += 1
        self.left[unit] -= 1
        return [*before, self.reducing[-1], *self.land(self.zero.lag)]

    def land(self, most: int) -> list[Action]:
        """What waits for reductions, oldest first, until at most `most` are under way;
        a unit's last one makes the step's sum."""
        actions = []
        while len(self.reducing) > most:
            done = self.reducing.pop(0)
            actions.append(done._replace(kind="land"))
            if not self.left[done.unit] and all(a.unit != done.unit for a in self.reducing):
                actions += self._replicate(done.unit)
        return actions

    def _replicate(self, unit: str) -> list[Action]:
        self.replicating.append(unit)
        most = self.zero.replicas
        settled = [self.replicating.pop(0) for _ in range(len(self.replicating) - max(most, 1))]
        begin = [*(Action("settle", unit=u) for u in settled), Action("replicate", unit=unit)]
        return begin if most else [*begin, Action("settle", unit=self.replicating.pop())]


def around(program: Sequence[Action], i: int) -> str:
    """Action i among the computations and messages around it, for reports."""
    shown = [k for k, a in enumerate(program) if k == i or a.kind in ("F", "B", "L", "E", "recv", "send")]
    at = shown.index(i)
    texts = [f"[{program[k]}]" if k == i else str(program[k]) for k in shown[max(at - 4, 0):at + 5]]
    return f"{'... ' if at > 4 else ''}{' | '.join(texts)}{' ...' if at + 5 < len(shown) else ''}"


def verify(programs: Sequence[Sequence[Action]]) -> list[str]:
    """What is wrong with the programs of the pp ranks of one pipeline, which run side by side: messages that cross or
    have no taker, and ranks that wait for ever. Sends do not wait; a receive waits for its send, `tie` for the rank at
    the other end."""
    pp, at = len(programs), [0] * len(programs)
    lines: dict[tuple[str, int, int], list[Action]] = defaultdict(list)         # (way, from, to) -> messages under way
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                action = program[at[rank]]
                step = 1 if action.way == "F" else -1
                if action.kind == "send":
                    lines[action.way, rank, (rank + step) % pp].append(action)
                elif action.kind == "recv":
                    line = lines[action.way, (rank - step) % pp, rank]
                    if not line:
                        break
                    sent = line.pop(0)
                    if (sent.part + step, sent.micro) != (action.part, action.micro):
                        return [f"rank {rank} takes {sent} for {action}: {around(program, at[rank])}"]
                at[rank] += 1
                moved = True
    stuck = [f"rank {r} waits for ever: {around(p, at[r])}" for r, p in enumerate(programs) if at[r] < len(p)]
    return stuck + [f"nobody takes {a} of rank {line[1]}" for line, sent in lines.items() for a in sent]
