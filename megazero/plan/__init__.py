"""What follows from the settings: pure values, no device and no process."""

from megazero.plan.architecture import Architecture, Rotary, flops_per_token, parameter_count, units
from megazero.plan.checks import checks
from megazero.plan.cost import LOGITS, describe, memory
from megazero.plan.devices import device_of
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
from megazero.plan.mesh import Coordinates, Mesh, all_reduce_bytes
from megazero.plan.plan import Plan, resolve
from megazero.plan.program import Action, Part, Zero, around
from megazero.plan.progress import LossScale, Progress, loss_scale
from megazero.plan.rules import GROUPS
from megazero.plan.sizes import Sizes, ranks_asked

__all__ = [
    "Action", "Architecture", "Box", "Coordinates", "Family", "Flat", "GROUPS", "LOGITS", "LossScale", "Mesh",
    "Operand", "OperandSpec", "Parameter", "Part", "Piece", "Plan", "Progress", "Rotary", "Row", "Shape", "Sizes",
    "UnitSpec", "Zero", "all_reduce_bytes", "architecture_of", "around", "checks", "cuts", "describe", "device_of",
    "family_of", "flags", "flat", "flops_per_token", "from_config", "intersect", "loss_scale", "memory",
    "obstacles", "parameter_count", "ranks_asked", "resolve", "rows", "shapes", "to_config", "units", "zeros",
]
