"""What follows from the settings: pure values, no device and no process."""

from megazero.plan.action import Action, around, written
from megazero.plan.architecture import FREE, Architecture, LayerKind, head_chunk, parameter_count, units, wide_tokens
from megazero.plan.moments import MomentSpec, moment_specs, tensors_of
from megazero.plan.checks import checks
from megazero.plan.cost import memory
from megazero.plan.dealing import Matrix, Ranks, Wave, deal
from megazero.plan.devices import device_of, named
from megazero.plan.families import family_of, from_config
from megazero.plan.family import Family, Row, obstacles, rows, shapes, to_config, zeros
from megazero.plan.homes import (
    GRADIENT, GRADIENTS, MASTER, OFFLOADED, PAGE, PUBLISHED, STATE, WEIGHTS, Homes, Reach)
from megazero.plan.layout import (
    Box, Flat, Operand, OperandSpec, Parameter, Piece, Shape, Shard, UnitSpec, cuts, flat, intersect, spans,
    tiles)
from megazero.plan.mesh import Coordinates, Mesh, all_reduce_bytes
from megazero.plan.operations import flops_per_token
from megazero.plan.plan import Plan, resolve
from megazero.plan.program import Part
from megazero.plan.progress import LossScale, Progress, curve_of, loss_scale, progress_of
from megazero.plan.rope import Llama3, Rotary
from megazero.plan.rules import EMA, RULES, coded, dtype_of, group_of, iterating, watched
from megazero.plan.show import describe
from megazero.plan.sizes import Sizes, ranks_asked, sizes
from megazero.plan.sums import Reductions, Zero, ending
from megazero.plan.tiles import BLOCK, Tile, blocks_here, blocks_of, tiled
from megazero.plan.words import architecture_of, flags, told_apart
