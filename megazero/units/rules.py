"""Updates over the slices of the units that a rank updates: the kernels of the rules in plan/rules.py.

AdamW (Loshchilov and Hutter 2019) and SGD with momentum are torch's own fused kernels, one call for all flat buffers
that an update names; the others are formulas (formulas.py). They take the verdict from the device. torch's on CUDA take
the rate in fp32, which is too coarse for fp64: there its plain kernels run, which read rate and step on the host.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megazero.plan import EMA, GROUPS, RULES, beside
from megazero.settings import Optimization
from megazero.units.formulas import FORMULAS, Formulas, Origin
from megazero.units.gate import Verdict
from megazero.units.unit import Unit

Tensor = torch.Tensor
Kernel = Callable[[list[dict[str, Any]], Optimization, bool], torch.optim.Optimizer]


def _adam(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=fused, foreach=False,
                            decoupled_weight_decay=o.decoupled_weight_decay)


def _sgd(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=o.sgd_momentum, fused=fused, foreach=False)


def _lion(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return Formulas(groups, "lion", {"betas": (o.lion_beta1, o.lion_beta2)})


def _ademamix(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return Formulas(groups, "ademamix", {
        "betas": (o.adam_beta1, o.adam_beta2, o.ademamix_beta3), "eps": o.adam_eps, "alpha": o.ademamix_alpha,
        "alpha_warmup": o.ademamix_alpha_warmup, "beta3_warmup": o.ademamix_beta3_warmup})


def _lamb(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return Formulas(groups, "lamb", {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_eps, "bias_correction": True,
                                     "min_coeff": 0.0, "max_coeff": math.inf})


KERNELS: Mapping[str, Kernel] = {"adam": _adam, "sgd": _sgd, "lion": _lion, "ademamix": _ademamix, "lamb": _lamb}


@dataclass(frozen=True)
class Groups:
    """Parameters with rates and options of their own.

    options     of torch's kernel, of each group, without lr; asked anew at each update
    ranges      (number of the group, from, to) of a unit's slice on this rank, all of it
    """

    options: Callable[[], Sequence[Mapping[str, Any]]]
    ranges: Callable[[Unit], list[tuple[int, int, int]]]


def decayed_or_not(o: Optimization) -> Groups:
    """Two groups with one rate: what is decayed, as GROUPS says, and what is not; the tables apart, where their rate
    is decoupled."""
    def number(kind: str) -> int:
        return 2 if kind == "table" and o.decoupled_lr is not None else int(not GROUPS[kind])

    decays = [o.weight_decay, 0.0, *([o.weight_decay] if o.decoupled_lr is not None else [])]
    return Groups(lambda: [{"weight_decay": decay} for decay in decays],
                  lambda unit: [(number(kind), a, b) for kind, a, b in unit.ranges()])


def precise(master: Tensor) -> bool:
    """Do torch's fused kernels compute in the precision of these masters?"""
    return not (master.is_cuda and master.dtype == torch.float64)


def plainly(kernel: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """A step of kernels that know no verdict: if it is skipped, all that they changed is put back."""
    changed = [t for p, state in kernel.state.items() for t in (p, *state.values())]
    before = [t.clone() for t in changed]
    kernel.step()
    for now, old in zip(changed, before, strict=True):
        now.copy_(torch.where(found_inf == 0, now, old))


class Updater:
    """Changes masters. `state[unit][moment]` is a flat buffer beside the master it belongs to: the whole or a slice."""

    def __init__(self, units: Sequence[Unit], o: Optimization, together: Iterable[tuple[str, ...]],
                 groups: Groups | None = None) -> None:
        """`together`: the units of each update, which are one kernel call. `groups`: default, decayed or not."""
        self.units, self.settings, self.groups = {u.flat.name: u for u in units}, o, groups or decayed_or_not(o)
        self.state = {name: {kind: torch.zeros_like(u.master) for kind in beside(o)}
                      for name, u in self.units.items()}
        self.steps: list[Tensor] = []
        master = units[0].master if units else torch.zeros(0)
        self.wide, self.fused = master.dtype, precise(master) or o.optimizer in FORMULAS
        self.lr = torch.zeros(len(self.groups.options()), dtype=self.wide, device=master.device)
        self.kernels = {names: self._kernel([self.units[n] for n in names]) for names in together if names}

    def update(self, names: tuple[str, ...], verdict: Verdict, lr: Tensor) -> None:
        """Updates the masters of these units, or leaves every bit as it was. `lr` is of each group, or of all."""
        kernel: Any = self.kernels[names]
        self.lr.copy_(lr)
        options = self.groups.options()
        for group in kernel.param_groups:
            group.update(options[group["number"]])
        if self.wide == torch.float64:                        # the kernels take the factor in fp32: too coarse for fp64
            # NaN would stay in the padding between operands
            factor = torch.where(verdict.found_inf == 0, verdict.factor, 0)
            for name in names:
                self.units[name].grad_slice.mul_(factor)
        else:
            kernel.grad_scale = (1 / verdict.factor).float()
        with torch.no_grad():
            if self.fused:
                kernel.found_inf = verdict.found_inf
                kernel.step()
            else:
                plainly(kernel, verdict.found_inf)
            decay = self.settings.ema
            for name in names if decay is not None else ():
                mean, master = self.state[name][EMA], self.units[name].master
                mean.copy_(torch.where(verdict.found_inf == 0, torch.lerp(master, mean, decay or 0.0), mean))

    def begin_means(self) -> None:
        """The means of the weights are the weights."""
        for name, unit in self.units.items():
            self.state[name][EMA].copy_(unit.master)

    @contextmanager
    def means(self) -> Iterator[None]:
        """Within, the weights are their means, where those are kept: evaluations see them."""
        if self.settings.ema is None:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, unit in self.units.items():
            unit.updated()
            mean, before = self.state[name][EMA], unit.master.clone()
            unit.master.copy_(mean)
            mean.copy_(before)
            unit.publish()

    def set_steps(self, applied: int) -> None:
        """Continues after `applied` steps: Adam's bias correction counts from there."""
        for step in self.steps:
            step.fill_(applied)

    def _kernel(self, units: Sequence[Unit]) -> torch.optim.Optimizer:
        """Over views of our flat buffers, its state too, from the start: a first step that is skipped leaves zeros."""
        options, measures = self.groups.options(), RULES[self.settings.optimizer].scope == "statistics"
        slices = [(i, unit, a, b) for i in range(len(options)) for unit in units
                  for number, low, high in self.groups.ranges(unit) if number == i
                  for a, b in (_pieces(unit, low, high) if measures else [(low, high)])]
        params = [unit.master[a:b].detach().requires_grad_() for _, unit, a, b in slices]   # so torch knows a parameter
        for p, (_, unit, a, b) in zip(params, slices, strict=True):
            p.grad = unit.grad_slice[a:b]
        groups = [{**given, "number": i, "params": [p for p, s in zip(params, slices, strict=True) if s[0] == i]}
                  for i, given in enumerate(options)]
        kernel = KERNELS[self.settings.optimizer]([g for g in groups if g["params"]], self.settings, self.fused)
        for group in kernel.param_groups:                       # given to the constructor, it would be read by the host
            group["lr"] = self.lr[group["number"]]
        for p, (_, unit, a, b) in zip(params, slices, strict=True):
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.steps.append(step)
            state = self.state[unit.flat.name]
            kernel.state[p] = {"step": step, **{m: state[m][a:b] for m in RULES[self.settings.optimizer].moments}}
        if measures and isinstance(kernel, Formulas):
            number = {piece: i for i, piece in enumerate(piece for unit in units for piece in unit.flat.pieces)}
            of = [next(piece for piece, low, high in unit.pieces() if low <= a < high) for _, unit, a, _ in slices]
            kernel.origins = {p: Origin(number[piece], piece.shard.owner) for p, piece in zip(params, of, strict=True)}
            kernel.tensors, sharing = len(number), units[0].sharing
            kernel.ranks = sharing.shard, sharing.tensor
        return kernel


def _pieces(unit: Unit, low: int, high: int) -> list[tuple[int, int]]:
    """(from, to) of each logical tensor's elements in a part of a unit's slice."""
    return [(max(a, low), min(b, high)) for _, a, b in unit.pieces() if max(a, low) < min(b, high)]
