"""The rules by which optimizers change weights, and which rule, rate and decay each weight has, as facts; units/ has
their kernels. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from megazero.settings import Config, Optimization

# of parameters, as they lie in a flat buffer: decayed?
GROUPS = {"matrix": True, "table": True, "positions": True, "vector": False}


@dataclass(frozen=True)
class Rule:
    """`moments`: what is kept beside each master, in torch's words and of the master's dtype.

    scope       what an update must see at once: an `element`, `statistics` of a logical tensor, or a whole `matrix`
    factors     kept of a tensor of several dimensions instead: (kind, which dimension, from the end, is summed over)
    rest        the rule of what is not a matrix, where that is another
    """

    moments: tuple[str, ...]
    scope: str = "element"
    factors: tuple[tuple[str, int], ...] = ()
    rest: str = ""

    def beside(self, dimensions: int) -> tuple[str, ...]:
        """Moments of a tensor's own shape."""
        return () if self.factors and dimensions > 1 else self.moments


EMA = "ema"                             # kind of the mean of masters (--ema), in checkpoints too

RULES = {
    "adam": Rule(moments=("exp_avg", "exp_avg_sq")),
    "sgd": Rule(moments=("momentum_buffer",)),
    "lion": Rule(moments=("exp_avg",)),
    "lamb": Rule(moments=("exp_avg", "exp_avg_sq"), scope="statistics"),
    "ademamix": Rule(moments=("exp_avg", "exp_avg_slow", "exp_avg_sq")),
    "adafactor": Rule(moments=("variance",), scope="statistics", factors=(("row_var", 1), ("col_var", 2))),
    "muon": Rule(moments=("momentum_buffer",), scope="matrix", rest="adam"),
}


class ParameterGroup(NamedTuple):
    """What weights of one group have in common. `rate`: which of Plan.rates they follow."""

    rule: str
    decayed: bool
    rate: int


# flags of rates -> which weights have them, by name and group; of several the first
RATES: Mapping[str, Callable[[str, str], bool]] = {
    "lr_embedding": lambda name, group: name.startswith(("embedding.", "positions.")),
    "lr_head": lambda name, group: name.startswith("head.output."),
    "lr_vectors": lambda name, group: group == "vector",
    "decoupled_lr": lambda name, group: group == "table",
}


def rates_of(o: Optimization) -> list[str]:
    """The flags of the rates that a run has, --lr first."""
    return ["lr", *(flag for flag in RATES if getattr(o, flag) is not None)]


def group_of(name: str, group: str, o: Optimization) -> ParameterGroup:
    """That of a weight of our decoder."""
    rule = o.optimizer if group == "matrix" else RULES[o.optimizer].rest or o.optimizer
    spared = any(fnmatchcase(name, pattern) for pattern in o.no_weight_decay_on or ())
    rates = rates_of(o)
    rate = next((i for i, flag in enumerate(rates) if i and RATES[flag](name, group)), 0)
    return ParameterGroup(rule, GROUPS[group] and not spared, rate)


def iterating(asked: str | None, dtype: str, device: str) -> str:
    """The dtype of Muon's iterations, and of what travels for them: as asked, fp64 where all is, or the device's."""
    return asked or ("fp64" if dtype == "fp64" else "bf16" if device == "cuda" else "fp32")


def dtype_of(kind: str, o: Optimization) -> str:
    """In which a kind of moment is kept: fp32 stands for that of the gradients."""
    return {"exp_avg": o.exp_avg_dtype, "exp_avg_slow": o.exp_avg_dtype, "exp_avg_sq": o.exp_avg_sq_dtype}.get(
        kind, "fp32")


def coded(o: Optimization) -> bool:
    """Are weights or moments in fewer bytes than what they are computed in?"""
    return o.main_params_dtype != "fp32" or any(dtype_of(kind, o) != "fp32" for kind in RULES[o.optimizer].moments)


def watched(c: Config) -> list[str]:
    """What is logged of weights and gradients beside the loss."""
    asked = {"params_norm": c.logging.log_params_norm, "num_zeros": c.logging.log_num_zeros_in_grad,
             "update_ratio": c.logging.log_update_ratio}
    return [what for what, wish in asked.items() if wish]
