"""What somebody else's checkpoint holds: tensors that are read when their turn comes, and words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megazero.plan import Shape

Tensor = torch.Tensor
Read = Callable[[Path], Any]            # a file of torch.save -> what it holds, its tensors mapped, its objects Stubs


class Stub:
    """Stands for an object of somebody's class: it keeps what the file says of it, and does nothing."""

    said: Any = ()
    state: Any = None

    def __new__(cls, *said: Any, **more: Any) -> "Stub":
        made = object.__new__(cls)
        made.said = said
        return made

    def __init__(self, *said: Any, **more: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"an object of another program{self.said or ''}"

    def __setstate__(self, state: Any) -> None:
        self.state = state


def words_of(value: Any) -> dict[str, Any]:
    """The fields of a namespace or a mapping."""
    found = value.state if isinstance(value, Stub) else value
    return {key: v for key, v in found.items() if isinstance(key, str)} if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is known before it is read. `parts` are those that lie side by side in it along dimension 0."""

    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    parts: "tuple[Lazy, ...]" = ()

    def fill(self, out: Tensor) -> None:
        """Reads it into a tensor of its shape, part by part."""
        at = 0
        for part in self.parts:
            part.fill(out[at:at + part.shape[0]])
            at += part.shape[0]
        if not self.parts:
            out.copy_(self.read())

    def but(self, change: Callable[[Tensor], Tensor], shape: Shape | None = None) -> "Lazy":
        """The same with something done to it, of this shape then."""
        return Lazy(self.shape if shape is None else shape, self.dtype, lambda: change(self.read()))


def here(tensor: Tensor) -> Lazy:
    """One that is mapped or in memory."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def side_by_side(parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    """Side by side along a dimension; the others are alike."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return Lazy(tuple(shape), parts[0].dtype, lambda: torch.cat([p.read() for p in parts], dim),
                () if dim else tuple(parts))


Tensors = dict[str, Lazy]


@dataclass
class Source:
    """
    path        the folder or file
    weights     by their names
    moments     exp_avg, exp_avg_sq -> by the names of their weights
    words       what it says of its model and its training, as its format does
    step        optimizer steps that it has behind it; `samples` they took
    notes       what was left behind, a sentence each
    """

    path: Path
    weights: Tensors
    moments: dict[str, Tensors] = field(default_factory=dict)
    words: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    samples: int = 0
    notes: list[str] = field(default_factory=list)
