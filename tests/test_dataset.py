"""Samples of splits and blends, against slices of the plain token stream."""

import json
from pathlib import Path

import numpy as np
import pytest

from megazero.base.errors import UserError
from megazero.data.dataset import MockSamples, Samples, open_split, parse_paths
from megazero.data.indexed import IndexedDataset, IndexedWriter

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden" / "tiny_gpt2_text_document"
needs_golden = pytest.mark.skipif(not GOLDEN.with_suffix(".idx").exists(), reason=f"no golden files at {GOLDEN.parent}")


def make(prefix: Path, lengths: list[int], first: int = 0, dtype: str = "i4") -> str:
    """A dataset whose tokens count upwards from `first`, so that a sample tells where it was cut."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for length in lengths:
            writer.add_document([np.arange(first, first + length)] if length else [])
            first += length
    return str(prefix)


def opened(paths: list[str], split: str | None = None, which: str = "train", shuffle: bool = False, **more: int) -> Samples:
    return open_split(paths, split, which, sequence_length=8, seed=1, shuffle=shuffle, **more)


def test_file_order(tmp_path: Path) -> None:
    samples = opened([make(tmp_path / "d", [50, 0, 51])])
    assert samples.sample(0).dtype == np.int64
    for k in range(12):
        assert samples.sample(k).tolist() == list(range(8 * k, 8 * k + 9))
    assert samples.sample(12).tolist() == list(range(9))
    assert samples.full_pass() == 12


def test_split_is_a_range_of_documents(tmp_path: Path) -> None:
    prefix = make(tmp_path / "d", [10] * 20)
    for which, first, last in (("train", 0, 100), ("valid", 100, 160), ("test", 160, 200)):
        samples = opened([prefix], "50,30,20", which)
        assert samples.sample(0)[0] == first and samples.token_count == last - first
        assert samples.in_order(samples.full_pass() - 1)[-1] < last


def test_split_of_one_document_is_a_range_of_tokens(tmp_path: Path) -> None:
    prefix = make(tmp_path / "d", [1000])
    assert opened([prefix], "90,10").token_count == 900
    valid = opened([prefix], "90,10", "valid")
    assert valid.sample(0).tolist() == list(range(900, 909)) and valid.token_count == 100
    assert "part of one document" in valid.describe()


def test_shuffled_epoch_serves_every_chunk_once(tmp_path: Path) -> None:
    samples = opened([make(tmp_path / "d", [33] * 7)], shuffle=True)
    order = samples.parts[0].order
    for epoch, first in ((0, 0), (1, order.chunks(0))):
        found = sorted(samples.sample(first + i).tolist() for i in range(order.chunks(epoch)))
        head = order.shift(epoch)
        assert found == [list(range(head + 8 * i, head + 8 * i + 9)) for i in range(order.chunks(epoch))]


def test_full_pass_reads_everything_in_order_whatever_the_training_order(tmp_path: Path) -> None:
    paths = ["9", make(tmp_path / "a", [41]), "1", make(tmp_path / "b", [30], first=100)]
    for shuffle in (False, True):
        samples = opened(paths, shuffle=shuffle)
        assert samples.full_pass() == 5 + 3
        starts = [int(samples.in_order(i)[0]) for i in range(8)]
        assert starts == [0, 8, 16, 24, 32, 100, 108, 116]


def test_blend_by_weight_and_by_tokens(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", [600]), make(tmp_path / "b", [200], first=1000)
    for paths, share in ((["1", a, "1", b], 0.5), (["0.9", a, "0.1", b], 0.9), ([a, b], 0.75)):
        samples = opened(paths)
        for count in (10, 37, 100):
            of_a = sum(samples.sample(k)[0] < 1000 for k in range(count))
            assert abs(of_a - share * count) < 1
    assert f"2 datasets, blended in shares of 1/4: 3 {a}, 1 {b}" in samples.describe()


def test_blend_serves_each_dataset_in_its_own_order(tmp_path: Path) -> None:
    paths = ["2", make(tmp_path / "a", [600]), "1", make(tmp_path / "b", [200], first=1000)]
    firsts = [int(opened(paths).sample(k)[0]) for k in range(30)]
    assert [f for f in firsts if f < 1000] == [8 * i for i in range(20)]
    assert [f for f in firsts if f >= 1000] == [1000 + 8 * i for i in range(10)]


def test_samples_are_a_pure_function_of_their_number(tmp_path: Path) -> None:
    paths = ["2", make(tmp_path / "a", [600]), "1", make(tmp_path / "b", [200], first=1000)]
    in_turn = [opened(paths, shuffle=True).sample(k).tolist() for k in range(60)]
    late = opened(paths, shuffle=True)
    assert [late.sample(k).tolist() for k in reversed(range(60))] == in_turn[::-1]


@needs_golden
def test_golden_dataset() -> None:
    samples = open_split([str(GOLDEN)], "969,30,1", "train", 64, seed=1234, shuffle=True, vocab_size=50_257)
    stream = IndexedDataset(GOLDEN).tokens
    start = samples.parts[0].order.start(17)
    assert samples.sample(17).tolist() == stream[start:start + 65].tolist()
    assert "6,998 documents, 322,819 tokens" in samples.describe()
    with pytest.raises(UserError, match="holds token .*, expected 0 to 999; train with the tokenizer"):
        open_split([str(GOLDEN)], None, "train", 64, seed=1, shuffle=False, vocab_size=1000).sample(0)


def test_tokens_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    prefix = make(tmp_path / "d", [100])
    samples = opened([prefix], vocab_size=50)
    assert samples.sample(3)[-1] == 32
    with pytest.raises(UserError) as caught:
        samples.sample(6)
    assert str(caught.value) == (f"{prefix}: sample 6 of train holds token 56, expected 0 to 49; "
                                 "train with the tokenizer the dataset was made with.")
    Path(f"{prefix}.json").write_text(json.dumps({"vocab_size": 100}))
    assert "no sidecar" not in opened([prefix], vocab_size=100).describe()
    with pytest.raises(UserError, match="made with a vocabulary of 100 ids .*the model has 50"):
        opened([prefix], vocab_size=50)
    Path(f"{prefix}.json").write_text("{}")
    with pytest.raises(UserError, match="d.json: is no sidecar"):
        opened([prefix])


def test_negative_tokens_are_damage(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.dtype("i4")) as writer:
        writer.add_document([[1, 2, -3] * 5])
    with pytest.raises(UserError, match="holds token -3"):
        opened([str(tmp_path / "d")]).sample(0)


def test_too_few_tokens(tmp_path: Path) -> None:
    prefix = make(tmp_path / "d", [9, 8])
    assert opened([prefix], "50,50").full_pass() == 1
    with pytest.raises(UserError) as caught:
        opened([prefix], "50,50", "valid")
    assert str(caught.value) == (
        f"--data-path: {prefix}: --split 50,50 gives valid 8 of its 17 tokens (1 of 2 documents), one sample needs 9; "
        "give it a larger share, more data or a smaller --seq-length, or write --eval-iters 0.")
    with pytest.raises(UserError, match="one sample needs 9"):
        opened([make(tmp_path / "empty", [0, 0])])
    with pytest.raises(UserError, match="this is no dataset of tokens"):
        opened([make(tmp_path / "f", [99], dtype="f4")])


def test_paths() -> None:
    assert parse_paths(["a", "b"]) == (["a", "b"], None)
    assert parse_paths(["0.3", "a", "7e-1", "b"]) == (["a", "b"], [0.3, 0.7])
    for words, said in [
        (["1", "a", "b"], "a weight before every dataset"), (["1", "a", "b", "c"], "a weight before every dataset"),
        (["0", "a"], "the weight 0 is not a positive number"), (["nan", "a"], "the weight nan"), (["1e308", "a", "1e308", "b"], "the weight 1e.308 is not a positive number that adds up"), ([], "is empty"),
    ]:
        with pytest.raises(UserError, match=f"--train-data-path.*{said}"):
            parse_paths(words, "--train-data-path")


def test_mock_samples() -> None:
    mock = MockSamples(vocab_size=50, sequence_length=2000, seed=3)
    sample = mock.sample(5)
    assert sample.dtype == np.int64 and sample.shape == (2001,) and sample.min() >= 0 and sample.max() < 50
    assert np.array_equal(sample, MockSamples(50, 2000, 3).sample(5)) and not np.array_equal(sample, mock.sample(6))
    assert not np.array_equal(sample, MockSamples(50, 2000, 3, "valid").sample(5))
    learnable = np.mean(np.diff(sample) % 50 == 1 + 50 // 3)
    assert 0.87 < learnable < 0.94
    assert MockSamples(50_000, 16, 1).sample(0)[:4].tolist() == FROZEN_MOCK
    assert np.array_equal(mock.in_order(mock.full_pass() - 1), mock.sample(255))


FROZEN_MOCK = [46384, 13051, 29718, 46385]
