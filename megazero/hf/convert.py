"""Checkpoints to Hugging Face folders and back, tensor by tensor: no more than one tensor of theirs is in memory.

    export_folder    DIR/step-N  -> HF_DIR/{config.json, generation_config.json, model*.safetensors, tokenizer files}
    import_folder    HF_DIR      -> DIR/step-00000000, DIR/tokenizer

What is a tensor of theirs in terms of ours is data (families.py); here it is applied, both ways. A folder appears under
its name when it is complete.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megazero.base import DTYPES, Form, UserError, draft_of, write_json
from megazero.data import Tokenizer
from megazero.hf.files import INDEX, HfFolder, read_json, shards
from megazero.hf.tokenizer import TOKENIZER_CLASS, export_tokenizer, import_tokenizer, special_ids
from megazero.plan import (
    Architecture,
    Family,
    Progress,
    Row,
    family_of,
    flags,
    from_config,
    loss_scale,
    obstacles,
    rows,
    shapes,
    to_config,
    zeros,
)
from megazero.settings import Config
from megazero.state import SPECIAL, Planned, Reader, Slice, about, header, is_special, planned, stream, write_alone
from megazero.units import TORCH_DTYPE

Tensor = torch.Tensor
Told = Callable[[int, int], None]       # (bytes written so far, bytes in all)
SHARD = 5 * 10**9                       # bytes of one file of an export
ID = (None, int, [int])
# what is read of a config.json beside what a family's fields say
CONFIG: Form = {"model_type?": str, "bos_token_id?": ID, "eos_token_id?": ID, "pad_token_id?": ID}


# ---- ours -> theirs

def export_folder(reader: Reader, output: Path, dtype: str | None = None, shard: int = SHARD,
                  told: Told = lambda *_: None) -> tuple[Family, str | None]:
    """Writes a Hugging Face folder of the checkpoint's weights, in `dtype` (None: as they are stored).
    Returns its family, and where its tokenizer could not be written the sentence that says why."""
    a = reader.architecture
    family, ours = family_of(a, reader.index.get("family")), shapes(a)
    more = next((name for kind, name in reader.shapes if kind == "weight" and name not in ours), None)
    if more is not None:
        raise UserError(f"{reader.folder}: holds weight/{more}, which its architecture does not have.")
    missing = [n for n in ours if reader.shapes.get(("weight", n)) != ours[n]]
    if missing:
        raise UserError(f"{reader.folder}: has no weight/{missing[0]} of shape {list(ours[missing[0]])}, "
                        "which its architecture asks for.")
    name = dtype or stored_dtype(reader)
    table = {row.theirs: row for row in rows(a, family)}
    plan = [Planned(row.theirs, _their_shape(row, ours), TORCH_DTYPE[name]) for row in table.values()]
    total, done = sum(p.nbytes for p in plan), 0

    def make(theirs: str) -> Tensor:
        nonlocal done
        tensor = _cast(theirs, _theirs(table[theirs], a, ours, reader), TORCH_DTYPE[name])
        done += tensor.nbytes
        told(done, total)
        return tensor

    with draft_of(output) as draft:
        files = shards(plan, shard)
        for file, part in files.items():
            stream(draft / file, part, make, lambda _: {"format": "pt"})
        if len(files) > 1:
            where = {p.name: file for file, part in files.items() for p in part}
            write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        tokenizer, without = export_tokenizer(reader, draft, a.seq_length)
        _write_configs(draft, to_config(a, family), reader, tokenizer, DTYPES[name].torch)
    return family, without


def stored_dtype(reader: Reader) -> str:
    """fp64 for a run in fp64, else fp32: masters are what a checkpoint holds."""
    some = next(k for k in reader.shapes if k[0] == "weight")
    return {dtype: name for name, dtype in TORCH_DTYPE.items()}[reader.dtype(*some)]


def _their_shape(row: Row, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    parts = [ours.get(n) or zeros(n, ours) or () for n in row.ours]
    stacked = (sum(p[0] for p in parts), *parts[0][1:])
    return stacked[::-1] if row.transpose else stacked


def _theirs(row: Row, a: Architecture, ours: Mapping[str, tuple[int, ...]], reader: Reader) -> Tensor:
    """Ours stacked along dimension 0, dealt as the row says, then transposed if it says so. An import reads rows of
    what was stacked."""
    parts = [reader.read("weight", n) if n in ours else torch.zeros(zeros(n, ours) or ()) for n in row.ours]
    stacked = torch.cat([_dealt(part, row, a) for part in parts], 1).flatten(0, 1) if len(parts) > 1 else parts[0]
    return stacked.T if row.transpose else stacked


def _dealt(tensor: Tensor, row: Row, a: Architecture) -> Tensor:
    """[n, ...] -> [parts, n / parts, ...]."""
    parts = getattr(a, row.dealt) if row.dealt else 1
    return tensor.reshape(parts, len(tensor) // parts, *tensor.shape[1:])


def _part(source: HfFolder, row: Row, low: int, high: int, a: Architecture) -> Tensor:
    """Rows [low, high) of what was stacked, from a tensor of theirs."""
    if not row.dealt:
        return source.read(row.theirs, low, high, row.transpose)
    parts = getattr(a, row.dealt)
    whole = source.read(row.theirs, 0, source.tensors[source.name(row.theirs) or ""].shape[0])
    return _dealt(whole, row, a)[:, low // parts:high // parts].flatten(0, 1)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    out = tensor.to(dtype)
    if dtype == torch.float16 and not out.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"--dtype fp16: {name} holds {tensor.abs().max().item():g}, more than fp16 can hold; "
                        "write bf16 or fp32.")
    return out


def _write_configs(folder: Path, config: dict[str, Any], reader: Reader, tokenizer: Tokenizer | None,
                   dtype: str) -> None:
    """config.json and generation_config.json. Where no tokenizer lies beside them, transformers is told a class that
    needs its file, or it would make an empty one for GPT-2 and say nothing."""
    ids = special_ids(reader, tokenizer)
    without = {} if (folder / "tokenizer.json").exists() else {"tokenizer_class": TOKENIZER_CLASS}
    write_json(folder / "config.json", {
        **config, **ids, **without, "dtype": dtype, "torch_dtype": dtype, "use_cache": True}, indent=2)
    write_json(folder / "generation_config.json",
               {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}, indent=2)


# ---- theirs -> ours

@dataclass(frozen=True)
class Wanted:
    """Where one of our weights lies in theirs: rows [low, high) of a row's (transposed) tensor."""

    row: Row
    low: int
    high: int


def import_folder(folder: Path, output: Path, told: Told = lambda *_: None) -> tuple[Architecture, Tokenizer | None]:
    """Writes a checkpoint at step 0 of a Hugging Face folder's weights, as they are, in fp32 (fp64 if they are)."""
    if not os.path.isdir(folder):
        raise UserError(f"--input {folder}: there is no such folder.")
    config = read_json(folder / "config.json", CONFIG)
    a, family = from_config(config)
    reasons = obstacles(a, family)
    if reasons:
        raise UserError(f"{folder / 'config.json'}: is a model that this decoder cannot be: {'; '.join(reasons)}.")
    source = HfFolder(folder, family.base, family.buffers)
    if a.layers > len(source.tensors):                          # before a row is made for each
        raise UserError(f"--input {folder}: its config.json asks for {a.layers:,} layers, "
                        f"its files hold {len(source.tensors):,} tensors; fetch it again.")
    ours = shapes(a)
    parts = _match(a, family, source, ours)
    dtype = torch.float64 if torch.float64 in {t.dtype for t in source.tensors.values()} else torch.float32
    slices = [planned("weight", n, shape, dtype) for n, shape in ours.items()]
    total, done = sum(s.tensor.nbytes for s in slices), 0

    def make(slice_: Slice) -> Tensor:
        nonlocal done
        p = parts[slice_.name]
        tensor = _part(source, p.row, p.low, p.high, a).to(dtype)
        done += tensor.nbytes
        told(done, total)
        return tensor

    with draft_of(output) as draft:
        tokenizer = import_tokenizer(folder, draft)
        write_alone(draft, slices, _index(a, config, tokenizer), make)
    return a, tokenizer


def _match(a: Architecture, family: Family, source: HfFolder, ours: Mapping[str, tuple[int, ...]]) -> dict[str, Wanted]:
    """Our weight -> where it lies in theirs.
    Raises UserError unless the two sides match, name by name and shape by shape."""
    parts, errors, seen = {}, [], set()
    for row in rows(a, family):
        name, shape = source.name(row.theirs), _their_shape(row, ours)
        seen.add(name)
        if name is None:
            errors.append(f"--input {source.folder}: has no {row.theirs}, which its config.json asks for.")
        elif source.tensors[name].shape != shape:
            errors.append(f"--input {source.folder}: {name} has shape {list(source.tensors[name].shape)}, "
                          f"its config.json asks for {list(shape)}.")
        else:
            at = 0
            for n in row.ours:
                rows_of = (ours.get(n) or zeros(n, ours) or (0,))[0]
                part = Wanted(row, at, at + rows_of)
                at = part.high
                if n in ours:
                    parts[n] = part
                elif _part(source, row, part.low, part.high, a).count_nonzero():
                    errors.append(f"--input {source.folder}: {name} is not zero, and this decoder has no such bias.")
    errors += [f"--input {source.folder}: holds {n}, which its config.json does not mention." for n in source.tensors
               if n not in seen and not (n == "lm_head.weight" and a.tied and _is_embedding(n, a, family, source))]
    if errors:
        raise UserError(*errors[:5], *([f"--input {source.folder}: and {len(errors) - 5} more like these."]
                                       if len(errors) > 5 else []))
    return parts


def _is_embedding(name: str, a: Architecture, family: Family, source: HfFolder) -> bool:
    """Is this the tied matrix again? Some files hold it under both names."""
    row = next(r for r in rows(a, family) if r.ours == ("embedding.weight",))
    if source.tensors[name].shape != (a.vocab_size, a.hidden):
        return False
    return torch.equal(source.read(name, 0, a.vocab_size), source.read(row.theirs, 0, a.vocab_size))


def _index(a: Architecture, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the index says, as that of a run of ours before its first step,
    and the special ids that only Hugging Face knows."""
    ids = {name: config.get(name) for name in SPECIAL}          # -1 and [] stand for none in old ones
    facts = about(a, config=flags(a), optimizer=None, layout={"tp": 1, "pp": 1, "dp": 1, "zero_stage": 0},
                  tokenizer=tokenizer, family=config["model_type"])
    return {**header(Progress(loss_scale(Config())), facts),
            "special_ids": {name: i if is_special(i) else None for name, i in ids.items()}}
