"""nccl: torch's own collectives on CUDA."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megazero.base import UserError
from megazero.comm.group import Line, Several, Stuck, Work
from megazero.plan import all_reduce_bytes

Tensor = torch.Tensor


def before_cuda(pipeline: bool) -> None:
    """To be called before anything asks for a CUDA device. A kernel that is loaded when it is first used waits for all
    that runs; a receive that was posted ahead runs until its message comes, and that may need the kernel. So in a
    pipeline all are loaded at the start, unless CUDA_MODULE_LOADING says otherwise."""
    if pipeline:
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def own_device(instead: str) -> torch.device:
    """The CUDA device of this rank, which becomes the current one. Raises UserError where there is none for it;
    `instead`: what people may write then."""
    local, there = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local >= there:
        raise UserError(f"--nproc_per_node: NCCL needs a CUDA device for each rank and this machine has {there}; start "
                        f"{there} here, or {instead}.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def urgent() -> Any:
    """Options of a communicator whose kernels go before those that compute: they are few, and somebody waits."""
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


@dataclass
class Collective:
    """A collective of torch under way."""

    line: Line
    what: str
    work: dist.Work
    result: Tensor

    def wait(self) -> Tensor:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise Stuck(f"rank {self.line.rank} gave up in {self.line.doing}, {self.what} "
                        f"({str(error).splitlines()[0][:160]})") from error
        return self.result

    def done(self) -> bool:
        return self.work.is_completed()


class Nccl(Several):
    """torch's own collectives. Their messages have no tags: whether ranks called them about the same is seen by their
    traces, which the gate compares."""

    # torch 2.13 renamed the two; 2.11 has the older names only
    gather_call = staticmethod(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
    scatter_call = staticmethod(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)

    def __init__(self, axis: str, ranks: Sequence[int], line: Line, process_group: dist.ProcessGroup,
                 gathering: dist.ProcessGroup | None = None) -> None:
        """`gathering`: a communicator of its own for gathers, which one that works on a sum would hold up."""
        super().__init__(axis, ranks, line)
        self.process_group, self.gathering = process_group, gathering or process_group

    def _name(self, what: str) -> str:
        return f"{what} over {self.axis} with ranks {self.ranks}"

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        self.line.marks.mark("all-gather", about)
        out = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        self._count(x)
        work = self.gather_call(out, x.contiguous(), group=self.gathering, async_op=True)
        return Collective(self.line, self._name("all-gather"), work, out)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        self.line.marks.mark("reduce-scatter", about)
        out = x.new_empty(len(x) // self.size, *x.shape[1:]) if into is None else into
        self._count(out)
        work = self.scatter_call(out, x.contiguous(), group=self.process_group, async_op=True)
        return Collective(self.line, self._name("reduce-scatter"), work, out)

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        self.line.marks.mark("all-reduce", about)
        self.line.sent[self.axis] += all_reduce_bytes(x.numel(), x.element_size(), self.size)
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        work = dist.all_reduce(x, kind, group=self.process_group, async_op=True)
        assert work is not None
        return Collective(self.line, self._name("all-reduce"), work, x)

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        self.line.marks.mark("all-to-all", about)
        self._count_parts(x, out)
        arrived = x.new_empty(sum(back))
        work = dist.all_to_all_single(arrived, x, list(back), list(out), group=self.process_group, async_op=True)
        assert work is not None
        return Collective(self.line, self._name("all-to-all"), work, arrived)


class NcclChannel:
    """Two ranks with a communicator of their own for each way, so that a receive that waits blocks no send."""

    def __init__(self, sender: int, receiver: int, line: Line, process_group: dist.ProcessGroup) -> None:
        self.sender, self.receiver, self.line, self.process_group = sender, receiver, line, process_group

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        work = dist.isend(x, self.receiver, self.process_group)
        assert work is not None
        return Collective(self.line, f"sending over pp to rank {self.receiver}", work, x)

    def receive(self, into: Tensor) -> Work:
        work = dist.irecv(into, self.sender, self.process_group)
        assert work is not None
        return Collective(self.line, f"receiving over pp from rank {self.sender}", work, into)
