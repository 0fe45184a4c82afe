"""Which tokens sample k is: pure functions, no index files, no building step, the same for any layout and batch size.

    sample k of the run --Blend--> (dataset, its own sample j) --ChunkOrder--> (epoch e, place i) --permute--> chunk c

    the tokens of a split, S = 4, shift 2, three chunks of S + 1 tokens, each sharing its last one with the next:

        . . 0 1 2 3 0 1 2 3 0 1 2 3 + .        head . . and tail . are left out of this epoch;
                                               + is the last chunk's last token

The grid shifts from epoch to epoch, so windows differ and no token is always left out. Nothing here depends on how long
the run is, so a longer run starts with the same samples.
"""

import bisect
import hashlib
import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

from megazero.base import UserError

Index = TypeVar("Index", int, np.ndarray)

MASK = (1 << 64) - 1
ROUNDS = 8
DENOMINATOR = 126_000   # 2^4 3^2 5^3 7: halves, thirds, sevenths, percents and their tenths are exact shares of a blend
SPLITS = ("train", "valid", "test")
KEPT = 4096             # hashes: the datasets of a blend take turns


@lru_cache(maxsize=KEPT, typed=True)
def stable_hash(*parts: int | str) -> int:
    """64 bits that are the same on every machine and in every version."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def mix(x: Index) -> Index:
    """The finaliser of SplitMix64: 64 bits in, 64 well-stirred bits out, for an int or a uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def permute(index: Index, size: int, key: int) -> Index:
    """Where a keyed permutation of 0..size-1 sends `index` (an int, or an array of any shape as uint64).

    A Feistel network over the smallest nearly square grid that covers `size`: what falls outside walks on along its own
    cycle until it is inside again, which keeps the map one to one.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(key)
    if isinstance(index, np.ndarray):
        out = _feistel(index.astype(np.uint64), rows, columns, keys)
        while (outside := out >= size).any():
            out[outside] = _feistel(out[outside], rows, columns, keys)
        return out
    assert 0 <= index < size, f"{index} is not in 0..{size - 1}"
    out = _feistel(index, rows, columns, keys)
    while out >= size:
        out = _feistel(out, rows, columns, keys)
    return out


@lru_cache(maxsize=KEPT)
def _round_keys(key: int) -> list[int]:
    return [mix(key + r * 0x9E3779B97F4A7C15 & MASK) for r in range(1, ROUNDS + 1)]


def _feistel(x: Index, rows: int, columns: int, keys: Sequence[int]) -> Index:
    row, column = x // columns, x % columns
    for for_row, for_column in zip(keys[::2], keys[1::2], strict=True):
        row = (row + mix(column ^ for_row) % rows) % rows
        column = (column + mix(row ^ for_column) % columns) % columns
    return row * columns + column


def epoch_shift(seed: int, epoch: int, tokens: int, sequence_length: int) -> int:
    """Tokens left out at the head in this epoch: fewer than S, and never so many that no chunk is left."""
    return stable_hash("shift", seed, epoch) % min(sequence_length, tokens - sequence_length)


@dataclass(frozen=True)
class ChunkOrder:
    """The order of the samples of one token range: every full chunk once per epoch.

    Without shuffle sample k is tokens k*S .. k*S+S, and begins again at the front when the range is exhausted.
    """

    tokens: int
    sequence_length: int
    seed: int
    shuffle: bool
    # first sample of each epoch met so far
    _starts: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.tokens > self.sequence_length > 0, (
            f"{self.tokens} tokens hold no sample of {self.sequence_length} + 1")

    def shift(self, epoch: int) -> int:
        """The first token of this epoch's grid."""
        return epoch_shift(self.seed, epoch, self.tokens, self.sequence_length) if self.shuffle else 0

    def chunks(self, epoch: int) -> int:
        """Samples in this epoch; two epochs differ by one at most."""
        return (self.tokens - 1 - self.shift(epoch)) // self.sequence_length

    def dropped(self, epoch: int) -> tuple[int, int]:
        """Tokens left out at the (head, tail) in this epoch, fewer than S each."""
        head = self.shift(epoch)
        return head, self.tokens - 1 - head - self.chunks(epoch) * self.sequence_length

    def locate(self, k: int) -> tuple[int, int]:
        """(epoch, place within it) of sample k."""
        while self._starts[-1] <= k:
            self._starts.append(self._starts[-1] + self.chunks(len(self._starts) - 1))
        epoch = bisect.bisect_right(self._starts, k) - 1
        return epoch, k - self._starts[epoch]

    def ranges(self, k: int) -> list[tuple[int, int]]:
        """Where the S + 1 tokens of sample k are."""
        start = self.start(k)
        return [(start, start + self.sequence_length + 1)]

    def describe(self) -> str:
        (head, tail), how = self.dropped(0), f"shuffled by seed {self.seed}" if self.shuffle else "in file order"
        return (f"{self.chunks(0):,} samples of {self.sequence_length:,} tokens an epoch, {how}; "
                f"the first epoch leaves out {head} tokens at the head and {tail} at the tail")

    def start(self, k: int) -> int:
        """The first token of sample k, which covers start .. start + S."""
        epoch, place = self.locate(k)
        if self.shuffle:
            place = permute(place, self.chunks(epoch), stable_hash("order", self.seed, epoch))
        return self.shift(epoch) + place * self.sequence_length


class Blend:
    """Which dataset serves sample k, and which of its own samples that is.

    Weights become whole shares of DENOMINATOR (at least one each). At every prefix of the run each dataset is less than
    one sample away from its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = round_weights(weights)                     # samples of each dataset in one period
        self.period = sum(self.shares)

    @cached_property
    def table(self) -> np.ndarray:
        """The dataset of each sample of one period [period]."""
        return chairman(self.shares)

    @cached_property
    def _earlier(self) -> np.ndarray:
        """How often a sample's dataset was served before in the period [period]."""
        by_dataset = np.argsort(self.table, kind="stable")
        firsts = np.cumsum([0, *self.shares[:-1]])
        earlier = np.empty(self.period, np.int64)
        earlier[by_dataset] = np.arange(self.period) - np.repeat(firsts, self.shares)
        return earlier

    def locate(self, k: int) -> tuple[int, int]:
        """(dataset, its own sample) of sample k."""
        periods, at = divmod(k, self.period)
        dataset = int(self.table[at])
        return dataset, periods * self.shares[dataset] + int(self._earlier[at])

    def counts(self, k: int) -> list[int]:
        """How many of its samples each dataset has given before sample k [datasets]."""
        periods, at = divmod(k, self.period)
        rest = np.bincount(self.table[:at], minlength=len(self.shares)) if at else [0] * len(self.shares)
        return [periods * share + int(n) for share, n in zip(self.shares, rest, strict=True)]

    def describe(self, names: Sequence[str]) -> str:
        shares = ", ".join(f"{share} {name}" for share, name in zip(self.shares, names, strict=True))
        return f"{len(names)} datasets, blended in shares of 1/{self.period:,}: {shares}"


@dataclass(frozen=True)
class BlendStage:
    """A blend from sample `first` of the run on.
    `datasets`: the number that each dataset of the blend has among all."""

    first: int
    blend: Blend
    datasets: tuple[int, ...]


class BlendSchedule:
    """Blends that follow one another. A dataset goes on with its own samples where the stage before left it, so a later
    stage changes nothing before it and repeats nothing."""

    def __init__(self, stages: Sequence[BlendStage]) -> None:
        """The first stage begins at sample 0, each later one after the one before."""
        assert stages[0].first == 0 and all(a.first < b.first for a, b in zip(stages, stages[1:], strict=False))
        self.stages = tuple(stages)
        given = [0] * (1 + max(d for stage in stages for d in stage.datasets))
        self._before = [tuple(given)]                           # own samples of each dataset, before each stage
        for stage, after in zip(stages, stages[1:], strict=False):
            for dataset, n in zip(stage.datasets, stage.blend.counts(after.first - stage.first), strict=True):
                given[dataset] += n
            self._before.append(tuple(given))

    def locate(self, k: int) -> tuple[int, int]:
        """(dataset, its own sample) of sample k."""
        at = bisect.bisect_right([stage.first for stage in self.stages], k) - 1
        stage = self.stages[at]
        local, own = stage.blend.locate(k - stage.first)
        dataset = stage.datasets[local]
        return dataset, self._before[at][dataset] + own

    def describe(self, names: Sequence[str]) -> str:
        return "; ".join(f"from sample {s.first:,} on {s.blend.describe([names[d] for d in s.datasets])}"
                         for s in self.stages)


def round_weights(weights: Sequence[float]) -> list[int]:
    """Whole shares (at least one each) in proportion to positive weights, over DENOMINATOR and then in lowest terms."""
    assert len(weights) <= DENOMINATOR and all(w > 0 and math.isfinite(w) for w in weights), weights
    exact = np.asarray(weights, np.float64) / math.fsum(weights) * DENOMINATOR
    shares = np.maximum(1, np.rint(exact).astype(np.int64))
    while (missing := DENOMINATOR - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        may_give = np.flatnonzero(shares + step > 0)
        most_wronged = may_give[np.argsort((shares - exact)[may_give] * step, kind="stable")]
        shares[most_wronged[:abs(missing)]] += step
    return [int(s) for s in shares // np.gcd.reduce(shares)]


def chairman(shares: Sequence[int]) -> np.ndarray:
    """An order of sum(shares) turns, shares[i] of them for i, less than one turn away from proportion at every prefix.

    Tijdeman's chairman assignment (Discrete Mathematics 32, 1980), q = 2n - 2: turn m of i may come from when i's share
    of the turns has reached m - 1 + 1/q, and must come once it passes m - 1/q;
    the most urgent of those that may come is next.
    """
    count, period = len(shares), sum(shares)
    q = max(1, 2 * count - 2)
    owner = np.repeat(np.arange(count), shares)
    share = np.repeat(np.asarray(shares, np.int64), shares)
    m = np.concatenate([np.arange(1, s + 1) for s in shares])
    release = -((-((m - 1) * q + 1) * period) // (share * q))                # rounded up
    urgency = (m * q - 1) * period // (share * q) * count + owner            # deadline first, then the dataset's place
    by_release = np.argsort(release, kind="stable")
    releases, urgencies = release[by_release].tolist(), urgency[by_release].tolist()
    table, upto = np.empty(period, np.uint32), 0
    ready: list[int] = []
    for turn in range(1, period + 1):
        while upto < period and releases[upto] <= turn:
            heapq.heappush(ready, urgencies[upto])
            upto += 1
        table[turn - 1] = heapq.heappop(ready) % count
    return table


def split_ranges(spec: str, count: int) -> dict[str, tuple[int, int]]:
    """The range of documents (or of tokens) of each split: Megatron's "969,30,1" of `count` of them.
    Raises UserError."""
    words = [word for word in re.split(r"[,/\s]+", spec.strip()) if word]
    try:
        parts = [float(word) for word in words]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not 0 < sum(parts) < math.inf:
        raise UserError(f"--split {spec}: must be one to three numbers, train,valid,test, not all zero, "
                        "such as 969,30,1.")
    shares = np.array(parts + [0.0] * (3 - len(parts))) / sum(parts)
    ends = [0, *(round(float(end) * count) for end in np.cumsum(shares))]
    return {name: (ends[i], ends[i + 1]) for i, name in enumerate(SPLITS)}
