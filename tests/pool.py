"""A pool of processes, forked from one that has imported torch, which play the ranks of one test after another, over gloo on this machine."""

import contextlib
import faulthandler
import io
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankError(AssertionError):
    """What went wrong on the ranks, each line with its rank."""


class Pool:
    """`pool.run(n, function, *arguments)` calls it on n ranks and returns their results by rank.

    What ranks print is shown with their number. When a rank fails or time runs out, the stacks of all are shown, and the next
    call starts fresh processes.
    """

    def __init__(self, method: str = "forkserver") -> None:
        """`method`: how processes begin. CUDA wants spawn."""
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["torch", "torch.distributed", "megazero.run"])
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
        while len(self.workers) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self.workers.append((process, here))
        port, end = _free_port(), time.monotonic() + seconds
        for rank, (_, pipe) in enumerate(self.workers[:world]):
            pipe.send((rank, world, port, function, arguments))
        results: list[Any] = [None] * world
        errors, waiting = [], set(range(world))
        while waiting and not errors:
            for rank in sorted(waiting):
                process, pipe = self.workers[rank]
                if pipe.poll(0.002):
                    waiting.discard(rank)
                    good, results[rank], printed = pipe.recv()
                    print("".join(f"[{rank}] {line}\n" for line in printed.splitlines()), end="")
                    errors += [] if good else [f"[{rank}] {line}" for line in str(results[rank]).splitlines()]
                elif not process.is_alive():
                    errors.append(f"[{rank}] died with exit code {process.exitcode}")
                    waiting.discard(rank)
            if time.monotonic() > end and waiting:
                errors.append(f"ranks {sorted(waiting)} were still busy after {seconds:g} s; their stacks are on stderr")
                for rank in waiting:
                    os.kill(self.workers[rank][0].pid, signal.SIGUSR1)
                time.sleep(0.5)
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers.clear()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(pipe: Connection) -> None:
    """One process: plays a rank whenever asked."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        rank, world, port, function, arguments = pipe.recv()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "LOCAL_RANK": str(rank)}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                good, result = True, function(*arguments)
        except Exception:
            good, result = False, traceback.format_exc()
        if dist.is_initialized():
            if good:
                dist.barrier()
            dist.destroy_process_group()
        pipe.send((good, result, printed.getvalue()))
