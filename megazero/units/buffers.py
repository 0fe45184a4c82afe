"""Whole buffers of what a rank keeps its slice of: borrowed for as long as the whole is needed."""

from collections.abc import Hashable

import torch

from megazero.plan import Flat

Tensor = torch.Tensor


class Buffers:
    """Whole buffers that units borrow, each kind for units laid out alike. Made when first needed, and kept:
    a step in the steady state allocates nothing. `poison` fills what is given back with NaN,
    so that a late reader shows (tests)."""

    def __init__(self, poison: bool = False) -> None:
        self.poison = poison
        self.free: dict[Hashable, list[Tensor]] = {}
        self.bytes = 0                                          # of all that were made

    def take(self, kind: Hashable, size: int, like: Tensor) -> Tensor:
        free = self.free.setdefault(kind, [])
        if free:
            return free.pop()
        made = like.new_zeros(size)                             # zeros: nothing ever writes between the operands
        self.bytes += made.nbytes
        return made

    def lose(self, buffer: Tensor) -> None:
        """It is somebody else's from now on."""
        self.bytes -= buffer.nbytes

    def give(self, kind: Hashable, buffer: Tensor, flat: Flat) -> None:
        for o in flat.operands if self.poison else ():
            buffer[o.start:o.stop].fill_(torch.nan)
        self.free[kind].append(buffer)


def viewed(buffer: Tensor) -> bool:
    """Has another tensor its storage too?"""
    storage = buffer.untyped_storage()                          # which counts as one
    return torch._C._storage_Use_Count(storage._cdata) > 2
