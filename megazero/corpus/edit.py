"""Datasets of datasets: several one after the other, or one cut in three.

All is streamed, one dataset open at a time.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megazero.base import UserError, write_json
from megazero.corpus.verify import problems
from megazero.data import BLOCK, IndexedDataset, IndexedWriter, alone, read_sidecar, same_tokenizer, split_ranges, sums

NONE = np.empty(0, np.int64)


def merge_datasets(prefixes: Sequence[str], output: str) -> IndexedDataset:
    """The documents of all datasets, in order. Raises UserError unless all have one dtype and one tokenizer."""
    dtypes, sidecars = ([IndexedDataset(prefix).dtype for prefix in prefixes],
                        [read_sidecar(prefix) for prefix in prefixes])
    for prefix, dtype, sidecar in zip(prefixes, dtypes, sidecars, strict=True):
        if dtype != dtypes[0]:
            raise UserError(f"{prefix}: holds {dtype} tokens, {prefixes[0]} {dtypes[0]}; "
                            "merge datasets of one vocabulary.")
        if not _same(sidecar, sidecars[0]):
            raise UserError(f"{prefix}: was not made with the tokenizer of {prefixes[0]} (see their .json); "
                            "merge datasets of one tokenizer.")
    _keep(output, prefixes)
    _whole(prefixes)
    with alone(output, "--output-prefix"), IndexedWriter(output, dtypes[0]) as writer:
        for prefix in prefixes:
            dataset = IndexedDataset(prefix)
            _copy(dataset, 0, dataset.document_count, writer)
    ends = {None if sidecar is None else sidecar.get("append_eod") for sidecar in sidecars}
    return _finish(writer, sidecars[0] and sidecars[0] | {"append_eod": ends.pop() if len(ends) == 1 else None},
                   prefixes)


def split_dataset(prefix: str, output: str, spec: str) -> list[IndexedDataset]:
    """OUTPUT_train, OUTPUT_valid, OUTPUT_test: the documents that --split gives each;
    one without documents is not written."""
    dataset, made = IndexedDataset(prefix), []
    parts = {name: (first, last)
             for name, (first, last) in split_ranges(spec, dataset.document_count).items() if first < last}
    for name in parts:
        _keep(f"{output}_{name}", [prefix])
    _whole([prefix])
    for name, (first, last) in parts.items():
        with alone(f"{output}_{name}", "--output-prefix"), IndexedWriter(f"{output}_{name}", dataset.dtype) as writer:
            _copy(dataset, first, last, writer)
        made.append(_finish(writer, read_sidecar(prefix), [prefix]))
    return made


def _whole(prefixes: Sequence[str]) -> None:
    """Raises UserError for damage: what is made of it would have checksums that fit."""
    wrong = [sentence for prefix in prefixes for sentence in problems(prefix)]
    if wrong:
        raise UserError(*wrong)


def _same(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    one, other = a.get("tokenizer"), b.get("tokenizer")
    return a["vocab_size"] == b["vocab_size"] and (
        one == other or (one is not None and other is not None and same_tokenizer(one, other)))


def _keep(output: str, inputs: Sequence[str]) -> None:
    """Raises UserError when a dataset would be overwritten."""
    if any(os.path.realpath(output) == os.path.realpath(prefix) for prefix in inputs):
        raise UserError(f"--output-prefix {output}: is one of the inputs; name another.")
    if Path(f"{output}.idx").exists():
        raise UserError(f"--output-prefix {output}: {output}.idx is there already; name another, or remove it.")
    Path(f"{output}.json").unlink(missing_ok=True)                  # an old sidecar must not describe the new dataset


def _copy(dataset: IndexedDataset, first: int, last: int, writer: IndexedWriter) -> None:
    """Documents [first, last) of a dataset."""
    start, end = (dataset.document_token_boundaries(i) for i in (first, last))
    low, high = int(dataset.documents[first]), int(dataset.documents[last])
    for at in range(start, end, BLOCK):
        writer.add(dataset.tokens[at:min(at + BLOCK, end)], NONE, NONE)
    for at in range(low, high, BLOCK):
        writer.add(NONE.astype(dataset.dtype), dataset.sequence_lengths(at, min(at + BLOCK, high)), NONE)
    for at in range(first, last, BLOCK):
        writer.add(NONE.astype(dataset.dtype), NONE, np.diff(dataset.boundaries(at, min(at + BLOCK, last))))


def _finish(writer: IndexedWriter, sidecar: dict[str, Any] | None, inputs: Sequence[str]) -> IndexedDataset:
    """The sidecar of what was written, where its inputs have one."""
    if sidecar is not None:
        told = {"tokenizer": sidecar.get("tokenizer"), "vocab_size": sidecar["vocab_size"],
                "append_eod": sidecar.get("append_eod"),
                "documents": writer.document_count, "sequences": writer.sequence_count, "tokens": writer.token_count,
                "sums": sums(writer.prefix, writer.sums), "sources": list(inputs)}
        write_json(Path(f"{writer.prefix}.json"), told)
    return IndexedDataset(writer.prefix)


def document_lengths(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """The tokens of each document, a block at a time [documents]. Raises UserError for damaged entries."""
    for low in range(0, dataset.document_count, BLOCK):
        bounds = dataset.boundaries(low, min(low + BLOCK, dataset.document_count))
        lengths = dataset.sequence_lengths(int(bounds[0]), int(bounds[-1]))
        yield np.diff(np.concatenate([[0], np.cumsum(lengths)])[bounds - bounds[0]])
