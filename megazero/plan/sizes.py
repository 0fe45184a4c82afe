"""How many of everything: ranks, samples, steps. They follow from a configuration and a number of ranks, here alone.
Pure.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from megazero.settings import Config

S = TypeVar("S", bound="Sizes")


@dataclass(frozen=True)
class Sizes:
    """
    shard           data-parallel ranks that share one copy of what the ZeRO level shares; dp / shard copies of it exist
    micro_batch     samples of one forward pass of one rank
    global_batch    samples of a step
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
        return self.global_batch // (self.micro_batch * self.dp)

    def samples_of(self, step: int) -> range:
        """The numbers of the samples that a step reads, counted from step 0; it begins where what came before ends."""
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def step_of(self, sample: int) -> int:
        """The step that reads a sample."""
        return sample // self.global_batch

    def going_on(self: S, step: int, samples: int) -> S:
        """Those of a run that goes on after so many steps and samples. Steps so far may have been of another size; a
        run that was told by samples ends with them."""
        if self.train_samples is None:
            return self
        return replace(self, train_iters=step + self.step_of(max(self.train_samples - samples, 0)))


def sizes(config: Config, world: int) -> Sizes:
    """The sizes of a configuration on `world` ranks; of one that is not checked too, where none of what others are
    divided by is less than 1."""
    p, t, o = config.parallel, config.training, config.optimizer
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    dp = max(world // max(tp * pp, 1), 1)
    batch = max(t.global_batch_size or t.micro_batch_size * dp, 1)
    run = t.train_iters if t.train_iters is not None else (t.train_samples or 0) // batch
    curve = o.lr_decay_samples // batch if o.lr_decay_samples else o.lr_decay_iters or run
    warmup = (o.lr_warmup_samples // batch if o.lr_warmup_samples is not None
              else o.lr_warmup_iters or int((o.lr_warmup_fraction or 0) * curve))
    return Sizes(tp=tp, pp=pp, dp=dp, shard=(p.zero_shard_size or dp) if p.zero_stage else 1,
                 micro_batch=t.micro_batch_size, global_batch=batch, train_iters=run, train_samples=t.train_samples,
                 warmup_iters=warmup, decay_iters=curve,
                 final_iters=o.lr_wsd_decay_iters or (o.lr_wsd_decay_samples or 0) // batch)


def ranks_asked(config: Config) -> int:
    """Ranks that the sizes in a configuration ask for: what looks at the plan of a cluster need not run on it."""
    p = config.parallel
    if config.world_size is not None:
        return max(config.world_size, 1)
    return max(p.tensor_model_parallel_size * p.pipeline_model_parallel_size * (p.data_parallel_size or 1), 1)
