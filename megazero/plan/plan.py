"""What follows from a configuration and a number of ranks, as one value. Pure."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from megazero.base import UserError
from megazero.pipeline import Load, Loads, Pass, by_cost, ends_as_layers, from_layout, passes, shares
from megazero.plan.action import Action, read_programs
from megazero.plan.architecture import Architecture, head_chunk, parts, units
from megazero.plan.checks import checks
from megazero.plan.homes import OFFLOADED, Homes, homes
from megazero.plan.layout import UnitSpec, flat, joined
from megazero.plan.mesh import Mesh
from megazero.plan.operations import Micro, distinct, table
from megazero.plan.program import Part, Stages, evaluation, training
from megazero.plan.progress import Curve, Progress, curve_of, curves_of
from megazero.plan.rules import RULES
from megazero.plan.sizes import Sizes, sizes
from megazero.plan.sums import Zero
from megazero.plan.verify import verify
from megazero.plan.words import architecture
from megazero.settings import Config


class Placement(NamedTuple):
    """Over which ranks a unit is shared, as kinds of groups: those of `shard` hold its slices, those of `replicate` the
    same slice once more, and so do `holders`, at other places of the pipeline ("": none)."""

    shard: str = "shard"
    replicate: str = "replicate"
    holders: str = ""


@dataclass(frozen=True)
class Plan(Sizes):
    """The resolved run: its sizes, and what else follows from the configuration and from the kind of device."""

    config: Config
    architecture: Architecture
    device: str = "cpu"                                 # or cuda
    programs: tuple[tuple[Action, ...], ...] = ()       # of the ranks of a pipeline, where a file says them

    @classmethod
    def of(cls, config: Config, world: int, vocab_size: int, device: str = "cpu") -> "Plan":
        """That of a configuration in which `checks` finds nothing wrong."""
        return cls(**vars(sizes(config, world)), config=config, architecture=architecture(config, vocab_size),
                   device=device)

    @cached_property
    def mesh(self) -> Mesh:
        several = dict.fromkeys(places for places in self.holders.values() if len(places) > 1)
        return Mesh.of(pp=self.pp, dp=self.dp, tp=self.tp, shard=self.shard, looped=self.virtual > 1,
                       kv=max(self.tp // self.architecture.kv_heads, 1),
                       tied=tuple((f"tied{i or ''}", places) for i, places in enumerate(several)),
                       stage=RULES[self.config.optimizer.optimizer].scope == "matrix")

    @property
    def tokens_per_step(self) -> int:
        """Nominal: samples x sequence length, masked tokens included."""
        return self.global_batch * self.architecture.seq_length

    @property
    def curve(self) -> Curve:
        """Its learning rate."""
        return curve_of(self.config, self)

    def rates(self, progress: Progress) -> tuple[float, ...]:
        """Learning rates of the next step, as plan/rules.py numbers them; the first is that of the logs."""
        return tuple(curve.rate_after(progress) for curve in curves_of(self.config, self.curve))

    @property
    def zero(self) -> Zero:
        p, level = self.config.parallel, self.config.parallel.zero_stage
        lag = 1 if level >= 2 or self.shard < self.dp else 2
        return Zero(level, keep=p.keep_weights, every=p.reduce_every, prefetch=p.overlap_param_gather,
                    lag=lag if p.overlap_grad_reduce and self.shard > 1 else 0, replicas=int(p.overlap_grad_reduce))

    @property
    def head_chunk(self) -> int:
        """Tokens whose logits exist at a time."""
        return head_chunk(self.architecture, self.tp, self.device)

    @property
    def virtual(self) -> int:
        """Stages on each pipeline rank."""
        return self.config.parallel.num_virtual_stages_per_pipeline_rank

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The parts of each stage: the embedding belongs to the first, the head to the last."""
        layers, counts = self.architecture.layers, layers_of_stages(self.config, self.architecture)
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
        tied = tuple(name for name, places in self.holders.items() if len(places) > 1 and place in places)
        return Stages(own, count, self.parts, self.pp > 1, tied)

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """The places in a pipeline whose parts read each unit. The first of them owns it."""
        reads = {(name, stage % self.pp) for stage, own in enumerate(self.stages) for i in own
                 for name in self.parts[i].forward}
        return {u.name: tuple(place for place in range(self.pp) if (u.name, place) in reads) for u in self.units}

    def placement(self, unit: str) -> Placement:
        """Over which ranks a unit is shared."""
        return Placement(holders=next((kind for kind, places in self.mesh.tied if places == self.holders[unit]), ""))

    def units_of(self, rank: int) -> tuple[UnitSpec, ...]:
        """The units that one rank holds."""
        return tuple(u for u in self.units if self.mesh.place(rank).pp in self.holders[u.name])

    def homes(self, rank: int) -> Homes:
        """What of the units of one rank is at home on disk."""
        if all(getattr(self.config.offload, name) != "disk" for name in OFFLOADED):
            return {}
        place = self.mesh.place(rank)
        return homes({u.name: flat(u, place) for u in self.units_of(rank)}, self.dp, self.shard, place, self.config)

    @cached_property
    def passes(self) -> tuple[tuple[Pass, ...], ...]:
        """What each pipeline rank runs in a step."""
        return passes(self.config.parallel.pipeline_schedule, self.pp, self.micro_batches, self.virtual)

    def training(self, rank: int) -> list[Action]:
        """One training step of one rank."""
        place = self.mesh.place(rank).pp
        if self.programs:
            return list(self.programs[place])
        if place not in self._made:
            self._made[place] = training(self.passes[place], self.stages_of(rank), self.zero,
                                         {unit for unit, _ in self.homes(rank)})
        return list(self._made[place])

    @cached_property
    def _made(self) -> dict[int, list[Action]]:
        """Programs that somebody has asked for, by place: those of many micro-batches take a second each."""
        return {}

    def programmed(self, text: str, flag: str) -> "Plan":
        """With the programs of a file's text. Raises UserError, `flag` in front, for what is wrong with them."""
        plan = replace(self, programs=tuple(map(tuple, read_programs(text, flag))))
        wrong = plan.mistakes()
        if wrong:
            more = [f"{flag}: and {len(wrong) - 5} more like these."] if len(wrong) > 5 else []
            raise UserError(*(f"{flag}: {sentence}." for sentence in wrong[:5]), *more)
        return plan

    def mistakes(self) -> list[str]:
        """What is wrong with the programs of a pipeline's ranks, side by side."""
        ranks = range(0, self.world, self.world // self.pp)
        programs = self.programs or [self.training(rank) for rank in ranks]
        return verify(programs, [self.stages_of(rank) for rank in ranks], self.zero.level, self.micro_batches)

    def evaluation(self, rank: int) -> list[Action]:
        """One rank's part of the loss of one micro-batch, without gradients."""
        return evaluation(self.stages_of(rank), self.zero)


def layers_of_stages(c: Config, a: Architecture) -> tuple[int, ...]:
    """Blocks of each stage: as written, by Megatron's rule, even, or by cost. Neither the batch nor tp nor dp has a
    say: a run's stages stay where they are when those change."""
    p, m = c.parallel, Micro(1, a.seq_length, recompute=c.training.recompute_granularity)
    pp, virtual = p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank
    ends = p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers
    if p.pipeline_layout:
        return from_layout(p.pipeline_layout)
    if p.account_for_embedding_in_pipeline_split or p.account_for_loss_in_pipeline_split:
        return ends_as_layers(a.layers, pp * virtual, p.account_for_embedding_in_pipeline_split,
                              p.account_for_loss_in_pipeline_split)
    if p.pipeline_split == "even" or pp * virtual == 1:
        return shares(a.layers, pp * virtual, *ends)
    embedding, *layers, head = (
        Load(sum(row.flops for row in rows), distinct(rows, "kept"), distinct(rows, "between")) for rows in table(a, m))
    layer = Load(*(sum(each) // a.layers for each in zip(*layers, strict=True)))        # their mean
    loads = Loads(layer, embedding, head, again=layer.forward if m.recompute == "full" else 0)
    return by_cost(a.layers, p.pipeline_schedule, pp, virtual, loads, *ends)


def resolve(config: Config, world: int, vocab_size: int, device: str = "cpu") -> Plan:
    """The plan of a configuration on `world` ranks. Raises UserError with every problem at once."""
    errors = checks(config, world)
    if errors:
        raise UserError(*errors)
    return Plan.of(config, world, vocab_size, device)
