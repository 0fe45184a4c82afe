"""Megatron's own order of samples: goldens it served itself, and a second, plain implementation of the description."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from megazero.base.errors import UserError
from megazero.data.dataset import Reading, Samples, open_stages
from megazero.data.indexed import IndexedWriter
from megazero.data.megatron_order import MegatronBlend, MegatronOrder

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no golden files at {GOLDEN}")


def opened(words: list[str], count: int, split: str | None = None, which: str = "train", s: int = 16, seed: int = 1234) -> Samples:
    return open_stages([(0, words)], split, which, Reading(s, seed, shuffle=True, megatron=True, count=count))


@needs_golden
@pytest.mark.parametrize(("which", "count"), [("train", 12_000), ("valid", 20), ("test", 10)])
def test_samples_are_megatrons(which: str, count: int) -> None:
    expected = np.frombuffer((GOLDEN / f"samples_{which}.npy").read_bytes()[128:], "<u2").reshape(-1, 65)
    samples = opened([str(GOLDEN / "tiny_gpt2_text_document")], count, "969,30,1", which, s=64)
    assert len(expected) == min(count, 600)
    assert all(np.array_equal(samples.sample(k), expected[k]) for k in range(len(expected)))
    if which == "train":
        every = hashlib.sha256()
        for k in range(count):
            every.update(samples.sample(k).astype("<i8").tobytes())
        assert every.hexdigest() == "173bd7f5731fa0691cfe3046b63865cc7199349741971ddcdf8a65e45e8aa095"


def plain(lengths: list[int], s: int, seed: int, count: int | None) -> list[list[int]]:
    """The description, step by step, over a stream that counts upwards: the tokens of every sample."""
    tokens = sum(lengths)
    epochs = 1
    while count is not None and epochs * tokens < count * s + 1:
        epochs += 1
    earlier = ((epochs - 1) * tokens - 1) // s
    separate = epochs > 1 and count is not None and (count - earlier) < int(0.80 * ((tokens - 1) // s))
    random, n = np.random.RandomState(seed), len(lengths)
    order = np.array(list(range(n)) * (epochs - 1 if separate else epochs))
    random.shuffle(order)
    order = order.tolist()
    if separate:
        last = np.arange(n)
        random.shuffle(last)
        order += last.tolist()
    starts = np.cumsum([0, *lengths]).tolist()
    stream = [t for d in order for t in range(starts[d], starts[d] + lengths[d])]
    total = (epochs * tokens - 1) // s
    shuffle = np.arange(earlier if separate else total)
    random.shuffle(shuffle)
    shuffle = shuffle.tolist()
    if separate:
        last = np.arange(earlier, total)
        random.shuffle(last)
        shuffle += last.tolist()
    return [stream[j * s:j * s + s + 1] for j in shuffle]


def test_order_equals_the_description() -> None:
    rng, apart = np.random.default_rng(0), 0
    for case in range(150):
        s = int(rng.integers(1, 12))
        lengths = rng.integers(0, 9, rng.integers(2, 30)).tolist() + [s + 1]
        count = None if case % 7 == 0 else int(rng.integers(1, 300))
        expected = plain(lengths, s, case, count)
        order = MegatronOrder(np.array(lengths, np.int32), s, case, count)
        assert order.samples == len(expected) >= (count or 1)
        for k, tokens in enumerate(expected):
            assert [t for low, high in order.ranges(k) for t in range(low, high)] == tokens
        with pytest.raises(UserError, match=f"sample {len(expected)} was asked for, this run's order has"):
            order.ranges(len(expected))
        apart += order.epochs > 1
    assert apart > 50


def test_blend_is_the_one_furthest_behind() -> None:
    for weights in ([0.3, 0.7], [1, 1, 1], [5, 0.1, 2, 2], np.random.default_rng(1).random(40).tolist()):
        blend, taken, normal = MegatronBlend(weights, 500), [0] * len(weights), np.array(weights)
        for _ in range(2):
            normal = normal / normal.sum()
        for k in range(500):
            behind = [w * max(k, 1) - n for w, n in zip(normal.tolist(), taken, strict=True)]
            dataset = behind.index(max(behind))
            assert blend.locate(k) == (dataset, taken[dataset])
            taken[dataset] += 1
        assert MegatronBlend(weights, 500).locate(444) == blend.locate(444)


def make(prefix: Path, lengths: list[int], first: int = 0) -> str:
    with IndexedWriter(prefix, np.dtype("i4")) as writer:
        for length in lengths:
            writer.add_document([np.arange(first, first + length)] if length else [])
            first += length
    return str(prefix)


def test_blended_samples(tmp_path: Path) -> None:
    """Each dataset is asked for its share, rounded up, and half a percent more; without weights for one epoch."""
    lengths = {"a": [7, 30, 12, 50], "b": [90, 5, 60]}
    a, b = make(tmp_path / "a", [7, 30, 0, 12, 50]), make(tmp_path / "b", lengths["b"], 1000)
    samples, taken = opened(["3", a, "1", b], 40, s=4), [0, 0]
    built = [plain(lengths["a"], 4, 1234, math.ceil(30 * 1.005)), plain(lengths["b"], 4, 1234, math.ceil(10 * 1.005))]
    blend = MegatronBlend([3, 1], 40)
    for k in range(40):
        dataset, own = blend.locate(k)
        assert (samples.sample(k) - 1000 * dataset).tolist() == built[dataset][own]
        taken[dataset] += 1
    assert taken == [30, 10]
    with pytest.raises(UserError, match="sample 40 was asked for, the blend has 40"):
        samples.sample(40)
    unweighted = opened([a, b], 62, s=4)
    once = [plain(lengths["a"], 4, 1234, None), plain(lengths["b"], 4, 1234, None)]
    found = sorted(unweighted.sample(k).tolist() for k in range(62))
    assert found == sorted([*once[0], *([t + 1000 for t in tokens] for tokens in once[1])])
    with pytest.raises(UserError, match="datasets without weights are read once and hold 62 samples, the run asks for 63"):
        opened([a, b], 63, s=4)


def test_damaged_lengths_are_refused(tmp_path: Path) -> None:
    prefix = make(tmp_path / "a", [7, 30, 12])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[34:38] = (8).to_bytes(4, "little")
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(UserError, match=r"a.idx: sequence 0 has 8 tokens from byte 0 on, the next starts at 28, expected each to end where"):
        opened([prefix], 5, s=4)
