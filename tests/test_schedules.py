"""Learning-rate curves against their formulas."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support import TINY, resolved, train

from megazero.base.errors import UserError
from megazero.plan import checks, sizes
from megazero.plan.progress import Curve, Progress, loss_scale, progress_of
from megazero.settings import from_command_line


def curve(words: str, steps: int = 100) -> list[float]:
    plan = resolved(f"{TINY} {words}".replace("--lr 1e-2", "--lr 1.0").replace("--train-iters 5", f"--train-iters {steps}"))
    return [plan.curve.rate(k) for k in range(steps)]


def test_warm_up_rises_in_equal_steps_to_the_top() -> None:
    got = curve("--lr-warmup-iters 10 --lr-decay-style constant --lr-warmup-init 0.5")
    assert got[:10] == pytest.approx([0.5 + 0.05 * k for k in range(1, 11)]) and set(got[10:]) == {1.0}
    assert curve("--lr-warmup-fraction 0.1 --lr-decay-style constant --lr-warmup-init 0.5") == got
    assert curve("--lr-warmup-samples 10 --lr-decay-style constant --lr-warmup-init 0.5") == got


@pytest.mark.parametrize("style, formula", {
    "linear": lambda part: 0.1 + 0.9 * (1 - part),
    "cosine": lambda part: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)),
}.items())
def test_decay_starts_at_the_top_and_ends_at_the_bottom(style: str, formula) -> None:
    got = curve(f"--lr-decay-style {style} --min-lr 0.1 --lr-warmup-iters 20 --lr-decay-iters 80")
    assert got[20:80] == pytest.approx([formula((k - 20) / 60) for k in range(20, 80)])
    assert got[20] == 1.0 and got[79] > 0.1 and set(got[80:]) == {0.1}
    assert curve(f"--lr-decay-style {style} --min-lr 0.1 --lr-warmup-iters 20 --lr-decay-samples 80") == got


def test_lengths_in_samples_are_checked_too() -> None:
    words = f"{TINY} --train-samples 40 --lr-decay-style WSD --lr-wsd-decay-iters 50".replace("--train-iters 5 ", "")
    with pytest.raises(UserError, match="--lr-wsd-decay-iters 50: is longer than the whole curve of 40 steps"):
        resolved(words)


def test_inverse_square_root() -> None:
    assert curve("--lr-decay-style inverse-square-root")[:2] == [1.0, 1.0]
    got = curve("--lr-decay-style inverse-square-root --lr-warmup-iters 25 --min-lr 0.55")
    assert got[25] == 1.0 and got[64] == pytest.approx(math.sqrt(25 / 64)) and got[99] == 0.55


@pytest.mark.parametrize("style, middle", {"linear": 0.5, "cosine": 0.5, "exponential": 2 * 0.5**0.5 - 1, "minus_sqrt": 1 - 0.5**0.5}.items())
def test_wsd_is_stable_then_falls(style: str, middle: float) -> None:
    got = curve(f"--lr-decay-style WSD --lr-wsd-decay-style {style} --lr-wsd-decay-iters 20 --lr-warmup-iters 5 --min-lr 0.2")
    assert set(got[5:81]) == {1.0} and got[90] == pytest.approx(0.2 + 0.8 * middle) and 0.2 < got[99] < 0.3


def test_a_curve_needs_no_plan() -> None:
    """What the Engine gives is enough; in a run told by samples, steps of another size count by what they read, skipped ones not."""
    assert Curve(0.5).rate(0) == Curve(0.5).rate(1e6) == 0.5
    scale = loss_scale(resolved(TINY).config)
    progress = Progress(scale, step=6, applied=5, samples=20, lost=5)
    fall = Curve(1.0, style="linear", length=10)
    assert fall.rate_after(progress) == 0.5 and replace(fall, samples=5).rate_after(progress) == pytest.approx(0.7)


def test_progress_counts_steps_samples_and_what_was_applied() -> None:
    p = Progress(loss_scale(resolved(f"{TINY} --fp16").config))
    for finite in (True, False, False, True):
        p = p.after(finite, 8)
    assert (p.step, p.applied, p.samples, p.skipped_in_a_row) == (4, 2, 32, 0)
    assert p.after(False, 8).skipped_in_a_row == 1 and p.lost == 16
    old = {k: v for k, v in asdict(p).items() if k not in ("lost", "unseen")}    # as checkpoints were before these were counted
    assert progress_of(old) == p


def test_a_decoupled_rate_has_the_same_curve_between_its_own_ends() -> None:
    words = f"{TINY} --lr-decay-style cosine --min-lr 1e-3 --decoupled-lr 0.1"
    p, q = resolved(f"{words} --decoupled-min-lr 5e-2"), resolved(words)
    at = replace(Progress(loss_scale(p.config)), step=2, applied=2, samples=2)
    part = (math.cos(math.pi * 2 / 5) + 1) / 2
    assert p.rates(at) == pytest.approx((1e-3 + 9e-3 * part, 0.05 + 0.05 * part))
    assert q.rates(at)[1] == pytest.approx(1e-3 + 0.099 * part) and len(resolved(TINY).rates(at)) == 1
    assert any("--decoupled-lr 0.0001: is below its lowest, 0.001" in s for s in checks(from_command_line(f"{words}".replace("0.1", "1e-4").split()), 1))


def test_a_rate_of_some_weights_follows_the_curve_as_a_multiple_of_it() -> None:
    p = resolved(f"{TINY} --lr-decay-style cosine --min-lr 1e-3 --lr-warmup-iters 2 --lr-warmup-init 1e-4 --lr-embedding 0.05 --lr-vectors 2e-3")
    for step in range(6):
        own, embedding, vectors = p.rates(replace(Progress(loss_scale(p.config)), step=step, applied=step, samples=step))
        assert (embedding, vectors) == pytest.approx((5 * own, own / 5))


def test_the_batch_grows_as_megatron_lets_it() -> None:
    """Its rule: START plus INCREMENT for every SAMPLES / increments that the run has read; whole steps, the last one of a stage beyond its end."""
    for ramp, full in (((16, 16, 5859), 1536), ((192, 16, 9765), 2048), ((7, 1, 100), 31), ((4, 2, 1), 8)):
        c = from_command_line(f"{TINY} --global-batch-size {full} --rampup-batch-size {' '.join(map(str, ramp))}".split())
        s, (start, more, samples) = sizes(c, 1), ramp
        each, read, steps = samples / ((full - start) / more), 0, 0
        while read < 3 * samples + 5 * full:
            batch = full if read > samples else min(full, start + int(read / each) * more)
            assert s.batch_at(read) == batch and s.samples_of(steps) == range(read, read + batch) and s.step_of(read) == steps
            assert s.step_of(read + batch - 1) == steps and s.steps_between(read, read + batch - 1) == 0
            read, steps = read + batch, steps + 1


def test_stages_of_the_batch_are_told_in_tokens() -> None:
    c = from_command_line(f"{TINY} --step-batch-size-schedule 0:2 0.1K:4 240:6 --rampup-batch-size 1 1 1".split())
    assert any("cannot be combined" in sentence for sentence in checks(c, 1))
    c = from_command_line(f"{TINY} --step-batch-size-schedule 0:2 0.1K:4 240:6".split())            # 24 tokens a sample: from samples 5 and 10 on
    s = sizes(c, 1)
    assert not checks(c, 1) and (s.ramp, s.global_batch) == (((5, 2), (10, 4)), 6)
    assert [list(s.samples_of(step))[0] for step in range(6)] == [0, 2, 4, 6, 10, 16]
    for wrong, told in {"1:2 5:4": "must begin with 0 tokens", "0:2 5:4 5:6": "each stage after the one before", "0:2 4k:x": "4k:x is not TOKENS:SAMPLES"}.items():
        assert any(told in sentence for sentence in checks(from_command_line(f"{TINY} --step-batch-size-schedule {wrong}".split()), 1))
    for wrong, told in {"4 4": "must be three numbers", "4 3 9": "does not grow from 4 to --global-batch-size 8 in steps of 3"}.items():
        assert any(told in sentence for sentence in checks(from_command_line(f"{TINY} --global-batch-size 8 --rampup-batch-size {wrong}".split()), 1))
    odd = checks(from_command_line(f"{TINY} --global-batch-size 8 --micro-batch-size 2 --rampup-batch-size 3 1 9".split()), 1)
    assert odd == ["--rampup-batch-size: has a batch of 3, which is no multiple of --micro-batch-size 2 x data-parallel 1; write multiples of 2."]


def test_the_rate_follows_the_samples_while_the_batch_grows() -> None:
    """Steps of 2, then 4 samples on a curve of 8 samples of warm-up and 16 in all: a small step is half of one, a skipped one none."""
    words = f"{TINY} --lr 1 --global-batch-size 4 --rampup-batch-size 2 2 6 --lr-warmup-samples 8 --train-samples 16 --fp16".replace("--train-iters 5 ", "")
    p = resolved(words)
    at, rates = Progress(loss_scale(p.config)), []
    for finite in (True, False, True, True, True, True):
        rates.append(p.curve.rate_after(at))
        at = at.after(finite, p.batch_at(at.samples))
    # read before, skipped ones not: 0, 2, 2, 4, 8, 12
    assert p.train_iters == 5 and rates == pytest.approx([2 / 8, 4 / 8, 4 / 8, 1.0, 1.0, 0.5])


def test_a_run_told_by_samples_goes_on_with_another_batch(tmp_path: Path) -> None:
    """20 samples by fours, 16 of the 20 that are left by eights: length and learning rate follow the samples."""
    words = (f"{TINY} --train-samples 40 --lr-warmup-samples 8 --lr-decay-style linear --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
             ).replace("--train-iters 5 ", "")
    first = train(f"{words} --global-batch-size 4 --exit-interval 5", tmp_path / "a")
    then = train(f"{words} --global-batch-size 8", tmp_path / "b")
    assert [r["samples"] for r in first + then] == [4, 8, 12, 16, 20, 28, 36]
    straight = resolved(f"{words} --global-batch-size 8")
    assert [r["lr"] for r in then] == pytest.approx([straight.curve.rate(at) for at in (2.5, 3.5)], rel=1e-6)
