"""One training step of MegaZero against a plain, well-written torch loop of the same model, interleaved in one process.

    python benchmarks/step_vs_torch.py [--dtype fp32|bf16] [--steps 20] [--json FILE]

The peer is an ordinary nn.Module trained with autograd, torch.nn.functional.cross_entropy, clip_grad_norm_ and
fused AdamW. In bf16 it keeps bf16 weights with fp32 masters, as MegaZero does, and accumulates gradients in
fp32; `autocast` is the other common form, fp32 weights cast for each use. Peak memory is that of a process of
its own for each (resident set).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Micro, Step, megazero, planned, words
from torch import Tensor, nn

from megazero.run import memory_bytes
from megazero.settings import option, parse, run


@dataclass(frozen=True)
class Settings:
    """Times one step of MegaZero against a plain torch loop."""

    dtype: str = option("fp32", "of weights and matmuls", choices=("fp32", "bf16"))
    layers: int = option(6, "blocks")
    hidden: int = option(384, "channels")
    heads: int = option(6, "heads")
    seq: int = option(256, "tokens of a sample")
    batch: int = option(8, "samples of a micro-batch")
    micro_batches: int = option(1, "micro-batches of a step")
    vocab: int = option(50304, "ids")
    steps: int = option(12, "timed steps of each")
    device: str = option("auto", "where", choices=("auto", "cpu", "cuda"))
    only: str | None = option(None, "run one alone and print its memory", choices=("megazero", "plain", "autocast"))
    json: str | None = option(None, "file for the figures")


class Block(nn.Module):
    def __init__(self, h: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2, self.heads = nn.LayerNorm(h), nn.LayerNorm(h), heads
        self.qkv, self.o, self.up, self.down = (
            nn.Linear(h, 3 * h), nn.Linear(h, h), nn.Linear(h, 4 * h), nn.Linear(4 * h, h))

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.n1(x)).split(h, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class Plain(nn.Module):
    def __init__(self, c: Settings) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.seq, c.hidden)
        self.blocks = nn.ModuleList(Block(c.hidden, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.hidden)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.dim() == 2 else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.words(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(F.linear(self.norm(h), self.words.weight).view(-1, self.words.weight.shape[0]).float(),
                               y.view(-1))


def plain_step(c: Settings, device: torch.device, autocast: bool) -> Step:
    """The peer: fp32; or bf16 weights with fp32 masters and gradients; or autocast."""
    model = Plain(c).to(device)
    low = c.dtype == "bf16" and not autocast
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()] if low else list(model.parameters())
    if low:
        model = model.bfloat16()
    groups = [{"params": [p for p in masters if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step(batches: Sequence[Micro]) -> float:
        adam.zero_grad(set_to_none=True)
        total = 0.0
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast and c.dtype == "bf16"):
                loss = model(x, y) / len(batches)
            loss.backward()
            total += loss.detach()
            if low:                                             # fp32 accumulation, as megazero has
                for p, m in zip(model.parameters(), masters, strict=True):
                    m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
                    p.grad = None
        nn.utils.clip_grad_norm_(masters, 1.0)
        adam.step()
        if low:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), masters)
        return float(total)

    return step


def main() -> None:
    c = parse(Settings)
    device = torch.device("cuda" if c.device != "cpu" and torch.cuda.is_available() else "cpu")
    line = words(c, c.batch * c.micro_batches, "")
    made: dict[str, Callable[[], Step]] = {
        "megazero": lambda: megazero(planned(line), device), "plain": lambda: plain_step(c, device, False)}
    if c.dtype == "bf16":
        made["autocast"] = lambda: plain_step(c, device, True)
    tokens = torch.randint(c.vocab, (c.micro_batches, c.batch, c.seq + 1),
                           generator=torch.Generator().manual_seed(1)).to(device)
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    if c.only:
        step = made[c.only]()
        for _ in range(4):
            step(batches)
        print(memory_bytes(device))
        return
    steps = {name: make() for name, make in made.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(c.steps + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batches)                                       # reads the loss: waits for the device
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    memory = {name: int(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name],
                                       capture_output=True, text=True, check=True).stdout.split()[-1])
              for name in steps}
    figures = {name: {"seconds": sorted(t)[len(t) // 2], "fastest": min(t), "peak_bytes": memory[name]}
               for name, t in times.items()}
    for name, f in figures.items():
        print(f"{name:9} {f['seconds'] * 1e3:8.1f} ms median {f['fastest'] * 1e3:8.1f} ms fastest "
              f"{f['peak_bytes'] / 2**20:8.0f} MiB   {f['seconds'] / figures['plain']['seconds']:.3f} x plain, "
              f"fastest {f['fastest'] / figures['plain']['fastest']:.3f} x")
    if c.json:
        with open(c.json, "w", encoding="utf-8") as file:
            json.dump({"command": sys.argv, "torch": torch.__version__, "threads": torch.get_num_threads(), **figures},
                      file, indent=1)


if __name__ == "__main__":
    run(main)
