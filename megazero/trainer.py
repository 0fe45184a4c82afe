"""megazero.Trainer: transformers' own on this engine, for a script that is not under `python -m megazero.deepspeed`.
It must be imported before transformers, which asks for DeepSpeed while it is imported."""

import os
import runpy
import sys
from typing import Any

from megazero.base import UserError
from megazero.deepspeed import DOOR, entered, one_rank


def _open() -> None:
    """`import deepspeed` means this engine, in this process and in those that it starts. Raises UserError."""
    if str(DOOR) in sys.path:
        return
    if before := [name for name in ("transformers", "accelerate", "deepspeed") if name in sys.modules]:
        raise UserError(f"megazero.Trainer: {before[0]} was imported before, and looked for DeepSpeed then; import "
                        "megazero.Trainer first, or start the script with python -m megazero.deepspeed.")
    sys.path.insert(0, str(DOOR))
    os.environ.update(entered(os.environ))
    if "RANK" not in os.environ:
        os.environ.update(one_rank())
    runpy.run_path(str(DOOR / "sitecustomize.py"))


_open()
import transformers  # noqa: E402

from megazero.engine import DeepSpeedEngine  # noqa: E402


class Trainer(transformers.Trainer):
    """Its words and its arguments, with `TrainingArguments(deepspeed=...)`: a ds_config.json or a mapping. Raises
    UserError for what transformers would leave aside without a word."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if not self.is_deepspeed_enabled:
            raise UserError("megazero.Trainer: args.deepspeed is missing; write TrainingArguments(deepspeed="
                            '"ds_config.json", ...), or use transformers.Trainer.')
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise UserError("megazero.Trainer: optimizers is given, which transformers leaves aside under DeepSpeed; "
                            "write it into the ds_config.json, or make it in create_optimizer.")

    def train(self, *given: Any, **named: Any) -> Any:
        """As theirs, and after `evaluate` or another `train` too: the engine of before gives its module back."""
        if isinstance(engine := self.model_wrapped, DeepSpeedEngine):
            engine.destroy()
            self.model = self.model_wrapped = engine.module
            self.deepspeed = None
        return super().train(*given, **named)
