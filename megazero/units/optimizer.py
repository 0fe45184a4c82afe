"""Gradient norm, gate and update over the slices of the units that this rank updates.

The verdict of a step, apply or skip, is a number on the device: the fused kernels of torch take it (`found_inf`)
together with the factor that undoes loss scale, token count and clipping (`grad_scale`),
so a step needs no word from the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megazero.comm import Group
from megazero.plan import GROUPS
from megazero.settings import Optimizer as Settings
from megazero.units.unit import Unit

Tensor = torch.Tensor
# elements of a norm at a time: torch on CPU is off by 1e-3 for five million at once
NORM = 1 << 15


@dataclass(frozen=True)
class Verdict:
    """What the gate knows of a step, on the device. The host reads it when it likes.

    loss        mean over valid tokens                  norm        of the whole gradient, unscaled, before clipping
    found_inf   0 or 1, float32: skip the step          factor      what each gradient is multiplied by
    norms       of the pieces this rank owns (Optimizer.names): finds the culprit of a skipped step
    stop        how many ranks want to stop after this step
    """

    loss: Tensor
    norm: Tensor
    found_inf: Tensor
    factor: Tensor
    norms: Tensor
    stop: Tensor


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with momentum, one kernel over all flat buffers.

    `state[unit][moment]` is a flat buffer beside the master it belongs to: the whole or a slice.
    """

    MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

    def __init__(self, units: Sequence[Unit], o: Settings) -> None:
        self.units, self.clip = units, o.clip_grad
        self.state = {u.flat.name: {m: torch.zeros_like(u.master) for m in self.MOMENTS[o.optimizer]} for u in units}
        self.steps: list[Tensor] = []
        owned = [(p.shard.parameter.name, u.grad_slice[a:b]) for u in units if u.owner
                 for p, a, b in u.pieces() if p.shard.owner]
        pieces = [(name, part) for name, grad in owned for part in ([grad] if grad.is_cuda else grad.split(NORM))]
        self.names, self._pieces = [name for name, _ in pieces], [part for _, part in pieces]
        groups: list[dict[str, Any]] = [{"params": self._slices(0), "weight_decay": o.weight_decay},
                                        {"params": self._slices(1), "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        self.wide = units[0].master.dtype
        device = units[0].master.device
        # CUDA's kernels read fp32
        self.lr = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else self.wide, device=device)
        self._none = torch.zeros(0, dtype=torch.float64, device=self.lr.device)
        if o.optimizer == "adam":
            betas = (o.adam_beta1, o.adam_beta2)
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=betas, eps=o.adam_eps, fused=True)
        else:
            self.torch = torch.optim.SGD(groups, momentum=o.sgd_momentum, fused=True)
        for group in self.torch.param_groups:                   # given to the constructor, it would be read by the host
            group["lr"] = self.lr
        self._adopt()

    def _ranges(self) -> list[tuple[Unit, int, int, int]]:
        """(unit, start, stop, 0 decayed or 1 not) of each slice that a kernel sees."""
        out = []
        for u in self.units:
            out += [(u, a, b, 0 if GROUPS[group] else 1) for group, a, b in u.ranges()]
        return [r for r in out if r[1] < r[2]]

    def _slices(self, which: int) -> list[Tensor]:
        slices = []
        for unit, a, b, kind in self._ranges():
            if kind == which:
                p = unit.master[a:b].detach().requires_grad_()  # requires_grad is how torch.optim knows a parameter
                p.grad = unit.grad_slice[a:b]
                slices.append(p)
        return slices

    def _adopt(self) -> None:
        """Makes torch's state our flat buffers, from the start: a first step that is skipped leaves them zero."""
        ranges = [r for which in (0, 1) for r in self._ranges() if r[3] == which]
        params = [p for g in self.torch.param_groups for p in g["params"]]
        for p, (unit, a, b, _) in zip(params, ranges, strict=True):
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.steps.append(step)
            self.torch.state[p] = {"step": step, **{m: flat[a:b] for m, flat in self.state[unit.flat.name].items()}}

    def judge(self, loss_sum: Tensor, valid: Tensor, nominal: int, scale: Tensor, world: Group,
              stop: bool = False) -> Verdict:
        """One reduction over all ranks: squares of owned gradients, loss and count of valid tokens (each told by one
        rank of a copy), and whether this rank was asked to stop, so that all stop after the same step.

        The gradients are of scale / nominal x the sum of losses;
        the factor makes them those of the mean over valid tokens.
        """
        norms = (torch.stack(torch._foreach_norm(self._pieces, 2, dtype=self.wide)).double()
                 if self._pieces else self._none)
        asked = torch.full_like(loss_sum, float(stop), dtype=torch.float64)
        figures = world.all_reduce(torch.stack((norms.square().sum(), loss_sum, valid.double(), asked))).wait()
        squares, loss, tokens, stops = figures.unbind()
        tokens = tokens.clamp(min=1)
        factor = nominal / tokens / scale.double()
        norm = squares.sqrt() * factor
        if self.clip > 0:
            factor = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        found = ~(norm.isfinite() & loss.isfinite())
        return Verdict(loss / tokens, norm, found.float(), factor, norms, stops)

    def step(self, verdict: Verdict, lr: Tensor) -> None:
        """Updates the masters, or leaves every bit as it was. Then publishes."""
        self.lr.copy_(lr)
        if self.wide == torch.float64:                        # the kernels take the factor in fp32: too coarse for fp64
            # NaN would stay in the padding between operands
            factor = torch.where(verdict.found_inf == 0, verdict.factor, 0)
            for unit in self.units:
                unit.grad_slice.mul_(factor)
        else:
            self.torch.grad_scale = (1 / verdict.factor).float()  # type: ignore[attr-defined]
        self.torch.found_inf = verdict.found_inf                # type: ignore[attr-defined]
        with torch.no_grad():
            self.torch.step()
        for unit in self.units:
            unit.publish()

    def set_steps(self, applied: int) -> None:
        """Continues after `applied` steps: Adam's bias correction counts from there."""
        for step in self.steps:
            step.fill_(applied)
