"""Any nn.Module, trained the same way."""

from megazero.engine.keys import HONOURED, MUST, TABLE, Key, form_of
