"""Text from a checkpoint: the decoder is built from the index alone, then asked for one token after the other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from megazero.base import UserError
from megazero.comm import Alone
from megazero.data import Tokenizer, load_tokenizer
from megazero.model import Batch, Decoder
from megazero.plan import flat, head_chunk, units
from megazero.state import Reader, mismatches, restore
from megazero.units import TORCH_DTYPE, Unit

Tensor = torch.Tensor


def build_from_checkpoint(reader: Reader, dtype: str = "fp32", device: torch.device | None = None,
                          longest: int | None = None) -> Decoder:
    """The decoder of a checkpoint with its weights, on one device, for logits and not for training: of `longest` tokens
    at most, where that is less than it was trained on. Nothing is made before its sizes are those of the files."""
    then, device = reader.architecture, device or torch.device("cpu")
    a = replace(then, seq_length=min(then.seq_length, longest or then.seq_length), pad_rows=1)
    errors = mismatches(reader, {("weight", p.name): p.shape for spec in units(a) for p in spec.parameters})
    if errors:
        raise UserError(*errors)
    built = {spec.name: Unit(flat(spec), TORCH_DTYPE[dtype], device, trained=False) for spec in units(a)}
    restore(reader, built.values(), {})
    return Decoder(a, built, Alone(), seed=0, recompute="none", device=device, chunk=head_chunk(a, 1, device.type))


def tokenizer_of(reader: Reader) -> Tokenizer:
    """The tokenizer kept beside a checkpoint. Raises UserError where there is none."""
    assert reader.architecture, "else it raises: a module has none"
    identity = reader.index["tokenizer"]
    if identity is None:
        raise UserError(f"--load {reader.folder}: was trained without a tokenizer (mock data, or --vocab-size alone), "
                        "so text means nothing to it; load a checkpoint of a run with --tokenizer-type.")
    return load_tokenizer(identity, reader.folder.parent / "tokenizer")


def hidden(decoder: Decoder, tokens: Tensor) -> Tensor:
    """What the last block leaves, for tokens [b, s]: [b s, h]."""
    batch = Batch(tokens, tokens, torch.ones_like(tokens), torch.arange(len(tokens), device=tokens.device))
    x = torch.zeros((), device=tokens.device)
    with torch.no_grad():
        for part in decoder.parts.values():
            x = part(x, batch)
    return x


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """[b, s] -> [b, s, vocabulary]."""
    return scores(decoder, hidden(decoder, tokens)).view(*tokens.shape, -1)


def scores(decoder: Decoder, x: Tensor) -> Tensor:
    """[t, h] of the last block -> [t, vocabulary]."""
    assert decoder.head is not None, "a decoder without a head gives no logits"
    return decoder.head.logits(x)


def generate(
    decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
    seed: int = 1234, vocab_size: int | None = None, stop: int | None = None,
) -> Iterator[int]:
    """New tokens, one by one: the likeliest at temperature 0, else drawn from the `top_k` likeliest (None: all).

    Ends before `stop`. Only the last `seq_length` tokens are looked at; only ids below `vocab_size` are drawn (padding
    is not). Raises UserError for weights that give no scores.
    """
    device = next(iter(decoder.units.values())).weight_slice.device
    source, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([ids[-decoder.a.seq_length:]], device=device)
        likely = scores(decoder, hidden(decoder, window)[-1:])[0, :vocab_size]
        if not likely.isfinite().all():
            raise UserError("--load: its model's scores are not finite; load another step with --ckpt-step.")
        token = choose(likely.double().cpu(), temperature, top_k, source)
        if token == stop:
            return
        ids.append(token)
        yield token


def choose(scores: Tensor, temperature: float, top_k: int | None, source: torch.Generator) -> int:
    """One token by its score, [vocabulary]."""
    if temperature == 0:
        return int(scores.argmax())
    best, index = scores.topk(min(top_k or len(scores), len(scores)))
    return int(index[torch.multinomial(torch.softmax((best - best.max()) / temperature, 0), 1, generator=source)])


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of new tokens, piece by piece: a character whose bytes are not all there yet waits for the rest."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown):]
            shown = text
    yield tokenizer.decode(ids)[len(shown):]
