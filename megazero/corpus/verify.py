"""Reads a whole dataset and names everything that is wrong with it, a sentence each.

Opening looks at sizes and ends, reading at the entries it touches; this looks at all: boundaries, lengths and offsets
against each other, tokens against the vocabulary, counts and every byte against the sidecar. Without a sidecar a
changed token that is still a token cannot be told from a right one.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megazero.base import UserError
from megazero.data import BLOCK, SUMMED, IndexedDataset, bytes_of, miscounts, read_sidecar

Progress = Callable[[int], object]              # told the bytes that were read


def problems(prefix: str, progress: Progress = lambda _: None) -> Iterator[str]:
    """A sentence for each thing that is wrong; of many of a kind the first. Nothing is yielded for a good dataset."""
    try:
        dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    except UserError as error:
        yield from error.sentences
        return
    for check in (_documents, _sequences):
        try:
            check(dataset)
        except UserError as error:
            yield from error.sentences
    yield from _tokens(dataset, sidecar)
    if sidecar is not None:
        yield from miscounts(dataset, sidecar)
        for name in ("bin", "idx"):
            yield from _sums(f"{prefix}.{name}", sidecar, name, progress)


def _documents(dataset: IndexedDataset) -> None:
    for low in range(0, dataset.document_count, BLOCK):
        dataset.boundaries(low, min(low + BLOCK, dataset.document_count))


def _sequences(dataset: IndexedDataset) -> None:
    for low in range(0, dataset.sequence_count, BLOCK):
        dataset.sequence_lengths(low, min(low + BLOCK, dataset.sequence_count))


def _tokens(dataset: IndexedDataset, sidecar: dict[str, Any] | None) -> Iterator[str]:
    """Tokens below 0, or beyond the vocabulary that the sidecar tells."""
    size = None if sidecar is None else sidecar["vocab_size"]
    if dataset.dtype.kind not in "iu":
        yield f"{dataset.prefix}: holds {dataset.dtype}, which are no token ids; make it of ids."
        return
    for low in range(0, dataset.token_count, BLOCK):
        block = dataset.tokens[low:low + BLOCK]
        wrong = np.flatnonzero((block < 0) | (block >= size if size is not None else False))
        if len(wrong):
            i = int(wrong[0])
            expected = "0 or more" if size is None else f"0 to {size - 1}"
            yield (f"{dataset.prefix}.bin: token {low + i} is {block[i]}, expected {expected}; "
                   "the file is damaged, make it again.")
            return


def _sums(path: str, sidecar: dict[str, Any], name: str, progress: Progress) -> Iterator[str]:
    raw, told = bytes_of(path), sidecar.get("sums")
    if told is None or told["block"] != SUMMED or len(told[name]) != -(-len(raw) // SUMMED):
        yield (f"{path}: its sidecar holds no checksum for each {SUMMED} of its {len(raw)} bytes; "
               "make the dataset again.")
        return
    for number, expected in enumerate(told[name]):
        low, high = number * SUMMED, min((number + 1) * SUMMED, len(raw))
        found = 0
        for at in range(low, high, 1 << 22):
            part = raw[at:min(at + (1 << 22), high)]
            found = zlib.crc32(part.data, found)
            progress(len(part))
        if found != expected:
            yield (f"{path}: bytes {low} to {high - 1} have CRC-32 {found:08x}, expected {expected:08x} "
                   "as the sidecar says; the file is damaged, make it again.")
