"""What the user says."""

from megazero.settings.command_line import (
    Option, build, commands, flagged, flatten, leaves, nearest, option, parse, run)
from megazero.settings.config import (
    PRESETS, TOKENIZERS, Config, Data, Model, Offload, Optimization, Training, from_command_line, in_our_words,
    with_flags_of_a_run)
from megazero.settings.megatron_words import REFUSED, RENAMED, WITHOUT, megatron_defaults
from megazero.settings.moving import (
    as_file, from_configuration, of_preprocessing, without_weights)
from megazero.settings.script import Launch, launch_of
