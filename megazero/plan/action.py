"""A step as data: one list of actions, which can be printed, read back, verified, costed and run (run/executor.py).

    F part,m      forward of a part for micro-batch m           B part,m   its backward
    I part,m      gradients of the part's inputs                W part,m   those of its weights
    L part,m      head and loss, forward and backward at once   E part,m   a part without gradients; at the head: loss
    expect Fs,m   room is made for what comes into stage s for micro-batch m; Bs,m: for the gradient of what goes out
    recv Fs,m     it is there                                   send Fs,m  what goes out of stage s (B: back out) leaves
    gather U      the slices of unit U's weights begin to travel to every rank that needs the whole
    release U     the whole of them is not needed for now
    open U        a sum of gradients of unit U begins
    reduce U,k    it is complete for the k-th time in this step: its sum over the ranks of `shard` begins to travel
    land U,k      that sum has arrived, and joins the others of this step
    replicate U   the step's sum of this rank's slice begins to travel over the ranks of `replicate`
    tie U         the sums of the stages that hold a shared unit are added
    settle U      what was under way of U's sums (replicate, tie) has arrived
    finish tp     what tensor-parallel ranks hold whole and see in part is added; finish kv: shared key-value heads
    judge         norm, loss and verdict of the step, over all ranks
    update U+V    masters of these units change, by one kernel, if the verdict is good; publish U+V: weights follow

A part is a number: 0 is the embedding, 1 .. n the blocks, n + 1 the head. An update may run beside what follows: the
next gather of a unit, and whoever reads its state, waits for its publish and for nothing else.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from megazero.base import UserError, said
from megazero.pipeline import KINDS


class Action(NamedTuple):
    kind: str
    part: int = -1                      # of expect, recv and send: the stage
    micro: int = -1
    units: tuple[str, ...] = ()
    way: str = ""                       # of expect, recv and send: F or B; of finish: the axis

    @property
    def unit(self) -> str:
        """The one unit it is about."""
        (unit,) = self.units
        return unit

    def __str__(self) -> str:
        part, micro = ("" if n < 0 else str(n) for n in (self.part, self.micro))
        about = f" {self.way}{part}{'+'.join(self.units)}" if self.way or self.units else part
        return f"{self.kind}{about}{',' * bool(micro)}{micro}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action of a printed one. Raises ValueError."""
        found = re.fullmatch(r"([FBIWLE])(\d+),(\d+)|(expect|recv|send) ([FB])(\d+),(\d+)|(reduce|land) ([^,+]+),(\d+)|"
                             r"(gather|release|open|replicate|tie|settle) ([^,+]+)|(update|publish) ([^,]+)|"
                             r"(finish) (tp|kv)|(judge)", text)
        match [g for g in found.groups() if g] if found else []:
            case [kind, part, micro] if kind in KINDS:
                return cls(kind, int(part), int(micro))
            case [kind, way, part, micro]:
                return cls(kind, int(part), int(micro), way=way)
            case [kind, unit, micro]:
                return cls(kind, micro=int(micro), units=(unit,))
            case ["finish", axis]:
                return cls("finish", way=axis)
            case [kind, units]:
                return cls(kind, units=tuple(units.split("+")))
            case ["judge"]:
                return cls("judge")
        raise ValueError(f"{said(text)} is no action")


def around(program: Sequence[Action], i: int) -> str:
    """Action i among the computations and messages around it, for reports."""
    shown = [k for k, a in enumerate(program) if k == i or a.kind in KINDS or a.kind in ("recv", "send")]
    at = shown.index(i)
    texts = [f"[{program[k]}]" if k == i else str(program[k]) for k in shown[max(at - 4, 0):at + 5]]
    return f"{'... ' if at > 4 else ''}{' | '.join(texts)}{' ...' if at + 5 < len(shown) else ''}"


def written(programs: Sequence[Sequence[Action]]) -> str:
    """The programs of the ranks of a pipeline as a file holds them: one line for each."""
    return "".join(" | ".join(map(str, program)) + "\n" for program in programs)


def read_programs(text: str, flag: str) -> list[list[Action]]:
    """The programs of a file's text. Raises UserError that names line and action; `flag` says where it is from."""
    instead = "write a line for each rank as tools/show_schedule.py program prints them."
    programs = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            programs.append([Action.parse(word.strip()) for word in line.split("|")])
        except ValueError as error:
            raise UserError(f"{flag}: line {number}: {error}; {instead}") from None
    if not programs:
        raise UserError(f"{flag}: is empty; {instead}")
    return programs
