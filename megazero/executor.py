"""Runs a program: the graph of each part is kept apart, so backward is an explicit loop and full recompute the same loop."""

from collections.abc import Callable, Sequence

import torch

from megazero.comm import Wires, Work
from megazero.decoder import Batch, Decoder
from megazero.program import Action

Tensor = torch.Tensor


class Executor:
    """Runs actions over a decoder. Between actions it holds what flows: per micro-batch one activation or gradient
    (`flow`), and per part and micro-batch what backward needs (`kept`)."""

    def __init__(self, decoder: Decoder, wires: Wires) -> None:
        self.decoder, self.wires = decoder, wires
        self.flow: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self.reducing: list[tuple[str, Work]] = []
        self.do: dict[str, Callable[[Action], None]] = {
            "open": self._open, "F": self._forward, "L": self._loss, "B": self._backward, "E": self._evaluate, "reduce": self._reduce}

    def train(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Leaves the gradients of `scale` x the sum of losses in the units; returns that sum, unscaled, float64."""
        return self._run(program, batches, scale)

    def evaluate(self, program: Sequence[Action], batch: Batch) -> Tensor:
        """The sum of the losses of one micro-batch, float64. No gradients, no dropout."""
        return self._run(program, [batch], None)

    def _run(self, program: Sequence[Action], batches: Sequence[Batch], scale: Tensor | None) -> Tensor:
        self.batches, self.scale = batches, scale
        self.total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
        for action in program:
            self.wires.line.doing = str(action)
            self.do[action.kind](action)
        self.wait()
        assert not self.kept, f"activations without a backward: {list(self.kept)}"
        self.flow.clear()
        return self.total

    def _open(self, action: Action) -> None:
        self.decoder.units[action.unit].open()

    def _forward(self, action: Action) -> None:
        micro, part, batch = action.micro, self.decoder.parts[action.part], self.batches[action.micro]
        x = self.flow.pop(micro).detach() if action.part else torch.zeros((), device=batch.tokens.device)
        graph = self.scale is not None and self.decoder.recompute != "full"
        with torch.set_grad_enabled(graph):
            y = part(x.requires_grad_(graph), batch)
        if self.scale is not None:
            self.kept[action.part, micro] = x, y if graph else None
        self.flow[micro] = y

    def _loss(self, action: Action) -> None:
        assert self.scale is not None, "a training program needs a loss scale"
        x = self.flow.pop(action.micro)
        total, self.flow[action.micro] = self.decoder.head.forward_backward(x, self.batches[action.micro], self.scale)
        self.total += total

    def _backward(self, action: Action) -> None:
        micro = action.micro
        x, y = self.kept.pop((action.part, micro))
        if y is None:                                           # recompute: the same forward again
            x = x.requires_grad_()
            y = self.decoder.parts[action.part](x, self.batches[micro])
        torch.autograd.backward(y, self.flow.pop(micro))
        if action.part:
            assert x.grad is not None
            self.flow[micro] = x.grad

    def _evaluate(self, action: Action) -> None:
        self.total += self.decoder.head(self.flow.pop(action.micro), self.batches[action.micro])

    def _reduce(self, action: Action) -> None:
        """The sum over data-parallel ranks travels while the backward passes of earlier blocks go on."""
        unit = self.decoder.units[action.unit]
        unit.close()
        unit.finish(self.wires.groups)
        self.reducing.append((str(action), self.wires["dp"].all_reduce(unit.grads)))

    def wait(self) -> None:
        """Returns when every reduction has landed."""
        for name, work in self.reducing:
            self.wires.line.doing = name
            work.wait()
        self.reducing.clear()
