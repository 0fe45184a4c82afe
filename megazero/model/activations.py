"""What an MLP does between its matrices, by the words of `Architecture.activation`: [t, o], or of gated ones
[t, 2 o] of gate and up side by side, -> [t, o]."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
aten = torch.ops.aten


def gated(x: Tensor, function: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
    """function(gate) x up (Shazeer 2020). `backward` takes the gradient, the gate, and where to write."""
    return _Gated.apply(x, function, backward)


class _Gated(torch.autograd.Function):
    """It keeps x alone: function(gate) is made again in backward, and both gradients are written side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.derived = function, backward
        gate, up = x.chunk(2, -1)
        return function(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        (gate, up), (dgate, dup) = x.chunk(2, -1), dx.chunk(2, -1)
        torch.mul(dy, ctx.function(gate), out=dup)
        ctx.derived(dy * up, gate, grad_input=dgate)
        return dx, None, None


def _gelu(approximate: str) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
    return (partial(F.gelu, approximate=approximate),
            partial(aten.gelu_backward.grad_input, approximate=approximate))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": lambda x: gated(x, F.silu, aten.silu_backward.grad_input),
    "geglu": lambda x: gated(x, *_gelu("none")),
    "geglu_tanh": lambda x: gated(x, *_gelu("tanh")),
}
