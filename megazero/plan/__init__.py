"""What follows from the settings: pure values, no device and no process."""

from megazero.plan.architecture import FREE, Architecture, Rotary, flops_per_token, parameter_count, units
from megazero.plan.checks import checks
from megazero.plan.cost import LOGITS, describe, memory
from megazero.plan.families import (
    Family,
    Row,
    architecture_of,
    family_of,
    flags,
    from_config,
    obstacles,
    rows,
    shapes,
    to_config,
    zeros,
)
from megazero.plan.layout import (
    Box,
    Flat,
    Operand,
    OperandSpec,
    Parameter,
    Piece,
    Shape,
    UnitSpec,
    cuts,
    flat,
    intersect,
)
from megazero.plan.mesh import Mesh, all_reduce_bytes
from megazero.plan.plan import Plan, plan, resolve
from megazero.plan.program import Action, Part, Zero, around
from megazero.plan.progress import LossScale, Progress, learning_rate, loss_scale, position
from megazero.plan.rules import GROUPS, RULES

__all__ = [
    "Action", "Architecture", "Box", "FREE", "Family", "Flat", "GROUPS", "LOGITS", "LossScale", "Mesh", "Operand",
    "OperandSpec", "Parameter", "Part", "Piece", "Plan", "Progress", "RULES", "Rotary", "Row", "Shape", "UnitSpec",
    "Zero", "all_reduce_bytes", "architecture_of", "around", "checks", "cuts", "describe", "family_of", "flags",
    "flat", "flops_per_token", "from_config", "intersect", "learning_rate", "loss_scale", "memory", "obstacles",
    "parameter_count", "plan", "position", "resolve", "rows", "shapes", "to_config", "units", "zeros",
]
