"""One data-parallel training step at ZeRO levels 0 to 3 against torch's own:
DDP, DDP with ZeroRedundancyOptimizer, FSDP2.

    python benchmarks/zero_vs_torch.py [--dtype fp32|bf16] [--ranks 2] [--steps 12] [--memory] [--json FILE]

The same GPT-2 shape, first weights, tokens, fused AdamW and clipping, over gloo, one thread per rank. A step of each
kind in turn on the same ranks; the ratio is to DDP in the same round. With --memory, the peak resident set of ranks of
its own for each kind.

What each keeps, in bytes per parameter at N ranks (weights + masters + gradients + moments):
    fp32    level 0 and DDP 4 + 0 + 4 + 8 = 16; level 1 and ZeroRedundancyOptimizer 8 + 8/N;
            level 2 and FSDP2 without reshard 4 + 12/N; level 3 and FSDP2 16/N, each with the layers now gathered on top
    bf16    ours: 2 + 4 + 4 + 8 = 18, bf16 weights, fp32 masters, gradients and sums. The peers that compute the same
            keep fp32 weights and gradients: DDP under autocast (16, and bf16 copies for each use); FSDP2 with bf16
            gathers and fp32 reductions. `ddp, all bf16` keeps bf16 everything (8), sums gradients in bf16 and loses
            small updates: it is another training, shown for its speed.
DDP's buckets hold the gradients themselves (gradient_as_bucket_view).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from harness import GPT, Step, compared, ddp, decayed, drawn_batches, megazero, planned, trained, words
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from megazero.comm import environment
from megazero.plan import Plan
from megazero.settings import option, parse, run


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
    micro_batches: int = option(1, "micro-batches of a step")
    vocab: int = option(2048, "ids")
    steps: int = option(12, "timed steps of each")
    kinds: str | None = option(None, "the kinds to time beside ddp, by comma; all if not given")
    memory: bool = option(False, "also the peak memory of each kind")
    only: str | None = option(None, "run one kind alone and tell its memory")
    json: str | None = option(None, "file for the figures")


def at_level(c: Settings, level: int) -> Plan:
    return planned(words(c, c.batch * c.micro_batches * c.ranks, f"--zero-stage {level}"))


def fsdp2(c: Settings, reshard: bool) -> Step:
    """fully_shard per block and around all.
    Without `reshard`, weights stay gathered from forward to backward (ZeRO level 2)."""
    model = GPT(at_level(c, 0))
    low = (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if c.dtype == "bf16"
           else MixedPrecisionPolicy())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=mesh, mp_policy=low, reshard_after_forward=reshard)
    return trained(model, torch.optim.AdamW(decayed(model), lr=1e-3, fused=True), False, lambda last: nullcontext())


def kinds(c: Settings) -> dict[str, Callable[[], Step]]:
    shared = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=True)
    found: dict[str, Callable[[], Step]] = {"ddp": lambda: ddp(at_level(c, 0))}
    found |= {f"level {level}": lambda level=level: megazero(at_level(c, level))  # type: ignore[misc]
              for level in range(4)}
    found |= {"zero optimizer": lambda: ddp(at_level(c, 0), optimizer=shared),
              "fsdp2 keep": lambda: fsdp2(c, False), "fsdp2": lambda: fsdp2(c, True)}
    if c.dtype == "bf16":
        found["ddp, all bf16"] = lambda: ddp(at_level(c, 0), low=True)
    wanted = c.kinds.split(",") if c.kinds else found
    return {name: make for name, make in found.items() if name in wanted or name == "ddp"}


def main() -> None:
    c = parse(Settings)
    batches = drawn_batches(c, c.ranks, environment()[0])
    compared(c, kinds, lambda kind: batches)


if __name__ == "__main__":
    run(main)
