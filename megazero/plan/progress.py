"""What changes with the steps: learning rate, loss scale, how many steps were applied. Pure values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megazero.base import Form, checked, made
from megazero.plan.rules import rates_of
from megazero.plan.sizes import Sizes, batch_at
from megazero.settings import Config

COUNT = range(2**53)
LARGEST = 2**24             # samples of a step: more than anybody has

FALLS: dict[str, Callable[[float], float]] = {          # how much is left of a rate when this part of its fall is over
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (math.cos(math.pi * part) + 1) / 2,
    "exponential": lambda part: 2 * 0.5**part - 1,
    "minus_sqrt": lambda part: 1 - math.sqrt(part),
}


@dataclass(frozen=True)
class Curve:
    """The learning rate over the steps of a run. Megatron's curves, but the first step of a warm-up is not lost at rate
    0: warm-up counts the step itself, decay the steps before it.

    warmup          steps of linear rise from `start` to `lr`
    length          steps in all, after which it stays at `min_lr`
    final           the last of them, in which WSD falls, as `final_style` says
    samples         of one step, in a run that is told by samples or whose batch grows
    ramp            how it grows
    from_start      warm-up counts the steps before, as Megatron's does
    """

    lr: float
    min_lr: float = 0.0
    style: str = "constant"
    start: float = 0.0
    warmup: int = 0
    length: int = 0
    final: int = 0
    final_style: str = "exponential"
    samples: int | None = None
    ramp: tuple[tuple[int, int], ...] = ()
    from_start: bool = False

    def rate(self, applied: float, own: float = 1.0) -> float:
        """The rate of the step after `applied` ones, which is `own` of a step."""
        if applied < self.warmup:
            risen = applied if self.from_start else min(applied + own, self.warmup)
            return self.start + (self.lr - self.start) * risen / self.warmup
        if self.style == "constant":
            return self.lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(max(self.warmup, 1) / max(applied, 1)))
        if applied >= self.length:
            return self.min_lr
        if self.style == "WSD":                                 # warm-up, stable, decay (Hu et al. 2024)
            height = FALLS[self.final_style](max(0, applied - (self.length - self.final)) / self.final)
        else:
            height = FALLS[self.style]((applied - self.warmup) / (self.length - self.warmup))
        return self.min_lr + (self.lr - self.min_lr) * height

    def rate_after(self, progress: "Progress") -> float:
        """The rate of a run's next step. Its place on the curve is counted in steps that changed the weights; in a run
        told by samples, in steps of this batch size that would have consumed what those consumed."""
        if self.samples is None:
            return self.rate(progress.applied)
        return self.rate((progress.samples - progress.lost) / self.samples,
                         batch_at(self.ramp, progress.samples, self.samples) / self.samples)


def curves_of(config: Config, curve: Curve) -> list[Curve]:
    """Of each of rates_of(), beside the run's own `curve`: between ends of its own, or as a multiple of it."""
    o = config.optimizer
    least = o.min_lr if o.decoupled_min_lr is None else o.decoupled_min_lr
    tops = {flag: getattr(o, flag) for flag in rates_of(o)}
    times = {flag: top / curve.lr if curve.lr else 1.0 for flag, top in tops.items()}
    return [replace(curve, lr=top, min_lr=least) if flag == "decoupled_lr" else
            replace(curve, lr=top, min_lr=curve.min_lr * times[flag], start=curve.start * times[flag])
            for flag, top in tops.items()]


def curve_of(config: Config, s: Sizes) -> Curve:
    """The learning rate of a run that `checks` finds nothing wrong with."""
    o = config.optimizer
    assert o.lr is not None, "checks() come first"
    return Curve(o.lr, o.min_lr, style=o.lr_decay_style, start=o.lr_warmup_init, warmup=s.warmup_iters,
                 length=s.decay_iters, final=s.final_iters, final_style=o.lr_wsd_decay_style,
                 samples=s.global_batch if s.ramp or s.train_samples is not None else None,
                 ramp=s.ramp, from_start=o.lr_warmup_from_init)


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018):
    halves after `hysteresis` bad steps, doubles after `window` good ones.

    `constant` scales never move: 1 for every dtype but fp16, or what --loss-scale says.
    """

    value: float
    minimum: float
    window: int
    hysteresis: int
    constant: bool
    good: int = 0                       # good steps since the scale last moved
    bad: int = 0                        # bad steps that count against the hysteresis

    def after(self, finite: bool) -> "LossScale":
        """The scale of the next step."""
        if self.constant:
            return self
        if finite:
            grown = self.good + 1 >= self.window
            return replace(self, value=self.value * 2 if grown else self.value, good=0 if grown else self.good + 1,
                           bad=0 if grown else self.bad)
        if self.bad + 1 < self.hysteresis:
            return replace(self, good=0, bad=self.bad + 1)
        return replace(self, value=max(self.value / 2, self.minimum), good=0)


def loss_scale(config: Config) -> LossScale:
    """The scale a run starts with."""
    p = config.precision
    constant = config.dtype != "fp16" or p.loss_scale is not None
    value = 1.0 if config.dtype != "fp16" else p.loss_scale or p.initial_loss_scale
    return LossScale(value, p.min_loss_scale, p.loss_scale_window, p.hysteresis, constant)


# what an index must say of it
SCALE: Form = {"value": float, "minimum": float, "window": range(1, 2**53), "hysteresis": range(1, 2**53),
               "constant": bool, "good?": COUNT, "bad?": COUNT}
PROGRESS: Form = {"step": COUNT, "applied": COUNT, "samples": COUNT, "skipped_in_a_row?": COUNT, "unseen?": COUNT,
                  "lost?": COUNT, "loss_scale": SCALE}


@dataclass(frozen=True)
class Progress:
    """Where a run is. `step` counts all steps, `applied` those that changed the weights;
    the learning rate follows `applied`."""

    loss_scale: LossScale
    step: int = 0
    applied: int = 0
    samples: int = 0
    skipped_in_a_row: int = 0
    unseen: int = 0                     # applied steps before the optimizer's state began
    lost: int = 0                       # samples of the steps that were skipped

    def after(self, finite: bool, samples: int) -> "Progress":
        return replace(self, loss_scale=self.loss_scale.after(finite), step=self.step + 1,
                       applied=self.applied + finite, samples=self.samples + samples,
                       skipped_in_a_row=0 if finite else self.skipped_in_a_row + 1,
                       lost=self.lost + (0 if finite else samples))


def progress_of(values: Any) -> Progress:
    """The progress that a checkpoint's index holds, as `asdict` made it. Raises ValueError."""
    checked(values, PROGRESS, "progress")
    scale = made(LossScale, values["loss_scale"], SCALE, "progress.loss_scale")
    skipped = values["step"] - values["applied"]                # all alike, before they were counted
    plain = {"lost": max(skipped, 0) * (values["samples"] // max(values["step"], 1))}
    found = made(Progress, {**plain, **values, "loss_scale": scale}, {}, "progress")
    if found.applied + found.skipped_in_a_row > found.step:
        raise ValueError(f"progress.step is {found.step}, less than the steps that were applied and skipped")
    if found.unseen > found.applied:
        raise ValueError(f"progress.unseen is {found.unseen}, more than the steps that were applied")
    if found.lost > found.samples:
        raise ValueError(f"progress.lost is {found.lost:,}, more than the {found.samples:,} samples that it read")
    if found.samples > found.step * LARGEST:
        raise ValueError(f"progress.samples is {found.samples:,} after {found.step:,} steps")
    if scale.value <= 0 or scale.minimum <= 0:
        raise ValueError("progress.loss_scale has a value that is not greater than 0")
    return found
