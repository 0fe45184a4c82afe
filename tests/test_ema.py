"""A mean of the weights (--ema): moved by steps that happened, in any layout, saved and gone on with, seen by evaluations and exports."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from support import TINY, built, fed, named, resolved, stepping, train
from test_parity import Row

from megazero.base import UserError
from megazero.comm.wires import connect
from megazero.run.generate import build_from_checkpoint, logits
from megazero.run.loop import Loop
from megazero.run.run import Run
from megazero.state import checkpoint, record
from megazero.state.checkpoint import Reader

Tensor = torch.Tensor


def means(run: Run) -> dict[str, Tensor]:
    return {p.shard.parameter.name: run.updater.state[u.flat.name]["ema"].tensor[p.start:p.stop].view(p.shard.parameter.shape)
            for u in run.units.values() for p in u.flat.pieces}


def test_it_is_the_mean_of_masters_and_a_skipped_step_leaves_it() -> None:
    run = built(f"{TINY} --dtype fp64 --ema 0.9")
    run.updater.begin_means()
    step, want = stepping(run), {n: t.clone() for n, t in named(run).items()}
    for _ in range(3):
        step.start()
        want = {n: 0.9 * want[n] + 0.1 * t for n, t in named(run).items()}
        assert all((means(run)[n] - t).abs().max() <= 1e-15 for n, t in want.items())
    weights = {n: t.clone() for n, t in named(run).items()}
    with run.updater.means():
        assert all(torch.equal(named(run)[n], t) for n, t in means_of(want, run).items())
    assert all(torch.equal(t, weights[n]) for n, t in named(run).items())
    run.units["layers.0"].master.fill_(torch.nan)
    before = {n: t.clone() for n, t in means(run).items()}
    step.start()                                                # its loss is no number
    assert all(torch.equal(t, before[n]) for n, t in means(run).items())


def means_of(want: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Bit for bit those that were exchanged, which are within rounding of what was computed here."""
    found = {n: t.clone() for n, t in named(run).items()}
    assert all((found[n] - t).abs().max() <= 1e-15 for n, t in want.items())
    return found


def held(words: str, world: int, backend: str) -> list[tuple[str, Any, Tensor]]:
    plan = resolved(words, world)
    run = Run(plan, torch.device("cpu"), connect(plan.mesh, int(os.environ["RANK"]) if world > 1 else 0, backend, 60))
    run.initialise()
    run.updater.begin_means()
    step = stepping(run)
    for _ in range(3):
        step.start()
    for unit in run.units.values():
        unit.updated()
    return [(s.name, s.box, s.tensor.clone()) for u in run.units.values()
            for _, s in checkpoint.held(u.flat, u.low, {"ema": run.updater.state[u.flat.name]["ema"].tensor})]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.mark.parametrize("row", [Row(tp=2, dp=2, level=3, shape="llama", late=True), Row(pp=2, dp=2, level=1, shape="gpt2-plain")], ids=str)
def test_any_layout_has_the_same(row: Row, pool: Pool) -> None:
    want = {name: t for name, _, t in held(f"{row.model} --ema 0.7", 1, "gloo")}
    world = row.tp * row.pp * row.dp
    for rank in pool.run(world, held, f"{row.words} --ema 0.7", world, "gloo+late" if row.late else "gloo"):
        for name, box, t in rank:
            assert not t.numel() or (t - want[name][box.slices]).abs().max() <= 1e-12 * want[name].abs().max(), name


def test_it_goes_on_is_evaluated_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{TINY} --ema 0.8 --eval-iters 2 --eval-interval 5 --lr-decay-iters 9"
    train(f"{words} --save {tmp_path / 'whole'}")
    train(f"{words} --save {tmp_path / 'two'} --exit-interval 3")
    train(f"{words} --save {tmp_path / 'two'} --load {tmp_path / 'two'}")
    one, two = Reader(tmp_path / "whole"), Reader(tmp_path / "two")
    assert "ema" in one.kinds and all(torch.equal(one.read(*key), two.read(*key)) for key in one.shapes)
    capsys.readouterr()
    train(f"{TINY} --lr-decay-iters 9 --train-iters 7 --ema 0.5 --load {tmp_path / 'whole'} --no-load-optim")
    assert "mean        --ema begins with these weights" in capsys.readouterr().out
    tokens = torch.arange(8)[None]
    plain, mean = (logits(build_from_checkpoint(Reader(tmp_path / "whole", ema=ema)), tokens) for ema in (False, True))
    assert (plain - mean).abs().max() > 1e-4
    train(f"{TINY} --save {tmp_path / 'none'}")
    with pytest.raises(UserError, match="^--ema: .* holds no means of its weights; load one of a run with --ema DECAY"):
        Reader(tmp_path / "none", ema=True)


def test_evaluations_see_the_mean(tmp_path: Path) -> None:
    """The loss that a run tells is that of its means, taken for weights."""
    words = f"{TINY} --eval-iters 2 --eval-interval 5 --lr 3e-2"
    lines = train(f"{words} --ema 0.6 --save {tmp_path / 'run'}", tmp_path / "log")
    mean, plain = Reader(tmp_path / "run", ema=True), Reader(tmp_path / "run")
    assert (mean.read("weight", "layers.0.mlp.up.weight") != plain.read("weight", "layers.0.mlp.up.weight")).any()
    told = next(line["loss"] for line in reversed(lines) if line.get("split") == "valid")
    run = built(words)
    losses = []
    for reader in (mean, plain):
        record.restore(reader, run.units.values(), {})
        losses.append(evaluated(run))
    assert told == pytest.approx(losses[0], abs=1e-6) and abs(losses[0] - losses[1]) > 1e-4


def evaluated(run: Run) -> float:
    feed = fed(run)
    loop = Loop(run, feed, stepping(run), metrics=None, record=None, wish=None)                  # type: ignore[arg-type]
    return loop.evaluate(next(iter(feed.splits[1].values())))
