"""A step as a list of actions (plan/action.py), one list for each rank.

Passes come from a schedule (pipeline/schedule.py); what ZeRO and the neighbours need is woven in by pure functions that
look only at which part reads and writes which unit, so every schedule has every level.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megazero.pipeline import KINDS, Pass
from megazero.plan.action import Action
from megazero.plan.sums import Reductions, Zero, ending


class Part(NamedTuple):
    """The units that a part reads going forward, and going backward; its gradients are those of the first."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]

    def read(self, way: str) -> tuple[str, ...]:
        """What a kind of pass reads of it: forward, backward or nothing."""
        return {"forward": self.forward, "backward": self.backward, "": ()}[way]


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


def training(passes: Sequence[Pass], stages: Stages, zero: Zero, homes: Collection[str] = ()) -> list[Action]:
    """One training step of one rank, whose passes these are; `homes`: units whose state is elsewhere."""
    turns: Counter[int] = Counter()
    uses: list[Use] = []
    posted = 0
    for i, p in enumerate(passes):
        ahead = next((j for j in range(i + 1, len(passes)) if KINDS[passes[j].kind].way), i) + 1
        for q in passes[posted:ahead]:                          # up to the next pass that takes a message
            uses += [Use(m._replace(kind="expect")) for m in arrival(q, stages)]
        posted = max(posted, ahead)
        uses += [*map(Use, arrival(p, stages)), *computation(p, stages, turns[p.stage]),
                 *map(Use, departure(p, stages))]
        turns[p.stage] += bool(KINDS[p.kind].reads)
    sums = gradients(uses, zero)
    reductions = Reductions(Counter(s.unit for s in sums), zero)
    units = dict.fromkeys(u for use in uses for u in use.reads)         # as the next forward pass needs them
    program = woven(uses, weights(uses, zero), sums, reductions)
    return [*program, *reductions.finish(stages.tied), *ending(list(units), homes)]


def evaluation(stages: Stages, zero: Zero) -> list[Action]:
    """Forward of one micro-batch through the stages of one rank, and its loss."""
    uses: list[Use] = []
    for stage, own in stages.own.items():
        p = Pass("E", stage, 0)
        uses += [*(Use(m._replace(kind="expect")) for m in arrival(p, stages)), *map(Use, arrival(p, stages))]
        uses += [Use(Action("E", i, 0), stages.parts[i].forward, (), stage) for i in own]
        uses += map(Use, departure(p, stages))
    return woven(uses, weights(uses, zero), [], Reductions({}, zero))


def computation(p: Pass, stages: Stages, turn: int) -> list[Use]:
    """A pass part by part. The head's forward waits for its backward: together they need the logits once, and are L."""
    kind, own, head = KINDS[p.kind], stages.own[p.stage], len(stages.parts) - 1
    uses = []
    for i in own if kind.way == "F" else reversed(own):
        if i != head or kind.way == "B":
            name = "L" if i == head else p.kind
            reads, writes = KINDS[name].reads, KINDS[name].writes
            part = stages.parts[i]
            uses.append(Use(Action(name, i, p.micro), part.read(reads), part.forward if writes else (), p.stage, turn))
    return uses


def arrival(p: Pass, stages: Stages) -> list[Action]:
    """The message that a pass needs from another rank, if any."""
    return _message("recv", p, stages, {"F": 0, "B": stages.count - 1})


def departure(p: Pass, stages: Stages) -> list[Action]:
    """The message that another rank needs from a pass, if any."""
    return _message("send", p, stages, {"F": stages.count - 1, "B": 0})


def _message(kind: str, p: Pass, stages: Stages, outermost: Mapping[str, int]) -> list[Action]:
    way = KINDS[p.kind].way
    return [Action(kind, p.stage, p.micro, way=way)] if stages.apart and way and p.stage != outermost[way] else []


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


def woven(uses: Sequence[Use], whole: Sequence[Span], sums: Sequence[Span], reductions: Reductions) -> list[Action]:
    """The uses with the actions of ZeRO between them."""
    program: list[Action] = []
    gathers, releases = _by(whole, "first"), _by(whole, "last")
    opens, reduces = _by(sums, "first"), _by(sums, "last")
    for i, use in enumerate(uses):
        program += [Action("gather", units=(u,)) for u in gathers.get(i, ())]
        for unit in opens.get(i, ()):
            program += reductions.begin(unit)
        program.append(use.action)
        program += [Action("release", units=(u,)) for u in releases.get(i, ()) if reductions.zero.level == 3]
        for unit in reduces.get(i, ()):
            program += reductions.complete(unit)
    return program


def _by(spans: Sequence[Span], end: str) -> Mapping[int, list[str]]:
    """The units whose spans begin (first) or end (last) at each use."""
    found: dict[int, list[str]] = defaultdict(list)
    for span in spans:
        found[getattr(span, end)].append(span.unit)
    return found
