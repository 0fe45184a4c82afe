"""MegaZero: Megatron-style 3D-parallel pretraining with ZeRO."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megazero.engine import add_config_arguments, from_pretrained, init_distributed, initialize
    from megazero.trainer import Trainer

__version__ = "0.1.0"
HOMES = {"Trainer": "megazero.trainer", "zero": "megazero.engine.zero"}         # of what engine/ itself has not
__all__ = ["Trainer", "add_config_arguments", "from_pretrained", "init_distributed", "initialize", "zero"]


def __getattr__(name: str) -> Any:
    """Doors that need torch, opened by whoever asks for them."""
    if name not in __all__:
        raise AttributeError(f"module megazero has no {name}; there are {', '.join(__all__)}")
    from importlib import import_module
    home = import_module(HOMES.get(name, "megazero.engine"))
    return home if name == "zero" else getattr(home, name)
