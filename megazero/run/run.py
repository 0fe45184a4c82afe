"""One rank of a run: its parts, as the plan says."""

from dataclasses import replace

import torch

from megazero.base import say
from megazero.comm import Wires
from megazero.model import Decoder
from megazero.plan import Action, Plan, flat, watched
from megazero.run.executor import Executor
from megazero.units import TORCH_DTYPE, Buffers, Disk, Gate, Sharing, Unit, UnitActions, Updater, WeightWatch

Tensor = torch.Tensor


class Run:
    """Units, decoder, executor, gate and updater of one rank, and its programs. Weights are zero until somebody fills
    them: `initialise`, or state/record.py from a checkpoint."""

    def __init__(self, plan: Plan, device: torch.device, wires: Wires) -> None:
        self.plan, self.config, self.device, self.wires = plan, plan.config, device, wires
        a, c = plan.architecture, plan.config
        stages, buffers = plan.stages_of(wires.rank), Buffers(poison=wires.late)
        self.home = Disk.of(c.offload, plan.homes(wires.rank), poison=wires.late)
        self.units: dict[str, Unit] = {}
        for spec in plan.units_of(wires.rank):
            at = plan.placement(spec.name)
            sharing = Sharing(plan.zero.level, wires[at.shard], wires[at.replicate], wires[at.holders], wires["tp"],
                              wires["stage"], buffers)
            self.units[spec.name] = Unit(flat(spec, wires.place), TORCH_DTYPE[c.dtype], device, sharing,
                                         masters=c.optimizer.main_params_dtype == "fp32", home=self.home)
        self.decoder = Decoder(a, self.units, wires["tp"], seed=c.training.seed,
                               recompute=c.training.recompute_granularity, device=device, chunk=plan.head_chunk,
                               own=[i for own in stages.own.values() for i in own])
        self.training, self.evaluation = plan.training(wires.rank), plan.evaluation(wires.rank)
        self.smaller: dict[int, list[Action]] = {}              # by the samples of a step, while those grow
        units = list(self.units.values())
        self.gate = Gate(units, c.optimizer.clip_grad, wires["world"], tells=wires.place.tp == 0)
        self.updater = Updater(units, c.optimizer, {a.units for a in self.training if a.kind == "update"},
                               seed=c.training.seed)
        self.actions = UnitActions(self.units, wires, self.gate, self.updater)
        if asked := watched(c):
            self.actions.watch = WeightWatch(units, [u.name for u in plan.units], wires["world"], asked)
        self.executor = Executor(self.decoder, wires, plan.parts, self.actions)

    def initialise(self) -> None:
        for unit in self.units.values():
            unit.initialise(self.config.training.seed)

    def training_at(self, samples: int) -> list[Action]:
        """The program of the step that begins after so many samples."""
        batch = self.plan.batch_at(samples)
        if batch == self.plan.global_batch:
            return self.training
        if batch not in self.smaller:
            self.smaller = {batch: replace(self.plan, global_batch=batch).training(self.wires.rank)}
        return self.smaller[batch]

    def say(self, text: str) -> None:
        if self.wires.rank == 0:
            say(text)
