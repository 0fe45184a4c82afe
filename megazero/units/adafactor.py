"""Adafactor (Shazeer and Stern 2018, algorithms 4 to 6), as torch.optim.Adafactor has it: of a matrix's second moment
the means of its rows and of its columns are kept.

Nothing is gathered: rows and columns are whole on every rank, and ranks that hold pieces add what they see of them,
once in an update for all tensors together; a second sum measures the updates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch

from megazero.plan import Box, Piece
from megazero.units.codes import Moment
from megazero.units.formulas import Kernel, Portion
from megazero.units.unit import Unit, chunk

Tensor = torch.Tensor


class Adafactor(Kernel):
    """Options of a group: beta2_decay, d, eps (least second moment, default that of the dtype; least root mean square
    of a weight). `factors`: row and column means of tensors, by name."""

    def begin(self, units: Sequence[Unit], parts: Mapping[Tensor, Portion], kept: Mapping[str, Mapping[str, Moment]],
              has: Callable[[Piece], bool]) -> None:
        super().begin(units, parts, kept, has)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for own in kept.values():
            rows, columns = ({} if kind not in own else {
                p.shard.parameter.name: own[kind].part(p.start, p.stop).view(p.shard.parameter.shape)
                for p in own[kind].flat.pieces} for kind in ("row_var", "col_var"))
            self.factors |= {name: (rows[name], columns[name]) for name in rows}

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        options, t, go = dict(self.all()), self.count.double() + 1, self.found_inf == 0
        new = t ** self.param_groups[0]["beta2_decay"]          # what the moments take of this step
        squares = self._measure()
        for name, (rows, columns) in self.factors.items():
            _, by_row, by_column = squares[name]
            for mean, total, count in ((rows, by_row, columns.shape[-1]), (columns, by_column, rows.shape[-1])):
                torch.where(go, torch.lerp(mean.double(), total / count, new).to(mean.dtype), mean, out=mean)
        for p, part in self.parts.items():
            if _flat(part.piece):
                variance, g = self.state[p]["variance"], self.gradient(self._grad(p))
                torch.where(go, torch.lerp(variance, g * g, new.to(g.dtype)), variance, out=variance)
        updates = self._lengths(options)
        for p, w, g, box in self._boxes():
            o, shape = options[p], self.parts[p].piece.shard.parameter.shape
            root = {what: (total / prod(shape)).sqrt() for what, total in (
                ("weight", squares[self._name(p)][0]), ("update", updates[self._name(p)]))}
            rate = torch.minimum(o["lr"].double(), t.rsqrt()) * root["weight"].clamp(min=o["eps"][1])
            length = rate / (root["update"] / o["d"]).clamp(min=1)
            moved = w - o["lr"] * o["weight_decay"] * w - length.to(w.dtype) * self._update(p, g, box, o)
            torch.where(go, moved, w, out=w)
        self.count.add_(go)

    def _measure(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Of each logical tensor, over all ranks: the sum of its squares, and of its gradient's by row and by column
        (of a vector: none)."""
        shapes = {name: (torch.Size([]), *(x.shape for x in self.factors.get(name, ()))) for name in self._tensors()}
        sizes = [prod(shape) for each in shapes.values() for shape in each]
        sums = torch.zeros(sum(sizes), dtype=torch.float64, device=self.count.device)
        parts = iter(sums.split(sizes))
        views: dict[str, Any] = {name: [next(parts).view(shape) for shape in each] for name, each in shapes.items()}
        for p, w, g, box in self._boxes():
            if not self.parts[p].piece.shard.owner:
                continue
            own = views[self._name(p)]
            own[0] += w.square().sum(dtype=torch.float64)
            if len(own) > 1:
                square = g.square()
                own[1][box.slices[:-1]] += square.sum(-1, dtype=torch.float64)
                own[2][_columns(box)] += square.sum(-2, dtype=torch.float64)
        self.summed(sums)
        return views

    def _lengths(self, options: Mapping[Tensor, Any]) -> dict[str, Tensor]:
        """Of each logical tensor the sum of its update's squares, over all ranks."""
        names = self._tensors()
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.count.device)
        views = dict(zip(names, sums, strict=True))
        for p, _, g, box in self._boxes():
            if self.parts[p].piece.shard.owner:
                views[self._name(p)] += self._update(p, g, box, options[p]).square().sum(dtype=torch.float64)
        self.summed(sums)
        return views

    def _update(self, p: Tensor, g: Tensor, box: Box, o: Mapping[str, Any]) -> Tensor:
        """Gradients by the root of their second moment."""
        least = o["eps"][0] or torch.finfo(g.dtype).eps
        if _flat(self.parts[p].piece):
            part = self.parts[p]
            first = part.piece.start + box.offset[0] - part.piece.shard.box.offset[0] - part.start
            second = self.state[p]["variance"][first:first + box.numel].view(box.size)
        else:
            rows, columns = self.factors[self._name(p)]
            mean = rows.mean(-1, keepdim=True)[box.slices[:-2]].clamp(min=least)
            second = (rows[box.slices[:-1]].unsqueeze(-1) * columns[_columns(box)].unsqueeze(-2)
                      / mean.unsqueeze(-1))
        return second.clamp(min=least * least).rsqrt() * g

    def _boxes(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Box]]:
        """(slice, weights, gradient, box) of what is here, a piece at a time, in its tensor's dimensions."""
        for p, part in self.parts.items():
            grad, size = self._grad(p), chunk(p.device)
            for low in range(part.start, part.stop, size):
                for at, box in part.piece.boxes(low, min(low + size, part.stop)):
                    here = slice(at - part.start, at - part.start + box.numel)
                    yield p, p.detach()[here].view(box.size), self.gradient(grad[here]).view(box.size), box

    def _tensors(self) -> list[str]:
        return [piece.shard.parameter.name for unit in self.units for piece in unit.flat.pieces]

    def _name(self, p: Tensor) -> str:
        return self.parts[p].piece.shard.parameter.name

    @staticmethod
    def _grad(p: Tensor) -> Tensor:
        assert p.grad is not None
        return p.grad


def _columns(box: Box) -> tuple[slice, ...]:
    return (*box.slices[:-2], box.slices[-1])


def _flat(piece: Piece) -> bool:
    return len(piece.shard.parameter.shape) == 1
