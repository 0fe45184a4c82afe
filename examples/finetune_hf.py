"""Trains a causal language model with transformers' Trainer; nothing in it knows of MegaZero.

    python -m megazero.deepspeed torchrun --nproc_per_node 2 examples/finetune_hf.py \
        --deepspeed examples/ds_zero2.json --output_dir run/finetune --max_steps 60 \
        --per_device_train_batch_size 4 --learning_rate 3e-3 --logging_steps 10

As it stands it makes a tiny model that reads bytes, and learns the pages of this repository's docs/: two cores, half a
minute. With `--model NAME --text a.txt b.txt` it fine-tunes a model of yours. `--resume_from_checkpoint` goes on at any
stage on any number of ranks.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, HfArgumentParser, Trainer, TrainingArguments

DOCS = sorted(map(str, (Path(__file__).parents[1] / "docs").glob("*.md")))


@dataclass
class Settings:
    model: str = field(default="", metadata={"help": "a model of transformers, by name or folder; else a tiny one"})
    text: list[str] = field(default_factory=lambda: DOCS, metadata={"help": "files to learn from"})
    length: int = field(default=128, metadata={"help": "tokens of a sample"})


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Texts, one after another, cut into samples of equal length."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.rows = tokens[:len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def main() -> None:
    settings, args = HfArgumentParser((Settings, TrainingArguments)).parse_args_into_dataclasses()
    texts = [Path(name).read_text(encoding="utf-8") for name in settings.text]
    torch.manual_seed(args.seed)
    if settings.model:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        tokens = [token for text in texts for token in tokenizer(text).input_ids]
        model = AutoModelForCausalLM.from_pretrained(settings.model)
    else:
        tokenizer, tokens = None, list("\0".join(texts).encode())
        model = AutoModelForCausalLM.from_config(GPT2Config(
            vocab_size=256, n_positions=settings.length, n_embd=64, n_layer=4, n_head=4, bos_token_id=0,
            eos_token_id=0))
    samples = Samples(torch.tensor(tokens), settings.length)
    held_out = max(1, len(samples) // 50)
    train, test = torch.utils.data.random_split(samples, [len(samples) - held_out, held_out],
                                                torch.Generator().manual_seed(0))
    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()                                        # whole weights, which from_pretrained reads
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()


if __name__ == "__main__":
    main()
