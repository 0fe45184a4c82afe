"""The real program on several ranks: what it saves loads in any layout, and goes on as if nothing had changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool, RankError
from support import SHARED, byte_dataset, lines, train

from megazero.data.indexed import IndexedWriter
from megazero.run import train as program
from megazero.run.loop import Wish
from megazero.run.step import Settled, Step
from megazero.state.checkpoint import Reader
from megazero.units.unit import Weight

WORDS = ("--num-layers 2 --hidden-size 48 --num-attention-heads 6 --num-query-groups 2 --seq-length 32 --position-embedding-type rope "
         "--micro-batch-size 1 --global-batch-size 6 --lr 2e-3 --lr-warmup-iters 3 --lr-decay-style cosine --train-iters 12 --adam-eps 1e-5 "
         "--tokenizer-type ByteTokenizer --eval-interval 4 --eval-iters 2 --hidden-dropout 0.1 --log-interval 4 --split 80,20,0 --dtype fp64")


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


def figures(log: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r.get("split"), r["loss"], r.get("grad_norm", 0.0), r.get("lr", 0.0)) for r in lines(log)]


def test_a_run_moves_between_layouts(pool: Pool, tmp_path: Path) -> None:
    """Four ranks, then one, then three, then two: the log and the weights are those of one rank that never stopped."""
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}"
    train(f"{words} --save {tmp_path / 'whole'}", tmp_path / "log")
    moved = f"{words} --save {tmp_path / 'moved'} --load {tmp_path / 'moved'}"
    for world, layout, stop in ((4, "--tp 2 --dp 2 --zero-stage 2", 3), (1, "", 5), (3, "--dp 3 --zero-stage 3", 8), (4, "--pp 2 --dp 2 --zero-stage 1", 10),
                                (2, "--tp 2 --async-save", 12)):
        pool.run(world, train, f"{moved} {layout} --exit-interval {stop}", tmp_path / "log2")
        assert Reader(tmp_path / "moved").index["step"] == stop
        assert len(list(Reader(tmp_path / "moved").folder.glob("rank-*.safetensors"))) == world
    for got, want in zip(figures(tmp_path / "log2"), figures(tmp_path / "log"), strict=True):
        assert got[:2] == want[:2] and got[2:] == pytest.approx(want[2:], rel=1e-11)
    one, two = Reader(tmp_path / "whole"), Reader(tmp_path / "moved")
    assert one.shapes == two.shapes and two.verify() > 0
    for kind, name in one.tensors:
        a, b = one.read(kind, name), two.read(kind, name)
        if not (name.endswith("k.bias")):
            assert (a - b).abs().max() <= 1e-10 * a.abs().max(), (kind, name)


@pytest.mark.parametrize("ramp", ["--rampup-batch-size 2 2 9", "--step-batch-size-schedule 0:2 100:4 300:6"])
def test_a_batch_that_grows_is_the_same_in_any_layout_and_after_a_stop(ramp: str, pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} {ramp}".replace("--train-iters 12", "--train-samples 50")
    want = train(f"{words} --save {tmp_path / 'whole'}", tmp_path / "log")
    assert [line["tokens"] // 32 for line in want if "tokens" in line][:6] == ([2, 2, 2, 4, 6, 6] if "rampup" in ramp else [2, 2, 4, 4, 6, 6])
    moved = f"{words} --save {tmp_path / 'moved'} --load {tmp_path / 'moved'}"
    for world, layout, stop in ((2, "--dp 2 --zero-stage 2", 2), (2, "--pp 2 --pipeline-schedule interleaved", 4), (2, "--tp 2", 100)):
        pool.run(world, train, f"{moved} {layout} --exit-interval {stop}", tmp_path / "log2")
    for got, expected in zip(figures(tmp_path / "log2"), figures(tmp_path / "log"), strict=True):
        assert got[:2] == expected[:2] and got[2:] == pytest.approx(expected[2:], rel=1e-11)
    assert Reader(tmp_path / "moved").index["progress"] == Reader(tmp_path / "whole").index["progress"]


def test_embedding_and_output_may_have_a_rate_of_their_own(pool: Pool, tmp_path: Path) -> None:
    """One step of plain SGD moves a weight by rate x gradient; on its own curve for two tables, and in any layout. Positions are no table."""
    words = (f"{WORDS} --data-path {byte_dataset(tmp_path)} --untie-embeddings-and-output-weights --eval-iters 0 --hidden-dropout 0 "
             "--position-embedding-type learned_absolute")
    plain = f"{words} --optimizer sgd --sgd-momentum 0 --weight-decay 0 --clip-grad 0 --lr-warmup-iters 0 --lr-decay-style constant --adam-eps 1e-8"
    initial(plain, str(tmp_path / "before"))
    once = plain.replace("--train-iters 12", "--train-iters 1")
    train(f"{once} --save {tmp_path / 'one'}")
    train(f"{once} --save {tmp_path / 'other'} --decoupled-lr 1e-2")
    before, one, other = (Reader(tmp_path / name) for name in ("before", "one", "other"))
    tables = {"embedding.weight", "head.output.weight"}
    for _, name in one.tensors:
        moved, otherwise = (r.read("weight", name) - before.read("weight", name) for r in (one, other))
        assert torch.allclose(otherwise, moved * (5 if name in tables else 1), rtol=1e-9, atol=1e-15), name
    words += " --decoupled-lr 1e-2 --decoupled-min-lr 1e-3 --min-lr 1e-5"
    train(words, tmp_path / "log")
    for layout in ("--tp 2", "--pp 2", "--dp 2 --zero-stage 3"):
        pool.run(2, train, f"{words} {layout}", tmp_path / layout.replace(" ", ""))
        for got, want in zip(figures(tmp_path / layout.replace(" ", "")), figures(tmp_path / "log"), strict=True):
            assert got[:2] == want[:2] and got[2:] == pytest.approx(want[2:], rel=1e-11)


def initial(words: str, folder: str) -> None:
    train(f"{words} --train-iters 0 --save {folder}".replace("--train-iters 12 ", ""))


def test_any_layout_starts_from_the_same_weights(pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}"
    initial(words, str(tmp_path / "a"))
    for world, layout in ((2, "--tp 2"), (4, "--pp 2 --dp 2 --zero-stage 1"), (3, "--dp 3 --zero-stage 3")):
        pool.run(world, initial, f"{words} {layout}", str(tmp_path / f"b{world}"))
        one, two = Reader(tmp_path / "a"), Reader(tmp_path / f"b{world}")
        assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)


@pytest.mark.parametrize("world, batch, layout", [(3, 6, "--dp 3 --zero-stage 3"), (4, 4, "--pp 2 --dp 2 --zero-stage 1")])
def test_a_full_validation_that_ranks_do_not_share_evenly(world: int, batch: int, layout: str, pool: Pool, tmp_path: Path) -> None:
    """Two samples at a time, and a number of samples that leaves some ranks without any at the end."""
    prefix = str(tmp_path / "few_text_document")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([np.arange(3000, dtype=np.uint16) % 250])
    words = WORDS.replace("--train-iters 12", "--train-iters 4").replace("size 1 --global-batch-size 6", f"size 2 --global-batch-size {batch}")
    words = f"{words.replace('--split 80,20,0', '--split 90,10,0')} --data-path {prefix} --full-validation"
    train(words, tmp_path / "one")
    pool.run(world, train, f"{words} {layout}", tmp_path / "log")
    one, got = ([r["loss"] for r in lines(tmp_path / log) if r.get("split") == "valid"] for log in ("one", "log"))
    assert len(one) == 1 and got == pytest.approx(one, rel=1e-12)


def text(tmp_path: Path) -> str:
    """tinyshakespeare where it is at hand, else the standard library's own source; as bytes."""
    play = SHARED / "data" / "tinyshakespeare.txt"
    if not play.exists():
        return byte_dataset(tmp_path)
    prefix = str(tmp_path / "play_text_document")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([np.frombuffer(play.read_bytes(), np.uint8).astype(np.uint16)])
    return prefix


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-5), pytest.param("bf16", 2e-2, marks=pytest.mark.full)])
def test_a_hundred_steps_on_text(dtype: str, tolerance: float, pool: Pool, tmp_path: Path) -> None:
    """tp 2 against one rank. Two ranks round each partial sum before they add them, one rank rounds the whole: half a unit in the last place
    per row operation, 2^-24 or 2^-8 of an activation. Four such operations a step move a loss of 3 by about 1e-6 or 1e-2. The rate is small
    enough for the curve itself not to multiply a difference: at four times this rate the largest one is two hundred times as much in fp32."""
    words = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 4 --train-iters 100 --lr 5e-4 "
             "--lr-warmup-iters 10 --lr-decay-style cosine --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
             "--tokenizer-type ByteTokenizer --split 100,0,0 --eval-iters 0 --log-interval 50 "
             f"--data-path {text(tmp_path)} --dtype {dtype}")
    train(words, tmp_path / "one")
    pool.run(2, train, f"{words} --tp 2", tmp_path / "two")
    one, two = ([r["loss"] for r in lines(tmp_path / run)] for run in ("one", "two"))
    far = [abs(a - b) for a, b in zip(one, two, strict=True)]
    print(f"{dtype}: loss {one[0]:.4f} -> {one[-1]:.4f}, largest difference {max(far):.2e} at step {far.index(max(far)) + 1}, mean {sum(far) / 100:.2e}")
    assert one[-1] < 0.75 * one[0] and max(far) < tolerance


def signalled(words: str, log: str) -> None:
    """Rank 1 alone is asked to stop, in step 3: all must stop after the same step."""
    plain, calls = Wish.reason, [0]

    def reason(wish: Wish) -> str:
        calls[0] += 1
        return "signal SIGTERM" if calls[0] >= 3 and os.environ["RANK"] == "1" else plain(wish)

    Wish.reason = reason  # type: ignore[method-assign]
    try:
        train(words, Path(log))
    finally:
        Wish.reason = plain  # type: ignore[method-assign]


def test_all_ranks_stop_after_the_same_step(pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --tp 2 --save {tmp_path / 'ck'}"
    pool.run(2, signalled, words, str(tmp_path / "log"), seconds=60)
    assert Reader(tmp_path / "ck").index["step"] in (3, 4, 5)


def poisoned(words: str, who: int, log: str) -> None:
    """One rank's part of one gradient is NaN in step 2."""
    plain_add, plain_step, calls = Weight.add_product, Step.start, [0]

    def start(step: Step, *wish: Callable[[], str]) -> Settled | None:
        calls[0] += 1
        return plain_step(step, *wish)

    def add(weight: Weight, dy: torch.Tensor, x: torch.Tensor) -> None:
        plain_add(weight, dy, x)
        if calls[0] == 2 and weight.operand.name == "layers.0.mlp.up.weight" and int(os.environ["RANK"]) == who:
            weight.grad[0, 0] = torch.nan

    Step.start, Weight.add_product = start, add  # type: ignore[method-assign]
    try:
        train(words, Path(log))
    finally:
        Step.start, Weight.add_product = plain_step, plain_add  # type: ignore[method-assign]


@pytest.mark.parametrize("who, layout", [(1, "--tp 2"), (3, "--tp 2 --dp 2"), (0, "--tp 2 --dp 2 --zero-stage 1"), (3, "--tp 2 --dp 2 --zero-stage 3")])
def test_a_bad_gradient_on_any_rank_skips_the_step_on_all(who: int, layout: str, pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} {layout} --train-iters 4 --lr-decay-iters 12 --save {tmp_path / 'ck'}".replace("--train-iters 12 ", "")
    pool.run(4 if "--dp" in layout else 2, poisoned, words, who, str(tmp_path / "log"), seconds=60)
    assert [r["skipped"] for r in lines(tmp_path / "log") if "split" not in r] == [False, True, False, False]
    told = capsys.readouterr().out
    assert "skipped: the gradient of layers.0.mlp.up.weight is not finite (1 of" in told and f"parameters) on rank {who}; nothing" in told
    assert all(Reader(tmp_path / "ck").read(*key).isfinite().all() for key in Reader(tmp_path / "ck").tensors)


def loads_its_own(words: str, folder: str) -> None:
    """Each rank has a file system of its own."""
    os.chdir(Path(folder) / os.environ["RANK"])
    train(words)


def test_ranks_that_do_not_see_the_same_checkpoint_do_not_start(pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save ck --load ck"
    for rank in "01":
        (tmp_path / rank).mkdir()
    initial(words.replace("--save ck --load ck", ""), str(tmp_path / "0" / "ck"))
    with pytest.raises(RankError, match="ranks do not see the same checkpoint, but none to step 0"):
        pool.run(2, loads_its_own, f"{words} --tp 2", str(tmp_path))


def blind(words: str, folder: str) -> None:
    """Rank 1 has a folder of its own under the name of the shared one."""
    if os.environ["RANK"] == "1":
        plain = os.listdir
        os.listdir = lambda path=".": [] if str(path) == folder else plain(path)  # type: ignore[assignment]
    program.SIGHT = 0.1
    try:
        train(words)
    finally:
        program.SIGHT = 60.0
        if os.environ["RANK"] == "1":
            os.listdir = plain


def test_ranks_that_do_not_share_the_folder_are_told_at_the_start(pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'} --tp 2"
    with pytest.raises(RankError, match="--save .*ck: rank 1 does not see what rank 0 wrote there; it must lie on a file system that all of them share"):
        pool.run(2, blind, words, str(tmp_path / "ck"))


def test_other_data_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the same name: fewer of them, or as many that are others. Ranks whose data differ are not joined."""
    prefix = str(tmp_path / "d_text_document")

    def write(start: int, count: int) -> None:
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document([(np.arange(count, dtype=np.uint16) + start) % 250])

    words = f"{WORDS.replace('--train-iters 12', '')} --eval-iters 0 --data-path {prefix} --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
    words, told = words.replace("--eval-interval 4 --eval-iters 2", ""), []
    for start, count, steps in ((0, 9000, 4), (0, 9000, 5), (7, 9000, 6), (7, 5000, 7)):
        write(start, count)
        train(f"{words} --train-iters {steps} --lr-decay-iters 100")
        told.append("changed     the data were" in capsys.readouterr().out)
    assert told == [False, False, True, True]
