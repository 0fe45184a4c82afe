"""Weights and moments in fewer bytes: what 8 bits and chance do to numbers, and that it is the same however a tensor is cut."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pool import Pool
from support import SHAPES, TINY, built, kept, named, stepping, train

from megazero.comm.wires import connect
from megazero.plan.layout import Cut, OperandSpec, Parameter, UnitSpec, cuts, flat
from megazero.plan.mesh import Mesh
from megazero.plan.moments import MomentSpec
from megazero.plan.tiles import BLOCK
from megazero.state import Reader
from megazero.state.compare import checkpoints
from megazero.units.codes import InBlocks, by_chance, codebook, moment

Tensor = torch.Tensor
SHAPE = (7, 3 * BLOCK + 90)


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_holds_numbers_of_seven_decades(signed: bool) -> None:
    codes = codebook(signed, torch.zeros(0, dtype=torch.float64))
    assert len(codes) == 255 and codes.diff().gt(0).all() and codes[-1] == 1 and codes[127 if signed else 0] == 0
    assert not signed or torch.equal(codes, -codes.flip(0))
    x = torch.logspace(-7, 0, 10_000, dtype=torch.float64)[1:]
    decade = x.log10().ceil()                                   # 64 or 128 even steps in the highest, half as many in each below
    step = 0.9 * 10**decade / 2 ** (decade + (6 if signed else 7))
    assert ((codes[:, None] - x).abs().amin(0) <= step * 0.8 + 1e-7).all()              # the last step is one and a half: it ends at 1


def test_by_chance_the_mean_is_what_it_was() -> None:
    """A hundredth of a step of bf16 is never seen by rounding to the nearest; by chance it is, in one of a hundred."""
    x = torch.full((200_000,), 1 + 2.0**-7 / 100)
    assert x.bfloat16().eq(1).all()
    noise = torch.randint(1 << 62, x.shape, generator=torch.Generator().manual_seed(1))
    found = by_chance(x, noise).double()
    assert set(found.unique().tolist()) == {1, 1 + 2.0**-7} and float(found.mean()) == pytest.approx(float(x[0]), abs=4e-6)
    assert torch.equal(by_chance(-x, noise), -by_chance(x, noise)) and by_chance(torch.tensor([1.5, 0.0, -2.0]), noise[:3]).tolist() == [1.5, 0, -2]


def coded(numbers: Tensor, tp: int, slices: int) -> list[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """What this rank holds of a matrix and a vector whose moments are 8 bits, as (offset, size, numbers), where `tp` ranks share columns or rows."""
    rank = int(os.environ.get("RANK", 0))
    wires = connect(Mesh.of(dp=slices, shard=slices, tp=tp), rank, "gloo", 60)
    place, out = wires.place, []
    for dim in (0, 1):
        one = Parameter("w", SHAPE, cuts=(Cut(dim, 1 if dim == 0 else 2),))
        laid = flat(UnitSpec("u", (OperandSpec("w", (one,)),)), place)
        step = cuts(laid.size, slices)[-1] // slices
        low = step * place.shard
        own = moment(MomentSpec(laid, 0, step * slices), torch.zeros(0, dtype=torch.float64), low, low + step, "8bit", "exp_avg", 1,
                     (wires["shard"], wires["tp"]), lambda count, dtype: torch.zeros(count, dtype=dtype))
        assert isinstance(own, InBlocks)
        given = own.numbers()
        boxes = [(at - low, box) for piece in laid.pieces for at, box in piece.boxes(low, low + step)]
        for at, box in boxes:
            given[at:at + box.numel] = numbers[box.slices].flatten()
        own.take(given)
        once = own.numbers()
        own.take(once)
        assert torch.equal(once, own.numbers()), "decoded and coded again"
        out += [(box.offset, box.size, once[at:at + box.numel].view(box.size).clone()) for at, box in boxes]
    return out


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.mark.parametrize("tp, slices", [(1, 2), (1, 3), (2, 1), (2, 2)])
def test_blocks_do_not_know_how_a_tensor_is_cut(tp: int, slices: int, pool: Pool) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * torch.logspace(-6, 0, SHAPE[1], dtype=torch.float64)
    want = torch.empty_like(numbers)
    for offset, size, part in coded(numbers, 1, 1):
        want[offset[0]:offset[0] + size[0], offset[1]:offset[1] + size[1]] = part
    for low in range(0, SHAPE[1], BLOCK):
        block, own = numbers[:, low:low + BLOCK], want[:, low:low + BLOCK]
        largest = block.abs().amax(1, keepdim=True)
        assert torch.equal(own.abs().amax(1, keepdim=True), largest) and ((own - block).abs() <= 0.0072 * largest).all()
    for rank in pool.run(tp * slices, coded, numbers, tp, slices):
        for offset, size, part in rank:
            assert torch.equal(part, want[offset[0]:offset[0] + size[0], offset[1]:offset[1] + size[1]])


WORDS = f"{TINY} {SHAPES['llama']} --global-batch-size 4"


@pytest.mark.parametrize("words", ["--bf16 --main-params-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype 8bit", "--exp-avg-dtype 8bit --exp-avg-sq-dtype bf16 --ema 0.5"])
def test_a_run_goes_on_bit_for_bit(words: str, tmp_path: Path) -> None:
    """Chance counts steps, and 8 bits of a checkpoint's numbers are the bits that were."""
    train(f"{WORDS} {words} --save {tmp_path / 'whole'}")
    train(f"{WORDS} {words} --save {tmp_path / 'two'} --exit-interval 2")
    train(f"{WORDS} {words} --save {tmp_path / 'two'} --load {tmp_path / 'two'}")
    one, two = Reader(tmp_path / "whole"), Reader(tmp_path / "two")
    assert not list(checkpoints(one, two)) and two.kinds >= {"weight", "exp_avg", "exp_avg_sq"}
    assert two.dtype("weight", "embedding.weight") == (torch.bfloat16 if "main-params" in words else torch.float32)


SQUARE = {"--tp 2 --dp 2 --zero-stage 3": 4, "--dp 3 --zero-stage 1": 3, "--pp 2": 2, "--tp 1": 1}


def test_a_checkpoint_of_any_layout_goes_on_in_any_other(pool: Pool, tmp_path: Path) -> None:
    words = f"{TINY} {SHAPES['llama']} --dtype fp64 --global-batch-size 6 --adam-eps 1e-5 --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit"
    train(f"{words} --save {tmp_path / 'whole'}")
    for a, b in zip(SQUARE, [*list(SQUARE)[1:], *SQUARE], strict=False):
        half, end = (tmp_path / name.replace(" ", "") for name in (a, f"{a}{b}"))
        pool.run(SQUARE[a], train, f"{words} {a} --exit-interval 2 --save {half}")
        pool.run(SQUARE[b], train, f"{words} {b} --load {half} --save {end}")
        assert not list(checkpoints(Reader(tmp_path / "whole"), Reader(end), 1e-10)), (a, b)


@pytest.mark.parametrize("words", ["--exp-avg-dtype 8bit --exp-avg-sq-dtype bf16", "--bf16 --main-params-dtype bf16 --optimizer lamb --exp-avg-sq-dtype 8bit"])
def test_a_step_that_is_skipped_leaves_every_bit(words: str) -> None:
    run = built(f"{WORDS} {words}")
    step = stepping(run)
    step.start()
    before = {name: w.clone() for name, w in named(run).items()}
    held = [t.clone() for u in run.units.values() for own in run.updater.state[u.flat.name].values() for t in (own.tensor, getattr(own, "scales", own.tensor))]
    for unit in run.units.values():
        unit.grad_slice.fill_(torch.nan)
    for kernel in (kernel for spans in run.updater.kernels.values() for kernels in spans.values() for kernel in kernels):
        kernel.found_inf = torch.ones(())                                                                   # type: ignore[attr-defined]
        kernel.step()
    assert all(torch.equal(before[name], w) for name, w in named(run).items()) and kept(run, next(iter(run.units.values())))
    now = [t for u in run.units.values() for own in run.updater.state[u.flat.name].values() for t in (own.tensor, getattr(own, "scales", own.tensor))]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
