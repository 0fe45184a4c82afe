"""Groups of a module's parameters, as torch.optim takes them, over the flat buffers of its units."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megazero.base import UserError
from megazero.engine.blocks import Submodule
from megazero.units import Groups, Unit

# of a group, beside its lr: what the kernels take
OPTIONS = ("weight_decay", "betas", "eps", "decoupled_weight_decay", "momentum", "nesterov")


def grouped(blocks: Iterable[Submodule], groups: Sequence[Mapping[str, Any]]) -> Groups:
    """Raises UserError for a parameter that is to be trained and is in no group."""
    number = {p: i for i, group in enumerate(groups) for p in group["params"]}
    starts: dict[Unit, list[tuple[int, int]]] = {}
    for p, weight, _ in (view for block in blocks for view in block.views):
        if weight.unit.trained:
            if p not in number:
                raise UserError(f"model_parameters: {weight.operand.name} requires a gradient and is in no group; put "
                                "it into one, or freeze it with requires_grad_(False).")
            starts.setdefault(weight.unit, []).append((weight.operand.start, number[p]))
    return Groups(lambda: [{key: group[key] for key in OPTIONS if key in group} for group in groups],
                  lambda unit: _ranges(unit, sorted(starts[unit])))


def _ranges(unit: Unit, starts: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(group, from, to) of this rank's slice, neighbours of one group as one, padding with what lies before it."""
    found: list[tuple[int, int, int]] = []
    for (start, group), stop in zip(starts, [*(s for s, _ in starts[1:]), unit.size], strict=True):
        a, b = max(start, unit.low) - unit.low, min(stop, unit.high) - unit.low
        if found and found[-1][0] == group and a < b:
            found[-1] = group, found[-1][1], b
        elif a < b:
            found.append((group, a, b))
    return found
