"""Any layout to any layout: what one saves, every other loads, to the bit, and goes on as if it had always been there."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from support import SHAPES, byte_dataset, header, kept, lines, load, resolved, stepping, train

from megazero.base.errors import UserError
from megazero.comm.wires import connect
from megazero.plan.plan import Plan
from megazero.plan.progress import Progress, loss_scale
from megazero.run.run import Run
from megazero.state import checkpoint
from megazero.state.checkpoint import Reader, find
from megazero.state.saving import write_file, write_index
from megazero.state.tensor_files import Stored
from megazero.units.random import fill_normal, key

WORDS = ("--num-layers 5 --hidden-size 48 --num-attention-heads 8 --kv-channels 4 --ffn-hidden-size 96 --seq-length 24 --vocab-size 101 --lr 2e-3 "
         "--weight-decay 0.1 --mock-data --train-iters 9 --eval-iters 0 --clip-grad 0.5 --dtype fp64 --make-vocab-size-divisible-by 8 "
         "--global-batch-size 12 --adam-eps 1e-5")
MODELS = {"tied": SHAPES["gpt2"], "untied": SHAPES["llama"]}
LAYOUTS = {                             # ranks, and the words of a layout
    "one": (1, ""),
    "tp2": (2, "--tp 2"),
    "tp4": (4, "--tp 4"),
    "dp2-zero1": (2, "--zero-stage 1 --micro-batch-size 3"),
    "dp3-zero3": (3, "--zero-stage 3"),
    "dp4-zero2-shard2": (4, "--zero-stage 2 --zero-shard-size 2 --micro-batch-size 3"),
    "pp2-gpipe": (2, "--pp 2 --pipeline-schedule gpipe --pipeline-layout Et|ttttL"),
    "pp4-uneven": (4, "--pp 4 --decoder-first-pipeline-num-layers 2"),
    "pp2-interleaved-dp2-zero1": (4, "--pp 2 --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2 --zero-stage 1"),
    "tp2-pp2-dp2-zero1": (8, "--tp 2 --pp 2 --zero-stage 1"),
    "tp2-dp2-zero3-joined": (4, "--tp 2 --zero-stage 3 --bucket-size 100000 --recompute-granularity full"),
    "tp2-pp2-breadth-first": (4, "--tp 2 --pp 2 --pipeline-schedule breadth-first --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-dp2-zero3": (4, "--pp 2 --zero-stage 3 --pipeline-layout E|tttttL"),
}
NAMES = list(LAYOUTS)


def plan_of(name: str, model: str = "untied", more: str = "") -> Plan:
    world, words = LAYOUTS[name]
    return resolved(f"{WORDS} {MODELS[model]} {words} {more}", world)


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


# ---- the square

@cache
def state(model: str) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and moments as a run might have them: (kind, name) -> the logical tensor. Second moments are positive and not tiny."""
    out = {}
    for p in (p for u in plan_of("one", model).units for p in u.parameters):
        for kind, mean, std in (("weight", p.mean, 0.05), ("exp_avg", 0.0, 1e-3), ("exp_avg_sq", 1e-2, 1e-3)):
            drawn = torch.empty(p.shape, dtype=torch.float64)
            fill_normal(drawn, key(7, f"{kind}/{p.name}"), p.shape, checkpoint.Box((0,) * len(p.shape), p.shape), mean, std)
            out[kind, p.name] = drawn.abs() if kind == "exp_avg_sq" else drawn
    return out


def rank_of(plan: Plan, rank: int) -> Run:
    """One rank of a layout, in this process."""
    return Run(plan, torch.device("cpu"), connect(plan.mesh, rank, "fake", 60))


def slices(run: Run) -> Iterator[checkpoint.Slice]:
    return (s for u in run.units.values() for _, s in checkpoint.held(u.flat, u.low, kept(run, u)))


def save(folder: Path, plan: Plan, model: str) -> None:
    """A checkpoint of step 3 by all ranks of a layout."""
    runs = [rank_of(plan, rank) for rank in range(plan.world)]
    for run in runs:
        for s in slices(run):
            s.tensor.copy_(state(model)[s.kind, s.name][s.box.slices])
    save_runs(folder, runs, Progress(loss_scale(plan.config), step=3, applied=2, samples=36))


def save_runs(folder: Path, runs: list[Run], progress: Progress) -> None:
    """What each rank writes, and the index."""
    target, names = folder / f"step-{progress.step:08d}", [f"rank-{rank:05d}.safetensors" for rank in range(len(runs))]
    target.mkdir(parents=True)
    for name, run in zip(names, runs, strict=True):
        write_file(target / name, [s for u in run.units.values() if u.owner for s in checkpoint.owned(u.flat, u.low, kept(run, u))], progress.step)
    write_index(target, header(runs[0], progress), names)


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """A model, and its checkpoints by every layout."""
    root = tmp_path_factory.mktemp(request.param)
    for name in NAMES:
        save(root / name, plan_of(name, request.param), request.param)
    return request.param, {name: root / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_loads_every_checkpoint_to_the_bit(name: str, saved: tuple[str, dict[str, Path]]) -> None:
    """All pairs: every element that any rank holds of weights and moments, and nothing but zeros between them."""
    model, folders = saved
    readers = {source: Reader(folder) for source, folder in folders.items()}
    for rank in range(LAYOUTS[name][0]):
        run = rank_of(plan_of(name, model), rank)
        for source, reader in readers.items():
            buffers = [b for u in run.units.values() for b in kept(run, u).values()]
            for b in buffers:
                b.zero_()
            progress = load(run, reader)
            count = 0
            for s in slices(run):
                count += int(s.tensor.count_nonzero())
                assert torch.equal(s.tensor, state(model)[s.kind, s.name][s.box.slices]), (source, rank, s.kind, s.name)
            assert count == sum(int(b.count_nonzero()) for b in buffers), (source, rank)
            assert (progress.step, progress.applied, progress.samples) == (3, 2, 36)


Taken = tuple[list[float], list[tuple[str, Any, torch.Tensor]]]


def take(words: str, world: int, folder: str) -> Taken:
    """One step from a checkpoint: loss, norm and learning rate; the weights this rank holds after it."""
    plan = resolved(words, world)
    run = Run(plan, torch.device("cpu"), connect(plan.mesh, int(os.environ["RANK"]) if world > 1 else 0, "gloo", 60))
    step = stepping(run, progress=load(run, Reader(folder)))
    step.start()
    assert step.pending is not None
    loss, norm, _, _, lr, _ = step.pending.figures()
    told = [loss, norm, lr]
    return told, [(s.name, s.box, s.tensor.clone()) for s in slices(run) if s.kind == "weight"]


def compare(pool: Pool, model: str, source: Path, name: str, want: Taken) -> None:
    world, words = LAYOUTS[name]
    whole = {n: tensor for n, _, tensor in want[1]}
    for told, weights in pool.run(world, take, f"{WORDS} {MODELS[model]} {words}", world, str(source)):
        assert told == pytest.approx(want[0], rel=1e-12, abs=0), (source, name)
        for n, box, tensor in weights:
            assert (tensor - whole[n][box.slices]).abs().max() <= 1e-12 * whole[n].abs().max(), (source, name, n)


def test_a_step_after_loading_is_that_of_one_rank(saved: tuple[str, dict[str, Path]], pool: Pool) -> None:
    """A third of the layouts for each model, as target, each from another source: that all sources are the same to the bit is shown above,
    and `full` has every pair."""
    model, folders = saved
    want = take(f"{WORDS} {MODELS[model]}", 1, str(folders["tp2"]))
    for i, name in enumerate(NAMES):
        if i % 3 == (model == "tied"):
            compare(pool, model, folders[NAMES[i - 4]], name, want)


@pytest.mark.full
def test_a_step_after_loading_for_every_pair(saved: tuple[str, dict[str, Path]], pool: Pool) -> None:
    model, folders = saved
    want = take(f"{WORDS} {MODELS[model]}", 1, str(folders["one"]))
    for source in NAMES:
        for name in NAMES:
            compare(pool, model, folders[source], name, want)


# ---- what is read

def test_only_the_needed_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint of one rank, ZeRO-3 over eight reads an eighth each; what is read beyond ends where a checksum does."""
    monkeypatch.setattr("megazero.state.tensor_files.RUN", 512)              # so that these small tensors have several checksums too
    save(tmp_path, plan_of("one"), "untied")
    read, plain = [0], Stored.rows

    def rows(stored: Stored, low: int, high: int) -> torch.Tensor:
        out = plain(stored, low, high)
        read[0] += out.nbytes
        return out

    monkeypatch.setattr(Stored, "rows", rows)
    plan = resolved(f"{WORDS} {MODELS['untied']} --zero-stage 3 --global-batch-size 8", 8)
    total, reader = 0, Reader(tmp_path)
    for rank in range(8):
        run, read[0] = rank_of(plan, rank), 0
        load(run, reader)
        mine = list(slices(run))
        needed = sum(s.tensor.nbytes for s in mine)
        longest = max(512, max(8 * (s.full[1] if len(s.full) > 1 else 1) for s in mine))
        assert needed <= read[0] <= needed + 2 * longest * len(mine), rank
        total += read[0]
    everything = sum(t.nbytes for t in state("untied").values())
    assert everything <= total < 1.5 * everything


def test_damage_is_found_by_whoever_reads_it(tmp_path: Path) -> None:
    """A flipped bit is found by the ranks that read those rows in another layout, and not by the others."""
    save(tmp_path, plan_of("tp2"), "untied")
    path = find(tmp_path, None) / "rank-00000.safetensors"
    part = next(p for p in Reader(tmp_path).tensors["exp_avg", "layers.4.mlp.down.weight"] if p.stored.path == path)
    data = bytearray(path.read_bytes())
    data[part.stored.start + 11] ^= 4
    path.write_bytes(data)
    plan, told = plan_of("pp4-uneven"), []
    for rank in range(4):
        try:
            load(rank_of(plan, rank), Reader(tmp_path))
        except UserError as error:
            told.append((rank, str(error)))
    assert [rank for rank, _ in told] == [3] and "rank-00000.safetensors: the bytes of exp_avg/layers.4.mlp.down.weight@0,0 are damaged" in told[0][1]


# ---- what may change, and what may not

@pytest.mark.parametrize("before, after", [("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "fp16"), ("bf16", "fp16")])
def test_the_dtype_of_a_run_may_change(before: str, after: str, tmp_path: Path) -> None:
    """Masters and moments are fp32 in all of them: there and back, in other layouts, every bit is what it was."""
    def dtyped(name: str, dtype: str) -> Plan:
        return plan_of(name, "untied", f"--dtype {dtype}")
    save(tmp_path / "a", dtyped("tp2-pp2-dp2-zero1", before), "untied")
    there, back = dtyped("dp3-zero3", after), dtyped("tp2", before)
    runs = [rank_of(there, rank) for rank in range(3)]
    for run in runs:
        progress = load(run, Reader(tmp_path / "a"))
        assert all(torch.equal(u.weight_slice, u.master.to(u.weight_slice.dtype)) for u in run.units.values())
    save_runs(tmp_path / "b", runs, progress)
    for rank in range(2):
        run = rank_of(back, rank)
        load(run, Reader(tmp_path / "b"))
        for s in slices(run):
            assert s.tensor.dtype == torch.float32 and torch.equal(s.tensor, state("untied")[s.kind, s.name][s.box.slices].float())


def test_loss_scale_learning_rate_and_data_go_on(tmp_path: Path) -> None:
    words = f"{WORDS} {MODELS['untied']} --lr-warmup-iters 4".replace("--dtype fp64", "--fp16 --loss-scale-window 3 --initial-loss-scale 64").replace("9", "6", 1)
    whole = train(f"{words} --save {tmp_path / 'a'} --save-interval 4", tmp_path / "log")
    assert [r["loss_scale"] for r in whole] == [64, 64, 64, 128, 128, 128, 256, 256, 256]
    moved = train(f"{words} --load {tmp_path / 'a'} --ckpt-step 4 --micro-batch-size 4", tmp_path / "log2")
    exact = ("step", "lr", "loss_scale", "samples")
    assert [[r[k] for k in exact] for r in moved] == [[r[k] for k in exact] for r in whole[4:]]
    assert [r["loss"] for r in moved] == pytest.approx([r["loss"] for r in whole[4:]], rel=2e-2)
    plain = words.replace("--fp16 --loss-scale-window 3 --initial-loss-scale 64", "--bf16")
    assert [(r["step"], r["lr"], r["loss_scale"]) for r in train(f"{plain} --load {tmp_path / 'a'} --ckpt-step 4", tmp_path / "log3")] == [
        (r["step"], r["lr"], 1) for r in whole[4:]]


def test_another_model_is_told_by_its_flags(tmp_path: Path) -> None:
    save(tmp_path, plan_of("dp2-zero1"), "untied")
    for words, told in {
        "--ffn-hidden-size 64": "--ffn-hidden-size 96 (now --ffn-hidden-size 64)",
        "--num-layers 6 --swiglu": "--num-layers 5 (now --num-layers 6)",
        "--no-untie-embeddings-and-output-weights": "--untie-embeddings-and-output-weights (now no --untie-embeddings-and-output-weights)",
        "--add-qkv-bias": "no --add-qkv-bias (now --add-qkv-bias)",
    }.items():
        with pytest.raises(UserError) as error:
            train(f"{WORDS} {MODELS['untied']} {words} --load {tmp_path}")
        assert error.value.sentences == (f"--load {tmp_path / 'step-00000003'}: is of another model, with {told}; write those flags, or "
                                         "--use-checkpoint-args.",)


# ---- the real program

CURVE = ("--num-layers 8 --hidden-size 48 --num-attention-heads 8 --num-query-groups 2 --seq-length 16 --position-embedding-type rope "
         "--micro-batch-size 1 --global-batch-size 12 --lr 2e-3 --lr-warmup-iters 2 --lr-decay-style cosine --train-iters 4 --adam-eps 1e-5 "
         "--tokenizer-type ByteTokenizer --eval-interval 2 --eval-iters 1 --hidden-dropout 0.1 --split 80,20,0 --dtype fp64")


def test_one_checkpoint_goes_on_anywhere(pool: Pool, tmp_path: Path) -> None:
    """Saved at tp 2, pp 2, dp 2, ZeRO-1; four other layouts go on from it, each with the curve of one rank that never stopped."""
    def curve(log: str) -> list[tuple[Any, ...]]:
        return [(r["step"], r.get("split"), r["loss"], r.get("grad_norm", 0.0), r.get("lr", 0.0)) for r in lines(tmp_path / log)]

    words = f"{CURVE} --data-path {byte_dataset(tmp_path)}"
    train(words, tmp_path / "whole")
    first = f"{words} --save {tmp_path / 'ck'} --exit-interval 2"
    pool.run(8, train, f"{first} --tp 2 --pp 2 --dp 2 --zero-stage 1", tmp_path / "log")
    for i, (world, layout) in enumerate([
        (3, "--zero-stage 3"), (4, "--tp 4"), (1, ""), (4, "--pp 4 --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2")]):
        pool.run(world, train, f"{words} --load {tmp_path / 'ck'} {layout}", tmp_path / f"log{i}")
        for got, want in zip(curve("log") + curve(f"log{i}"), curve("whole"), strict=True):
            assert got[:2] == want[:2] and got[2:] == pytest.approx(want[2:], rel=1e-11), layout
