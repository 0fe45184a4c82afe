"""What can go wrong later and can be known now, before anything is written; and the plan of a run that may be for
another machine."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from megazero.base import UserError, gib, printable, read_bytes
from megazero.comm import own_device
from megazero.data import Tokenizer, configured_tokenizer, load_tokenizer, named_by
from megazero.hf import outlook
from megazero.plan import OFFLOADED, Plan, Progress, describe, flags, loss_scale, memory, named
from megazero.run.feed import Splits, open_splits
from megazero.settings import Config, build, flatten, without_weights
from megazero.state import INDEX, Reader, complete, foreign, resumed, unfit

NCCL = 128 << 20        # bytes of a communicator's buffers, about: nobody has measured them here
TOKENIZER = ("tokenizer_model", "vocab_file", "merge_file")
DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "data_schedule")
UNBOUND = ("seq_length", "init_method_std", "attention_dropout", "hidden_dropout")      # what changes no weights
KNOWN = {"GPT2BPETokenizer": 50257, "Llama2Tokenizer": 32000}           # ids of the files that a type usually has


def begun(config: Config) -> Config:
    """The same where it depends on what is in the folders: with what --pretrained-checkpoint and --use-checkpoint-args
    mean there. Raises UserError."""
    k = config.checkpoint
    there = k.load is not None and (Reader.finds(Path(k.load)) or os.path.exists(Path(k.load) / INDEX))
    if k.load is not None and not there and (error := foreign(Path(k.load), "--load")):
        raise error                                             # it would be taken for a folder that is still empty
    if k.exit_on_missing_checkpoint and k.load is not None and not there:
        raise UserError(f"--exit-on-missing-checkpoint: --load {k.load} holds no checkpoint; name the folder of one.")
    if k.pretrained_checkpoint is not None and not there:
        k = replace(k, load=k.pretrained_checkpoint, finetune=True, ckpt_step=None)
        config = replace(config, checkpoint=k)
    if not k.use_checkpoint_args or k.load is None or config.check and not os.path.exists(k.load):
        return config
    reader, said, plain = Reader(k.load, k.ckpt_step), flatten(config), flatten(Config())
    own = {name: said[name] for name in UNBOUND if said[name] != plain[name]}
    folder, kept = reader.folder.parent / "tokenizer", reader.index["tokenizer"]
    kept = kept if config.data.tokenizer_type is None and not config.data.mock_data and folder.is_dir() else None
    return build(Config, {**said, **flags(reader.architecture), **own,
                          **(named_by(load_tokenizer(kept, folder), folder) if kept else {})})


def preview(config: Config, world: int, rank: int, here: bool) -> list[str]:
    """What --check tells of a run on `world` ranks, `here` or elsewhere: what is here is looked at as ever, what is not
    is listed. Raises UserError."""
    gone = not_here(config)
    tokenizer = None if gone.keys() & set(TOKENIZER) else configured_tokenizer(config)
    device = named(config.parallel.device)
    kind = choose_device(config).type if device is None else "cuda"
    at_home(config, kind)
    plan = Plan.of(config, world, vocabulary(config, tokenizer), kind)
    if config.parallel.pipeline_program:
        plan = programmed(plan, config.parallel.pipeline_program)
    lines = [describe(plan)]
    if config.world_size is None and config.parallel.data_parallel_size is None and world > 1 and not here:
        lines.append(f"{'':<12}{world} ranks are the fewest it runs on; --world-size N plans for more")
    if not gone.keys() & set(DATA):
        open_splits(plan, tokenizer)
    if "load" not in gone:
        checkpoint_ahead(plan, tokenizer)
    if (wrong := folders_ahead(config)) and here:
        raise UserError(*wrong)
    needed = needed_by(plan, [rank], kind)
    if device is not None:
        if needed > device.memory:
            raise UserError(too_small(plan, needed, 1, f"{config.parallel.device} has {gib(device.memory)}", kind))
        lines.append(f"{'device':<12}{device.words}, {gib(device.memory)} of memory: {gib(needed)} are taken, and what "
                     "operations need while they run")
    elif here:
        lines += [f"{'device':<12}too small: {sentence}" for sentence in too_little(plan, rank, torch.device(kind))]
    if tokenizer is not None:
        lines.append(f"{'tokenizer':<12}{outlook(tokenizer)}")
    lines += [f"{'not here':<12}--{name.replace('_', '-')} {printable(what, 200)}" for name, what in gone.items()]
    assert not (faults := plan.mistakes()), faults              # of our own making, or of a file that was looked at
    return lines


def not_here(config: Config) -> dict[str, str]:
    """What a configuration names and this machine has not, by the name of the flag."""
    d, k = config.data, config.checkpoint
    found = {name: getattr(d, name) for name in (*TOKENIZER, "data_args_path", "data_schedule")}
    gone = {name: path for name, path in found.items() if path is not None and not os.path.exists(path)}
    for name in DATA[:4]:
        if missing := [prefix for prefix in without_weights(getattr(d, name)) if not os.path.exists(f"{prefix}.idx")]:
            gone[name] = " ".join(missing)
    if d.mock_data:
        gone = {name: what for name, what in gone.items() if name not in DATA}
    if k.load is not None and not os.path.exists(k.load):
        gone["load"] = k.load
    return gone


def vocabulary(config: Config, tokenizer: Tokenizer | None) -> int:
    """Ids of the model. Raises UserError where nothing says how many."""
    d = config.data
    size = max(tokenizer.vocab_size if tokenizer else 0, d.vocab_size or 0) or KNOWN.get(d.tokenizer_type or "", 0)
    if not size:
        raise UserError(f"--vocab-size is missing: the file of --tokenizer-type {d.tokenizer_type} is not on this "
                        "machine; give the number of its ids.")
    return size


def look_ahead(plan: Plan, tokenizer: Tokenizer | None) -> tuple[Splits, Reader | None]:
    """Everything that can go wrong later and can be known now: data, checkpoint, folders. Returns what it opened: the
    samples, and the checkpoint to begin with. Raises UserError; writes nothing."""
    splits, reader = open_splits(plan, tokenizer), checkpoint_ahead(plan, tokenizer)
    if wrong := folders_ahead(plan.config):
        raise UserError(*wrong)
    return splits, reader


def checkpoint_ahead(plan: Plan, tokenizer: Tokenizer | None) -> Reader | None:
    """The checkpoint to begin with. Raises UserError for one that does not fit."""
    k, reader = plan.config.checkpoint, find_checkpoint(plan.config)
    if reader is not None:
        parameters = [p for u in plan.units for p in u.parameters]
        goes_on = not k.finetune and not fresh_moments(plan.config, reader)
        errors = unfit(reader, plan.architecture, parameters, plan.config.optimizer if goes_on else None, tokenizer)
        if errors:
            raise UserError(*errors)
    nothing_later(plan.config, place(plan.config, reader).step)
    return reader


def folders_ahead(config: Config) -> list[str]:
    """Folders that the run could not write to."""
    folders = (("--save", config.checkpoint.save), ("--log-dir", config.logging.log_dir),
               ("--offload-dir", config.offload.offload_dir))
    return [f"{flag} {folder}: is not a folder that can be written to; name another." for flag, folder in folders
            if folder is not None and not writable(Path(folder))]


def nothing_later(config: Config, step: int) -> None:
    """Raises UserError if what the run would save over goes on beyond the step where it begins."""
    k = config.checkpoint
    later = [s for s, _ in complete(Path(k.save)) if s > step] if k.save and not config.training.skip_train else []
    if later and not set_back(config):
        raise UserError(f"--save {k.save}: holds a checkpoint of step {later[-1]}, beyond step {step} where this run "
                        f"begins; go on from it with --load {k.save}{' and without --finetune' if k.finetune else ''}, "
                        "or name a new folder.")


def find_checkpoint(config: Config) -> Reader | None:
    """The checkpoint to load, if any. A run that loads from where it saves starts afresh the first time."""
    k = config.checkpoint
    if k.load is None or (in_place(config) and k.ckpt_step is None and not Reader.finds(Path(k.load))):
        return None
    return Reader(k.load, k.ckpt_step)


def place(config: Config, reader: Reader | None) -> Progress:
    """Where a run begins: where a checkpoint ends, or at its own beginning."""
    fresh, k = loss_scale(config), config.checkpoint
    if reader is None or k.finetune:
        return Progress(fresh)
    found = resumed(reader.progress, fresh)
    return replace(found, unseen=found.applied) if fresh_moments(config, reader) else found


def fresh_moments(config: Config, reader: Reader) -> str:
    """Why a run that goes on from a checkpoint begins with moments of zero, or nothing."""
    saved, now = reader.index["optimizer"], config.optimizer.optimizer
    if not config.checkpoint.load_optim:
        return "--no-load-optim"
    return f"it was saved with --optimizer {saved}, this is {now}" if saved not in (None, now) else ""


def in_place(config: Config) -> bool:
    """Does the run load from where it saves?"""
    k = config.checkpoint
    return k.load is not None and k.save is not None and Path(k.load).resolve() == Path(k.save).resolve()


def set_back(config: Config) -> bool:
    """Was the run told to go on, where it is, from a checkpoint that need not be the newest?"""
    k = config.checkpoint
    return in_place(config) and k.ckpt_step is not None and not (k.finetune or config.training.skip_train)


def writable(folder: Path) -> bool:
    """Can a file be made in this folder, or can the folder be made?"""
    while not os.path.exists(folder):
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def at_home(config: Config, kind: str) -> None:
    """Raises UserError where state cannot be kept as asked on such a device."""
    asked = [f"--{name.replace('_', '-')} {home}" for name in OFFLOADED
             if (home := getattr(config.offload, name)) != "none"]
    if asked and kind == "cuda":
        raise UserError(f"{asked[0]}: is not here on CUDA yet, for runs on a CPU alone; leave it out, and share state "
                        "with --zero-stage.")


def programmed(plan: Plan, file: str) -> Plan:
    """The plan with the programs of a file. Raises UserError for one that cannot be read, or would not run."""
    try:
        text = read_bytes(Path(file)).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--pipeline-program {file}: cannot be read ({error}); name a file of programs.") from None
    return plan.programmed(text, f"--pipeline-program {file}")


def choose_device(config: Config) -> torch.device:
    wanted, there = config.parallel.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; "
                        "write --device cpu, or auto.")
    if not there or wanted == "cpu":
        return torch.device("cpu")
    return own_device("write --device cpu")


def room(plan: Plan, rank: int, device: torch.device) -> None:
    """Raises UserError if what must be held by the ranks that share this rank's memory is more than there is."""
    if wrong := too_little(plan, rank, device):
        raise UserError(*wrong)


def too_little(plan: Plan, rank: int, device: torch.device) -> list[str]:
    """The same as a sentence, or none."""
    first, count = rank - int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    ranks = range(first, first + count) if device.type == "cpu" else range(rank, rank + 1)
    needed, there = needed_by(plan, ranks, device.type), memory_of(device)
    here = f"this {device.type} has {gib(there)}"
    return [too_small(plan, needed, len(ranks), here, device.type)] if needed > there else []


def needed_by(plan: Plan, ranks: Collection[int], kind: str) -> int:
    """Bytes that these ranks must hold. What operations need while they run comes on top."""
    return (sum(n for r in ranks for n in memory(plan, r).values())
            + (sum(NCCL * communicators(plan, r) for r in ranks) if kind == "cuda" else 0))


def too_small(plan: Plan, needed: int, ranks: int, there: str, kind: str) -> str:
    more = "more machines" if kind == "cpu" else "share it among more ranks with --tp, --pp or --zero-stage"
    p = plan.config.parallel
    more += ", or layers evenly with --pipeline-split even" if plan.pp > 1 and p.pipeline_split == "flops" else ""
    return (f"--hidden-size {plan.architecture.hidden}, --num-layers {plan.architecture.layers}: weights, gradients, "
            f"optimizer and activations take {gib(needed)} for {ranks} rank{'s' if ranks > 1 else ''}, {there}; choose "
            f"a smaller model or --micro-batch-size, or {more}.")


def communicators(plan: Plan, rank: int) -> int:
    """How many of NCCL a rank takes part in (comm/wires.py)."""
    own = [axis for axis, rows in plan.mesh.groups().items() for ranks in rows
           if axis != "saved" and rank in ranks and len(ranks) > 1]
    return len(own) + own.count("shard") + 2 * sum(rank in pair for pair in plan.mesh.channels())


def memory_of(device: torch.device) -> int:
    """Bytes of memory that are free on a CUDA device, or that this machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
