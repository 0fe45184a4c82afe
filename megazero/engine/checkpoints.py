"""Checkpoints of an engine, in the project's own format and under tags:

    DIR/global_step10/rank-00000.safetensors    weight/NAME, exp_avg/NAME ... by the module's own names, in its shapes;
                                                from rank 0 also buffer/NAME, and state/NUMBER: tensors of other state
    DIR/global_step10/index.json                step, progress, groups, scheduler, what the script keeps (client state)
    DIR/latest                                  the tag that was saved last

Ranks and levels appear nowhere: any number of ranks reads what it needs, at any level. A checkpoint takes its name when
it is complete, and is noted in `latest` after that. All ranks call all of this together.
"""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megazero.base import Form, Lease, UserError, checked, said, say, whole, write_json
from megazero.data import COUNT
from megazero.engine.engine import Engine
from megazero.engine.optimizers import ZeroOptimizer
from megazero.engine.values import packed, unpacked
from megazero.hf import INDEX, SHARD, shards
from megazero.plan import RULES, Box, Progress
from megazero.state import (
    LATEST,
    TAG,
    Planned,
    Reader,
    Slice,
    buffers_of,
    complete,
    fill,
    mismatches,
    newest,
    resumed,
    slices,
    stream,
    tagged,
    write,
)
from megazero.units import Unit

Tensor = torch.Tensor
SAVE, LOAD = "save_checkpoint", "load_checkpoint"
NAME = re.compile(r"[\w.:+/-]{1,500}")
MODULE: Form = {"excluded": bool, "client": dict, "training?": {
    "groups": [{"parameters": [str], "options": dict}], "scheduler": (None, dict), "samples": COUNT, "micro": COUNT}}
THEIRS = ("*_states.pt", "*/*_states.pt")                       # DeepSpeed's own files


# ---- saving

def save_state(core: Engine, optimizer: ZeroOptimizer | None, folder: Path, tag: str | None,
               training: Mapping[str, Any], client: Mapping[str, Any], frozen: bool = True,
               latest: bool = True) -> None:
    """Saves weights, moments, buffers, the groups' options and progress.

    training    beside them: the scheduler's state, samples and micro-batches so far
    client      what the script keeps, of numbers, texts, lists, mappings and tensors
    frozen      parameters that are not trained, too

    Raises UserError; what was saved before stays.
    """
    _ready(core)
    tag = _same_tag(core, f"global_step{core.global_steps}" if tag is None else tag)
    tensors: dict[str, Tensor] = {}
    words = packed({"training": {**training, "groups": _options(core, optimizer)}, "client": client}, SAVE, tensors)
    held = slices([u for u in all_units(core) if frozen or u.trained], core.updater.state)
    if core.wires.rank == 0:
        held += [_slice("buffer", name, b) for name, b in buffers(core.module).items() if b.numel()]
        held += [_slice("state", number, t) for number, t in tensors.items() if t.numel()]
    progress = Progress(core.scale, core.global_steps, core.global_steps - core.skipped_steps, training["samples"])
    header = {"step": progress.step, "progress": asdict(progress), "config": {}, "architecture": None,
              "optimizer": optimizer.rule if optimizer else None, "tokenizer": None,
              "module": {"excluded": not frozen, **words},
              "layout": {"tp": 1, "pp": 1, "dp": core.wires.mesh.dp, "zero_stage": core.zero.level}}
    with _leased(folder) if core.wires.rank == 0 else nullcontext() as lease:
        run, ready = (lease.holder.run, lease.look) if lease else ("", lambda: None)
        write(folder / tag, held, header, core.wires.rank, core.wires["saved"], _told(core, run), ready, SAVE)
        if lease and latest:
            with whole(folder / LATEST) as file:
                file.write(tag.encode())
    core.wires["saved"].all_reduce(torch.zeros(1)).wait()       # nobody looks for it before it is noted


def _ready(core: Engine) -> None:
    """Masters are what the parameters say."""
    if core.over:
        raise UserError(f"engine: {core.over}; make a new one.")
    core.recover()
    if core.sums.micro and core.wires.rank == 0:
        say(f"{SAVE}: gradients of {core.sums.micro} micro-batches of a step that is not over are not saved")
    for block in core.all if core.zero.level < 3 else ():
        block.absorb()
    if wrong := next((n for n in [*parameters(core), *buffers(core.module)] if not NAME.fullmatch(n)), None):
        raise UserError(f"{SAVE}: a parameter or buffer is called {said(wrong)}; name modules by letters and digits.")


def _same_tag(core: Engine, tag: str) -> str:
    """The tag, which all ranks must give, as the name of a folder. Raises UserError."""
    if not TAG.fullmatch(str(tag)):
        raise UserError(f"{SAVE}: the tag {said(tag)} is no name of a folder; write letters, digits, _, - and dots.")
    if not _same(core, zlib.crc32(str(tag).encode())):
        raise UserError(f"{SAVE}: ranks give different tags, here {tag}; give the same on all.")
    return str(tag)


def _same(core: Engine, number: int) -> bool:
    """Do all ranks say this number?"""
    high, low = core.wires["saved"].all_reduce(torch.tensor([number, -number]), "max").wait().tolist()
    return bool(high == -low)


def _told(core: Engine, run: str) -> str:
    """Rank 0's name of its run."""
    own = torch.tensor([int(run or "0", 16)])
    return f"{core.wires['saved'].all_reduce(own, 'max').wait().item():08x}"


def _leased(folder: Path) -> Lease:
    """Nobody else saves there meanwhile. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Lease(folder / "lease.json", f"{SAVE} {folder}")
    except OSError as error:
        raise UserError(f"{SAVE} {folder}: cannot be written to ({error.strerror}); name another folder.") from None


def _slice(kind: str, name: str, t: Tensor) -> Slice:
    """A whole tensor; one without dimensions has one here."""
    full = tuple(t.shape) or (1,)
    return Slice(kind, name, full, Box((0,) * len(full), full), t.detach().reshape(full))


def _options(core: Engine, optimizer: ZeroOptimizer | None) -> list[dict[str, Any]]:
    names = {p: n for n, p in parameters(core).items()}
    return [{"parameters": [names[p] for p in group["params"] if p in names],
             "options": {key: value for key, value in group.items() if key != "params"}}
            for group in (optimizer.param_groups if optimizer else ())]


# ---- what there is of a module

def all_units(core: Engine) -> list[Unit]:
    return [unit for block in core.all for unit in block.units]


def parameters(core: Engine) -> dict[str, nn.Parameter]:
    """By their first names."""
    return {w.operand.name: p for block in core.all for p, w, _ in block.views}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the module's state, by their first names."""
    local = {f"{prefix}.{name}" if prefix else name for prefix, m in module.named_modules()
             for name in m._non_persistent_buffers_set}
    return {name: b for name, b in module.named_buffers() if name not in local}


# ---- loading

def load_state(core: Engine, optimizer: ZeroOptimizer | None, folder: Path, tag: str | None, strict: bool = True,
               moments: bool = True, only: bool = False) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Loads weights and buffers, with `moments` the optimizer's state too; steps go on from there, unless it is the
    module `only`. Without `strict`, what has the same name and shape is taken.

    Returns its folder, what `save_state` was told of training, and the script's own words; None if there is no
    checkpoint and no tag was given. Raises UserError; then nothing has changed.
    """
    core.zero_grad()
    reader, words, error = None, {}, None
    try:
        if (path := _found(folder, tag)) is not None:
            reader = Reader(path, flag=LOAD)
            words = _words(reader)
            _fits(core, optimizer, reader, words, strict, moments and not only)
    except UserError as wrong:
        error = wrong
    same = _same(core, -1 if error else int(reader.index["crc32"]) if reader else 0)
    if error:
        raise error
    if not same:
        raise UserError(f"{LOAD} {folder}: another rank does not find this checkpoint there, or cannot take it; put it "
                        "where all ranks see it.")
    if reader is None:
        return None
    training = words.get("training") if not only else None
    _restore(core, reader, moments and training is not None)
    for group, saved in zip(optimizer.param_groups if optimizer else (),
                            training["groups"] if training and moments else (), strict=False):
        group.update(saved["options"])
    core.resume(resumed(reader.progress, core.scale) if training else None, moments)
    return reader.folder, training or {}, words["client"]


def _found(folder: Path, tag: str | None) -> Path | None:
    """The checkpoint's folder, or None if there is none and none was named. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{LOAD} {folder}: there is no such folder.")
    name, tags = newest(folder) if tag is None else tag, tagged(folder)
    if name in tags:
        return tags[name]
    if any(True for pattern in THEIRS for _ in folder.glob(pattern)):
        raise UserError(f"{LOAD} {folder}: was saved by DeepSpeed, whose files are pickled and are not read here; "
                        "write its weights with its own zero_to_fp32.py --safe_serialization, and load those.")
    if name is None:
        return folder if complete(folder) or (folder / "index.json").is_file() else None
    there = f"there are {', '.join(sorted(tags))}" if tags else "there is none"
    raise UserError(f"{LOAD} {folder}: has no complete checkpoint {said(name)}; {there}.")


def _words(reader: Reader) -> dict[str, Any]:
    """What the index says of the module. Raises UserError."""
    if not reader.of_module:
        raise UserError(f"{LOAD} {reader.folder}: was saved by pretrain_gpt.py; go on with that, or export it with "
                        "tools/convert_hf.py and give its folder to from_pretrained.")
    try:
        words = unpacked(checked(reader.index.get("module"), MODULE, "module"), lambda n: reader.read("state", n))
        return dict(words)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{reader.folder}: cannot be ({said(str(error))}); load another checkpoint.") from None


def _fits(core: Engine, optimizer: ZeroOptimizer | None, reader: Reader, words: Mapping[str, Any], strict: bool,
          moments: bool) -> None:
    """Raises UserError."""
    own = [u for u in all_units(core) if u.trained or not words["excluded"]]
    wanted = [piece.shard.parameter for u in own for piece in u.flat.pieces]
    errors = mismatches(reader, wanted, ("weight",)) if strict else []
    errors += [f"{reader.folder}: has no buffer/{name} of shape {list(b.shape)}." for name, b in
               (buffers(core.module).items() if strict else ()) if not _like(reader, name, b) and b.numel()]
    if errors:
        raise UserError(*errors, f"{LOAD}: {reader.folder} is not of this module; give load_module_strict=False to "
                        "take what has the same name and shape.")
    if optimizer and moments and "training" in words:
        for text in _other_optimizer(core, optimizer, reader, words["training"]["groups"]):
            raise UserError(f"{LOAD} {reader.folder}: {text}, or load_optimizer_states=False.")


def _other_optimizer(core: Engine, optimizer: ZeroOptimizer, reader: Reader,
                     groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    missing = [m for m in RULES[optimizer.rule].moments if m not in reader.kinds]
    if missing:
        yield f"was saved with {reader.index['optimizer']}, and has no {missing[0]}; give that optimizer"
    then, now = ([sorted(g["parameters"]) for g in given] for given in (groups, _options(core, optimizer)))
    if then != now:
        number = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
        yield (f"has {len(then)} groups of parameters, there are {len(now)} now, and group {number} differs; give the "
               "same groups")


def _like(reader: Reader, name: str, b: Tensor) -> bool:
    return reader.shapes.get(("buffer", name)) == (tuple(b.shape) or (1,))


def _restore(core: Engine, reader: Reader, moments: bool) -> None:
    """What the checkpoint has of the module's names and shapes; it was seen to be enough."""
    for unit in all_units(core):
        fill(reader, unit.flat, unit.low, buffers_of(unit, core.updater.state if moments else {}), lenient=True)
        unit.publish()
    with torch.no_grad():
        for name, b in buffers(core.module).items():
            if _like(reader, name, b):
                b.copy_(reader.read("buffer", name).view(b.shape))


# ---- weights for others

def whole_weights(core: Engine, frozen: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) of each parameter, block by block; good until the next is asked for. Every rank must go to
    the end."""
    for block in core.all:
        if block.views:
            with core.whole(*(p for p, _, _ in block.views)):
                yield from ((w.operand.name, p.detach()) for p, w, _ in block.views if frozen or p.requires_grad)


def save_weights(core: Engine, folder: Path, name: str, frozen: bool) -> None:
    """The file `name` of safetensors that holds what the module computes with, written by rank 0, one block in memory;
    several and their index where it would be longer than SHARD bytes. Raises UserError."""
    weights = whole_weights(core, frozen)
    try:
        if core.wires.rank == 0:
            _write_weights(core, folder, name, frozen, weights)
    except OSError as error:
        raise UserError(f"save_16bit_model {folder}: cannot be written ({error.strerror}); what was there is "
                        "untouched.") from error
    finally:
        for _ in weights:                                       # every rank goes to the end, and none before the file
            pass
        core.wires["saved"].all_reduce(torch.zeros(1)).wait()


def _write_weights(core: Engine, folder: Path, name: str, frozen: bool, weights: Iterator[tuple[str, Tensor]]) -> None:
    made = buffers(core.module)
    plan = [Planned(w.operand.name, tuple(shape), p.dtype) for block in core.all for p, w, shape in block.views
            if frozen or p.requires_grad]
    plan += [Planned(n, tuple(b.shape), b.dtype) for n, b in made.items()]
    files = shards(plan, SHARD)

    def make(wanted: str) -> Tensor:
        found, tensor = (wanted, made[wanted]) if wanted in made else next(weights)
        assert found == wanted, f"{found} came for {wanted}"
        return tensor.cpu()

    folder.mkdir(parents=True, exist_ok=True)
    names = {file: name if len(files) == 1 else file for file in files}
    for file, part in files.items():
        draft = folder / f"{names[file]}.draft"
        stream(draft, part, make, lambda _: {"format": "pt"})
        draft.replace(folder / names[file])
    if len(files) > 1:
        where = {p.name: file for file, part in files.items() for p in part}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(p.nbytes for p in plan)}, "weight_map": where}, 2)
    config: Any = getattr(core.module, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
