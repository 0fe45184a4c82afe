"""Rules that torch has no fused kernel of, as their papers write them: from a slice of masters, its gradient and
moments, the direction in which it moves, decay aside, and what its moments become. Nothing is changed in place, so that
a step which is skipped leaves every bit.

    w       master          g    gradient, unscaled and clipped        s    moments, by name
    t       number of the step, from 1, float64 on the device          o    options of the group, `lr` on the device

The direction of a rule that measures is as long as the norms of the whole logical tensor say (`Formulas._ratios`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megazero.plan import RULES, Piece, Tile, tiled
from megazero.units.codes import InBlocks, Moment, agreed
from megazero.units.unit import Unit, chunk

Tensor = torch.Tensor
Moments = Mapping[str, Tensor]
Options = Mapping[str, Any]
Moved = tuple[Tensor, dict[str, Tensor]]


def lion(g: Tensor, s: Moments, t: Tensor, o: Options) -> Moved:
    """Chen et al. 2023 (Symbolic Discovery of Optimization Algorithms), program 1."""
    beta1, beta2 = o["betas"]
    return torch.lerp(g, s["exp_avg"], beta1).sign(), {"exp_avg": torch.lerp(g, s["exp_avg"], beta2)}


def ademamix(g: Tensor, s: Moments, t: Tensor, o: Options) -> Moved:
    """Pagliardini et al. 2024 (The AdEMAMix Optimizer), algorithm 1: Adam with a second, slower mean of gradients. Its
    part `alpha` rises over `alpha_warmup` steps, its decay over `beta3_warmup`: the half-life grows evenly (section
    3)."""
    beta1, beta2, beta3 = o["betas"]
    part = o["alpha"] * ((t / o["alpha_warmup"]).clamp(max=1) if o["alpha_warmup"] else 1)
    slow = _risen(t / o["beta3_warmup"], beta1, beta3) if o["beta3_warmup"] else beta3
    mean, square = torch.lerp(g, s["exp_avg"], beta1), torch.lerp(g * g, s["exp_avg_sq"], beta2)
    far = g + slow * (s["exp_avg_slow"] - g)
    root = (square / (1 - beta2**t)).sqrt() + o["eps"]
    return ((mean / (1 - beta1**t) + part * far) / root,
            {"exp_avg": mean, "exp_avg_slow": far, "exp_avg_sq": square})


def _risen(part: Tensor, low: float, high: float) -> Tensor:
    """From decay `low` to `high`, such that 1 / log(decay) is linear; beyond 1, `high`."""
    a, b = math.log(low), math.log(high)
    return torch.exp(a * b / ((1 - part) * b + part * a)).clamp(max=high)


def lamb(g: Tensor, s: Moments, t: Tensor, o: Options) -> Moved:
    """You et al. 2020 (Large Batch Optimization for Deep Learning), algorithm 2: Adam's direction, as long as the
    tensor itself."""
    beta1, beta2 = o["betas"]
    mean, square = torch.lerp(g, s["exp_avg"], beta1), torch.lerp(g * g, s["exp_avg_sq"], beta2)
    first, second = (1 - beta1**t, 1 - beta2**t) if o["bias_correction"] else (1, 1)
    return mean / first / ((square / second).sqrt() + o["eps"]), {"exp_avg": mean, "exp_avg_sq": square}


def adam(g: Tensor, s: Moments, t: Tensor, o: Options) -> Moved:
    """Kingma and Ba 2015 (Adam), algorithm 1."""
    beta1, beta2 = o["betas"]
    mean, square = torch.lerp(g, s["exp_avg"], beta1), torch.lerp(g * g, s["exp_avg_sq"], beta2)
    root = (square / (1 - beta2**t)).sqrt() + o["eps"]
    return mean / (1 - beta1**t) / root, {"exp_avg": mean, "exp_avg_sq": square}


FORMULAS: Mapping[str, Callable[[Tensor, Moments, Tensor, Options], Moved]] = {
    "adam": adam, "lion": lion, "ademamix": ademamix, "lamb": lamb}


class Portion(NamedTuple):
    """What a rank's slice holds of a logical tensor: [start, stop) of the unit's flat buffer."""

    unit: Unit
    piece: Piece
    start: int
    stop: int


class Kernel(torch.optim.Optimizer):
    """A rule over slices, called as torch's fused kernels are: `found_inf` and `grad_scale` are read from the device,
    and a step that is not to be changes nothing.

    units       whose masters it changes             parts       of its slices, each of one tensor where it matters
    count       of steps that were made
    """

    found_inf: Tensor
    grad_scale: Tensor | None = None
    units: Sequence[Unit]
    parts: Mapping[Tensor, Portion]
    count: Tensor

    def begin(self, units: Sequence[Unit], parts: Mapping[Tensor, Portion], kept: Mapping[str, Mapping[str, Moment]],
              has: Callable[[Piece], bool]) -> None:
        """`kept` of units: their weights and moments; `has`: is a piece this rule's?"""
        self.units, self.parts = units, parts
        self.count = torch.zeros((), dtype=torch.float32, device=units[0].grad_slice.device)

    def gradient(self, grad: Tensor) -> Tensor:
        """Unscaled and clipped; zeros in a step that is not to be."""
        return torch.where(self.found_inf == 0, grad if self.grad_scale is None else grad / self.grad_scale, 0)

    def all(self) -> Iterator[tuple[Tensor, Options]]:
        """Every slice with the options of its group."""
        return ((p, group) for group in self.param_groups for p in group["params"])

    def numbers(self) -> dict[Tensor, int]:
        """Which logical tensor a slice is of, the same number on all ranks."""
        number = {id(piece): i for i, piece in enumerate(piece for unit in self.units for piece in unit.flat.pieces)}
        return {p: number[id(part.piece)] for p, part in self.parts.items()}

    def summed(self, sums: Tensor) -> Tensor:
        """What ranks that hold other elements of the same tensors found, added: over the slices, and over tp."""
        for ranks in (self.units[0].sharing.shard, self.units[0].sharing.tensor):
            ranks.all_reduce(sums).wait()
        return sums


class Formulas(Kernel):
    """A rule's formula over slices."""

    def __init__(self, groups: Sequence[dict[str, Any]], rule: str, options: dict[str, Any]) -> None:
        super().__init__(groups, options)
        self.formula, self.facts = FORMULAS[rule], RULES[rule]
        self.measures = self.facts.scope == "statistics"

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        go, ratios = self.found_inf == 0, self._ratios() if self.measures else {}
        for p, group in self.all():
            for w, g, moments, t in self._chunks(p):
                direction, become = self._direction(w, g, moments, t, group)
                new = w - group["lr"] * ratios.get(p, 1) * direction
                for now, then in ((w, new), *((moments[name], value) for name, value in become.items())):
                    torch.where(go, then, now, out=now)
        self.count.add_(go)

    def _ratios(self) -> dict[Tensor, Tensor]:
        """Of each slice: the norm of its logical tensor over that of its direction, 1 where either is zero. One sum
        over the ranks that hold pieces, of all tensors together."""
        number, tensors = self.numbers(), sum(len(unit.flat.pieces) for unit in self.units)
        squares = torch.zeros(tensors, 2, dtype=torch.float64, device=self.found_inf.device)
        for p, group in self.all():
            for w, g, moments, t in self._chunks(p) if self.parts[p].piece.shard.owner else ():
                moved = self._direction(w, g, moments, t, group)[0]
                squares[number[p]] += torch.stack([(x * x).sum(dtype=torch.float64) for x in (w, moved)])
        norms = self.summed(squares).sqrt()
        ratio = (norms[:, 0] / norms[:, 1]).where(norms.gt(0).all(1), 1)
        return {p: ratio[number[p]].clamp(group["min_coeff"], group["max_coeff"]) for p, group in self.all()}

    def _direction(self, w: Tensor, grad: Tensor, moments: Moments, t: Tensor, group: Options) -> Moved:
        """Decay included."""
        g, decay = self.gradient(grad), group["weight_decay"] * w
        decoupled = group.get("decoupled_weight_decay", True)
        direction, become = self.formula(g if decoupled else g + decay, moments, t, group)
        return direction + decay if decoupled else direction, become

    def _chunks(self, p: Tensor) -> Iterator[tuple[Tensor, Tensor, Moments, Tensor]]:
        """(w, gradient, moments, t) of a slice, a piece at a time."""
        state, w, grad = self.state[p], p.detach(), p.grad
        assert grad is not None
        size = chunk(p.device)
        for a in range(0, len(w), size):
            part = slice(a, a + size)
            yield w[part], grad[part], {name: m[part] for name, m in state.items()}, self.count.double() + 1




class Coded(Formulas):
    """The same where weights or moments are in fewer bytes (codes.py)."""

    def begin(self, units: Sequence[Unit], parts: Mapping[Tensor, Portion], kept: Mapping[str, Mapping[str, Moment]],
              has: Callable[[Piece], bool]) -> None:
        super().begin(units, parts, kept, has)
        kinds = ("weight", *self.facts.moments)
        self.kept = {name: {kind: own[kind] for kind in kinds} for name, own in kept.items()}

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        go, ratios = self.found_inf == 0, self._ratios() if self.measures else {}
        of = {id(part.piece): (p, group) for p, group in self.all() for part in [self.parts[p]]}
        for unit in self.units:
            kept = self.kept[unit.flat.name]
            blocks = {kind: own for kind, own in kept.items() if isinstance(own, InBlocks)}
            largest = {kind: own.nothing() for kind, own in blocks.items()}
            if blocks:                                          # seen once before they are written
                for tile, new in self._new(unit, of, ratios):
                    for kind, own in blocks.items():
                        own.note(largest[kind], tile, new[kind])
                sizes = [len(x) for x in largest.values()]
                both = agreed(torch.cat(list(largest.values())), next(iter(blocks.values())).ranks)
                largest = dict(zip(largest, both.split(sizes), strict=True))
            for tile, new in self._new(unit, of, ratios):
                for kind, own in blocks.items():
                    own.settle(largest[kind], tile, go)
                for kind, moment in kept.items():
                    moment.write(tile, new[kind], go, self.count)
        self.count.add_(go)

    def _new(self, unit: Unit, of: Mapping[int, tuple[Tensor, Options]],
             ratios: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tile, dict[str, Tensor]]]:
        """What weights and moments become, tile by tile."""
        for tile in tiled(unit.flat, unit.low, unit.high, chunk(unit.master.device)):
            p, group = of[id(unit.flat.pieces[tile.piece])]
            w, grad, moments, t = self._numbers(unit, tile)
            direction, become = self._direction(w, grad, moments, t, group)
            yield tile, {"weight": w - group["lr"] * ratios.get(p, 1) * direction, **become}

    def _numbers(self, unit: Unit, tile: Tile) -> tuple[Tensor, Tensor, Moments, Tensor]:
        wide = unit.grad_slice.dtype
        numbers = {kind: own.read(tile).to(wide) for kind, own in self.kept[unit.flat.name].items()}
        at = tile.start - unit.low
        return numbers.pop("weight"), unit.grad_slice[at:at + tile.numel], numbers, self.count.double() + 1

    def _chunks(self, p: Tensor) -> Iterator[tuple[Tensor, Tensor, Moments, Tensor]]:
        unit, piece, _, _ = self.parts[p]
        return (self._numbers(unit, tile) for tile in tiled(unit.flat, unit.low, unit.high, chunk(unit.master.device))
                if unit.flat.pieces[tile.piece] is piece)
