"""Groups of a module's parameters, as torch.optim takes them, over the flat buffers of its units."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from megazero.engine.blocks import Submodule
from megazero.units import Groups, Unit

# of a group, beside its lr: what the kernels take
OPTIONS = ("weight_decay", "betas", "eps", "decoupled_weight_decay", "momentum", "nesterov", "bias_correction",
           "min_coeff", "max_coeff")


def mistaken(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of parameters that are to be trained and in no group, and of those in groups that are not the model's."""
    names = {p: n for n, p in model.named_parameters()}
    inside = {p for group in groups for p in group["params"]}
    if missing := [n for p, n in names.items() if p.requires_grad and p not in inside]:
        yield (f"model_parameters: {missing[0]} requires a gradient and is in no group; put it into one, or freeze it "
               "with requires_grad_(False).")
    if other := [p for p in inside if p not in names]:
        yield (f"model_parameters: a parameter of shape {list(other[0].shape)} is in a group and not in the model; "
               "make it a part of the module that is given.")


def grouped(blocks: Iterable[Submodule], groups: Sequence[Mapping[str, Any]]) -> Groups:
    """Which group each unit's elements are in."""
    number = {p: i for i, group in enumerate(groups) for p in group["params"]}
    starts: dict[Unit, list[tuple[int, int]]] = {}
    for p, weight, _ in (view for block in blocks for view in block.views):
        if weight.unit.trained:
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
