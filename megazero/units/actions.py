"""What a program says to units, done: the same for our decoder's executor and for an engine's hooks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from megazero.comm import Group, Wires, Work
from megazero.plan import GRADIENTS, WEIGHTS, Action
from megazero.units.gate import Gate, Ruling
from megazero.units.rules import Updater
from megazero.units.unit import Unit
from megazero.units.watch import WeightWatch

Tensor = torch.Tensor


class Postponed:
    """What is done when somebody waits for it, behind what it follows. In tests (`late`) an update is: then all that
    reads weights or state, or overwrites gradients, must have waited for it."""

    def __init__(self, do: Callable[[], None], behind: Sequence[Work]) -> None:
        self.do: Callable[[], None] | None = do
        self.behind = behind

    def wait(self) -> Tensor:
        for work in self.behind:
            work.wait()
        do, self.do = self.do, None
        if do is not None:
            do()
        return torch.empty(0)

    def done(self) -> bool:
        return self.do is None


class UnitActions:
    """Does the actions of a program that are about units. Between them it holds the sums that are under way."""

    def __init__(self, units: Mapping[str, Unit], wires: Wires, gate: Gate, updater: Updater) -> None:
        self.units, self.wires, self.gate, self.updater = units, wires, gate, updater
        self.watch: WeightWatch | None = None                         # looks at gradients before an update
        self.under_way: dict[tuple[str, str], Work] = {}
        self.here = {name: ExitStack() for name in units}       # sums that others add to, until they have
        self.hold: Callable[[], None] = lambda: None            # called before an update: somebody may still copy state
        self.do: dict[str, Callable[[Action, Ruling], None]] = {
            "gather": lambda a, _: units[a.unit].gather(), "release": lambda a, _: units[a.unit].release(),
            "open": lambda a, _: units[a.unit].open(), "reduce": self._reduce, "land": self._land,
            "replicate": self._replicate, "tie": self._tie, "settle": self._settle, "finish": self._finish,
            "judge": self._judge, "update": self._update, "publish": self._publish}

    # ---- sums over data-parallel ranks, which travel while the backward passes of earlier blocks go on

    def _reduce(self, action: Action, ruling: Ruling) -> None:
        unit = self.units[action.unit]
        ruling.witness[action.unit] = unit.close() + ruling.witness.get(action.unit, 0)
        self.under_way["reduce", action.unit] = unit.reduce()

    def _land(self, action: Action, ruling: Ruling) -> None:
        self.units[action.unit].land(self.under_way.pop(("reduce", action.unit)).wait(), first=action.micro == 0)

    def _replicate(self, action: Action, ruling: Ruling) -> None:
        self._begin("replicate", action.unit, self.units[action.unit].sharing.replicate)

    def _tie(self, action: Action, ruling: Ruling) -> None:
        self._begin("tie", action.unit, self.units[action.unit].sharing.holders)

    def _begin(self, what: str, unit: str, group: Group) -> None:
        about = unit if what == "replicate" else ""             # stages of a pipeline number their units each their way
        self.here[unit].enter_context(self.units[unit].home.present(unit, GRADIENTS))
        self.under_way[what, unit] = group.all_reduce(self.units[unit].grad_slice, about=about)

    def _settle(self, action: Action, ruling: Ruling) -> None:
        for what in ("replicate", "tie"):
            if (what, action.unit) in self.under_way:
                self.under_way.pop((what, action.unit)).wait()
                self.here[action.unit].close()

    def _finish(self, action: Action, ruling: Ruling) -> None:
        """What tensor-parallel ranks see in part is added, all units in one message: over `tp` what every rank holds
        whole, over `kv` shared key-value heads."""
        if self.wires[action.way].size == 1:
            return
        found = [(unit, parts) for unit in self.units.values() if (parts := unit.partial(cut=action.way == "kv"))]
        seen = []
        for unit, parts in found:
            with unit.home.present(unit.flat.name, GRADIENTS, changed=False):
                seen.append(torch.cat(parts))
        for (unit, parts), total in zip(found, self._added(seen, action.way), strict=True):
            with unit.home.present(unit.flat.name, GRADIENTS):
                torch._foreach_copy_(parts, total.split([len(p) for p in parts]))

    def _added(self, seen: Sequence[Tensor], way: str) -> Sequence[Tensor]:
        return (self.wires[way].all_reduce(torch.cat([*seen])).wait().split([len(x) for x in seen]) if seen else ())

    # ---- the verdict, and what follows from it

    def _judge(self, action: Action, ruling: Ruling) -> None:
        ruling.verdict = self.gate.judge(ruling)

    def _update(self, action: Action, ruling: Ruling) -> None:
        verdict = ruling.verdict
        assert verdict is not None, "a program judges before it updates"
        self.hold()
        if self.watch is not None:
            self.watch.before()
        self._change(action.units, lambda: self.updater.update(action.units, verdict, ruling.lr))

    def _publish(self, action: Action, ruling: Ruling) -> None:
        def publish() -> None:
            for unit in (self.units[name] for name in action.units):
                if unit.away or unit.master is unit.weight_slice:       # published piece by piece, or as it is
                    unit.changed()
                    continue
                with unit.home.present(unit.flat.name, WEIGHTS, needed=False):
                    unit.publish()

        self._change(action.units, publish)

    def _change(self, names: Sequence[str], do: Callable[[], None]) -> None:
        if not self.wires.late:
            do()
            return
        units = [self.units[name] for name in names]
        change = Postponed(do, [u.changing for u in units if u.changing])
        for unit in units:
            unit.changing = change
