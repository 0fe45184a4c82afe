"""What a run may log of its weights, beside what the gate knows: how long they are, how much of a gradient is zero, how
far an update moved each unit's."""

from collections.abc import Mapping, Sequence

import torch

from megazero.comm import Group
from megazero.plan import GRADIENTS
from megazero.units.unit import Unit

Tensor = torch.Tensor


class WeightWatch:
    """One rank's part of it, step by step. Elements count on the rank that owns them."""

    def __init__(self, units: Sequence[Unit], names: Sequence[str], world: Group, asked: Sequence[str]) -> None:
        """`names`: of all units of the run, by which update ratios are told; `asked`: params_norm, num_zeros,
        update_ratio."""
        self.units, self.names, self.world, self.asked = list(units), list(names), world, asked
        self.zeros = torch.zeros((), dtype=torch.float64)
        self.masters: dict[str, Tensor] = {}

    def before(self) -> None:
        """The step's gradients are here, and not yet used."""
        if "num_zeros" in self.asked:
            counts = []
            for u in self.units:
                with u.home.present(u.flat.name, GRADIENTS, changed=False):
                    counts += [(part == 0).sum() for part in _owned(u, u.grad_slice)]
            self.zeros = torch.stack(counts).sum().double() if counts else torch.zeros((), dtype=torch.float64)
        if "update_ratio" in self.asked:
            for u in self.units:
                with u.present():
                    self.masters[u.flat.name] = u.master.clone()

    def after(self) -> Tensor:
        """float64 [2 + 2 units]: squares of weights, zeros, squares of each unit's update and weights, of all ranks."""
        squares: dict[str, tuple[Tensor, Tensor]] = {}
        for u in self.units:
            u.updated()
            with u.present():
                own = _squares(_owned(u, u.master))
                moved = u.master - self.masters[u.flat.name] if "update_ratio" in self.asked else u.master[:0]
            squares[u.flat.name] = _squares(_owned(u, moved)) if len(moved) else torch.zeros_like(own), own
        self.masters = {}
        nothing = torch.zeros((), dtype=torch.float64, device=next((u.master.device for u in self.units), None))
        of = [squares.get(name, (nothing, nothing)) for name in self.names]
        total = torch.stack([own for _, own in of]).sum()
        figures = torch.stack([total, self.zeros.to(nothing.device), *(x for pair in of for x in pair)])
        return self.world.all_reduce(figures).wait()

    def told(self, figures: Sequence[float]) -> dict[str, float]:
        """What the log says of them."""
        total, zeros, *pairs = figures
        ratios = {f"update_ratio/{name}": (moved / own) ** 0.5 if own else 0.0
                  for name, moved, own in zip(self.names, pairs[::2], pairs[1::2], strict=True)}
        said: Mapping[str, dict[str, float]] = {"params_norm": {"params_norm": total**0.5},
                                                "num_zeros": {"num_zeros": zeros}, "update_ratio": ratios}
        return {key: value for what in self.asked for key, value in said[what].items()}


def _owned(unit: Unit, buffer: Tensor) -> list[Tensor]:
    return [buffer[a:b] for p, a, b in unit.pieces() if unit.owner and p.shard.owner]


def _squares(parts: Sequence[Tensor]) -> Tensor:
    sums = [part.double().square().sum() for part in parts]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
