"""How many of everything: ranks, samples, steps. They follow from a configuration and a number of ranks, here alone.
Pure.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from megazero.settings import Config

S = TypeVar("S", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """
    shard           data-parallel ranks that share one copy of what the ZeRO level shares; dp / shard copies of it exist
    micro_batch     samples of one forward pass of one rank
    global_batch    samples of a step
    ramp            smaller steps before those: (samples of the run before which they begin, samples of one), in order
    train_iters     steps of the run
    train_samples   samples of the run, where it was told by them
    warmup_iters    steps in which the learning rate rises
    decay_iters     steps of its whole curve, warm-up included
    final_iters     the last of them, in which WSD falls
    """

    tp: int
    pp: int
    dp: int
    shard: int
    micro_batch: int
    global_batch: int
    ramp: tuple[tuple[int, int], ...]
    train_iters: int
    train_samples: int | None
    warmup_iters: int
    decay_iters: int
    final_iters: int

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def micro_batches(self) -> int:
        """Those of one rank in a step."""
        return self.micro_batches_of(self.global_batch)

    def micro_batches_of(self, batch: int) -> int:
        return batch // (self.micro_batch * self.dp)

    def batch_at(self, samples: int) -> int:
        """Samples of the step that begins after so many."""
        return batch_at(self.ramp, samples, self.global_batch)

    def samples_after(self, steps: int) -> int:
        """Samples of the run's first steps."""
        samples = 0
        for end, batch in self.ramp:
            there = min(max(-(-(end - samples) // batch), 0), steps)
            samples, steps = samples + there * batch, steps - there
        return samples + steps * self.global_batch

    def steps_between(self, samples: int, last: int) -> int:
        """Whole steps that begin after so many samples and end with `last` of them."""
        steps = 0
        for end, batch in (*self.ramp, (last, self.global_batch)):
            there = max(min(-(-(end - samples) // batch), (last - samples) // batch), 0)
            samples, steps = samples + there * batch, steps + there
        return steps

    def samples_of(self, step: int) -> range:
        """The numbers of the samples that a step reads, counted from step 0; it begins where what came before ends."""
        return range(self.samples_after(step), self.samples_after(step + 1))

    def step_of(self, sample: int) -> int:
        """The step that reads a sample."""
        return self.steps_between(0, sample)

    def going_on(self: S, step: int, samples: int) -> S:
        """Those of a run that goes on after so many steps and samples. Steps so far may have been of another size; a
        run that was told by samples ends with them."""
        if self.train_samples is None:
            return self
        return replace(self, train_iters=step + self.steps_between(samples, self.train_samples))


def sizes(config: Config, world: int) -> Sizes:
    """The sizes of a configuration on `world` ranks; of one that is not checked too, where none of what others are
    divided by is less than 1."""
    p, t, o = config.parallel, config.training, config.optimizer
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    dp = max(world // max(tp * pp, 1), 1)
    batch = max(t.global_batch_size or t.micro_batch_size * dp, 1)
    ramp: tuple[tuple[int, int], ...] = ()
    with suppress(ValueError):                                  # checks() tell
        ramp, batch = ramp_of(config, batch)
    here = Sizes(tp=tp, pp=pp, dp=dp, shard=(p.zero_shard_size or dp) if p.zero_stage else 1,
                 micro_batch=t.micro_batch_size, global_batch=batch, ramp=ramp, train_iters=t.train_iters or 0,
                 train_samples=t.train_samples, warmup_iters=0, decay_iters=0,
                 final_iters=o.lr_wsd_decay_iters or (o.lr_wsd_decay_samples or 0) // batch)
    run = t.train_iters if t.train_iters is not None else here.steps_between(0, t.train_samples or 0)
    # a curve is counted in steps of the whole batch, where samples say how long it is
    curve = (o.lr_decay_samples or 0) // batch or o.lr_decay_iters or (
        run if t.train_samples is None else t.train_samples // batch)
    warmup = (o.lr_warmup_samples // batch if o.lr_warmup_samples
              else o.lr_warmup_iters or int((o.lr_warmup_fraction or 0) * curve))
    return replace(here, train_iters=run, warmup_iters=warmup, decay_iters=curve)


SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def ramp_of(config: Config, full: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """(how the batch grows, what it grows to); `full` is what --global-batch-size says. Raises ValueError: what is
    wrong, and what to write."""
    t, length = config.training, config.model.seq_length or 1
    if t.rampup_batch_size:
        if len(t.rampup_batch_size) != 3 or min(t.rampup_batch_size) < 1:
            raise ValueError("must be three numbers above 0, START INCREMENT SAMPLES, such as 16 16 300000")
        start, more, samples = t.rampup_batch_size
        if start > full or (full - start) % more:
            raise ValueError(f"does not grow from {start} to --global-batch-size {full} in steps of {more}; write a "
                             "start below it, and an increment that divides the difference")
        count = (full - start) // more
        return tuple((-(-(i + 1) * samples // count), start + i * more) for i in range(count)), full
    stages = []
    for word in " ".join(t.step_batch_size_schedule).split():
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)", word, re.IGNORECASE)
        if not found or int(found[3]) < 1:
            raise ValueError(f"{word} is not TOKENS:SAMPLES, such as 2.4B:320")
        stages.append((round(float(found[1]) * SUFFIXES[found[2].upper()]), int(found[3])))
    if not stages:
        return (), full
    begins = [tokens for tokens, _ in stages]
    if begins[0] != 0 or any(a >= b for a, b in pairwise(begins)):
        raise ValueError("must begin with 0 tokens, each stage after the one before")
    ends = [-(-tokens // length) for tokens in begins[1:]]
    return tuple((end, batch) for end, (_, batch) in zip(ends, stages, strict=False)), stages[-1][1]


def batch_at(ramp: tuple[tuple[int, int], ...], samples: int, full: int) -> int:
    """Samples of the step that begins after so many."""
    return next((batch for end, batch in ramp if samples < end), full)


def ranks_asked(config: Config) -> int:
    """Ranks that the sizes in a configuration ask for: what looks at the plan of a cluster need not run on it."""
    p = config.parallel
    if config.world_size is not None:
        return max(config.world_size, 1)
    return max(p.tensor_model_parallel_size * p.pipeline_model_parallel_size * (p.data_parallel_size or 1), 1)
