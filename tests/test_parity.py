"""Any layout gives the same run: one table, each row against one rank, in float64.

Compared to 1e-12: loss and gradient norm of five steps with clipping, every gradient of the first step on every rank (relative to its
largest element), every weight after the fifth. The order of sums alone costs about 1e-15. Also under `late`, where results are NaN until
they are waited for. Adam divides by the root of the second moment plus epsilon, which makes lr / epsilon of a rounding error in a gradient that
is nearly zero: epsilon is 1e-5 here, so that the table measures layouts and not that. New features add a column or a row.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any

import pytest
import torch
from pool import Pool
from support import SHAPES, resolved, stepping

from megazero.comm.wires import connect
from megazero.pipeline.schedule import SCHEDULES
from megazero.plan import GRADIENTS
from megazero.run.run import Run
from megazero.state import checkpoint

WORDS = "--hidden-size 48 --num-attention-heads 24 --kv-channels 4 --ffn-hidden-size 96 --lr 2e-3 --weight-decay 0.1 --mock-data " \
        "--train-iters 5 --eval-iters 0 --clip-grad 0.5 --dtype fp64 --make-vocab-size-divisible-by 8"


@dataclass(frozen=True)
class Row:
    """One run. `shape` names model flags of support.SHAPES; the rest are words of the command line."""

    tp: int = 1
    dp: int = 1
    shape: str = "gpt2"
    recompute: str = "none"
    micro: int = 1
    optimizer: str = "adam"
    schedule: str = "1f1b"
    tokens: int = 24
    dropout: float = 0.0
    late: bool = False
    level: int = 0
    shard: int = 0
    every: int = 1
    keep: int = 1
    pp: int = 1
    virtual: int = 1
    layers: int = 2
    batch: int = 12
    extra: str = ""

    def __str__(self) -> str:
        plain = Row()
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)) or "plain"

    @property
    def model(self) -> str:
        """What one rank must be told to run the same model on the same data."""
        shape = SHAPES[self.shape].replace("--kv-channels 24", "--kv-channels 4").replace("--ffn-hidden-size 96", "")
        optimizer = f"--optimizer {self.optimizer}" + " --adam-eps 1e-5" * (self.optimizer in ("adam", "lamb", "ademamix"))
        return (f"{WORDS} --global-batch-size {self.batch} --num-layers {self.layers} --vocab-size 101 {shape} {optimizer} --seq-length {self.tokens} --hidden-dropout {self.dropout} "
                f"--attention-dropout {self.dropout}")

    @property
    def words(self) -> str:
        return (f"{self.model} --tp {self.tp} --pp {self.pp} --dp {self.dp} --recompute-granularity {self.recompute} --micro-batch-size {self.micro} "
                f"--pipeline-schedule {self.schedule} --num-virtual-stages-per-pipeline-rank {self.virtual} --zero-stage {self.level} --reduce-every {self.every} --keep-weights {self.keep} "
                f"{f'--zero-shard-size {self.shard}' if self.shard else ''} {self.extra}")


Result = tuple[list[tuple[float, float]], list[tuple[str, Any, torch.Tensor]], list[tuple[str, Any, torch.Tensor]]]


def play(words: str, world: int, backend: str, device: str = "cpu") -> Result:
    """Five steps on this rank: (loss, norm) of each; gradients of the first and weights after the last as (name, box, tensor)."""
    import os
    plan = resolved(words, world, device)
    rank = int(os.environ["RANK"]) if world > 1 else 0
    run = Run(plan, torch.device(device), connect(plan.mesh, rank, backend, 60))
    run.initialise()
    figures, gradients, step = [], [], stepping(run)
    for i in range(5):
        step.start()
        assert step.pending
        figures.append((float(step.pending.verdict.loss), float(step.pending.verdict.norm)))
        if i == 0:
            gradients = held(run, "grad_slice")
    return figures, gradients, held(run, "master")


def held(run: Run, buffer: str) -> list[tuple[str, Any, torch.Tensor]]:
    """What this rank's slices hold of each logical tensor."""
    found = []
    for u in run.units.values():
        u.updated()
        with u.present(), u.home.present(u.flat.name, GRADIENTS, changed=False):
            found += [(s.name, s.box, s.tensor.to("cpu", copy=True)) for _, s in checkpoint.held(u.flat, u.low, {buffer: getattr(u, buffer)})]
    return found


@cache
def alone(words: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    figures, gradients, weights = play(words, 1, "gloo")
    return figures, {n: t for n, _, t in gradients}, {n: t for n, _, t in weights}


def compare(row: Row, pool: Pool, tolerance: float = 1e-12, device: str = "cpu") -> None:
    want_figures, want_gradients, want_weights = alone(row.model)
    world, covered = row.tp * row.pp * row.dp, Counter[str]()
    for figures, gradients, weights in pool.run(world, play, row.words, world, "gloo+late" if row.late else "gloo", device):
        for got, want in zip(figures, want_figures, strict=True):
            assert got == pytest.approx(want, rel=tolerance, abs=0)
        for found, wanted in ((gradients, want_gradients), (weights, want_weights)):
            largest = max(float(t.abs().max()) for t in wanted.values())
            for name, box, tensor in found:
                covered[name] += tensor.numel()
                own = float(wanted[name].abs().max())
                rounding = name.endswith(("k.bias", "k_norm.bias")) and own < 1e-9 * largest       # softmax does not feel it: zero exactly
                scale = largest if rounding else own
                if tensor.numel():
                    assert (tensor - wanted[name][box.slices]).abs().max() <= tolerance * scale, (name, box)
    assert all(covered[name] >= 2 * tensor.numel() for name, tensor in want_weights.items()), "not every element was compared"


CI = [
    Row(tp=2), Row(tp=3, optimizer="sgd"), Row(tp=4, shape="llama"), Row(tp=8, shape="qwen"), Row(dp=2, optimizer="sgd"), Row(dp=3),
    Row(tp=2, dp=2, shape="llama"), Row(tp=2, dp=3, shape="qwen", optimizer="sgd"), Row(tp=4, dp=2, shape="gpt2-plain"),
    Row(tp=4, shape="llama", optimizer="sgd", late=True), Row(tp=2, dp=2, late=True), Row(tp=2, tokens=25), Row(tp=3, tokens=25, shape="llama-tied-scaled"),
    Row(tp=4, tokens=25, shape="llama", micro=3, late=True), Row(tp=8, shape="llama-tied-scaled", tokens=25), Row(tp=2, recompute="selective"),
    Row(tp=2, recompute="full", shape="llama"), Row(tp=2, dp=2, recompute="selective", late=True, shape="qwen", optimizer="sgd"), Row(tp=2, micro=3, dropout=0.1),
    Row(tp=4, dp=2, dropout=0.1, shape="llama", recompute="full"), Row(tp=2, schedule="gpipe", micro=2), Row(tp=3, shape="relu2"),
    Row(tp=2, shape="mistral", tokens=25, late=True), Row(pp=2, dp=2, level=3, shape="mistral", schedule="zb-h1", dropout=0.1, optimizer="sgd"),
    Row(dp=2, level=1), Row(dp=3, level=1, optimizer="sgd", late=True), Row(dp=4, level=1, shard=2, shape="llama", late=True),
    Row(dp=2, level=2, late=True), Row(tp=2, dp=3, level=2, every=2, shape="llama", micro=2, optimizer="sgd"), Row(dp=4, level=2, shard=2, late=True, recompute="full"),
    Row(dp=2, level=3, micro=6, shape="gpt2-plain", optimizer="sgd"), Row(dp=3, level=3, late=True, recompute="selective", shape="qwen"),
    Row(tp=2, dp=2, level=3, late=True, recompute="full", shape="llama", keep=2, every=2), Row(dp=4, level=3, shard=2, schedule="gpipe", late=True),
    Row(dp=2, level=3, keep=3, late=True, extra="--bucket-size 100000", tokens=25), Row(dp=4, level=3, micro=3, shape="llama-tied-scaled", dropout=0.1),
    Row(tp=8, shape="olmo", optimizer="sgd"), Row(tp=2, dp=2, shape="olmo", recompute="full", late=True), Row(tp=4, pp=2, shape="olmo", schedule="zb-h1", level=2, late=True),
    Row(tp=4, shape="gemma", tokens=25, late=True), Row(tp=2, pp=2, shape="gemma", schedule="zb-h1", dropout=0.1, optimizer="sgd", layers=3),
    Row(dp=2, level=3, shape="gemma", recompute="selective", late=True), Row(tp=2, dp=2, level=3, shape="neox", recompute="full", optimizer="sgd"),
    Row(tp=3, shape="neox", tokens=25, late=True, dropout=0.1), Row(tp=2, shape="opt", tokens=25, late=True), Row(pp=2, dp=2, level=1, shape="opt", schedule="zb-h1"),
    Row(tp=2, pp=2, shape="yarn-kinds", recompute="selective", layers=5, late=True), Row(dp=3, level=2, shape="dynamic", optimizer="sgd"),
    Row(dp=2, micro=3, shape="qwen"), Row(tp=8, shape="gpt2", late=True, recompute="full"), Row(dp=3, recompute="selective", shape="llama", late=True),
]
FULL = [Row(tp, dp, shape, recompute, micro, optimizer, tokens=tokens, late=late)
        for tp in (1, 2, 3, 4, 8) for dp in (1, 2, 3) if 1 < tp * dp <= 12
        for shape in SHAPES if tp != 3 or shape in ("gpt2", "gpt2-plain", "relu2", "llama-tied-scaled")
        for recompute, micro in (("none", 1), ("selective", 2), ("full", 1))
        for optimizer, tokens, late in (("adam", 24, False), ("sgd", 25, True))]
ZERO = [Row(tp, dp, shape, recompute, micro, optimizer, late=late, level=level)
        for level in (0, 1, 2, 3) for tp in (1, 2) for dp in (2, 3, 4) for recompute in ("none", "selective", "full") for micro in (1, 2 if dp == 3 else 3)
        for shape, optimizer, late in (("gpt2", "sgd", True), ("llama", "adam", False))]
SPLIT = [Row(tp, 2, shape, recompute, pp=2, schedule="zb-h1", level=level, layers=3, batch=2 * count, optimizer=optimizer, late=late)
         for level in (0, 1, 2, 3) for tp in (1, 2) for recompute in ("none", "selective", "full") for count in (1, 3, 8)
         for shape, optimizer, late in (("gpt2", "sgd", True), ("llama", "adam", False))]

# what ranks add up in the middle of a layer always; the others run under `full`
DRAWN = [row for row in CI if row.shape == "olmo" and row.pp > 1]
DRAWN += Random(13).sample([row for row in CI if row not in DRAWN], 8)

COLUMNS = {"tp": (1, 2, 4), "pp": (1, 2, 3, 4), "dp": (1, 2, 3), "level": (0, 1, 2, 3), "schedule": ("gpipe", "breadth-first", "1f1b", "interleaved", "zb-h1"),
           "recompute": ("none", "selective", "full"), "micro-batches": (1, 3, 8), "shape": ("gpt2", "gpt2-plain", "llama", "llama-tied-scaled")}
PAIRS: list[tuple[Any, ...]] = [                                # every pair of values of two columns stands in one of these rows
    (1, 1, 1, 0, "breadth-first", "full", 8, "gpt2-plain"),
    (1, 1, 1, 2, "interleaved", "none", 1, "llama-tied-scaled"),
    (1, 1, 1, 2, "breadth-first", "selective", 8, "gpt2-plain"),
    (1, 1, 1, 3, "gpipe", "full", 1, "gpt2"),
    (1, 2, 2, 1, "interleaved", "none", 3, "llama"),
    (2, 2, 1, 2, "gpipe", "selective", 1, "gpt2"),
    (1, 2, 2, 1, "1f1b", "selective", 8, "gpt2-plain"),
    (1, 4, 1, 1, "1f1b", "selective", 8, "llama-tied-scaled"),
    (2, 1, 3, 3, "1f1b", "none", 1, "llama-tied-scaled"),
    (1, 3, 2, 3, "gpipe", "selective", 8, "llama-tied-scaled"),
    (2, 1, 3, 1, "gpipe", "none", 3, "gpt2"),
    (2, 3, 1, 2, "1f1b", "full", 3, "llama"),
    (1, 2, 3, 0, "interleaved", "full", 1, "gpt2"),
    (4, 2, 1, 3, "breadth-first", "full", 3, "llama-tied-scaled"),
    (1, 4, 2, 2, "breadth-first", "none", 8, "gpt2"),
    (2, 4, 1, 3, "interleaved", "full", 8, "gpt2-plain"),
    (4, 1, 2, 3, "gpipe", "full", 1, "llama"),
    (1, 3, 3, 1, "breadth-first", "full", 1, "llama-tied-scaled"),
    (4, 3, 1, 1, "1f1b", "full", 3, "gpt2"),
    (4, 1, 3, 2, "interleaved", "selective", 8, "llama"),
    (1, 4, 3, 0, "gpipe", "selective", 3, "gpt2-plain"),
    (4, 3, 1, 0, "interleaved", "none", 1, "gpt2-plain"),
    (2, 4, 2, 0, "breadth-first", "full", 1, "llama"),
    (4, 4, 1, 0, "1f1b", "none", 3, "llama-tied-scaled"),
    (1, 4, 2, 3, "zb-h1", "selective", 8, "gpt2"),
    (2, 2, 3, 2, "zb-h1", "full", 3, "llama"),
    (4, 1, 1, 0, "zb-h1", "none", 1, "llama-tied-scaled"),
    (1, 3, 1, 1, "zb-h1", "none", 8, "gpt2-plain"),
]
EVERY_PAIR = [Row(tp, dp, shape, recompute, pp=pp, level=level, schedule=schedule, virtual=2 if SCHEDULES[schedule].looped else 1,
                  layers=pp * (2 if SCHEDULES[schedule].looped else 1) + 1, batch=count * dp, optimizer=("sgd", "adam")[i % 2], late=i % 3 > 0)
              for i, (tp, pp, dp, level, schedule, recompute, count, shape) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


def test_every_pair_of_values_is_in_the_table() -> None:
    for (i, one), (j, two) in combinations(enumerate(COLUMNS.values()), 2):
        assert {(row[i], row[j]) for row in PAIRS} == set(product(one, two)), (i, j)
    worlds = [tp * pp * dp for tp, pp, dp, *_ in PAIRS]
    assert worlds.count(16) >= 1 and worlds.count(12) >= 2


@pytest.mark.parametrize("row", DRAWN + EVERY_PAIR, ids=str)
def test_equal_to_one_rank(row: Row, pool: Pool) -> None:
    compare(row, pool)


@pytest.mark.full
@pytest.mark.parametrize("row", [row for row in CI if row not in DRAWN] + FULL + ZERO + SPLIT, ids=str)
def test_equal_to_one_rank_in_full(row: Row, pool: Pool) -> None:
    compare(row, pool)
