"""One pipeline-parallel training step against torch.distributed.pipelining and, as the base,
data-parallel DDP on the same ranks.

    python benchmarks/pp_vs_torch.py [--dtype fp32|bf16] [--ranks 2] [--micro-batches 8] [--steps 12]
                                     [--memory] [--json FILE]

The same untied GPT-2 shape (torch's pipelines know no tied weights), first weights, micro-batches, stages (ours, given
to the peer), fused AdamW and clipping by the norm over all stages, over gloo, one thread per rank. A step of each kind
in turn on the same ranks; the ratio is to DDP in the same round, which does half of the micro-batches on each rank.
With --memory, the peak resident set of ranks of its own. In bf16 ours keeps bf16 weights with fp32 masters and
gradients and sends bf16; the peers keep fp32 and compute under autocast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from harness import CPU, GPT, Micro, Step, compared, ddp, decayed, drawn_batches, loss_of, megazero, planned, words
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from megazero.comm import environment
from megazero.plan import Plan
from megazero.settings import option, parse, run


@dataclass(frozen=True)
class Settings:
    """Times a pipeline-parallel step of MegaZero against torch.distributed.pipelining."""

    dtype: str = option("fp32", "of matmuls", choices=("fp32", "bf16"))
    ranks: int = option(2, "pipeline-parallel ranks")
    layers: int = option(8, "blocks")
    hidden: int = option(384, "channels")
    heads: int = option(6, "heads")
    seq: int = option(256, "tokens of a sample")
    batch: int = option(1, "samples of a micro-batch")
    micro_batches: int = option(8, "micro-batches of a step, a multiple of the ranks")
    vocab: int = option(2048, "ids")
    steps: int = option(12, "timed steps of each")
    memory: bool = option(False, "also the peak memory of each kind")
    only: str | None = option(None, "run one kind alone and tell its memory")
    json: str | None = option(None, "file for the figures")


SCHEDULES = {"1f1b": "--pipeline-schedule 1f1b",
             "interleaved": "--pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2"}


def piped(c: Settings, schedule: str) -> Plan:
    return planned(words(c, c.batch * c.micro_batches,
                         f"--pp {c.ranks} --untie-embeddings-and-output-weights {SCHEDULES[schedule]}"))


def stage_of(p: Plan, number: int) -> PipelineStage:
    """One of our stages as torch's. Part 0 is the embedding, the last part the head."""
    parts, head = p.stages[number], len(p.parts) - 1
    model = GPT(p, range(max(parts.start, 1) - 1, min(parts.stop, head) - 1), first=0 in parts, last=head in parts)
    return PipelineStage(model, number, len(p.stages), CPU)


def torch_pipeline(c: Settings, schedule: str) -> Step:
    p, rank = piped(c, schedule), environment()[0]
    stages = [stage_of(p, number) for number in range(rank, len(p.stages), c.ranks)]
    plain = schedule == "1f1b"
    run = (Schedule1F1B(stages[0], c.micro_batches, loss_of) if plain
           else ScheduleInterleaved1F1B(stages, c.micro_batches, loss_of))
    models = nn.ModuleList(stage.submod for stage in stages)
    adam = torch.optim.AdamW(decayed(models), lr=1e-3, fused=True)

    def step(micros: Sequence[Micro]) -> float:
        adam.zero_grad(set_to_none=True)
        x, y = (torch.cat(t) for t in zip(*micros, strict=True))
        losses: list[torch.Tensor] = []
        given = (x,) if rank == 0 else ()
        wanted = {"target": y, "losses": losses} if rank == c.ranks - 1 else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=c.dtype == "bf16"):
            run.step(*given, **wanted, return_outputs=False)
        return clipped(models, adam, sum(losses, torch.zeros(())) / c.micro_batches)

    return step


def clipped(model: nn.Module, adam: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """The update, with gradients clipped by their norm over all stages; the loss, which only the last stage knows."""
    squares = nn.utils.get_total_norm([q.grad for q in model.parameters() if q.grad is not None]).square()
    both = torch.stack((squares, loss.detach()))
    dist.all_reduce(both)
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, both[0].sqrt())
    adam.step()
    return float(both[1])


def kinds(c: Settings) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {"ddp": lambda: ddp(piped(c, "1f1b"))}
    for name in SCHEDULES:
        found[name] = lambda name=name: megazero(piped(c, name))  # type: ignore[misc]
        found[f"torch {name}"] = lambda name=name: torch_pipeline(c, name)  # type: ignore[misc]
    return found


def main() -> None:
    c = parse(Settings)
    micros = drawn_batches(c, 1, 0)
    compared(c, kinds, lambda kind: micros[environment()[0]::c.ranks] if kind == "ddp" else micros)


if __name__ == "__main__":
    run(main)
