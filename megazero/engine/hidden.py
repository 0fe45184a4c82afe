"""What a parameter answers while its weights or its gradient are elsewhere: one sentence, and no wrong number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megazero.base import UserError

Tensor = torch.Tensor
# what may be asked of it all the same: nothing here reads a weight
ASKED = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size,
         torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.requires_grad_, torch.Tensor.__hash__,
         torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook, torch.is_floating_point,
         torch.is_complex, torch.numel, torch.Tensor.__dir__}
INSTEAD = "read or write them within engine.whole(parameter), on all ranks, or in the module's own forward pass."
READ: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Hidden(nn.Parameter):
    """A parameter whose weights are not here. `ds_shape` and `ds_numel` say what they will be; `fetch` gets them, where
    one may read them without a word (the model's own forward pass)."""

    words: str
    fetch: Callable[[], bool]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED or (type(func).__name__ == "method-wrapper" and func != READ):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        hidden = _first(Hidden, (args, kwargs))
        if func is torch.Tensor.detach:                         # state_dict lists it; whoever reads that is told
            return hidden
        if hidden.fetch():
            return func(*args, **(kwargs or {}))
        raise UserError(hidden.words)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of shape {tuple(getattr(self, 'ds_shape', ()))} whose weights are not here"

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError(self.words)


class Away(Tensor):
    """In the place of a gradient that the engine has taken."""

    words: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED or type(func).__name__ == "method-wrapper":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise UserError(_first(Away, (args, kwargs)).words)

    def __repr__(self) -> str:  # type: ignore[override]
        return self.words


def _first(kind: type, given: Any) -> Any:
    """The first tensor of a kind among arguments."""
    if isinstance(given, kind):
        return given
    parts = given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else ()
    return next((found for part in parts if (found := _first(kind, part)) is not None), None)


def hide(p: nn.Parameter, name: str, empty: Tensor, fetch: Callable[[], bool], instead: str = INSTEAD) -> None:
    """Its data becomes `empty`; whoever reads it is told, unless it can be fetched."""
    p.data = empty
    p.__class__ = Hidden
    p.fetch = fetch  # type: ignore[attr-defined]
    p.words = f"{name}: its weights are not whole here now; {instead}"  # type: ignore[attr-defined]


def away(p: nn.Parameter, name: str) -> Away:
    """What stands for its gradient, of its shape and dtype, and holds nothing."""
    empty = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.size()).as_subclass(Away)
    empty.words = (f"{name}: its gradient is in the engine, summed with those of other ranks; let the engine clip it "
                   "(clip_grad), read engine.get_global_grad_norm(), or change it in a hook of the parameter.")
    return empty


def show(p: nn.Parameter, kind: type, whole: Tensor) -> None:
    """Its data is there again; `kind` is its class."""
    p.__class__ = kind
    p.data = whole
