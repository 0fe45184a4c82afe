"""A step as data: one list of actions, which can be printed, verified, costed and run (executor.py).

    F part,m      forward of a part for micro-batch m           B part,m    its backward
    L part,m      head and loss, forward and backward at once   E part,m    head and loss without gradients
    gather U      the slices of unit U's weights begin to travel to every rank that needs the whole
    release U     the whole of them is not needed for now
    open U        a sum of gradients of unit U begins
    reduce U,k    it is complete for the k-th time in this step: its sum over the ranks of `shard` begins to travel
    land U,k      that sum has arrived, and joins the others of this step
    replicate U   the step's sum of this rank's slice begins to travel over the ranks of `replicate`

A part is a number: 0 is the embedding, 1 .. n the blocks, n + 1 the head. Passes come from a schedule; what ZeRO needs is
woven in by pure functions that look only at which part reads and writes which unit, so every schedule has every level.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Action(NamedTuple):
    kind: str
    part: int = -1
    micro: int = -1
    unit: str = ""

    def __str__(self) -> str:
        if self.unit:
            return f"{self.kind} {self.unit}{'' if self.micro < 0 else f',{self.micro}'}"
        return f"{self.kind}{self.part},{self.micro}"


class Part(NamedTuple):
    """The units that a part reads going forward, and going backward; its gradients are those of the first."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]


class Pass(NamedTuple):
    """One micro-batch through one stage, forward or backward."""

    kind: str
    stage: int
    micro: int


@dataclass(frozen=True)
class Zero:
    """What the data-parallel ranks share (Rajbhandari et al. 2020), and when it travels.

    level           1 optimizer state, 2 and gradients, 3 and weights
    keep            level 3: passes over its stage for which a unit's weights stay once gathered
    every           levels 2 and 3: micro-batches whose gradients are summed before they travel
    prefetch        weights are gathered one part ahead of their use
    lag             reductions that may be under way when the next one starts; None: all of the step
    """

    level: int = 0
    keep: int = 1
    every: int = 1
    prefetch: bool = True
    lag: int | None = None


class Use(NamedTuple):
    """A computation, and the units whose weights it reads and whose gradients it adds to, in a pass over its stage (its `turn`)."""

    action: Action
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    stage: int
    turn: int


class Span(NamedTuple):
    """From one computation to another, both included."""

    unit: str
    first: int
    last: int


def training(passes: Sequence[Pass], stages: Mapping[int, range], parts: Sequence[Part], zero: Zero) -> list[Action]:
    """One training step of one rank. `stages` says which parts each stage has; the last part of all is the head."""
    count: Counter[int] = Counter()
    uses = []
    for p in passes:
        uses += _uses(p, stages[p.stage], parts, count[p.stage])
        count[p.stage] += 1
    return _woven(uses, weights(uses, zero), gradients(uses, zero), zero)


def evaluation(stages: Mapping[int, range], parts: Sequence[Part], zero: Zero) -> list[Action]:
    """Forward of one micro-batch through the stages of one rank, and its loss."""
    uses = [Use(Action("E" if i == len(parts) - 1 else "F", i, 0), parts[i].forward, (), stage, 0)
            for stage, own in stages.items() for i in own]
    return _woven(uses, weights(uses, zero), [], zero)


def one_stage(schedule: str, micro_batches: int) -> list[Pass]:
    """The passes of a single stage: gpipe has all forwards first, 1f1b one of each in turn."""
    if schedule == "gpipe":
        return [Pass(kind, 0, m) for kind in "FB" for m in range(micro_batches)]
    return [Pass(kind, 0, m) for m in range(micro_batches) for kind in "FB"]


def _uses(p: Pass, own: range, parts: Sequence[Part], count: int) -> list[Use]:
    """A pass part by part. The head's forward waits for its backward: together they need the logits once."""
    head = len(parts) - 1
    if p.kind == "F":
        return [Use(Action("F", i, p.micro), parts[i].forward, (), p.stage, count) for i in own if i != head]
    return [Use(Action("L" if i == head else "B", i, p.micro), parts[i].backward, parts[i].forward, p.stage, count) for i in reversed(own)]


def weights(uses: Sequence[Use], zero: Zero) -> list[Span]:
    """For how long each unit's weights are whole: from their gathering to their release."""
    early = 1 if zero.prefetch else 0
    spans = []
    for unit in _units(uses, lambda use: use.reads):
        at = [i for i, use in enumerate(uses) if unit in use.reads]
        groups = _grouped([(i, (uses[i].stage, uses[i].turn // zero.keep) if zero.level == 3 else None) for i in at])
        spans += _merged([Span(unit, max(first - early, 0), last) for first, last in groups])
    return spans


def gradients(uses: Sequence[Use], zero: Zero) -> list[Span]:
    """For how long each sum of gradients of a unit grows before it is reduced. A tied unit is complete when all its readers are."""
    spans = []
    for unit in _units(uses, lambda use: use.writes):
        at = [i for i, use in enumerate(uses) if unit in use.writes]
        turn = {m: k for k, m in enumerate(dict.fromkeys(uses[i].action.micro for i in at))}
        groups = _grouped([(i, turn[uses[i].action.micro] // zero.every if zero.level >= 2 else 0) for i in at])
        spans += _merged([Span(unit, first, last) for first, last in groups])
    return spans


def _units(uses: Sequence[Use], of: Callable[[Use], tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(unit for use in uses for unit in of(use)))


def _grouped(places: Sequence[tuple[int, Hashable]]) -> list[tuple[int, int]]:
    """First and last place of each group of (place, group)."""
    groups: dict[Hashable, list[int]] = {}
    for place, group in places:
        groups.setdefault(group, []).append(place)
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


def _woven(uses: Sequence[Use], whole: Sequence[Span], sums: Sequence[Span], zero: Zero) -> list[Action]:
    """The computations with the actions of ZeRO between them."""
    program: list[Action] = []
    under_way: list[Action] = []
    left = Counter(s.unit for s in sums)
    for i, use in enumerate(uses):
        program += [Action("gather", unit=s.unit) for s in whole if s.first == i]
        again = [s.unit for s in sums if s.first == i and any(a.unit == s.unit for a in under_way)]
        program += _landed(under_way, left, 0) if again else []                         # its buffer is the one under way
        program += [Action("open", unit=s.unit) for s in sums if s.first == i]
        program.append(use.action)
        program += [Action("release", unit=s.unit) for s in whole if s.last == i and zero.level == 3]
        for unit in (s.unit for s in sums if s.last == i):
            program += _landed(under_way, left, zero.lag - 1) if zero.lag else []
            under_way.append(Action("reduce", micro=sum(s.unit == unit for s in sums) - left[unit], unit=unit))
            left[unit] -= 1
            program += under_way[-1:] + ([] if zero.lag is None else _landed(under_way, left, zero.lag))
    return program + _landed(under_way, left, 0)


def _landed(under_way: list[Action], left: Mapping[str, int], most: int) -> list[Action]:
    """What waits for reductions, oldest first, until at most `most` are under way; a unit's last one makes the step's sum."""
    actions = []
    while len(under_way) > most:
        done = under_way.pop(0)
        actions.append(done._replace(kind="land"))
        if not left[done.unit] and all(a.unit != done.unit for a in under_way):
            actions.append(Action("replicate", unit=done.unit))
    return actions
