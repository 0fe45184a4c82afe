"""What the user says."""

from megazero.settings.command_line import Option, commands, flatten, leaves, option, parse, run
from megazero.settings.config import (
    Config, Data, MEGATRON_WORDS, Model, Optimization, PRESETS, TOKENIZERS, Training, from_command_line)
