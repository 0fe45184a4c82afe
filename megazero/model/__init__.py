"""The decoder: what it computes."""

from megazero.model.decoder import Batch, Decoder

__all__ = [
    "Batch", "Decoder",
]
