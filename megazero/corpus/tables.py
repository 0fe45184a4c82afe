"""Rows of Parquet and Arrow files, read by a process of its own: what a damaged file does to a library in C++ ends that
process and not the run. Texts come back as JSON, so that nobody else needs the library.
"""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import orjson

from megazero.base import UserError
from megazero.data import Damage, Opened, library, line_of

MEMORY = 1 << 32                # bytes that the process may take: a page or batch that needs more is told
ROWS = 1 << 10                  # of a batch at most: a few bytes may stand for millions of equal texts


class Misplaced(Exception):
    """Nobody who read a source in order was at the place to go on from: it is not the source that is wrong."""


class Question(NamedTuple):
    """What is asked of the process: the rows of a table from one on, about `size` bytes at a time."""

    kind: str                   # parquet, arrow
    path: str
    start: int                  # the first row, from 0
    keys: tuple[str, ...]       # columns
    size: int
    longest: int                # bytes of a row


class Rows(NamedTuple):
    """Rows [first, end): a JSON list of an object of texts (see `strings`) for each, or of why it has none."""

    first: int
    end: int
    raw: bytes
    read: int                   # bytes of the file that have been read by now


class TableReader:
    """The process: started for the first table, again after its death, ended by `close`."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None

    def rows(self, question: Question) -> Iterator[Rows]:
        """Raises UserError, an OSError of the system, Damage, or Misplaced where a table has fewer rows."""
        line = self._started()
        try:
            line.send(question)
            while isinstance(answer := line.recv(), Rows):
                yield answer
        except (EOFError, ConnectionError):
            answer = Damage(f"what reads it ended with {self._end()}")
        except BaseException:
            self.close()                                        # it is in the middle of an answer
            raise
        if answer is not None:
            raise answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def _started(self) -> Connection:
        if self._process is not None and not self._process.is_alive():
            self._end()                                         # after its last answer
        if self._process is None:
            # a fresh interpreter: forking a process that has threads can hang
            context = multiprocessing.get_context("spawn")
            self._line, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._line

    def _end(self) -> str:
        """Waits for its end; returns how it was."""
        assert self._process is not None
        self._process.join()
        code, self._process = self._process.exitcode or 0, None
        self._line.close()
        return signal.Signals(-code).name if code < 0 else f"code {code}"


# ---- in the process


def serve(line: Connection) -> None:
    """Answers questions until nobody asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if soft < 0 else min(soft, MEMORY), hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # whoever asks says when to stop
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                # the last words of the library; ours go over the line
    try:
        while True:
            _answer(line.recv(), line)
    except (EOFError, ConnectionError):
        return


def _answer(question: Question, line: Connection) -> None:
    """The rows, and then None or why there are no more."""
    end: Exception | None = None
    try:
        for rows in _read(question):
            line.send(rows)
    except ConnectionError:
        raise
    except Exception as error:
        end = _told(error)
    line.send(end)


def _told(error: Exception) -> Exception:
    """What is said of an error: what is not the system's or ours is the file's."""
    if isinstance(error, (UserError, Misplaced)) or (isinstance(error, OSError) and error.errno is not None):
        return error
    if isinstance(error, MemoryError):
        return Damage(f"it needs more than {MEMORY:,} bytes of memory")
    return Damage(line_of(error))


def _read(question: Question) -> Iterator[Rows]:
    with Opened(question.path) as file:
        for first, batch in _smaller(KINDS[question.kind](question, file), question.size):
            raw = orjson.dumps(_texts(batch, question.keys, question.longest))
            if batch.num_rows == 1 and len(raw) > question.longest:         # a control character is six bytes there
                raw = orjson.dumps([f"is longer than {question.longest:,} bytes as JSON; cut it in pieces"])
            yield Rows(first, first + batch.num_rows, raw, file.tell())


def _parquet(question: Question, opened: Opened) -> Iterator[tuple[int, Any]]:
    """Row groups one after the other; those before the start are not read."""
    parquet = library("pyarrow.parquet", "data", question.path)
    file, row = parquet.ParquetFile(opened.bytes, pre_buffer=False, buffer_size=1 << 20), 0
    present = [key for key in question.keys if key in file.schema_arrow.names]
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        if row + about.num_rows > question.start:
            size = _rows(question.size, about.total_byte_size, about.num_rows)
            yield from _from(question.start, row, file.iter_batches(size, [group], present))
        row += about.num_rows
    _reached(question, row)


def _arrow(question: Question, opened: Opened) -> Iterator[tuple[int, Any]]:
    ipc = library("pyarrow", "data", question.path).ipc
    is_file = opened.bytes.read(6) == b"ARROW1"
    opened.bytes.seek(0)
    if is_file:
        reader = ipc.open_file(opened.bytes)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = iter(ipc.open_stream(opened.bytes))
    own = (batch.select([key for key in question.keys if key in batch.schema.names]) for batch in batches)
    _reached(question, (yield from _from(question.start, 0, own)))


KINDS: Mapping[str, Callable[[Question, Opened], Iterator[tuple[int, Any]]]] = {"parquet": _parquet, "arrow": _arrow}


def _reached(question: Question, rows: int) -> None:
    if rows < question.start:
        raise Misplaced(f"{question.path} has {rows:,} rows, it tells of {question.start:,}")


def _from(start: int, row: int, batches: Iterable[Any]) -> Generator[tuple[int, Any], None, int]:
    """(first row, batch) of batches that begin at `row`, those before the start left out; returns the row behind."""
    for batch in batches:
        skipped = min(max(start - row, 0), batch.num_rows)
        if skipped < batch.num_rows:
            yield row + skipped, batch.slice(skipped)
        row += batch.num_rows
    return row


def _smaller(batches: Iterable[tuple[int, Any]], size: int) -> Iterator[tuple[int, Any]]:
    for first, batch in batches:
        step = _rows(size, batch.nbytes, batch.num_rows)
        yield from ((first + low, batch.slice(low, step)) for low in range(0, batch.num_rows, step))


def _rows(size: int, nbytes: int, rows: int) -> int:
    """Rows that make about `size` bytes."""
    return max(1, min(rows, ROWS, size * rows // max(nbytes, 1)))


def _texts(batch: Any, keys: Sequence[str], longest: int) -> list[dict[str, list[str]] | str]:
    """What each row holds, or why it has nothing; where something is wrong, row by row."""
    missing = [key for key in keys if key not in batch.schema.names]
    if missing:
        return [f"has no column {missing[0]!r}"] * batch.num_rows
    try:
        batch.validate(full=True)                               # no offset leads elsewhere
        if batch.nbytes > longest:
            raise ValueError(f"is longer than {longest:,} bytes; cut it in pieces")
        columns = [batch.column(key).to_pylist() for key in keys]
        return [{key: strings(value, key) for key, value in zip(keys, row, strict=True)}
                for row in zip(*columns, strict=True)]
    except (ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError) as error:
        if batch.num_rows == 1:
            return [line_of(error)]
        return [text for i in range(batch.num_rows) for text in _texts(batch.slice(i, 1), keys, longest)]


def strings(value: object, key: str) -> list[str]:
    """The texts (Megatron's sequences) of a value: one, or a list of them. Raises ValueError."""
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
