"""Checkpoints of an engine, in the project's own format and under tags:

    DIR/global_step10/rank-00000.safetensors    weight/NAME, exp_avg/NAME ... by the module's own names, in its shapes;
                                                from rank 0 also buffer/NAME, and state/NUMBER: tensors of other state
    DIR/global_step10/index.json                step, progress, groups, scheduler, what the script keeps (client state)
    DIR/latest                                  the tag that was saved last

Ranks and levels appear nowhere: any number of ranks reads what it needs, at any level. A checkpoint takes its name when
it is complete, and is noted in `latest` after that. All ranks call all of this together.
"""

import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megazero.base import Form, Lease, UserError, checked, load, said, say, unwritable, whole, write_json
from megazero.data import COUNT
from megazero.engine.engine import Engine
from megazero.engine.optimizers import ZeroOptimizer
from megazero.engine.values import packed, readable, unpacked
from megazero.hf import INDEX, SHARD, shards
from megazero.plan import Box, Progress, tensors_of
from megazero.state import (
    LATEST,
    TAG,
    Planned,
    Reader,
    Slice,
    buffers_of,
    complete,
    fill,
    foreign,
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
WHOLE = "model.safetensors"
SAVE, LOAD = "save_checkpoint", "load_checkpoint"
SCHEDULED = ("lr ", "initial_lr ", "betas ", "momentum ")       # options that schedules change: nothing to tell
NAME = re.compile(r"[\w.:+/-]{1,500}")
MODULE: Form = {"excluded": bool, "client": dict, "extra?": dict, "training?": {
    "groups": [{"parameters": [str], "options": dict}], "scheduler": (None, {"type": str, "state": object}),
    "updates": COUNT, "samples": COUNT, "micro": COUNT, "settings?": dict}}


# ---- saving

def save_state(core: Engine, optimizer: ZeroOptimizer | None, folder: Path, tag: str | None,
               training: Mapping[str, Any], client: Mapping[str, Any], frozen: bool = True,
               latest: bool = True) -> None:
    """Saves weights, moments, buffers, the groups' options and progress.

    training    beside them: the scheduler's type and state, samples and micro-batches so far
    client      what the script keeps, of numbers, texts, lists, mappings and tensors; rank 0's counts
    frozen      parameters that are not trained, too

    Raises UserError on all ranks; what was saved before stays.
    """
    _ready(core)
    tag = _same_tag(core, f"global_step{core.global_steps}" if tag is None else tag)
    tensors: dict[str, Tensor] = {}
    given = {"training": {**training, "groups": _options(core, optimizer), "updates": core.updates},
             "extra": {name: m.get_extra_state() for name, m in _extras(core.module)}, "client": client}
    held = slices([u for u in all_units(core) if frozen or u.trained], core.updater.state)
    progress = Progress(core.scale, core.global_steps, core.global_steps - core.skipped_steps, training["samples"])
    header = {"step": progress.step, "progress": asdict(progress), "config": {}, "architecture": None,
              "optimizer": optimizer.rule if optimizer else None, "tokenizer": None, "module": {},
              "layout": {"tp": 1, "pp": 1, "dp": core.wires.mesh.dp, "zero_stage": core.zero.level}}
    with ExitStack() as guard:
        lease: Lease | None = None
        with _alike(core, f"{SAVE} {folder}"):
            if core.wires.rank == 0:
                words = packed(given, SAVE, tensors)
                readable(words, SAVE)
                lease = guard.enter_context(_leased(folder))
                _free(folder, tag)
                header["module"] = {"excluded": not frozen, **words}
                held += [_slice("buffer", name, b) for name, b in buffers(core.module).items() if b.numel()]
                held += [_slice("state", number, t) for number, t in tensors.items() if t.numel()]
        run, ready = (lease.holder.run, lease.look) if lease else ("", lambda: None)
        write(folder / tag, held, header, core.wires.rank, core.wires["saved"], _told(core, run), ready, SAVE)
        with _alike(core, f"{SAVE} {folder}"):                  # nobody looks for it before it is noted
            if lease and latest:
                _note(folder, tag)


@contextmanager
def _alike(core: Engine, what: str) -> Iterator[None]:
    """A mistake that one rank meets here ends it on all of them."""
    error = None
    try:
        yield
    except UserError as wrong:
        error = wrong
    failed = core.wires["saved"].all_reduce(torch.tensor([int(error is not None)]), "max").wait().item()
    if error is not None:
        raise error
    if failed:
        raise UserError(f"{what}: another rank met a mistake, which it tells.")


def _free(folder: Path, tag: str) -> None:
    """Raises UserError if something of that name is there that no engine saved: it stays."""
    path, there = folder / tag, tagged(folder)
    if tag in there:
        if not _of_run(there[tag]):
            return
    elif not os.path.lexists(path) or not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
        return
    raise UserError(f"{SAVE} {folder}: {tag} is there already, and no engine of megazero saved it; give another tag.")


def _of_run(path: Path) -> bool:
    """A damaged one is nobody's: another may take its place."""
    try:
        return load(path / "index.json", infinite=True).get("architecture") is not None
    except (OSError, ValueError):
        return False


def _note(folder: Path, tag: str) -> None:
    try:
        with whole(folder / LATEST) as file:
            file.write(tag.encode())
    except OSError as error:
        raise UserError(f"{SAVE} {folder}: {tag} is complete, but {LATEST} cannot be written ({error.strerror}).") \
            from None


def _ready(core: Engine) -> None:
    """Masters are what the parameters say; what became of the last step is known."""
    if core.over:
        raise UserError(f"engine: {core.over}; make a new one.")
    core.recover()
    core.settle()
    if core.sums.micro and core.wires.rank == 0:
        say(f"{SAVE}: gradients of {core.sums.micro} micro-batches of a step that is not over are not saved")
    for block in core.all if core.zero.level < 3 else ():
        block.absorb()
    _not_within(core, SAVE)
    if wrong := next((n for n in [*parameters(core), *buffers(core.module)] if not NAME.fullmatch(n)), None):
        raise UserError(f"{SAVE}: a parameter or buffer is called {said(wrong)}; name modules by letters and digits.")


def _not_within(core: Engine, what: str) -> None:
    if any(block.kept for block in core.all):
        raise UserError(f"{what}: is called within engine.whole, where weights are about to change; leave it first.")


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
        raise UserError(f"{SAVE} {folder}: {unwritable(error)}.") from None


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


def _extras(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts that keep something of their own with the module."""
    return ((name, m) for name, m in module.named_modules()
            if type(m).get_extra_state is not nn.Module.get_extra_state)


# ---- loading

def load_state(core: Engine, optimizer: ZeroOptimizer | None, folder: Path, tag: str | None, strict: bool = True,
               moments: bool = True, only: bool = False, own: Callable[..., Any] | None = None
               ) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Loads weights and buffers, with `moments` the optimizer's state too; steps go on from there, unless it is the
    module `only`. Without `strict`, what has the same name and shape is taken. `own(src=, dst=)` puts all weights, by
    name, into the module by itself.

    Returns its folder, what `save_state` was told of training, and the script's own words; None if there is no
    checkpoint and no tag was given. Raises UserError; then nothing has changed.
    """
    _not_within(core, LOAD)
    reader, path, words, error = None, None, {}, None
    try:
        if (path := _found(folder, tag)) is not None:
            reader = Reader(path, flag=LOAD)
            words = _words(reader)
            _fits(core, optimizer, reader, words, strict and own is None, moments and not only)
    except UserError as wrong:
        others = sorted(tagged(folder).keys() - {path and path.name}) if path and not words else []
        error = UserError(*wrong.sentences, *([f"{LOAD} {folder}: has {', '.join(others)} too."] if others else []))
    same = _same(core, -1 if error else int(reader.index["crc32"]) if reader else 0)
    if error:
        raise error
    if not same:
        raise UserError(f"{LOAD} {folder}: another rank does not find this checkpoint there, or cannot take it; put it "
                        "where all ranks see it.")
    if reader is None:
        return None
    training = words.get("training") if not only else None
    progress = reader.progress if training else None
    if progress and moments:
        progress = resumed(progress, core.scale)
    core.zero_grad()
    try:
        with _alike(core, f"{LOAD} {folder}"):
            _restore(core, reader, moments and training is not None, own)
    except UserError as error:
        raise UserError(*error.sentences, f"{LOAD}: the engine holds a part of it; load another before it trains "
                                          "on.") from None
    finally:
        core.resume(None, None)
    for name, m in _extras(core.module):
        if name in words.get("extra", {}):
            m.set_extra_state(words["extra"][name])
    if optimizer and training and moments:
        if (fresh := _fresh(core, reader)) and core.wires.rank == 0:
            say(f"{LOAD}: moments of {fresh[0]}{f' and {len(fresh) - 1} more' * (len(fresh) > 1)}, not trained then, "
                "stay as they are")
        _take(core, optimizer, training["groups"])
    core.resume(progress and replace(progress, loss_scale=progress.loss_scale if moments else core.scale),
                training["updates"] if training and moments else None)
    return reader.folder, training or {}, words["client"]


def _take(core: Engine, optimizer: ZeroOptimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """The options of each group as they were, of which tuples became lists; what that changes is said."""
    changed = []
    for i, (group, now, then) in enumerate(zip(optimizer.param_groups, _options(core, optimizer), saved, strict=False)):
        if sorted(now["parameters"]) != sorted(then["parameters"]):
            changed.append(f"group {i} has other parameters than then, and keeps its options")
            continue
        for key, value in then["options"].items():
            if isinstance(group.get(key), Tensor):
                group[key].copy_(torch.as_tensor(value))
            elif key != "params":
                before, group[key] = group.get(key), tuple(value) if isinstance(group.get(key), tuple) else value
                changed += [f"{key} of group {i} is {group[key]} as saved, not {before}"] * (group[key] != before)
    if (told := [text for text in changed if not text.startswith(SCHEDULED)]) and core.wires.rank == 0:
        say(f"{LOAD}: {'; '.join(told)}")


def _found(folder: Path, tag: str | None) -> Path | None:
    """The checkpoint's folder, or None if there is none and none was named. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{LOAD} {folder}: there is no such folder.")
    name, tags = newest(folder) if tag is None else tag, tagged(folder)
    if name in tags:
        return tags[name]
    if error := foreign(folder if tag is None else folder / tag, LOAD):
        raise error
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
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{reader.folder}: cannot be ({said(str(error))}); load another checkpoint.") from None


def _fits(core: Engine, optimizer: ZeroOptimizer | None, reader: Reader, words: Mapping[str, Any], strict: bool,
          moments: bool) -> None:
    """Raises UserError."""
    own = [u for u in all_units(core) if u.trained or not words["excluded"]]
    wanted = [piece.shard.parameter for u in own for piece in u.flat.pieces if math.prod(piece.shard.parameter.shape)]
    errors = mismatches(reader, {("weight", p.name): p.shape for p in wanted}) if strict else []
    errors += [f"{reader.folder}: has no buffer/{name} of shape {list(b.shape)}." for name, b in
               (buffers(core.module).items() if strict else ()) if not _like(reader, name, b) and b.numel()]
    if errors:
        raise UserError(*errors, f"{LOAD}: {reader.folder} is not of this module; give load_module_strict=False to "
                        "take what has the same name and shape.")
    if optimizer and moments and "training" in words:
        for text in _other_optimizer(core, optimizer, reader, words["training"]["groups"], strict):
            raise UserError(f"{LOAD} {reader.folder}: {text}, or load_optimizer_states=False.")


def _other_optimizer(core: Engine, optimizer: ZeroOptimizer, reader: Reader,
                     groups: Sequence[Mapping[str, Any]], strict: bool) -> Iterator[str]:
    kinds = dict.fromkeys(kind for state in core.updater.state.values() for kind in state)
    missing = [kind for kind in kinds if kind not in reader.kinds]
    if missing:
        yield f"was saved with {reader.index['optimizer']}, and has no {missing[0]}; give that optimizer"
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=False)):
        for key, value in saved["options"].items():
            if key in group and not _of_kind(value, group[key]):
                yield f"says that {key} of group {i} is {said(value)}, which cannot be; load another checkpoint"
    if not strict:
        return
    for name in [] if missing else _fresh(core, reader):
        yield (f"has no moments of {name}, which was not trained then; give the same groups, load_module_strict=False "
               "to begin with moments of zero")
    then, now = ([sorted(g["parameters"]) for g in given] for given in (groups, _options(core, optimizer)))
    if then != now:
        number = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
        if sorted(then) == sorted(now):
            yield (f"has the same groups of parameters in another order, the group of {then[number][0]} as number "
                   f"{number}; give them in that order")
        yield (f"has {len(then)} groups of parameters, there are {len(now)} now, and group {number} differs; give the "
               "same groups")


def _of_kind(value: Any, own: Any) -> bool:
    """May a group's option be this, where it is `own` now?"""
    if isinstance(own, tuple | list):
        return isinstance(value, list) and len(value) == len(own) and all(map(_of_kind, value, own))
    if isinstance(own, bool | str | None):
        return value is None or isinstance(value, bool | str)
    return isinstance(value, float | int | Tensor) and not isinstance(value, bool)


def _fresh(core: Engine, reader: Reader) -> list[str]:
    """Parameters whose weights are there, and whose moments are not."""
    pieces = [(piece, piece.shard.parameter) for u in all_units(core) if u.trained for piece in u.flat.pieces]
    return [p.name for piece, p in pieces if ("weight", p.name) in reader.shapes
            and any(reader.shapes.get((kind, p.name)) != shape
                    for kind, shape in tensors_of(p.shape, core.updater.groups.rule(piece)).items())]


def _like(reader: Reader, name: str, b: Tensor) -> bool:
    return reader.shapes.get(("buffer", name)) == (tuple(b.shape) or (1,))


def _restore(core: Engine, reader: Reader, moments: bool, own: Callable[..., Any] | None) -> None:
    """What the checkpoint has of the module's names and shapes; it was seen to be enough."""
    for unit in all_units(core):
        kinds = buffers_of(unit, core.updater.state if moments else {})
        for kind, there in kinds.items():
            if own is None or kind != "weight":
                fill(reader, there.flat, there.low, {kind: there.tensor}, lenient=True)
        unit.publish()
    if own is not None:
        with core.whole():
            weights = {name: reader.read(kind, name) for kind, name in reader.shapes if kind == "weight"}
            own(src=weights, dst=core.module)
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
    with _alike(core, f"save_16bit_model {folder}"):            # nobody goes on before the file is there
        try:
            if core.wires.rank == 0:
                _write_weights(core, folder, name, frozen, weights)
        except OSError as error:
            raise UserError(f"save_16bit_model {folder}: cannot be written ({error.strerror}); what was there is "
                            "untouched.") from error
        finally:
            for _ in weights:                                   # every rank goes to the end
                pass


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
    drafts = {folder / f"{n}.draft": folder / n for n in names.values()}
    try:
        for draft, part in zip(drafts, files.values(), strict=True):
            stream(draft, part, make, lambda _: {"format": "pt"})
        for left in ([INDEX, *(p.name for p in folder.glob("model-?????-of-?????.safetensors"))]
                     if name == WHOLE else ()):                 # of an export before, which may have been cut otherwise
            (folder / left).unlink(missing_ok=True)
        for draft, path in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    if len(files) > 1:
        where = {p.name: file for file, part in files.items() for p in part}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(p.nbytes for p in plan)}, "weight_map": where}, 2)
    config: Any = getattr(core.module, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
