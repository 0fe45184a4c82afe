"""The only file that talks to other ranks.

A `Group` is the ranks of one axis of the mesh. Its calls start at once and return a `Work`; the result is there, and the input may
change, after `wait()`. One is a size: a group of one hands back what it is given.

    nccl    torch's collectives on CUDA
    gloo    built from point-to-point messages, two to three times as fast as gloo's own; sums are taken in rank order, in fp32 for
            half precision and rounded once, so they are the same in every run; ranks of one host use memory that they share instead
            of messages (shared.py)
    fake    no peers: any rank of any mesh in one process; sums are of one rank's share
    late    around another, for tests: results are NaN until waited for, and inputs that change before that are an error

Bytes sent are counted by axis, as if by a ring: reduce-scatter and all-gather send (n - 1) / n of the whole, all-reduce twice that.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from megazero.mesh import Mesh, all_reduce_bytes
from megazero.shared import Letter, Memory, supported

Tensor = torch.Tensor


class Stuck(RuntimeError):
    """A peer did not answer: the message names the rank that waited, for what, for whom and how long."""


class Work(Protocol):
    def wait(self) -> Tensor:
        """The result, when it is there."""
        ...

    def done(self) -> bool:
        """Would wait() return at once?"""
        ...


class Group(Protocol):
    """Calls on the ranks of one axis. Tensors are contiguous; dimension 0 is what is gathered and scattered.

    `into` is where the result goes, if given; it may be the whole that x is this rank's part of, or this rank's part of x.
    """

    size: int
    rank: int

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        """[n, ...] on each rank -> [size n, ...] on all, in rank order."""
        ...

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        """[size n, ...] on each rank -> [n, ...]: this rank's part of the sum."""
        ...

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        """The sum (or `max`) over the ranks, in place."""
        ...


class Channel(Protocol):
    """The way from one rank to its neighbour. Messages arrive in the order in which they were sent."""

    def send(self, x: Tensor) -> Work:
        """x may change after wait()."""
        ...

    def receive(self, into: Tensor) -> Work:
        """The next message, of this shape."""
        ...


@dataclass
class Line:
    """What the groups of one rank share: counters, the time-out, and what the rank is doing now, for reports."""

    rank: int = 0
    seconds: float = 600.0
    doing: str = "start"
    sent: Counter[str] = field(default_factory=Counter)         # bytes by axis


@dataclass(frozen=True)
class Done:
    result: Tensor

    def wait(self) -> Tensor:
        return self.result

    def done(self) -> bool:
        return True


class Alone:
    """A group of one rank."""

    size = 1
    rank = 0

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        return Done(_placed(x, into))

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        return Done(_placed(x, into))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        return Done(x)


def _placed(x: Tensor, into: Tensor | None) -> Tensor:
    """x, in `into` if there is one; nothing moves when it is there already."""
    return x if into is None or into.data_ptr() == x.data_ptr() else into.copy_(x)


class _Several:
    """What groups of several ranks have in common: who they are, and the count of what they send."""

    def __init__(self, axis: str, ranks: Sequence[int], line: Line) -> None:
        self.axis, self.ranks, self.line = axis, tuple(ranks), line
        self.size, self.rank = len(ranks), tuple(ranks).index(line.rank)

    def _count(self, part: Tensor, times: int = 1) -> None:
        """Each rank sends `part` to all others, `times` times."""
        self.line.sent[self.axis] += times * (self.size - 1) * part.numel() * part.element_size()


@dataclass
class _Messages:
    """Point-to-point messages on their way, and what makes the result of them."""

    line: Line
    what: str
    pending: Sequence[tuple[int, dist.Work | Letter]]
    finish: Callable[[], Tensor]
    kept: object = None                                         # buffers that must live until the messages are through

    def wait(self) -> Tensor:
        line = self.line
        for peer, work in self.pending:
            try:
                work.wait(timedelta(seconds=line.seconds))
            except RuntimeError as error:
                raise Stuck(f"rank {line.rank} gave up in {line.doing}, {self.what}: rank {peer} did not answer "
                            f"within {line.seconds:g} s, or is gone ({str(error).splitlines()[0][:160]})") from error
        return self.finish()

    def done(self) -> bool:
        return all(work.is_completed() for _, work in self.pending)


class Gloo(_Several):
    """Collectives from point-to-point messages. Every message has a tag of its own, so calls may overlap in any order."""

    def __init__(self, axis: str, ranks: Sequence[int], line: Line, process_group: dist.ProcessGroup) -> None:
        super().__init__(axis, ranks, line)
        self.process_group, self.calls = process_group, 0
        self.memory = _memory(process_group)

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        out = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        parts = list(out.chunk(self.size)) if len(x) else [x] * self.size
        _placed(x, parts[self.rank])
        self._count(x)
        return self._gather("all-gather", x, parts, lambda: out)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        parts = list(x.chunk(self.size))
        self._count(parts[self.rank])
        return self._exchange("reduce-scatter", parts, self._received(parts), lambda got: _total(got, "sum", into))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        """A reduce-scatter and, once that is waited for, an all-gather; in place where the ranks divide the elements."""
        missing = -x.numel() % self.size
        flat = torch.cat((x.view(-1), x.new_zeros(missing))) if missing else x.view(-1)
        parts = list(flat.chunk(self.size))
        self._count(parts[0], times=2)
        second = self._tag()

        def finish(got: Sequence[Tensor]) -> Tensor:
            _total(got, op, parts[self.rank])
            self._gather("all-reduce", parts[self.rank], parts, lambda: flat, second).wait()
            return x.copy_(flat[:x.numel()].view(x.shape)) if missing else x

        return self._exchange("all-reduce", parts, self._received(parts), finish)

    def _gather(self, what: str, x: Tensor, parts: Sequence[Tensor], result: Callable[[], Tensor], tag: int = 0) -> Work:
        """x goes to all, and parts[r] becomes what rank r sent."""
        def finish(got: Sequence[Tensor]) -> Tensor:
            for part, arrived in zip(parts, got, strict=True):
                _placed(arrived, part)
            return result()

        return self._exchange(what, [x] * self.size, parts, finish, tag)

    def _received(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Room for every rank's share of what this rank sums; its own share is there."""
        return [part if r == self.rank else torch.empty_like(parts[self.rank]) for r, part in enumerate(parts)]

    def _tag(self) -> int:
        self.calls += 1
        return self.calls

    def _exchange(self, what: str, out: Sequence[Tensor], into: Sequence[Tensor], finish: Callable[[Sequence[Tensor]], Tensor],
                  tag: int = 0) -> Work:
        """Sends out[r] to each rank r, and hands `finish` what came from each: in into[r], or where it lies in shared memory."""
        tag, peers = tag or self._tag(), [r for r in range(self.size) if r != self.rank and out[r].numel()]
        if self.memory and peers:
            self.memory.send({r: out[r] for r in peers}, tag)
            letters = {r: self.memory.expect(r, tag) for r in peers}

            def opened() -> Tensor:
                result = finish([letters[r].read(t).to(t.device) if r in letters else t for r, t in enumerate(into)])
                for letter in letters.values():
                    letter.done()
                return result

            return _Messages(self.line, f"{what} over {self.axis}", [(self.ranks[r], x) for r, x in letters.items()], opened)
        there = {r: _host(into[r]) for r in peers}
        receives = [(self.ranks[r], dist.irecv(t, self.ranks[r], self.process_group, tag)) for r, t in there.items()]
        sent = {r: _host(out[r].contiguous()) for r in peers}
        sends = [(self.ranks[r], dist.isend(t, self.ranks[r], self.process_group, tag)) for r, t in sent.items()]
        pending = [(peer, work) for peer, work in receives + sends if work is not None]

        def landed() -> Tensor:
            return finish([there[r].to(t.device) if r in there else t for r, t in enumerate(into)])

        return _Messages(self.line, f"{what} over {self.axis}", pending, landed, (sent, there))


def _memory(process_group: dist.ProcessGroup) -> Memory | None:
    """Memory shared by all ranks of a group of one host; None where they are on several, or have no such memory."""
    ranks = dist.get_world_size(process_group)
    memory = Memory(dist.get_rank(process_group), ranks) if supported() else None
    cards = torch.zeros(ranks, 4, dtype=torch.int64)
    dist.all_gather(list(cards), memory.card() if memory else torch.zeros(4, dtype=torch.int64), process_group)
    met = torch.tensor(bool(memory and memory.meet(cards)), dtype=torch.int64)
    dist.all_reduce(met, dist.ReduceOp.MIN, process_group)
    return memory if met else None


class GlooChannel:
    """Point-to-point messages between two ranks."""

    def __init__(self, sender: int, receiver: int, line: Line, process_group: dist.ProcessGroup) -> None:
        self.sender, self.receiver, self.line, self.process_group = sender, receiver, line, process_group
        self.memory, self.peer, self.messages = _memory(process_group), 1 - dist.get_rank(process_group), 0

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        self.messages += 1
        if self.memory:
            self.memory.send({self.peer: x}, self.messages)
            return Done(x)
        given = _host(x)
        work = dist.isend(given, self.receiver, self.process_group)
        assert work is not None
        return _Messages(self.line, "sending over pp", [(self.receiver, work)], lambda: x, given)

    def receive(self, into: Tensor) -> Work:
        self.messages += 1
        if self.memory:
            letter = self.memory.expect(self.peer, self.messages)

            def opened() -> Tensor:
                into.copy_(letter.read(into))
                letter.done()
                return into

            return _Messages(self.line, "receiving over pp", [(self.sender, letter)], opened)
        there = _host(into)
        work = dist.irecv(there, self.sender, self.process_group)
        assert work is not None
        return _Messages(self.line, "receiving over pp", [(self.sender, work)], lambda: _placed(there, into), there)


def _host(x: Tensor) -> Tensor:
    """gloo moves host memory."""
    return x.cpu() if x.is_cuda else x


def _total(parts: Sequence[Tensor], op: str, into: Tensor | None = None) -> Tensor:
    """Sum or maximum in rank order, half precision in fp32 and rounded once. `into` may be one of the parts."""
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if op == "sum" else dtype
    add = torch.add if op == "sum" else torch.maximum
    at_once = into if len(parts) == 2 and wide == dtype else None                       # else a part not yet read could be lost
    total = add(parts[0].to(wide), parts[1].to(wide), out=at_once)
    for part in parts[2:]:
        add(total, part, out=total)
    return _placed(total.to(dtype), into)


@dataclass
class _Collective:
    """A collective of torch under way."""

    line: Line
    what: str
    work: dist.Work
    result: Tensor

    def wait(self) -> Tensor:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise Stuck(f"rank {self.line.rank} gave up in {self.line.doing}, {self.what} ({str(error).splitlines()[0][:160]})") from error
        return self.result

    def done(self) -> bool:
        return self.work.is_completed()


class Nccl(_Several):
    """torch's own collectives."""

    # torch 2.13 renamed the two; 2.11 has the older names only
    gather_call = staticmethod(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
    scatter_call = staticmethod(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)

    def __init__(self, axis: str, ranks: Sequence[int], line: Line, process_group: dist.ProcessGroup) -> None:
        super().__init__(axis, ranks, line)
        self.process_group = process_group

    def _name(self, what: str) -> str:
        return f"{what} over {self.axis} with ranks {self.ranks}"

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        out = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        self._count(x)
        work = self.gather_call(out, x.contiguous(), group=self.process_group, async_op=True)
        return _Collective(self.line, self._name("all-gather"), work, out)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        out = x.new_empty(len(x) // self.size, *x.shape[1:]) if into is None else into
        self._count(out)
        work = self.scatter_call(out, x.contiguous(), group=self.process_group, async_op=True)
        return _Collective(self.line, self._name("reduce-scatter"), work, out)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        self.line.sent[self.axis] += all_reduce_bytes(x.numel(), x.element_size(), self.size)
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        work = dist.all_reduce(x, kind, group=self.process_group, async_op=True)
        assert work is not None
        return _Collective(self.line, self._name("all-reduce"), work, x)


class NcclChannel:
    """Two ranks with a communicator of their own for each way, so that a receive that waits blocks no send."""

    def __init__(self, sender: int, receiver: int, line: Line, process_group: dist.ProcessGroup) -> None:
        self.sender, self.receiver, self.line, self.process_group = sender, receiver, line, process_group

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        work = dist.isend(x, self.receiver, self.process_group)
        assert work is not None
        return _Collective(self.line, f"sending over pp to rank {self.receiver}", work, x)

    def receive(self, into: Tensor) -> Work:
        work = dist.irecv(into, self.sender, self.process_group)
        assert work is not None
        return _Collective(self.line, f"receiving over pp from rank {self.sender}", work, into)


class Fake(_Several):
    """No peers: shapes, bytes and memory are right, values are those of one rank's share."""

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        self._count(x)
        into = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        for part in into.chunk(self.size) if len(x) else ():
            _placed(x, part)
        return Done(into)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        part = x.chunk(self.size)[self.rank]
        self._count(part)
        return Done(part.clone() if into is None else _placed(part, into))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        self.line.sent[self.axis] += all_reduce_bytes(x.numel(), x.element_size(), self.size)
        return Done(x)


@dataclass(frozen=True)
class FakeChannel:
    """Nobody listens; zeros arrive."""

    line: Line

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        return Done(x)

    def receive(self, into: Tensor) -> Work:
        return Done(into.zero_())


@dataclass
class _Held:
    """A result that is handed over at wait(), into the tensor that was poisoned until then."""

    inner: Work
    what: str
    given: Tensor                                               # the input, and what it was
    copy: Tensor
    into: Tensor | None

    def wait(self) -> Tensor:
        result = self.inner.wait()
        if self.into is not None:
            return self.into.copy_(result)
        same = torch.equal(self.given.view(torch.uint8), self.copy.view(torch.uint8)) if self.given.numel() else True
        assert same, f"the input of {self.what} changed before it was waited for"
        return result

    def done(self) -> bool:
        return self.inner.done()


class Late:
    """Around another group: what overlap could break, breaks here."""

    def __init__(self, inner: Group) -> None:
        self.inner, self.size, self.rank = inner, inner.size, inner.rank

    def all_gather(self, x: Tensor, into: Tensor | None = None) -> Work:
        return self._held("all-gather", self.inner.all_gather, x.contiguous(), into)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None) -> Work:
        return self._held("reduce-scatter", self.inner.reduce_scatter, x.contiguous(), into)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Work:
        return self._held("all-reduce", lambda y: self.inner.all_reduce(y, op), x, x)

    def _held(self, what: str, call: Callable[[Tensor], Work], x: Tensor, into: Tensor | None) -> Work:
        copy = x.clone()
        if into is not None:
            into.fill_(torch.nan)                               # x too where it shares memory with the result
        return _Held(call(copy), what, x, x.clone(), into)


@dataclass(frozen=True)
class LateChannel:
    """Around another channel."""

    inner: Channel

    def send(self, x: Tensor) -> Work:
        return _Held(self.inner.send(x), "a send", x, x.clone(), None)

    def receive(self, into: Tensor) -> Work:
        apart = torch.empty_like(into)
        return _Held(self.inner.receive(apart), "a receive", apart, apart, into.fill_(torch.nan))


class Wires:
    """One rank's groups, and its channels by (send or recv, F or B), made once. `close()` when all is well; a process that fails just
    leaves."""

    def __init__(self, mesh: Mesh, rank: int, groups: dict[str, Group], channels: dict[tuple[str, str], Channel], line: Line,
                 started: bool) -> None:
        self.mesh, self.rank, self.groups, self.channels, self.line, self._started = mesh, rank, groups, channels, line, started
        self.place = mesh.place(rank)

    def __getitem__(self, axis: str) -> Group:
        """The group of an axis; of an axis that this rank has no part in, the rank alone."""
        return self.groups.get(axis) or Alone()

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.groups["world"].all_reduce(torch.zeros(1, device=self.device)).wait()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")

    backend, late = "gloo", False

    def close(self) -> None:
        if self._started:
            self.barrier()
            dist.destroy_process_group()


def connect(mesh: Mesh, rank: int, backend: str, seconds: float) -> Wires:
    """Joins the ranks (as torchrun's environment says) and makes the groups. `gloo+late` wraps gloo for tests."""
    line = Line(rank, seconds)
    kind, _, wrap = backend.partition("+")
    started = kind != "fake" and mesh.world > 1 and not dist.is_initialized()
    if started:
        dist.init_process_group(kind, timeout=timedelta(seconds=seconds))
    made: dict[str, Group] = {}
    for axis, rows in mesh.groups().items():
        for ranks in rows:
            group = _make(kind, axis, ranks, Line(rank, seconds, "saving a checkpoint", line.sent) if axis == "saved" else line)
            if rank in ranks:
                made[axis] = Late(group) if wrap == "late" and len(ranks) > 1 else group
    channels = _channels(kind, mesh, line)
    if wrap == "late":
        channels = {key: LateChannel(channel) for key, channel in channels.items()}
    wires = Wires(mesh, rank, made, channels, line, started)
    wires.backend, wires.late = kind, wrap == "late"
    return wires


def _make(kind: str, axis: str, ranks: tuple[int, ...], line: Line) -> Group:
    """One group. Every rank of the world must call this for every group, in the same order. `saved` must not need the device."""
    if len(ranks) == 1:
        return Alone()
    if kind == "fake":
        return Fake(axis, ranks, line) if line.rank in ranks else Alone()
    kind = "gloo" if axis == "saved" else kind
    process_group = dist.new_group(list(ranks), timeout=timedelta(seconds=line.seconds), backend=kind)
    if line.rank not in ranks:
        return Alone()
    return Gloo(axis, ranks, line, process_group) if kind == "gloo" else Nccl(axis, ranks, line, process_group)


def _channels(kind: str, mesh: Mesh, line: Line) -> dict[tuple[str, str], Channel]:
    """This rank's channels. Activations (F) and gradients (B) have channels of their own: between two ranks that are each other's
    next they would cross in an order that the two do not agree on."""
    made: dict[tuple[str, str], Channel] = {}
    for way, pairs in (("F", mesh.channels()), ("B", [(b, a) for a, b in mesh.channels()])):
        for sender, receiver in pairs:
            group = None if kind == "fake" else dist.new_group([sender, receiver], timeout=timedelta(seconds=line.seconds), backend=kind)
            for end, who in (("send", sender), ("recv", receiver)):
                if line.rank == who:
                    made[end, way] = (FakeChannel(line) if group is None else
                                      (GlooChannel if kind == "gloo" else NcclChannel)(sender, receiver, line, group))
    return made


def first_to_say(what: str) -> bool:
    """Is this the first rank of the run to say this? So that a mistake all ranks make, or a failure that spreads, is told once."""
    if environment()[1] == 1:
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((host, port), timeout=2).close()                       # c10d is noisy when nobody is there
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"megazero/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{what}", 1) == 1
    except (OSError, RuntimeError, KeyError):                   # the store is gone, or not there yet: better twice than never
        return True


def environment() -> tuple[int, int]:
    """(rank, world size) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
