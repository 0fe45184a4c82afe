"""Megatron-LM's own order of samples (its GPTDataset and BlendedDataset), so that a run can move over with its data.

Unlike order.py's, this order depends on how many samples the run asks for, and every rank builds it in memory: 20 bytes
for each sequence and epoch, 8 for each sample, 10 more where datasets are blended. Nothing is written.

    epochs       as few as hold N samples and one token more
    documents    the split's sequences, once per epoch, shuffled together; the last epoch by itself when it gives less
                 than four fifths of its samples
    samples      sample j: tokens j S .. j S + S of the documents in that order
    shuffle      sample k of the run: j = shuffle[k]; where the last epoch is apart, its samples are shuffled apart, too

One RandomState(seed) draws all of it, in this order. Described from the file formats and checked against samples that
Megatron-Core 0.16.1 served; written anew.
"""

import math
from collections.abc import Sequence

import numpy as np

from megazero.base import UserError

SURPLUS = 0.005                 # more samples than its share that a dataset of a blend is built for: it moves the order


class MegatronOrder:
    """The samples of one dataset: `count` are asked for, None means one epoch."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int, count: int | None) -> None:
        """`lengths` [n] of the split's sequences, which lie back to back."""
        self.sequence_length, self.seed = sequence_length, seed
        lengths = lengths.astype(np.int64)
        self.tokens = int(lengths.sum())
        s, t = sequence_length, self.tokens
        assert t > s, f"{t} tokens hold no sample of {s} + 1"
        self.epochs = 1 if count is None else max(1, -(-(count * s + 1) // t))
        self.samples = (self.epochs * t - 1) // s
        earlier = ((self.epochs - 1) * t - 1) // s if self.epochs > 1 else 0            # samples before the last epoch
        apart = self.epochs > 1 and count is not None and count - earlier < int(0.80 * ((t - 1) // s))
        random = np.random.RandomState(seed)
        parts = [self.epochs - 1, 1] if apart else [self.epochs]
        documents = np.concatenate([_shuffled(random, np.tile(np.arange(len(lengths), dtype=np.int32), n))
                                    for n in parts])
        bounds = [0, earlier, self.samples] if apart else [0, self.samples]
        self._shuffle = np.concatenate([_shuffled(random, np.arange(a, b))
                                        for a, b in zip(bounds, bounds[1:], strict=False)])
        self._ends = np.cumsum(lengths[documents])                                      # of each document in that order
        self._starts = (np.cumsum(lengths) - lengths)[documents]                        # of each in the split's tokens

    def ranges(self, k: int) -> list[tuple[int, int]]:
        """Where the S + 1 tokens of sample k are in the split's tokens, piece by piece.
        Raises UserError beyond the last sample."""
        if k >= self.samples:
            raise UserError(f"--sample-order megatron: sample {k} was asked for, this run's order has "
                            f"{self.samples:,}; keep the length and the batch size that the run began with.")
        at = int(self._shuffle[k]) * self.sequence_length
        end, found = at + self.sequence_length + 1, []
        i = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            upto = min(end, int(self._ends[i]))
            if upto > at:                                                               # some sequences are empty
                start = int(self._starts[i]) + at - (int(self._ends[i - 1]) if i else 0)
                found.append((start, start + upto - at))
            at, i = upto, i + 1
        return found

    def describe(self) -> str:
        return (f"{self.samples:,} samples of {self.sequence_length:,} tokens in "
                f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}, in Megatron's order of seed {self.seed}")


def _shuffled(random: np.random.RandomState, values: np.ndarray) -> np.ndarray:
    random.shuffle(values)
    return values


def blend_counts(weights: Sequence[float], count: int) -> tuple[list[int], list[int]]:
    """(samples that each dataset of a blend of `count` gives, samples that its order is built for)."""
    wanted = [math.ceil(count * weight) for weight in _normal(weights)]
    return wanted, [math.ceil(n * (1 + SURPLUS)) for n in wanted]


def _normal(weights: Sequence[float]) -> list[float]:
    return (np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))).tolist()


class MegatronBlend:
    """Which dataset gives sample k: always the one that is furthest behind its weight.
    Made as far as it is asked for."""

    def __init__(self, weights: Sequence[float], size: int) -> None:
        self.size = size
        self._weights = np.array(_normal(_normal(weights)))        # Megatron does it twice, which can move the last bit
        self._taken = np.zeros(len(weights))
        self._dataset, self._own, self._made = np.empty(size, np.int16), np.empty(size, np.int64), 0

    def locate(self, k: int) -> tuple[int, int]:
        """(dataset, its own sample) of sample k. Raises UserError beyond the samples that there are."""
        if k >= self.size:
            raise UserError(f"--sample-order megatron: sample {k} was asked for, the blend has {self.size:,}; "
                            "shorten the run, or give the datasets weights.")
        for i in range(self._made, k + 1):
            dataset = int(np.argmax(self._weights * max(i, 1) - self._taken))
            self._dataset[i], self._own[i] = dataset, self._taken[dataset]
            self._taken[dataset] += 1
        self._made = max(self._made, k + 1)
        return int(self._dataset[k]), int(self._own[k])

    def describe(self, names: Sequence[str]) -> str:
        shares = ", ".join(f"{weight:.4g} {name}" for weight, name in zip(self._weights, names, strict=True))
        return f"{len(names)} datasets, blended in Megatron's order: {shares}"
