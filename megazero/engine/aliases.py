"""Tensors that a module keeps beside its parameters, in the memory of those: in plain torch they change with them, here
they cannot, for weights move into units."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from megazero.engine.sliced import sliced

Tensor = torch.Tensor


def doubles(model: nn.Module) -> Iterator[str]:
    """Parameters that lie in each other's memory and are not one, which an optimizer would change twice."""
    placed = sorted((*_place(p), n) for n, p in model.named_parameters() if _lies(p) and not sliced([p]))
    for (low, high, one), (start, _, other) in zip(placed, placed[1:], strict=False):
        if low <= start < high:
            yield (f"model: {other} and {one} are two parameters in the same memory; make them one "
                   f"(module.weight = other.weight), or clone its data.")


def kept(model: nn.Module) -> Iterator[str]:
    """Attributes and buffers that are views of a parameter's data, by name: (attribute, parameter)."""
    owners = {memory: n for n, p in model.named_parameters() for memory in _memories(p)}
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()) if owners else ():
            for t in _tensors([value]) if key not in ("_parameters", "_buffers", "_modules") else ():
                if (owner := owners.get(t.untyped_storage()._cdata)) is not None:
                    yield (f"model: {f'{name}.{key}'.strip('.')} is a view of {owner}, whose weights move: it keeps "
                           "what it holds now; read the parameter itself where that is not meant")


def _lies(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta and t.numel() > 0


def _place(t: Tensor) -> tuple[int, int]:
    """(from, to), addresses of its bytes."""
    span = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + span * t.element_size()


def _memories(p: nn.Parameter) -> Iterator[int]:
    """Storages that are its data or, with zero.Init, were while it was whole, if they live."""
    homes = sliced([p])
    for home in homes:
        yield from (ref.cdata for ref in home.seen if not ref.expired())
    if not homes and _lies(p):
        yield p.untyped_storage()._cdata


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and _lies(t)]
