"""Rules of optimizers as their papers write them, a tensor at a time: what tests hold the kernels against."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor
Change = Callable[[Tensor, Tensor, dict[str, Any], int, Mapping[str, Any]], None]     # w, g, what is kept of it, number of the step, options


def lion(w: Tensor, g: Tensor, kept: dict[str, Tensor], t: int, o: Mapping[str, Any]) -> None:
    m = kept.setdefault("m", torch.zeros_like(w))
    a, b = o.get("betas", (0.8, 0.7))
    c = a * m + (1 - a) * g
    w.sub_(o["lr"] * (torch.sign(c) + o["weight_decay"] * w))
    m.copy_(b * m + (1 - b) * g)


def ademamix(w: Tensor, g: Tensor, kept: dict[str, Tensor], t: int, o: Mapping[str, Any]) -> None:
    fast, slow, square = (kept.setdefault(n, torch.zeros_like(w)) for n in "fsq")
    part = min(t / 4, 1)
    half_life = (1 - min(t / 3, 1)) / math.log(0.9) + min(t / 3, 1) / math.log(0.999)
    beta3 = math.exp(1 / half_life)
    fast.copy_(0.9 * fast + 0.1 * g)
    slow.copy_(beta3 * slow + (1 - beta3) * g)
    square.copy_(0.99 * square + 0.01 * g * g)
    w.sub_(o["lr"] * ((fast / (1 - 0.9**t) + part * 5 * slow) / (torch.sqrt(square / (1 - 0.99**t)) + 1e-5) + o["weight_decay"] * w))


def lamb(w: Tensor, g: Tensor, kept: dict[str, Tensor], t: int, o: Mapping[str, Any]) -> None:
    m, v = (kept.setdefault(n, torch.zeros_like(w)) for n in "mv")
    a, b = o.get("betas", (0.9, 0.99))
    m.copy_(a * m + (1 - a) * g)
    v.copy_(b * v + (1 - b) * g * g)
    r = m / (1 - a**t) / (torch.sqrt(v / (1 - b**t)) + 1e-5) + o["weight_decay"] * w
    ratio = float(w.norm() / r.norm()) if w.norm() > 0 and r.norm() > 0 else 1.0
    w.sub_(o["lr"] * ratio * r)


class Plain(torch.optim.Optimizer):
    """A rule as an optimizer of torch's."""

    def __init__(self, params: Iterable[Any], change: Change, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.change, self.steps = change, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.change(p, p.grad, self.state[p], self.steps, group)


def by(make: Callable[..., torch.optim.Optimizer]) -> Change:
    """torch's own, a kernel for each tensor."""
    def change(w: Tensor, g: Tensor, kept: dict[str, Any], t: int, o: Mapping[str, Any]) -> None:
        if not kept:
            kept["p"] = torch.nn.Parameter(w.clone())
            kept["kernel"] = make([kept["p"]], **o)
        kept["p"].grad = g.clone()
        kept["kernel"].step()
        w.copy_(kept["p"].detach())
    return change



SCALES = {"spectral": lambda a, b: math.sqrt(max(a, b)), "unit_rms_norm": lambda a, b: math.sqrt(a / b), "shape_scaling": lambda a, b: math.sqrt(max(1, a / b))}
NEWTON_SCHULZ = {"simple": [(3.4445, -4.7750, 2.0315)] * 5,
                 "quintic": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]}


def muon(momentum: float, nesterov: bool, coefficients: str, scale: str, steps: int = 5, extra: float = 1.0, eps: float = 1e-7) -> Change:
    """By singular values: the iteration's polynomial of each, between their vectors."""
    def change(w: Tensor, g: Tensor, kept: dict[str, Any], t: int, o: Mapping[str, Any]) -> None:
        m = kept.setdefault("m", torch.zeros_like(w))
        m.copy_(momentum * m + (1 - momentum) * g)
        u, s, v = torch.linalg.svd((1 - momentum) * g + momentum * m if nesterov else m, full_matrices=False)
        s = s / max(float(s.square().sum().sqrt()), eps)
        for a, b, c in NEWTON_SCHULZ[coefficients][:steps]:
            s = a * s + b * s**3 + c * s**5
        w.sub_(o["lr"] * (extra * SCALES[scale](*w.shape) * (u * s) @ v + o["weight_decay"] * w))
    return change


PLAIN: Mapping[str, Change] = {"lion": lion, "lamb": lamb, "ademamix": ademamix}
