"""The rules by which optimizers change weights, as facts; units/rules.py has their kernels. Pure."""

from dataclasses import dataclass

from megazero.settings import Optimization

# of parameters, as they lie in a flat buffer: decayed?
GROUPS = {"matrix": True, "table": True, "positions": True, "vector": False}


@dataclass(frozen=True)
class Rule:
    """`moments`: what is kept beside each master, in torch's words and of the master's dtype. `scope`: what an update
    must see at once, an `element`, `statistics` of a logical tensor, or a whole `matrix`."""

    moments: tuple[str, ...]
    scope: str = "element"


EMA = "ema"                             # kind of the mean of masters (--ema), in checkpoints too

RULES = {
    "adam": Rule(moments=("exp_avg", "exp_avg_sq")),
    "sgd": Rule(moments=("momentum_buffer",)),
    "lion": Rule(moments=("exp_avg",)),
    "lamb": Rule(moments=("exp_avg", "exp_avg_sq"), scope="statistics"),
    "ademamix": Rule(moments=("exp_avg", "exp_avg_slow", "exp_avg_sq")),
}


def beside(o: Optimization) -> tuple[str, ...]:
    """Kinds of what is kept beside each master, each of its size and dtype."""
    return (*RULES[o.optimizer].moments, *([EMA] if o.ema is not None else []))
