"""The order of samples: bijections, full epochs, blends within one sample of their share, and values frozen for good."""

import itertools
import math
import random

import numpy as np
import pytest

from megazero.base.errors import UserError
from megazero.data.order import (
    DENOMINATOR,
    Blend,
    ChunkOrder,
    chairman,
    epoch_shift,
    mix,
    permute,
    round_weights,
    split_ranges,
    stable_hash,
)


@pytest.mark.parametrize("size", range(1, 65))
def test_permute_is_a_permutation(size: int) -> None:
    for key in (0, 1, 12345, (1 << 64) - 1):
        images = [permute(i, size, key) for i in range(size)]
        assert sorted(images) == list(range(size))
        assert permute(np.arange(size), size, key).tolist() == images            # arrays and ints agree


def test_permute_large_is_one_to_one() -> None:
    for size in (99_991, 1 << 17, (1 << 17) + 1):
        images = permute(np.arange(size), size, 7)
        assert np.array_equal(np.sort(images), np.arange(size))


def test_frozen_values() -> None:
    """These may never change: a resumed run would see other data."""
    assert stable_hash("order", 1234, 0) == FROZEN["hash"]
    assert mix(1) == 0x5692161d100b05e5
    assert [permute(i, 10, 42) for i in range(10)] == FROZEN["ten"]
    assert [permute(i, 10**6 + 3, 42) for i in range(6)] == FROZEN["million"]
    assert [permute(i, 10**12, 42) for i in range(4)] == FROZEN["trillion"]
    assert [permute(10**18 - i, 10**18 + 9, 42) for i in range(3)] == FROZEN["large"]
    order = ChunkOrder(1003, 16, 1234, shuffle=True)
    assert [order.start(k) for k in (0, 1, 2, 61, 62, 63, 1000)] == FROZEN["starts"]
    assert Blend([0.5, 0.2, 0.3]).table.tolist() == FROZEN["blend"]


FROZEN: dict = {
    "hash": 8674301298128756318,
    "ten": [6, 3, 4, 7, 8, 1, 9, 5, 2, 0],
    "million": [1293, 217478, 315473, 244789, 403555, 103632],
    "trillion": [367222456790, 657832440921, 786606704681, 96249908661],
    "large": [106731462913664365, 881206900501659660, 576274018743458815],
    "starts": [138, 362, 202, 154, 540, 716, 163],
    "blend": [0, 2, 0, 1, 0, 2, 0, 1, 0, 2],
}


def test_permute_reaches_every_place_about_equally() -> None:
    size, keys = 12, 6000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, stable_hash(key))] += 1
    chi2 = float(((counts - keys / size) ** 2 / (keys / size)).sum())
    freedom = (size - 1) ** 2
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 16])
def test_every_full_chunk_once_per_epoch(sequence_length: int, shuffle: bool) -> None:
    s = sequence_length
    for tokens in range(s + 1, 5 * s + 3):
        order, k = ChunkOrder(tokens, s, seed=3, shuffle=shuffle), 0
        for epoch in range(4):
            count, (head, tail) = order.chunks(epoch), order.dropped(epoch)
            starts = sorted(order.start(k + i) for i in range(count))
            assert starts == [head + i * s for i in range(count)] and count >= 1
            assert head < s and tail < s and head + count * s + 1 + tail == tokens
            assert all(order.locate(k + i) == (epoch, i) for i in range(count))
            k += count


def test_without_shuffle_samples_follow_the_file() -> None:
    order = ChunkOrder(1000, 10, seed=9, shuffle=False)
    assert [order.start(k) for k in range(99)] == [10 * k for k in range(99)]
    assert order.start(99) == 0                                       # 1000 tokens have 99 chunks of 10 + 1


def test_the_grid_moves_from_epoch_to_epoch() -> None:
    shifts = [epoch_shift(1, epoch, 10_000, 64) for epoch in range(200)]
    assert set(shifts) <= set(range(64)) and len(set(shifts)) > 50


def test_a_sample_depends_on_nothing_but_its_number() -> None:
    order = ChunkOrder(1003, 16, 5, shuffle=True)
    in_turn = [order.start(k) for k in range(500)]
    for k in random.Random(0).sample(range(500), 500):
        assert ChunkOrder(1003, 16, 5, shuffle=True).start(k) == in_turn[k]
    for dp, batch in itertools.product((1, 2, 3, 4), (12, 24)):       # any layout's ranks together read the same samples
        ranks = [[order.start(step * batch + i) for step in range(4) for i in range(rank, batch, dp)] for rank in range(dp)]
        assert sorted(sum(ranks, [])) == sorted(in_turn[:4 * batch])
    assert in_turn != [ChunkOrder(1003, 16, 6, shuffle=True).start(k) for k in range(500)]


def worst_distance(table: np.ndarray, shares: list[int]) -> float:
    """The largest |turns taken - share| at any prefix, in turns. Extremes lie just before and just after a dataset's turns."""
    assert np.bincount(table, minlength=len(shares)).tolist() == shares
    turns, share, period = np.argsort(table, kind="stable"), np.repeat(shares, shares), len(table)
    taken = np.arange(period) - np.repeat(np.cumsum([0, *shares[:-1]]), shares)
    return int(max(np.max(share * turns - taken * period), np.max((taken + 1) * period - share * (turns + 1)))) / period


def test_blend_of_1_to_1000_datasets_is_less_than_one_sample_from_its_share() -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 1001):
        shares = rng.integers(1, 4 if count > 40 else 60, count).tolist()
        assert worst_distance(chairman(shares), shares) < 1


@pytest.mark.parametrize("count", [2, 3, 10, 100, 1000])
def test_blend_of_any_weights(count: int) -> None:
    weights = np.random.default_rng(count).exponential(size=count) ** 3 + 1e-9
    blend = Blend(weights.tolist())
    assert worst_distance(blend.table, blend.shares) < 1
    error = np.abs(np.array(blend.shares) / blend.period - weights / weights.sum()) * DENOMINATOR
    assert np.median(error) <= 1


def test_shares_are_stated_rationals() -> None:
    assert round_weights([0.3, 0.7]) == [3, 7]
    assert round_weights([5, 5, 5]) == [1, 1, 1]
    assert round_weights([0.001, 0.999]) == [1, 999]
    assert round_weights([1e-30, 1]) == [1, DENOMINATOR - 1]          # a dataset that is named is read
    assert round_weights([2.5]) == [1]
    many = round_weights([1e-12] * 5000 + [1.0, 2.0])
    assert many[:5000] == [1] * 5000 and sum(many) == DENOMINATOR


def test_blend_gives_each_dataset_its_samples_in_order() -> None:
    blend = Blend([0.5, 0.2, 0.3])
    served: list[list[int]] = [[], [], []]
    for k in range(5 * blend.period + 3):
        dataset, own = blend.locate(k)
        served[dataset].append(own)
    assert all(own == list(range(len(own))) for own in served)
    assert Blend([0.5, 0.2, 0.3]).locate(10**12 + 7) == blend.locate(10**12 + 7)


def test_split_is_megatrons() -> None:
    assert split_ranges("969,30,1", 7222) == {"train": (0, 6998), "valid": (6998, 7215), "test": (7215, 7222)}
    assert split_ranges("90,10", 1_115_394)["valid"] == (1_003_855, 1_115_394)
    assert split_ranges("100,0,0", 5) == {"train": (0, 5), "valid": (5, 5), "test": (5, 5)}
    assert split_ranges("1", 10**12)["train"] == (0, 10**12)
    for spec in ("", "a,b", "0,0,0", "1,2,3,4", "-1,2", "nan,1"):
        with pytest.raises(UserError, match="^--split .*such as 969,30,1"):
            split_ranges(spec, 10)
