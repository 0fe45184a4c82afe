"""ZeRO: what data-parallel ranks share, and a step's sums of gradients on their way."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megazero.plan.action import Action


@dataclass(frozen=True)
class Zero:
    """What the data-parallel ranks share (Rajbhandari et al. 2020), and when it travels.

    level           1 optimizer state, 2 and gradients, 3 and weights
    keep            level 3: passes over its stage for which a unit's weights stay once gathered
    every           levels 2 and 3: micro-batches whose gradients are summed before they travel
    prefetch        weights are gathered one part ahead of their use
    lag             reductions that may be under way at a time; 0: each lands at once
    replicas        sums over `replicate` that may be under way at a time: the second half of an
                    all-reduce travels when the first is waited for, so waiting for all of them at the end would leave
                    those halves without company
    """

    level: int = 0
    keep: int = 1
    every: int = 1
    prefetch: bool = True
    lag: int = 0
    replicas: int = 1


class Reductions:
    """The sums of gradients of one step, unit by unit: each begins, grows, is complete, travels over `shard` and lands;
    a unit's last one makes the step's sum, which travels over `replicate` and over the holders of a shared unit.

    Each call says what must be done, as actions: for a program that is written ahead, and for an engine that learns
    from hooks where it is. `times`: how often each unit's sum is complete in the step.
    """

    def __init__(self, times: Mapping[str, int], zero: Zero) -> None:
        self.left, self.zero, self.begun = Counter(times), zero, Counter[str]()
        self.reducing: list[Action] = []
        self.replicating: list[str] = []

    def begin(self, unit: str) -> list[Action]:
        """Its first gradient is about to come. The buffer that it will grow in may be the one under way."""
        under_way = any(unit in a.units for a in self.reducing)
        return [*(self.land(0) if under_way else []), Action("open", units=(unit,))]

    def complete(self, unit: str) -> list[Action]:
        """Its last gradient is there: it begins to travel, when so many before it have landed that `lag` are under way;
        without overlap it lands at once."""
        before = self.land(max(self.zero.lag - 1, 0))
        self.reducing.append(Action("reduce", micro=self.begun[unit], units=(unit,)))
        self.begun[unit] += 1
        self.left[unit] -= 1
        return [*before, self.reducing[-1], *self.land(self.zero.lag)]

    def finish(self, tied: Sequence[str] = ()) -> list[Action]:
        """The step's sums arrive, and those of the `tied` units that several stages hold are added."""
        actions = self.land(0)
        for unit in tied:
            if unit in self.replicating:
                self.replicating.remove(unit)
                actions.append(Action("settle", units=(unit,)))
            actions.append(Action("tie", units=(unit,)))
        actions += [Action("settle", units=(u,)) for u in (*self.replicating, *tied)]
        self.replicating = []
        return actions

    def land(self, most: int) -> list[Action]:
        """What waits for reductions, oldest first, until at most `most` are under way; a unit's last one makes the
        step's sum."""
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
        begin = [*(Action("settle", units=(u,)) for u in settled), Action("replicate", units=(unit,))]
        return begin if most else [*begin, Action("settle", units=(self.replicating.pop(),))]


def ending(units: Sequence[str], homes: Collection[str] = ()) -> list[Action]:
    """How a step ends when its sums are there: neighbours whose state is here are one kernel call; those whose state is
    elsewhere (`homes`) are updated one by one."""
    together: list[tuple[str, ...]] = []
    for elsewhere, run in groupby(units, lambda name: name in homes):
        names = tuple(run)
        together += [(name,) for name in names] if elsewhere else [names]
    return [Action("finish", way="tp"), Action("finish", way="kv"), Action("judge"),
            *(Action(kind, units=names) for names in together or [()] for kind in ("update", "publish"))]
