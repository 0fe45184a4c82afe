"""A training script as people write them for transformers' Trainer: it knows nothing of MegaZero. What it saw goes to a JSON file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

LENGTH, WORDS = 16, 64


@dataclass
class Own:
    """Beside TrainingArguments."""

    facts: str = field(default="", metadata={"help": "where to write what was seen, a file for each rank"})
    kind: str = "llama"
    samples: int = 64
    lora: bool = False
    resume: str | None = None
    pretrained: str | None = None
    evaluate_only: bool = False
    save: bool = False


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences that count, of uneven length: what is padded is -100 in labels."""

    def __init__(self, n: int, first: int) -> None:
        self.n, self.first = n, first

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        i += self.first
        length = 4 + i * 7 % (LENGTH - 4)
        ids = (torch.arange(LENGTH) * (1 + i % 5) + i) % (WORDS - 3) + 3
        keep = torch.arange(LENGTH) < length
        return {"input_ids": ids.where(keep, torch.tensor(0)), "labels": ids.where(keep, torch.tensor(-100)), "attention_mask": keep.long()}


def built(own: Own) -> Any:
    torch.manual_seed(3)
    if own.pretrained:
        model = (transformers.AutoModelForSeq2SeqLM if own.kind == "t5" else transformers.AutoModelForCausalLM).from_pretrained(own.pretrained)
    elif own.kind == "t5":
        model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))
    else:
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, pad_token_id=0))
    if own.lora:
        import peft
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                                                           init_lora_weights="gaussian"))
    return model


def main() -> None:
    own: Own
    own, args = transformers.HfArgumentParser((Own, transformers.Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
    seen: list[int] = []

    class Watching(transformers.Seq2SeqTrainer if own.kind == "t5" else transformers.Trainer):                                      # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Tensor:
            for ids in inputs["input_ids"]:                     # first, second, length: of one sample alone
                seen.append(int(ids[0] + 100 * ids[1] + 10_000 * ids.count_nonzero()))
            return super().training_step(model, inputs, *given, **named)

    def metrics(p: Any) -> dict[str, float]:
        return {"said": float(abs(p.predictions if not isinstance(p.predictions, tuple) else p.predictions[0]).sum())}

    torch.manual_seed(7)
    trainer = Watching(model=built(own), args=args, train_dataset=Texts(own.samples, 0), eval_dataset=Texts(6, 1000),
                       compute_metrics=metrics if args.predict_with_generate else None)
    if own.evaluate_only:
        seen += [int(p.argmax() + p.size) for p in trainer.predict(trainer.train_dataset).predictions]
    else:
        trainer.train(resume_from_checkpoint=own.resume)
    if own.save:
        trainer.save_model()
    engine = trainer.model_wrapped
    state = trainer.accelerator.get_state_dict(engine) or {}
    steps = getattr(engine, "global_steps", None)
    facts = {"history": trainer.state.log_history, "type": str(trainer.accelerator.distributed_type), "processes": args.world_size, "steps": steps,
             "engine": type(engine).__name__, "seen": seen, "skipped": getattr(engine, "skipped_steps", None), "best": trainer.state.best_model_checkpoint,
             "weights": {name.removeprefix("module."): [float(t.double().sum()), float(t.double().norm())] for name, t in state.items()},
             "moved": [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line],
             "evaluated": [trainer.evaluate()["eval_loss"]]}
    Path(f"{own.facts}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
