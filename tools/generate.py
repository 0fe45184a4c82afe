"""Continues a text with a trained checkpoint: python tools/generate.py --help"""

from dataclasses import dataclass

import torch

from megazero.base import UserError
from megazero.data import is_text
from megazero.run import build_from_checkpoint, generate, stream_text, tokenizer_of
from megazero.settings import option, parse, run
from megazero.state import Reader


@dataclass(frozen=True)
class Generate:
    """Prints the prompt and what a checkpoint's model writes after it, token by token."""

    load: str = option(help="folder of checkpoints", unit="dir")
    prompt: str = option(help="text to continue; empty: a new document")
    max_new_tokens: int = option(100, "tokens to write", unit="tokens")
    temperature: float = option(0.0, "0 takes the likeliest token; higher is more varied")
    top_k: int | None = option(None, "draw from this many likeliest tokens; default: all", unit="tokens")
    seed: int = option(1234, "of the draws")
    ckpt_step: int | None = option(None, "step to load; default: the newest", unit="step")
    ema: bool = option(False, "the means of the weights (--ema of the run) instead of them")
    device: str = option("auto", "where to compute; auto takes CUDA where there is one",
                         choices=("auto", "cpu", "cuda"))


def checks(s: Generate) -> list[str]:
    """A sentence for each value that cannot be."""
    return [sentence for wrong, sentence in (
        (not is_text(s.prompt), f"--prompt {s.prompt!r}: is not UTF-8 text; write it in UTF-8."),
        (s.max_new_tokens < 0, f"--max-new-tokens {s.max_new_tokens}: must be 0 or greater."),
        (not 0 <= s.temperature < float("inf"), f"--temperature {s.temperature:g}: must be 0 or greater."),
        (not 0 <= s.seed < 2**63, f"--seed {s.seed}: must be at least 0 and less than 2^63."),
        (s.top_k is not None and s.top_k < 1, f"--top-k {s.top_k}: must be at least 1."),
        (s.top_k is not None and s.temperature == 0,
         f"--top-k {s.top_k}: has no effect at temperature 0; add --temperature 1, or leave it out."),
        (s.device == "cuda" and not torch.cuda.is_available(),
         "--device cuda: there is no CUDA device; write --device cpu, or auto."),
    ) if wrong]


def main() -> None:
    s = parse(Generate, prog="generate.py")
    errors = checks(s)
    if errors:
        raise UserError(*errors)
    reader = Reader(s.load, s.ckpt_step, ema=s.ema)
    tokenizer = tokenizer_of(reader)
    ids = tokenizer.encode(s.prompt) or ([tokenizer.eod] if tokenizer.eod is not None else [])
    if not ids:
        raise UserError(f"--prompt {s.prompt!r}: is empty, and this tokenizer has no token that starts a document; "
                        "give some text.")
    decoder = build_from_checkpoint(reader, device=torch.device(
        "cuda" if s.device != "cpu" and torch.cuda.is_available() else "cpu"), longest=len(ids) + s.max_new_tokens)
    if max(ids) >= decoder.a.vocab_size:
        raise UserError(f"--prompt: holds token {max(ids)}, this model knows {decoder.a.vocab_size}; "
                        "write the prompt without it.")
    tokens = generate(decoder, ids, s.max_new_tokens, s.temperature, s.top_k, s.seed,
                      tokenizer.vocab_size, tokenizer.eod)
    print(s.prompt, end="", flush=True)
    for text in stream_text(tokenizer, ids, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)
