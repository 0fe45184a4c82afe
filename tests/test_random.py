"""Weights and masks are pure functions of what they are for."""

import random
import threading
from math import prod

import pytest
import torch

import megazero.units.random as source
from megazero.plan.layout import Box
from megazero.units.random import fill_normal, keep_mask, key, normal


def filled(stream: int, full: tuple[int, ...], box: Box) -> torch.Tensor:
    out = torch.empty(box.size, dtype=torch.float64)
    fill_normal(out, stream, full, box, 0.0, 1.0)
    return out


@pytest.mark.parametrize("chunk", [16, 1 << 17])
def test_any_box_equals_that_box_of_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK", chunk)
    rng = random.Random(3)
    for _ in range(400 if chunk > 16 else 120):
        full = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))
        whole = filled(5, full, Box((0,) * len(full), full))
        offset = tuple(rng.randrange(n) for n in full)
        box = Box(offset, tuple(rng.randint(1, n - o) for n, o in zip(full, offset, strict=True)))
        assert torch.equal(filled(5, full, box), whole[box.slices]), (full, box)


def test_golden_values_never_change() -> None:
    """Frozen: a change here changes the initial weights of every run."""
    assert key(1234, "embedding.weight") == GOLDEN_KEY
    got = normal(key(1234, "embedding.weight"), 10**12, 4)
    assert got.tolist() == pytest.approx(GOLDEN_NORMAL, abs=1e-12)         # libm's log and cos may differ in the last bit
    mask = keep_mask(key(1234, 7, "layers.0.mlp"), torch.tensor([0, 123456789]), 24, 0.25)
    assert ["".join(str(int(b)) for b in row) for row in mask] == GOLDEN_MASK


def test_draws_are_normal_and_streams_differ() -> None:
    z = normal(key(0, "a"), 0, 1_000_000)
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005 and z.abs().max() < 6.8
    assert abs((z**4).mean() - 3) < 0.05
    assert abs(torch.corrcoef(torch.stack((z, normal(key(0, "b"), 0, 1_000_000))))[0, 1]) < 0.005


def test_masks_keep_the_right_share_and_any_part_equals_the_whole() -> None:
    rows = torch.arange(4000)
    whole = keep_mask(9, rows, 256, 0.1)
    assert abs(whole.float().mean() - 0.9) < 0.001
    assert whole.float().mean(0).min() > 0.87 and whole.float().mean(1).min() > 0.8
    assert torch.equal(keep_mask(9, rows[100:200], 64, 0.1, first=32), whole[100:200, 32:96])
    assert prod(whole.shape) == 4000 * 256


GOLDEN_KEY = 331772723599245670489987034036270451816
GOLDEN_NORMAL = [0.6470040983287175, 0.22225285820296278, 0.38673760091463055, -0.26046470461372484]
GOLDEN_MASK = ["101111111111010111111010", "100011111101111001110111"]


def test_weights_are_drawn_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws at once, or the barrier breaks; and the bits are those of one thread."""
    meeting, plain, seen = threading.Barrier(2, timeout=20), source.normal, []
    for count in (1, 2):
        monkeypatch.setattr(source, "cores", lambda count=count: count)
        monkeypatch.setattr(source, "normal", lambda *x, count=count: (count == 2 and meeting.wait(), plain(*x))[1])
        seen.append(torch.empty(4 * source.CHUNK))
        fill_normal(seen[-1], key(3), (4 * source.CHUNK,), Box((0,), (4 * source.CHUNK,)), 0.5, 2.0)
    assert torch.equal(*seen)
    monkeypatch.undo()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    assert source.cores() == 1
