"""What strangers' files say, looked at before it is believed: JSON, YAML and TOML without keys that stand twice, of a
size that is known before it is read; and the form that what was read must have."""

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Number
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST = 2**28             # bytes of a file that is read at once: indexes, configurations, tokenizers are far below
MOST = 2**23                # values of a text: the largest tokenizers have a quarter of that
DEEPEST = 100               # levels of lists and mappings: whoever walks or writes the value again has room for them

# What a value must be: a type (float: any finite number), a range of whole numbers, a pattern that a string matches as
# a whole, [form] for a list, {str: form} for a mapping by names, {"key": form, "key?": form} for known keys (others are
# left to whoever knows them), None, or a tuple of alternatives.
Form = Any


def read_bytes(path: Path, most: int = LONGEST) -> bytes:
    """A regular file as a whole. Raises OSError, or ValueError if it is something else or longer than `most`."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is not a regular file")
    if found.st_size > most:
        raise ValueError(f"has {found.st_size:,} bytes, more than {most:,}")
    with path.open("rb") as file:
        return file.read(found.st_size)


def inside(path: Path) -> Path:
    """The path, if it is no link that leads out of its folder. Raises ValueError. In a cache of Hugging Face files are
    links from snapshots/REVISION to the blobs of the same repository."""
    home, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    blobs = [above.with_name("blobs") for above in home.parents if above.name == "snapshots"]
    if not (target.is_relative_to(home) or target.parent in blobs):
        raise ValueError("is a link that leads out of its folder")
    return path


def load(path: Path, form: Form = dict, most: int = LONGEST, infinite: bool = False) -> Any:
    """What a .json, .yaml or .toml file holds, of this form. Raises OSError, or ValueError that says what is wrong."""
    return checked(loads(read_bytes(path, most), path.suffix, infinite), form)


def loads(text: str | bytes, kind: str = ".json", infinite: bool = False) -> Any:
    """What a text holds. Raises ValueError that says what is wrong: keys that stand twice too. JSON has no infinity;
    where Python wrote it, which says Infinity, it may be asked for."""
    if kind not in PARSERS:
        raise ValueError("its name must end in .toml, .yaml or .json")
    try:
        plain = text if isinstance(text, str) else text.decode("utf-8" if kind == ".json" else "utf-8-sig")
        if sum(map(plain.count, "[{,")) > MOST:                 # before any of it takes a hundred bytes
            raise ValueError(f"holds more than {MOST:,} values")
        value = _shallow(_json(plain, infinite) if kind == ".json" else PARSERS[kind](plain))
        if re.search(r"\\u[dD][89a-fA-F]|\\U0000[dD]", plain):
            json.dumps(value, ensure_ascii=False, default=str).encode()         # half a character stands for none
        return value
    except UnicodeError:
        raise ValueError("is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _shallow(value: Any) -> Any:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError("is nested too deeply")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {said(key)} stands twice")
        found[key] = value
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")


def _finite(digits: str) -> float:
    return float(digits) if abs(float(digits)) <= sys.float_info.max else _no_number(digits[:60])


def _json(text: str, infinite: bool = False) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=float if infinite else _no_number,
                      parse_float=_finite)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases: a text of some lines could stand for gigabytes."""

        deep = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1} repeats an anchor; write it out")
            self.deep += 1
            if self.deep > DEEPEST + 1:                         # here already: its scanner is slow in the depth
                raise ValueError("is nested too deeply")
            node = super().compose_node(parent, index)
            self.deep -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = [(self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value]
            return _once([(checked(key, str, "a key"), value) for key, value in pairs])

    try:
        return yaml.load(text, Loader)                          # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise
    except Exception as error:                                  # of a tag whose value is none: IndexError, KeyError ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if re.search(rf"(?:[\w\"'-]+\s*\.\s*){{{DEEPEST}}}", text):        # its parser is slow in the depth
        raise ValueError("is nested too deeply")
    return tomllib.loads(text)


PARSERS: Mapping[str, Callable[[str], Any]] = {".json": _json, ".yaml": _yaml, ".yml": _yaml, ".toml": _toml}


def checked(value: Any, form: Form, what: str = "") -> Any:
    """The value, if it has the form. Raises ValueError that names the first place where it has not, in `what`."""
    wrong = next(faults(value, form, what), None)
    if wrong:
        raise ValueError(wrong)
    return value


def made(kind: type[T], values: Any, form: Form, what: str = "") -> T:
    """A dataclass of what a file says of its fields. Raises ValueError, also for a field that is not known here."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = next((key for key in checked(values, form, what) if key not in known), None)
    if unknown is not None:
        raise ValueError(f"{what or 'it'} has {_name(unknown)}, which is not known here")
    return kind(**values)


def faults(value: Any, form: Form, at: str = "") -> Iterator[str]:
    """Where a value has not the form: `files.a.bytes is -3, not a whole number from 0`."""
    if isinstance(form, tuple):
        if all(next(faults(value, one), None) for one in form):
            near = next((one for one in form if isinstance(one, type(value))), None)
            yield from [_sentence(value, form, at)] if near is None else faults(value, near, at)
    elif isinstance(form, Mapping):
        if not isinstance(value, Mapping):
            yield _sentence(value, form, at)
        elif str in form:
            for key, inner in value.items():
                yield from faults(key, str, f"a key of {at or 'it'}")
                yield from faults(inner, form[str], f"{at}.{_name(key)}".lstrip("."))
        else:
            for key, inner in form.items():
                name = key.rstrip("?")
                if name in value:
                    yield from faults(value[name], inner, f"{at}.{name}".lstrip("."))
                elif name == key:
                    yield f"{at or 'it'} has no {name}"
    elif isinstance(form, list):
        if isinstance(value, list):
            for i, inner in enumerate(value):
                yield from faults(inner, form[0], f"{at}[{i}]")
        else:
            yield _sentence(value, form, at)
    elif not _is(value, form):
        yield _sentence(value, form, at)


def _is(value: Any, form: Form) -> bool:
    if form is None or isinstance(value, bool):
        return value is form or form is type(value)
    if isinstance(form, range):
        return isinstance(value, int) and value in form
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if form is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, form)


def _sentence(value: Any, form: Form, at: str) -> str:
    return f"{at or 'it'} is {said(value)}, not {_words(form)}"


def said(value: Any) -> str:
    """A stranger's value as a sentence may show it: in quotes if it is text, on one line, not long."""
    try:
        shown = repr(value)
    except ValueError:                                          # Python prints no number of thousands of digits
        shown = "a number of thousands of digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def printable(text: str, most: int = 1000) -> str:
    """A stranger's text on one line that people may read to its end, with nothing that a terminal would obey."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= most else shown[:most] + "..."


def _name(key: Any) -> str:
    return said(key).strip("'\"")


def _words(form: Form) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_words, form))
    if isinstance(form, range):
        return f"a whole number from {form.start}" + (f" to {form.stop - 1}" if form.stop < 2**62 else "")
    if isinstance(form, re.Pattern):
        return f"a word like {form.pattern}"
    if isinstance(form, (list, Mapping)):
        return "a list" if isinstance(form, list) else "a mapping"
    return {None: "null", int: "a whole number", float: "a number", Number: "a number", str: "a word",
            bool: "true or false", dict: "a mapping", list: "a list"}.get(form, "something else")
