"""What the benchmarks share: a step of ours, a stock torch GPT that begins with the same weights,
ranks, clocks and the table.

A step takes micro-batches [(tokens, targets)] of this rank, each [b, s] int64, and returns the loss before its update.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megazero.comm import connect, environment
from megazero.model import Batch
from megazero.plan import Box, Parameter, Plan, resolve
from megazero.run import Run, Turn, memory_bytes
from megazero.settings import from_command_line
from megazero.units import fill_normal, key

Micro = tuple[Tensor, Tensor]
Step = Callable[[Sequence[Micro]], float]
CPU = torch.device("cpu")


# ---- the model, twice

def words(c: Any, samples: int, more: str) -> str:
    """Our command line for the GPT-2 shape of a benchmark's settings, for steps of so many samples."""
    return (f"--num-layers {c.layers} --hidden-size {c.hidden} --num-attention-heads {c.heads} --seq-length {c.seq} "
            "--openai-gelu --lr 1e-3 --weight-decay 0.1 --clip-grad 1 --mock-data --train-iters 100 --eval-iters 0 "
            f"--vocab-size {c.vocab} --dtype {c.dtype} "
            f"--micro-batch-size {c.batch} --global-batch-size {samples} {more}")


def planned(line: str) -> Plan:
    c = from_command_line(line.split())
    assert c.data.vocab_size is not None
    return resolve(c, environment()[1], c.data.vocab_size)


def megazero(p: Plan, device: torch.device = CPU) -> Step:
    """Everything a step of a real run does but reading the data."""
    run = Run(p, device, connect(p.mesh, environment()[0], "gloo", 600))
    run.initialise()
    lr, one = torch.tensor(1e-3, device=device), torch.ones((), device=device)

    def step(micros: Sequence[Micro]) -> float:
        made = [Batch(x, y, torch.ones(x.shape, device=device), torch.arange(len(x), device=device), 0)
                for x, y in micros]
        verdict = run.executor.train(run.training, Turn(one, p.tokens_per_step, lr, batches=made)).verdict
        assert verdict is not None
        return float(verdict.loss)

    return step


class Block(nn.Module):
    def __init__(self, h: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({"norm": nn.LayerNorm(h), "qkv": nn.Linear(h, 3 * h), "o": nn.Linear(h, h)})
        self.mlp = nn.ModuleDict({"norm": nn.LayerNorm(h), "up": nn.Linear(h, 4 * h), "down": nn.Linear(4 * h, h)})

    def forward(self, x: Tensor) -> Tensor:
        (b, s, h), a, m = x.shape, self.attention, self.mlp
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in a["qkv"](a["norm"](x)).split(h, -1))
        x = x + a["o"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h))
        return x + m["down"](F.gelu(m["up"](m["norm"](x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 as one writes it in torch: tokens [b, s] -> logits [b, s, vocabulary]. Modules have our weights' names.

    A pipeline stage has some of the layers, under their full numbers, and the ends only if it is `first` or `last`:
    then hidden states [b, s, h] come in or go out.
    """

    def __init__(self, p: Plan, layers: range | None = None, first: bool = True, last: bool = True) -> None:
        super().__init__()
        a = p.architecture
        self.embedding = nn.Embedding(a.vocab_size, a.hidden) if first else None
        self.positions = nn.Embedding(a.seq_length, a.hidden) if first else None
        self.layers = nn.ModuleDict({str(i): Block(a.hidden, a.heads)
                                     for i in (range(a.layers) if layers is None else layers)})
        output = {} if a.tied else {"output": nn.Linear(a.hidden, a.vocab_size, bias=False)}
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(a.hidden), **output}) if last else None
        draw(self, p)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None and self.positions is not None:
            x = self.embedding(x) + self.positions.weight[:x.shape[1]]
        for layer in self.layers.values():
            x = layer(x)
        if self.head is None:
            return x
        x = self.head["norm"](x)
        return self.head["output"](x) if "output" in self.head else F.linear(x, self.embedding.weight)


def draw(model: nn.Module, p: Plan) -> None:
    """The weights our run begins with. Our q, k and v are one matrix here."""
    ours = {q.name: q for unit in p.units for q in unit.parameters}
    for name, weight in model.named_parameters():
        names = [name.replace("qkv", n) for n in "qkv"] if "qkv" in name else [name]
        for n, out in zip(names, weight.data.chunk(len(names)), strict=True):
            fill(out, ours[n], p.config.training.seed)


def fill(out: Tensor, p: Parameter, seed: int) -> None:
    if p.std:
        fill_normal(out, key(seed, p.name), p.shape, Box((0,) * len(p.shape), p.shape), p.mean, p.std)
    else:
        out.fill_(p.mean)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    return [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


def ddp(p: Plan, low: bool = False, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> Step:
    """torch's DistributedDataParallel: fp32 weights, under autocast for bf16; or with `low` everything in bf16."""
    model = GPT(p).bfloat16() if low else GPT(p)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    adam = (optimizer or torch.optim.AdamW)(decayed(wrapped), lr=1e-3, fused=True)
    return trained(wrapped, adam, p.config.dtype == "bf16" and not low,
                   lambda last: nullcontext() if last else wrapped.no_sync())


def trained(model: nn.Module, adam: torch.optim.Optimizer, autocast: bool, around: Callable[[bool], Any]) -> Step:
    """The ordinary loop. `around` is told whether a micro-batch is the step's last;
    what it returns is entered around it."""
    def step(micros: Sequence[Micro]) -> float:
        adam.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for i, (x, y) in enumerate(micros):
            with around(i == len(micros) - 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loss_of(model(x), y) / len(micros)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return float(total)

    return step


def drawn_batches(c: Any, ranks: int, rank: int) -> list[Micro]:
    """The same random tokens for everybody: this rank's [c.batch, c.seq] of each of c.micro_batches."""
    shape = (c.micro_batches, ranks, c.batch, c.seq + 1)
    tokens = torch.randint(c.vocab, shape, generator=torch.Generator().manual_seed(1))[:, rank]
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


# ---- ranks, clocks, the table

def launched(ranks: int, *more: str) -> Any:
    """Runs this script once more as so many ranks, one thread each; returns what `tell` told."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               *sys.argv, *more]
    ran = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed; what it said stands above")
    return json.loads(ran.stdout.splitlines()[-1])


def tell(figures: Any) -> None:
    """From rank 0 to the process that launched the ranks; ends this one's part."""
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def interleaved(steps: Mapping[str, Callable[[], Any]], rounds: int,
                barrier: Callable[[], Any] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each step, one of each kind in turn, after two rounds that do not count.
    Every round begins with another kind."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds + 2):
        for name in names[i % len(names):] + names[:i % len(names)]:
            barrier()
            start = time.perf_counter()
            steps[name]()                                       # reads the loss: waits for the device
            barrier()                                           # a step is over when it is over everywhere
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def compared(c: Any, kinds: Callable[[Any], Mapping[str, Callable[[], Step]]],
             batches: Callable[[str], Sequence[Micro]]) -> dict[str, Any]:
    """The whole of a benchmark of several ranks. The first process launches the ranks, prints the table and returns
    what `in_turn` found; the others are ranks, and return nothing.

    `kinds` makes the steps to compare, the base first; `batches` is what this rank gets in a step of a kind. `c` has
    ranks, steps, memory, only and json.
    """
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        tell(alone(c, kinds(c), batches) if c.only else in_turn(c, kinds(c), batches))
        return {}
    figures = launched(c.ranks)
    names = list(figures["times"])
    memory = {name: launched(c.ranks, "--only", name) for name in ("nothing", *names)} if c.memory else {}
    print("\n".join(table(figures["times"], names[0], memory, figures["losses"])))
    if c.json:
        with open(c.json, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(c), "torch": torch.__version__, "memory": memory, **figures}, file, indent=1)
    return dict(figures)


def alone(c: Any, kinds: Mapping[str, Callable[[], Step]], batches: Callable[[str], Sequence[Micro]]) -> int:
    """Peak resident bytes of the largest rank after four steps of one kind; of `nothing`, what is loaded anyway."""
    if c.only != "nothing":
        step = kinds[c.only]()
        for _ in range(4):
            step(batches(c.only))
    peak = torch.tensor(memory_bytes(CPU))
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def in_turn(c: Any, kinds: Mapping[str, Callable[[], Step]],
            batches: Callable[[str], Sequence[Micro]]) -> dict[str, Any]:
    """Seconds and last loss (the mean over ranks) of every kind."""
    losses: dict[str, float] = {}

    def kept(name: str, step: Step) -> None:
        losses[name] = step(batches(name))

    times = interleaved({name: partial(kept, name, make()) for name, make in kinds.items()}, c.steps, dist.barrier)
    total = torch.tensor([losses[name] for name in kinds])
    dist.all_reduce(total)
    return {"times": times, "losses": dict(zip(kinds, (total / dist.get_world_size()).tolist(), strict=True))}


def table(times: Mapping[str, Sequence[float]], base: str, memory: Mapping[str, int],
          losses: Mapping[str, float]) -> list[str]:
    """A line for each kind of step.
    The ratio is the median over rounds of its time to that of `base` in the same round."""
    width = max(map(len, times))
    lines = [f"{'':{width}}   median ms  fastest ms  x {base:<10} peak MiB  of it loaded   last loss"]
    for name, t in times.items():
        ratio = median(a / b for a, b in zip(t, times[base], strict=True))
        mib = f"{memory[name] / 2**20:8.0f}  {memory.get('nothing', 0) / 2**20:12.0f}" if name in memory else f"{'':22}"
        lines.append(f"{name:{width}}  {median(t) * 1e3:10.1f}  {min(t) * 1e3:10.1f}  {ratio:<12.3f} {mib}  "
                     f"{losses[name]:10.4f}")
    return lines
