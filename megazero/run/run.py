"""One rank of a run: its parts, as the plan says."""

from dataclasses import replace

import torch

from megazero.base import say
from megazero.comm import Wires
from megazero.model import Decoder
from megazero.plan import Plan, flat
from megazero.run.executor import Executor
from megazero.units import TORCH_DTYPE, Buffers, Optimizer, Sharing, Unit

Tensor = torch.Tensor


class Run:
    """Units, decoder, executor and optimizer of one rank, and its programs. Weights are zero until somebody fills them:
    `initialise`, or state/record.py from a checkpoint."""

    def __init__(self, plan: Plan, device: torch.device, wires: Wires) -> None:
        self.plan, self.config, self.device, self.wires = plan, plan.config, device, wires
        a, c = plan.architecture, plan.config
        stages, dtype = plan.stages_of(wires.rank), TORCH_DTYPE[c.dtype]
        sharing = Sharing(c.parallel.zero_stage, wires["shard"], wires["replicate"], buffers=Buffers(poison=wires.late))
        tied = replace(sharing, holders=wires["tied"])
        self.units = {
            u.name: Unit(flat(u, wires.place.tp, plan.tp), dtype, device, tied if u.name in stages.tied else sharing)
            for u in plan.units_of(wires.rank)}
        self.decoder = Decoder(a, self.units, wires["tp"], c.training.seed, c.training.recompute_granularity, device,
                               [i for own in stages.own.values() for i in own])
        self.executor = Executor(self.decoder, wires, plan.parts)
        self.optimizer = Optimizer(list(self.units.values()), c.optimizer)
        self.training, self.evaluation = plan.training(wires.rank), plan.evaluation(wires.rank)

    def initialise(self) -> None:
        for unit in self.units.values():
            unit.initialise(self.config.training.seed)

    def told(self, figure: Tensor) -> Tensor:
        """The figure on the rank that tells it, 0 on those that know the same: sums count it once.
        The last stage knows the loss."""
        teller = self.wires.place.tp == 0 and self.wires.place.pp == self.plan.pp - 1
        return figure if teller else torch.zeros_like(figure)

    def say(self, text: str) -> None:
        if self.wires.rank == 0:
            say(text)
