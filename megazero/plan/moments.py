"""What an optimizer keeps beside the masters of a unit, laid out: moments of their shape, and sums over a dimension.
Pure."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megazero.plan.layout import ALONE, Axes, Flat, OperandSpec, Parameter, Piece, UnitSpec, flat, spans
from megazero.plan.rules import EMA, RULES


@dataclass(frozen=True)
class MomentSpec:
    """One kind of it. `flat` says which logical tensors it is of and where they lie; [start, stop) are the elements
    that there are, of the unit's whole buffer. A `factor` has a buffer of its own instead, whole on every rank."""

    flat: Flat
    start: int
    stop: int
    factor: bool = False

    def on(self, low: int, high: int) -> tuple[int, int]:
        """Which elements a rank has whose slice of the unit's buffer is [low, high)."""
        return ((self.start, self.stop) if self.factor else
                (min(max(self.start, low), high), min(max(self.stop, low), high)))


def moment_specs(f: Flat, size: int, rule: Callable[[Piece], str], ema: bool,
                 place: Axes = ALONE) -> dict[str, MomentSpec]:
    """Kinds of what is kept beside a unit that is stored in `size` elements and of which each piece has a rule."""
    out: dict[str, MomentSpec] = {}
    moments = dict.fromkeys(kind for r in RULES.values() for kind in r.moments)
    for kind in (*moments, *([EMA] if ema else [])):
        def has(piece: Piece, kind: str = kind) -> bool:
            return kind == EMA or kind in RULES[rule(piece)].beside(len(piece.shard.parameter.shape))

        reach = [(a, b) for there, a, b in spans(f, size, has) if there]
        if reach:
            own = tuple(replace(o, pieces=tuple(filter(has, o.pieces))) for o in f.operands if any(map(has, o.pieces)))
            out[kind] = MomentSpec(replace(f, operands=own), reach[0][0], reach[-1][1])
    for kind, dimension in dict.fromkeys(factor for r in RULES.values() for factor in r.factors):
        sums = [OperandSpec(p.name, (Parameter(p.name, _without(p.shape, dimension), group="vector"),))
                for piece in f.pieces for p in [piece.shard.parameter]
                if len(p.shape) > 1 and (kind, dimension) in RULES[rule(piece)].factors]
        if sums:
            laid = flat(UnitSpec(f.name, tuple(sums)), place)
            out[kind] = MomentSpec(laid, 0, laid.size, factor=True)
    return out


def tensors_of(shape: tuple[int, ...], rule: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what a rule keeps of a tensor, by kind."""
    factors = RULES[rule].factors if len(shape) > 1 else ()
    return {**dict.fromkeys(RULES[rule].beside(len(shape)), shape),
            **{kind: _without(shape, dimension) for kind, dimension in factors}}


def _without(shape: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    at = len(shape) - dimension
    return shape[:at] + shape[at + 1:]
