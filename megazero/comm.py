"""The only file that talks to other ranks. One is a size: a group of one hands back what it is given."""

from typing import Protocol

import torch


class Group(Protocol):
    """The ranks of one axis of the mesh. Tensors are contiguous; dimension 0 is what is gathered and scattered."""

    size: int
    rank: int

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] on each rank -> [size n, ...] on all, in rank order."""

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """[size n, ...] on each rank -> [n, ...]: this rank's part of the sum."""

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """The sum (or `max`) over the ranks, in place; returns x."""


class Alone:
    """A group of one rank."""

    size = 1
    rank = 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        return x
