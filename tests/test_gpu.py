"""The same step on a CUDA device: pytest -m gpu. Skipped, with a reason, where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from support import SHAPES, TINY, batches, built, fed, gradients, kept, named, stepping, train
from test_parity import Row, compare

from megazero.comm.group import Line
from megazero.comm.nccl import Nccl, urgent
from megazero.model.decoder import Batch
from megazero.plan.rules import RULES
from megazero.run.feed import bounds_of, documents_of
from megazero.state.checkpoint import Reader, complete

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_cpu_in_float64(shape: str, recompute: str) -> None:
    words = f"{TINY} {SHAPES[shape]} --dtype fp64 --micro-batch-size 2 --global-batch-size 6 --recompute-granularity {recompute}"
    cpu, gpu = built(words), built(words, "cuda")
    assert gradients(gpu, batches(gpu)) == pytest.approx(gradients(cpu, batches(cpu)), rel=1e-12)
    want = named(cpu, "grad_slice")
    largest = max(float(t.abs().max()) for t in want.values())
    for name, got in named(gpu, "grad_slice").items():
        own = float(want[name].abs().max())
        assert (got.cpu() - want[name]).abs().max() <= 1e-11 * (own if own > 1e-12 * largest else largest), name


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_ten_steps_stay_near_the_cpu(dtype: str, tolerance: float, optimizer: str) -> None:
    """fp32 may use other matmul orders; half precisions round differently in each fused kernel: some 2^-8 (2^-11) of a loss of 5 a step."""
    words = f"{TINY} {SHAPES['llama']} --dtype {dtype} --optimizer {optimizer} --lr 1e-3"
    losses = []
    for device in ("cpu", "cuda"):
        step = stepping(built(words, device))
        seen = []
        for _ in range(10):
            step.start()
            assert step.pending
            seen.append(float(step.pending.verdict.loss))
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)


def test_a_bad_step_changes_nothing_on_the_device() -> None:
    run = built(f"{TINY} --bf16", "cuda")
    feed, bad = fed(run), []

    def given(step: int, first: int) -> list[Batch]:
        """A good batch, then a bad one."""
        (batch,) = feed.batches(step, first)
        return [replace(batch, mask=batch.mask * torch.nan) if bad else batch]

    step = stepping(run, given)
    step.start()
    before = [b.clone() for u in run.units.values() for b in (u.weights, *kept(run, u).values())]
    bad.append(True)
    step.start()
    assert step.pending and bool(step.pending.verdict.found_inf)
    assert all(torch.equal(a, b) for a, b in zip(before, (b for u in run.units.values() for b in (u.weights, *kept(run, u).values())), strict=True))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_bitwise_on_the_device(dtype: str, shape: str, tmp_path: Path) -> None:
    """Of 512 tokens, so that kernels share out sums among blocks of threads."""
    words = f"{TINY} {SHAPES[shape]} --seq-length 512 --micro-batch-size 4 --dtype {dtype} --device cuda"
    train(f"{words} --save {tmp_path / 'a'}")
    train(f"{words} --save {tmp_path / 'b'} --exit-interval 3")
    train(f"{words} --save {tmp_path / 'b'} --load {tmp_path / 'b'}")
    one, two = Reader(tmp_path / "a"), Reader(tmp_path / "b")
    assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)


def test_background_saves_of_the_device_are_the_same(tmp_path: Path) -> None:
    """Through pinned memory that the next save uses again."""
    for name, flag in (("a", ""), ("b", "--async-save")):
        train(f"{TINY} --bf16 --device cuda --save-interval 1 --save {tmp_path / name} {flag}")
    for (_, a), (_, b) in zip(complete(tmp_path / "a"), complete(tmp_path / "b"), strict=True):
        one, two = Reader(a), Reader(b)
        assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_steady_state_allocates_nothing_new(level: int) -> None:
    """After three steps the allocator asks the device for no more memory, and no whole buffer is made."""
    step = stepping(built(f"{TINY} --bf16 --hidden-size 256 --num-layers 4 --micro-batch-size 4 --zero-stage {level}", "cuda"))
    for _ in range(3):
        step.start()
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(5):
        step.start()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == reserved


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(dtype: str, level: int) -> None:
    """torch refuses whatever would make the host wait; an event that is waited for, as for the last verdict, it does not see."""
    step = stepping(built(f"{TINY} {SHAPES['llama']} --dtype {dtype} --micro-batch-size 2 --global-batch-size 4 --zero-stage {level}", "cuda"))
    step.start()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.start()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_documents_in_a_row_equal_a_mask(shape: str) -> None:
    """The kernel that knows where documents begin, and the mask: loss and gradients in bf16."""
    words, found = f"{TINY} {SHAPES[shape]} --bf16 --micro-batch-size 2 --seq-length 200 --kv-channels 16", []
    for packed in (True, False):
        run = built(words, "cuda")
        data = [replace(b, documents=documents_of(b.tokens, 9), bounds=bounds_of(b.tokens.cpu(), 9).cuda() if packed else None) for b in batches(run)]
        found.append((gradients(run, data), named(run, "grad_slice")))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-2)
    for name, grad in found[0][1].items():
        assert (grad - found[1][1][name]).norm() <= 0.05 * max(g.norm() for g in found[1][1].values()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nccl_in_a_world_of_one(dtype: torch.dtype) -> None:
    """By hand: a group of one never comes here otherwise."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device, pg_options=urgent())
    try:
        assert dist.group.WORLD
        group, x = Nccl("tp", [0], Line(0, 60), dist.group.WORLD, dist.new_group(pg_options=urgent())), torch.randn(64, 3, device=device).to(dtype)
        works = [group.all_gather(x), group.reduce_scatter(x.clone()), group.all_reduce(x.clone()), group.all_reduce(x.clone(), "max")]
        y, z = x.clone(), x.clone()
        works += [group.all_gather(y, y), group.reduce_scatter(z, z)]
        assert all(torch.equal(work.wait(), x) for work in works) and group.line.sent["tp"] == 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("row", [
    Row(dp=2), Row(dp=2, level=1, shape="llama"), Row(dp=2, level=2, late=True), Row(dp=2, level=3, recompute="full"), Row(tp=2, shape="qwen"),
    Row(pp=2, schedule="interleaved", virtual=2, layers=4, late=True)], ids=str)
def test_two_ranks_on_one_device_equal_one_rank_on_the_cpu(row: Row) -> None:
    """Over gloo, which moves what is on the device through the host: NCCL refuses two ranks on one device."""
    pool = Pool("spawn")
    try:
        compare(row, pool, tolerance=1e-11, device="cuda")      # the CPU and the device add up products in another order
    finally:
        pool.close()
