"""Text in, Megatron's .bin/.idx out.

    files -> items (a JSONL line or a whole text file) -> batches -> workers parse and encode -> one writer, in order

One line of JSONL, or one text file, is one document. What cannot be read (broken JSON, a missing key, bytes that are no
UTF-8) is counted, named with file and line, and left out; --strict stops instead. Memory holds a few batches per worker.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megazero.command_line import option
from megazero.data.indexed import IndexedWriter, best_dtype
from megazero.data.tokenizers import TYPES, Tokenizer, build_tokenizer
from megazero.errors import UserError

BATCH_BYTES = 1 << 18           # large enough that a worker's round trip costs nothing, small enough to keep all workers busy


@dataclass(frozen=True)
class PreprocessSettings:
    """Turns text into a tokenized dataset: PREFIX_KEY_document.bin, .idx and .json."""

    input: tuple[str, ...] = option(help="files of JSONL (.jsonl, .json) or text, or folders: every text file in them, by name, "
                                         "hidden ones left out", unit="path")
    output_prefix: str = option(help="the output's path: PREFIX_KEY_document.bin, .idx and .json are written", unit="prefix")
    tokenizer_type: str = option(help="the tokenizer, by Megatron's name for it", choices=tuple(TYPES))
    tokenizer_model: str | None = option(None, help="a .model, a tokenizer.json or its folder, or a JSON of characters", unit="path")
    vocab_file: str | None = option(None, help="GPT-2's vocab.json", unit="path")
    merge_file: str | None = option(None, help="GPT-2's merges.txt", unit="path")
    vocab_size: int | None = option(None, help="number of ids, for a NullTokenizer", unit="ids")
    json_keys: tuple[str, ...] = option(("text",), help="keys of the JSONL lines, a dataset each", unit="key")
    append_eod: bool = option(False, help="end every document with the tokenizer's end-of-document token")
    workers: int = option(1, help="processes that encode", unit="n")
    strict: bool = option(False, help="stop at the first line or file that cannot be read")


class Source(NamedTuple):
    """An input file: lines of JSON, or one text."""

    path: Path
    is_lines: bool


class Item(NamedTuple):
    """The raw bytes of one document and where they were found; line 0 is a whole text file."""

    path: Path
    line: int
    raw: bytes

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)


class Encoded(NamedTuple):
    """What a worker made of a batch. Per key: tokens of all documents, lengths of their sequences, sequences of each document."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    sequences: dict[str, list[int]]
    skipped: list[str]                          # a sentence each
    bytes: int


@dataclass(frozen=True)
class Report:
    """One dataset that was written."""

    prefix: str
    documents: int
    tokens: int
    skipped: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, {self.skipped:,} inputs skipped, "
                f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s ({self.bytes / 1e6 / self.seconds:.2f} MB/s)")


def preprocess(settings: PreprocessSettings) -> list[Report]:
    """Does what the settings say and returns one report per key. Raises UserError; then nothing is left behind."""
    tokenizer = _tokenizer(settings)
    if settings.append_eod and tokenizer.eod is None:
        raise UserError(f"--append-eod: this {settings.tokenizer_type} has no end-of-document token; leave the flag out.")
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: must be at least 1.")
    if len(set(settings.json_keys)) != len(settings.json_keys):
        raise UserError(f"--json-keys {' '.join(settings.json_keys)}: names a key twice; keep one.")
    sources = find_sources(settings.input, settings.json_keys)
    dtype = best_dtype(tokenizer.vocab_size)
    began, size = time.monotonic(), sum(source.path.stat().st_size for source in sources)
    with contextlib.ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(f"{settings.output_prefix}_{key}_document", dtype))
                   for key in settings.json_keys}
        skipped = _write_all(writers, settings, batches(read_items(sources)), size)
        if skipped and not any(writer.document_count for writer in writers.values()):
            raise UserError(f"--input {' '.join(settings.input)}: nothing in it could be read (see above); a .json or .jsonl file must "
                            "hold one object per line. Nothing was written.")
        for writer in writers.values():
            Path(f"{writer.prefix}.json").unlink(missing_ok=True)          # the old sidecar must not describe the new dataset
    seconds = time.monotonic() - began
    reports = [Report(w.prefix, w.document_count, w.token_count, skipped, size, seconds) for w in writers.values()]
    for report in reports:
        _write_sidecar(report, tokenizer, settings, sources)
    return reports


def _write_all(
    writers: Mapping[str, IndexedWriter], settings: PreprocessSettings, groups: Iterator[list[Item]], size: int
) -> int:
    """Encodes and writes everything with a bar of progress; returns how many documents were skipped."""
    skipped = 0
    with (tqdm(total=size, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar,
          contextlib.closing(_encoded(settings, groups)) as encoded):
        for done in encoded:
            _report_skipped(done.skipped, settings.strict)
            skipped += len(done.skipped)
            for key, writer in writers.items():
                _write(writer, done.tokens[key], done.lengths[key], done.sequences[key])
            bar.update(done.bytes)
            bar.set_postfix(tokens=f"{sum(w.token_count for w in writers.values()):,}", refresh=False)
    return skipped


def find_sources(inputs: Sequence[str], json_keys: Sequence[str] = ("text",)) -> list[Source]:
    """The files that the inputs name, folders walked in order of names. Raises UserError."""
    sources: list[Source] = []
    for name in inputs:
        path = Path(name)
        if not name or not path.exists():
            raise UserError(f"--input {name}: no such file or folder.")
        if path.is_dir():
            sources += [Source(file, file.suffix == ".jsonl") for file in _walk(path)]     # a .json among sources is a text
        else:
            sources.append(Source(path, path.suffix in (".jsonl", ".json")))
    if not sources:
        raise UserError(f"--input {' '.join(inputs)}: holds no file.")
    text = next((source.path for source in sources if not source.is_lines), None)
    if text and "text" not in json_keys:
        raise UserError(f"--json-keys {' '.join(json_keys)}: {text} has no keys but text; add text or leave the file out.")
    return sources


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file():
            yield entry


def read_items(sources: Iterable[Source]) -> Iterator[Item]:
    """The raw documents of the files, in order; a blank line is none."""
    for path, is_lines in sources:
        try:
            if is_lines:
                with path.open("rb") as lines:                    # bytes: only \n ends a line, not U+2028 or a lone \r
                    yield from (Item(path, n, line) for n, line in enumerate(lines, start=1) if not line.isspace())
            else:
                yield Item(path, 0, path.read_bytes())
        except OSError as error:
            raise UserError(f"--input {path}: cannot be read ({error.strerror}).") from None


def texts_of(item: Item, keys: Sequence[str]) -> dict[str, list[str]]:
    """The texts (Megatron's sequences) of a document by key. Raises ValueError saying why it cannot be read."""
    if not item.line and b"\0" in item.raw[:8192]:
        raise ValueError("is a binary file")
    try:
        text = item.raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None
    if not item.line:
        return {"text": [text]}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"is a JSON {type(data).__name__}, expected an object")
    return {key: _strings(data, key) for key in keys}


def _strings(data: dict[str, object], key: str) -> list[str]:
    if key not in data:
        raise ValueError(f"has no key {key!r}")
    value = data[key]
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(f"has a {type(text).__name__} under {key!r}, expected a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"has a lone surrogate under {key!r} at character {error.start}") from None
        texts.append(text)
    return texts


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups of about BATCH_BYTES."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += len(item.raw) + 256                                  # so that a million empty files make many batches, too
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@lru_cache(maxsize=1)
def _tokenizer(settings: PreprocessSettings) -> Tokenizer:
    """One tokenizer per process, built at its first batch."""
    s = settings
    return build_tokenizer(s.tokenizer_type, s.tokenizer_model, s.vocab_file, s.merge_file, s.vocab_size)


def encode(settings: PreprocessSettings, items: Sequence[Item]) -> Encoded:
    """Parses and encodes a batch: all of its texts in one call of the tokenizer."""
    tokenizer, skipped = _tokenizer(settings), []
    documents: dict[str, list[list[str]]] = {key: [] for key in settings.json_keys}
    for item in items:
        try:
            for key, texts in texts_of(item, settings.json_keys).items():
                documents[key].append(texts)
        except ValueError as error:
            skipped.append(f"{item.place}: {error}")
    done = Encoded({}, {}, {}, skipped, sum(len(item.raw) for item in items))
    dtype = best_dtype(tokenizer.vocab_size)
    end = tokenizer.eod if settings.append_eod else None
    for key, texts_by_document in documents.items():
        ids = iter(tokenizer.encode_batch([text for texts in texts_by_document for text in texts]))
        found = [with_end([next(ids) for _ in texts], end) for texts in texts_by_document]
        flat = [sequence for sequences in found for sequence in sequences]
        done.lengths[key] = [len(sequence) for sequence in flat]
        done.sequences[key] = [len(sequences) for sequences in found]
        done.tokens[key] = np.array([i for sequence in flat for i in sequence], dtype)
    return done


def with_end(sequences: list[list[int]], end: int | None) -> list[list[int]]:
    """A document's sequences as Megatron writes them: none empty, the end of document on the last, nothing at all for no text."""
    full = [sequence for sequence in sequences if sequence]
    if full and end is not None:
        full[-1] = [*full[-1], end]
    return full


def _encoded(settings: PreprocessSettings, groups: Iterable[list[Item]]) -> Generator[Encoded, None, None]:
    """The batches encoded, in order, by `workers` processes (by this one when there is one)."""
    if settings.workers == 1:
        yield from (encode(settings, group) for group in groups)
        return
    # a fresh interpreter per worker: forking a process that has threads can hang
    with ProcessPoolExecutor(settings.workers, multiprocessing.get_context("spawn")) as pool:
        try:
            pending: deque[Future[Encoded]] = deque()
            for group in groups:
                pending.append(pool.submit(encode, settings, group))
                if len(pending) > 3 * settings.workers:               # what is read ahead is bounded, so memory is
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(f"--workers {settings.workers}: a worker was killed, perhaps for memory; use fewer.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write(writer: IndexedWriter, tokens: np.ndarray, lengths: Sequence[int], sequences: Sequence[int]) -> None:
    at, ends = 0, iter(np.cumsum(lengths).tolist())
    for count in sequences:
        document = []
        for _ in range(count):
            end = next(ends)
            document.append(tokens[at:end])
            at = end
        writer.add_document(document)


def _report_skipped(sentences: Sequence[str], strict: bool) -> None:
    if sentences and strict:
        raise UserError(f"{sentences[0]}; repair it, or leave out --strict to skip it.")
    for sentence in sentences:
        tqdm.write(f"skipped {sentence}", file=sys.stderr)


def _write_sidecar(report: Report, tokenizer: Tokenizer, settings: PreprocessSettings, sources: Sequence[Source]) -> None:
    """PREFIX.json: what the binary files cannot say of themselves."""
    content = {"tokenizer": tokenizer.identity(), "vocab_size": tokenizer.vocab_size, "append_eod": settings.append_eod,
               "documents": report.documents, "tokens": report.tokens, "skipped": report.skipped,
               "sources": [str(source.path) for source in sources]}
    partial = Path(f"{report.prefix}.json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, f"{report.prefix}.json")
