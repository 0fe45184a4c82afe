"""Looks into tokenized datasets and makes new ones of them:

    python tools/dataset.py inspect --data-path PREFIX        what it is: sizes, dtype, tokenizer, sources
    python tools/dataset.py stats   --data-path PREFIX        how long its documents are, on the screen and as a PNG
    python tools/dataset.py show    --data-path PREFIX --document N    a document, its tokens and its text
    python tools/dataset.py verify  --data-path PREFIX ...    reads everything and names what is wrong
    python tools/dataset.py merge   --data-path PREFIX ... --output-prefix NEW
    python tools/dataset.py split   --data-path PREFIX --split 969,30,1 --output-prefix NEW
    python tools/dataset.py trace   --step N FLAGS            the documents behind a training step
                                                              of pretrain_gpt.py FLAGS

Each takes --help.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megazero.base import UserError
from megazero.corpus import document_lengths, merge_datasets, problems, split_dataset
from megazero.data import (
    DatasetPart,
    FillInTheMiddle,
    IndexedDataset,
    Samples,
    SampleSource,
    Tokenizer,
    build_tokenizer,
    check_sidecar,
    configured_tokenizer,
    library,
    read_sidecar,
    samples,
)
from megazero.plan import ranks_asked, resolve
from megazero.settings import TOKENIZERS, Config, commands, option, run, with_flags_of_a_run

PREFIX = "path of a dataset without .bin or .idx"


@dataclass(frozen=True)
class Inspect:
    """Prints what a dataset is; reads its headers and sidecar alone."""

    data_path: str = option(help=PREFIX, unit="prefix")


@dataclass(frozen=True)
class Stats:
    """Prints how long the documents of a dataset are."""

    data_path: str = option(help=PREFIX, unit="prefix")
    output: str | None = option(None, "PNG to write; needs matplotlib", unit="file")


@dataclass(frozen=True)
class Show:
    """Prints a document: its tokens, and its text where a tokenizer is given."""

    data_path: str = option(help=PREFIX, unit="prefix")
    document: int = option(0, "its number, from 0; -1 is the last", unit="n")
    tokens: int = option(200, "how many of its tokens to print; 0: all", unit="n")
    tokenizer_type: str | None = option(None, "the tokenizer it was made with", choices=TOKENIZERS)
    tokenizer_model: str | None = option(None, "its file", unit="path")
    vocab_file: str | None = option(None, "GPT-2's vocab.json", unit="path")
    merge_file: str | None = option(None, "GPT-2's merges.txt", unit="path")
    vocab_size: int | None = option(None, "number of ids, for a NullTokenizer", unit="ids")
    eod_token: str | None = option(None, "token that ends a document, if it was named", unit="token")
    special_tokens: tuple[str, ...] = option((), "special tokens of a .tiktoken file, if they were named", unit="token")


@dataclass(frozen=True)
class Verify:
    """Reads whole datasets; ends with an error when anything is wrong."""

    data_path: tuple[str, ...] = option(help=PREFIX, unit="prefix")


@dataclass(frozen=True)
class Merge:
    """Writes the documents of several datasets, in order, as one."""

    data_path: tuple[str, ...] = option(help=PREFIX, unit="prefix")
    output_prefix: str = option(help="path of the new dataset", unit="prefix")


@dataclass(frozen=True)
class Split:
    """Writes the documents of a dataset as up to three: NEW_train, NEW_valid, NEW_test."""

    data_path: str = option(help=PREFIX, unit="prefix")
    output_prefix: str = option(help="beginning of the paths of the new datasets", unit="prefix")
    split: str = option("969,30,1", "their parts, in documents")


@dataclass(frozen=True)
class Trace:
    """Names the documents behind a training step; all other flags are those of the run."""

    step: int = option(help="the step, from 1 as in the log", unit="step")
    text: int = option(0, "characters to print of each piece", unit="n")
    run: Config = Config()


def inspect(s: Inspect) -> None:
    dataset, sidecar = IndexedDataset(s.data_path), read_sidecar(s.data_path)
    size = dataset.tokens.nbytes
    rows = {"documents": f"{dataset.document_count:,}", "sequences": f"{dataset.sequence_count:,}",
            "tokens": f"{dataset.token_count:,}", "dtype": f"{dataset.dtype}, {size:,} bytes of tokens"}
    if sidecar is None:
        rows["sidecar"] = "none: its tokenizer is not known, and verify has no checksums"
    else:
        rows |= {"tokenizer": json.dumps(sidecar.get("tokenizer")), "vocabulary": f"{sidecar['vocab_size']:,}",
                 "append eod": str(sidecar.get("append_eod")), "skipped": str(sidecar.get("skipped", "not known")),
                 "sources": listed(sidecar.get("sources", []))}
    for name, text in rows.items():
        print(f"{name:<12}{text}")


def listed(sources: list[object]) -> str:
    """The first few, and how many there are."""
    return ", ".join(map(repr, sources[:5])) + (f", ... {len(sources):,} in all" if len(sources) > 5 else "")


def stats(s: Stats) -> None:
    dataset = IndexedDataset(s.data_path)
    counts, longest, shortest, empty = np.zeros(64, np.int64), 0, None, 0
    for lengths in document_lengths(dataset):
        full = lengths[lengths > 0]
        empty += len(lengths) - len(full)
        counts += np.bincount(np.frexp(full.astype(np.float64))[1] - 1, minlength=64)   # 2^i <= length < 2^(i + 1)
        if len(full):
            longest, shortest = max(longest, int(full.max())), min(shortest or int(full.min()), int(full.min()))
    documents = dataset.document_count - empty
    mean = dataset.token_count / max(documents, 1)
    print(f"{dataset.document_count:,} documents ({empty:,} empty), {dataset.token_count:,} tokens; "
          f"the others have {shortest or 0:,} to {longest:,}, {mean:,.1f} in the mean")
    used = np.flatnonzero(counts)
    for i in range(used[0], used[-1] + 1) if len(used) else ():
        print(f"{2**i:>13,} tokens or more {counts[i]:>13,} {'#' * round(50 * counts[i] / counts.max())}".rstrip())
    if s.output:
        paint(counts[:used[-1] + 1] if len(used) else counts[:1], Path(s.output), s.data_path)


def paint(counts: np.ndarray, path: Path, title: str) -> None:
    """Documents by length as a PNG; bars double in width."""
    library("matplotlib", "plot", f"--output {path}").use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    edges = 2.0 ** np.arange(len(counts) + 1)
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path}: cannot be written ({error}); "
                        "name a .png in a folder that is there.") from None


def show(s: Show) -> None:
    dataset = IndexedDataset(s.data_path)
    number = s.document + dataset.document_count if s.document < 0 else s.document
    if not 0 <= number < dataset.document_count:
        there = f"documents 0 to {dataset.document_count - 1}" if dataset.document_count else "no documents"
        raise UserError(f"--document {s.document}: {s.data_path} has {there}.")
    tokenizer = None
    if s.tokenizer_type is not None:
        tokenizer = build_tokenizer(s.tokenizer_type, s.tokenizer_model, s.vocab_file, s.merge_file, s.vocab_size,
                                    s.eod_token, s.special_tokens)
        check_sidecar(s.data_path, None, tokenizer.identity())
    tokens = dataset.document(number)
    shown = tokens[:s.tokens or None].tolist()
    wrong = next((t for t in shown if tokenizer is not None and not 0 <= t < tokenizer.vocab_size), None)
    if wrong is not None:
        raise UserError(f"{s.data_path}: document {number} holds token {wrong}, which is no id of this "
                        f"{s.tokenizer_type}; show it with the tokenizer it was made with.")
    more = f" (the first {len(shown):,} are shown)" if len(shown) < len(tokens) else ""
    print(f"document {number} of {s.data_path}: {len(tokens):,} tokens "
          f"from {dataset.document_token_boundaries(number):,} on{more}")
    print(" ".join(map(str, shown)))
    if tokenizer is not None:
        print(tokenizer.decode(shown))


def verify(s: Verify) -> None:
    wrong = []
    for prefix in s.data_path:
        start, found = time.perf_counter(), 0
        with tqdm(unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:
            for sentence in problems(prefix, bar.update):
                wrong.append(sentence)
                found += 1
        if not found:
            dataset = IndexedDataset(prefix)
            checked = "every byte against its checksum" if read_sidecar(prefix) else "no sidecar, so no checksums"
            print(f"{prefix} is whole: {dataset.document_count:,} documents, {dataset.token_count:,} tokens, "
                  f"{checked}, {dataset.tokens.nbytes / 1e9 / (time.perf_counter() - start):.2f} GB/s")
    if wrong:
        raise UserError(*wrong)


def trace(s: Trace) -> None:
    c = s.run
    if c.training.global_batch_size is None and c.parallel.data_parallel_size is None:
        raise UserError("--global-batch-size is missing: it says which samples a step reads; "
                        "give it, or the --dp of the run.")
    tokenizer = configured_tokenizer(c)
    plan = resolve(c, ranks_asked(c), max(tokenizer.vocab_size if tokenizer else 0, c.data.vocab_size or 0))
    if not 1 <= s.step <= plan.train_iters:
        raise UserError(f"--step {s.step}: the run has steps 1 to {plan.train_iters}.")
    source = samples(plan, "train", tokenizer)
    opened = source.inner if isinstance(source, FillInTheMiddle) else source
    if not isinstance(opened, Samples):
        raise UserError("--mock-data: has no documents; give the data of a run.")
    for k in plan.samples_of(s.step - 1):
        part, ranges = opened.locate(k)
        print(f"sample {k}: {part.dataset.prefix}: {'; '.join(pieces(part, ranges))}")
        if s.text and tokenizer is not None:
            print(f"  {excerpt(source, k, tokenizer, s.text)!r}")


def pieces(part: DatasetPart, ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The documents of a sample: their numbers, and which of their tokens."""
    out, dataset = [], part.dataset
    for low, high in ranges:
        while low < high:
            document = dataset.document_of(low)
            start, end = dataset.document_token_boundaries(document), dataset.document_token_boundaries(document + 1)
            out.append(f"document {document} tokens {low - start}-{min(high, end) - start - 1} of {end - start}")
            low = min(high, end)
    return out


def excerpt(source: SampleSource, k: int, tokenizer: Tokenizer, characters: int) -> str:
    return tokenizer.decode(source.sample(k).tolist())[:characters]


def main() -> None:
    if sys.argv[1:2] == ["trace"]:                      # alone in taking presets and Megatron's words
        trace(with_flags_of_a_run(Trace, sys.argv[2:], "dataset.py trace"))
        return
    commands("dataset.py", __doc__ or "", {
        "inspect": (Inspect, inspect), "stats": (Stats, stats), "show": (Show, show), "verify": (Verify, verify),
        "merge": (Merge, lambda s: described(merge_datasets(s.data_path, s.output_prefix))),
        "split": (Split, lambda s: described(*split_dataset(s.data_path, s.output_prefix, s.split))),
        "trace": (Trace, trace)})


def described(*made: IndexedDataset) -> None:
    for dataset in made:
        print(f"{dataset.prefix}: {dataset.document_count:,} documents, {dataset.token_count:,} tokens")


if __name__ == "__main__":
    run(main)
