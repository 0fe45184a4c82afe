"""Samples for training and evaluation: tokens in the order of order.py, or in Megatron's.

    samples = open_split(["0.7", "books_text_document", "0.3", "code_text_document"], "969,30,1", "train",
                         sequence_length=1024, seed=1234, shuffle=True)
    samples.sample(k)          # int64 [S + 1], a pure function of k: inputs are [:-1], targets [1:]

    sample k of the run --blend.locate--> (dataset, its own sample j) --order.ranges--> ranges of its tokens

Every rank reads its own samples from the files; the whole state of a loader is the number of samples consumed.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from megazero.base import UserError, naming
from megazero.data.indexed import IndexedDataset
from megazero.data.megatron_order import MegatronBlend, MegatronOrder, blend_counts
from megazero.data.order import (
    DENOMINATOR,
    MASK,
    SPLITS,
    Blend,
    BlendSchedule,
    BlendStage,
    ChunkOrder,
    mix,
    split_ranges,
    stable_hash,
)
from megazero.data.sidecar import check_sidecar, miscounts


class SampleSource(Protocol):
    """What the training loop asks of its data."""

    sequence_length: int

    def sample(self, k: int) -> np.ndarray:
        """The tokens of sample k of an endless run, int64 [S + 1]."""
        ...

    def full_pass(self) -> int:
        """Samples in one complete pass in file order."""
        ...

    def in_order(self, i: int) -> np.ndarray:
        """Sample i < full_pass() of that pass, int64 [S + 1]; neither seed, shuffle nor weights matter to it."""
        ...

    def describe(self) -> str:
        """What it reads, in lines for people."""
        ...


class Order(Protocol):
    """Which tokens of its dataset a sample is."""

    def ranges(self, k: int) -> list[tuple[int, int]]:
        """Where the S + 1 tokens of sample k are in the split's tokens, piece by piece."""
        ...

    def describe(self) -> str: ...


class Mixture(Protocol):
    """Which dataset gives a sample of the run."""

    def locate(self, k: int) -> tuple[int, int]:
        """(dataset, its own sample) of sample k."""
        ...

    def describe(self, names: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class DatasetPart:
    """One dataset's share of a split: tokens [first, first + count) of its stream."""

    dataset: IndexedDataset
    documents: int              # 0 when the split is a range of tokens of the only document
    first: int
    count: int
    order: Order
    in_file_order: ChunkOrder
    has_sidecar: bool

    def describe(self) -> str:
        size = f"{self.documents:,} documents" if self.documents else "part of one document"
        return (f"{self.dataset.prefix}: {size}, {self.count:,} tokens, {self.order.describe()}"
                + ("" if self.has_sidecar else "; no sidecar, so its tokenizer is not known"))


class Samples:
    """The samples of one split of one dataset or of a blend of several. Opening is cheap: but for Megatron's order
    nothing is scanned or built."""

    def __init__(self, which: str, parts: Sequence[DatasetPart], blend: Mixture, vocab_size: int | None) -> None:
        self.which, self.parts, self.blend, self.vocab_size = which, tuple(parts), blend, vocab_size
        self.sequence_length = parts[0].in_file_order.sequence_length
        self._ends = list(accumulate(part.in_file_order.chunks(0) for part in parts))

    def sample(self, k: int) -> np.ndarray:
        return self._read(*self.locate(k), f"sample {k}")

    def locate(self, k: int) -> tuple[DatasetPart, list[tuple[int, int]]]:
        """The dataset that gives sample k, and the ranges of its token stream that the sample is made of."""
        assert k >= 0, k
        dataset, own = self.blend.locate(k)
        part = self.parts[dataset]
        return part, [(part.first + low, part.first + high) for low, high in part.order.ranges(own)]

    def full_pass(self) -> int:
        return self._ends[-1]

    def in_order(self, i: int) -> np.ndarray:
        assert 0 <= i < self.full_pass(), f"{i} of {self.full_pass()}"
        dataset = bisect_right(self._ends, i)
        part, before = self.parts[dataset], self._ends[dataset - 1] if dataset else 0
        start = part.first + part.in_file_order.start(i - before)
        return self._read(part, [(start, start + self.sequence_length + 1)], f"sample {i} in file order")

    @property
    def token_count(self) -> int:
        return sum(part.count for part in self.parts)

    def describe(self) -> str:
        lines = [f"{self.which}: {part.describe()}" for part in self.parts]
        if len(self.parts) > 1:
            lines.append(f"{self.which}: {self.token_count:,} tokens, "
                         f"{self.blend.describe([part.dataset.prefix for part in self.parts])}")
        return "\n".join(lines)

    def _read(self, part: DatasetPart, ranges: Sequence[tuple[int, int]], name: str) -> np.ndarray:
        pieces = [part.dataset.tokens[low:high] for low, high in ranges]
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            raise UserError(f"{part.dataset.prefix}: {name} of {self.which} holds token {low if low < 0 else high}, "
                            f"expected 0 to {(self.vocab_size or 0) - 1}; "
                            "train with the tokenizer the dataset was made with.")
        return tokens.astype(np.int64)


class MockSamples:
    """Made-up tokens with something to learn (--mock-data), the same on every machine.

    Nine times in ten a token is followed by token + step (mod vocabulary), else by any token at all; so the best loss
    per token is about 0.33 + 0.1 ln(vocabulary).
    """

    def __init__(
        self, vocab_size: int, sequence_length: int, seed: int, which: str = "train", pass_size: int = 256
    ) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.which, self._pass_size = which, pass_size
        self._step = 1 + vocab_size // 3
        self._key = stable_hash("mock", seed, which)

    def sample(self, k: int) -> np.ndarray:
        assert k >= 0, k
        place = np.arange(self.sequence_length + 1)
        noise = mix(place.astype(np.uint64) + mix(self._key + k & MASK))               # [S + 1]
        jumps = noise % 10 == 0
        jumps[0] = True
        since = np.maximum.accumulate(np.where(jumps, place, 0))                        # where each token's run began
        firsts = (mix(noise) % self.vocab_size).astype(np.int64)
        return (firsts[since] + (place - since) * self._step) % self.vocab_size

    def full_pass(self) -> int:
        return self._pass_size

    def in_order(self, i: int) -> np.ndarray:
        assert 0 <= i < self._pass_size, f"{i} of {self._pass_size}"
        return self.sample(i)

    def describe(self) -> str:
        return (f"{self.which}: mock data, any number of samples of {self.sequence_length:,} tokens "
                f"from {self.vocab_size:,} ids")


@dataclass(frozen=True)
class Reading:
    """How the datasets of a split are read.
    `count`: samples the run asks for, which Megatron's order (`megatron`) depends on."""

    sequence_length: int
    seed: int
    shuffle: bool
    megatron: bool = False
    count: int = 0


def open_split(
    paths: Sequence[str], split: str | None, which: str, sequence_length: int, seed: int, shuffle: bool,
    vocab_size: int | None = None, flag: str = "--data-path", tokenizer: Mapping[str, Any] | None = None,
) -> Samples:
    """The samples of one split ("train", "valid" or "test") of the datasets that the words of `flag` name,
    as `open_stages`."""
    return open_stages([(0, paths)], split, which, Reading(sequence_length, seed, shuffle), vocab_size, flag, tokenizer)


def open_stages(
    stages: Sequence[tuple[int, Sequence[str]]], split: str | None, which: str, reading: Reading,
    vocab_size: int | None = None, flag: str = "--data-path", tokenizer: Mapping[str, Any] | None = None,
) -> Samples:
    """The samples of one split of datasets whose blend changes: (first sample, words of `flag`) of each stage.

    `split` is Megatron's "969,30,1"; None takes each dataset whole. Without weights, datasets count by their tokens.
    With a `vocab_size` (ids the model knows) a dataset with others is refused: at once when its sidecar tells, else
    when one is read. With a `tokenizer` (its identity) a dataset whose sidecar names another is refused.
    Raises UserError.
    """
    assert which in SPLITS, which
    named = [(first, *parse_paths(words, flag)) for first, words in stages]
    prefixes = named[0][1] if len(named) == 1 else list(dict.fromkeys(p for _, own, _ in named for p in own))
    counts = _counts(named[0][2], len(prefixes), reading, split is not None)
    with naming(flag):
        known = [check_sidecar(prefix, vocab_size, tokenizer) for prefix in prefixes]
        parts = [_open_part(*one, split, which, reading) for one in zip(prefixes, known, counts, strict=True)]
    if reading.megatron:
        return Samples(which, parts, _megatron_blend(named[0][2], parts, reading), vocab_size)
    blends = [Blend(weights or [parts[prefixes.index(p)].count for p in own]) for _, own, weights in named]
    if len(blends) == 1:
        return Samples(which, parts, blends[0], vocab_size)
    numbers = [tuple(prefixes.index(p) for p in own) for _, own, _ in named]
    return Samples(which, parts,
                   BlendSchedule([BlendStage(*s) for s in zip((n[0] for n in named), blends, numbers, strict=True)]),
                   vocab_size)


def _counts(weights: Sequence[float] | None, datasets: int, reading: Reading, cut: bool) -> list[int | None]:
    """Samples that Megatron's order of each dataset is built for; None is one epoch. No other order depends on it."""
    if not reading.megatron:
        return [None] * datasets
    if weights is not None and (datasets > 1 or cut):        # one dataset with a weight is a blend to --data-path alone
        return list(blend_counts(weights, reading.count)[1])
    return [reading.count] if datasets == 1 else [None] * datasets


def _megatron_blend(weights: Sequence[float] | None, parts: Sequence[DatasetPart], reading: Reading) -> Mixture:
    if len(parts) == 1:
        return Blend([1])
    if weights is not None:
        return MegatronBlend(weights, sum(blend_counts(weights, reading.count)[0]))
    lengths = [part.order.samples for part in parts if isinstance(part.order, MegatronOrder)]
    if sum(lengths) < reading.count:
        raise UserError(f"--sample-order megatron: datasets without weights are read once and hold {sum(lengths):,} "
                        f"samples, the run asks for {reading.count:,}; give weights, or shorten the run.")
    return MegatronBlend(lengths, reading.count)


def parse_paths(words: Sequence[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """(prefixes, weights or None) from `PREFIX ...` or `WEIGHT PREFIX ...`. Raises UserError."""
    if not words:
        raise UserError(f"{flag} is empty: name a dataset by its path without .bin or .idx.")
    numbers = [_number(word) for word in words[::2]]
    if all(number is None for number in numbers):
        if behind := next((word for word in words[1::2] if _number(word) is not None), None):
            raise UserError(f"{flag} {' '.join(words)}: a weight stands before its dataset, as `0.3 A 0.7 B`, and "
                            f"{behind} stands behind one.")
        return list(words), None
    if len(words) % 2 or None in numbers:
        raise UserError(f"{flag} {' '.join(words)}: give a weight before every dataset, or before none.")
    weights = [number for number in numbers if number is not None]
    wrong = [weight for weight in weights if not 0 < weight < 1e100]
    if wrong:
        raise UserError(f"{flag}: the weight {wrong[0]:g} is not a positive number that adds up; "
                        "leave out a dataset that is not to be read.")
    if len(weights) > DENOMINATOR:
        raise UserError(f"{flag}: names {len(weights)} datasets, a blend takes at most {DENOMINATOR}; "
                        "merge some of them.")
    return list(words[1::2]), weights


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _open_part(
    prefix: str, sidecar: Mapping[str, Any] | None, count: int | None, split: str | None, which: str, reading: Reading
) -> DatasetPart:
    dataset, s = IndexedDataset(prefix), reading.sequence_length
    if dataset.dtype.kind not in "iu":
        raise UserError(f"{prefix}.idx: holds {dataset.dtype} numbers, expected whole ones; "
                        "this is no dataset of tokens.")
    wrong = list(miscounts(dataset, sidecar)) if sidecar is not None else []
    if wrong:
        raise UserError(*wrong)
    documents, first, last = _split_of(dataset, split, which, reading.megatron)
    if last - first <= s:
        asked = f"--split {split} gives {which}" if split else f"{which} has"
        instead = "" if which == "train" else ", or write --eval-iters 0"
        raise UserError(f"{prefix}: {asked} {last - first} of its {dataset.token_count} tokens ({documents} of "
                        f"{dataset.document_count} documents), one sample needs {s + 1}; give it a larger share, "
                        f"more data or a smaller --seq-length{instead}.")
    order: Order = ChunkOrder(last - first, s, reading.seed, reading.shuffle)
    if reading.megatron:
        order = MegatronOrder(dataset.sequence_lengths(*_sequences(dataset, split, which)), s, reading.seed, count)
    return DatasetPart(dataset, documents, first, last - first, order,
                ChunkOrder(last - first, s, reading.seed, shuffle=False), sidecar is not None)


def _split_of(dataset: IndexedDataset, split: str | None, which: str, megatron: bool) -> tuple[int, int, int]:
    """(documents, first token, end token): a range of documents, or of tokens when there is only one document.
    Megatron cuts between sequences."""
    if split is None:
        return dataset.document_count, 0, dataset.token_count
    if megatron:
        first, last = _sequences(dataset, split, which)
        return last - first, dataset.sequence_start(first), dataset.sequence_start(last)
    if dataset.document_count == 1:
        return 0, *split_ranges(split, dataset.token_count)[which]
    first, last = split_ranges(split, dataset.document_count)[which]
    return last - first, dataset.document_token_boundaries(first), dataset.document_token_boundaries(last)


def _sequences(dataset: IndexedDataset, split: str | None, which: str) -> tuple[int, int]:
    return split_ranges(split, dataset.sequence_count)[which] if split else (0, dataset.sequence_count)
