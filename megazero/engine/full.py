"""What ranks share of a parameter that is trained, whole: its master, gradient and moments, to be seen or set.

All ranks come here together. Of a frozen parameter, or one of no engine, there is None.
"""

from typing import Any

import torch
from torch import nn

from megazero.base import UserError
from megazero.engine.engine import Engine
from megazero.engine.hooks import owner_of
from megazero.units import Unit, Weight

Tensor = torch.Tensor


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Its master, of its shape."""
    home = _home(param)
    return None if home is None else _gathered(home[1], home[1].unit.master)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Its master becomes `value`, of its shape, and its weights follow. Raises UserError."""
    home = _known(param, value)
    home[1].unit.updated()
    _scattered(home[1], home[1].unit.master, value)
    home[1].unit.publish()
    home[0].renew()


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Its gradient of this step, the mean over all ranks before clipping, from the last backward pass to step(); None
    before."""
    home = _home(param)
    factor = None if home is None else home[0].mean()
    return None if home is None or factor is None else _gathered(home[1], home[1].unit.grad_slice) * factor.to(
        home[1].unit.grad_slice.dtype)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Raises UserError before the last backward pass of a step."""
    engine, weight = _known(param, value)
    factor = engine.mean()
    if factor is None:
        raise UserError("safe_set_full_grad: the step's gradient is not complete; call it between the last backward "
                        "and step().")
    _scattered(weight, weight.unit.grad_slice, value.to(weight.unit.grad_slice.dtype) / factor)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """A moment: exp_avg, exp_avg_sq or momentum_buffer. Raises UserError for one that the optimizer has not."""
    home = _home(param)
    if home is None:
        return None
    (engine, weight), shape = home, _shape(*home, param, optim_state_key)
    return engine.updater.whole(weight.unit, optim_state_key, weight.operand.name).view(shape)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Raises UserError."""
    home = _home(param)
    engine, weight = _known(param, value, None if home is None else _shape(*home, param, optim_state_key))
    engine.updater.set_whole(weight.unit, optim_state_key, weight.operand.name, value)


# ---- where it is

def _home(param: nn.Parameter) -> tuple[Engine, Weight] | None:
    engine: Any = owner_of(param)
    found = [w for b in engine.all for p, w, _ in b.views if p is param and w.unit.trained] if engine else []
    return (engine, found[0]) if found else None


def _known(param: nn.Parameter, value: Tensor, shape: torch.Size | None = None) -> tuple[Engine, Weight]:
    """Where it is, if the value has the `shape`, by default the parameter's."""
    home, shape = _home(param), param.shape if shape is None else shape
    if not isinstance(value, Tensor) or value.shape != shape:
        kind = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"kind {type(value).__name__}"
        raise UserError(f"safe_set_full: a value of {kind}; give a tensor of the parameter's shape {list(shape)}.")
    if home is None:
        raise UserError("safe_set_full: the parameter is not one that an engine trains; write into it as usual.")
    return home


def _shape(engine: Engine, weight: Weight, param: nn.Parameter, key: str) -> torch.Size:
    """Of what the optimizer keeps of it."""
    kept = engine.kept(weight, param.shape)
    if key not in kept:
        raise UserError(f"optimizer state {key}: is not there; write one of {', '.join(kept)}.")
    return kept[key]


def _inside(unit: Unit, weight: Weight) -> tuple[slice, slice]:
    """Where this rank's slice meets the parameter: of the slice, of the parameter."""
    start, stop = weight.operand.start, weight.operand.stop
    a, b = (min(max(at, unit.low), unit.high) for at in (start, stop))
    return slice(a - unit.low, b - unit.low), slice(a - start, b - start)


def _gathered(weight: Weight, mine: Tensor) -> Tensor:
    """A sum to which ranks add zeros where others have it."""
    unit, o = weight.unit, weight.operand
    unit.updated()
    here, there = _inside(unit, weight)
    whole = mine.new_zeros(o.stop - o.start)
    whole[there] = mine[here]
    return unit.sharing.shard.all_reduce(whole, about=unit.flat.name).wait().view(o.shape)


def _scattered(weight: Weight, mine: Tensor, value: Tensor) -> None:
    here, there = _inside(weight.unit, weight)
    mine[here] = value.detach().reshape(-1).to(mine)[there]
