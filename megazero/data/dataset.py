"""Samples for training and evaluation: memory-mapped tokens in the order of order.py.

    samples = open_split(["0.7", "books_text_document", "0.3", "code_text_document"], "969,30,1", "train",
                         sequence_length=1024, seed=1234, shuffle=True)
    samples.sample(k)          # int64 [S + 1], a pure function of k: inputs are [:-1], targets [1:]

Every rank reads its own samples from the map; the whole state of a loader is the number of samples consumed.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from megazero.data.indexed import IndexedDataset
from megazero.data.order import DENOMINATOR, MASK, SPLITS, Blend, ChunkOrder, mix, split_ranges, stable_hash
from megazero.data.sidecar import check_sidecar
from megazero.errors import UserError


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


@dataclass(frozen=True)
class Part:
    """One dataset's share of a split."""

    prefix: str
    documents: int              # 0 when the split is a range of tokens of the only document
    tokens: np.ndarray          # this split's range of the .bin, a view of the memory map [T]
    order: ChunkOrder
    in_file_order: ChunkOrder
    has_sidecar: bool


class Samples:
    """The samples of one split of one dataset or of a blend of several. Opening is cheap: nothing is scanned or built."""

    def __init__(self, which: str, parts: Sequence[Part], weights: Sequence[float] | None, vocab_size: int | None) -> None:
        """Without weights each dataset counts by its tokens in this split."""
        self.which, self.parts, self.vocab_size = which, tuple(parts), vocab_size
        self.sequence_length = parts[0].order.sequence_length
        self.weighted = weights is not None
        self.blend = Blend(weights or [len(part.tokens) for part in parts])
        self._ends = list(accumulate(part.in_file_order.chunks(0) for part in parts))

    def sample(self, k: int) -> np.ndarray:
        assert k >= 0, k
        dataset, own = self.blend.locate(k)
        part = self.parts[dataset]
        return self._read(part, part.order.start(own), f"sample {k}")

    def full_pass(self) -> int:
        return self._ends[-1]

    def in_order(self, i: int) -> np.ndarray:
        assert 0 <= i < self.full_pass(), f"{i} of {self.full_pass()}"
        dataset = bisect_right(self._ends, i)
        part = self.parts[dataset]
        before = self._ends[dataset - 1] if dataset else 0
        return self._read(part, part.in_file_order.start(i - before), f"sample {i} in file order")

    @property
    def token_count(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every chunk of the first epoch of every dataset has been served; exact for a single dataset."""
        return max(-(-part.order.chunks(0) * self.blend.period // share)
                   for part, share in zip(self.parts, self.blend.shares, strict=True))

    def describe(self) -> str:
        lines = [self._describe(part, share) for part, share in zip(self.parts, self.blend.shares, strict=True)]
        if len(self.parts) > 1:
            by = "weight" if self.weighted else "tokens"
            lines.append(f"{self.which}: {len(self.parts)} datasets, {self.token_count:,} tokens, "
                         f"blended by {by} in shares of 1/{self.blend.period:,}")
        return "\n".join(lines)

    def _describe(self, part: Part, share: int) -> str:
        head, tail = part.order.dropped(0)
        size = f"{part.documents:,} documents" if part.documents else "part of one document"
        order = f"shuffled by seed {part.order.seed}" if part.order.shuffle else "in file order"
        return (f"{self.which}: {part.prefix}: {size}, {len(part.tokens):,} tokens, {part.order.chunks(0):,} samples of "
                f"{self.sequence_length:,} tokens an epoch, {order}; the first epoch leaves out {head} tokens at the head and "
                f"{tail} at the tail" + (f"; share {share}/{self.blend.period}" if len(self.parts) > 1 else "")
                + ("" if part.has_sidecar else "; no sidecar, so its tokenizer is not known"))

    def _read(self, part: Part, start: int, name: str) -> np.ndarray:
        tokens = part.tokens[start:start + self.sequence_length + 1].astype(np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            raise UserError(f"{part.prefix}: {name} of {self.which} holds token {low if low < 0 else high}, expected 0 to "
                            f"{(self.vocab_size or 0) - 1}; train with the tokenizer the dataset was made with.")
        return tokens


class MockSamples:
    """Made-up tokens with something to learn (--mock-data), the same on every machine.

    Nine times in ten a token is followed by token + step (mod vocabulary), else by any token at all; so the best loss per
    token is about 0.33 + 0.1 ln(vocabulary).
    """

    def __init__(self, vocab_size: int, sequence_length: int, seed: int, which: str = "train", pass_size: int = 256) -> None:
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
        return f"{self.which}: mock data, any number of samples of {self.sequence_length:,} tokens from {self.vocab_size:,} ids"


def open_split(
    paths: Sequence[str], split: str | None, which: str, sequence_length: int, seed: int, shuffle: bool,
    vocab_size: int | None = None, flag: str = "--data-path", tokenizer: Mapping[str, Any] | None = None,
) -> Samples:
    """The samples of one split ("train", "valid" or "test") of the datasets that the words of `flag` name.

    `split` is Megatron's "969,30,1"; None takes each dataset whole. Without weights, datasets count by their tokens. With a
    `vocab_size` (ids the model knows) a dataset with others is refused: at once when its sidecar tells, else when one is read.
    With a `tokenizer` (its identity) a dataset whose sidecar names another is refused.
    Raises UserError.
    """
    assert which in SPLITS, which
    prefixes, weights = parse_paths(paths, flag)
    known = [check_sidecar(prefix, vocab_size, tokenizer) for prefix in prefixes]
    parts = [_open_part(prefix, split, which, sequence_length, seed, shuffle, told) for prefix, told in zip(prefixes, known, strict=True)]
    return Samples(which, parts, weights, vocab_size)


def parse_paths(words: Sequence[str], flag: str = "--data-path") -> tuple[list[str], list[float] | None]:
    """(prefixes, weights or None) from `PREFIX ...` or `WEIGHT PREFIX ...`. Raises UserError."""
    if not words:
        raise UserError(f"{flag} is empty: name a dataset by its path without .bin or .idx.")
    numbers = [_number(word) for word in words[::2]]
    if all(number is None for number in numbers):
        return list(words), None
    if len(words) % 2 or None in numbers:
        raise UserError(f"{flag} {' '.join(words)}: give a weight before every dataset, or before none.")
    weights = [number for number in numbers if number is not None]
    wrong = [weight for weight in weights if not 0 < weight < float("inf")]
    if wrong:
        raise UserError(f"{flag}: the weight {wrong[0]:g} is not a positive number; leave out a dataset that is not to be read.")
    if len(weights) > DENOMINATOR:
        raise UserError(f"{flag}: names {len(weights)} datasets, a blend takes at most {DENOMINATOR}; merge some of them.")
    return list(words[1::2]), weights


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _open_part(prefix: str, split: str | None, which: str, sequence_length: int, seed: int, shuffle: bool, has_sidecar: bool) -> Part:
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind not in "iu":
        raise UserError(f"{prefix}.idx: holds {dataset.dtype} numbers, expected whole ones; this is no dataset of tokens.")
    documents, first, last = _split_of(dataset, split, which)
    if last - first <= sequence_length:
        asked = f"--split {split} gives {which}" if split else f"{which} has"
        raise UserError(f"{prefix}: {asked} {last - first} of its {dataset.token_count} tokens ({documents} of "
                        f"{dataset.document_count} documents), one sample needs {sequence_length + 1}; give it a larger share, "
                        "more data or a smaller --seq-length.")
    tokens = np.asarray(dataset.tokens[first:last])
    return Part(prefix, documents, tokens, ChunkOrder(len(tokens), sequence_length, seed, shuffle),
                ChunkOrder(len(tokens), sequence_length, seed, shuffle=False), has_sidecar)


def _split_of(dataset: IndexedDataset, split: str | None, which: str) -> tuple[int, int, int]:
    """(documents, first token, end token): a range of documents, or of tokens when there is only one document."""
    if split is None:
        return dataset.document_count, 0, dataset.token_count
    if dataset.document_count == 1:
        return 0, *split_ranges(split, dataset.token_count)[which]
    first, last = split_ranges(split, dataset.document_count)[which]
    return last - first, dataset.document_token_boundaries(first), dataset.document_token_boundaries(last)
