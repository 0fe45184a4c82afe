"""What fuzzers share: seeded damage of bytes, JSON and folders, and the judge that runs a case under limits.

A fuzzer of one more kind of input is a small file: a good folder made once, a function that damages a copy of it and says how, one that
uses it, one that knows what a good one gives; then `hunt`, whose sizes are `cases`. A case is known by name and number, so that it can be run again.
"""

import copy
import json
import os
import resource
import shutil
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megazero.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# What stands where something else should: other types, borders of sizes, names that lead elsewhere, what a terminal would obey, bulk.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 127, 128, 2**31, 2**38, 2**53, 2**63, 2**64, 10**9, 10**30, 0.5, -0.5, 1e-320, 1e300, -1e300, "", " ", "x", "0", "-1",
    "../../x", "..", "/etc/hostname", "a/b", "a\\b", "x\0y", "\x1b[2J", "two\nlines", "\u202e", "\ud800", "9" * 400, "x" * 3000, [], [[]], [0] * 9, [None],
    {}, {"": 0}, [{}], [2**38, 2**38], [-1, -1], list(range(3000)))


class Hang(BaseException):
    """A case took too long. No Exception, so that nobody catches it by the way."""


def cases(usual: int, full: int) -> Any:
    """Decorates a test that takes `count`: the default run has the usual number, `-m full` the other."""
    return pytest.mark.parametrize("count", [usual, pytest.param(full, marks=pytest.mark.full)])


def hunt(name: str, count: int, good: Path, work: Path, damage: Callable[[Random, Path], str], use: Callable[[Path], Any],
         right: Callable[[Any], bool] = lambda _: False, seconds: float = 10.0, memory: int = 2**30) -> None:
    """Asserts that each of `count` damaged copies of the folder `good` gives a sentence, or what is `right`.

    damage(rng, folder) changes a copy and returns how; use(folder) may write to folder.parent and return anything; nothing is read outside of `work`.
    """
    faults = []
    for number in range(count):
        rng, folder = Random(f"{name} {number}"), work / "case" / good.name
        shutil.rmtree(work / "case", ignore_errors=True)
        shutil.copytree(good, folder)
        what = damage(rng, folder)
        fault = judge(lambda: use(folder), right, (work,), seconds, memory)  # noqa: B023 (used at once)
        faults += [f"{name} {number} ({what}): {fault}"] if fault else []
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:20])


def judge(use: Callable[[], Any], right: Callable[[Any], bool], roots: Sequence[Path], seconds: float = 10.0, memory: int = 2**30) -> str:
    """Nothing, if `use` raised UserError in plain sentences or returned what is right, within the limits and without opening files elsewhere;
    else what went wrong."""
    watch = watcher()
    try:
        with watch.over(roots), limited(seconds, memory):
            found = use()
        fault = "" if right(found) else f"not what it should be: {str(found)[:200]}"
    except UserError as error:
        fault = "" if plain(error) else f"no plain sentence: {str(error)!r:.300}"
    except (Exception, Hang, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
    return fault or (f"opened {watch.outside[0]}" if watch.outside else "")


def plain(error: UserError) -> bool:
    """Each sentence on one line, of a length that is read, without what a terminal would obey."""
    return all(line.isprintable() and 10 < len(line) < 2000 for line in str(error).split("\n")) and str(error).count("\n") < 12


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Raises Hang after so many seconds of work, or six times as many by the clock (others may need the processor), and MemoryError (torch: RuntimeError)
    beyond so many bytes more than now."""
    def late(*_: object) -> None:
        raise Hang(f"not done after {seconds:g} s")

    before = [(s, signal.signal(s, late)) for s in (signal.SIGALRM, signal.SIGPROF)]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Watch:
    """Notes what is opened outside of some folders: by the names that Python opens, links not followed."""

    roots: tuple[str, ...] = ()
    outside: list[str] = field(default_factory=list)
    ours: tuple[str, ...] = (str(ROOT), sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/proc", "/sys", "/dev/null", "/dev/urandom")

    def __call__(self, event: str, arguments: Any) -> None:
        if event == "open" and self.roots and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not any(path == root or path.startswith(root + "/") for root in (*self.roots, *self.ours)):
                self.outside.append(path)

    @contextmanager
    def over(self, roots: Sequence[Path]) -> Iterator[None]:
        self.roots, self.outside = tuple(map(str, roots)), []
        try:
            yield
        finally:
            self.roots = ()


@cache
def watcher() -> Watch:
    """The one of this process: an audit hook stays for ever."""
    watch = Watch()
    sys.addaudithook(watch)
    return watch


# ---- bytes and files

def bent(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes with one accident, and its name."""
    at, n = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 64, 512))
    bit = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b"\0"
    name, found = rng.choice((
        ("flip", data[:at] + bit + data[at + 1:]), ("cut", data[:at]), ("cut before", data[at:]), ("lost", data[:at] + data[at + n:]),
        ("zeros", data[:at] + bytes(min(n, len(data) - at)) + data[at + n:]), ("noise", data[:at] + rng.randbytes(n) + data[at + n:]),
        ("twice", data[:at + n] + data[at:]), ("added", data + rng.randbytes(n)), ("empty", b"")))
    return found, f"{name} at {at} of {len(data)}"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def accident(rng: Random, folder: Path) -> str:
    """Damages one file of a folder, as disks, copies and strangers do; returns how."""
    path, other = rng.choice(files_of(folder)), rng.choice(files_of(folder))
    name = path.relative_to(folder)
    kind = rng.choice(("bytes",) * 8 + ("missing", "swapped", "other", "folder", "fifo", "loop", "elsewhere", "device"))
    if kind == "bytes":
        data, how = bent(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{name}: {how}"
    here, there = path.read_bytes(), other.read_bytes()
    path.unlink()
    if kind in ("swapped", "other"):
        path.write_bytes(there)
        if kind == "swapped" and other != path:
            other.write_bytes(here)
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path.name), "device": lambda: path.symlink_to("/dev/zero"),
     "elsewhere": lambda: path.symlink_to("/etc/hostname")}.get(kind, lambda: None)()
    return f"{name}: {kind} {other.relative_to(folder)}"


# ---- JSON

def forged(rng: Random, value: Any, most: int = 3) -> tuple[Any, str]:
    """A copy of a JSON value with one to `most` places changed, and which. The value must be a dict or list that is not empty."""
    found, notes = json.loads(json.dumps(value)), []
    for _ in range(rng.randint(1, most)):
        holder, key, where = place(rng, found)
        if holder is not None:
            notes.append(f"{where} {change(rng, holder, key, found)}")
    return found, "; ".join(notes)


def place(rng: Random, value: Any) -> tuple[Any, Any, str]:
    """(a container, a key of it, its path): each level as likely as the others, so that bulk hides nothing."""
    holder, key, where = None, None, ""
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.75):
        holder, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value, where = holder[key], f"{where}.{str(key)[:40]}"
    return holder, key, where


def change(rng: Random, holder: Any, key: Any, everything: Any) -> str:
    """Changes holder[key]; returns how."""
    old, kind = holder[key], rng.choice(("odd", "odd", "near", "near", "near", "gone", "moved", "other", "deep"))
    if kind == "gone":
        del holder[key]
    elif kind == "moved":                                       # the value under a name that is odd, or elsewhere in the list
        if isinstance(holder, dict):
            holder[rng.choice((f"{key}x", "", "../x", "/etc/hostname", "\x1b[2J", "two\nlines", "x" * 3000))] = holder.pop(key)
        else:
            holder.insert(rng.randrange(len(holder) + 1), holder.pop(key) if rng.random() < 0.5 else old)
    elif kind == "other":                                       # what stands somewhere else
        where, name, _ = place(rng, everything)
        holder[key] = json.loads(json.dumps(where[name])) if where is not None else None
    elif kind == "deep":
        for _ in range(rng.choice((1, 3, 200))):
            old = [old] if rng.random() < 0.5 else {str(key): old}
        holder[key] = old
    else:
        holder[key] = near(rng, old) if kind == "near" else copy.deepcopy(rng.choice(ODD))
    return f"{kind}: {str(holder.get(key) if isinstance(holder, dict) else kind)[:60]}"


def near(rng: Random, value: Any) -> Any:
    """Something of the same type that is not the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 2**20, value * 2**40, value // 2, float(min(value, 1e300)), str(value)[:300]))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at] + chr(rng.choice((0, 10, 32, 48, 65, 0x2028, 0x1F600))) + value[at:], value[:at], value + value, "../" + value, value.upper()))
    if isinstance(value, list):
        return rng.choice((value[:-1], value[1:], value + value[:1], value[::-1], value * 2, [*value, 0], dict(enumerate(map(str, value)))))
    return rng.choice((dict(list(value.items())[:-1]), {**value, "more": 1}, list(value), dict.fromkeys(value)))


def spoiled(rng: Random, value: Any) -> tuple[bytes, str]:
    """JSON text of a value, wrong in ways that values cannot say: keys twice, words that are no numbers, depth, other encodings."""
    text, (holder, key, where) = json.dumps(value), place(rng, value)
    one = json.dumps(holder[key]) if holder is not None else text
    name, found = rng.choice((
        ("twice", text.replace(f"{json.dumps(key)}: {one}", f"{json.dumps(key)}: null, {json.dumps(key)}: {one}", 1).encode()),
        ("nan", text.replace(one, "NaN", 1).encode()), ("infinite", text.replace(one, "-Infinity", 1).encode()),
        ("huge number", text.replace(one, "9" * 5000, 1).encode()), ("1e999", text.replace(one, "1e999", 1).encode()),
        ("deep", text.replace(one, "[" * 100_000 + "]" * 100_000, 1).encode()), ("half a character", text.replace(one, '"\\ud800"', 1).encode()),
        ("more behind", text.encode() + b"{}"), ("utf-16", text.encode("utf-16")), ("mark", b"\xef\xbb\xbf" + text.encode()),
        ("not utf-8", text.encode() + b"\xff"), ("bytes", bent(rng, text.encode())[0])))
    return found, f"{name} {where}"
