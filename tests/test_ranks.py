"""The real program on several ranks: what it saves loads in any layout, and goes on as if nothing had changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from support import byte_dataset, lines, train

from megazero.checkpoint import Reader

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
    for world, layout, stop in ((4, "--tp 2 --dp 2", 3), (1, "", 5), (3, "--dp 3", 8), (6, "--tp 6", 10), (2, "--tp 2 --async-save", 12)):
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


def initial(words: str, folder: str) -> None:
    train(f"{words} --train-iters 0 --save {folder}".replace("--train-iters 12 ", ""))


def test_any_layout_starts_from_the_same_weights(pool: Pool, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}"
    initial(words, str(tmp_path / "a"))
    for world, layout in ((2, "--tp 2"), (6, "--tp 2 --dp 3"), (3, "--dp 3")):
        pool.run(world, initial, f"{words} {layout}", str(tmp_path / f"b{world}"))
        one, two = Reader(tmp_path / "a"), Reader(tmp_path / f"b{world}")
        assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)
