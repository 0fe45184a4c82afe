"""The decoder: what it computes."""

from megazero.model.decoder import Batch, Decoder
