"""One step of a transformers model under `megazero.initialize` at ZeRO levels 1 to 3 against DeepSpeed's own engine.

    python benchmarks/engine_vs_deepspeed.py [--model tiny|gpt2] [--dtype fp32|bf16] [--memory] [--json FILE]

Both from the same GPT-2 with the same ds_config.json, tokens and first weights, over gloo, one thread per rank; a step
of each kind in turn on the same ranks. The ratio is to the same level of DeepSpeed in the same round, the table's to
DeepSpeed at level 1. With --memory, the peak resident set of ranks of its own for each kind. DeepSpeed takes torch's
AdamW (`torch_adam`), or with --cpu-adam its own kernel for CPUs, which needs a compiler. It is not a dependency: a
virtual environment that has both runs this (DS_BUILD_OPS=0 pip install deepspeed==0.19.8).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from harness import Micro, Step, compared, drawn_batches
from torch import nn

from megazero.comm import environment
from megazero.settings import option, parse, run

SHAPES: dict[str, dict[str, int]] = {"tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
                                     "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}}


@dataclass(frozen=True)
class Settings:
    """Times a step of an engine from a ds_config.json: ours and DeepSpeed's."""

    model: str = option("tiny", "GPT-2 of this size", choices=tuple(SHAPES))
    dtype: str = option("fp32", "of weights", choices=("fp32", "bf16"))
    ranks: int = option(2, "data-parallel ranks")
    seq: int = option(128, "tokens of a sample")
    batch: int = option(2, "samples of a micro-batch of a rank")
    micro_batches: int = option(1, "micro-batches of a step")
    steps: int = option(10, "timed steps of each")
    kinds: str | None = option(None, "the kinds to time beside `deepspeed 1`, by comma; all if not given")
    cpu_adam: bool = option(False, "DeepSpeed takes its own CPU kernel for Adam")
    memory: bool = option(False, "also the peak memory of each kind")
    only: str | None = option(None, "run one kind alone and tell its memory")
    json: str | None = option(None, "file for the figures")

    @property
    def vocab(self) -> int:
        return SHAPES[self.model]["vocab_size"]


def words(c: Settings, level: int, ours: bool) -> dict[str, Any]:
    """The ds_config.json of both."""
    kind = {} if ours or c.cpu_adam else {"torch_adam": True}
    return {"train_micro_batch_size_per_gpu": c.batch, "gradient_accumulation_steps": c.micro_batches,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, **kind}},
            "zero_optimization": {"stage": level}, "gradient_clipping": 1.0, "bf16": {"enabled": c.dtype == "bf16"},
            **({} if ours else {"zero_force_ds_cpu_optimizer": c.cpu_adam})}


def made(c: Settings) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(1)
    shape = GPT2Config(**SHAPES[c.model], n_positions=c.seq, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(shape)


def trained(c: Settings, level: int, ours: bool) -> Step:
    if ours:
        from megazero import initialize
    else:
        from deepspeed import initialize
    engine = initialize(model=made(c), config=words(c, level, ours))[0]

    def step(micros: list[Micro]) -> float:                     # type: ignore[override]
        total = 0.0
        for x, y in micros:
            loss = torch.nn.functional.cross_entropy(engine(x).logits.float().flatten(0, 1), y.flatten())
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(micros)
        return total

    return step                                                 # type: ignore[return-value]


def kinds(c: Settings) -> dict[str, Callable[[], Step]]:
    found = {f"{name} {level}": (lambda level=level, ours=ours: trained(c, level, ours))  # type: ignore[misc]
             for level in (1, 2, 3) for name, ours in (("deepspeed", False), ("megazero", True))}
    wanted = c.kinds.split(",") if c.kinds else found
    return {name: make for name, make in found.items() if name in wanted or name == "deepspeed 1"}


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    c = parse(Settings)
    batches = drawn_batches(c, c.ranks, environment()[0])
    figures = compared(c, kinds, lambda kind: batches)
    for level in (1, 2, 3) if figures else ():
        ours, theirs = (figures["times"].get(f"{name} {level}", []) for name in ("megazero", "deepspeed"))
        if ours and theirs:
            print(f"level {level}: {median(a / b for a, b in zip(ours, theirs, strict=True)):.3f} x deepspeed")


if __name__ == "__main__":
    run(main)
