"""MegaZero: Megatron-style 3D-parallel pretraining with ZeRO."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megazero.engine import add_config_arguments, init_distributed, initialize

__version__ = "0.1.0"
__all__ = ["add_config_arguments", "init_distributed", "initialize"]


def __getattr__(name: str) -> Any:
    """Doors that need torch, opened by whoever asks for them."""
    if name not in __all__:
        raise AttributeError(f"module megazero has no {name}; there are {', '.join(__all__)}")
    from importlib import import_module
    return getattr(import_module("megazero.engine"), name)
