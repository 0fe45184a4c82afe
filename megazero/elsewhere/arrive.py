"""Somebody else's checkpoint as one of ours: tensor by tensor, and whole or not there."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError, draft_of
from megazero.data import Tokenizer
from megazero.elsewhere.source import Source, Tensors, here
from megazero.engine import packed
from megazero.hf import import_tokenizer
from megazero.plan import Architecture, Progress, flags, loss_scale
from megazero.settings import Config
from megazero.state import Slice, about, header, planned, write_alone

Told = Callable[[int, int], None]       # (bytes written so far, bytes in all)
LAYOUT = {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 0}
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_model(a: Architecture, source: Source, weights: Tensors, moments: Mapping[str, Tensors], output: Path,
                tokenizer: Path | None = None, told: Told = lambda *_: None) -> Tokenizer | None:
    """Writes a folder with one checkpoint of our weights: at the source's step where its optimizer came too, else at
    step 0. `tokenizer`: a folder of Hugging Face's files, kept beside it. Raises UserError."""
    complete = all(moments.get(kind, {}).keys() == weights.keys() for kind in MOMENTS)
    kinds = {"weight": weights, **({kind: moments[kind] for kind in MOMENTS} if complete else {})}
    progress = Progress(loss_scale(Config()))
    if complete:
        progress = replace(progress, step=source.step, applied=source.step, samples=source.samples)
    with draft_of(output) as draft:
        kept = import_tokenizer(tokenizer, draft) if tokenizer else None
        facts = about(a, config=flags(a), optimizer="adam" if complete else None, layout=LAYOUT, tokenizer=kept,
                      family=None)
        write_kinds(draft, kinds, header(progress, facts), told)
    return kept


OPTIONS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


def write_module(source: Source, output: Path, told: Told = lambda *_: None) -> bool:
    """Writes a folder with one checkpoint of a module of somebody's own, for engine.load_checkpoint: by its own names,
    with its optimizer where that came, which is what this returns. `source.words`: groups, skipped, micro, buffers,
    scheduler and client of deepspeed_source. Raises UserError."""
    words, tensors = source.words, dict[str, torch.Tensor]()
    trained = {name for group in words["groups"] for name in group["parameters"]}
    complete = bool(trained) and all(source.moments.get(kind, {}).keys() == trained for kind in MOMENTS)
    given: dict[str, Any] = {"extra": {}, "client": _kept(source, tensors)}
    progress = Progress(loss_scale(Config()))
    if complete:
        applied = source.step - words["skipped"]
        progress = replace(progress, step=source.step, applied=applied, samples=source.samples)
        groups = [{"parameters": g["parameters"], "options": {k: v for k, v in g["options"].items() if k in OPTIONS}}
                  for g in words["groups"]]
        kind, state = words["scheduler"]
        given["training"] = {"groups": groups, "updates": applied, "samples": source.samples,
                             "micro": source.step * words["micro"],
                             "scheduler": {"type": kind, "state": state} if kind and state else None}
    head = {"step": progress.step, "progress": asdict(progress), "config": {}, "architecture": None,
            "optimizer": "adam" if complete else None, "tokenizer": None, "layout": LAYOUT,
            "module": {"excluded": False, **packed(given, "--input", tensors)}}
    kinds = {"weight": source.weights, **({kind: source.moments[kind] for kind in MOMENTS} if complete else {}),
             "buffer": words["buffers"], "state": {n: here(t) for n, t in tensors.items() if t.numel()}}
    with draft_of(output) as draft:
        write_kinds(draft, kinds, head, told)
    return complete


def _kept(source: Source, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the script kept, as far as it is no object of a class of its own."""
    kept = {}
    for key, value in source.words["client"].items():
        try:
            packed(value, f"client.{key}", {})
            kept[key] = value
        except UserError:
            source.notes.append(f"the script's own {key} is an object of a class, and stays behind")
    return kept


def write_kinds(folder: Path, kinds: Mapping[str, Tensors], head: Mapping[str, Any], told: Told) -> None:
    """One file with weights and moments, in fp32 (fp64 where a weight is), buffers and state as they are."""
    wide = any(t.dtype == torch.float64 for t in kinds["weight"].values())
    dtype = torch.float64 if wide else torch.float32
    own = {(kind, name): t for kind, tensors in kinds.items() for name, t in tensors.items()}
    slices = [planned(kind, name, t.shape or (1,), t.dtype if kind in ("buffer", "state") else dtype)
              for (kind, name), t in own.items()]
    total, done = sum(s.tensor.nbytes for s in slices), 0

    def make(slice_: Slice) -> torch.Tensor:
        nonlocal done
        tensor = own[slice_.kind, slice_.name].read().to(slice_.tensor.dtype).reshape(slice_.full)
        done += tensor.nbytes
        told(done, total)
        return tensor

    write_alone(folder, slices, head, make)
