"""Random numbers as a pure function of what they are for: any box of a tensor equals that box of the whole.

A weight's element i is drawn from word i of numpy's Philox stream (counter-based: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) keyed by hash(seed, name); the two halves of a 64-bit word are the two uniforms
of one Box-Muller draw in float64. Dropout masks must be made on the device, so they use a small integer hash in torch
instead, keyed by (seed, step, layer, site), with the row (sample and token) and the channel as counter.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import torch

from megazero.plan import Box, Parameter, Shape

# Words drawn at a time by a thread: they stay in its cache, and torch, which shares out more than that, does not.
CHUNK = 1 << 15


def key(*parts: object) -> int:
    """128 bits that depend on every part and on nothing else: the same on every machine and in every version."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def words(stream: int, start: int, count: int) -> np.ndarray:
    """The uint64 words [start, start + count) of a stream (a `key`)."""
    first, skip = divmod(start, 4)                              # one Philox counter yields four words
    generator = np.random.Philox(key=stream, counter=first)
    return generator.random_raw(count + skip)[skip:]


def normal(stream: int, start: int, count: int) -> torch.Tensor:
    """Standard normal draws [start, start + count) of a stream, float64 [count]; |z| < 6.8."""
    w = words(stream, start, count)
    radius = torch.from_numpy((w >> np.uint64(32)).astype(np.float64)).add_(0.5).mul_(2.0**-32)      # uniform in (0, 1)
    angle = torch.from_numpy((w & np.uint64(0xFFFFFFFF)).astype(np.float64)).mul_(2.0**-32 * 2 * torch.pi)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())


def fill_normal(out: torch.Tensor, stream: int, full: Shape, box: Box, mean: float, std: float) -> None:
    """Fills `out` (any dtype, contiguous, `box.numel` elements) with box `box` of a normal tensor of shape `full`.

    Costs about the size of the box, on all cores. Draws happen in float64 and are cast once.
    """
    def draw(to: torch.Tensor, start: int, count: int, stride: int, rows: int) -> None:
        if count * 6 < stride:                                  # narrow columns: short runs are cheaper than whole rows
            for row in range(rows):
                to[row] = normal(stream, start + row * stride, count).mul_(std).add_(mean)
        else:
            drawn = normal(stream, start, (rows - 1) * stride + count)
            to.copy_(drawn.as_strided((rows, count), (stride, 1)).mul_(std).add_(mean))

    runs = list(_runs(full, box))
    parts = out.view(-1).split([count * rows for _, count, _, rows in runs])
    with ThreadPoolExecutor(cores()) as threads:
        for done in [threads.submit(draw, part.view(run[3], run[1]), *run)
                     for part, run in zip(parts, runs, strict=True)]:
            done.result()


def cores() -> int:
    """Of this machine, for each of the ranks that run on it."""
    return max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)


def _runs(full: Shape, box: Box) -> Iterator[tuple[int, int, int, int]]:
    """A box as (start, count, stride, rows):
    `rows` runs of `count` elements, `stride` apart, at most CHUNK or one run each."""
    # dimensions behind `tail` are whole
    tail = next((d for d in range(len(full) - 1, -1, -1) if box.size[d] != full[d]), 0)
    inner = prod(full[tail + 1:])
    count, stride = box.size[tail] * inner if full else 1, full[tail] * inner if full else 1
    lead = max(tail - 1, 0)                                     # rows along dimension `lead` are evenly spaced
    for index in np.ndindex(*box.size[:lead]):
        start = 0
        for d, n in enumerate(full):
            start = start * n + box.offset[d] + (index[d] if d < lead else 0)
        if tail == 0:                                           # one run: cut it
            yield from ((start + low, min(CHUNK, count - low), CHUNK, 1) for low in range(0, count, CHUNK))
        else:
            rows, step = box.size[lead], max(1, CHUNK // stride)
            yield from ((start + low * stride, count, stride, min(step, rows - low)) for low in range(0, rows, step))


def keep_mask(stream: int, rows: torch.Tensor, width: int, p: float, first: int = 0) -> torch.Tensor:
    """Which elements dropout keeps: bool [rows, width], each False with probability `p`.

    `rows` [n] are numbers of logical rows (sample and token, say), `first` the logical column of the first one here:
    element (row, column) is a hash of (stream, row, column), so any part of a mask equals that part of the whole.
    """
    return (hashed(stream, rows, width, first) & 0xFFFFFF) >= int(p * (1 << 24))


def hashed(stream: int, rows: torch.Tensor, width: int, first: int = 0,
           step: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [rows, width] of (stream, row, column), and of a `step` that the device counts."""
    base = rows.to(torch.int64) ^ (stream & (1 << 62) - 1)
    base = _mix(base if step is None else base ^ _mix(step.to(torch.int64) + 1))
    return _mix(base[:, None] + torch.arange(first, first + width, dtype=torch.int64, device=rows.device))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit finalizer (Stafford's variant 13 of MurmurHash3's); int64 arithmetic wraps, shifts are made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def fill_initial(out: torch.Tensor, p: Parameter, seed: int, box: Box) -> None:
    """What a parameter begins with in this box: its mean, or drawn from (seed, name, element index)."""
    if p.std == 0:
        out.fill_(p.mean)
        return
    here = out.view(box.size)
    drawn = torch.empty_like(here, device="cpu") if out.is_cuda else here
    fill_normal(drawn, key(seed, p.name), p.shape, box, p.mean, p.std)
    here.copy_(drawn)
