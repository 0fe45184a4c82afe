"""Where text comes from: files of any kind -> chunks of raw documents, in order, from any place -> texts by key.

    kind       files                                a document is               its place
    lines      .jsonl .ndjson, .json on its own     a line of JSON              FILE:line
    text       everything else                      the whole file              FILE
    blocks     with --input-format blocks           lines up to a blank one     FILE:line
    parquet    .parquet                             a row                       FILE:row
    arrow      .arrow .feather .ipc                 a row                       FILE:row

All but the tables may be compressed (.gz .zst .bz2 .xz), and all may be URLs. Whoever reads holds one chunk; what to do
with it (parse, encode) can happen in another process. No document is longer than LONGEST, or than whoever asks has
memory for: a few packed bytes could stand for more than there is.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import orjson

from megazero.base import UserError
from megazero.corpus.tables import Misplaced, Question, TableReader, strings
from megazero.data import STDIN, Opened, expand, is_damage, is_packed, line_of, suffix_of

CHUNK = 1 << 18                 # bytes: a worker's round trip costs nothing, and a few of them keep all workers busy
LONGEST = 1 << 26               # bytes of a document: as text it may have four times as many
PIECE = 1 << 20                 # bytes of a line that are read at once
TAIL = 1 << 12                  # bytes before a place that show whether a document ends there
BLANK = re.compile(rb"^[^\S\n]*\n", re.MULTILINE)
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
    packed = next((s.path for s in sources if s.kind not in READERS and is_packed(s.path)), None)
    if packed:
        raise UserError(f"--input {packed}: a table is read at many places and cannot be compressed as a whole; unpack "
                        "it first, its columns are compressed within.")
    text = next((source.path for source in sources if source.kind in ("text", "blocks")), None)
    if text and "text" not in json_keys:
        raise UserError(f"--json-keys {' '.join(json_keys)}: {text} has no keys but text; "
                        "add text or leave the file out.")
    return sources


def _expanded(name: str) -> tuple[list[str], bool]:
    try:
        files, is_folder = expand(name)
    except OSError as error:
        raise UserError(f"--input {name}: cannot be listed ({error.strerror}).") from None
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


def read_chunks(
    sources: Sequence[Input], keys: Sequence[str], start: Place, longest: int | None = None
) -> Iterator[Chunk]:
    """The documents of the sources from a place on, in order, those of more than `longest` bytes (or LONGEST) as a
    problem; of tables the columns `keys`.
    Raises UserError for a file that cannot be opened, Misplaced for a place where no document begins."""
    most = min(longest or LONGEST, LONGEST)
    with closing(TableReader()) as tables:
        for number in range(start.source, len(sources)):
            source, place = sources[number], start if number == start.source else Place(number)
            chunks = READERS[source.kind](source, place, most) if source.kind in READERS else _rows(
                source, place, keys, tables, most)
            yield from _to_damage(source, place, chunks)


def _to_damage(source: Input, last: Place, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks, and where something is broken, one that says so."""
    try:
        for chunk in chunks:
            last = chunk.after
            yield chunk
    except Exception as error:
        if is_damage(error):
            why = f"is damaged, nothing after this can be read ({line_of(error)})"
            yield Chunk(source, last.line, b"", Place(last.source + 1), 0, why)
        elif isinstance(error, OSError):
            raise UserError(f"--input {source.path}: cannot be read ({error.strerror}).") from None
        else:
            raise


def _too_long(longest: int) -> str:
    return f"is longer than {longest:,} bytes; cut it in pieces"


def _lines(source: Input, at: Place, longest: int) -> Iterator[Chunk]:
    """Only \\n ends a line, not U+2028 or a lone \\r."""
    return _pieces(source, at, longest, lambda raw: raw.rfind(b"\n") + 1, lambda is_blank: True)


def _blocks(source: Input, at: Place, longest: int) -> Iterator[Chunk]:
    """Lines up to a blank one."""
    return _pieces(source, at, longest, lambda raw: max((m.end() for m in BLANK.finditer(raw)), default=0),
                   lambda is_blank: is_blank)


def _pieces(
    source: Input, at: Place, longest: int, last: Callable[[bytes], int], ends: Callable[[bool], bool]
) -> Iterator[Chunk]:
    """About CHUNK bytes at a time, and then the rest of the document that was cut. `last`: where the last document of
    some bytes begins; `ends`: does a line, blank or not, end it?"""
    with Opened(source.path) as file:
        begins = _skipped(file, at.offset, last)
        while raw := file.some(CHUNK):
            if not begins:
                raise Misplaced(f"no document begins at byte {at.offset:,} of {source.path}")
            cut = last(raw)
            before = Place(at.source, at.offset + cut, at.line + raw.count(b"\n", 0, cut))
            whole = Chunk(source, at.line, raw[:cut], before, file.tell())
            try:
                rest, size, lines = _rest(file.bytes, raw.endswith(b"\n"), ends, longest - len(raw) + cut)
            except Exception:
                yield whole                                     # what stands before it is not lost
                raise
            begun, at = at, Place(at.source, at.offset + len(raw) + size, at.line + raw.count(b"\n") + lines)
            if rest is not None:
                yield Chunk(source, begun.line, raw + rest, at, file.tell())
                continue
            yield whole
            yield Chunk(source, before.line, b"", at, file.tell(), _too_long(longest))


def _skipped(file: Opened, offset: int, last: Callable[[bytes], int]) -> bool:
    """Goes to byte `offset` of what is inside; does a document end there? Raises Misplaced."""
    size = min(offset, TAIL)
    try:
        file.skip(offset - size)
        raw = file.some(size)
    except Exception as error:
        if not is_damage(error):
            raise
        raw = b""
    if len(raw) < size:
        raise Misplaced(f"{file.path} ends before byte {offset:,}")
    return last(raw) == size


def _rest(file: Any, begins: bool, ends: Callable[[bool], bool], room: int) -> tuple[bytes | None, int, int]:
    """(bytes up to the end of a document, None where they are more than `room`; how many they are; their lines).
    `begins`: is the next byte the first of a line?"""
    parts: list[bytes] = []
    size, lines, blank = 0, 0, begins
    while part := file.readline(PIECE):
        size, blank = size + len(part), blank and part.isspace()
        if size <= room:
            parts.append(part)
        else:
            parts.clear()
        if part.endswith(b"\n"):
            lines += 1
            if ends(blank):
                break
            blank = True
    return b"".join(parts) if size <= room else None, size, lines


def _text(source: Input, at: Place, longest: int) -> Iterator[Chunk]:
    with Opened(source.path) as file:
        parts, size = [], 0
        while size <= longest and (part := file.bytes.read(PIECE)):
            parts.append(part)
            size += len(part)
        is_longer = size > longest
        yield Chunk(source, 0, b"" if is_longer else b"".join(parts), Place(at.source + 1), file.tell(),
                    _too_long(longest) if is_longer else "")


def _rows(source: Input, at: Place, keys: Sequence[str], tables: TableReader, longest: int) -> Iterator[Chunk]:
    question = Question(source.kind, source.path, at.offset, tuple(keys), CHUNK, longest)
    for rows in tables.rows(question):
        yield Chunk(source, rows.first + 1, rows.raw, Place(at.source, rows.end, rows.end + 1), rows.read)


READERS: Mapping[str, Callable[[Input, Place, int], Iterator[Chunk]]] = {
    "lines": _lines, "text": _text, "blocks": _blocks}


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
    for number, texts in enumerate(orjson.loads(chunk.raw), start=chunk.first):
        yield texts if isinstance(texts, dict) else Unreadable(f"{_place(chunk, number)}: {texts}")


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
    return {key: strings(data[key], key) for key in keys}
