"""The gate of a step: one reduction over all ranks judges whether it happens.

The verdict is a number on the device: the fused kernels of torch take it (`found_inf`) together with the factor that
undoes loss scale, token count and clipping (`grad_scale`), so a step needs no word from the host.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from megazero.comm import Group
from megazero.plan import GRADIENTS
from megazero.units.unit import Unit

Tensor = torch.Tensor
NORM = 1 << 15                          # elements of a norm at a time: torch on CPU is off by 1e-3 for five million
FIGURES = ("loss", "tokens")            # what ranks tell the gate: sums of the masked losses, and of the masks


@dataclass(frozen=True)
class Verdict:
    """What the gate knows of a step, on the device. The host reads it when it likes.

    loss        mean over valid tokens                  norm        of the whole gradient, unscaled, before clipping
    found_inf   0 or 1, float32: skip the step          factor      what each gradient is multiplied by
    norms       of the pieces this rank owns (Gate.names): finds the culprit of a skipped step
    stop        how many ranks want to stop after this step
    astray      0 or 1, float32: calls of ranks were about different things; then found_inf is 1 too
    """

    loss: Tensor
    norm: Tensor
    found_inf: Tensor
    factor: Tensor
    norms: Tensor
    stop: Tensor
    astray: Tensor


@dataclass
class Ruling:
    """What a step's verdict is made of, handed along while its program runs; and the verdict, once there is one.

    Gradients are of scale / nominal x the sum of losses; `told` are this rank's figures so far, float64; `witness` has
    for each unit a number that is finite if this rank's own gradients of it are. (An evaluation is only told figures.)
    """

    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    nominal: int = 1
    lr: Tensor = field(default_factory=lambda: torch.zeros(()))
    wish: Callable[[], object] = bool   # does this rank want to stop after this step? Asked when gradients are there
    told: dict[str, Tensor] = field(default_factory=dict)
    witness: dict[str, Tensor] = field(default_factory=dict)
    trace: float | None = None          # of this rank's calls (comm's Line), where all ranks make the same
    verdict: Verdict | None = None

    def tell(self, figure: str, value: Tensor) -> None:
        """Adds to a figure; any rank may, in any action."""
        self.told[figure] = self.told[figure] + value if figure in self.told else value.double()


class Gate:
    """Judges the steps of a rank that updates these units."""

    def __init__(self, units: Sequence[Unit], clip: float, world: Group, tells: bool) -> None:
        """`clip`: largest norm, 0 for any. `tells`: of ranks that know the same figures one tells them."""
        self.clip, self.world, self.tells = clip, world, tells
        like = units[0].grad_slice if units else torch.zeros(0)         # none: there will be no steps
        self.wide, self.device = like.dtype, like.device
        self.names: list[str] = []                              # of the pieces whose norms are taken
        self._pieces: list[tuple[Unit | None, list[Tensor]]] = []   # those at home elsewhere by unit, others together
        for u in (u for u in units if u.owner):
            parts = [(p.shard.parameter.name, part) for p, a, b in u.pieces() if p.shard.owner
                     for part in ([u.grad_slice[a:b]] if u.grad_slice.is_cuda else u.grad_slice[a:b].split(NORM))]
            elsewhere = u if (u.flat.name, GRADIENTS) in u.home.homes else None
            if elsewhere or not self._pieces or self._pieces[-1][0] is not None:
                self._pieces.append((elsewhere, []))
            self._pieces[-1][1].extend(part for _, part in parts)
            self.names += [name for name, _ in parts]
        self._none = torch.zeros(0, dtype=torch.float64, device=self.device)

    def figures(self, ruling: Ruling) -> Tensor:
        """What this rank tells of FIGURES, [2]: 0 where it knows nothing, or another rank tells the same."""
        zero = torch.zeros((), dtype=torch.float64, device=self._none.device)
        return torch.stack([ruling.told.get(figure, zero) if self.tells else zero for figure in FIGURES])

    def judge(self, ruling: Ruling) -> Verdict:
        """One reduction: squares of owned gradients, the figures that ranks told, and who was asked to stop, so that
        all stop after the same step. The factor makes the gradients those of the mean over valid tokens."""
        each = [norm for unit, parts in self._pieces for norm in self._norms(unit, parts)]
        norms = torch.stack(each).double() if each else self._none
        squares = norms.square().sum()
        mine = torch.stack((squares, *self.figures(ruling), torch.full_like(squares, bool(ruling.wish()))))
        if ruling.trace is not None:
            mine = torch.cat((mine, mine.new_tensor([1, ruling.trace, ruling.trace**2])))
        squares, loss, tokens, stops, *traces = self.world.all_reduce(mine).wait().unbind()
        astray = _differ(*traces) if traces else torch.zeros_like(squares)
        tokens = tokens.clamp(min=1)
        factor = ruling.nominal / tokens / ruling.scale.double()
        norm = squares.sqrt() * factor
        if self.clip > 0:
            factor = factor * (self.clip / (norm + 1e-6)).clamp(max=1.0)
        found = ~(norm.isfinite() & loss.isfinite() & (astray == 0))
        return Verdict(loss=loss / tokens, norm=norm, found_inf=found.float(), factor=factor, norms=norms, stop=stops,
                       astray=astray.float())


    def _norms(self, unit: Unit | None, parts: list[Tensor]) -> Sequence[Tensor]:
        with unit.home.present(unit.flat.name, GRADIENTS, changed=False) if unit else nullcontext():
            return torch._foreach_norm(parts, 2, dtype=self.wide) if parts else ()


def _differ(ranks: Tensor, traces: Tensor, squares: Tensor) -> Tensor:
    """Is one trace unlike another? They vary exactly where the mean of squares is not the square of the mean; 16 bits
    each, so float64 holds all of it for 1,000 ranks."""
    return (ranks * squares != traces.square()).to(squares.dtype)


def later(figures: Tensor) -> Callable[[], list[float]]:
    """The figures on their way to the host; the call waits until they are there,
    and for nothing that was started after them."""
    there = figures.to("cpu", non_blocking=True)                # from CUDA: into pinned memory
    if not figures.is_cuda:
        return there.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return there.tolist()

    return read
