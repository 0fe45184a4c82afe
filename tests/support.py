"""What several tests need: real text that every machine has, and runs of the real program in this process."""

import json
import runpy
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from megazero.comm.wires import connect
from megazero.data.indexed import IndexedWriter
from megazero.model.decoder import Batch
from megazero.plan.architecture import Architecture
from megazero.plan.mesh import Mesh
from megazero.plan.plan import Plan, resolve
from megazero.plan.progress import Progress, loss_scale
from megazero.plan.rope import Dynamic, Linear, Llama3, Rotary, Yarn
from megazero.plan.words import ACTIVATIONS, flags
from megazero.run.executor import Turn
from megazero.run.feed import Feed, open_splits
from megazero.run.run import Run
from megazero.run.step import Step
from megazero.run.train import main
from megazero.settings import config
from megazero.settings.command_line import flatten
from megazero.state import record
from megazero.state.checkpoint import Reader
from megazero.units.unit import Unit

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"

SHAPES = {
    "gpt2": "--openai-gelu",
    "gpt2-plain": "--disable-bias-linear --untie-embeddings-and-output-weights",
    "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --disable-bias-linear "
             "--untie-embeddings-and-output-weights",
    "llama-tied-scaled": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 1 --disable-bias-linear "
                         "--use-rope-scaling --rope-original-length 16 --rotary-percent 0.5",
    "qwen": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 4 --disable-bias-linear --add-qkv-bias "
            "--qk-layernorm --kv-channels 24",
    "mistral": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --disable-bias-linear "
               "--untie-embeddings-and-output-weights --attention-window 9",
    "yarn-kinds": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --disable-bias-linear --add-qkv-bias --add-o-bias "
                  "--use-rope-scaling --rope-scaling-type yarn --rope-original-length 16 --attention-window 9 --window-attn-skip-freq 2 --no-rope-freq 2 "
                  "--rope-local-base-freq 500",
    "dynamic": "--position-embedding-type rope --use-rope-scaling --rope-scaling-type dynamic --rope-original-length 8 --disable-bias-linear "
               "--add-norm-bias --add-mlp-bias",
    "gemma": "--geglu --openai-gelu --normalization RMSNorm --apply-layernorm-1p --norm-placement both --position-embedding-type rope --num-query-groups 2 "
             "--disable-bias-linear --embedding-multiplier 7.5 --attention-multiplier 0.3 --attn-logit-softcapping 2 --final-logit-softcapping 3 "
             "--attention-window 9 --window-attn-skip-freq 2 --ffn-hidden-size 96",
    "olmo": "--swiglu --normalization RMSNorm --norm-placement after --qk-layernorm --qk-layernorm-over width --position-embedding-type rope "
            "--num-query-groups 2 --disable-bias-linear --untie-embeddings-and-output-weights",
    "neox": "--parallel-residual --position-embedding-type rope --rotary-percent 0.5 --untie-embeddings-and-output-weights --apply-layernorm-1p "
            "--residual-multiplier 0.4 --logits-scaling 3 --geglu --ffn-hidden-size 96",
    "opt": "--relu --position-offset 2 --embedding-multiplier 3",
    "relu2": "--squared-relu --position-embedding-type none --qk-layernorm --ffn-hidden-size 96",
}
TINY = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 24 --vocab-size 101 --lr 1e-2 --mock-data --train-iters 5 --eval-iters 0"


def drawn_architecture(rng: Random) -> Architecture:
    """Any decoder that flags can ask for."""
    norm, positions = rng.choice(("LayerNorm", "RMSNorm")), rng.choice(("learned", "rope", "none"))
    scaling = rng.choice((None, Linear(3.0), Dynamic(2.0, 16), Llama3(8.0, 1.0, 4.0, 16), Yarn(4.0, 8), Yarn(4.0, 8, 16.0, 2.0, 1.5, 0.7, 1.2, truncate=False)))
    rotary = Rotary(5000.0, rng.choice((4, 8)), scaling) if positions == "rope" else None
    window, base = rng.choice((0, 9)), rng.choice((0.0, 777.0)) if rotary else 0.0
    words = [f"{rng.choice(('local', 'full')) if window or base else 'local'}{rng.choice(('', '-nope')) if rotary else ''}" for _ in range(3)]
    pre, post = rng.choice(((True, False), (False, True), (True, True)))
    return Architecture(
        layers=3, hidden=32, ffn=rng.choice((48, 128)), heads=4, kv_heads=rng.choice((1, 2, 4)), head_dim=8, seq_length=24, vocab_size=101,
        learned_positions=24 if positions == "learned" else 0, position_offset=rng.choice((0, 2)) if positions == "learned" else 0, rotary=rotary,
        norm=norm, epsilon=1e-6, norm_plus_one=rng.random() < 0.5, pre_norm=pre, post_norm=post, parallel_residual=rng.random() < 0.5,
        activation=rng.choice(list(ACTIVATIONS)), bias=rng.random() < 0.5, qkv_bias=rng.random() < 0.5, o_bias=rng.random() < 0.5,
        norm_bias=norm == "LayerNorm" and rng.random() < 0.5, qk_norm=rng.choice(("none", "head", *(["width"] if norm == "RMSNorm" else []))),
        tied=rng.random() < 0.5, init_std=0.01, attention_dropout=0.1, hidden_dropout=0.2, window=window,
        kinds=tuple(words) if set(words) != {"local"} else (), local_base=base, embedding_multiplier=rng.choice((1.0, 5.5)),
        residual_multiplier=rng.choice((1.0, 0.3)), attention_multiplier=rng.choice((0.0, 0.2)), attention_softcap=rng.choice((0.0, 20.0)),
        logits_scaling=rng.choice((1.0, 3.0)), logits_softcap=rng.choice((0.0, 30.0)))


def words_of(a: Architecture) -> str:
    """The command line that asks for an architecture."""
    return " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in flags(a).items() if v is not None and v is not False)


def python_source(folder: str = "json") -> str:
    """Text of one package of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"]) / folder
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(root.glob("*.py")))


def byte_dataset(folder: Path) -> str:
    """A dataset of the bytes of a few Python files, as --data-path wants it; for ByteTokenizer."""
    prefix = str(folder / "source_text_document")
    if not Path(prefix + ".idx").exists():
        with IndexedWriter(prefix, np.uint16) as writer:
            for package in ("json", "email", "html"):
                writer.add_document([np.frombuffer(python_source(package).encode(), np.uint8).astype(np.uint16)])
    return prefix


def resolved(words: str, world: int = 1, device: str = "cpu") -> Plan:
    """The plan of a command line that gives --vocab-size."""
    c = config.from_command_line(words.split())
    return resolve(c, world, c.data.vocab_size or 0, device)


def built(words: str, device: str = "cpu") -> Run:
    """An initialised run of a command line that gives --vocab-size."""
    run = Run(resolved(words, 1, device), torch.device(device), connect(Mesh.of(), 0, "gloo", 60))
    run.initialise()
    return run


def fed(run: Run) -> Feed:
    """Its own data, without a tokenizer."""
    return Feed(run, open_splits(run.plan, None), None)


def stepping(run: Run, given: Callable[[int, int], Sequence[Batch]] | None = None, progress: Progress | None = None) -> Step:
    """The steps of a run from its beginning, or from `progress` on, over its own data, or over what is given."""
    return Step(run, given or fed(run).batches, progress or Progress(loss_scale(run.config)))


def kept(run: Run, unit: Unit) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a unit."""
    return {kind: own.tensor for kind, own in record.buffers_of(unit, run.updater.state).items()}


def moments(run: Run, unit: str) -> list[torch.Tensor]:
    """What the optimizer keeps beside a unit."""
    return [t for own in run.updater.state[unit].values() for t in (own.tensor, getattr(own, "scales", None)) if t is not None]


def load(run: Run, reader: Reader) -> Progress:
    """Weights and moments of a checkpoint; where it was."""
    record.restore(reader, run.units.values(), run.updater.state)
    return record.resumed(reader.progress, loss_scale(run.config))


def header(run: Run, progress: Progress | None = None) -> dict[str, Any]:
    """What an index says of a run, at its beginning or at `progress`."""
    p, c = run.plan, run.config
    layout = {"tp": p.tp, "pp": p.pp, "dp": p.dp, "zero_stage": c.parallel.zero_stage, "global_batch_size": p.global_batch}
    facts = record.about(p.architecture, config=flatten(c), optimizer=c.optimizer.optimizer, layout=layout, tokenizer=None, family=None)
    return record.header(progress or Progress(loss_scale(c)), facts)


def batches(run: Run, step: int = 0, seed: int = 7, masked: bool = False) -> list[Batch]:
    """Random micro-batches of the plan's shape; `masked` weights some targets 0."""
    g, p = torch.Generator().manual_seed(seed + step), run.plan
    out = []
    for m in range(p.micro_batches):
        t = torch.randint(p.architecture.vocab_size, (p.micro_batch, p.architecture.seq_length + 1), generator=g)
        mask = torch.ones(p.micro_batch, p.architecture.seq_length, dtype=run.gate.wide)
        if masked:
            mask[:, ::5] = 0
        numbers = torch.arange(p.micro_batch) + m * p.micro_batch
        out.append(Batch(*(x.to(run.device) for x in (t[:, :-1].contiguous(), t[:, 1:].contiguous(), mask, numbers)), step=step))
    return out


def gradients(run: Run, data: list[Batch]) -> float:
    """One forward and backward of the program; leaves the gradients of the mean loss in the units and returns that loss."""
    count = sum(float(b.mask.sum()) for b in data)
    program = [a for a in replace(run.plan, global_batch=len(data) * run.plan.micro_batch * run.plan.dp).training(0) if a.kind not in ("judge", "update", "publish")]
    turn = Turn(torch.tensor(1 / count, dtype=run.gate.wide, device=run.device), batches=data)
    return float(run.executor.train(program, turn).told["loss"]) / count


def named(run: Run, buffer: str = "master") -> dict[str, torch.Tensor]:
    """The logical tensors of a run on one rank: masters, or `grad_slice`."""
    return {p.shard.parameter.name: getattr(u, buffer)[p.start:p.stop].view(p.shard.parameter.shape)
            for u in run.units.values() for p in u.flat.pieces}


def train(words: str, log: Path | None = None) -> list[dict[str, Any]]:
    """Runs the program in this process; returns the lines of its metrics.jsonl."""
    main(config.from_command_line(words.split() + (["--log-dir", str(log)] if log else [])))
    return lines(log) if log else []


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str, *words: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a program of the repository, run in this process: starting Python and torch takes seconds."""
    monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return int(end.value.code or 0), *capsys.readouterr()


def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *words: Any) -> tuple[int, str, str]:
    """The same of tools/`name`."""
    return program(monkeypatch, capsys, f"tools/{name}", *words)
