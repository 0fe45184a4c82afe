"""Runs a program: the graph of each part is kept apart, so backward is an explicit loop and full recompute the same loop."""

from collections.abc import Callable, Mapping, Sequence

import torch

from megazero.comm import Group, Wires, Work
from megazero.decoder import Batch, Decoder
from megazero.program import Action, Part
from megazero.unit import Unit

Tensor = torch.Tensor


class Executor:
    """Runs actions over a decoder. Between actions it holds what flows: per micro-batch one activation or gradient
    (`flow`), per part and micro-batch what backward needs (`kept`), and the sums that are under way."""

    def __init__(self, decoder: Decoder, wires: Wires, parts: Sequence[Part]) -> None:
        self.decoder, self.wires, self.parts = decoder, wires, parts
        self.flow: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self.under_way: dict[tuple[str, str], Work] = {}
        self.witness: dict[str, Tensor] = {}                    # of the last step, by unit: finite if this rank's own gradients are
        self.do: dict[str, Callable[[Action], None]] = {
            "F": self._forward, "L": self._loss, "B": self._backward, "E": self._evaluate, "gather": lambda a: self._unit(a).gather(),
            "release": lambda a: self._unit(a).release(), "open": lambda a: self._unit(a).open(), "reduce": self._reduce,
            "land": self._land, "replicate": self._replicate}

    def train(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Leaves the gradients of `scale` x the sum of losses in the units' slices; returns that sum, unscaled, float64."""
        self.witness = {}
        total = self._run(program, batches, scale)
        for (what, unit), work in self.under_way.items():
            self.wires.line.doing = f"{what} {unit}"
            work.wait()
        self.under_way.clear()
        finish(list(self.decoder.units.values()), self.wires.groups)
        return total

    def evaluate(self, program: Sequence[Action], batch: Batch) -> Tensor:
        """The sum of the losses of one micro-batch, float64. No gradients, no dropout."""
        return self._run(program, [batch], None)

    def _run(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor | None) -> Tensor:
        self.batches, self.scale = batches, scale
        self.total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for action in program:
            self.wires.line.doing = str(action)
            self.do[action.kind](action)
        assert not self.kept, f"activations without a backward: {list(self.kept)}"
        self.flow.clear()
        return self.total

    def _unit(self, action: Action) -> Unit:
        return self.decoder.units[action.unit]

    def _arrive(self, units: Sequence[str]) -> None:
        """What was gathered ahead is needed now."""
        for name in units:
            self.decoder.units[name].arrive()

    # ---- computation

    def _forward(self, action: Action) -> None:
        micro, part, batch = action.micro, self.decoder.parts[action.part], self.batches[action.micro]
        self._arrive(self.parts[action.part].forward)
        x = self.flow.pop(micro).detach() if action.part else torch.zeros((), device=batch.tokens.device)
        graph = self.scale is not None and (self.decoder.recompute != "full" or action.part == 0)       # the embedding keeps only ids
        with torch.set_grad_enabled(graph):
            y = part(x.requires_grad_(graph), batch)
        if self.scale is not None:
            self.kept[action.part, micro] = x, y if graph else None
        self.flow[micro] = y

    def _loss(self, action: Action) -> None:
        assert self.scale is not None, "a training program needs a loss scale"
        self._arrive(self.parts[action.part].forward)
        x = self.flow.pop(action.micro)
        total, self.flow[action.micro] = self.decoder.head.forward_backward(x, self.batches[action.micro], self.scale)
        self.total += total

    def _backward(self, action: Action) -> None:
        micro, part = action.micro, self.decoder.parts[action.part]
        self._arrive(self.parts[action.part].backward)
        x, y = self.kept.pop((action.part, micro))
        if y is None:                                           # recompute: the same forward again
            x = x.requires_grad_()
            y = part(x, self.batches[micro])
        torch.autograd.backward(y, self.flow.pop(micro))
        if action.part:
            assert x.grad is not None
            self.flow[micro] = x.grad

    def _evaluate(self, action: Action) -> None:
        self._arrive(self.parts[action.part].forward)
        self.total += self.decoder.head(self.flow.pop(action.micro), self.batches[action.micro])

    # ---- sums over data-parallel ranks, which travel while the backward passes of earlier blocks go on

    def _reduce(self, action: Action) -> None:
        unit = self._unit(action)
        self.witness[action.unit] = unit.close() + self.witness.get(action.unit, 0)
        self.under_way["reduce", action.unit] = unit.reduce()

    def _land(self, action: Action) -> None:
        self._unit(action).land(self.under_way.pop(("reduce", action.unit)).wait(), first=action.micro == 0)

    def _replicate(self, action: Action) -> None:
        self.under_way["replicate", action.unit] = self.wires["replicate"].all_reduce(self._unit(action).grad_slice)


def finish(units: Sequence[Unit], groups: Mapping[str, Group]) -> None:
    """Sums gradients that are partial: over `tp` for what every rank holds whole, over `kv` for shared key-value heads."""
    for axis, cut in (("tp", False), ("kv", True)):
        parts = [part for unit in units for part in unit.partial(cut)]
        if parts and groups[axis].size > 1:
            total = groups[axis].all_reduce(torch.cat(parts)).wait()
            torch._foreach_copy_(parts, total.split([len(p) for p in parts]))
