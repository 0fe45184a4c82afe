"""The judge of the fuzzers finds what it should."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from fuzz.support import ODD, accident, bent, files_of, forged, judge, spoiled
from megazero.base.errors import UserError


def told(sentence: str) -> Callable[[], None]:
    def raises() -> None:
        raise UserError(sentence)
    return raises


def looping() -> None:
    while True:
        pass


@pytest.mark.parametrize(("use", "fault"), [
    (lambda: 5, ""), (told("a file: is damaged; fetch it again."), ""), (lambda: 6, "not what it should be: 6"), (lambda: 1 / 0, "ZeroDivisionError"),
    (told("two\rlines, or more"), "no plain sentence"), (lambda: open("/etc/hostname").close() or 5, "opened /etc/hostname"), (looping, "Hang"),  # noqa: SIM115
    (lambda: time.sleep(9), "Hang"), (lambda: bytearray(2**31), "MemoryError"), (lambda: torch.empty(2**29), "allocate memory")])
def test_the_judge_finds_each_fault(use: Callable[[], Any], fault: str, tmp_path: Path) -> None:
    found = judge(use, lambda value: value == 5, [tmp_path], seconds=0.2)
    assert fault in found and bool(fault) == bool(found)


def test_damage_is_seeded_and_changes_something(tmp_path: Path) -> None:
    value = {"a": [1, 2, {"b": "text"}], "c": None, "d": 0.5}
    for number in range(200):
        one, two = (forged(Random(number), value) for _ in range(2))
        assert repr(one) == repr(two) and value == {"a": [1, 2, {"b": "text"}], "c": None, "d": 0.5}
        assert spoiled(Random(number), value) == spoiled(Random(number), value)
        assert bent(Random(number), b"abcdefgh" * 9) == bent(Random(number), b"abcdefgh" * 9)
    assert len({repr(forged(Random(number), value)[0]) for number in range(200)}) > 100 and len(ODD) > 40
    (tmp_path / "a").write_bytes(b"a" * 99)
    accident(Random(1), tmp_path)
    assert files_of(tmp_path) != [tmp_path / "a"] or (tmp_path / "a").read_bytes() != b"a" * 99
