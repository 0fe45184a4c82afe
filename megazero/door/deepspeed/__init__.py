"""In this process `deepspeed` is MegaZero's engine: what it has is in megazero/engine/names.py."""

from megazero.engine import furnish

furnish(__name__)
