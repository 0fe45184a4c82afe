"""What calls of a group are about: a number that travels with their messages, and a trace where those carry none."""

import zlib
from dataclasses import dataclass, field

VERBS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
CALLS = 1 << 15                         # marks there are: with the call's number in 16 bits, a tag of gloo


class Astray(RuntimeError):
    """Two ranks met in calls about different things: the marks of both."""

    def __init__(self, mine: int, theirs: int) -> None:
        self.mine, self.theirs = mine, theirs


@dataclass
class Marks:
    """Of the calls of one rank.

    things      what calls are about, numbered as they are first named: by all ranks in the same order
    trace       of the calls so far that were about something, in 16 bits: equal where ranks called the same
    """

    things: list[str] = field(default_factory=list)
    trace: int = 0

    def mark(self, verb: str, about: str) -> int:
        """The number of a call's verb and of what it is about, below CALLS; 0 for nothing in particular."""
        if not about:
            return 0
        if about not in self.things:
            self.things.append(about)
        mark = (self.things.index(about) * len(VERBS) + VERBS.index(verb) + 1) % CALLS
        self.trace = zlib.crc32(mark.to_bytes(4, "little"), self.trace) & 0xffff
        return mark

    def told(self, mark: int) -> str:
        """What such a number says."""
        thing, verb = divmod(mark - 1, len(VERBS))
        return f"{VERBS[verb]} of {self.things[thing]}" if mark and thing < len(self.things) else "another call"
