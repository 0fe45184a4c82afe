"""Logs that outlive what happens to the disk under them: metrics.jsonl and TensorBoard's event files.

Both are bytes that are only ever appended. What cannot be written waits in memory and is tried again with the next
record, behind what was surely there, so that nothing is torn and nothing stands twice; people are told once when it
begins and once when it is over.
"""

import errno
import io
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megazero.base import checked, loads, not_followed, opened, say

Encode = Callable[[Mapping[str, Any]], bytes]
WAITING = 1_000_000         # records that may wait; older ones are lost


class Log:
    """One file. `begin` is called when it can first be opened, and leaves it as this run shall find it; `head` is what
    a new one starts with."""

    def __init__(self, path: Path, encode: Encode, begin: Callable[[Path], None] = lambda _: None,
                 head: bytes = b"") -> None:
        self.path, self.encode, self.begin, self.head = path, encode, begin, head
        self.waiting: deque[bytes] = deque(maxlen=WAITING)
        self.file: io.FileIO | None = None
        self.size: int | None = None                            # bytes of it that are surely there, once it was opened
        self.failed = False
        self._try()

    def add(self, record: Mapping[str, Any]) -> None:
        self.waiting.append(self.encode(record))
        self._try()

    def _try(self) -> None:
        try:
            self._write()
        except OSError as error:
            if not self.failed:
                say(f"warning: {self.path} cannot be written ({error.strerror}); training goes on, and what is to be "
                    "logged there waits")
            self.failed, self.file = True, None
            return
        if self.failed:
            say(f"{self.path} is written again")
        self.failed = False

    def _write(self) -> None:
        file = self.file
        if file is None or os.fstat(file.fileno()).st_nlink == 0:               # never opened, failed, or deleted
            file = self.file = self._opened()
        data = memoryview(b"".join(self.waiting))
        while data:                                             # a disk that is nearly full takes a part
            data = data[file.write(data) or 0:]
        self.size = file.tell()
        self.waiting.clear()

    def _opened(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.size is None:
            self.begin(self.path)
        file = io.FileIO(self.path, "ab", opener=not_followed)
        there = os.fstat(file.fileno()).st_size
        self.size = there if self.size is None else min(there, self.size)
        file.truncate(self.size)
        if self.size == 0:
            file.write(self.head)
        self.size = file.seek(0, io.SEEK_END)
        return file

    def close(self) -> None:
        self._try()
        if self.failed:
            say(f"warning: {self.path}: {len(self.waiting):,} records could not be written")


def metrics_log(folder: Path, resumed: int | None) -> Log:
    """A line of JSON for each record, floats exact. What an earlier run logged beyond step `resumed` is kept aside, as
    is the whole of an older file by a run that starts afresh; None: records are added to what is there."""
    return Log(folder / "metrics.jsonl", lambda record: (json.dumps(record) + "\n").encode(),
               lambda path: None if resumed is None else continued(path, resumed))


def board_log(folder: Path, resumed: int | None) -> Log:
    """TensorBoard's format: train/loss and so on of train's records, valid/loss of an evaluation's. TensorBoard forgets
    what earlier files say beyond step `resumed`."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    def framed(**content: Any) -> bytes:
        buffer = io.BytesIO()
        RecordWriter(buffer).write(Event(wall_time=time.time(), **content).SerializeToString())
        return buffer.getvalue()

    def encode(record: Mapping[str, Any]) -> bytes:
        prefix = record.get("split", "train")
        values = [Summary.Value(tag=f"{prefix}/{name}", simple_value=float(value))
                  for name, value in record.items() if name not in ("step", "split")]
        return framed(step=record["step"], summary=Summary(value=values))

    head = framed(file_version="brain.Event:2")
    if resumed is not None:
        head += framed(step=resumed + 1, session_log=SessionLog(status=SessionLog.START))
    name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
    return Log(folder / "tensorboard" / name, encode, _own_folder, head)


def continued(path: Path, resumed: int) -> None:
    """Cuts a file of lines behind the last line of step `resumed`, and keeps what was cut aside where there is room;
    moves all of it aside for a run that starts afresh."""
    if not os.path.lexists(path):
        return
    names = (path.with_name(f"metrics-{n}.jsonl") for n in range(1, 100_000))
    aside = next(p for p in names if not os.path.lexists(p))    # a link that leads nowhere yet is there, too
    if resumed == 0:
        path.rename(aside)
        return
    with opened(path, "r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or step_of(line) > resumed:
                break
            end += len(line)
        file.seek(end)
        rest = file.read()
        if b"\n" in rest:                                       # more than a line that was torn
            with suppress(OSError):
                with opened(aside, "xb") as kept:
                    kept.write(rest)
                say(f"{path}: what it says beyond step {resumed:,} is kept in {aside.name}")
        file.truncate(end)


def _own_folder(path: Path) -> None:
    """Raises OSError where the folder of a file is a link: whoever laid it would choose where we write."""
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, f"{path.parent.name} is a link to elsewhere")


def step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for one that was torn when its run was killed."""
    try:
        return int(checked(loads(line, infinite=True), {"step": range(2**53)})["step"])
    except ValueError:
        return float("inf")
