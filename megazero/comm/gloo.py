"""gloo: collectives built from point-to-point messages, two to three times as fast as gloo's own.

Sums are taken in rank order, in fp32 for half precision and rounded once, so they are the same in every run. Ranks of
one host use memory that they share instead of messages (shared.py).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megazero.comm.group import Done, Line, Several, Stuck, Work, placed
from megazero.comm.marks import CALLS, Astray
from megazero.comm.shared import CARD, Letter, Memory, supported

Tensor = torch.Tensor

COURTESY = 2.0              # seconds that a rank leaves to another of its host that may know better why nothing comes


class Call(NamedTuple):
    """One call: how reports name it, its number in the group, and the mark of what it is about."""

    what: str
    number: int
    mark: int

    @property
    def tag(self) -> int:
        """Of its messages: 31 bits, so that calls may overlap in any order and meet none about something else."""
        return self.number % (1 << 16) * CALLS + self.mark


@dataclass
class Messages:
    """Point-to-point messages on their way, and what makes the result of them."""

    line: Line
    what: str
    pending: Sequence[tuple[int, dist.Work | Letter]]
    finish: Callable[[], Tensor]
    kept: object = None                                         # buffers that must live until the messages are through

    def wait(self) -> Tensor:
        line = self.line
        for peer, work in self.pending:
            began = time.monotonic()
            try:
                work.wait(timedelta(seconds=line.seconds))
            except Astray as error:
                mine, theirs = map(line.marks.told, (error.mine, error.theirs))
                raise Stuck(f"rank {line.rank} is in {self.what}, {mine}, where rank {peer} is in {theirs}: all ranks "
                            "must call the same blocks in the same order, in as many micro-batches, where weights are "
                            "shared (level 3)") from error
            except RuntimeError as error:
                late = time.monotonic() - began > 0.9 * line.seconds
                if late and isinstance(work, Letter):           # it lives: it may wait for somebody itself, and say so
                    time.sleep(COURTESY)
                theirs = line.swap(line.doing, peer) if late else ""
                raise Stuck(f"rank {line.rank} gave up in {line.doing}, {self.what}: rank {peer} "
                            + (f"did not answer within {line.seconds:g} s" if late else "is gone")
                            + (f", and gave up in {theirs}" if theirs else "")
                            + f" ({str(error).splitlines()[0][:160]})") from error
        return self.finish()

    def done(self) -> bool:
        return all(work.is_completed() for _, work in self.pending)


class Gloo(Several):
    """Collectives from point-to-point messages. Every message has a tag of its own,
    so calls may overlap in any order."""

    def __init__(self, axis: str, ranks: Sequence[int], line: Line, process_group: dist.ProcessGroup) -> None:
        super().__init__(axis, ranks, line)
        self.process_group, self.calls = process_group, 0
        self.memory = _memory(process_group, line.seconds)

    def all_gather(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        out = x.new_empty(self.size * len(x), *x.shape[1:]) if into is None else into
        parts = list(out.chunk(self.size)) if len(x) else [x] * self.size
        placed(x, parts[self.rank])
        self._count(x)
        return self._gather(self._call("all-gather", about), [x] * self.size, parts, lambda: out)

    def reduce_scatter(self, x: Tensor, into: Tensor | None = None, about: str = "") -> Work:
        parts = list(x.chunk(self.size))
        self._count(parts[self.rank])
        return self._exchange(self._call("reduce-scatter", about), parts, self._received(parts),
                              lambda got: total_of(got, "sum", into))

    def all_reduce(self, x: Tensor, op: str = "sum", about: str = "") -> Work:
        """A reduce-scatter and, once that is waited for, an all-gather;
        in place where the ranks divide the elements."""
        missing = -x.numel() % self.size
        flat = torch.cat((x.view(-1), x.new_zeros(missing))) if missing else x.view(-1)
        parts = list(flat.chunk(self.size))
        self._count(parts[0], times=2)
        first, second = (self._call("all-reduce", about) for _ in range(2))

        def finish(got: Sequence[Tensor]) -> Tensor:
            total_of(got, op, parts[self.rank])
            self._gather(second, [parts[self.rank]] * self.size, parts, lambda: flat).wait()
            return x.copy_(flat[:x.numel()].view(x.shape)) if missing else x

        return self._exchange(first, parts, self._received(parts), finish)

    def all_to_all(self, x: Tensor, out: Sequence[int], back: Sequence[int], about: str = "") -> Work:
        arrived = x.new_empty(sum(back))
        mine, parts = x.split(list(out)), list(arrived.split(list(back)))
        placed(mine[self.rank], parts[self.rank])
        self._count_parts(x, out)
        return self._gather(self._call("all-to-all", about), mine, parts, lambda: arrived)

    def _gather(self, call: Call, given: Sequence[Tensor], parts: Sequence[Tensor],
                result: Callable[[], Tensor]) -> Work:
        """given[r] goes to rank r, and parts[r] becomes what that sent."""
        def finish(got: Sequence[Tensor]) -> Tensor:
            for part, arrived in zip(parts, got, strict=True):
                placed(arrived, part)
            return result()

        return self._exchange(call, given, parts, finish)

    def _received(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Room for every rank's share of what this rank sums; its own share is there."""
        return [part if r == self.rank else torch.empty_like(parts[self.rank]) for r, part in enumerate(parts)]

    def _call(self, verb: str, about: str) -> Call:
        self.calls += 1
        return Call(f"{verb} over {self.axis}", self.calls, self.line.marks.mark(verb, about))

    def _exchange(self, call: Call, out: Sequence[Tensor], into: Sequence[Tensor],
                  finish: Callable[[Sequence[Tensor]], Tensor]) -> Work:
        """Sends out[r] to each rank r, and hands `finish` what came from each:
        in into[r], or where it lies in shared memory."""
        to, of = ([r for r in range(self.size) if r != self.rank and parts[r].numel()] for parts in (out, into))
        if self.memory and (to or of):
            if to:
                self.memory.send({r: out[r] for r in to}, call.number, call.mark)
            letters = {r: self.memory.expect(r, call.number, call.mark) for r in of}

            def opened() -> Tensor:
                result = finish([letters[r].read(t).to(t.device) if r in letters else t for r, t in enumerate(into)])
                for letter in letters.values():
                    letter.done()
                return result

            return Messages(self.line, call.what, [(self.ranks[r], x) for r, x in letters.items()], opened)
        there = {r: host(into[r]) for r in of}
        receives = [(self.ranks[r], dist.irecv(t, self.ranks[r], self.process_group, call.tag))
                    for r, t in there.items()]
        sent = {r: host(out[r].contiguous()) for r in to}
        sends = [(self.ranks[r], dist.isend(t, self.ranks[r], self.process_group, call.tag)) for r, t in sent.items()]
        pending = [(peer, work) for peer, work in receives + sends if work is not None]

        def landed() -> Tensor:
            return finish([there[r].to(t.device) if r in there else t for r, t in enumerate(into)])

        return Messages(self.line, call.what, pending, landed, (sent, there))


def _memory(process_group: dist.ProcessGroup, seconds: float) -> Memory | None:
    """Memory shared by all ranks of a group of one host; None where they are on several, or have no such memory."""
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    memory, card, cards = None, torch.zeros(CARD, dtype=torch.int64), torch.zeros(ranks, CARD, dtype=torch.int64)
    with suppress(OSError):                                     # no /proc, or not ours
        memory = Memory(rank, ranks, seconds) if supported() else None
        card = memory.card() if memory else card
    dist.all_gather(list(cards), card, process_group)
    met = torch.tensor(bool(memory and memory.meet(cards)), dtype=torch.int64)
    dist.all_reduce(met, dist.ReduceOp.MIN, process_group)
    return memory if met else None


class GlooChannel:
    """Point-to-point messages between two ranks."""

    def __init__(self, sender: int, receiver: int, line: Line, process_group: dist.ProcessGroup) -> None:
        self.sender, self.receiver, self.line, self.process_group = sender, receiver, line, process_group
        self.memory, self.peer, self.messages = (
            _memory(process_group, line.seconds), 1 - dist.get_rank(process_group), 0)

    def send(self, x: Tensor) -> Work:
        self.line.sent["pp"] += x.nbytes
        self.messages += 1
        if self.memory:
            self.memory.send({self.peer: x}, self.messages)
            return Done(x)
        given = host(x)
        work = dist.isend(given, self.receiver, self.process_group)
        assert work is not None
        return Messages(self.line, "sending over pp", [(self.receiver, work)], lambda: x, given)

    def receive(self, into: Tensor) -> Work:
        self.messages += 1
        if self.memory:
            letter = self.memory.expect(self.peer, self.messages)

            def opened() -> Tensor:
                into.copy_(letter.read(into))
                letter.done()
                return into

            return Messages(self.line, "receiving over pp", [(self.sender, letter)], opened)
        there = host(into)
        work = dist.irecv(there, self.sender, self.process_group)
        assert work is not None
        return Messages(self.line, "receiving over pp", [(self.sender, work)], lambda: placed(there, into), there)


def host(x: Tensor) -> Tensor:
    """gloo moves host memory."""
    return x.cpu() if x.is_cuda else x


def total_of(parts: Sequence[Tensor], op: str, into: Tensor | None = None) -> Tensor:
    """Sum or maximum in rank order, half precision in fp32 and rounded once. `into` may be one of the parts."""
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32) if op == "sum" else dtype
    add = torch.add if op == "sum" else torch.maximum
    at_once = into if len(parts) == 2 and wide == dtype else None       # else a part not yet read could be lost
    total = add(parts[0].to(wide), parts[1].to(wide), out=at_once)
    for part in parts[2:]:
        add(total, part, out=total)
    return placed(total.to(dtype), into)
