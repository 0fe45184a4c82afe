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


PLAIN: Mapping[str, Change] = {"lion": lion, "lamb": lamb, "ademamix": ademamix}
