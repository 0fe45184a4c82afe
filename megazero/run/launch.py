"""How the program begins on a rank, and how it ends: each end in its own words, told once, with its exit code."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from megazero.base import UserError
from megazero.comm import Stuck, environment, leave_with_launcher, no_place, say_each, say_first
from megazero.run.failures import Failure
from megazero.run.loop import ASKING
from megazero.run.train import main
from megazero.settings import Config


def launch(config: Callable[[], Config], told: Callable[[], Sequence[str]] = tuple) -> NoReturn:
    """Runs the program on this rank. A mistake or a failure is told once, by the rank that met it first; exit codes 2
    and 1. `told`: what became of the words of its command line."""
    if wrong := no_place():
        print(f"error: {wrong}", file=sys.stderr, flush=True)
        sys.exit(2)
    launcher_is_gone = leave_with_launcher()
    try:
        asked = config()
        with told_when_terminated(asked):
            main(asked, told())
    except UserError as error:
        say_each("failure", [f"error: {sentence}" for sentence in error.sentences])
        leave(2)
    except (Stuck, Failure) as error:
        if launcher_is_gone():
            time.sleep(5)                                       # who watches for it says so, and ends this process
        say_first("failure", f"error: {error}")
        leave(1)
    except KeyboardInterrupt:
        say_first("failure", "interrupted: what came after the last checkpoint is lost; --exit-signal-handler saves "
                             "before it stops")
        leave(130)
    except Exception:
        say_first("failure", f"rank {environment()[0]} failed:\n{traceback.format_exc()}")
        leave(1)
    sys.exit(0)


@contextmanager
def told_when_terminated(asked: Config) -> Iterator[None]:
    """SIGTERM ends the process as ever, but says so: though the main thread may wait for peers, where no handler of
    Python runs. With --exit-signal-handler so do the signals that the loop hears instead, until it does."""
    asking = asked.training.exit_signal_handler
    watched = [getattr(signal, name) for name in (ASKING if asking else ("SIGTERM",))
               if hasattr(signal, name) and name != "SIGINT"]
    out, into = os.pipe()
    os.set_blocking(into, False)

    def ours(*_: object) -> None:
        """Who wakes the watch has been told by the number already."""

    def watch() -> None:
        while number := os.read(out, 1)[0]:
            if number in watched and signal.getsignal(number) is ours:          # else the loop hears it
                name = signal.Signals(number).name
                lost = "if anything did, is lost" if asking else "is lost; --exit-signal-handler saves before it stops"
                say_first("failure", f"terminated ({name}): what came after the last checkpoint{',' * asking} {lost}")
                os._exit(128 + number)

    before = {number: signal.signal(number, ours) for number in watched}
    signal.set_wakeup_fd(into)
    thread = threading.Thread(target=watch, name="terminated", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(into, b"\0")
        thread.join()
        os.close(out)
        os.close(into)


def leave(code: int) -> NoReturn:
    """Ends the process; with peers at once, since cleaning up would wait for them."""
    with suppress(OSError):
        sys.stdout.flush()
    if environment()[1] > 1:
        os._exit(code)
    sys.exit(code)
