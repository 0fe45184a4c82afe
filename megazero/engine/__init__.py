"""Any nn.Module, trained the same way."""

from megazero.engine.deepspeed_engine import DeepSpeedEngine
from megazero.engine.initialize import add_config_arguments, init_distributed, initialize
from megazero.engine.keys import HONOURED, MUST, TABLE, Key, form_of
from megazero.engine.names import furnish
from megazero.engine.zero import from_pretrained
from megazero.engine.values import packed
