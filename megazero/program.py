"""A step as data: one list of actions, which can be printed, verified, costed and run (executor.py).

    open U        forget the gradients of unit U
    F part,m      forward of a part for micro-batch m           B part,m    its backward
    L m           head and loss of micro-batch m, forward and backward at once
    E m           head and loss without gradients
    reduce U      the gradients of unit U are complete: sum them over data-parallel ranks

A part is a number: 0 is the embedding, 1 .. n the blocks; the head is L. With one stage a schedule only decides how many
micro-batches have gone forward before the first goes backward.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Action(NamedTuple):
    kind: str
    part: int = -1
    micro: int = -1
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.unit}" if self.unit else f"{self.kind}{'' if self.part < 0 else self.part},{self.micro}"


def order(schedule: str, micro_batches: int) -> list[tuple[str, int]]:
    """The forward and backward passes of one stage: gpipe has all forwards first, 1f1b one of each in turn."""
    if schedule == "gpipe":
        return [(kind, m) for kind in "FB" for m in range(micro_batches)]
    return [(kind, m) for m in range(micro_batches) for kind in "FB"]


def training(schedule: str, micro_batches: int, parts: Sequence[Sequence[str]], head: Sequence[str]) -> list[Action]:
    """One training step. `parts` and `head` are the units that each part and the head read.

    A unit is reduced after the last micro-batch's backward of the first part that reads it: a tied embedding after the
    embedding's, although the head has long handed over its share.
    """
    readers = [*parts, head]
    first = {u: i for i, part in reversed(list(enumerate(readers))) for u in part}
    program = [Action("open", unit=u) for u in first]
    for kind, m in order(schedule, micro_batches):
        if kind == "F":
            program += [Action("F", i, m) for i in range(len(parts))]
            continue
        for i in reversed(range(len(readers))):
            program.append(Action("L", micro=m) if i == len(parts) else Action("B", i, m))
            program += [Action("reduce", unit=u) for u in readers[i] if m == micro_batches - 1 and first[u] == i]
    return program


def evaluation(parts: int) -> list[Action]:
    """Forward of one micro-batch through `parts` parts, and its loss."""
    return [*(Action("F", i, 0) for i in range(parts)), Action("E", micro=0)]
