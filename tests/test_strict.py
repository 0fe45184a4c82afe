"""Files that strangers wrote: read once, without a second meaning, and of the form that is asked for."""

import os
import re
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

import pytest

from megazero.base import inside, load
from megazero.base.strict import checked, loads, made

BAD: dict[str, tuple[str, str, str]] = {            # what -> (suffix, text, what is said)
    "a key twice": (".json", '{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice"),
    "a key twice in YAML": (".yaml", "a:\n  b: 1\n  b: 2\n", "key 'b' stands twice"),
    "a key twice in TOML": (".toml", "a = 1\na = 2\n", "overwrite"),
    "no number": (".json", '{"a": NaN}', "NaN is not a number"),
    "too large a number": (".json", '{"a": 1e999}', "1e999 is not a number"),
    "deep lists": (".json", "[" * 100_000, "nested too deeply"),
    "not so deep lists": (".json", "[" * 102 + "]" * 102, "nested too deeply"),
    "YAML that ends on two lines": (".yaml", "a: [1,\n  b: c", "while parsing a flow"),
    "a strange key twice": (".json", r'{"\u001b[2J": 1, "\u001b[2J": 2}', r"key '\x1b[2J' stands twice"),
    "deep YAML": (".yml", "[" * 5_000, "nested too deeply"),
    "half a character": (".json", r'{"a": "\ud800"}', "is not UTF-8"),
    "an alias": (".yaml", "a: &x [1, 1]\nb: [*x, *x]\n", "line 2 repeats an anchor"),
    "a whole number of nothing": (".yaml", 'a: !!int ""\n', "index out of range"),
    "a truth of nothing": (".yaml", "a: !!bool foo\n", "foo"),
    "a time of nothing": (".yaml", "a: !!timestamp foo\n", "group"),
    "a date as a key": (".yaml", "2001-01-01: 1\n", "a key is datetime.date(2001, 1, 1), not a word"),
    "a long number in hex": (".yaml", "a: 0x" + "f" * 5000 + "\n2: 3\n", "a key is 2, not a word"),
    "deep TOML": (".toml", "a." * 20_000 + "a = 1\n", "nested too deeply"),
    "a list as a key": (".yaml", "? [1, 2]\n: 3\n", "a key is [1, 2], not a word"),
    "an object": (".yaml", "a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    "no JSON": (".json", "{", "Expecting"),
    "a long number": (".json", "9" * 5000, "digits"),
    "many values": (".json", "[" + "[]," * 2**23 + "[]]", "holds more than 8,388,608 values"),
    "no format": (".ini", "a", "must end in"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_has_two_meanings_or_none_is_refused(what: str) -> None:
    kind, text, said = BAD[what]
    with pytest.raises(ValueError, match=re.escape(said)):
        loads(text, kind)


def test_pairs_of_surrogates_and_plain_values_are_read() -> None:
    assert loads(r'{"a": "\ud83d\ude00", "b": [1, 2.5, null, true]}') == {"a": "😀", "b": [1, 2.5, None, True]}
    assert loads("a: {b: [1, x]}\nc: null\n", ".yaml") == {"a": {"b": [1, "x"]}, "c": None}


def test_infinity_is_read_where_python_wrote_it() -> None:
    assert loads('{"a": Infinity, "b": [-Infinity]}', infinite=True) == {"a": float("inf"), "b": [float("-inf")]}
    with pytest.raises(ValueError, match="a is inf, not a number"):
        checked(loads('{"a": Infinity}', infinite=True), {"a": float})


def test_only_regular_files_of_a_known_size_are_read(tmp_path: Path) -> None:
    """A pipe would wait for ever, and a long file fill the memory."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "long.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(ValueError, match="not a regular file"):
        load(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="has 1,009 bytes, more than 1,000"):
        load(tmp_path / "long.json", most=1000)
    assert load(tmp_path / "long.json") == {"a": "x" * 1000}


def test_a_link_must_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    """But for the cache of Hugging Face, in which every file is a link to a blob of the same repository."""
    revision, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    revision.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "cafe").write_text("{}")
    (revision / "config.json").symlink_to("../../blobs/cafe")
    (revision / "same.json").symlink_to("config.json")
    (tmp_path / "plain.json").write_text("{}")
    (tmp_path / "linked").symlink_to(revision)
    for path in (revision / "config.json", revision / "same.json", tmp_path / "plain.json", tmp_path / "linked" / "config.json", tmp_path / "absent"):
        assert inside(path) is path
    (revision / "out.json").symlink_to(tmp_path / "plain.json")
    (revision / "up.json").symlink_to("../../../plain.json")
    (tmp_path / "out.json").symlink_to("/absent")
    for path in (revision / "out.json", revision / "up.json", tmp_path / "out.json"):
        with pytest.raises(ValueError, match="^is a link that leads out of its folder$"):
            inside(path)


FORM = {"step": range(2**62), "name?": re.compile("[a-z]+"), "files": {str: {"bytes": range(2**62)}}, "sizes": [int], "rate": (float, None), "any?": (None, bool, Number, str),
        "more": (None, {"a": int})}
GOOD = {"step": 3, "files": {"a": {"bytes": 4}}, "sizes": [1, -2], "rate": 1, "more": None}


@pytest.mark.parametrize(("change", "said"), {
    "step=-1": "step is -1, not a whole number from 0", "step=True": "step is True, not a whole number", "step=3.0": "step is 3.0, not",
    "name=A1": "name is 'A1', not a word like [a-z]+", "files=[]": "files is [], not a mapping",
    "files={'b': {'bytes': 'x'}}": "files.b.bytes is 'x', not", "files={'b': {}}": "files.b has no bytes",
    "sizes=[1, None]": "sizes[1] is None, not a whole number", "sizes=3": "sizes is 3, not a list",
    "rate='x'": "rate is 'x', not a number or null", "rate=1e999": "rate is inf", "rate=True": "rate is True, not a number or null",
    "any={}": "any is {}, not null or true or false or a number or a word",
    "rate=10**400": "rate is 1000", "files={'\\x1b[2J': {}}": r"files.\x1b[2J has no bytes", "more={'a': 'b'}": "more.a is 'b', not a whole number",
}.items())
def test_a_value_has_its_form_or_the_place_is_named(change: str, said: str) -> None:
    key, _, text = change.partition("=")
    value: Any = text if text[0].isupper() and text not in ("True", "None") else eval(text)
    assert checked(GOOD, FORM) is GOOD
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        checked({**GOOD, key: value}, FORM)
    with pytest.raises(ValueError, match="it has no step"):
        checked({k: v for k, v in GOOD.items() if k != "step"}, FORM)


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


def test_a_dataclass_is_made_of_fields_that_it_has() -> None:
    form = {"x": int, "y?": int}
    assert made(Point, {"x": 1}, form) == Point(1) and made(Point, {"x": 1, "y": 2}, form) == Point(1, 2)
    for values, said in (({"x": 1, "z": 2}, "the point has z, which is not known here"), ({"y": 1}, "the point has no x"), ({"x": "1"}, "the point.x is '1'")):
        with pytest.raises(ValueError, match=said):
            made(Point, values, form, "the point")


@pytest.mark.parametrize(("end", "text"), [(".yaml", "a: 1"), (".toml", "a = 1")])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, end: str, text: str) -> None:
    (tmp_path / f"x{end}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(tmp_path / f"x{end}") == {"a": 1}
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')    # which JSON itself forbids
    with pytest.raises(ValueError, match="BOM"):
        load(tmp_path / "x.json")
