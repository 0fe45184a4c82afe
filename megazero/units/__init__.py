"""Where weights, gradients and optimizer state live."""

from megazero.units.actions import UnitActions
from megazero.units.buffers import Buffers, viewed
from megazero.units.codes import Moment
from megazero.units.gate import FIGURES, Gate, Ruling, Verdict, later
from megazero.units.homes import Disk, File
from megazero.units.random import fill_normal, keep_mask, key
from megazero.units.rules import Groups, Updater
from megazero.units.unit import TORCH_DTYPE, Sharing, Unit, Weight
from megazero.units.watch import WeightWatch
