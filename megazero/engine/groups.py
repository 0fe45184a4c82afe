"""Groups of a module's parameters, as torch.optim takes them, over the flat buffers of its units."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from megazero.plan import RULES
from megazero.units import Groups

# of a group, beside its lr: what the kernels take
OPTIONS = ("weight_decay", "betas", "eps", "decoupled_weight_decay", "momentum", "nesterov", "bias_correction",
           "min_coeff", "max_coeff", "beta2_decay", "d")


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


def grouped(model: nn.Module, groups: Sequence[Mapping[str, Any]], rule: str) -> Groups:
    """Which group each parameter is in. One that says `use_muon` False has the rule of what is not a matrix."""
    number = {p: i for i, group in enumerate(groups) for p in group["params"]}
    names = {name: number[p] for name, p in model.named_parameters(remove_duplicate=False) if p in number}
    rules = [rule if group.get("use_muon", True) else RULES[rule].rest for group in groups]
    return Groups(lambda piece: names[piece.shard.parameter.name], rules, range(len(groups)),
                  lambda: [{key: group[key] for key in OPTIONS if key in group} for group in groups])
