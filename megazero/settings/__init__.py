"""What the user says."""

from megazero.settings.command_line import Option, commands, flatten, leaves, option, parse, run
from megazero.settings.config import (
    MEGATRON_WORDS,
    PRESETS,
    TOKENIZERS,
    Config,
    Data,
    Model,
    Optimizer,
    Training,
    from_command_line,
)

__all__ = [
    "Config", "Data", "MEGATRON_WORDS", "Model", "Optimizer", "Option", "PRESETS", "TOKENIZERS", "Training",
    "commands", "flatten", "from_command_line", "leaves", "option", "parse", "run",
]
