"""One rank's groups and channels, made once, over the backend that was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial

import torch
import torch.distributed as dist

from megazero.comm.fake import Fake, FakeChannel
from megazero.comm.gloo import Gloo, GlooChannel
from megazero.comm.group import Alone, Channel, Group, Line
from megazero.comm.late import Late, LateChannel
from megazero.comm.nccl import Nccl, NcclChannel, urgent
from megazero.comm.ports import unreachable
from megazero.comm.rendezvous import join
from megazero.comm.told import swap
from megazero.plan import Coordinates, Mesh

PATIENCE = 6            # times longer than elsewhere do ranks wait for another that writes its part of a checkpoint


@dataclass(frozen=True)
class Wires:
    """One rank's groups by kind, and its channels by (send or recv, F or B), made once. `close()` when all is well; a
    process that fails just leaves.

    backend     nccl, gloo or fake
    late        what arrives is seen at wait() and not before (tests)
    started     the processes were joined for these wires, and part with them
    """

    mesh: Mesh
    rank: int
    groups: Mapping[str, Group]
    channels: Mapping[tuple[str, str], Channel]
    line: Line
    backend: str
    late: bool
    started: bool

    @cached_property
    def place(self) -> Coordinates:
        return self.mesh.place(self.rank)

    def __getitem__(self, axis: str) -> Group:
        """The group of an axis; of an axis that this rank has no part in, the rank alone."""
        return self.groups.get(axis) or Alone()

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        # under NCCL `wait` orders streams alone
        self.groups["world"].all_reduce(torch.zeros(1, device=self.device)).wait().item()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    def close(self) -> None:
        if self.started:
            self.barrier()
            dist.destroy_process_group()


def connect(mesh: Mesh, rank: int, backend: str, seconds: float, words: str = "") -> Wires:
    """Joins the ranks (as torchrun's environment says) and makes the groups. `gloo+late` wraps gloo for tests.
    `words`: what all ranks must have in common. Raises UserError where they have not, or one does not come; Stuck where
    they cannot reach each other."""
    line = Line(rank, seconds, swap=partial(swap, rank))
    kind, _, wrap = backend.partition("+")
    started = kind != "fake" and mesh.world > 1 and not dist.is_initialized()
    if started:
        join(kind, seconds, words)
    try:
        groups, channels = _groups(kind, mesh, line), _channels(kind, mesh, line)
    except (RuntimeError, OSError) as error:
        raise unreachable(rank, kind, error) from error
    if wrap == "late":
        groups = {axis: Late(group) if group.size > 1 else group for axis, group in groups.items()}
        channels = {key: LateChannel(channel) for key, channel in channels.items()}
    return Wires(mesh, rank, groups=groups, channels=channels, line=line, backend=kind, late=wrap == "late",
                 started=started)


def _groups(kind: str, mesh: Mesh, line: Line) -> dict[str, Group]:
    """This rank's groups by axis."""
    made: dict[str, Group] = {}
    slow = Line(line.rank, PATIENCE * line.seconds, "saving a checkpoint", line.sent)
    for axis, rows in mesh.groups().items():
        for ranks in rows:
            group = _make(kind, axis, ranks, slow if axis == "saved" else line)
            if line.rank in ranks:
                made[axis] = group
    return made


def _make(kind: str, axis: str, ranks: tuple[int, ...], line: Line) -> Group:
    """One group. Every rank of the world must call this for every group, in the same order.
    `saved` must not need the device."""
    if len(ranks) == 1:
        return Alone()
    if kind == "fake":
        return Fake(axis, ranks, line) if line.rank in ranks else Alone()
    kind = "gloo" if axis == "saved" else kind
    process_group = _communicator(kind, ranks, line)
    # weights of the next pass arrive while gradients of this one are summed
    gathering = _communicator(kind, ranks, line) if kind == "nccl" and axis == "shard" else None
    if line.rank not in ranks:
        return Alone()
    return (Gloo(axis, ranks, line, process_group) if kind == "gloo" else
            Nccl(axis, ranks, line, process_group, gathering))


def _communicator(kind: str, ranks: Sequence[int], line: Line) -> dist.ProcessGroup:
    """Every rank of the world must call this, in the same order. NCCL makes its connections at the first use."""
    return dist.new_group(list(ranks), timeout=timedelta(seconds=line.seconds), backend=kind,
                          pg_options=urgent() if kind == "nccl" else None)


def _channels(kind: str, mesh: Mesh, line: Line) -> dict[tuple[str, str], Channel]:
    """This rank's channels. Activations (F) and gradients (B) have channels of their own: between two ranks that are
    each other's next they would cross in an order that the two do not agree on."""
    made: dict[tuple[str, str], Channel] = {}
    for way, pairs in (("F", mesh.channels()), ("B", [(b, a) for a, b in mesh.channels()])):
        for sender, receiver in pairs:
            group = None if kind == "fake" else _communicator(kind, (sender, receiver), line)
            if kind == "nccl" and group is not None and line.rank in (sender, receiver):
                _greet(sender, receiver, line.rank, group)
            for end, who in (("send", sender), ("recv", receiver)):
                if line.rank == who:
                    made[end, way] = (FakeChannel(line) if group is None else
                                      (GlooChannel if kind == "gloo" else NcclChannel)(sender, receiver, line, group))
    return made


def _greet(sender: int, receiver: int, rank: int, group: dist.ProcessGroup) -> None:
    """NCCL connects two ranks at their first message, and the host waits there for the other end: let it be here, where
    both come, and not at a receive that is posted ahead."""
    message = torch.zeros(1, device="cuda")
    if rank == sender:
        dist.send(message, receiver, group)
    else:
        dist.recv(message, sender, group)
    torch.cuda.synchronize()
