"""Runs a program: the graph of each part is kept apart, so backward is an explicit loop and full recompute the same
loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import cast

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megazero.comm import Stuck, Wires, Work
from megazero.model import Batch, Decoder
from megazero.plan import Action, Part, around
from megazero.units import Ruling, UnitActions

Tensor = torch.Tensor
Do = Callable[[Action, "Turn"], None]


@dataclass
class Turn(Ruling):
    """One run over a program: what it is about, handed along from action to action."""

    batches: Sequence[Batch] = ()

    @property
    def seed(self) -> Tensor:
        """What the sum of losses is multiplied by before backward."""
        return self.scale / self.nominal


class Executor:
    """Runs actions over a decoder. Between actions it holds what flows: per micro-batch one activation or gradient
    (`flow`), per part and micro-batch what backward needs (`kept`) and what W will (`aside`), and messages."""

    def __init__(self, decoder: Decoder, wires: Wires, parts: Sequence[Part], actions: UnitActions) -> None:
        self.decoder, self.wires, self.parts = decoder, wires, parts
        self.flow: dict[int, Tensor] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, GradientEdge | None]] = {}
        self.aside: dict[tuple[int, int], list[Callable[[], Callable[[], None]]]] = {}
        self.expected: dict[tuple[str, int, int], Work] = {}
        self.leaving: list[Work] = []
        self.do: dict[str, Do] = {
            **cast(Mapping[str, Do], actions.do), "F": self._forward, "B": self._backward, "I": self._inputs,
            "W": self._weights, "L": self._loss, "E": self._evaluate, "expect": self._expect, "recv": self._receive,
            "send": self._send}

    def train(self, program: Sequence[Action], turn: Turn) -> Turn:
        """A step; returns the turn with its verdict."""
        self._run(program, turn)
        for work in self.leaving:
            work.wait()
        self.leaving.clear()
        return turn

    def evaluate(self, program: Sequence[Action], batch: Batch) -> Turn:
        """The sum of the losses of one micro-batch, and its tokens, are told. No gradients, no dropout."""
        return self._run(program, Turn(batches=[batch]))

    def _run(self, program: Sequence[Action], turn: Turn) -> Turn:
        for i, action in enumerate(program):
            self.wires.line.doing = str(action)
            try:
                self.do[action.kind](action, turn)
            except Stuck as error:
                raise Stuck(f"{error}; where it stands: {around(program, i)}") from error
        assert not self.kept and not self.aside, f"without a backward: {list(self.kept)} {list(self.aside)}"
        self.flow.clear()
        return turn

    def _arrive(self, units: Sequence[str]) -> None:
        """What was gathered ahead is needed now."""
        for name in units:
            self.decoder.units[name].arrive()

    # ---- computation

    def _forward(self, action: Action, turn: Turn) -> None:
        micro, part, batch = action.micro, self.decoder.parts[action.part], turn.batches[action.micro]
        self._arrive(self.parts[action.part].forward)
        x = self._input(action, batch)
        graph = self.decoder.recompute != "full" or action.part == 0                    # the embedding keeps only ids
        with torch.set_grad_enabled(graph):
            y = part(x.requires_grad_(graph), batch)
        self.kept[action.part, micro] = x, get_gradient_edge(y) if graph else None      # not y itself, which may leave
        self.flow[micro] = y

    def _input(self, action: Action, batch: Batch) -> Tensor:
        """What flows into a part; the embedding only needs a leaf for autograd to start from."""
        return self.flow.pop(action.micro).detach() if action.part else torch.zeros((), device=batch.tokens.device)

    def _loss(self, action: Action, turn: Turn) -> None:
        assert self.decoder.head is not None
        self._arrive(self.parts[action.part].forward)
        x, batch = self.flow.pop(action.micro), turn.batches[action.micro]
        total, self.flow[action.micro] = self.decoder.head.forward_backward(x, batch, turn.seed)
        self._tell(total, batch, turn)

    def _tell(self, total: Tensor, batch: Batch, turn: Turn) -> None:
        turn.tell("loss", total)
        turn.tell("tokens", batch.mask.sum(dtype=torch.float64))

    def _backward(self, action: Action, turn: Turn) -> None:
        micro, part = action.micro, self.decoder.parts[action.part]
        self._arrive(self.parts[action.part].backward)
        x, edge = self.kept.pop((action.part, micro))
        if edge is None:                                        # recompute: the same forward again
            edge = get_gradient_edge(part(x.requires_grad_(), turn.batches[micro]))
        torch.autograd.backward((edge,), (self.flow.pop(micro),))
        if action.part:
            assert x.grad is not None
            self.flow[micro] = x.grad

    def _inputs(self, action: Action, turn: Turn) -> None:
        """A backward whose gradients of weights are put aside."""
        units = [self.decoder.units[name] for name in self.parts[action.part].forward]
        for unit in units:
            unit.aside = []
        self._backward(action, turn)
        self.aside[action.part, action.micro] = [begin for unit in units for begin in unit.aside or ()]
        for unit in units:
            unit.aside = None

    def _weights(self, action: Action, turn: Turn) -> None:
        """What was put aside: all that must travel begins to, then one after the other is added."""
        for end in [begin() for begin in self.aside.pop((action.part, action.micro))]:
            end()

    def _evaluate(self, action: Action, turn: Turn) -> None:
        batch, head = turn.batches[action.micro], self.decoder.head
        self._arrive(self.parts[action.part].forward)
        with torch.no_grad():
            if action.part in self.decoder.parts:
                self.flow[action.micro] = self.decoder.parts[action.part](self._input(action, batch), batch)
            else:
                assert head is not None
                self._tell(head(self.flow.pop(action.micro), batch), batch, turn)

    # ---- messages between stages

    def _expect(self, action: Action, turn: Turn) -> None:
        """Room for a message that comes later, so that it can come while this rank computes."""
        d, tokens = self.decoder, turn.batches[action.micro].tokens
        room = torch.empty(ceil(tokens.numel() / d.group.size), d.a.hidden, dtype=d.dtype, device=tokens.device)
        message = action.way, action.part, action.micro
        self.expected[message] = self.wires.channels["recv", action.way].receive(room)

    def _receive(self, action: Action, turn: Turn) -> None:
        self.flow[action.micro] = self.expected.pop((action.way, action.part, action.micro)).wait()

    def _send(self, action: Action, turn: Turn) -> None:
        """What leaves is kept until it has left, and no longer."""
        self.leaving = [work for work in self.leaving if not work.done()]
        message = self.flow.pop(action.micro).detach().contiguous()
        self.leaving.append(self.wires.channels["send", action.way].send(message))
