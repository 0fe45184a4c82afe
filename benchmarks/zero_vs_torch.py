"""One data-parallel training step at ZeRO levels 0 to 3 against torch's own: DDP, DDP with ZeroRedundancyOptimizer, FSDP2.

    python benchmarks/zero_vs_torch.py [--dtype fp32|bf16] [--ranks 2] [--steps 12] [--memory] [--json FILE]

The same GPT-2 shape, first weights, tokens, fused AdamW and clipping, over gloo, one thread per rank. A step of each kind in turn on the
same ranks; the ratio is to DDP in the same round. With --memory, the peak resident set of ranks of its own for each kind.

What each keeps, in bytes per parameter at N ranks (weights + masters + gradients + moments):
    fp32    level 0 and DDP 4 + 0 + 4 + 8 = 16; level 1 and ZeroRedundancyOptimizer 8 + 8/N; level 2 and FSDP2 without reshard 4 + 12/N;
            level 3 and FSDP2 16/N, each with the layers now gathered on top
    bf16    ours: 2 + 4 + 4 + 8 = 18, bf16 weights, fp32 masters, gradients and sums. The peers that compute the same keep fp32 weights
            and gradients: DDP under autocast (16, and bf16 copies for each use); FSDP2 with bf16 gathers and fp32 reductions. `ddp, all
            bf16` keeps bf16 everything (8), sums gradients in bf16 and loses small updates: it is another training, shown for its speed.
DDP's buckets hold the gradients themselves (gradient_as_bucket_view).
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from harness import (
    CPU,
    GPT,
    Micro,
    Step,
    decayed,
    drawn_batches,
    interleaved,
    is_rank,
    launched,
    loss_of,
    mean_loss,
    megazero,
    peak_memory,
    planned,
    table,
    tell,
    words,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megazero import command_line
from megazero.comm import environment
from megazero.command_line import option


@dataclass(frozen=True)
class Settings:
    """Times a data-parallel step of MegaZero at each ZeRO level against torch's."""

    dtype: str = option("fp32", "of matmuls", choices=("fp32", "bf16"))
    ranks: int = option(2, "data-parallel ranks")
    layers: int = option(6, "blocks")
    hidden: int = option(384, "channels")
    heads: int = option(6, "heads")
    seq: int = option(256, "tokens of a sample")
    batch: int = option(2, "samples of a micro-batch of a rank")
    accumulate: int = option(1, "micro-batches of a step")
    vocab: int = option(2048, "ids")
    steps: int = option(12, "timed steps of each")
    kinds: str | None = option(None, "the kinds to time, by comma; all if not given")
    memory: bool = option(False, "also the peak memory of each kind")
    only: str | None = option(None, "run one kind alone and tell its memory")
    json: str | None = option(None, "file for the figures")


def line(c: Settings, level: int) -> str:
    return words(c, c.ranks, f"--zero-stage {level}")


def trained(model: nn.Module, adam: torch.optim.Optimizer, autocast: bool, last: Callable[[bool], Any]) -> Step:
    """The ordinary loop. `last` is told whether a micro-batch is the step's last; what it returns is entered around it."""
    def step(micros: Sequence[Micro]) -> float:
        adam.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for i, (x, y) in enumerate(micros):
            with last(i == len(micros) - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model(x), y) / len(micros)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return float(total)

    return step


def ddp(c: Settings, low: bool = False, zero: bool = False) -> Step:
    """fp32 weights, under autocast for bf16; or with `low` everything in bf16. With `zero`, AdamW's state is shared out."""
    model = GPT(planned(line(c, 0)))
    wrapped = DistributedDataParallel(model.bfloat16() if low else model, gradient_as_bucket_view=True)
    groups = decayed(wrapped)
    adam: torch.optim.Optimizer
    if zero:
        adam = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-3, betas=(0.9, 0.999), fused=True)
    else:
        adam = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return trained(wrapped, adam, c.dtype == "bf16" and not low, lambda last: nullcontext() if last else wrapped.no_sync())


def fsdp2(c: Settings, reshard: bool) -> Step:
    """fully_shard per block and around all. Without `reshard`, weights stay gathered from forward to backward (ZeRO level 2)."""
    model = GPT(planned(line(c, 0)))
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if c.dtype == "bf16" else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=low, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=low, reshard_after_forward=reshard)
    return trained(model, torch.optim.AdamW(decayed(model), lr=1e-3, fused=True), False, lambda last: nullcontext())


def kinds(c: Settings) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {"ddp": partial(ddp, c)}
    found |= {f"level {level}": lambda level=level: megazero(planned(line(c, level))) for level in range(4)}  # type: ignore[misc]
    found |= {"zero optimizer": partial(ddp, c, zero=True), "fsdp2 keep": partial(fsdp2, c, False), "fsdp2": partial(fsdp2, c, True)}
    if c.dtype == "bf16":
        found["ddp, all bf16"] = partial(ddp, c, low=True)
    wanted = c.kinds.split(",") if c.kinds else found
    return {name: made for name, made in found.items() if name in wanted or name == "ddp"}


def rank(c: Settings) -> None:
    """One rank of the timed steps, or of one kind alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = drawn_batches(c, c.ranks, environment()[0])
    if c.only:
        alone = kinds(c)[c.only]() if c.only != "nothing" else None
        tell(peak_memory(alone and (lambda: alone(batches))))
        return
    losses: dict[str, float] = {}

    def kept(name: str, step: Step) -> float:
        losses[name] = step(batches)
        return losses[name]

    steps = {name: partial(kept, name, made()) for name, made in kinds(c).items()}
    times = interleaved(steps, c.steps, dist.barrier)
    tell({"times": times, "losses": {name: mean_loss(x) for name, x in losses.items()}})


def main() -> None:
    c = command_line.parse(Settings)
    if is_rank():
        rank(c)
        return
    figures = launched(c.ranks)
    memory = {name: launched(c.ranks, "--only", name) for name in ("nothing", *kinds(c))} if c.memory else {}
    print("\n".join(table(figures["times"], "ddp", memory, figures["losses"])))
    if c.json:
        with open(c.json, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(c), "torch": torch.__version__, "device": str(CPU), "memory": memory, **figures}, file, indent=1)


if __name__ == "__main__":
    command_line.run(main)
