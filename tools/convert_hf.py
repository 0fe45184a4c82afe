"""Checkpoints to Hugging Face folders and back: python tools/convert_hf.py export|import --help"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megazero.base import DTYPES, Bar, UserError
from megazero.data import named_by
from megazero.hf import export_folder, import_folder
from megazero.plan import flags, parameter_count
from megazero.settings import Config, commands, flagged, flatten, option, run
from megazero.state import INDEX, Reader, foreign


@dataclass(frozen=True)
class Export:
    """Writes a folder that transformers' from_pretrained reads: config.json, safetensors, tokenizer files."""

    load: str = option(help="folder of checkpoints", unit="dir")
    output: str = option(help="new folder to write", unit="dir")
    ckpt_step: int | None = option(None, "step to export; default: the newest", unit="step")
    dtype: str | None = option(None, "of the weights; default: as they are stored (fp32, or fp64)",
                              choices=tuple(DTYPES))
    ema: bool = option(False, "the means of the weights (--ema of the run) instead of them")


@dataclass(frozen=True)
class Import:
    """Writes a checkpoint at step 0 with the weights of a Hugging Face folder: go on with --load DIR --finetune."""

    input: str = option(help="folder with config.json and safetensors", unit="dir")
    output: str = option(help="new folder to write", unit="dir")


def export(s: Export) -> None:
    reader = Reader(s.load, s.ckpt_step, ema=s.ema)
    family, without = export_folder(reader, Path(s.output), s.dtype, told=Bar())
    identity = None if without else reader.index["tokenizer"]
    print(f"exported {reader.folder} to {s.output}: {family.class_name}, "
          f"{'tokenizer ' + identity['type'] if identity else 'no tokenizer'}")
    if without:
        print(f"warning: {without}", file=sys.stderr)


def import_(s: Import) -> None:
    if not (Path(s.input) / "config.json").exists() and (error := own(s.input) or foreign(Path(s.input), "--input")):
        raise error
    a, tokenizer = import_folder(Path(s.input), Path(s.output), told=Bar())
    with_ = type(tokenizer).__name__ if tokenizer else "no tokenizer"
    print(f"imported {s.input} to {s.output}: {parameter_count(a):,} parameters, {with_}")
    values: dict[str, object] = {"load": s.output, "finetune": True, **flags(a)}
    if tokenizer:
        values |= named_by(tokenizer, f"{s.output}/tokenizer")
        values["vocab_size"] = a.vocab_size if a.vocab_size > tokenizer.vocab_size else False
        if a.vocab_size < tokenizer.vocab_size:
            print(f"its tokenizer has {tokenizer.vocab_size:,} ids, its weights {a.vocab_size:,}: it can be exported "
                  "and sampled from, but to train on, give it a tokenizer without the ids that were added")
    print(f"train on with: {command(values)}")


def own(folder: str) -> UserError | None:
    """That a folder holds a checkpoint of this program, which nobody need import."""
    if not Reader.finds(Path(folder)) and not (Path(folder) / INDEX).exists():
        return None
    return UserError(f"--input {folder}: is a checkpoint of this program already; train on with --load {folder}.")


def command(values: dict[str, object]) -> str:
    """Values as flags, where they are not what is so anyway."""
    plain = flatten(Config())
    said = {k: v for k, v in values.items() if v is not False and v is not None and v != () and plain.get(k) != v}
    return " ".join(flagged(k, v) for k, v in said.items())


if __name__ == "__main__":
    run(lambda: commands("convert_hf.py", __doc__ or "", {"export": (Export, export), "import": (Import, import_)}))
