"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of a whole logical matrix, made
nearly orthogonal, is its update.

Momentum stays in slices. Each matrix is gathered by one rank of those that share its unit (plan/dealing.py), iterated
there once, and given back: the same numbers in any layout. While one wave of matrices is iterated the next one travels
there, and the one before travels back. They travel in the dtype of the iteration.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from megazero.comm import Work
from megazero.plan import Box, Matrix, Piece, Ranks, Wave, deal, iterating
from megazero.units.codes import Moment
from megazero.units.formulas import Kernel, Portion
from megazero.units.unit import TORCH_DTYPE, Unit

Tensor = torch.Tensor

EPS = 1e-7              # least norm that a matrix is divided by: one of zeros stays so
# a, b, c of X <- a X + (b A + c A^2) X, where A = X Xt: of the first iteration, the second ..., then from the first on
COEFFICIENTS: Mapping[str, Sequence[tuple[float, float, float]]] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))}
# what the orthogonal update of a matrix [out, in] is multiplied by
SCALES: Mapping[str, Callable[[int, int], float]] = {
    "spectral": lambda out, into: max(out, into) ** 0.5,
    "unit_rms_norm": lambda out, into: (out / into) ** 0.5,
    "shape_scaling": lambda out, into: max(1.0, out / into) ** 0.5}


def orthogonal(x: Tensor, steps: int, coefficients: str) -> Tensor:
    """Newton-Schulz iterations on x [rows, columns], in its dtype: singular values come near 1."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = (x.to(wide) / x.norm(dtype=wide).clamp(min=EPS)).to(x.dtype)
    tall, table = x.shape[0] > x.shape[1], COEFFICIENTS[coefficients]
    x = x.T if tall else x
    for i in range(steps):
        a, b, c = table[i % len(table)]
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(Kernel):
    """Over the matrices of the units of one update. Options of a group: momentum, nesterov, ns_steps, coefficients,
    scale_mode, extra_scale_factor, ns_dtype."""

    def begin(self, units: Sequence[Unit], parts: Mapping[Tensor, Portion], kept: Mapping[str, Mapping[str, Moment]],
              has: Callable[[Piece], bool]) -> None:
        super().begin(units, parts, kept, has)
        sharing, like = units[0].sharing, units[0].grad_slice
        dtype = "fp64" if like.dtype == torch.float64 else "fp32"
        self.dtype = TORCH_DTYPE[iterating(self.param_groups[0]["ns_dtype"], dtype, like.device.type)]
        self.group = sharing.stage
        self.ranks = Ranks(sharing.replicate.size, sharing.shard.size, sharing.tensor.size)
        assert self.group.size == self.ranks.all, "a stage is all ranks that share its units"
        self.waves = deal([(u.flat, u.size) for u in self.units], self.ranks, has)
        self.mine = {part.piece.shard.parameter.name: (p, part) for p, part in self.parts.items()}
        self.none = torch.zeros(0, dtype=self.dtype, device=like.device)

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        options = dict(self.all())
        going: tuple[Wave, Work] | None = None
        coming: tuple[Wave, Work] | None = None
        for wave in (*self.waves, (), ()):                      # one goes, one is iterated, one lands
            gone = (wave, self._there(wave, options)) if wave else None
            back = (going[0], self._back(going[0], going[1].wait())) if going else None
            if coming:
                self._apply(coming[0], coming[1].wait(), options)
            going, coming = gone, back
        self.count.add_(self.found_inf == 0)

    def _there(self, wave: Wave, options: Mapping[Tensor, Any]) -> Work:
        """Momentum moves, and what the workers need begins to travel."""
        rank, out, given = self.group.rank, [0] * self.ranks.all, list[Tensor]()
        for matrix in wave:
            if matrix.name not in self.mine:
                continue
            p, part = self.mine[matrix.name]
            moved = self._direction(p, options[p])
            given += [_range(moved, part, at, box) for at, box in matrix.sent(rank, self.ranks)]
            out[matrix.worker] = _count(matrix.sent(rank, self.ranks))
        own = self._own(wave)
        back = [_count(own.sent(r, self.ranks)) if own else 0 for r in range(self.ranks.all)]
        return self.group.all_to_all(torch.cat(given) if given else self.none, out, back, "muon")

    def _direction(self, p: Tensor, o: Mapping[str, Any]) -> Tensor:
        assert p.grad is not None
        momentum, g = self.state[p]["momentum_buffer"], self.gradient(p.grad)
        now = torch.lerp(g, momentum, o["momentum"])
        moved = torch.lerp(g, now, o["momentum"]) if o["nesterov"] else now
        torch.where(self.found_inf == 0, now, momentum, out=momentum)
        return moved.to(self.dtype)

    def _back(self, wave: Wave, arrived: Tensor) -> Work:
        """This rank's matrix of the wave is iterated, and travels back."""
        rank, own = self.group.rank, self._own(wave)
        back = [0] * self.ranks.all
        for matrix in wave:
            back[matrix.worker] = _count(matrix.held(rank, self.ranks))
        if own is None:
            return self.group.all_to_all(self.none, [0] * self.ranks.all, back, "muon")
        held, whole = [own.held(r, self.ranks) for r in range(self.ranks.all)], arrived.new_empty(own.shape)
        boxes = [box for r in range(self.ranks.all) for _, box in own.sent(r, self.ranks)]
        for box, part in zip(boxes, arrived.split([box.numel for box in boxes]), strict=True):
            whole[box.slices] = part.view(box.size)
        first = self.param_groups[0]                            # of all groups: ns_steps and coefficients are the run's
        made = orthogonal(whole.view(own.shape[0], -1), first["ns_steps"], first["coefficients"]).view(own.shape)
        given = torch.cat([made[box.slices].flatten() for boxes in held for _, box in boxes])
        return self.group.all_to_all(given, [_count(boxes) for boxes in held], back, "muon")

    def _apply(self, wave: Wave, arrived: Tensor, options: Mapping[Tensor, Any]) -> None:
        """w <- (1 - lr decay) w - lr scale update, of what this rank holds."""
        at, go = 0, self.found_inf == 0
        for matrix in (m for m in wave if m.name in self.mine):
            (p, part), rows = self.mine[matrix.name], matrix.shape[0]
            o = options[p]
            scale = o["extra_scale_factor"] * SCALES[o["scale_mode"]](rows, matrix.numel // rows)
            for start, box in matrix.held(self.group.rank, self.ranks):
                w, update = _range(p.detach(), part, start, box), arrived[at:at + box.numel].to(p.dtype)
                torch.where(go, w - o["lr"] * (scale * update + o["weight_decay"] * w), w, out=w)
                at += box.numel

    def _own(self, wave: Wave) -> Matrix | None:
        return next((m for m in wave if m.worker == self.group.rank), None)


def _range(x: Tensor, part: Portion, start: int, box: Box) -> Tensor:
    """Of a part's elements those of a box, which begin at `start` of the flat buffer."""
    return x[start - part.start:start - part.start + box.numel]


def _count(boxes: Iterable[tuple[int, Box]]) -> int:
    return sum(box.numel for _, box in boxes)
