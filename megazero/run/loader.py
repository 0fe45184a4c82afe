"""Micro-batches from samples, read ahead: while one step runs, a thread reads the next one's tokens.

It fetches by number and holds no position, so nothing of it needs saving. On CUDA what it reads is pinned, and copies
run beside the device's work.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

Tensor = torch.Tensor


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


def positions_of(tokens: Tensor, eod: int) -> Tensor:
    """[b, s] -> each token's place in its document [b, s];
    a document that began in an earlier sample counts from this one's start."""
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(tokens[:, :-1] == eod, place[1:], 0)
    return place - begins.cummax(-1).values
