"""Checkpoints of other trainers, in and out: python tools/convert_checkpoint.py import|export --help

    import    Megatron-LM (legacy, torch_dist), torchtitan and other DCP, nanoGPT, DeepSpeed (levels 0 to 3, universal),
              pickled Hugging Face folders: which one is told by the names of its files
    export    weights of ours for Megatron-LM (legacy, torch_dist), torchtitan (DCP), nanoGPT, llama.cpp (GGUF)"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert_hf import command, own
from pickled import namespace, save, save_distributed, save_torch_dist
from restricted import load, load_metadata

from megazero.base import DTYPES, Bar, UserError, draft_of, whole
from megazero.data import named_by
from megazero.elsewhere import (
    LINEAR,
    Distributed,
    NamedRow,
    Source,
    Tensors,
    adopted,
    arguments_of,
    bin_source,
    dcp_source,
    deepspeed_source,
    divisible_by,
    fused,
    legacy_source,
    mapped,
    megatron_architecture,
    megatron_rows,
    nanogpt_rows,
    nanogpt_source,
    of_hugging_face,
    of_megatron,
    of_nanogpt,
    of_torchtitan,
    on_rank,
    stacked,
    theirs,
    torch_dist_source,
    torchtitan_rows,
    universal_source,
    with_padding,
    write_gguf,
    write_model,
    write_module,
)
from megazero.hf import CONFIG, read_json
from megazero.plan import Architecture, flags, from_config, parameter_count
from megazero.settings import commands, option, run
from megazero.state import Reader, recognised
from megazero.units import TORCH_DTYPE

Found = tuple[Architecture, list[NamedRow], Source]


@dataclass(frozen=True)
class Import:
    """Writes one of our checkpoints of somebody else's: at its step, with its optimizer where that can be read, else at
    step 0. Which trainer wrote it is told by the names of its files."""

    input: str = option(help="folder or file of another trainer's checkpoint", unit="path")
    output: str = option(help="new folder to write", unit="dir")
    hf_config: str | None = option(None, "a config.json of Hugging Face that describes the model, where the checkpoint "
                                   "does not", unit="file")
    vocab_size: int | None = option(None, "rows of the embedding that are tokens; default: as the checkpoint says, "
                                    "padding included where it does not", unit="tokens")
    num_attention_heads: int | None = option(None, "of a Llama in a DCP, whose shapes do not say it", unit="heads")
    rotary_base: float | None = option(None, "of a Llama in a DCP")
    norm_epsilon: float = option(1e-5, "of a Llama in a DCP")
    seq_length: int = option(2048, "of a Llama in a DCP: what it goes on with", unit="tokens")
    tokenizer: str | None = option(None, "folder of Hugging Face's tokenizer files, to keep beside it", unit="dir")


def import_(s: Import) -> None:
    found = recognised(Path(s.input))
    if found is None:
        if error := own(s.input):
            raise error
        there = "holds no checkpoint that is known here" if Path(s.input).exists() else "is not there"
        raise UserError(f"--input {s.input}: {there}; name the folder of one step.")
    kind, path = found
    if kind.name not in SOURCES:
        raise UserError(f"--input {s.input}: is {kind.what}; give it to tools/convert_hf.py import.")
    print(f"found       {path}: {kind.what}")
    read, described = SOURCES[kind.name]
    source = read(path)
    model = described(source, s)
    if model is None:
        trained = write_module(source, Path(s.output), Bar())
        what, then = f"{len(source.weights)} parameters of a module", f'engine.load_checkpoint("{s.output}")'
    else:
        trained, what, then = as_decoder(*model, s)
        source = model[2]
    for note in source.notes:
        print(f"left        {note}", file=sys.stderr)
    print(f"imported    {s.input} to {s.output}: {what}, "
          + (f"with their optimizer, at step {source.step:,}" if trained else "weights alone, at step 0"))
    print(f"train on with: {then}")


def as_decoder(a: Architecture, rows: list[NamedRow], source: Source, s: Import) -> tuple[bool, str, str]:
    """Writes it. Returns whether its optimizer came too, what it is, and the flags that train on."""
    a = replace(a, vocab_size=min(a.vocab_size, s.vocab_size or a.vocab_size))
    weights, moments = adopted(a, rows, source)
    table = source.weights[next(r.theirs for r in rows if r.ours == ("embedding.weight",))].shape[0]
    if table > a.vocab_size:
        print(f"cut         {table - a.vocab_size:,} rows of its embedding that are no tokens")
    tokenizer = write_model(a, source, weights, moments, Path(s.output), Path(s.tokenizer) if s.tokenizer else None,
                            Bar())
    values: dict[str, object] = {"load": s.output, "finetune": not moments, **flags(a)}
    if tokenizer:
        values |= named_by(tokenizer, f"{s.output}/tokenizer")
    return bool(moments), f"{parameter_count(a):,} parameters", command(values)


# ---- what each format holds, and the decoder that it describes; None for a module of somebody's own

def config_of(s: Import) -> Mapping[str, Any]:
    assert s.hf_config is not None
    return read_json(Path(s.hf_config), CONFIG)


def megatrons(source: Source, s: Import) -> Found:
    table = source.weights.get("embedding.word_embeddings.weight")
    a = from_config(config_of(s))[0] if s.hf_config else megatron_architecture(
        source.words, table.shape[0] if table else 0, s.vocab_size, source.path)
    return a, *of_megatron(source, a)


def nanogpts(source: Source, s: Import) -> Found:
    return *of_nanogpt(source), source


def titans(source: Source, s: Import) -> Found:
    """Of torchtitan's names, or of Hugging Face's."""
    if s.hf_config is None and "tok_embeddings.weight" in source.weights:
        a, rows = of_torchtitan(source, s.num_attention_heads, s.rotary_base, s.norm_epsilon, s.seq_length)
        print(f"assumed     --norm-epsilon {a.epsilon:g} --seq-length {a.seq_length}, which its files do not say")
        return a, rows, source
    return hugging_faces(source, s)


def hugging_faces(source: Source, s: Import) -> Found:
    if s.hf_config is None:
        raise UserError(f"--input {source.path}: holds {next(iter(source.weights), 'nothing')} and more, names of no "
                        "trainer that is known here; give --hf-config config.json if they are Hugging Face's.")
    return of_hugging_face(source, config_of(s))


def pickled(source: Source, s: Import) -> Found:
    return hugging_faces(source, replace(s, hf_config=s.hf_config or str(source.path / "config.json")))


def modules(source: Source, s: Import) -> Found | None:
    return hugging_faces(source, s) if s.hf_config else None


def distributed(path: Path) -> Distributed:
    return Distributed(path, load_metadata(path / ".metadata"), load)


SOURCES: Mapping[str, tuple[Callable[[Path], Source], Callable[[Source, Import], Found | None]]] = {
    "megatron": (lambda path: legacy_source(path, load), megatrons),
    "torch_dist": (lambda path: torch_dist_source(path, distributed(path), load), megatrons),
    "nanogpt": (lambda path: nanogpt_source(path, load(path)), nanogpts),
    "dcp": (lambda path: dcp_source(path, distributed(path)), titans),
    "deepspeed": (lambda path: deepspeed_source(path, load), modules),
    "universal": (lambda path: universal_source(path, load), modules),
    "bin": (lambda path: bin_source(path, load), pickled)}


# ---- out

@dataclass(frozen=True)
class Export:
    """Writes the weights of one of our checkpoints as another trainer loads them."""

    load: str = option(help="folder of checkpoints", unit="dir")
    output: str = option(help="new folder to write", unit="dir")
    to: str = option(help="whose format", choices=("megatron", "torch_dist", "dcp", "nanogpt", "gguf"))
    ckpt_step: int | None = option(None, "step to export; default: the newest", unit="step")
    dtype: str | None = option(None, "of the weights; default: as they are stored (fp32, or fp64); q8_0 and no fp64 in "
                              "gguf", choices=(*DTYPES, "q8_0"))
    tp: int = option(1, "tensor-parallel ranks of --to megatron", unit="ranks")
    pp: int = option(1, "pipeline ranks of --to megatron", unit="ranks")
    ema: bool = option(False, "the means of the weights (--ema of the run) instead of them")
    transformer_impl: str = option("transformer_engine", "whose names of norms --to megatron writes",
                                   choices=("transformer_engine", "local"))


class Job:
    """One export: what is read, where it goes, how far it is."""

    def __init__(self, s: Export, draft: Path, reader: Reader) -> None:
        self.s, self.draft, self.reader = s, draft, reader
        self.a, self.bar, self.done, self.total = reader.architecture, Bar(), 0, 0

    def tensors(self, rows: list[NamedRow]) -> Tensors:
        return theirs(self.reader, rows, TORCH_DTYPE[self.s.dtype] if self.s.dtype else None)

    def mapped(self, tensors: Tensors) -> dict[str, Any]:
        """For one file; removed after it is written."""
        return mapped(tensors, self.draft / "scratch", self._told)

    def written(self) -> None:
        (self.draft / "scratch").unlink()

    def _told(self, size: int) -> None:
        self.done += size
        self.bar(self.done, self.total or self.done)


def export(s: Export) -> None:
    if s.dtype == ("fp64" if s.to == "gguf" else "q8_0"):
        raise UserError(f"--dtype {s.dtype}: is not known to --to {s.to}; write fp32, fp16 or bf16.")
    reader = Reader(s.load, s.ckpt_step, ema=s.ema)
    with draft_of(Path(s.output)) as draft:
        EXPORTS[s.to](Job(s, draft, reader))
    print(f"exported    {reader.folder} to {s.output}: {s.to}, weights alone, of step {reader.progress.step:,}")


def to_megatron(job: Job) -> None:
    """iter_XXXXXXX (or release, of step 0), a file for each rank, and the note of it."""
    s, a = job.s, job.a
    divisible_by(a, s.tp, s.pp)
    rows = megatron_rows(a)
    every = with_padding(job.tensors(rows), a, rows, s.tp)
    folder, args = named_step(job)
    for stage in range(s.pp):
        for rank in range(s.tp):
            held = job.mapped(on_rank(every, a, rank, s.tp, stage, s.pp))
            model: dict[str, Any] = {fused(n) if s.transformer_impl == "transformer_engine" else n: t
                                     for n, t in held.items()}
            model |= {f"decoder.layers.{i}.{n}._extra_state": None for i in range(a.layers // s.pp) for n in LINEAR}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if s.pp > 1 else "")
            save({"args": args, "checkpoint_version": 3.0, "iteration": job.reader.progress.step, "model": model},
                 folder / name / "model_optim_rng.pt")
            job.written()


def to_torch_dist(job: Job) -> None:
    """One folder that any layout of Megatron-core loads."""
    rows = megatron_rows(job.a)
    every = with_padding(job.tensors(rows), job.a, rows, 1)
    folder, args = named_step(job)
    count = job.a.layers
    extra = {f"decoder.layers.{n}._extra_state/shard_{i}_{count}": [None] for n in LINEAR for i in range(count)}
    folder.mkdir()
    places = {name: (above, row, count) for name in every for above, row in [stacked(name)] if row is not None}
    held = {name if name in places else stacked(name)[0]: t for name, t in job.mapped(every).items()}
    save_torch_dist({**held, **extra}, places, {
        "args": args, "checkpoint_version": 3.0, "iteration": job.reader.progress.step}, folder)
    job.written()


def named_step(job: Job) -> tuple[Path, Any]:
    """The folder of Megatron's step, of which a note lies beside it, and its arguments."""
    p = job.reader.progress
    with whole(job.draft / "latest_checkpointed_iteration.txt") as file:
        file.write(str(p.step or "release").encode())
    args = namespace(arguments_of(job.a, job.s.tp, job.s.pp, p.step, p.samples))
    return job.draft / (f"iter_{p.step:07d}" if p.step else "release"), args


def to_dcp(job: Job) -> None:
    save_distributed(job.mapped(job.tensors(torchtitan_rows(job.a))), job.draft)
    job.written()


def to_nanogpt(job: Job) -> None:
    rows, args = nanogpt_rows(job.a)
    held = job.mapped(job.tensors(rows))
    save({"model": {**held, "lm_head.weight": held["transformer.wte.weight"]}, "model_args": args,
          "iter_num": job.reader.progress.step, "best_val_loss": 1e9, "config": {}}, job.draft / "ckpt.pt")
    job.written()


def to_gguf(job: Job) -> None:
    without = write_gguf(job.reader, job.draft / "model.gguf", job.s.dtype or "fp32", job.bar)
    if without:
        print(f"left        {without}", file=sys.stderr)


EXPORTS: Mapping[str, Callable[[Job], None]] = {
    "megatron": to_megatron, "torch_dist": to_torch_dist, "dcp": to_dcp, "nanogpt": to_nanogpt,
    "gguf": to_gguf}


if __name__ == "__main__":
    run(lambda: commands("convert_checkpoint.py", __doc__ or "", {
        "import": (Import, import_), "export": (Export, export)}))
