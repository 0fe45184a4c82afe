"""Who writes to a folder: one at a time, also on file systems that several hosts share.

The lease is a small file that says who holds it; its holder touches it every BEAT seconds. A holder whose process has
ended on this host, or that has not touched it for WATCH seconds by the clock of whoever looks, is gone: its lease is
taken over, and said. All that is asked of a file system is that `link` makes a name once and `rename` replaces it at
once.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from megazero.base.disk import not_followed
from megazero.base.errors import UserError
from megazero.base.strict import checked, loads, printable, read_bytes
from megazero.base.text import say

BEAT, WATCH = 5.0, 30.0     # seconds


class Holder(NamedTuple):
    """What a lease says."""

    run: str                # a name like no other
    host: str
    pid: int
    process: str            # boot, numbering of processes, start: a process as nothing else is ever named

    def __str__(self) -> str:
        return f"run {self.run} on {printable(self.host, 100)}, process {self.pid}"


FORM = {"run": re.compile("[0-9a-f]{8}"), "host": str, "pid": range(2**31), "process": str}


def process_of(pid: int) -> str:
    """"" if it has ended, or there is no telling."""
    try:
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {more[18]}" if state not in "ZX" else ""
    except OSError:
        return ""


class Lease:
    """Held from its making to `close`, or until another took it over because this process did not answer."""

    def __init__(self, path: Path, what: str) -> None:
        """`what`: the flag and what it names, for people. Raises UserError if somebody holds it, OSError if it cannot
        be written."""
        pid = os.getpid()
        self.holder = Holder(secrets.token_hex(4), socket.gethostname(), pid, process_of(pid))
        self.path, self.what = path, what
        self.taken_by: Holder | None = None
        self.renewed = time.monotonic()                         # when it was last seen to be ours
        self._own = path.with_name(f"{path.name}-{self.holder.run}")
        while not self._taken():
            pass
        self._swept()
        self._closed, self._lock = threading.Event(), threading.Lock()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    @contextmanager
    def _written(self) -> Iterator[None]:
        """A file that says what ours will, on the disk under a name of its own, to be linked or renamed."""
        try:
            with self._own.open("w") as file:
                file.write(json.dumps(self.holder._asdict()))
                file.flush()
                os.fsync(file.fileno())
            yield
        finally:
            self._own.unlink(missing_ok=True)

    def _taken(self) -> bool:
        """Is it ours now? If not, others came or went meanwhile. Raises UserError if somebody else holds it."""
        with self._written():
            return self._linked(self.path) or self._followed()

    def _followed(self) -> bool:
        held = self._read()
        gone = held and self._gone(held)
        if held is None or held != self._read():
            return False
        if not gone:
            raise UserError(f"{self.what}: {held} writes there; wait until it has ended, or name another.")
        turn = self.path.with_name(f"{self.path.name}-after-{held.run}")        # one may follow a holder
        if not self._linked(turn):
            time.sleep(0.1)
            if abs(time.time() - _touched(turn)) > WATCH:                       # who was about to follow has died
                turn.unlink(missing_ok=True)
            return False
        try:
            if held != self._read():
                return False
            self._own.replace(self.path)
            say(f"{self.what}: taken over from {held}, which {gone}")
            return True
        finally:
            turn.unlink(missing_ok=True)

    def _linked(self, path: Path) -> bool:
        """Was the name free, and is it now our file's?"""
        try:
            os.link(self._own, path)
        except FileExistsError:
            return self._own.stat().st_nlink == 2 and self._read() == self.holder       # NFS may have lost its answer
        except FileNotFoundError:                               # somebody swept it away
            return False
        except OSError:                                         # a file system without links
            try:
                with path.open("x") as file:
                    file.write(self._own.read_text())
            except FileExistsError:
                return False
        return True

    def _read(self) -> Holder | None:
        """Who holds it, or nobody."""
        try:
            if self.path.is_symlink():
                raise ValueError("is a link")
            text = read_bytes(self.path, 4096)
            if not text and abs(time.time() - _touched(self.path)) < WATCH:     # somebody is about to write it
                time.sleep(0.05)
                return None
            return _holder(text)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{self.path}: is no lease ({error}); delete it if nobody writes there.") from None

    def _swept(self) -> None:
        """Removes what processes left that were killed while they asked. One that still asks writes its file again."""
        for left in self.path.parent.glob(f"{self.path.name}-*"):
            with suppress(OSError):
                try:
                    gone = self._ended(_holder(read_bytes(left, 4096)))
                except ValueError:
                    gone = True                                 # nothing, or half of it
                if gone:
                    left.unlink()

    def _gone(self, held: Holder) -> str:
        """Why a holder is gone, or nothing if it is not."""
        if (ended := self._ended(held)) is not None:
            return "has ended" if ended else ""
        say(f"{self.what}: {held} wrote there; looking for {WATCH:g} s whether it still does")
        seen, end = _touched(self.path), time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH / 10))
            if _touched(self.path) != seen:
                return ""
        return f"has not been heard of for {WATCH:g} s"

    def _ended(self, held: Holder) -> bool | None:
        """Has its process ended? None where that cannot be seen from here."""
        here = self.holder.process.rpartition(" ")[0]
        if not here or held.process.rpartition(" ")[0] != here:
            return None
        return process_of(held.pid) != held.process

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with suppress(OSError, UserError):                  # a disk that does not answer may do so again
                self.renew()

    def renew(self) -> None:
        """Touches it; puts it back where it was deleted. Raises OSError."""
        with self._lock:
            held = self._read()
            if held == self.holder:
                os.utime(self.path)
                self.renewed = time.monotonic()
            elif held is not None:
                self.taken_by = held
            elif not self._closed.is_set():
                with self._written():
                    self._linked(self.path)

    def look(self) -> None:
        """Raises UserError if another took it over. A process that was stopped looks again."""
        if time.monotonic() - self.renewed > 2 * BEAT:
            with suppress(OSError):
                self.renew()
        if self.taken_by:
            raise UserError(f"{self.what}: {self.taken_by} took over, since this process had not been heard of for "
                            f"{WATCH:g} s; this run ends here.")

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        with self._lock, suppress(OSError, UserError):
            if self._read() == self.holder:
                self.path.unlink()


def _holder(text: bytes) -> Holder:
    """Raises ValueError."""
    said = checked(loads(text), FORM)
    return Holder(*(said[key] for key in Holder._fields))


def _touched(path: Path) -> float:
    """When, by the file system's clock; it is opened, for NFS looks again then."""
    try:
        with open(path, "rb", opener=not_followed) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0
