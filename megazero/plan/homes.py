"""Where masters and moments are at home between two updates: in memory, or on disk. Pure.

Of a unit at home on disk a rank holds in memory what an update has under way: a piece being read, one being changed,
one being written. A piece is a range of the rank's slice, of all that is kept there; it is the whole slice where a rule
looks at more than one element at a time, or its blocks do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from megazero.base import DTYPES
from megazero.plan.layout import Flat, Piece, cuts
from megazero.plan.mesh import Coordinates
from megazero.plan.moments import moment_specs
from megazero.plan.rules import RULES, coded, dtype_of, group_of
from megazero.settings import Config, Optimization

PAGE = 4096                 # bytes, and elements: files are read and written in whole pages, of any dtype
UNDER_WAY = 3               # pieces
MASTER = "weight"
Span = tuple[int, int]      # elements of a unit's buffer


@dataclass(frozen=True)
class StateRange:
    """A kind of what is kept of a unit on a rank: elements [start, stop) of the unit's buffer (of its own, where it is
    a factor), `width` bytes each. `apart`: may it be elsewhere, range by range?"""

    start: int
    stop: int
    width: int
    apart: bool = True

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.width


@dataclass(frozen=True)
class Home:
    """A unit at home on disk: kinds that are there, and the pieces that its slice is changed in, one after another."""

    kinds: Mapping[str, StateRange]
    pieces: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for kept in self.kinds.values())

    @property
    def file_bytes(self) -> int:
        """Of a file: each kind begins at a page."""
        return sum(ceil(kept.bytes / PAGE) * PAGE for kept in self.kinds.values())

    def of_piece(self, piece: Span) -> dict[str, Span]:
        """Which elements of each kind a piece means."""
        spans = {kind: (max(piece[0], kept.start), min(piece[1], kept.stop)) for kind, kept in self.kinds.items()}
        return {kind: (a, b) for kind, (a, b) in spans.items() if a < b}

    @property
    def largest(self) -> int:
        """Bytes of its largest piece."""
        return max(sum((b - a) * self.kinds[kind].width for kind, (a, b) in self.of_piece(piece).items())
                   for piece in self.pieces)


def rule_of(piece: Piece, o: Optimization) -> str:
    return group_of(piece.shard.parameter.name, piece.shard.parameter.group, o).rule


def state_of(f: Flat, size: int, place: Coordinates, shard: int, wide: int, o: Optimization) -> dict[str, StateRange]:
    """What is kept beside the weights of a unit, which is stored in `size` elements over `shard` ranks; `wide`: bytes
    of a gradient's element. Scales of 8 bits are not counted."""
    low, high = (size // shard * (place.shard + i) for i in (0, 1))
    out = {}
    for kind, spec in moment_specs(f, size, lambda piece: rule_of(piece, o), o.ema is not None, place).items():
        dtype = dtype_of(kind, o)
        out[kind] = StateRange(*spec.on(low, high), {"fp32": wide, "bf16": 2, "8bit": 1}[dtype],
                         apart=dtype != "8bit" and not spec.factor)
    return out


def homes(units: Mapping[str, Flat], dp: int, shard: int, place: Coordinates, c: Config) -> dict[str, Home]:
    """The units of a rank, in the order of the forward pass, that are at home on disk: the last of them, such that
    --offload-fraction of their elements are."""
    o, offload = c.optimizer, c.offload
    if offload.offload_optimizer != "disk":
        return {}
    width = DTYPES[c.dtype].width
    wide, sizes = 8 if width == 8 else 4, {name: cuts(f.size, dp)[-1] for name, f in units.items()}
    stays, before, out = (1 - offload.offload_fraction) * sum(sizes.values()), 0, dict[str, Home]()
    for name, f in units.items():
        low, high = (sizes[name] // shard * (place.shard + i) for i in (0, 1))
        kinds = {kind: k for kind, k in state_of(f, sizes[name], place, shard, wide, o).items() if k.apart and k.bytes}
        if width == 2 and o.main_params_dtype == "fp32":
            kinds[MASTER] = StateRange(low, high, wide)
        if kinds and high > low and before >= stays - 1e-6 * sum(sizes.values()):
            out[name] = Home(kinds, _pieces(low, high, kinds, o, offload.offload_buffer_size))
        before += sizes[name]
    return out


def _pieces(low: int, high: int, kinds: Mapping[str, StateRange], o: Optimization, most: int) -> tuple[Span, ...]:
    if RULES[o.optimizer].scope != "element" or coded(o):
        return ((low, high),)
    each = max(most // sum(k.width for k in kinds.values()) // PAGE, 1) * PAGE
    return tuple((a, min(a + each, high)) for a in range(low, high, each))
