"""The learning rates of ds_config.json's schedulers, as functions of the steps that were applied, and what steps them.

`i` counts as theirs do: -1 before the first step, 0 after it. So a warm-up's first two steps have its lowest rate.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megazero.base import UserError

Words = Mapping[str, Any]


def _risen(i: int, p: Words) -> float | None:
    """How much of the warm-up's height is reached; None when it is over."""
    steps = max(2, p["warmup_num_steps"])
    if i >= steps:
        return None
    return math.log(i + 1) / math.log(steps) if p["warmup_type"] == "log" else i / steps


def warmup(i: int, base: float, p: Words, after: float = 1.0) -> float:
    """Rises to `warmup_max_lr`, or to the group's own rate, and stays there; `after`: what is left of the height."""
    low, high = p["warmup_min_lr"], base if p["warmup_max_lr"] is None else p["warmup_max_lr"]
    if i < 0:
        return float(low)
    risen = _risen(i, p)
    return low + (high - low) * (after if risen is None else risen)


def warmup_decay(i: int, base: float, p: Words) -> float:
    """Then falls in a line, to `warmup_min_lr` at `total_num_steps`."""
    steps = p["total_num_steps"]
    return warmup(i, base, p, max(0.0, (steps - i) / max(1, steps - max(2, p["warmup_num_steps"]))))


def warmup_cosine(i: int, base: float, p: Words) -> float:
    """Parts of the group's own rate: rises to all of it, then falls as a cosine to `cos_min_ratio`."""
    if i < 0:
        return 0.0
    low, risen = p["warmup_min_ratio"], _risen(i, p)
    if risen is not None:
        return base * (low + (1 - low) * risen)
    steps, done = max(2, p["warmup_num_steps"]), i + 1
    part = min(1.0, (done - steps) / max(1, p["total_num_steps"] - steps))
    return base * (p["cos_min_ratio"] + (1 - p["cos_min_ratio"]) * (1 + math.cos(math.pi * part)) / 2)


def range_test(i: int, base: float, p: Words) -> float:
    """Rises by a rate for each interval of steps, in a line or in stairs, without end."""
    if i < 0:
        return float(p["lr_range_test_min_lr"])
    intervals = (i + 1) / p["lr_range_test_step_size"]
    intervals = math.floor(intervals) if p["lr_range_test_staircase"] else intervals
    return p["lr_range_test_min_lr"] * (1 + p["lr_range_test_step_rate"] * intervals)


def _cycled(i: int, p: Words) -> tuple[float, float]:
    """(height in the cycle, intervals of decay since its end). It rises, falls, and is over."""
    up = p["cycle_first_step_size"]
    down = up if p["cycle_second_step_size"] is None else p["cycle_second_step_size"]
    if i >= up + down:
        return 0.0, (i - (up + down) + 1) / p["decay_step_size"] if p["decay_step_size"] else 0.0
    at = (i + 1) % (up + down)
    rising = at <= up
    stairs = p["cycle_first_stair_count"] if rising or p["cycle_second_stair_count"] is None else (
        p["cycle_second_stair_count"])
    height = at / up if rising else (up + down - at) / down
    return math.floor(height * stairs) / stairs if stairs else height, 0.0


def one_cycle(i: int, base: float, p: Words) -> float:
    """From `cycle_min_lr` to `cycle_max_lr` and back, then it decays."""
    low, (height, decayed) = p["cycle_min_lr"], _cycled(i, p)
    return low + (p["cycle_max_lr"] - low) * height if i >= 0 and not decayed else (
        low / (1 + p["decay_lr_rate"] * decayed))


def one_cycle_momentum(i: int, p: Words) -> float:
    """The other way round."""
    low, high = p["cycle_min_mom"], p["cycle_max_mom"]
    height, decayed = _cycled(i, p)
    return low if i < 0 else (high - (high - low) * height) * (1 + p["decay_mom_rate"] * decayed)


SCHEDULES: Mapping[str, Callable[[int, float, Words], float]] = {
    "LRRangeTest": range_test, "OneCycle": one_cycle, "WarmupLR": warmup, "WarmupDecayLR": warmup_decay,
    "WarmupCosineLR": warmup_cosine}


class Scheduler:
    """Sets the rates of an optimizer's groups, in DeepSpeed's words: one step after each that changed the weights.

    Raises UserError for a list of rates that is not one for each group.
    """

    def __init__(self, kind: str, params: Words, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        for key, value in params.items():
            if isinstance(value, (list, tuple)) and len(value) != len(groups):
                raise UserError(f"scheduler.params.{key}: has {len(value)} values for {len(groups)} groups; write one "
                                "for each, or a number for all.")
        self.optimizer, self.kind, self.curve = optimizer, kind, SCHEDULES[kind]
        self.cycled = kind == "OneCycle" and params["cycle_momentum"]
        self.params = [{key: value[i] if isinstance(value, (list, tuple)) else value for key, value in params.items()}
                       for i in range(len(groups))]
        self.base = [float(group["lr"]) for group in groups]
        self.last_batch_iteration = -1
        self._set()

    def get_lr(self) -> list[float]:
        """Of the next step, for each group."""
        return [self.curve(self.last_batch_iteration, *group) for group in zip(self.base, self.params, strict=True)]

    get_last_lr = get_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """One on, or to a place."""
        given = last_batch_iteration
        self.last_batch_iteration = self.last_batch_iteration + 1 if given is None else given
        self._set()

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step(state["last_batch_iteration"])

    def _set(self) -> None:
        for group, lr, p in zip(self.optimizer.param_groups, self.get_lr(), self.params, strict=True):
            group["lr"] = lr
            if self.cycled and "betas" in group:
                group["betas"] = (one_cycle_momentum(self.last_batch_iteration, p), 0.99)
