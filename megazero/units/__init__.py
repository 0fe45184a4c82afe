"""Where weights, gradients and optimizer state live."""

from megazero.units.optimizer import Optimizer, Verdict
from megazero.units.random import fill_normal, keep_mask, key
from megazero.units.unit import TORCH_DTYPE, Buffers, Sharing, Unit, Weight

__all__ = [
    "Buffers", "Optimizer", "Sharing", "TORCH_DTYPE", "Unit", "Verdict", "Weight", "fill_normal", "keep_mask",
    "key",
]
