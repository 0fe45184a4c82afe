"""What keeps ranks from meeting. The port is tried before torch is asked: it would tell what is wrong late, and with
frames of its own."""

import errno
import os
import resource
import socket
import time

from megazero.base import UserError, say
from megazero.comm.group import Stuck

SPARE = 32                  # open files that a few peers take
QUIET = 5.0                 # seconds that a rank waits for others before it says so


def free(port: int) -> None:
    """Raises UserError unless this rank may listen there: torch would tell it with frames of its own."""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        why = "is in use here" if error.errno == errno.EADDRINUSE else f"cannot be had here ({error.strerror})"
        raise UserError(f"MASTER_PORT {port}: {why}; choose another with --master_port, and start one process as rank "
                        "0.") from None


def reach(host: str, port: int, rank: int, end: float, tells: bool) -> None:
    """Returns when somebody listens there: torch's own attempts are noisy, and say nothing for minutes.
    `tells`: does this rank say that it waits?"""
    told = time.monotonic() + QUIET
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            why = error.strerror or first_line(error)
        if time.monotonic() > end:
            raise UserError(f"MASTER_ADDR {host}, MASTER_PORT {port}: rank {rank} finds nobody there ({why}); start "
                            "rank 0 on that host, and let no firewall lie between.")
        if time.monotonic() > told and tells:
            say(f"rank {rank}: waiting for somebody at {host}:{port} ({why})")
            told = end + 1
        time.sleep(0.2)


def unreachable(rank: int, kind: str, error: Exception) -> Stuck:
    if "Too many open files" in str(error) or getattr(error, "errno", 0) == errno.EMFILE or few_files():
        return Stuck(f"rank {rank} has too many open files to reach its peers over {kind}; raise ulimit -n")
    return Stuck(f"rank {rank} and its peers cannot reach each other over {kind} ({first_line(error)}); all must be on "
                 f"one network: {kind.upper()}_SOCKET_IFNAME names it where a host has several")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def few_files() -> bool:
    """Is this process about to run out of them? What libraries say then may be about anything."""
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd")) < SPARE
    except OSError:
        return False
