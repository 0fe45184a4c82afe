"""Where a rank's slices are at home while nobody uses them: in memory, or on disk. Pure.

STATE       masters and moments. An update has three pieces of them in memory: one being read, one being changed, one
            being written. A piece is a range of the rank's slice, of all that is kept there; it is the whole slice
            where a rule looks at more than one element at a time, or its blocks do
GRADIENTS   the sum of a step (from level 2): written when it lands, read to be added to, judged and used
WEIGHTS     the slice that is gathered (level 3): read when it is, one unit ahead of its use, written by an update
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

OFFLOADED = ("offload_optimizer", "offload_gradients", "offload_weights")
PAGE = 4096                 # bytes, and elements: files are read and written in whole pages, of any dtype
MASTER, GRADIENT, PUBLISHED = "weight", "gradient", "published"
STATE, GRADIENTS, WEIGHTS = "state", "gradients", "weights"
UNDER_WAY = {STATE: 3, GRADIENTS: 1, WEIGHTS: 2}            # pieces in memory at a time
Reach = tuple[int, int]      # elements of a unit's buffer


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
    """What of a unit is at home on disk: kinds that are there, and the pieces in which it comes, one after another."""

    kinds: Mapping[str, StateRange]
    pieces: tuple[Reach, ...]

    @property
    def bytes(self) -> int:
        return sum(kept.bytes for kept in self.kinds.values())

    @property
    def file_bytes(self) -> int:
        """Of a file: each kind begins at a page."""
        return sum(ceil(kept.bytes / PAGE) * PAGE for kept in self.kinds.values())

    def of_piece(self, piece: Reach) -> dict[str, Reach]:
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


Homes = dict[tuple[str, str], Home]         # (unit, which of the three)


def homes(units: Mapping[str, Flat], dp: int, shard: int, place: Coordinates, c: Config) -> Homes:
    """What of the units of a rank, in the order of the forward pass, is at home on disk; of states the last ones, such
    that --offload-fraction of their elements are."""
    o, offload = c.optimizer, c.offload
    width = DTYPES[c.dtype].width
    wide, sizes = 8 if width == 8 else 4, {name: cuts(f.size, dp)[-1] for name, f in units.items()}
    stays, before, out = (1 - offload.offload_fraction) * sum(sizes.values()), 0, Homes()
    own = width == 2 and o.main_params_dtype == "fp32"
    for name, f in units.items():
        low, high = (sizes[name] // shard * (place.shard + i) for i in (0, 1))
        if offload.offload_weights == "disk":
            out[name, WEIGHTS] = Home({PUBLISHED if own else MASTER: StateRange(low, high, width)}, ((low, high),))
        if offload.offload_gradients == "disk":
            out[name, GRADIENTS] = Home({GRADIENT: StateRange(low, high, wide)}, ((low, high),))
        if offload.offload_optimizer != "disk":
            continue
        kinds = {kind: k for kind, k in state_of(f, sizes[name], place, shard, wide, o).items() if k.apart and k.bytes}
        if own:
            kinds[MASTER] = StateRange(low, high, wide)
        if kinds and high > low and before >= stays - 1e-6 * sum(sizes.values()):
            out[name, STATE] = Home(kinds, _pieces(low, high, kinds, o, offload.offload_buffer_size))
        before += sizes[name]
    return out


def under_way(found: Homes) -> int:
    """Bytes in memory, at most, of what is at home on disk."""
    return sum(count * max((home.largest for (_, kind), home in found.items() if kind == what), default=0)
               for what, count in UNDER_WAY.items())


def _pieces(low: int, high: int, kinds: Mapping[str, StateRange], o: Optimization, most: int) -> tuple[Reach, ...]:
    if RULES[o.optimizer].scope != "element" or coded(o):
        return ((low, high),)
    each = max(most // sum(k.width for k in kinds.values()) // PAGE, 1) * PAGE
    return tuple((a, min(a + each, high)) for a in range(low, high, each))
