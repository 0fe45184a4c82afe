"""The three matrix products of an operation that reads a weight: forward, its input's gradient, the weight's gradient.

The last one is computed now; or, where backward is split, its operands are put aside for the W to come. What else an
operation adds to gradients in the meantime (biases, norms) waits with it, so that W alone writes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megazero.comm import Work
from megazero.units import Weight

Tensor = torch.Tensor


def product(x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """[t, i] -> [t, o]."""
    return F.linear(x, weight.value, bias.value if bias else None)


def input_gradient(dy: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """[t, o] -> [t, i]."""
    return torch.mm(dy, weight.value, out=out)


def weight_gradient(dy: Tensor, x: Callable[[], Work], weight: Weight) -> Callable[[], None]:
    """grad += dyT x, for dy [t, o] and x [t, i], which begins to travel here if it must; the call that is returned
    waits for it and multiplies. Put aside, both happen in W."""

    def begin() -> Callable[[], None]:
        travelling = x()
        return lambda: weight.add_product(dy, travelling.wait())

    return weight.unit.now_or_later(begin)
