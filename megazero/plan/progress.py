"""What changes with the steps: learning rate, loss scale, how many steps were applied. Pure values."""

import math
from dataclasses import dataclass, replace

from megazero.plan.plan import Plan
from megazero.settings import Config


def learning_rate(plan: Plan, applied: float) -> float:
    """The rate of the step after `applied` ones, see `position`. Megatron's curves, but the first step of a warm-up is
    not lost at rate 0: warm-up counts the step itself, decay the steps before it."""
    o = plan.config.optimizer
    assert o.lr is not None
    step, warmup, length = applied, plan.warmup_iters, plan.decay_iters
    if step < warmup:
        return o.lr_warmup_init + (o.lr - o.lr_warmup_init) * (step + 1) / warmup
    if o.lr_decay_style == "constant":
        return o.lr
    if o.lr_decay_style == "inverse-square-root":
        return max(o.min_lr, o.lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    if step >= length:
        return o.min_lr
    if o.lr_decay_style == "WSD":
        return o.min_lr + (o.lr - o.min_lr) * _wsd(o.lr_wsd_decay_style, step, length, o.lr_wsd_decay_iters or 0)
    part = (step - warmup) / (length - warmup)
    return o.min_lr + (o.lr - o.min_lr) * (1 - part if o.lr_decay_style == "linear"
                                           else (math.cos(math.pi * part) + 1) / 2)


def _wsd(style: str, step: float, length: int, final: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1 until the last `final` steps, then down."""
    part = max(0, step - (length - final)) / final
    return {"linear": 1 - part, "cosine": (math.cos(math.pi * part) + 1) / 2, "exponential": 2 * 0.5**part - 1,
            "minus_sqrt": 1 - math.sqrt(part)}[style]


def position(plan: Plan, progress: "Progress") -> float:
    """Where a run is on the curve of its learning rate, in steps of this batch size: steps that changed the weights; in
    a run told by samples, what they consumed."""
    if plan.config.training.train_samples is None:
        return progress.applied
    return progress.samples / plan.global_batch - (progress.step - progress.applied)


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


@dataclass(frozen=True)
class Progress:
    """Where a run is. `step` counts all steps, `applied` those that changed the weights;
    the learning rate follows `applied`."""

    loss_scale: LossScale
    step: int = 0
    applied: int = 0
    samples: int = 0
    skipped_in_a_row: int = 0

    def after(self, finite: bool, samples: int) -> "Progress":
        return Progress(self.loss_scale.after(finite), self.step + 1, self.applied + finite, self.samples + samples,
                        0 if finite else self.skipped_in_a_row + 1)
