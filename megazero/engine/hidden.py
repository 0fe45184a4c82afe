"""What a parameter answers while its weights or its gradient are elsewhere: one sentence, and no wrong number."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from megazero.base import UserError

Tensor = torch.Tensor
# what may be asked of it all the same: nothing here reads a weight
ASKED = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size,
         torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.requires_grad_, torch.Tensor.__hash__,
         torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook, torch.is_floating_point,
         torch.is_complex, torch.numel, torch.Tensor.__dir__}
INSTEAD = "read or write them within engine.whole(parameter), on all ranks, or in the module's own forward pass."
READ: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
WRITE: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Hidden(nn.Parameter):
    """A parameter whose weights are not here, of their shape all the same. `fetch` gets them, where one may read them
    without a word (the model's own forward pass), and leaves others that are wanted with them; `store` takes whole ones
    in their place, where that may be."""

    words: str
    fetch: Callable[[Sequence[nn.Parameter]], bool]
    store: Callable[[Tensor], bool]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED or (type(func).__name__ == "method-wrapper" and func not in (READ, WRITE)):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        wanted = [x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)]
        hidden: Any = next(x for x in wanted if isinstance(x, Hidden))
        if hidden.fetch(wanted):
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:                         # state_dict lists it; whoever reads that is told
            return nothing(hidden, hidden.words)
        if func in (torch.Tensor.copy_, WRITE) and args[0] is hidden and hidden.store(args[1]):
            return hidden
        raise UserError(hidden.words)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of shape {tuple(self.size())} whose weights are not here"

    def __deepcopy__(self, memo: Any) -> Any:
        if self.fetch([self]):
            return copy.deepcopy(self, memo)
        raise UserError(self.words)


class Away(Tensor):
    """In the place of a gradient that the engine has taken, or of weights that are listed and not here."""

    words: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED or type(func).__name__ == "method-wrapper":
            return super().__torch_function__(func, types, args, kwargs or {})
        raise UserError(next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Away)).words)

    def __repr__(self) -> str:  # type: ignore[override]
        return self.words


def hide(p: nn.Parameter, name: str, empty: Tensor, fetch: Callable[[Sequence[nn.Parameter]], bool],
         store: Callable[[Tensor], bool], instead: str = INSTEAD) -> None:
    """Its data becomes `empty`, of its shape; whoever reads it is told, unless it can be fetched."""
    p.__class__ = nn.Parameter
    p.data = empty
    p.__class__ = Hidden
    p.fetch, p.store = fetch, store  # type: ignore[attr-defined]
    p.ds_shape, p.ds_numel = empty.shape, empty.numel()  # type: ignore[attr-defined]
    p.words = f"{name}: its weights are not whole here now; {instead}"  # type: ignore[attr-defined]


def nothing(p: nn.Parameter, words: str) -> Away:
    """Of its shape and dtype, and holds nothing."""
    empty = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.size()).as_subclass(Away)
    empty.words = words
    return empty


def away(p: nn.Parameter, name: str) -> Away:
    """What stands for its gradient."""
    return nothing(p, f"{name}: its gradient is in the engine, summed with those of other ranks; let the engine clip "
                      "it (clip_grad), read engine.get_global_grad_norm(), or change it in a hook of the parameter.")


def show(p: nn.Parameter, kind: type, whole: Tensor) -> None:
    """Its data is there again; `kind` is its class."""
    p.__class__ = kind
    p.data = whole


def forget(p: nn.Parameter) -> None:
    """Whoever has its data keeps them from now on."""
    for word in ("words", "fetch", "store", "ds_shape", "ds_numel", "holder"):
        p.__dict__.pop(word, None)
