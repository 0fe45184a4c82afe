"""ZeRO: what each level keeps, what it sends, and that a bad gradient on one rank reaches no weight. That it trains the same is in
test_parity.py."""

import os
from typing import Any

import pytest
import torch
from pool import Pool
from support import SHAPES, TINY, kept, moments, resolved, stepping

from megazero.base import DTYPES
from megazero.comm.wires import Wires, connect
from megazero.plan.cost import flats, memory, stored, traffic
from megazero.plan.plan import Plan
from megazero.run.run import Run
from megazero.state.record import slices
from megazero.units.unit import Weight

SMALL = TINY.replace("--num-layers 2 --hidden-size 64 --num-attention-heads 4 ", "--hidden-size 48 --num-attention-heads 6 --micro-batch-size 1 ")
WORDS = f"{SMALL} --num-layers 2 --global-batch-size 24"
LLAMA = SHAPES["llama"]


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


def started(plan: Plan, rank: int, backend: str, wires: Wires | None = None) -> Run:
    run = Run(plan, torch.device("cpu"), wires or connect(plan.mesh, rank, backend, 60))
    run.initialise()
    return run


# ---- bytes on the wire

@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks, micro", [(2, 1), (3, 4), (4, 2), (8, 3)])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_bytes_on_the_wire_are_those_of_the_formulas(level: int, ranks: int, micro: int, shape: str) -> None:
    """Levels 0 and 1: 2 Psi elements, level 2: (m + 1) Psi, level 3: 3 m Psi, each times (N - 1) / N. Psi counts what is stored: each
    operand starts at a multiple of 64 elements, each unit is a multiple of 64 N. At level 3 embedding, positions and head travel less often
    than the formula says: their weights are read once a micro-batch (a tied embedding's twice), not twice."""
    plan = resolved(f"{SMALL} --num-layers 2 {SHAPES[shape]} --global-batch-size {ranks * micro} --zero-stage {level}", ranks)
    run = started(plan, ranks - 1, "fake")
    stepping(run).start()
    sizes = {name: stored(f, plan) for name, f in flats(plan, 0).items()}
    psi, blocks = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("layers."))
    tied = plan.architecture.tied
    elements = {0: 2 * psi, 1: 2 * psi, 2: (micro + 1) * psi,
                3: 3 * micro * blocks + 2 * micro * (psi - blocks) + (micro * sizes["embedding"] if tied else 0)}[level]
    sent = run.wires.line.sent
    assert (sent["shard"] + sent["replicate"]) * ranks == elements * (ranks - 1) * 4
    assert {axis: sent[axis] for axis in traffic(plan)} == traffic(plan, ranks - 1)


@pytest.mark.parametrize("words", [
    "--zero-stage 3 --reduce-every 2", "--zero-stage 3 --keep-weights 2", "--zero-stage 3 --keep-weights 8 --reduce-every 4 --bf16", "--zero-stage 2 --reduce-every 3",
    "--zero-stage 1 --zero-shard-size 2", "--zero-stage 2 --zero-shard-size 2 --bf16", "--zero-stage 3 --zero-shard-size 2", "--zero-stage 3 --bucket-size 100000",
    "--zero-stage 3 --tp 2 --fp16", "--zero-stage 2 --tp 2 --optimizer lamb --bf16 --ema 0.99", "--zero-stage 1 --zero-shard-size 2 --optimizer ademamix",
    "--zero-stage 3 --tp 2 --exp-avg-dtype 8bit --exp-avg-sq-dtype bf16 --bf16", "--zero-stage 1 --exp-avg-sq-dtype 8bit --optimizer lamb --ema 0.9",
    "--zero-stage 2 --zero-shard-size 2 --bf16 --main-params-dtype bf16 --optimizer lion",
    "--zero-stage 3 --tp 2 --optimizer adafactor --ema 0.9", "--zero-shard-size 2 --zero-stage 1 --tp 2 --optimizer muon --bf16", "--optimizer muon --muon-ns-dtype bf16",
    "--zero-stage 3 --optimizer muon --ema 0.9", "--zero-stage 1 --tp 2 --no-overlap-grad-reduce", "--zero-stage 3 --no-overlap-param-gather --pipeline-schedule gpipe",
])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_plan_knows_bytes_and_memory_of_every_choice(words: str, rank: int) -> None:
    plan = resolved(f"{WORDS} {words}", 8 if "--tp 2" in words else 4)
    run = started(plan, rank, "fake")
    stepping(run).start()
    expected = traffic(plan, rank)
    assert {axis: run.wires.line.sent[axis] for axis in expected} == expected
    assert live(run) == {k: n for k, n in memory(plan, rank).items() if k not in ("activations", "logits")}


def test_fewer_gathers_and_reductions_as_asked() -> None:
    def sent(words: str) -> int:
        return traffic(resolved(f"{WORDS} {LLAMA} --zero-stage 3 {words}", 4))["shard"]
    plan = resolved(f"{WORDS} {LLAMA} --zero-stage 3", 4)
    per = 3 * sum(stored(f, plan) for name, f in flats(plan, 0).items() if name.startswith("layers.")) // 4 * 4        # bytes of one pass over blocks
    rest = 3 * sum(stored(f, plan) for name, f in flats(plan, 0).items() if not name.startswith("layers.")) // 4 * 4
    assert sent("") == 6 * (3 * per + 2 * rest)
    assert sent("--keep-weights 2") == 6 * (2 * per + 2 * rest), "weights of the forward pass serve the backward pass"
    assert sent("--keep-weights 12 --reduce-every 6") == 2 * (per + rest)


# ---- memory

def live(run: Run) -> dict[str, int]:
    """Bytes of storage that the run's tensors hold, each storage once, by what they are for."""
    units = list(run.units.values())
    tensors: list[tuple[str, torch.Tensor]] = []
    for u in units:
        tensors += [("weights", u.weight_slice), ("master weights", u.master), ("gradients", u.grad_slice)]
        tensors += [("optimizer", t) for t in moments(run, u.flat.name)]
    for (_, what), buffers in run.executor.decoder.units["head"].sharing.buffers.free.items():  # type: ignore[misc]
        tensors += [("gathered weights" if what == "weights" else "gradient sums", b) for b in buffers]
    seen: set[int] = set()
    found = dict.fromkeys(("weights", "master weights", "gradients", "optimizer", "gathered weights", "gradient sums"), 0)
    for what, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[what] += storage.nbytes()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_live_bytes_per_parameter(level: int, ranks: int, dtype: str) -> None:
    """The ZeRO paper's 16, 4 + 12 / N, 2 + 14 / N, 16 / N count 2-byte gradients. Ours are summed in fp32: in half precision 18, 6 + 12 / N,
    2 + 16 / N, 18 / N; in fp32, without masters, 16, 8 + 8 / N, 4 + 12 / N, 16 / N. Borrowed whole buffers come on top: two of each kind of block."""
    plan = resolved(f"{SMALL} --num-layers 4 --global-batch-size 24 --zero-stage {level} --dtype {dtype}", ranks)
    run = started(plan, ranks - 1, "fake")
    stepping(run).start()
    psi, w = sum(stored(f, plan) for f in flats(plan, 0).values()), DTYPES[dtype].width
    g, slices = 4, 12 if w == 2 else 8                          # bytes of a gradient; of masters and moments
    per = {0: w + g + slices, 1: w + g + slices / ranks, 2: w + (g + slices) / ranks, 3: (w + g + slices) / ranks}[level]
    found = live(run)
    borrowed = found.pop("gathered weights") + found.pop("gradient sums")
    assert sum(found.values()) == per * psi
    assert found == {k: n for k, n in memory(plan, ranks - 1).items() if k in found}
    sizes = {name: stored(f, plan) for name, f in flats(plan, 0).items()}
    whole = (2 if ranks > 1 else 1) * sizes["layers.0"] + sizes["embedding"] + sizes["positions"] + sizes["head"]
    ahead = sizes["layers.0"] if ranks == 1 else 0              # the next block's weights; with one rank no gradient is on its way
    assert borrowed == {0: 0, 1: 0, 2: 4 * whole, 3: (4 + w) * whole + w * ahead}[level]


# ---- the program

def test_a_level_3_step_reads_like_this() -> None:
    plan = resolved(f"{SMALL} {LLAMA} --num-layers 1 --global-batch-size 2 --zero-stage 3", 2)
    assert " | ".join(str(a) for a in plan.training(0)) == (
        "gather embedding | gather layers.0 | F0,0 | release embedding | gather head | F1,0 | release layers.0 | gather layers.0 | "
        "open head | L2,0 | release head | reduce head,0 | open layers.0 | B1,0 | release layers.0 | land head,0 | replicate head | reduce layers.0,0 | "
        "open embedding | B0,0 | land layers.0,0 | settle head | replicate layers.0 | reduce embedding,0 | land embedding,0 | "
        "settle layers.0 | replicate embedding | settle embedding | finish tp | finish kv | judge | "
        "update embedding+layers.0+head | publish embedding+layers.0+head")


@pytest.mark.parametrize("words", ["", "--no-overlap-param-gather", "--no-overlap-grad-reduce", "--reduce-every 2", "--keep-weights 3", "--pipeline-schedule gpipe",
                                   "--bucket-size 60000"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_nothing_is_used_before_it_is_there(level: int, words: str, shape: str) -> None:
    """In every program: weights that are read are gathered, gradients that are written have a sum open, every sum is reduced and lands once."""
    if ("--reduce-every" in words and level < 2) or ("--keep" in words and level < 3) or ("param" in words and level < 1):
        pytest.skip("has no effect at this level")
    plan = resolved(f"{SMALL} {SHAPES[shape]} --num-layers 3 --global-batch-size 24 --zero-stage {level} {words}", 4)
    assert plan.mistakes() == []


@pytest.mark.parametrize("reader", ["gather", "open", "save"])
def test_whoever_reads_weights_or_state_waits_for_the_update(reader: str) -> None:
    """Under `late` an update runs when somebody asks for it: nothing else has changed until then, and all of its units have then."""
    plan = resolved(f"{SMALL} --num-layers 1 --global-batch-size 2")
    late, plain, fresh = started(plan, 0, "gloo+late"), started(plan, 0, "gloo"), started(plan, 0, "gloo")
    for run in (late, plain):
        stepping(run).start()
    assert all(torch.equal(unit.master, fresh.units[name].master) for name, unit in late.units.items())
    first = late.units["embedding"]
    {"gather": first.gather, "open": first.open, "save": lambda: slices([first], late.updater.state)}[reader]()
    for name, unit in late.units.items():
        assert torch.equal(unit.master, plain.units[name].master) and not torch.equal(unit.master, fresh.units[name].master), name


# ---- the same bits, whatever overlaps

def weights_after(words: str, world: int, steps: int = 3) -> list[torch.Tensor]:
    run = started(resolved(words, world), int(os.environ["RANK"]), "gloo")
    step = stepping(run)
    for _ in range(steps):
        step.start()
    step.settle()
    return [u.master.clone() for u in run.units.values()]


@pytest.mark.parametrize("level, dtype", [(1, "fp32"), (2, "bf16"), (3, "fp16"), *(pytest.param(level, "fp32", marks=pytest.mark.full) for level in (0, 3))])
def test_overlap_changes_no_bit(level: int, dtype: str, pool: Pool) -> None:
    words = f"{WORDS} --zero-stage {level} --dtype {dtype}"
    plain = pool.run(4, weights_after, words, 4)
    other = pool.run(4, weights_after, f"{words} --no-overlap-grad-reduce" + " --no-overlap-param-gather" * (level > 0), 4)
    assert all(torch.equal(a, b) for one, two in zip(plain, other, strict=True) for a, b in zip(one, two, strict=True))


# ---- the gate

def bad_on_one_rank(cases: list[str], world: int, who: int) -> list[str]:
    """In each case: a good step, one whose gradient has a NaN on rank `who`, a good one. Returns what was said of the second."""
    rank, said = int(os.environ["RANK"]), []
    plain, wires = Weight.add_product, {}
    for plan in (resolved(words, world) for words in cases):
        words = f"ZeRO {plan.zero.level} {plan.config.dtype}"
        if plan.mesh not in wires:
            wires[plan.mesh] = connect(plan.mesh, rank, "gloo", 60)
        run = started(plan, rank, "gloo", wires[plan.mesh])
        step = stepping(run)
        step.start()
        settled = [step.settle()]

        def add(weight: Weight, dy: torch.Tensor, x: torch.Tensor) -> None:
            plain(weight, dy, x)
            if weight.operand.name == "layers.1.mlp.up.weight" and rank == who:
                weight.grad[1, 2] = torch.nan

        def state(run: Run = run) -> list[torch.Tensor]:
            return [b.clone() for u in run.units.values() for b in (u.weight_slice, *kept(run, u).values())] + [s.clone() for s in run.updater.steps]

        before = state()
        Weight.add_product = add  # type: ignore[method-assign]
        try:
            step.start()
        finally:
            Weight.add_product = plain  # type: ignore[method-assign]
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)), words
        settled += [step.start(), step.settle()]
        assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)), words
        assert [s.figures["skipped"] for s in settled if s] == [False, True, False], words
        said += [s.told for s in settled if s and s.told]
    return said


def test_a_bad_gradient_on_one_rank_changes_nothing_anywhere(pool: Pool) -> None:
    cases = [f"{WORDS.replace('batch-size 1 ', 'batch-size 6 ')} --tp 2 --zero-stage {level} --dtype {dtype}{' --loss-scale 8' if dtype == 'fp16' else ''}"
             for level in (0, 1, 2, 3) for dtype in ("fp64", "fp32", "bf16", "fp16")]
    for rank, said in enumerate(pool.run(4, bad_on_one_rank, cases, 4, 3)):
        assert len(said) == len(cases), rank
        for line in said:
            assert "step 2 skipped: the gradient of layers.1.mlp.up.weight is not finite (1 of" in line and "on rank 3; nothing was changed" in line
