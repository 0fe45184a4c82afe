"""A step is a transaction: a non-finite gradient changes nothing, in any precision, and the log says what happened."""

from collections.abc import Callable

import pytest
import torch
from support import TINY, built, kept, lines, moments, named, stepping, train
from torch._subclasses import FakeTensorMode

from megazero.base.errors import UserError
from megazero.plan.progress import LossScale, loss_scale
from megazero.plan.rules import RULES
from megazero.run.step import Settled, Step
from megazero.units import rules
from megazero.units.gate import Ruling
from megazero.units.unit import Weight


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], name: str = "layers.1.mlp.down.weight", value: float = float("nan")) -> None:
    """Makes one element of one gradient `value` in the given steps (counted from 1)."""
    plain_add, plain_step, seen = Weight.add_product, Step.start, [0]

    def start(step: Step, *wish: Callable[[], str]) -> Settled | None:
        seen[0] += 1
        return plain_step(step, *wish)

    def add(weight: Weight, dy: torch.Tensor, x: torch.Tensor) -> None:
        plain_add(weight, dy, x)
        if seen[0] in steps and weight.operand.name == name:
            weight.grad[1, 2] = value

    monkeypatch.setattr(Step, "start", start)
    monkeypatch.setattr(Weight, "add_product", add)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing(dtype: str, optimizer: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    """Step 1 (the optimizer's first) and step 3 are bad: the others must be those of a run that never saw them."""
    words = f"{TINY} --dtype {dtype} --optimizer {optimizer} --lr-warmup-iters 3" + (" --loss-scale-window 2 --hysteresis 1" if dtype == "fp16" else "")
    clean = train(words.replace("--train-iters 5", "--train-iters 3 --lr-decay-iters 5"), tmp_path / "clean")
    poison(monkeypatch, {1, 3}, value=value)
    records = train(words, tmp_path / "log")
    assert [r["skipped"] for r in records] == [True, False, True, False, False]
    assert [r["lr"] for r in records if not r["skipped"]] == [r["lr"] for r in clean], "the learning rate must not move"
    assert records[0]["lr"] == records[1]["lr"] and records[2]["lr"] == records[3]["lr"]
    assert [r["samples"] for r in records] == [1, 2, 3, 4, 5]
    told = capsys.readouterr().out
    assert told.count("skipped: the gradient of layers.1.mlp.down.weight is not finite (1 of") == 2
    if dtype == "fp16":
        assert [r["loss_scale"] for r in records] == [65536, 32768, 32768, 16384, 16384]
        assert "loss scale 65536 -> 32768" in told


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_every_bit_stays_as_it_was(dtype: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 3})
    run = built(f"{TINY} --dtype {dtype} --optimizer {optimizer}")
    step = stepping(run)

    def state() -> list[torch.Tensor]:
        buffers = [b for u in run.units.values() for b in (u.weights, *kept(run, u).values())]
        return [b.clone() for b in (*buffers, *run.updater.steps)]

    for bad in (True, False, True, False):
        before = state()
        step.start()
        same = [torch.equal(a, b) for a, b in zip(before, state(), strict=True)]
        assert all(same) if bad else not all(same)
    assert all(b.isfinite().all() for b in state())


def test_too_many_bad_steps_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(UserError, match="--max-skipped-steps 3: 3 steps in a row .* layers.1.mlp.down.weight"):
        train(f"{TINY} --max-skipped-steps 3", tmp_path)
    assert [r["skipped"] for r in lines(tmp_path)] == [False, True, True, True]
    poison(monkeypatch, {2, 4})
    assert len(train(f"{TINY} --max-skipped-steps 2", tmp_path / "b")) == 5, "a good step between starts the count again"


def test_a_non_finite_weight_is_named_from_the_loss(tmp_path) -> None:
    """When everything is NaN the loss is, too; nothing is applied."""
    run = built(TINY)
    step = stepping(run)
    named(run)["layers.0.mlp.up.weight"][0, 0] = float("nan")
    step.start()
    assert step.pending and bool(step.pending.verdict.found_inf)


def test_the_loss_scale_follows_its_rule() -> None:
    scale = LossScale(value=8.0, minimum=2.0, window=3, hysteresis=2, constant=False)
    seen = []
    for finite in (True, True, True, False, False, False, True, True, True, False, False, False, False, False):
        scale = scale.after(finite)
        seen.append(scale.value)
    # three good: doubled; the first bad is forgiven, each next one halves; a doubling forgives again; never below the minimum
    assert seen == [8, 8, 16, 16, 8, 4, 4, 4, 8, 8, 4, 2, 2, 2]
    constant = LossScale(4.0, 1.0, 1, 1, constant=True)
    assert constant.after(False) == constant.after(True) == constant


def test_only_fp16_has_a_moving_scale() -> None:
    def of(words: str) -> LossScale:
        return loss_scale(built(f"{TINY} {words}").config)
    assert of("--fp16") == LossScale(65536.0, 1.0, 1000, 2, False)
    assert of("--fp16 --loss-scale 128") == LossScale(128.0, 1.0, 1000, 2, True)
    assert all(of(f"--dtype {d}").value == 1 and of(f"--dtype {d}").constant for d in ("fp64", "fp32", "bf16"))


def test_fp16_finds_its_scale(tmp_path) -> None:
    """From 2^40 the scale comes down by itself, losing only the steps that overflow."""
    records = train(f"{TINY} --fp16 --initial-loss-scale 1.1e12 --hysteresis 1 --train-iters 40 --max-skipped-steps 40".replace("--train-iters 5 ", ""), tmp_path)
    skipped = [r["skipped"] for r in records]
    assert all(skipped[:10]) and sum(skipped[-10:]) <= 3
    applied = [r["loss_scale"] for r in records if not r["skipped"]]
    assert applied and max(applied) < 2**21 and records[-1]["grad_norm"] < 100


def test_the_norm_of_many_elements_is_right_in_fp32() -> None:
    """torch's norm of one large tensor on CPU adds up its rounding: for a few million elements of uneven size it is off by a part in a thousand."""
    run = built(f"{TINY} --vocab-size 40000".replace("--vocab-size 101 ", ""))
    grad = named(run, "grad_slice")["embedding.weight"]
    for unit in run.units.values():
        unit.grad_slice.zero_()
    grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)) * 1e-5)
    grad[:500] *= 100
    one = torch.ones((), dtype=torch.float32)
    verdict = run.gate.judge(Ruling(one, told={"loss": one.double(), "tokens": one.double()}))
    assert float(verdict.norm) == pytest.approx(float(grad.double().norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_a_bad_step_leaves_nothing_between_operands(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands begin at multiples of 64 elements: what lies between them is never read, and must not fill with NaN either."""
    run = built(f"{TINY} --hidden-size 40 --dtype {dtype}")
    step = stepping(run)
    poison(monkeypatch, {1})
    for _ in range(3):
        step.start()
    assert step.progress.step == 2 and step.progress.applied == 1
    for unit in run.units.values():
        assert sum(p.stop - p.start for p in unit.flat.pieces) < len(unit.master) or unit.flat.name == "positions"
        for buffer in (unit.master, unit.grads, *moments(run, unit.flat.name)):
            assert buffer is not None and buffer.isfinite().all(), unit.flat.name


@pytest.mark.parametrize("optimizer", RULES)
def test_plain_kernels_equal_the_fused_ones_in_float64(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in for CUDA's fused ones, which take the rate in fp32: to the last digits, skipped steps (1 and 3) too. A rate that was
    rounded to fp32 would show at 1e-9 of a step."""
    words, seen = f"{TINY} --dtype fp64 --optimizer {optimizer} --lr 1e-3 --weight-decay 0.1", []
    for fused in (True, False):
        with monkeypatch.context() as here:
            here.setattr(rules, "precise", lambda master, fused=fused: fused)
            poison(here, {1, 3})
            run = built(words)
            step, started = stepping(run), named(run, "master")["layers.0.mlp.up.weight"].clone()
            step.start()
            assert torch.equal(named(run, "master")["layers.0.mlp.up.weight"], started) and all(float(n) == 0 for n in run.updater.steps)
            for _ in range(4):
                step.start()
            seen.append(torch.cat([t.flatten() for u in run.units.values() for t in (u.master, *moments(run, u.flat.name))]))
            assert {float(n) for n in run.updater.steps} == ({0.0} if optimizer == "sgd" else {3.0})
    assert not torch.equal(seen[0], torch.zeros_like(seen[0])) and (seen[0] - seen[1]).abs().max() < 1e-14


def test_which_masters_the_fused_kernels_are_too_coarse_for() -> None:
    with FakeTensorMode():
        found = [rules.precise(torch.empty(1, dtype=d, device=at)) for at in ("cuda", "cpu") for d in (torch.float64, torch.float32)]
    assert found == [False, True, True, True]
