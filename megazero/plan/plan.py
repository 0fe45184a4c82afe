"""What follows from a configuration and a number of ranks: every size of the run. Pure."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from megazero.base import UserError
from megazero.pipeline import Pass, from_layout, passes, shares
from megazero.plan.architecture import Architecture, architecture, parts, units
from megazero.plan.checks import checks
from megazero.plan.layout import UnitSpec, joined
from megazero.plan.mesh import Mesh
from megazero.plan.program import Action, Part, Stages, Zero, evaluation, training
from megazero.settings import Config


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    config: Config
    architecture: Architecture
    world: int
    tp: int
    pp: int
    dp: int
    micro_batch: int
    micro_batches: int
    train_iters: int

    @property
    def mesh(self) -> Mesh:
        kv = self.architecture.kv_heads
        return Mesh(self.pp, self.dp, self.tp, max(self.tp // kv, 1) if kv < self.tp else 1, self.shard,
                    self.virtual > 1, self.architecture.tied and self.pp > 1)

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.micro_batches * self.dp

    @property
    def tokens_per_step(self) -> int:
        """Nominal: samples x sequence length, masked tokens included."""
        return self.global_batch * self.architecture.seq_length

    @property
    def warmup_iters(self) -> int:
        o = self.config.optimizer
        if o.lr_warmup_samples is not None:
            return o.lr_warmup_samples // self.global_batch
        return o.lr_warmup_iters or int((o.lr_warmup_fraction or 0) * self.decay_iters)

    @property
    def decay_iters(self) -> int:
        o = self.config.optimizer
        if o.lr_decay_samples is not None:
            return o.lr_decay_samples // self.global_batch
        if o.lr_decay_iters is None and self.config.training.train_samples is not None:
            return self.config.training.train_samples // self.global_batch
        return o.lr_decay_iters or self.train_iters

    @property
    def shard(self) -> int:
        """Data-parallel ranks that share one copy of what the ZeRO level shares."""
        p = self.config.parallel
        return (p.zero_shard_size or self.dp) if p.zero_stage else 1

    @property
    def zero(self) -> Zero:
        p = self.config.parallel
        lag = (0 if self.shard == 1 or not p.overlap_grad_reduce
               else 1 if p.zero_stage >= 2 or self.shard < self.dp else 2)
        return Zero(p.zero_stage, p.keep_weights, p.reduce_every, p.overlap_param_gather, lag,
                    1 if p.overlap_grad_reduce else 0)

    @property
    def virtual(self) -> int:
        """Stages on each pipeline rank."""
        return self.config.parallel.num_virtual_stages_per_pipeline_rank

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The parts of each stage: the embedding belongs to the first, the head to the last."""
        p, layers = self.config.parallel, self.architecture.layers
        counts = from_layout(p.pipeline_layout) if p.pipeline_layout else shares(
            layers, self.pp * self.virtual, p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers)
        borders = [0, *(1 + n for n in accumulate(counts[:-1])), layers + 2]
        return tuple(range(a, b) for a, b in pairwise(borders))

    @cached_property
    def units(self) -> tuple[UnitSpec, ...]:
        """Every unit in the order of the forward pass; blocks of one stage are joined as --bucket-size says."""
        specs = {u.name: u for u in units(self.architecture)}
        blocks = [[specs.pop(f"layers.{i - 1}") for i in stage if 0 < i <= self.architecture.layers]
                  for stage in self.stages]
        together = [u for stage in blocks for u in joined(stage, self.config.parallel.bucket_size)]
        return (*(u for name, u in specs.items() if name != "head"), *together, specs["head"])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Which units each part reads, under their joined names."""
        home = {p.name: unit.name for unit in self.units for p in unit.parameters}
        now = {unit.name: home[unit.parameters[0].name] for unit in units(self.architecture)}
        return tuple(Part(*(tuple(now[u] for u in names) for names in part)) for part in parts(self.architecture))

    def stages_of(self, rank: int) -> Stages:
        """The stages of one rank, and what the program must know of the others."""
        place, count = self.mesh.place(rank).pp, len(self.stages)
        own = {s: self.stages[s] for s in range(place, count, self.pp)}
        return Stages(own, count, self.parts, self.pp > 1,
                      ("embedding",) if self.mesh.tied and place in (0, self.pp - 1) else ())

    def units_of(self, rank: int) -> tuple[UnitSpec, ...]:
        """The units that one rank holds."""
        names = {name for own in self.stages_of(rank).own.values() for i in own for name in self.parts[i].forward}
        return tuple(u for u in self.units if u.name in names)

    @cached_property
    def passes(self) -> tuple[tuple[Pass, ...], ...]:
        """What each pipeline rank runs in a step."""
        return passes(self.config.parallel.pipeline_schedule, self.pp, self.micro_batches, self.virtual)

    def training(self, rank: int) -> list[Action]:
        """One training step of one rank."""
        return training(self.passes[self.mesh.place(rank).pp], self.stages_of(rank), self.zero)

    def evaluation(self, rank: int) -> list[Action]:
        """One rank's part of the loss of one micro-batch, without gradients."""
        return evaluation(self.stages_of(rank), self.zero)


def plan(config: Config, world: int, vocab_size: int) -> Plan:
    """Resolves a configuration on `world` ranks. Raises UserError with every problem at once."""
    errors = checks(config, world)
    if errors:
        raise UserError(*errors)
    return resolve(config, world, vocab_size)


def resolve(config: Config, world: int, vocab_size: int) -> Plan:
    """The same of a configuration that has passed the checks."""
    p, t = config.parallel, config.training
    dp = world // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    global_batch = t.global_batch_size or t.micro_batch_size * dp
    a = architecture(config, vocab_size)
    micro_batches = global_batch // (t.micro_batch_size * dp)
    iters = t.train_iters if t.train_iters is not None else (t.train_samples or 0) // global_batch
    return Plan(config, a, world, p.tensor_model_parallel_size, p.pipeline_model_parallel_size, dp, t.micro_batch_size,
                micro_batches, iters)
