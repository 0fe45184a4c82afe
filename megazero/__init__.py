"""MegaZero: Megatron-style 3D-parallel pretraining with ZeRO."""

__version__ = "0.1.0"
