"""One command for the first minutes on a device: what it can do, what each part of a block takes, whether a step waits
for the host, what a profile says, and whole steps at sizes that people know.

    python benchmarks/gpu.py --out figures.json                 # under ten minutes on one H100
    python benchmarks/gpu.py --toy --device cpu                 # the same in seconds, to see that it runs

Each stage is one line and one entry of the file, written when it is done; a stage that fails says why, and the next
goes on. docs/performance.md has what was estimated beforehand.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megazero.comm import connect
from megazero.model import Batch
from megazero.plan import Mesh, Plan, flops_per_token, memory, resolve
from megazero.run import Run, Turn
from megazero.settings import from_command_line

LLAMA = ("--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
         "--untie-embeddings-and-output-weights")
SIZES = {
    "llama-1.3b": "--num-layers 24 --hidden-size 2048 --ffn-hidden-size 5504 --num-attention-heads 16 "
                  f"--seq-length 4096 --vocab-size 50304 --micro-batch-size 2 {LLAMA}",
    "gpt-1.3b": "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 4096 --vocab-size 50304 "
                "--micro-batch-size 2 --openai-gelu",
    "llama-8b-8-layers": "--num-layers 8 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
                         f"--num-query-groups 8 --seq-length 4096 --vocab-size 128256 --micro-batch-size 1 {LLAMA}",
}
TOY = {"toy": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 101 "
              f"--micro-batch-size 2 {LLAMA}"}
Figures = dict[str, Any]


class Asked(NamedTuple):
    device: torch.device
    sizes: dict[str, str]
    repeats: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, do: Callable[[], object]) -> float:
        """Of one call, the mean of several that the device gets without a pause."""
        for _ in range(2):
            do()
        self.wait()
        start = time.perf_counter()
        for _ in range(self.repeats):
            do()
        self.wait()
        return (time.perf_counter() - start) / self.repeats * 1000


class Trainer:
    """Steps over one batch that lies on the device."""

    def __init__(self, size: str, asked: Asked, micro_batches: int) -> None:
        samples = int(size.split("--micro-batch-size ")[1].split()[0]) * micro_batches
        c = from_command_line(f"{size} --lr 1e-4 --mock-data --train-iters 1000 --eval-iters 0 --bf16 "
                              f"--global-batch-size {samples}".split())
        self.plan: Plan = resolve(c, 1, c.data.vocab_size or 0, asked.device.type)
        self.run = Run(self.plan, asked.device, connect(Mesh.of(), 0, "gloo", 60))
        self.run.initialise()
        a, b = self.plan.architecture, self.plan.micro_batch
        tokens = torch.randint(a.vocab_size, (b, a.seq_length + 1), device=asked.device)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(),
                      torch.ones(b, a.seq_length, device=asked.device), torch.arange(b, device=asked.device), 0)
        self.batches = [batch] * micro_batches
        self.lr, self.one = torch.tensor(1e-4, device=asked.device), torch.ones((), device=asked.device)

    def step(self) -> Tensor:
        """The loss, on the device."""
        turn = Turn(self.one, self.plan.architecture.seq_length, self.lr, batches=self.batches)
        verdict = self.run.executor.train(self.run.training, turn).verdict
        assert verdict is not None
        return verdict.loss


# ---- stages

def ceilings(asked: Asked) -> Figures:
    """What a step can be measured against: the best product, and a copy."""
    n, count = (8192, 1 << 30) if asked.cuda else (128, 1 << 16)
    a, b = (torch.randn(n, n, device=asked.device).bfloat16() for _ in range(2))
    c, big = torch.empty_like(a), torch.empty(count, dtype=torch.uint8, device=asked.device)
    to = torch.empty_like(big)
    return {"device": torch.cuda.get_device_name() if asked.cuda else "cpu", "torch": torch.__version__,
            "bf16 TFLOP/s": 2e-9 * n**3 / asked.milliseconds(lambda: torch.mm(a, b, out=c)),
            "copy TB/s": 2e-9 * count / asked.milliseconds(lambda: to.copy_(big))}


def parts(asked: Asked) -> Figures:
    """Milliseconds forward and backward of each part of a block, and of the head, at each size."""
    return {name: _parts(Trainer(_layers(size, 1), asked, 1), asked) for name, size in asked.sizes.items()}


def _parts(t: Trainer, asked: Asked) -> Figures:
    block, head, (batch,) = t.run.decoder.parts[1], t.run.decoder.head, t.batches
    assert head is not None
    x = torch.randn(batch.tokens.numel(), t.plan.architecture.hidden, device=asked.device).bfloat16()
    dy = torch.randn_like(x)
    for unit in t.run.units.values():
        unit.open()

    def there_and_back(part: Callable[[Tensor], Tensor]) -> float:
        return asked.milliseconds(lambda: torch.autograd.backward(part(x.detach().requires_grad_()), dy))

    made: Any = block
    return {"norm": there_and_back(made.norm), "attention": there_and_back(lambda y: made.attention(y, batch)),
            "mlp": there_and_back(made.mlp), "block": there_and_back(lambda y: made(y, batch)),
            "head": asked.milliseconds(lambda: head.forward_backward(x, batch, t.one)),
            "weight gradient": asked.milliseconds(lambda: made.o.add_product(dy, dy[:, :made.o.value.shape[1]]))}


def attention(asked: Asked) -> Figures:
    """Which kernels attention takes, forward and backward, and their milliseconds: one that is not called flash, fmha
    or cudnn is a fallback."""
    made: Figures = {}
    for name, size in asked.sizes.items():
        t = Trainer(_layers(size, 1), asked, 1)
        part: Any = t.run.decoder.parts[1]
        for unit in t.run.units.values():
            unit.open()
        x = torch.randn(t.batches[0].tokens.numel(), t.plan.architecture.hidden, device=asked.device).bfloat16()

        def run(part: Any = part, x: Tensor = x, t: Trainer = t) -> None:
            part.attention(x.detach().requires_grad_(), t.batches[0]).sum().backward()

        run()
        rows = _profiled(run, asked)
        words = ("flash", "fmha", "sdpa", "cudnn", "attention", "softmax")
        made[name] = [f"{us / 1000:.2f} ms, {n} x {key[:90]}" for us, n, key in rows
                      if any(word in key.lower() for word in words)]
    return made


def norms(asked: Asked) -> Figures:
    """RMSNorm as a block takes it beside the formula, operation by operation: milliseconds there and back, and how far
    each is from float64."""
    t = Trainer(_layers(next(iter(asked.sizes.values())), 1), asked, 1)
    block: Any = t.run.decoder.parts[1]
    for unit in t.run.units.values():
        unit.open()
    x = torch.randn(t.batches[0].tokens.numel(), t.plan.architecture.hidden, device=asked.device).bfloat16()
    dy, epsilon = torch.randn_like(x), t.plan.architecture.epsilon

    def formula(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype)

    def there_and_back(norm: Callable[[Tensor], Tensor]) -> float:
        return asked.milliseconds(lambda: torch.autograd.backward(norm(x.detach().requires_grad_()), dy))

    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return {f"{name} {what}": figure for name, norm in (("ours", block.norm), ("formula", formula))
            for what, figure in (("ms", there_and_back(norm)),
                                 ("error", float((norm(x).double() - exact).norm() / exact.norm())))}


def products(asked: Asked) -> Figures:
    """TFLOP/s of a weight's gradient: summed in fp32 over what was there and added to it, and as a bf16 result."""
    shapes = ((4096, 28672, 4096), (8192, 11008, 2048), (2048, 128256, 4096)) if asked.cuda else ((32, 64, 48),)
    made: Figures = {}
    for tokens, rows, columns in shapes:
        dy, x = (torch.randn(tokens, n, device=asked.device).bfloat16() for n in (rows, columns))
        wide = torch.zeros(rows, columns, device=asked.device)
        half = torch.empty(rows, columns, device=asked.device, dtype=torch.bfloat16)

        def summed(keep: int, wide: Tensor = wide, dy: Tensor = dy, x: Tensor = x) -> None:
            if wide.is_cuda:
                torch.ops.megazero.add_wide(wide, dy, x, keep)
            else:
                wide.mul_(keep).add_(dy.T @ x)

        def rounded(half: Tensor = half, dy: Tensor = dy, x: Tensor = x) -> Tensor:
            return torch.mm(dy.T, x, out=half)

        for name, do in (("fp32", lambda: summed(0)), ("fp32 added", lambda: summed(1)), ("bf16", rounded)):
            rate = 2e-9 * tokens * rows * columns / asked.milliseconds(do)
            made[f"{tokens} x {rows} x {columns} {name}"] = rate
    return made


def _layers(size: str, count: int) -> str:
    words = size.split()
    words[words.index("--num-layers") + 1] = str(count)
    return " ".join(words)


def waits(asked: Asked) -> Figures:
    """Where a step makes the host wait for the device: nowhere, or torch's warnings."""
    t = Trainer(next(iter(TOY.values())), asked, 3)
    t.step()
    if not asked.cuda:
        return {"waits": []}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(2):
            t.step()
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": [f"{Path(w.filename).name}:{w.lineno} {w.message}" for w in seen]}


def profile(asked: Asked) -> Figures:
    """The kernels of a step that take longest."""
    t = Trainer(next(iter(asked.sizes.values())), asked, 2)
    t.step()
    asked.wait()
    start = time.perf_counter()
    rows = _profiled(t.step, asked)
    wall = time.perf_counter() - start
    return {"wall ms": 1000 * wall, "busy ms": sum(r[0] for r in rows) / 1000, "launches": sum(r[1] for r in rows),
            "kernels": [f"{us / 1000:.2f} ms, {n} x {name[:80]}" for us, n, name in rows[:25]]}


def _profiled(do: Callable[[], object], asked: Asked) -> list[tuple[float, int, str]]:
    """(microseconds, calls, name) of the kernels of a call, or of what the CPU did, the longest first."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if asked.cuda else [kinds.CPU]) as p:
        do()
        asked.wait()
    rows = [(e.self_device_time_total if asked.cuda else e.self_cpu_time_total, e.count, e.key)
            for e in p.key_averages() if not asked.cuda or str(e.device_type).endswith("CUDA")]
    return sorted(rows, reverse=True)


def steps(asked: Asked) -> Figures:
    """Whole steps: time, speed, memory beside the plan's."""
    made: Figures = {}
    for name, size in asked.sizes.items():
        t = Trainer(size, asked, 4)
        if asked.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = asked.milliseconds(t.step) / 1000
        rate = t.plan.tokens_per_step / seconds
        made[name] = {
            "ms": 1000 * seconds, "tokens/s": rate, "loss": float(t.step()),
            "TFLOP/s": rate * flops_per_token(t.plan.architecture) / 1e12,
            "planned GiB": sum(memory(t.plan).values()) / 2**30,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if asked.cuda else None}
        del t
        _tidy(asked)
    return made


def _tidy(asked: Asked) -> None:
    gc.collect()                                                # a run is a cycle
    if asked.cuda:
        torch.cuda.empty_cache()


STAGES: dict[str, Callable[[Asked], Figures]] = {
    "ceilings": ceilings, "products": products, "norms": norms, "attention": attention, "parts": parts, "waits": waits,
    "profile": profile, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=[], help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a model of two small layers")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    given = parser.parse_args()
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    asked = Asked(device, TOY if given.toy else SIZES, 1 if given.toy else 10)
    figures: dict[str, Figures] = {}
    for name in given.stages or STAGES:
        start = time.perf_counter()
        try:
            figures[name] = STAGES[name](asked)
        except Exception as error:                              # what comes after it may still be known
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
        _tidy(asked)
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(figures[name])}", flush=True)
        if given.out:
            given.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
