"""How the ranks of a run find each other: through a store that torchrun keeps, or rank 0 of ranks that were started by
hand."""

import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread

import torch.distributed as dist

from megazero.base import UserError, say
from megazero.comm.ports import QUIET, first_line, free, reach, unreachable


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def ranks() -> tuple[int, int] | None:
    """(rank, world size) of ranks that have joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None


def no_place() -> str:
    """What is wrong with who this rank is said to be, or nothing."""
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        return ""
    return (f"RANK {rank}, WORLD_SIZE {world}: no place of a rank; they are counted from 0 to WORLD_SIZE - 1, and "
            "torchrun sets both.")


def address() -> tuple[str, int]:
    """Host and port of the store. Raises UserError."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_ADDR {host or '(none)'}, MASTER_PORT {port or '(none)'}: ranks cannot meet there; "
                        "start them with torchrun, and give --master_port a number from 1 to 65535.")
    return host, int(port)


def join(kind: str, seconds: float, words: str) -> None:
    """Joins all ranks of the run over a backend of torch, unless they have. `words`: what all of them must have in
    common. Raises UserError where they have not, or do not come; Stuck where they cannot reach each other."""
    if ranks():
        return
    rank, world = environment()
    end = time.monotonic() + seconds
    store = _opened(rank, end)
    try:
        _gathered(store, rank, world, end, f"{words} {world}")
    except dist.DistError as error:
        raise UserError(f"RANK {rank}: lost the store at {':'.join(map(str, address()))} while it waited for other "
                        f"ranks ({first_line(error)}); see what rank 0 said last.") from None
    try:
        dist.init_process_group(kind, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    except (RuntimeError, OSError) as error:
        raise unreachable(rank, kind, error) from error


def _opened(rank: int, end: float) -> dist.Store:
    """The store, where keys of this start of the run are apart from those of earlier ones (a restarted rank must not
    find the addresses of dead ones)."""
    host, port = address()
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    free(port) if own else reach(host, port, rank, end, os.environ.get("LOCAL_RANK", "0") == "0")
    try:
        store = store_at(host, port, max(end - time.monotonic(), 1), own)
    except RuntimeError as error:
        why = ("is in use here; choose another with --master_port" if own else
               "does not answer as a store of torch; is another program there?")
        raise UserError(f"MASTER_PORT {port}: {why} ({first_line(error)}).") from None
    return of_this_start(store)


def store_at(host: str, port: int, seconds: float, own: bool = False) -> dist.TCPStore:
    """Raises RuntimeError, also where somebody listens who never answers: torch's own time-out does not hold there."""
    found: Future[dist.TCPStore] = Future()

    def make() -> None:
        try:
            found.set_result(dist.TCPStore(host, port, is_master=own, timeout=timedelta(seconds=seconds),
                                           wait_for_workers=False, multi_tenant=own))
        except RuntimeError as error:
            found.set_exception(error)

    Thread(target=make, name="store", daemon=True).start()
    try:
        return found.result(seconds + 1)
    except TimeoutError:
        raise RuntimeError(f"no answer within {seconds:.0f} s") from None


def of_this_start(store: dist.Store) -> dist.Store:
    run, start = (os.environ.get(f"TORCHELASTIC_{word}", "") for word in ("RUN_ID", "RESTART_COUNT"))
    return dist.PrefixStore(f"megazero/{run}/{start}", store)


def _gathered(store: dist.Store, rank: int, world: int, end: float, words: str) -> None:
    """Returns when all ranks are here. Rank 0 says for whom it waits, and leaves last: the store may be its own."""
    store.add("came", 1)
    if store.compare_set("words", "", words) != words.encode():
        store.set("differ", str(rank))
    own = secrets.token_hex(8)
    if store.compare_set(f"here/{rank}", "", own) != own.encode():
        store.set("twice", str(rank))
    elif store.add("here", 1) == world:
        store.set("all", "")
    wait, told, place = QUIET, False, ":".join(map(str, address()))
    while not _comes(store, ("differ", "twice", "all"), min(wait, end - time.monotonic())):
        absent = [r for r in range(world) if not store.check([f"here/{r}"])] if rank == 0 else []
        names = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
        if time.monotonic() > end:
            missing = f"{len(absent)} of {world} ranks ({names})" if absent else "other ranks"
            raise UserError(f"--distributed-timeout-minutes: rank {rank} waited at {place} in vain for {missing}; "
                            "start all of them, at most that long after the first.")
        if absent and not told:
            say(f"waiting for {len(absent)} of {world} ranks at {place}: {names}")
        wait, told = 60.0, True
    differ, twice = (store.get(key).decode() if store.check([key]) else None for key in ("differ", "twice"))
    if differ is None and twice is None:
        return
    store.add("heard", 1)
    end = time.monotonic() + QUIET
    while rank == 0 and store.add("heard", 0) < store.add("came", 0) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(float(rank == 0))                                # others say it through the store
    if differ is not None:
        raise UserError("--config: ranks were started with different flags, files or data, or for different numbers of "
                        "ranks; start all of them with the same command.")
    raise UserError(f"RANK {twice}: two processes were started as this rank; give each a number of its own from 0 to "
                    f"{world - 1}, as torchrun does.")


def _comes(store: dist.Store, keys: Sequence[str], seconds: float) -> bool:
    """Is one of the keys there within this time? It asks again and again: a wait of torch prints a warning."""
    began = time.monotonic()
    while not any(store.check([key]) for key in keys):
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(0.02 if waited < 2 else 0.2)
    return True
