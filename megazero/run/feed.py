"""Who gets which tokens: the samples of a run, and one rank's part of them as micro-batches.

Samples are read ahead: while one step runs, a thread reads the next one's tokens. It fetches by number and holds no
position, so nothing of it needs saving. On CUDA what it reads is pinned, and copies run beside the device's work.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from megazero.data import SampleSource, Tokenizer, evaluated, samples
from megazero.model import Batch
from megazero.plan import Plan
from megazero.run.run import Run

Tensor = torch.Tensor


class Splits(NamedTuple):
    """The samples of a run. Each split has files of its own: two threads read them."""

    train: SampleSource
    valid: Mapping[str, SampleSource]           # by the name of its loss; no evaluation: none
    test: Mapping[str, SampleSource]

    def describe(self) -> list[str]:
        named = [("data", self.train), *(("validation", s) for s in self.valid.values()),
                 *(("test", s) for s in self.test.values())]
        return [f"{what:<12}{split.describe()}" for what, split in named]


    def identity(self) -> str:
        """The data it trains on, told in a line that other data do not have: how much there is, and how it begins."""
        begins = zlib.crc32(self.train.in_order(0).tobytes()) if self.train.full_pass() else 0
        return f"{' '.join(self.train.describe().split())}, beginning with {begins:08x}"


def open_splits(plan: Plan, tokenizer: Tokenizer | None) -> Splits:
    """Opens what the run will read. Raises UserError."""
    c = plan.config
    return Splits(samples(plan, "train", tokenizer),
                  evaluated(plan, "valid", tokenizer) if c.training.eval_iters else {},
                  evaluated(plan, "test", tokenizer) if c.data.test_data_path else {})


class Feed:
    """One rank's part of the samples."""

    def __init__(self, run: Run, splits: Splits, tokenizer: Tokenizer | None) -> None:
        self.plan, self.place, self.device, self.wide = run.plan, run.wires.place, run.device, run.gate.wide
        self.splits = splits
        # ends a document; -1 is no token, and flags that need one are refused without it
        self.eod = -1 if tokenizer is None or tokenizer.eod is None else tokenizer.eod
        self.loader = Loader(splits.train.sample, pin=run.device.type == "cuda")

    def batches(self, step: int, first: int) -> list[Batch]:
        """This rank's micro-batches of a step, whose samples start at number `first`;
        those of the next step are read meanwhile."""
        p = self.plan
        now, then = (numbers(start, p.micro_batch, p.micro_batches_of(p.batch_at(start)), p.dp, self.place.dp)
                     for start in (first, first + p.batch_at(first)))
        return [self.batch(own, mine, step) for own, mine in zip(self.loader.take(now, then), now, strict=True)]

    def evaluation(self, split: SampleSource) -> Iterator[Batch]:
        """This rank's micro-batches of the first samples of a split, or of all in file order: the same ones each time.
        Where no sample is left for it the mask is 0: its peers need it to gather weights."""
        t, size = self.plan.config.training, self.plan.micro_batch
        count = split.full_pass() if t.full_validation else t.eval_iters * self.plan.global_batch
        sample = split.in_order if t.full_validation else split.sample
        for first in range(0, count, self.plan.dp * size):
            low = first + self.place.dp * size
            own = range(low, min(low + size, count)) or range(1)
            batch = self.batch(read(sample, own), own, None)
            yield batch if low < count else replace(batch, mask=torch.zeros_like(batch.mask))

    def batch(self, tokens: Tensor, own: range, step: int | None) -> Batch:
        """One micro-batch of tokens [b, s + 1] of the samples of these numbers.
        Without a step it is for evaluation: nothing is dropped."""
        d, on_cuda = self.plan.config.data, self.device.type == "cuda"
        bounds = bounds_of(tokens[:, :-1], self.eod).pin_memory() if on_cuda and d.reset_attention_mask else None
        tokens = tokens.to(self.device, non_blocking=True)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        mask = torch.ones(x.shape, dtype=self.wide, device=self.device)
        if d.eod_mask_loss:
            mask = mask.masked_fill(x == self.eod, 0)
        places = positions_of(x, self.eod) if d.reset_position_ids else None
        documents = documents_of(x, self.eod) if d.reset_attention_mask else None
        return Batch(x, y, mask, torch.arange(own.start, own.stop, device=self.device), step, places, documents,
                     None if bounds is None else bounds.to(self.device, non_blocking=True))


def numbers(first: int, size: int, count: int, dp: int, rank: int) -> list[range]:
    """The samples of the `count` micro-batches of `size` that data-parallel rank `rank` of `dp` takes in the step that
    starts at sample `first`: ranks take turns."""
    starts = [first + (m * dp + rank) * size for m in range(count)]
    return [range(start, start + size) for start in starts]


class Loader:
    """Reads micro-batches by the numbers of their samples."""

    def __init__(self, sample: Callable[[int], np.ndarray], pin: bool) -> None:
        """`sample`: number -> tokens [S + 1]. `pin`: into pinned memory."""
        self._sample, self._pin = sample, pin
        self._thread = ThreadPoolExecutor(1, "loader")
        self._ahead: tuple[list[range], Future[list[Tensor]]] | None = None

    def take(self, numbers: Sequence[range], then: Sequence[range]) -> list[Tensor]:
        """The tokens of these micro-batches, int64 [b, S + 1] each; those of `then` are read while the caller works on.
        Raises what reading raises."""
        now, after = list(numbers), list(then)
        if self._ahead is None or self._ahead[0] != now:
            self._ahead = now, self._thread.submit(self._read, now)
        tokens = self._ahead[1].result()
        self._ahead = after, self._thread.submit(self._read, after)
        return tokens

    def _read(self, numbers: Sequence[range]) -> list[Tensor]:
        tokens = [read(self._sample, mine) for mine in numbers]
        return [own.pin_memory() for own in tokens] if self._pin else tokens

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def read(sample: Callable[[int], np.ndarray], numbers: range) -> Tensor:
    """The tokens of the samples of these numbers, int64 [b, S + 1]."""
    return torch.from_numpy(np.stack([sample(k) for k in numbers]))


def documents_of(tokens: Tensor, eod: int) -> Tensor:
    """[b, s] -> the number of each token's document within its sample [b, s];
    an end of document belongs to the one it ends."""
    ends = (tokens == eod).long()
    return ends.cumsum(-1) - ends


def bounds_of(tokens: Tensor, eod: int) -> Tensor:
    """[b, s] -> where documents begin among the b s tokens, and their end, int32. To be asked on the host: how many
    there are is not known to a device."""
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eod
    return torch.cat((begins.flatten().nonzero()[:, 0], torch.tensor([tokens.numel()]))).int()


def positions_of(tokens: Tensor, eod: int) -> Tensor:
    """[b, s] -> each token's place in its document [b, s];
    a document that began in an earlier sample counts from this one's start."""
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(tokens[:, :-1] == eod, place[1:], 0)
    return place - begins.cummax(-1).values
