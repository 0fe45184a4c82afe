"""Logs outlive a disk that is full, a folder that is deleted, a file that fails: nothing is torn, nothing stands twice, nothing is lost."""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import lines, train

from megazero.run import train as program
from megazero.state.logs import board_log, metrics_log

WORDS = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 31 --lr 1e-3 --mock-data --eval-iters 2 --eval-interval 3 --global-batch-size 1"


class Disk:
    """Of a file's writes: room for so many bytes."""

    room = 10**9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Disk]]:
    plain = io.FileIO

    class Small(plain):  # type: ignore[misc, valid-type]
        def write(self, data: Any) -> int:
            if Disk.room == 0:
                raise OSError(28, "No space left on device")
            taken = data[:Disk.room]
            Disk.room -= len(taken)
            return int(super().write(taken))

    monkeypatch.setattr(io, "FileIO", Small)
    Disk.room = 10**9
    yield Disk


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 1, 7, 30])
def test_what_finds_no_room_waits(room: int, disk: type[Disk], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, path = metrics_log(tmp_path, 0), tmp_path / "metrics.jsonl"
    for step in range(1, 10):
        disk.room = {3: room, 7: 10**9}.get(step, disk.room)    # full from step 3 to 6
        log.add({"step": step})
        if 3 <= step < 7:
            assert path.read_text().startswith('{"step": 1}\n{"step": 2}\n')
    log.close()
    assert numbers(path) == [*range(1, 10)]
    assert capsys.readouterr().out == (f"warning: {path} cannot be written (No space left on device); training goes on, and what is to be logged there waits\n"
                                       f"{path} is written again\n")


def test_a_disk_that_is_full_from_the_first_to_the_last_is_told(disk: type[Disk], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk.room = 0
    log = metrics_log(tmp_path, 0)
    for step in range(3):
        log.add({"step": step})
    log.close()
    assert capsys.readouterr().out.endswith(f"warning: {tmp_path / 'metrics.jsonl'}: 3 records could not be written\n")


def test_a_folder_that_was_deleted_comes_back(tmp_path: Path) -> None:
    logs = [log(tmp_path / "log", 0) for log in (metrics_log, board_log)]
    for step in (1, 2, 3):
        if step == 2:
            shutil.rmtree(tmp_path / "log")
        for log in logs:
            log.add({"step": step, "loss": 1.0})
    assert numbers(tmp_path / "log" / "metrics.jsonl") == [2, 3]
    assert curve(tmp_path / "log", "train/loss") == [(2, 1.0), (3, 1.0)]


def test_a_log_goes_on_behind_the_step_it_resumes(tmp_path: Path) -> None:
    """What was torn or logged beyond it is cut without room on the disk, and kept aside where there is; a fresh run keeps an older file."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    log = metrics_log(tmp_path, 2)
    log.add({"step": 3})
    assert numbers(path) == [1, 2, 3] and (tmp_path / "metrics-1.jsonl").read_text() == '{"step": 3}\n{"step": 4}\n{"step": 5, "lo'
    metrics_log(tmp_path, None).add({"step": 2})                # evaluated alone: nothing is cut
    assert numbers(path) == [1, 2, 3, 2]
    metrics_log(tmp_path, 0).add({"step": 1})
    assert numbers(path) == [1] and numbers(tmp_path / "metrics-2.jsonl") == [1, 2, 3, 2]


@pytest.mark.parametrize(("what", "resumed"), [("link", 0), ("link", 3), ("link", None), ("dangling", 0), ("dangling", 3), ("pipe", 3), ("pipe", None), ("aside", 3)])
def test_a_log_is_a_file_of_its_own_folder(what: str, resumed: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through a link a stranger's folder would have another file cut and written; a pipe would wait for ever."""
    victim, path = tmp_path / "victim", tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    if what in ("link", "dangling"):
        path.symlink_to(victim)
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text('{"step": 3}\n{"step": 4}\n')
        path.with_name("metrics-1.jsonl").symlink_to(victim)
    if what == "link":
        victim.write_text('{"step": 9}\n')
    log = metrics_log(path.parent, resumed)
    log.add({"step": 4})
    log.close()
    assert (victim.read_text() if victim.exists() else None) == ('{"step": 9}\n' if what == "link" else None)
    if what == "aside" or resumed == 0:
        assert numbers(path)[-1] == 4 and "warning" not in capsys.readouterr().out
    else:
        assert f"warning: {path} cannot be written (" in capsys.readouterr().out


def test_events_are_not_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to("elsewhere")
    board_log(tmp_path, 0).close()
    assert not [*(tmp_path / "elsewhere").iterdir()] and "(tensorboard is a link to elsewhere)" in capsys.readouterr().out


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_reads_what_a_run_and_its_successor_logged(tmp_path: Path) -> None:
    words = f"{WORDS} --train-iters 6 --save {tmp_path / 'run'} --load {tmp_path / 'run'}"
    train(f"{words} --save-interval 2 --exit-interval 5", tmp_path / "log")
    for number in (5, 4):
        shutil.rmtree(tmp_path / "run" / f"step-{number:08d}", ignore_errors=True)
    train(words, tmp_path / "log")                              # from step 2: what came after is logged anew
    records = lines(tmp_path / "log")
    assert [r["step"] for r in records if "split" not in r] == [1, 2, 3, 4, 5, 6]
    for tag, split in (("train/loss", None), ("valid/loss", "valid")):
        told = [(r["step"], r["loss"]) for r in records if r.get("split") == split]
        assert curve(tmp_path / "log", tag) == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in told]
    assert len(curve(tmp_path / "log", "train/grad_norm")) == 6


def test_a_full_disk_ends_neither_a_run_nor_its_start(disk: type[Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program, "Lease", no_room)
    disk.room = 0
    assert train(f"{WORDS} --train-iters 4", tmp_path / "log") == []
    told = capsys.readouterr().out
    assert told.count("cannot be written (No space left on device); training goes on") == 2 and "done at step 4" in told, told
    assert re.search(r"metrics.jsonl: 6 records could not be written", told)
