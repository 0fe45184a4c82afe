"""What an engine hangs on a module, and what it puts in the place of tensors that autograd keeps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._compile import _disable_dynamo

from megazero.engine.blocks import Submodule
from megazero.units import Unit

Tensor = torch.Tensor


class Hook:
    """A method of an engine, its owner, as a hook. A copy of the module is not the engine's: there it does nothing."""

    def __init__(self, owner: Any = None, do: Callable[..., Any] | None = None) -> None:
        self.owner, self.do = owner, do

    @_disable_dynamo
    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.do(*given, **named) if self.do else None

    def __reduce__(self) -> Any:
        return Hook, ()


def owner_of(p: Tensor) -> Any:
    """The engine that holds a parameter, trained or frozen, or None."""
    return getattr(getattr(p, "holder", None), "owner", None)


class Handle(NamedTuple):
    """What autograd keeps instead of a tensor that lies in a unit's weights: those of a step, that were published so
    often, in a parameter of that version (if it is one, or a view of it)."""

    block: Submodule
    unit: Unit
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    step: int
    published: int
    parameter: torch.nn.Parameter | None
    version: int

    @property
    def changed(self) -> bool:
        """Did somebody write into these weights since?"""
        version = None if self.parameter is None else self.parameter._version
        return self.unit.published != self.published or version not in (None, self.version)


class Kept(NamedTuple):
    """Any other tensor that autograd saves. Under hooks torch does not see whether it was changed since:
    we do, by its version."""

    tensor: Tensor
    version: int


class Mark(torch.autograd.Function):
    """Hands its tensors on; in backward, once all that read them is done, calls `leave`."""

    @staticmethod
    def forward(ctx: Any, leave: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.leave = leave
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.leave()
        return None, *gradients


def running() -> bool:
    """Does autograd run a backward pass now?"""
    return bool(torch._C._current_graph_task_id() != -1)


def at_its_end(do: Callable[[], None]) -> None:
    """The pass that runs now calls it when all is done; not if it fails."""
    torch.autograd.Variable._execution_engine.queue_callback(do)  # type: ignore[attr-defined]


def reaches(p: Tensor) -> bool:
    """Will the pass that runs now add to the gradient of this parameter?"""
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        node = torch.autograd.graph.get_gradient_edge(p).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:                                        # autograd.grad: it is handed to the caller
        return False
