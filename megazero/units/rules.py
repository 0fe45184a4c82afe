"""Updates over the slices of the units that a rank updates: the kernels of the rules in plan/rules.py.

AdamW (Loshchilov and Hutter 2019) and SGD with momentum are torch's own fused kernels, one call for all flat buffers
that an update names; the others are our own kernels (formulas.py, adafactor.py, muon.py). All take the verdict from
the device. torch's on CUDA take the rate in fp32, which is too coarse for fp64: there its plain kernels run, which read
rate and step on the host.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megazero.plan import (
    EMA,
    GRADIENTS,
    RULES,
    STATE,
    WEIGHTS,
    Piece,
    Reach,
    coded,
    dtype_of,
    group_of,
    moment_specs,
    spans,
)
from megazero.settings import Optimization
from megazero.units.adafactor import Adafactor
from megazero.units.codes import ByChance, Moment, moment
from megazero.units.formulas import Coded, Formulas, Kernel, Portion
from megazero.units.gate import Verdict
from megazero.units.muon import Muon
from megazero.units.random import key
from megazero.units.unit import Unit

Tensor = torch.Tensor
Make = Callable[[list[dict[str, Any]], Optimization, bool], torch.optim.Optimizer]


def _adam(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=fused, foreach=False,
                            decoupled_weight_decay=o.decoupled_weight_decay)


def _sgd(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=o.sgd_momentum, fused=fused, foreach=False)


def _muon(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return Muon(groups, {"momentum": o.muon_momentum, "nesterov": o.muon_nesterov, "ns_steps": o.muon_num_ns_steps,
                         "coefficients": o.muon_coefficient_type, "scale_mode": o.muon_scale_mode,
                         "extra_scale_factor": o.muon_extra_scale_factor, "ns_dtype": o.muon_ns_dtype})


def _adafactor(groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    return Adafactor(groups, {"beta2_decay": o.adafactor_decay, "d": o.adafactor_clip, "eps": (None, o.adafactor_eps)})


KERNELS: Mapping[str, Make] = {"adam": _adam, "sgd": _sgd, "adafactor": _adafactor, "muon": _muon}
# of formulas
OPTIONS: Mapping[str, Callable[[Optimization], dict[str, Any]]] = {
    "adam": lambda o: {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_eps,
                       "decoupled_weight_decay": o.decoupled_weight_decay},
    "lion": lambda o: {"betas": (o.lion_beta1, o.lion_beta2)},
    "lamb": lambda o: {"betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_eps, "bias_correction": True,
                       "min_coeff": 0.0, "max_coeff": math.inf},
    "ademamix": lambda o: {"betas": (o.adam_beta1, o.adam_beta2, o.ademamix_beta3), "eps": o.adam_eps,
                           "alpha": o.ademamix_alpha, "alpha_warmup": o.ademamix_alpha_warmup,
                           "beta3_warmup": o.ademamix_beta3_warmup}}


def kernel_of(rule: str, groups: list[dict[str, Any]], o: Optimization, fused: bool) -> torch.optim.Optimizer:
    """The kernel of a rule."""
    if coded(o):
        return Coded(groups, rule, OPTIONS[rule](o))
    return KERNELS[rule](groups, o, fused) if rule in KERNELS else Formulas(groups, rule, OPTIONS[rule](o))


@dataclass(frozen=True)
class Groups:
    """Parameters with rules, rates and options of their own, by number.

    number      of the group that a piece belongs to
    rules       of each group
    rates       which of an update's rates each group has
    options     of torch's kernel, of each group, without lr; asked anew at each update
    """

    number: Callable[[Piece], int]
    rules: Sequence[str]
    rates: Sequence[int]
    options: Callable[[], Sequence[Mapping[str, Any]]]

    def rule(self, piece: Piece) -> str:
        return self.rules[self.number(piece)]


def groups_of(o: Optimization, units: Iterable[Unit]) -> Groups:
    """Those of plan/rules.py: what has one rule and rate, and is decayed or not."""
    parameters = [piece.shard.parameter for u in units for piece in u.flat.pieces]
    of = {p.name: group_of(p.name, p.group, o) for p in parameters}
    found = list(dict.fromkeys(of.values()))
    return Groups(lambda piece: found.index(of[piece.shard.parameter.name]), [g.rule for g in found],
                  [g.rate for g in found], lambda: [{"weight_decay": o.weight_decay * g.decayed} for g in found])


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
    """Changes masters. `state[unit][kind]` is what is kept beside them."""

    def __init__(self, units: Sequence[Unit], o: Optimization, together: Iterable[tuple[str, ...]],
                 groups: Groups | None = None, seed: int = 0) -> None:
        """`together`: the units of each update. `groups`: default, those of the settings. `seed`: of what is rounded by
        chance."""
        self.units, self.settings, self.seed = {u.flat.name: u for u in units}, o, seed
        self.groups = groups or groups_of(o, units)
        self.state = {name: self._beside(u) for name, u in self.units.items()}
        self.steps: list[Tensor] = []
        like = units[0].grad_slice if units else torch.zeros(0)
        self.wide, self.fused = like.dtype, precise(like)
        self.lr = torch.zeros(len(self.groups.rules), dtype=self.wide, device=like.device)
        self.rates = torch.tensor(self.groups.rates, device=like.device)
        self.kernels = {names: {span: self._kernels([self.units[n] for n in names], span) for span in self._cut(names)}
                        for names in together if names}

    def update(self, names: tuple[str, ...], verdict: Verdict, lr: Tensor) -> None:
        """Updates the masters of these units, or leaves every bit as it was. `lr` [rates]; one is that of all."""
        self.lr.copy_(lr[self.rates] if lr.numel() > 1 else lr)
        options = self.groups.options()
        if any((name, STATE) in self.units[name].home.homes for name in names) and verdict.found_inf != 0:
            return                                              # nothing need come, to go as it was
        # the kernels take it in fp32, too coarse for fp64; NaN would stay in the padding between operands
        factor = torch.where(verdict.found_inf == 0, verdict.factor, 0)
        for span in self._here(names):
            here = [(unit, *((0, unit.high - unit.low) if span is None else (span[0] - unit.low, span[1] - unit.low)))
                    for unit in (self.units[name] for name in names)]
            for unit, a, b in here if self.wide == torch.float64 else ():
                unit.grad_slice[a:b].mul_(factor)
            for kernel in self.kernels[names][span]:
                self._step(kernel, options, verdict)
            for unit, a, b in here:
                self._follow(unit, a, b, verdict)

    def _cut(self, names: tuple[str, ...]) -> Sequence[Reach | None]:
        """The pieces in which these units change, one after another; None: as they are."""
        home = self.units[names[0]].home.homes.get((names[0], STATE))
        return home.pieces if len(names) == 1 and home else (None,)

    def _here(self, names: tuple[str, ...]) -> Iterator[Reach | None]:
        """The same, with each here in its turn."""
        with ExitStack() as stack:
            for name in names:
                home = self.units[name].home
                stack.enter_context(home.present(name, GRADIENTS, changed=self.wide == torch.float64))
                stack.enter_context(home.present(name, WEIGHTS))
                if self._cut(names) == (None,):
                    stack.enter_context(home.present(name, STATE))
            yield from self.units[names[0]].home.through(names[0]) if self._cut(names) != (None,) else (None,)

    def _step(self, kernel: Any, options: Sequence[Mapping[str, Any]], verdict: Verdict) -> None:
        for group in kernel.param_groups:
            group.update(options[group["number"]])
        if self.wide != torch.float64:
            kernel.grad_scale = (1 / verdict.factor).float()
        with torch.no_grad():
            if self.fused or isinstance(kernel, Kernel):
                kernel.found_inf = verdict.found_inf
                kernel.step()
            else:
                plainly(kernel, verdict.found_inf)

    def _follow(self, unit: Unit, a: int, b: int, verdict: Verdict) -> None:
        """What follows from masters [a, b) of a slice: their mean, and the weights where masters do not stay here."""
        name, decay = unit.flat.name, self.settings.ema
        if decay is not None:
            mean = self.state[name][EMA].tensor[a:b]
            new = torch.lerp(unit.master[a:b].to(mean.dtype), mean, decay)
            torch.where(verdict.found_inf == 0, new, mean, out=mean)
        if unit.away:
            unit.weight_slice[a:b].copy_(unit.master[a:b])

    def begin_means(self) -> None:
        """The means of the weights are the weights."""
        for name, unit in self.units.items():
            with unit.present():
                self.state[name][EMA].tensor.copy_(unit.master)

    @contextmanager
    def means(self) -> Iterator[None]:
        """Within, the weights are their means, where those are kept: evaluations see them."""
        if self.settings.ema is None:
            yield
            return
        own = {}
        for name, unit in self.units.items():
            unit.updated()
            with unit.present():
                own[name] = unit.master if unit.master is not unit.weight_slice else unit.master.clone()
                unit.publish(self.state[name][EMA].tensor)
        try:
            yield
        finally:
            for name, unit in self.units.items():
                with unit.present():
                    unit.publish(own[name])

    def set_steps(self, applied: int) -> None:
        """Continues after `applied` steps: Adam's bias correction counts from there."""
        for step in self.steps:
            step.fill_(applied)

    def beside(self, unit: Unit, start: int, stop: int) -> list[Tensor]:
        """What there is here of the moments of [start, stop) of the unit's buffer, one tensor or more; views."""
        names = {p.shard.parameter.name for p in unit.flat.pieces if p.start < stop and start < p.stop}
        return [part for m in self.state[unit.flat.name].values() for part in (
            [m.part(p.start, p.stop) for p in m.flat.pieces if p.shard.parameter.name in names] if m.factor else
            [m.part(*m.meets(start, stop))])]

    def whole(self, unit: Unit, kind: str, name: str) -> Tensor:
        """[elements] of what is kept of a tensor that no tensor-parallel ranks share, on all ranks together."""
        unit.updated()
        m = self.state[unit.flat.name][kind]
        piece = m.piece(name)
        a, b = m.meets(piece.start, piece.stop)
        out = m.tensor.new_zeros(piece.stop - piece.start)
        out[a - piece.start:b - piece.start] = m.part(a, b)
        return out if m.factor else unit.sharing.shard.all_reduce(out, about=unit.flat.name).wait()

    def set_whole(self, unit: Unit, kind: str, name: str, value: Tensor) -> None:
        """Turned round; every rank gives all of it."""
        unit.updated()
        m = self.state[unit.flat.name][kind]
        piece = m.piece(name)
        a, b = m.meets(piece.start, piece.stop)
        m.part(a, b).copy_(value.detach().reshape(-1)[a - piece.start:b - piece.start])

    def _beside(self, unit: Unit) -> dict[str, Moment]:
        """Zeros, from the start: a first step that is skipped leaves them so."""
        tensor, found = unit.sharing.tensor, dict[str, Moment]()
        place, ema = {"tp": (tensor.rank, tensor.size)}, self.settings.ema is not None
        for kind, spec in moment_specs(unit.flat, unit.size, self.groups.rule, ema, place).items():
            zeros = partial(unit.home.zeros, unit.flat.name, kind, device=unit.grad_slice.device)
            found[kind] = moment(spec, unit.grad_slice, unit.low, unit.high, dtype_of(kind, self.settings), kind,
                                 self.seed, (unit.sharing.shard, tensor), zeros)
        return found

    def _kernels(self, units: Sequence[Unit], span: Reach | None) -> list[torch.optim.Optimizer]:
        """One for each rule that the groups have."""
        return [kernel for rule in dict.fromkeys(self.groups.rules) for kernel in self._kernel(units, rule, span)]

    def _kernel(self, units: Sequence[Unit], rule: str, span: Reach | None) -> Iterator[torch.optim.Optimizer]:
        """Over views of our flat buffers, or of a piece of one, its state too; none, where this rank has nothing to do.
        """
        options, facts = self.groups.options(), RULES[rule]
        slices = [(i, part) for i, r in enumerate(self.groups.rules) if r == rule
                  for part in self._slices(units, i, facts.scope == "element" and not coded(self.settings), span)]
        if not slices and facts.scope == "element" and not coded(self.settings):
            return                                              # others wait for nobody
        params, parts = [], dict[Tensor, Portion]()
        for _, part in slices:
            a, b = part.start - part.unit.low, part.stop - part.unit.low
            weights = part.unit.master if not coded(self.settings) else part.unit.grad_slice
            params.append(weights[a:b].detach().requires_grad_())                       # so torch knows a parameter
            params[-1].grad = part.unit.grad_slice[a:b]
            parts[params[-1]] = part
        groups = [{**given, "number": i, "params": [p for p, s in zip(params, slices, strict=True) if s[0] == i]}
                  for i, given in enumerate(options) if self.groups.rules[i] == rule]
        kernel = kernel_of(rule, [g for g in groups if g["params"]] or groups[:1], self.settings, self.fused)
        for group in kernel.param_groups:                       # given to the constructor, it would be read by the host
            group["lr"] = self.lr[group["number"]]
        for p, part in parts.items() if not isinstance(kernel, Coded) else ():
            kept = self.state[part.unit.flat.name]
            kernel.state[p] = {kind: kept[kind].part(part.start, part.stop)
                               for kind in facts.beside(len(part.piece.shard.parameter.shape))}
            if not isinstance(kernel, Kernel):                  # torch counts each by itself
                kernel.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        if isinstance(kernel, Kernel):
            held = {u.flat.name: {"weight": self._weights(u), **self.state[u.flat.name]} for u in units}
            kernel.begin(units, parts, held, lambda piece: self.groups.rule(piece) == rule)
        self.steps += [kernel.count] if isinstance(kernel, Kernel) else [s["step"] for s in kernel.state.values()]
        yield kernel

    def _weights(self, unit: Unit) -> Moment:
        """The masters, as a kind of their own: in bf16 they are rounded by chance."""
        if unit.master.dtype != torch.bfloat16:
            return Moment(unit.flat, unit.low, unit.master)
        streams = [key(self.seed, "weight", piece.shard.parameter.name) for piece in unit.flat.pieces]
        return ByChance(unit.flat, unit.low, unit.master, streams=streams)

    def _slices(self, units: Sequence[Unit], number: int, joined: bool, span: Reach | None) -> Iterator[Portion]:
        """What this rank's slices, or a piece of one, hold of a group: tensor by tensor, or `joined` where they are
        neighbours."""
        for unit in units:
            reach = (spans(unit.flat, unit.size, self.groups.number) if joined else
                     [(self.groups.number(piece), piece.start, piece.stop) for piece in unit.flat.pieces])
            first = {piece.start: piece for piece in unit.flat.pieces}
            for i, start, stop in reach:
                low, high = span or (unit.low, unit.high)
                a, b = max(start, low), min(stop, high)
                if i == number and a < b:
                    yield Portion(unit, first[start], a, b)
