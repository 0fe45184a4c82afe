"""MegaZero: Megatron-style 3D-parallel pretraining with ZeRO."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megazero.engine import add_config_arguments, from_pretrained, init_distributed, initialize

__version__ = "0.1.0"
__all__ = ["add_config_arguments", "from_pretrained", "init_distributed", "initialize", "zero"]


def __getattr__(name: str) -> Any:
    """Doors that need torch, opened by whoever asks for them."""
    if name not in __all__:
        raise AttributeError(f"module megazero has no {name}; there are {', '.join(__all__)}")
    from importlib import import_module
    return import_module("megazero.engine.zero") if name == "zero" else getattr(import_module("megazero.engine"), name)
