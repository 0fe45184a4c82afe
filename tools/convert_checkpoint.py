"""Checkpoints of other trainers, in and out: python tools/convert_checkpoint.py import|export --help

    import    Megatron-LM (legacy, torch_dist), DCP of torch (torchtitan), nanoGPT: which one is told by its files"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert_hf import command, tokenizer_flags
from restricted import load, load_metadata

from megazero.base import Bar, UserError
from megazero.elsewhere import (
    MEGATRON,
    Distributed,
    Source,
    Tensors,
    as_ours,
    legacy_source,
    megatron_architecture,
    megatron_weights,
    torch_dist_source,
    write_model,
)
from megazero.hf import CONFIG, read_json
from megazero.plan import Architecture, flags, from_config, parameter_count
from megazero.settings import commands, option, run
from megazero.state import recognised


@dataclass(frozen=True)
class Import:
    """Writes one of our checkpoints of somebody else's: at its step, with its optimizer where that can be read, else at
    step 0."""

    input: str = option(help="folder or file of another trainer's checkpoint", unit="path")
    output: str = option(help="new folder to write", unit="dir")
    hf_config: str | None = option(None, "a config.json of Hugging Face that describes the model, where the checkpoint "
                                   "does not", unit="file")
    vocab_size: int | None = option(None, "rows of the embedding that are tokens; default: as the checkpoint says, "
                                    "padding included where it does not", unit="tokens")
    tokenizer: str | None = option(None, "folder of Hugging Face's tokenizer files, to keep beside it", unit="dir")


def import_(s: Import) -> None:
    found = recognised(Path(s.input))
    if found is None:
        there = "holds no checkpoint that is known here" if Path(s.input).exists() else "is not there"
        raise UserError(f"--input {s.input}: {there}; name the folder of one step.")
    form, path = found
    if form.name not in SOURCES:
        raise UserError(f"--input {s.input}: is {form.what}; give it to tools/convert_hf.py import.")
    print(f"found       {path}: {form.what}")
    a, source, weights, moments = SOURCES[form.name](path, s)
    tokenizer = write_model(a, source, weights, moments, Path(s.output), Path(s.tokenizer) if s.tokenizer else None,
                            Bar())
    for note in source.notes:
        print(f"left        {note}", file=sys.stderr)
    resumed = bool(moments)
    print(f"imported    {s.input} to {s.output}: {parameter_count(a):,} parameters, "
          + (f"with their optimizer, at step {source.step:,}" if resumed else "weights alone"))
    values: dict[str, object] = {"load": s.output, **({} if resumed else {"finetune": True}), **flags(a)}
    if tokenizer:
        values |= tokenizer_flags(tokenizer, f"{s.output}/tokenizer")
    print(f"train on with: {command(values)}")


Found = tuple[Architecture, Source, Tensors, Mapping[str, Tensors]]


def described(s: Import) -> Architecture | None:
    """The architecture of --hf-config."""
    return from_config(read_json(Path(s.hf_config), CONFIG))[0] if s.hf_config else None


def of_megatron(source: Source, s: Import) -> Found:
    table = source.weights.get("embedding.word_embeddings.weight")
    rows = table.shape[0] if table else 0
    a = described(s) or megatron_architecture(source.words, rows, s.vocab_size, source.path)
    if rows > a.vocab_size:
        print(f"cut         {rows - a.vocab_size:,} rows of its embedding that are padding")
    elif s.vocab_size is None:
        print(f"vocabulary  {rows:,} rows, padding included if there is any: --vocab-size cuts it")
    weights = as_ours(MEGATRON, a, megatron_weights(source, a, source.weights), source)
    plain = Source(source.path, {}, words={})
    moments = {kind: as_ours(MEGATRON, a, megatron_weights(plain, a, of), source)
               for kind, of in source.moments.items()}
    return a, source, weights, moments


def legacy(path: Path, s: Import) -> Found:
    return of_megatron(legacy_source(path, load), s)


def torch_dist(path: Path, s: Import) -> Found:
    found = Distributed(path, load_metadata(path / ".metadata"), load)
    return of_megatron(torch_dist_source(path, found, load), s)


SOURCES: Mapping[str, Callable[[Path, Import], Found]] = {"megatron": legacy, "torch_dist": torch_dist}


if __name__ == "__main__":
    run(lambda: commands("convert_checkpoint.py", __doc__ or "", {"import": (Import, import_)}))
