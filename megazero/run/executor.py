"""Runs a program: the graph of each part is kept apart,
so backward is an explicit loop and full recompute the same loop."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megazero.comm import Group, Stuck, Wires, Work
from megazero.model import Batch, Decoder
from megazero.plan import Action, Part, around
from megazero.units import Unit

Tensor = torch.Tensor


class Executor:
    """Runs actions over a decoder. Between actions it holds what flows: per micro-batch one activation or gradient
    (`flow`), per part and micro-batch what backward needs (`kept`), and the sums that are under way."""

    def __init__(self, decoder: Decoder, wires: Wires, parts: Sequence[Part]) -> None:
        self.decoder, self.wires, self.parts = decoder, wires, parts
        self.flow: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, GradientEdge | None]] = {}
        self.under_way: dict[tuple[str, str], Work] = {}
        self.expected: dict[tuple[str, int, int], Work] = {}
        self.leaving: list[Work] = []
        # of the last step, by unit: finite if this rank's own gradients are
        self.witness: dict[str, Tensor] = {}
        self.do: dict[str, Callable[[Action], None]] = {
            "F": self._forward, "L": self._loss, "B": self._backward, "E": self._evaluate,
            "gather": lambda a: self._unit(a).gather(), "release": lambda a: self._unit(a).release(),
            "open": lambda a: self._unit(a).open(), "reduce": self._reduce, "land": self._land,
            "replicate": self._replicate, "settle": lambda a: self._settle(a.unit), "tie": self._tie,
            "expect": self._expect, "recv": self._receive, "send": self._send}

    def train(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Leaves the gradients of `scale` x the sum of losses in the units' slices;
        returns that sum, unscaled, float64."""
        self.witness = {}
        total = self._run(program, batches, scale)
        for unit in [unit for _, unit in self.under_way]:
            self._settle(unit)
        for work in self.leaving:
            work.wait()
        self.leaving.clear()
        finish(list(self.decoder.units.values()), self.wires.groups)
        return total

    def evaluate(self, program: Sequence[Action], batch: Batch) -> Tensor:
        """The sum of the losses of one micro-batch, float64. No gradients, no dropout."""
        return self._run(program, [batch], None)

    def _run(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor | None) -> Tensor:
        self.batches, self.scale = batches, scale
        self.total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for i, action in enumerate(program):
            self.wires.line.doing = str(action)
            try:
                self.do[action.kind](action)
            except Stuck as error:
                raise Stuck(f"{error}; where it stands: {around(program, i)}") from error
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
        # the embedding keeps only ids
        graph = self.scale is not None and (self.decoder.recompute != "full" or action.part == 0)
        with torch.set_grad_enabled(graph):
            y = part(x.requires_grad_(graph), batch)
        if self.scale is not None:
            self.kept[action.part, micro] = x, get_gradient_edge(y) if graph else None  # not y itself, which may leave
        self.flow[micro] = y

    def _loss(self, action: Action) -> None:
        assert self.scale is not None and self.decoder.head is not None
        self._arrive(self.parts[action.part].forward)
        x = self.flow.pop(action.micro)
        total, self.flow[action.micro] = self.decoder.head.forward_backward(x, self.batches[action.micro], self.scale)
        self.total += total

    def _backward(self, action: Action) -> None:
        micro, part = action.micro, self.decoder.parts[action.part]
        self._arrive(self.parts[action.part].backward)
        x, edge = self.kept.pop((action.part, micro))
        if edge is None:                                        # recompute: the same forward again
            edge = get_gradient_edge(part(x.requires_grad_(), self.batches[micro]))
        torch.autograd.backward((edge,), (self.flow.pop(micro),))
        if action.part:
            assert x.grad is not None
            self.flow[micro] = x.grad

    def _evaluate(self, action: Action) -> None:
        assert self.decoder.head is not None
        self._arrive(self.parts[action.part].forward)
        self.total += self.decoder.head(self.flow.pop(action.micro), self.batches[action.micro])

    # ---- messages between stages

    def _expect(self, action: Action) -> None:
        """Room for a message that comes later, so that it can come while this rank computes."""
        d, tokens = self.decoder, self.batches[action.micro].tokens
        room = torch.empty(ceil(tokens.numel() / d.group.size), d.a.hidden, dtype=d.dtype, device=tokens.device)
        self.expected[action.way, action.part, action.micro] = self.wires.channels["recv", action.way].receive(room)

    def _receive(self, action: Action) -> None:
        self.flow[action.micro] = self.expected.pop((action.way, action.part, action.micro)).wait()

    def _send(self, action: Action) -> None:
        """What leaves is kept until it has left, and no longer."""
        self.leaving = [work for work in self.leaving if not work.done()]
        self.leaving.append(self.wires.channels["send", action.way].send(
            self.flow.pop(action.micro).detach().contiguous()))

    # ---- sums over data-parallel ranks, which travel while the backward passes of earlier blocks go on

    def _reduce(self, action: Action) -> None:
        unit = self._unit(action)
        self.witness[action.unit] = unit.close() + self.witness.get(action.unit, 0)
        self.under_way["reduce", action.unit] = unit.reduce()

    def _land(self, action: Action) -> None:
        self._unit(action).land(self.under_way.pop(("reduce", action.unit)).wait(), first=action.micro == 0)

    def _tie(self, action: Action) -> None:
        self._settle(action.unit)
        unit = self._unit(action)
        self.under_way["tie", action.unit] = unit.sharing.holders.all_reduce(unit.grad_slice)

    def _settle(self, unit: str) -> None:
        """Waits for what is under way of a unit."""
        for what in ("replicate", "tie"):
            if (what, unit) in self.under_way:
                self.wires.line.doing = f"{what} {unit}"
                self.under_way.pop((what, unit)).wait()

    def _replicate(self, action: Action) -> None:
        self.under_way["replicate", action.unit] = self.wires["replicate"].all_reduce(self._unit(action).grad_slice)


def finish(units: Sequence[Unit], groups: Mapping[str, Group]) -> None:
    """Sums gradients that are partial: over `tp` for what every rank holds whole,
    over `kv` for shared key-value heads."""
    for axis, cut in (("tp", False), ("kv", True)):
        parts = [part for unit in units for part in unit.partial(cut)]
        if parts and groups[axis].size > 1:
            total = groups[axis].all_reduce(torch.cat(parts)).wait()
            torch._foreach_copy_(parts, total.split([len(p) for p in parts]))
