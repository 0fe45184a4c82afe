"""What is told once, though many ranks could tell it: through the store where they met."""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from threading import Thread

import torch.distributed as dist

from megazero.base import UserError
from megazero.comm.rendezvous import address, environment, of_this_start, store_at

TICKET = 1.0                # seconds that a rank leaves to others that want to say the same


def say_first(what: str, text: str) -> None:
    """Tells people something that many ranks may have met: the first one does; where nothing was said a second later
    (it died, or a stranger took the word) everybody does."""
    _say(_board(), what, text)


def say_each(what: str, texts: Sequence[str]) -> None:
    """The same for several sentences of one failure; ranks that lose this one have nothing to add to it."""
    store = _board()
    if store is not None:
        store.add(f"word/{what}", 1)
    for text in texts:
        _say(store, text, text)
    _done(store, what)


def swap(rank: int, doing: str, peer: int) -> str:
    """What a peer did when it gave up, as this rank does now: two ranks that wait for each other tell it. Nothing if it
    does not come."""
    store = _board()
    try:
        if store is not None:
            store.set(f"gave up/{rank}", doing)
            time.sleep(TICKET)
            return store.get(f"gave up/{peer}").decode() if store.check([f"gave up/{peer}"]) else ""
    except RuntimeError:                                        # the store went away meanwhile
        pass
    return ""


def _say(store: dist.Store | None, what: str, text: str) -> None:
    if store is None or _first(store, what):
        print(text, file=sys.stderr, flush=True)
        _done(store, what)


def _board() -> dist.Store | None:
    """Nobody listens, or not any more: better twice than never."""
    if environment()[1] == 1:
        return None
    try:
        host, port = address()
        socket.create_connection((host, port), timeout=2).close()       # c10d is noisy when nobody is there
        return of_this_start(store_at(host, port, 2))
    except (OSError, RuntimeError, UserError):
        return None


def _first(store: dist.Store, what: str) -> bool:
    try:
        if store.add(f"word/{what}", 1) == 1:
            return True
        end = time.monotonic() + TICKET
        while time.monotonic() < end:
            if store.check([f"said/{what}"]):
                return False
            time.sleep(0.02)
    except RuntimeError:                                        # the store went away meanwhile
        pass
    return True


def _done(store: dist.Store | None, what: str) -> None:
    try:
        if store is not None:
            store.set(f"said/{what}", "")
    except RuntimeError:
        pass


def leave_with_launcher() -> Callable[[], bool]:
    """A killed torchrun cannot end its ranks: each watches for it, and ends by itself. Returns what says whether it is
    gone: then a peer that is lost is not the reason."""
    launcher, watched = os.getppid(), "TORCHELASTIC_RUN_ID" in os.environ

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_first("failure", f"error: torchrun (process {launcher}) is gone; its ranks leave. What came after "
                                 "the last checkpoint is lost.")
        else:
            time.sleep(TICKET)                                  # else the first rank says that this one is gone
        os._exit(1)

    if watched:
        Thread(target=watch, name="launcher-watch", daemon=True).start()
    return lambda: watched and os.getppid() != launcher
