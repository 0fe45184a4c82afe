"""A unit's tensors: weights, gradients and masters, each one flat buffer that the weights' names are views of.

Nothing here is an nn.Parameter and autograd never sees a weight: an operation holds a `Weight`, a handle that says which
part of which unit it means, looks it up when it needs it, and hands its gradient over when it has it (ops.py). So a
gradient is written once, into the place where the optimizer and the wire read it, and no pass clears buffers before a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megazero.comm import Group
from megazero.layout import Box, Flat, Operand
from megazero.random import fill_normal, key

TORCH_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unit:
    """The flat buffers of one unit on one rank.

    weights   [flat.size], compute dtype: what forward and backward read
    master    [flat.size], fp32 (fp64 with fp64 weights): what the optimizer changes; the weights themselves if the dtypes agree
    grads     [flat.size], the master's dtype: sum over the micro-batches of a step
    """

    def __init__(self, flat: Flat, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = flat
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = torch.zeros(flat.size, dtype=dtype, device=device)
        self.master = self.weights if dtype == wide else torch.zeros(flat.size, dtype=wide, device=device)
        self.grads = torch.zeros(flat.size, dtype=wide, device=device)
        self._operands = {o.name: o for o in flat.operands}
        self._fresh: set[str] = set(self._operands)             # operands without a gradient yet in this step

    def __contains__(self, operand: str) -> bool:
        return operand in self._operands

    def weight(self, operand: str) -> "Weight":
        return Weight(self, self._operands[operand])

    def initialise(self, seed: int) -> None:
        """Draws the masters from (seed, name, element index), then publishes them."""
        for piece in self.flat.pieces:
            p, out = piece.shard.parameter, self.master[piece.start:piece.stop]
            if p.std == 0:
                out.fill_(p.mean)
            else:
                drawn = torch.empty(piece.shard.box.size, dtype=out.dtype)
                fill_normal(drawn, key(seed, p.name), p.shape, piece.shard.box, p.mean, p.std)
                out.copy_(drawn.view(-1))
        self.publish()

    def publish(self) -> None:
        """Masters -> weights, after they changed."""
        if self.weights is not self.master:
            self.weights.copy_(self.master)

    def open(self) -> None:
        """Forgets the gradients of the last step: the next one to arrive overwrites, later ones add."""
        self._fresh = set(self._operands)

    def close(self) -> None:
        """The step's gradients are complete: what nothing was handed to is zero."""
        for name in self._fresh:
            o = self._operands[name]
            self.grads[o.start:o.stop].zero_()
        self._fresh = set()

    def finish(self, groups: Mapping[str, Group]) -> None:
        """Sums gradients that are partial: over `tp` for what every rank holds whole, over `kv` for shared key-value heads."""
        for axis, cut in (("tp", False), ("kv", True)):
            parts = [self.grads[p.start:p.stop] for p in self.flat.pieces if p.shard.partial and p.shard.cut == cut]
            if parts and groups[axis].size > 1:
                total = groups[axis].all_reduce(torch.cat(parts)).wait()
                torch._foreach_copy_(parts, total.split([len(p) for p in parts]))

    def is_first(self, operand: Operand) -> bool:
        """Is this operand's gradient still unwritten in this step? Asked once per gradient: it is written from now on."""
        first = operand.name in self._fresh
        self._fresh.discard(operand.name)
        return first


@dataclass(frozen=True)
class Weight:
    """A handle: one operand of one unit. Cheap to hold across forward and backward; holds no tensor."""

    unit: Unit
    operand: Operand

    @property
    def value(self) -> torch.Tensor:
        """The weight itself, a view of the unit's buffer. Look it up anew in backward; never save it."""
        o = self.operand
        return self.unit.weights[o.start:o.stop].view(o.shape)

    @property
    def grad(self) -> torch.Tensor:
        o = self.operand
        return self.unit.grads[o.start:o.stop].view(o.shape)

    @property
    def rows(self) -> Box:
        """The box of the logical tensor that is stored here (of an operand of one piece)."""
        (piece,) = self.operand.pieces
        return piece.shard.box

    def add_product(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """grad += dyT x, for dy [tokens, rows] and x [tokens, columns]; in one pass where the dtypes agree."""
        keep = 0 if self.unit.is_first(self.operand) else 1     # 0 overwrites: what was there, NaN included, does not count
        grad = self.grad
        if grad.dtype == dy.dtype:
            grad.addmm_(dy.T, x, beta=keep)
        elif dy.is_cuda:
            torch.addmm(grad, dy.T, x, beta=keep, out_dtype=grad.dtype, out=grad)
        else:
            self._merge(dy.T @ x, keep)

    def add(self, grad: torch.Tensor) -> None:
        """grad += a whole gradient."""
        self._merge(grad, 0 if self.unit.is_first(self.operand) else 1)

    def add_sum(self, dy: torch.Tensor) -> None:
        """grad += dy summed over tokens, for dy [tokens, width] and a vector."""
        self.add(dy.sum(0, dtype=self.unit.grads.dtype))

    def add_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """grad[index] += rows, for index [n] and rows [n, columns]; rows that repeat add up, in a fixed order."""
        grad = self.grad
        if self.unit.is_first(self.operand):
            grad.zero_()
        if grad.is_cuda:
            grad.index_put_((index,), rows.to(grad.dtype), accumulate=True)          # index_add_ sums in any order on CUDA
        else:
            grad.index_add_(0, index, rows.to(grad.dtype))                           # in order, and five times as fast

    def _merge(self, grad: torch.Tensor, keep: int) -> None:
        if keep:
            self.grad.add_(grad)
        else:
            self.grad.copy_(grad)
