"""Text in, Megatron's .bin/.idx out.

    sources -> chunks -> batches -> workers parse and encode -> one writer per key, in order -> sidecar

What cannot be read (broken JSON, a missing key, bytes that are no UTF-8) is counted, named with file and line, and left
out; --strict stops instead. Memory holds a few batches per worker.

Every SAVE_SECONDS the run notes how far it is in PREFIX.progress.json, after what it wrote is on disk. The same command
after a crash cuts the files back to that note and goes on;
the bytes in the end are those of a run that was never stopped.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megazero.base import Form, UserError, load, said, write_json
from megazero.corpus.sources import (
    CHUNK,
    FORMATS,
    READERS,
    Chunk,
    Input,
    Place,
    Unreadable,
    documents,
    find_sources,
    read_chunks,
)
from megazero.corpus.tables import Misplaced
from megazero.data import (
    COUNT,
    CRC,
    MANY,
    STDIN,
    SUMMED,
    TYPES,
    IndexedWriter,
    Tokenizer,
    Written,
    alone,
    best_dtype,
    build_tokenizer,
    is_packed,
    read_sidecar,
    size_of,
    stamp_of,
    sums,
)
from megazero.settings import option

SAVE_SECONDS = 10.0
AHEAD = 1 << 27             # bytes of text that wait for workers or for being written
NAMED = 100                 # inputs that cannot be read and are named one by one
NOTE: Form = {"job": str, "place": [COUNT], "skipped": COUNT, "bytes": COUNT, "seconds": float, "finished": bool,
              "written": {str: [(COUNT, [CRC])]}, "sum?": CRC}      # without a sum it is of a version before
NOTED = ([int, int, int, list], [int, int, int, list, list])        # what it says of a dataset; the shorter is older


@dataclass(frozen=True)
class PreprocessSettings:
    """Turns text into a tokenized dataset: PREFIX_KEY_document.bin, .idx and .json.
    Run again after a crash, it goes on."""

    input: tuple[str, ...] = option(
        help="files, globs, URLs or - for standard input: JSONL, Parquet, Arrow or text, also .gz .zst .bz2 .xz; "
             "or folders: every file in them, by name, hidden ones left out", unit="path")
    output_prefix: str = option(
        help="the output's path: PREFIX_KEY_document.bin, .idx and .json are written", unit="prefix")
    tokenizer_type: str = option(help="the tokenizer, by Megatron's name for it", choices=tuple(TYPES))
    tokenizer_model: str | None = option(
        None, help="a .model, .tiktoken, tekken.json, tokenizer.json or its folder, or a JSON of characters",
        unit="path")
    vocab_file: str | None = option(None, help="GPT-2's vocab.json", unit="path")
    merge_file: str | None = option(None, help="GPT-2's merges.txt", unit="path")
    vocab_size: int | None = option(None, help="number of ids, for a NullTokenizer", unit="ids")
    eod_token: str | None = option(
        None, help="token that ends a document; default: the one that its files name, or a usual name", unit="token")
    special_tokens: tuple[str, ...] = option(
        (), help="names for the ids after the last rank of a .tiktoken file", unit="token")
    input_format: str = option(
        "auto", help="auto: by the file's name; text: each file is a document; "
                     "blocks: text whose documents end at blank lines", choices=FORMATS)
    json_keys: tuple[str, ...] = option(
        ("text",), help="keys of the JSONL lines, or columns, a dataset each", unit="key")
    append_eod: bool = option(False, help="end every document with the tokenizer's end-of-document token")
    workers: int = option(1, help="processes that encode", unit="n")
    strict: bool = option(False, help="stop at the first line or file that cannot be read")


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
        return (f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, "
                f"{self.skipped:,} inputs skipped, {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s "
                f"({self.bytes / 1e6 / max(self.seconds, 1e-9):.2f} MB/s)")


@dataclass
class State:
    """How far a run is. `place`: where reading goes on. `written`: what each dataset holds, as of the last note."""

    place: Place = Place()
    skipped: int = 0
    bytes: int = 0
    seconds: float = 0.0
    finished: bool = False
    written: dict[str, Written] = field(default_factory=dict)


# ---- in the workers: chunks to tokens


class Encoded(NamedTuple):
    """What a worker made of a batch.
    Per key: tokens of all documents, lengths of their sequences, sequences of each document."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    sequences: dict[str, np.ndarray]
    skipped: list[str]                          # a sentence each
    bytes: int


@lru_cache(maxsize=1)
def _tokenizer(settings: PreprocessSettings) -> Tokenizer:
    """One tokenizer per process, built at its first batch."""
    s = settings
    return build_tokenizer(s.tokenizer_type, s.tokenizer_model, s.vocab_file, s.merge_file, s.vocab_size, s.eod_token,
                           s.special_tokens)


def encode(settings: PreprocessSettings, chunks: Sequence[Chunk]) -> Encoded:
    """Parses and encodes a batch: all of its texts in one call of the tokenizer."""
    tokenizer = _tokenizer(settings)
    end = tokenizer.eod if settings.append_eod else None
    found = [document for chunk in chunks for document in documents(chunk, settings.json_keys)]
    done = Encoded({}, {}, {}, [d.sentence for d in found if isinstance(d, Unreadable)],
                   sum(len(chunk.raw) for chunk in chunks))
    for key in settings.json_keys:
        own = [document[key] for document in found if not isinstance(document, Unreadable) and key in document]
        tokens, lengths = tokenizer.encode_flat([text for texts in own for text in texts],
                                                best_dtype(tokenizer.vocab_size))
        done.tokens[key], done.lengths[key], done.sequences[key] = with_ends(
            tokens, lengths, [len(texts) for texts in own], end)
    return done


def with_ends(
    tokens: np.ndarray, lengths: np.ndarray, counts: Sequence[int], end: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as Megatron writes them: no sequence is empty, the last of a document ends with `end`,
    one without text has none.

    tokens [t] of texts of `lengths` [n], `counts` of them a document [d]
    -> (tokens [t'], lengths [s], sequences of each document [d]).
    """
    document, full = np.repeat(np.arange(len(counts)), counts), lengths > 0
    sequences, lengths = np.bincount(document[full], minlength=len(counts)), lengths[full]
    if end is not None:
        last = np.cumsum(sequences)[sequences > 0] - 1                  # of each document that has one
        tokens = np.insert(tokens, np.cumsum(lengths)[last], end)
        lengths[last] += 1
    return tokens, lengths, sequences


def _leave_with_parent() -> None:
    """A killed parent cannot end its workers: each watches for it."""
    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


# ---- in the process that reads and writes


def preprocess(settings: PreprocessSettings) -> list[Report]:
    """Does what the settings say and returns one report per key. Raises UserError. When it is stopped before its first
    note of progress, nothing is left behind; later, what the same command needs to go on."""
    tokenizer = _checked(settings)
    sources = find_sources(settings.input, settings.json_keys, settings.input_format)
    with alone(settings.output_prefix, "--output-prefix"):
        try:
            return _preprocessed(settings, tokenizer, sources)
        except Misplaced as error:
            raise _damaged(_note_of(settings), error) from None


def _preprocessed(settings: PreprocessSettings, tokenizer: Tokenizer, sources: Sequence[Input]) -> list[Report]:
    note, job = _note_of(settings), _job(settings, tokenizer, sources)
    width = best_dtype(tokenizer.vocab_size).itemsize
    state = _read_note(note, job, settings.json_keys, sources, width)
    prefixes = {key: f"{settings.output_prefix}_{key}_document" for key in settings.json_keys}
    if not note.exists():
        _keep_others(prefixes, tokenizer, settings, sources)
    open_keys = [key for key in prefixes if not (state.finished and _is_published(prefixes[key]))]
    if state.finished:
        _all_noted(note, {prefixes[key]: state.written[key] for key in open_keys}, width)
    writers: dict[str, IndexedWriter] = {}
    try:
        for key in open_keys:
            writers[key] = IndexedWriter(prefixes[key], best_dtype(tokenizer.vocab_size), state.written.get(key))
        if not state.finished:
            _write_all(writers, settings, sources, state, lambda: _write_note(note, job, state))
        for writer in writers.values():
            Path(f"{writer.prefix}.json").unlink(missing_ok=True)    # the old sidecar must not describe the new dataset
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.suspend() if note.exists() else writer.discard()
        raise
    for key, prefix in prefixes.items():
        write_json(Path(f"{prefix}.json"), _sidecar(prefix, state, state.written[key], tokenizer, settings, sources))
    note.unlink(missing_ok=True)
    return [Report(prefix, state.written[key].documents, state.written[key].tokens,
                   state.skipped, state.bytes, state.seconds)
            for key, prefix in prefixes.items()]


def _checked(settings: PreprocessSettings) -> Tokenizer:
    tokenizer = _tokenizer(settings)
    if settings.append_eod and tokenizer.eod is None:
        raise UserError(f"--append-eod: this {settings.tokenizer_type} has no end-of-document token; "
                        "name one with --eod-token, or leave the flag out.")
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: must be at least 1.")
    if len(set(settings.json_keys)) != len(settings.json_keys):
        raise UserError(f"--json-keys {' '.join(settings.json_keys)}: names a key twice; keep one.")
    return tokenizer


def _write_all(
    writers: Mapping[str, IndexedWriter], settings: PreprocessSettings, sources: Sequence[Input], state: State,
    note: Callable[[], None],
) -> None:
    """Encodes and writes everything with a bar of progress, noting it now and then."""
    began = saved = time.monotonic()
    before, resumable = state.seconds, STDIN not in settings.input
    if state.bytes:
        tqdm.write(f"going on after {state.bytes / 1e6:,.1f} MB of text", file=sys.stderr)
    starts = np.cumsum([0, *(size_of(source.path) for source in sources)])            # of each file in the bytes of all
    chunks = read_chunks(sources, settings.json_keys, state.place, _tokenizer(settings).longest)
    with (tqdm(total=int(starts[-1]) or None, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar,
          closing(_encoded(settings, batches(chunks))) as encoded):
        for last, done in encoded:
            _report_skipped(done.skipped, settings.strict, state.skipped)
            for key, writer in writers.items():
                writer.add(done.tokens[key], done.lengths[key], done.sequences[key])
            state.skipped, state.bytes, state.place = (
                state.skipped + len(done.skipped), state.bytes + done.bytes, last.after)
            state.seconds = before + time.monotonic() - began
            _show(bar, starts, last, state, sum(writer.token_count for writer in writers.values()))
            if resumable and time.monotonic() - saved >= SAVE_SECONDS:
                state.written = {key: writer.mark() for key, writer in writers.items()}
                note()
                saved = time.monotonic()
    state.seconds = before + time.monotonic() - began
    if state.skipped and not any(writer.document_count for writer in writers.values()):
        hint = ("; a .json or .jsonl file must hold one object per line"
                if any(source.kind == "lines" for source in sources) else "")
        raise UserError(f"--input {' '.join(settings.input)}: nothing in it could be read (see above){hint}. "
                        "Nothing was written.")
    state.finished, state.place = True, Place(len(sources))
    state.written = {key: writer.mark() for key, writer in writers.items()}
    if resumable:
        note()


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Groups of about CHUNK bytes: chunks are of that size, but whole files may be small."""
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk.raw) + 256                            # so that a million empty files make many batches, too
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encoded(
    settings: PreprocessSettings, groups: Iterable[list[Chunk]]
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """The batches encoded, each with its last chunk, in order,
    by `workers` processes (by this one when there is one)."""
    if settings.workers == 1:
        yield from ((group[-1], encode(settings, group)) for group in groups)
        return
    # a fresh interpreter per worker: forking a process that has threads can hang
    with ProcessPoolExecutor(settings.workers, multiprocessing.get_context("spawn"), _leave_with_parent) as pool:
        try:
            pending: deque[tuple[Chunk, Future[Encoded], int]] = deque()
            ahead = 0                                                   # bytes: bounded, so memory is
            for group in groups:
                size = sum(len(chunk.raw) for chunk in group)
                while pending and (len(pending) > 3 * settings.workers or ahead + size > AHEAD):
                    last, done, read = pending.popleft()
                    ahead -= read
                    yield last, done.result()
                pending.append((group[-1]._replace(raw=b""), pool.submit(encode, settings, group), size))
                ahead += size
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        except BrokenProcessPool:
            raise UserError(f"--workers {settings.workers}: a worker was killed, "
                            "perhaps for memory; use fewer.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _report_skipped(sentences: Sequence[str], strict: bool, before: int) -> None:
    """The first NAMED of a run are named, all are counted."""
    if sentences and strict:
        raise UserError(f"{sentences[0]}; repair it, or leave out --strict to skip it.")
    for number, sentence in enumerate(sentences[:max(NAMED + 1 - before, 0)], before):
        tqdm.write(f"skipped {sentence}" if number < NAMED else "skipped more, which are counted", file=sys.stderr)


def _show(bar: Any, starts: np.ndarray, last: Chunk, state: State, tokens: int) -> None:
    """The bar runs over the bytes of the files; beside it stand megabytes of text and tokens per second."""
    at = int(starts[last.after.source]) + (last.read if last.after.offset else 0)
    bar.update(min(at, int(starts[-1])) - bar.n)
    bar.set_postfix_str(f"text {state.bytes / 1e6 / state.seconds:.2f} MB/s, {tokens / state.seconds:,.0f} tokens/s",
                        refresh=False)


# ---- what a run notes


def _job(settings: PreprocessSettings, tokenizer: Tokenizer, sources: Sequence[Input]) -> str:
    """A hash of everything that decides the bytes."""
    decides = [tokenizer.identity(), settings.json_keys, settings.append_eod,
               [[s.kind, *stamp_of(s.path)] for s in sources]]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _write_note(path: Path, job: str, state: State) -> None:
    words = {"job": job, **asdict(state)}
    write_json(path, words | {"sum": _sum(words)})


def _sum(words: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(words).encode())


def _note_of(settings: PreprocessSettings) -> Path:
    return Path(f"{settings.output_prefix}.progress.json")


def _damaged(note: Path, why: Exception) -> UserError:
    return UserError(f"{note}: is damaged ({why}); remove it to begin again.")


def _read_note(path: Path, job: str, keys: Sequence[str], sources: Sequence[Input], width: int) -> State:
    """Where an earlier run of this command ended. Raises UserError when the note is of another command."""
    try:
        told = load(path, NOTE)
        if told.pop("sum", None) not in (None, _sum(told)):
            raise ValueError("its checksum is of other words")
        same, state = told["job"] == job, _state(told)
        if same:
            _fits(state, keys, sources, width)
    except (FileNotFoundError, NotADirectoryError):
        return State()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not same:
        raise UserError(f"{path}: is of an unfinished run with other inputs, tokenizer or flags; "
                        "give those to go on with it, or remove this file to begin again.")
    return state


def _state(told: Mapping[str, Any]) -> State:
    """Raises ValueError for other entries than a note has."""
    if len(told["place"]) != 3:
        raise ValueError("place is not a file, a byte and a line")
    strange = [key for key, entry in told["written"].items() if [*map(type, entry)] not in NOTED]
    if strange:
        raise ValueError(f"written.{said(strange[0])} is not three counts and a list of checksums")
    written = {key: Written(d, s, t, *map(tuple, sums)) for key, (d, s, t, *sums) in told["written"].items()}
    return State(Place(*told["place"]), told["skipped"], told["bytes"], told["seconds"], told["finished"], written)


def _fits(state: State, keys: Sequence[str], sources: Sequence[Input], width: int) -> None:
    """Raises ValueError for a note whose numbers cannot be of a run with these keys and sources, tokens of `width`
    bytes."""
    place, passed = state.place, _passed(state.place, sources)
    if state.seconds < 0 or not _is_place(place, sources) or (state.finished and place.source < len(sources)):
        raise ValueError(f"its place is {tuple(place)} of {len(sources)} files after {state.seconds} s")
    if passed is not None and not (state.bytes == passed or (state.skipped and state.bytes < passed)):
        raise ValueError(f"it tells of {state.bytes:,} bytes of text, before its place are {passed:,}")
    if state.written.keys() != set(keys):
        raise ValueError(f"it tells of {said(list(state.written))}, not of {said(list(keys))}")
    for key, written in state.written.items():
        if len(written.sums) != -(-written.tokens * width // SUMMED):
            raise ValueError(f"it has {len(written.sums)} checksums for {written.tokens} tokens of {key}")
        if written.sequences > written.tokens or written.documents > state.bytes + place.source:
            raise ValueError(f"{written.tokens:,} tokens in {written.sequences:,} sequences of {written.documents:,} "
                             f"documents of {key} are not made of {state.bytes:,} bytes")


def _is_place(place: Place, sources: Sequence[Input]) -> bool:
    """Can somebody who read these sources in order be there?"""
    if place.source >= len(sources):
        return place == Place(len(sources))
    return place.line in range(1, place.offset + 2) and (sources[place.source].kind != "text" or place.offset == 0)


def _passed(place: Place, sources: Sequence[Input]) -> int | None:
    """Bytes of text before a place; None where only who reads can tell, in archives, tables, and what is no file."""
    before = [source.path for source in sources[:place.source + (place.offset > 0)]
              if source.kind in READERS and not is_packed(source.path) and not _is_stream(source.path)]
    if len(before) < min(place.source + (place.offset > 0), len(sources)):
        return None
    return sum(map(size_of, before[:place.source])) + place.offset


def _is_stream(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


def _all_noted(note: Path, datasets: Mapping[str, Written], width: int) -> None:
    """Raises UserError when a note of a run that has read everything tells of less than it wrote."""
    for prefix, written in datasets.items():
        for name, size in {"bin": written.tokens * width, "lengths": 4 * written.sequences,
                           "documents": 8 * written.documents + 8}.items():
            path = Path(f"{prefix}.{name}.partial")
            if path.exists() and path.stat().st_size > size:
                raise _damaged(note, ValueError(f"{path} has {path.stat().st_size:,} bytes, it tells of {size:,}"))


def _keep_others(
    prefixes: Mapping[str, str], tokenizer: Tokenizer, settings: PreprocessSettings, sources: Sequence[Input]
) -> None:
    """Raises UserError when a dataset that another command made would be overwritten; this one may run again."""
    own = {"tokenizer": tokenizer.identity(), "append_eod": settings.append_eod, "input_format": settings.input_format,
           "sources": _stamps(sources, settings)}
    for prefix in prefixes.values():
        found = Path(f"{prefix}.idx").exists()
        sidecar = read_sidecar(prefix) if found else None
        same = sidecar is not None and all(sidecar.get(key) == json.loads(json.dumps(value))
                                           for key, value in own.items())
        if found and not (same and STDIN not in settings.input):
            raise UserError(f"--output-prefix {settings.output_prefix}: {prefix}.idx is there already, "
                            "of other inputs, tokenizer or flags; name another prefix, or remove it.")


def _stamps(sources: Sequence[Input], settings: PreprocessSettings) -> list[Any]:
    """The inputs as the sidecar names them."""
    return [stamp_of(source.path)[:2] for source in sources] if len(sources) <= MANY else list(settings.input)


def _is_published(prefix: str) -> bool:
    """Has this dataset, of a finished run, got both of its files? Then what is left of writing it goes."""
    if Path(f"{prefix}.bin.partial").exists() or not Path(f"{prefix}.idx").exists():
        return False
    for name in ("lengths", "documents", "idx"):
        Path(f"{prefix}.{name}.partial").unlink(missing_ok=True)
    return True


def _sidecar(
    prefix: str, state: State, written: Written, tokenizer: Tokenizer, settings: PreprocessSettings,
    sources: Sequence[Input],
) -> dict[str, Any]:
    """PREFIX.json; see sidecar.py."""
    return {"tokenizer": tokenizer.identity(), "vocab_size": tokenizer.vocab_size, "append_eod": settings.append_eod,
            "input_format": settings.input_format,
            "documents": written.documents, "sequences": written.sequences, "tokens": written.tokens,
            "skipped": state.skipped, "sums": sums(prefix, written.sums), "sources": _stamps(sources, settings)}
