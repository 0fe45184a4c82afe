"""One tensor-parallel training step against torch's DTensor tensor parallelism, with and without sequence parallelism.

    torchrun --nproc_per_node 2 benchmarks/tp_vs_dtensor.py [--dtype fp32] [--steps 8]

The same model (pre-norm GPT without biases, untied head) and tokens, AdamW and clipping; a step of each in turn on the
same ranks. The peer is written as torch's tutorial and torchtitan write it: column- and row-wise plans,
vocabulary-parallel embedding and loss. It begins with torch's own first weights, so its losses are others.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import megazero, planned, words
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from megazero.comm import environment
from megazero.settings import option, parse, run


@dataclass(frozen=True)
class Settings:
    """Times a tensor-parallel step of MegaZero against DTensor."""

    dtype: str = option("fp32", "of weights and matmuls", choices=("fp32", "bf16"))
    layers: int = option(4, "blocks")
    hidden: int = option(384, "channels")
    heads: int = option(6, "heads")
    seq: int = option(256, "tokens of a sample")
    batch: int = option(4, "samples of a step")
    vocab: int = option(8192, "ids")
    steps: int = option(8, "timed steps of each")


class Block(nn.Module):
    def __init__(self, c: Settings) -> None:
        super().__init__()
        h, self.width = c.hidden, c.hidden // c.heads
        self.n1, self.n2 = nn.LayerNorm(h, bias=False), nn.LayerNorm(h, bias=False)
        self.attention = nn.ModuleDict({n: nn.Linear(h, h, bias=False) for n in "qkvo"})
        self.mlp = nn.Sequential(nn.Linear(h, 4 * h, bias=False), nn.GELU(), nn.Linear(4 * h, h, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        q, k, v = (self.attention[n](y) for n in "qkv")
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in (q, k, v))
        x = x + self.attention["o"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.n2(x))


class Plain(nn.Module):
    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(c.vocab, c.hidden), nn.LayerNorm(c.hidden, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = nn.Linear(c.hidden, c.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def dtensor_step(c: Settings, sequence: bool) -> Callable[[Tensor, Tensor], float]:
    """The peer. With `sequence`, activations between blocks are cut along the sequence, as ours always are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Plain(c).to(torch.bfloat16 if c.dtype == "bf16" else torch.float32)
    between = Shard(1) if sequence else Replicate()
    parallelize_module(model, mesh, {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
        **({"norm": SequenceParallel()} if sequence else {})})
    for block in model.blocks:
        rows = {"attention.o": RowwiseParallel(output_layouts=between),
                "mlp.2": RowwiseParallel(output_layouts=between)}
        if sequence:
            gather = {n: PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
                      for n in ("mlp",)}
            cols = ({f"attention.{n}": ColwiseParallel(input_layouts=Shard(1)) for n in "qkv"}
                    | {"mlp.0": ColwiseParallel()})
            parallelize_module(block, mesh, {
                "n1": SequenceParallel(), "n2": SequenceParallel(), **gather, **cols, **rows})
        else:
            parallelize_module(block, mesh, {
                **{f"attention.{n}": ColwiseParallel() for n in "qkv"}, "mlp.0": ColwiseParallel(), **rows})
    # torch's foreach kernels take one kind at a time
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    kinds = [k for k in (cut, plain) if k]
    adam = torch.optim.AdamW([{"params": k} for k in kinds], lr=1e-3, foreach=True)

    def step(x: Tensor, y: Tensor) -> float:
        adam.zero_grad(set_to_none=True)
        with loss_parallel():
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            loss.backward()
        for kind in kinds:
            nn.utils.clip_grad_norm_(kind, 1.0)
        adam.step()
        return float(loss.detach().full_tensor()) if isinstance(loss, DTensor) else float(loss.detach())

    return step


def ours(c: Settings) -> Callable[[Tensor, Tensor], float]:
    more = (f"--tp {environment()[1]} --disable-bias-linear --untie-embeddings-and-output-weights "
            "--position-embedding-type none")
    step = megazero(planned(words(c, c.batch, more)))
    return lambda x, y: step([(x, y)])


def main() -> None:
    c = parse(Settings)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = {"megazero": ours(c), "dtensor": dtensor_step(c, False), "dtensor, sequence": dtensor_step(c, True)}
    tokens = torch.randint(c.vocab, (c.batch, c.seq + 1), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for i in range(c.steps + 2):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name] = step(x, y)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        best = min(sorted(t)[len(t) // 2] for name, t in times.items() if name != "megazero")
        for name, t in times.items():
            middle = sorted(t)[len(t) // 2]
            print(f"{name:18} {middle * 1e3:8.1f} ms median {min(t) * 1e3:8.1f} ms fastest   "
                  f"{middle / best:.3f} x the better peer   loss {losses[name]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
