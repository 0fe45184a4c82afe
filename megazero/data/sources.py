"""Where text comes from: files of any kind -> chunks of raw documents, in order, from any place -> texts by key.

    kind       files                                a document is               its place
    lines      .jsonl .ndjson, .json on its own     a line of JSON              FILE:line
    text       everything else                      the whole file              FILE
    blocks     with --input-format blocks           lines up to a blank one     FILE:line
    parquet    .parquet                             a row                       FILE:row
    arrow      .arrow .feather .ipc                 a row                       FILE:row

All but the tables may be compressed (.gz .zst .bz2 .xz), and all may be URLs. Whoever reads holds one chunk; what to do
with it (parse, encode) can happen in another process.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import orjson

from megazero.base import UserError
from megazero.data.files import STDIN, Opened, expand, is_damage, library, suffix_of

CHUNK = 1 << 18                 # bytes: a worker's round trip costs nothing, and a few of them keep all workers busy
KINDS: Mapping[str, str] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "parquet",
                            ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
FORMATS = ("auto", "jsonl", "text", "blocks", "parquet", "arrow")

Texts = dict[str, list[str]]    # a document: the texts (Megatron's sequences) of each key


class Input(NamedTuple):
    """An input file and how it is read."""

    path: str
    kind: str


class Place(NamedTuple):
    """Where reading goes on: the source, the byte in it (decompressed; a row in tables),
    the number of the next line or row."""

    source: int = 0
    offset: int = 0
    line: int = 1


class Chunk(NamedTuple):
    """Whole documents of one source, raw."""

    source: Input
    first: int                  # number of the first line or row
    raw: bytes
    after: Place
    read: int                   # bytes of the file that have been read by now, for progress
    problem: str = ""           # nothing more of this source can be read, and why


def find_sources(
    inputs: Sequence[str], json_keys: Sequence[str] = ("text",), input_format: str = "auto"
) -> list[Input]:
    """The files that the inputs name, folders walked in order of names. Raises UserError."""
    sources = [Input(file, _kind(file, is_folder, input_format))
               for name in inputs for files, is_folder in [_expanded(name)] for file in files]
    text = next((source.path for source in sources if source.kind in ("text", "blocks")), None)
    if text and "text" not in json_keys:
        raise UserError(f"--json-keys {' '.join(json_keys)}: {text} has no keys but text; "
                        "add text or leave the file out.")
    return sources


def _expanded(name: str) -> tuple[list[str], bool]:
    files, is_folder = expand(name)
    if not files:
        raise UserError(f"--input {name}: holds no file." if is_folder else f"--input {name}: no such file or folder.")
    return files, is_folder


def _kind(file: str, is_folder: bool, input_format: str) -> str:
    if input_format != "auto":
        return "lines" if input_format == "jsonl" else input_format
    if file == STDIN:
        return "lines"
    suffix = suffix_of(file)
    return "text" if is_folder and suffix == ".json" else KINDS.get(suffix, "text")    # a .json among sources is a text


# ---- reading


def read_chunks(sources: Sequence[Input], keys: Sequence[str], start: Place) -> Iterator[Chunk]:
    """The documents of the sources from a place on, in order; of tables the columns `keys`.
    Raises UserError for a file that cannot be opened."""
    for number in range(start.source, len(sources)):
        source, place = sources[number], start if number == start.source else Place(number)
        last = place
        try:
            for chunk in READERS[source.kind](source, place, keys):
                last = chunk.after
                yield chunk
        except OSError as error:
            if not is_damage(error):
                raise UserError(f"--input {source.path}: cannot be read ({error.strerror}).") from None
            yield _unreadable(source, last, error)
        except Exception as error:
            if not is_damage(error):
                raise
            yield _unreadable(source, last, error)


def _unreadable(source: Input, at: Place, error: Exception) -> Chunk:
    why = f"is damaged, nothing after this can be read ({' '.join(str(error).split())})"
    return Chunk(source, at.line, b"", Place(at.source + 1), 0, why)


def _lines(source: Input, at: Place, keys: Sequence[str]) -> Iterator[Chunk]:
    """Only \\n ends a line, not U+2028 or a lone \\r."""
    yield from _pieces(source, at, lambda file: b"")


def _blocks(source: Input, at: Place, keys: Sequence[str]) -> Iterator[Chunk]:
    yield from _pieces(source, at, lambda file: b"".join(_to_blank(file)))


def _to_blank(file: Any) -> Iterator[bytes]:
    """Lines up to a blank one."""
    while line := file.readline():
        yield line
        if line.isspace():
            return


def _pieces(source: Input, at: Place, rest: Callable[[Any], bytes]) -> Iterator[Chunk]:
    """About CHUNK bytes at a time, and then the rest of the line and of what else was cut."""
    with Opened(source.path) as file:
        file.skip(at.offset)
        offset, line = at.offset, at.line
        while raw := file.bytes.read(CHUNK):
            raw += file.bytes.readline() + rest(file.bytes)
            first, offset, line = line, offset + len(raw), line + raw.count(b"\n")
            yield Chunk(source, first, raw, Place(at.source, offset, line), file.tell())


def _text(source: Input, at: Place, keys: Sequence[str]) -> Iterator[Chunk]:
    with Opened(source.path) as file:
        yield Chunk(source, 0, file.bytes.read(), Place(at.source + 1), file.tell())


def _parquet(source: Input, at: Place, keys: Sequence[str]) -> Iterator[Chunk]:
    """Row groups one after the other; those before the place are not read."""
    parquet = library("pyarrow.parquet", "data", source.path)
    with Opened(source.path) as opened:
        file, row = parquet.ParquetFile(opened.bytes, pre_buffer=False), 0
        present = [key for key in keys if key in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if row + about.num_rows <= at.offset:
                row += about.num_rows
                continue
            size = _rows(about.total_byte_size, about.num_rows)
            yield from _batches(source, at, row, file.iter_batches(size, [group], present), opened)
            row += about.num_rows


def _arrow(source: Input, at: Place, keys: Sequence[str]) -> Iterator[Chunk]:
    ipc = library("pyarrow", "data", source.path).ipc
    with Opened(source.path) as opened:
        is_file = opened.bytes.read(6) == b"ARROW1"
        opened.bytes.seek(0)
        if is_file:
            reader = ipc.open_file(opened.bytes)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(opened.bytes))
        own = (batch.select([key for key in keys if key in batch.schema.names]) for batch in batches)
        yield from _batches(source, at, 0, _smaller(own), opened)


def _rows(size: int, rows: int) -> int:
    """Rows that make about a chunk."""
    return max(1, min(rows, CHUNK * rows // max(size, 1)))


def _smaller(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        step = _rows(batch.nbytes, batch.num_rows) if batch.num_rows else 1
        yield from (batch.slice(low, step) for low in range(0, batch.num_rows, step))


def _batches(source: Input, at: Place, row: int, batches: Iterable[Any], opened: Opened) -> Iterator[Chunk]:
    """Record batches as chunks of Arrow's stream format, those before the place left out."""
    for batch in batches:
        first, row = row, row + batch.num_rows
        if row > at.offset:
            batch = batch.slice(max(at.offset - first, 0))
            first = row - batch.num_rows
            yield Chunk(source, first + 1, _packed(batch), Place(at.source, row, row + 1), opened.tell())


def _packed(batch: Any) -> bytes:
    arrow = library("pyarrow", "data", "a table")
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


READERS: Mapping[str, Callable[[Input, Place, Sequence[str]], Iterator[Chunk]]] = {
    "lines": _lines, "text": _text, "blocks": _blocks, "parquet": _parquet, "arrow": _arrow}


# ---- parsing


class Unreadable(NamedTuple):
    """A document that is left out, and why."""

    sentence: str


def documents(chunk: Chunk, keys: Sequence[str]) -> Iterator[Texts | Unreadable]:
    """The documents of a chunk in order; a blank line is none."""
    if chunk.problem:
        return iter([Unreadable(f"{_place(chunk, chunk.first)}: {chunk.problem}")])
    return PARSERS[chunk.source.kind](chunk, keys)


def _place(chunk: Chunk, number: int) -> str:
    path = "standard input" if chunk.source.path == STDIN else chunk.source.path
    return f"{path}:{number}" if number else path


def _tried(chunk: Chunk, number: int, parse: Callable[[], Texts]) -> Texts | Unreadable:
    """What parsing gives, or the place and reason of a ValueError."""
    try:
        return parse()
    except ValueError as error:
        return Unreadable(f"{_place(chunk, number)}: {error}")


def _parse_lines(chunk: Chunk, keys: Sequence[str]) -> Iterator[Texts | Unreadable]:
    for number, line in enumerate(chunk.raw.split(b"\n"), start=chunk.first):
        if line and not line.isspace():
            try:                                                     # all lines but a few are right, and this is fast
                data = orjson.loads(line)
                texts = {key: [data[key]] for key in keys if type(data[key]) is str}
            except (orjson.JSONDecodeError, KeyError, TypeError):
                texts = {}
            yield texts if len(texts) == len(keys) else _tried(chunk, number, partial(_from_json, line, keys))


def _parse_text(chunk: Chunk, keys: Sequence[str]) -> Iterator[Texts | Unreadable]:
    yield _tried(chunk, 0, lambda: {"text": [_decoded(_no_binary(chunk.raw))]})


def _parse_blocks(chunk: Chunk, keys: Sequence[str]) -> Iterator[Texts | Unreadable]:
    block: list[bytes] = []
    for number, line in enumerate([*chunk.raw.split(b"\n"), b""], start=chunk.first):
        if line.strip():
            block.append(line)
        elif block:
            raw, block, first = b"\n".join(block).removesuffix(b"\r"), [], number - len(block)
            yield _tried(chunk, first, lambda raw=raw: {"text": [_decoded(raw)]})               # type: ignore[misc]


def _parse_rows(chunk: Chunk, keys: Sequence[str]) -> Iterator[Texts | Unreadable]:
    for batch in library("pyarrow", "data", "a table").ipc.open_stream(chunk.raw):
        for row in range(batch.num_rows):
            yield _tried(chunk, chunk.first + row, partial(_from_row, batch, row, keys))


PARSERS: Mapping[str, Callable[[Chunk, Sequence[str]], Iterator[Texts | Unreadable]]] = {
    "lines": _parse_lines, "text": _parse_text, "blocks": _parse_blocks, "parquet": _parse_rows, "arrow": _parse_rows}


def _no_binary(raw: bytes) -> bytes:
    if b"\0" in raw[:8192]:
        raise ValueError("is a binary file")
    return raw


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None


def _from_json(line: bytes, keys: Sequence[str]) -> Texts:
    """The texts of a line by Python's own parser, which takes NaN and a byte-order mark,
    and says what is wrong with the rest."""
    text = _decoded(line)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"is a JSON {type(data).__name__}, expected an object")
    missing = [key for key in keys if key not in data]
    if missing:
        raise ValueError(f"has no key {missing[0]!r}")
    return {key: _strings(data[key], key) for key in keys}


def _from_row(batch: Any, row: int, keys: Sequence[str]) -> Texts:
    missing = [key for key in keys if key not in batch.schema.names]
    if missing:
        raise ValueError(f"has no column {missing[0]!r}")
    return {key: _strings(batch.column(key)[row].as_py(), key) for key in keys}


def _strings(value: object, key: str) -> list[str]:
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
