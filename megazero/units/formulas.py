"""Rules that torch has no fused kernel of, as their papers write them: of a slice of masters, its gradient and moments,
what they become. Nothing is changed in place, so that a step which is skipped leaves every bit.

    w       master          g    gradient, unscaled and clipped        s    moments, by name
    t       number of the step, from 1, float64 on the device          o    options of the group, `lr` on the device
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
Moments = Mapping[str, Tensor]
Options = Mapping[str, Any]
Formula = Callable[[Tensor, Tensor, Moments, Tensor, Options], tuple[Tensor, dict[str, Tensor]]]
CHUNK = 1 << 22                         # elements at a time: what a formula needs while it runs is a few times as much


def lion(w: Tensor, g: Tensor, s: Moments, t: Tensor, o: Options) -> tuple[Tensor, dict[str, Tensor]]:
    """Chen et al. 2023 (Symbolic Discovery of Optimization Algorithms), program 1."""
    beta1, beta2 = o["betas"]
    update = torch.lerp(g, s["exp_avg"], beta1).sign()
    return (w - o["lr"] * (update + o["weight_decay"] * w), {"exp_avg": torch.lerp(g, s["exp_avg"], beta2)})


def ademamix(w: Tensor, g: Tensor, s: Moments, t: Tensor, o: Options) -> tuple[Tensor, dict[str, Tensor]]:
    """Pagliardini et al. 2024 (The AdEMAMix Optimizer), algorithm 1: Adam with a second, slower mean of gradients. Its
    part `alpha` rises over `alpha_warmup` steps, its decay over `beta3_warmup`: the half-life grows evenly (section
    3)."""
    beta1, beta2, beta3 = o["betas"]
    at = (t / o["alpha_warmup"]).clamp(max=1) if o["alpha_warmup"] else 1
    slow = _risen(t / o["beta3_warmup"], beta1, beta3) if o["beta3_warmup"] else beta3
    mean, far = torch.lerp(g, s["exp_avg"], beta1), g + slow * (s["exp_avg_slow"] - g)
    square = torch.lerp(g * g, s["exp_avg_sq"], beta2)
    root = (square / (1 - beta2**t)).sqrt() + o["eps"]
    update = (mean / (1 - beta1**t) + o["alpha"] * at * far) / root
    return (w - o["lr"] * (update + o["weight_decay"] * w),
            {"exp_avg": mean, "exp_avg_slow": far, "exp_avg_sq": square})


def _risen(part: Tensor, low: float, high: float) -> Tensor:
    """From decay `low` to `high`, such that 1 / log(decay) is linear; beyond 1, `high`."""
    a, b = math.log(low), math.log(high)
    return torch.exp(a * b / ((1 - part) * b + part * a)).clamp(max=high)


FORMULAS: Mapping[str, Formula] = {"lion": lion, "ademamix": ademamix}


class Formulas(torch.optim.Optimizer):
    """A rule's formula over slices, as torch's fused kernels are called: `found_inf` and `grad_scale` are read from the
    device, and a step that is not to be changes nothing."""

    found_inf: Tensor
    grad_scale: Tensor | None = None

    def __init__(self, groups: Sequence[dict[str, Any]], formula: Formula, options: dict[str, Any]) -> None:
        super().__init__(groups, options)
        self.formula = formula

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        go = self.found_inf == 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                step = state["step"] + 1
                moments = {name: t for name, t in state.items() if name != "step"}
                for part in _chunks(p.detach(), p.grad, moments):
                    self._change(*part, step.double(), group, go)
                state["step"].copy_(torch.where(go, step, state["step"]))

    def _change(self, w: Tensor, grad: Tensor, moments: Moments, t: Tensor, group: Options, go: Tensor) -> None:
        g = torch.where(go, grad if self.grad_scale is None else grad / self.grad_scale, 0)
        new, become = self.formula(w, g, moments, t, group)
        for now, then in ((w, new), *((moments[name], value) for name, value in become.items())):
            now.copy_(torch.where(go, then, now))


def _chunks(w: Tensor, g: Tensor, moments: Moments) -> Iterator[tuple[Tensor, Tensor, Moments]]:
    for a in range(0, len(w), CHUNK):
        part = slice(a, a + CHUNK)
        yield w[part], g[part], {name: t[part] for name, t in moments.items()}
