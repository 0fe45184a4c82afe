"""What a machine could not do, said in one sentence: with rank and place, what was asked for, what the plan said, and
which flag helps."""

import errno
import re
import resource

import torch

from megazero.base import gib
from megazero.comm import Stuck, Wires
from megazero.plan import Plan, memory


class Failure(RuntimeError):
    """A failure that is no mistake of this code: its message is all that people need."""


def failure(error: BaseException, plan: Plan, wires: Wires) -> Failure | None:
    """What to say of an error that came up on this rank while it ran `plan`; None for one that is not known here."""
    where = f"rank {wires.rank} in {wires.line.doing}"
    if isinstance(error, Stuck):
        return None
    if (asked := _out_of_memory(error)) is not None:
        return Failure(f"{where}: out of memory, {asked}; {_memory(plan, wires)}. Lower --micro-batch-size or "
                       "--seq-length, write --recompute-granularity full, or share with --tp, --pp or --zero-stage")
    code, why = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "")
    if code in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return Failure(f"{where}: too many open files; this process may have {soft} (ulimit -n; up to {hard} without "
                       "asking an administrator)")
    if code == errno.EFBIG:
        return Failure(f"{where}: {_named(error)} grew beyond the largest file that is allowed here (ulimit -f)")
    if code is not None:
        return Failure(f"{where}: {_named(error)}: {why}")
    return None


def _named(error: BaseException) -> str:
    return str(getattr(error, "filename", None) or "a file")


def _out_of_memory(error: BaseException) -> str | None:
    """How much was asked for in vain; None if the error is another."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        asked = re.search(r"allocate ([\d.]+ \w+)", text)
        return f"{asked[1]} more were asked for on the device" if asked else "of the device"
    if isinstance(error, MemoryError):
        asked = re.search(r"allocate ([\d.]+ \w+)", text)
        return f"{asked[1]} more were asked for" if asked else "of the host"
    if "can't allocate memory" in text or "Cannot allocate memory" in text:
        asked = re.search(r"allocate (\d+) bytes", text)
        return f"{gib(int(asked[1]))} more were asked for" if asked else "of the host"
    return None


def _memory(plan: Plan, wires: Wires) -> str:
    planned = f"the plan said {gib(sum(memory(plan, wires.rank).values()))} for this rank"
    if wires.device.type != "cuda":
        return planned
    free, total = torch.cuda.mem_get_info(wires.device)
    return (f"{planned}, the device has {gib(total)}, of which {gib(torch.cuda.memory_allocated(wires.device))} are in "
            f"use here and {gib(free)} free")
