"""The program: everything that can be wrong is looked for first, then the run is built, started and trained."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from megazero.base import Lease, UserError, gib, printable, read_bytes, say, unwritable
from megazero.comm import Wires, before_cuda, connect, environment, own_device
from megazero.data import Tokenizer, configured_tokenizer
from megazero.hf import outlook
from megazero.plan import Plan, Progress, checks, describe, flops_per_token, loss_scale, memory, ranks_asked, written
from megazero.run.failures import failure
from megazero.run.feed import Feed, Splits, open_splits
from megazero.run.loop import Loop, Wish
from megazero.run.metrics import MFU, Metrics, peak_flops
from megazero.run.run import Run
from megazero.run.step import Step
from megazero.settings import Config, flatten
from megazero.state import Reader, Record, Writer, about, changed, complete, jumps, restore, resumed, set_aside, unfit
from megazero.units import TORCH_DTYPE

LEASE = "lease.json"
SIGHT = 60.0            # seconds in which a file server shows a host what another wrote
NCCL = 128 << 20        # bytes of a communicator's buffers, about: nobody has measured them here


def main(config: Config) -> None:
    """The whole program: everything that can be wrong is found before anything is written."""
    rank, here = environment()
    world = ranks_asked(config) if config.check and here == 1 else here
    errors = checks(config, world)
    if errors:
        raise UserError(*errors)
    before_cuda(config.parallel.pipeline_model_parallel_size > 1)
    device = choose_device(config)
    tokenizer = configured_tokenizer(config)
    plan = Plan.of(config, world, max(tokenizer.vocab_size if tokenizer else 0, config.data.vocab_size or 0),
                   device.type)
    if config.parallel.pipeline_program:
        plan = programmed(plan, config.parallel.pipeline_program)
    if rank == 0:
        say(describe(plan))
    splits, reader = look_ahead(plan, tokenizer)
    if world == here:
        room(plan, rank, device)
    if config.check:
        if tokenizer is not None and rank == 0:
            say(f"tokenizer   {outlook(tokenizer)}")
        assert not (wrong := plan.mistakes()), wrong            # of our own making, or of a file that was looked at
        return
    wires = connect(plan.mesh, rank, "nccl" if device.type == "cuda" else "gloo",
                    60 * config.parallel.distributed_timeout_minutes, words=common(plan, splits))
    try:
        with leased(config, rank) as leases:
            train(plan, device, wires, tokenizer, splits, reader, leases)
    except (OSError, MemoryError, RuntimeError) as error:
        if (told := failure(error, plan, wires)) is not None:
            raise told from error
        raise
    wires.close()


def train(plan: Plan, device: torch.device, wires: Wires, tokenizer: Tokenizer | None, splits: Splits,
          reader: Reader | None, leases: Mapping[Path, Lease]) -> None:
    """Builds the run, starts it and trains it."""
    config = plan.config
    wish, progress = Wish(config.training), place(config, reader)
    if leases:
        nothing_later(config, progress.step)                    # another run may just have ended there
    run = Run(plan.going_on(progress.step, progress.samples), device, wires)
    lease = leases.get(Path(config.checkpoint.save).resolve()) if config.checkpoint.save else None
    record = recorded(run, tokenizer, reader, progress, lease, splits.identity())
    start(run, splits, reader, record)
    feed, metrics = Feed(run, splits, tokenizer), measured(run, progress)
    step = Step(run, feed.batches, progress)
    with wish:
        Loop(run, feed, step, metrics=metrics, record=record, wish=wish, leases=[*leases.values()]).train()


def programmed(plan: Plan, file: str) -> Plan:
    """The plan with the programs of a file. Raises UserError for one that cannot be read, or would not run."""
    try:
        text = read_bytes(Path(file)).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--pipeline-program {file}: cannot be read ({error}); name a file of programs.") from None
    return plan.programmed(text, f"--pipeline-program {file}")


def look_ahead(plan: Plan, tokenizer: Tokenizer | None) -> tuple[Splits, Reader | None]:
    """Everything that can go wrong later and can be known now: data, checkpoint, folders. Returns what it opened: the
    samples, and the checkpoint to begin with. Raises UserError; writes nothing."""
    k = plan.config.checkpoint
    splits, reader = open_splits(plan, tokenizer), find_checkpoint(plan.config)
    if reader is not None:
        parameters = [p for u in plan.units for p in u.parameters]
        optimizer = None if k.finetune else plan.config.optimizer.optimizer
        errors = unfit(reader, plan.architecture, parameters, optimizer, tokenizer)
        if errors:
            raise UserError(*errors)
    nothing_later(plan.config, place(plan.config, reader).step)
    for flag, folder in (("--save", k.save), ("--log-dir", plan.config.logging.log_dir)):
        if folder is not None and not writable(Path(folder)):
            raise UserError(f"{flag} {folder}: is not a folder that can be written to; name another.")
    return splits, reader


def nothing_later(config: Config, step: int) -> None:
    """Raises UserError if what the run would save over goes on beyond the step where it begins."""
    k = config.checkpoint
    later = [s for s, _ in complete(Path(k.save)) if s > step] if k.save and not config.training.skip_train else []
    if later and not set_back(config):
        raise UserError(f"--save {k.save}: holds a checkpoint of step {later[-1]}, beyond step {step} where this run "
                        f"begins; go on from it with --load {k.save}{' and without --finetune' if k.finetune else ''}, "
                        "or name a new folder.")


@contextmanager
def leased(config: Config, rank: int) -> Iterator[dict[Path, Lease]]:
    """The folders that this run writes to, which are rank 0's to guard: nobody else writes there meanwhile. Raises
    UserError if somebody does. A log that cannot be written is not worth a run."""
    held: dict[Path, Lease] = {}
    try:
        for flag, folder in (("--save", config.checkpoint.save), ("--log-dir", config.logging.log_dir)):
            if folder is None or rank > 0 or (path := Path(folder).resolve()) in held:
                continue
            try:
                path.mkdir(parents=True, exist_ok=True)
                held[path] = Lease(path / LEASE, f"{flag} {folder}")
            except OSError as error:
                if flag == "--save":
                    raise UserError(f"--save {folder}: {unwritable(error)}.") from None
        yield held
    finally:
        for lease in held.values():
            lease.close()


def room(plan: Plan, rank: int, device: torch.device) -> None:
    """Raises UserError if what must be held by the ranks that share this rank's memory is more than there is. What
    operations need while they run comes on top."""
    first, count = rank - int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    ranks = range(first, first + count) if device.type == "cpu" else (rank,)
    needed = sum(n for r in ranks for n in memory(plan, r).values())
    needed += NCCL * communicators(plan, rank) if device.type == "cuda" else 0
    there = memory_of(device)
    if needed > there:
        more = "more machines" if device.type == "cpu" else "share it among more ranks with --tp, --pp or --zero-stage"
        p = plan.config.parallel
        more += ", or layers evenly with --pipeline-split even" if plan.pp > 1 and p.pipeline_split == "flops" else ""
        raise UserError(f"--hidden-size {plan.architecture.hidden}, --num-layers {plan.architecture.layers}: weights, "
                        f"gradients, optimizer and activations take {gib(needed)} for {len(ranks)} "
                        f"rank{'s' if len(ranks) > 1 else ''}, this {device.type} has {gib(there)}; choose a smaller "
                        f"model or --micro-batch-size, or {more}.")


def communicators(plan: Plan, rank: int) -> int:
    """How many of NCCL a rank takes part in (comm/wires.py)."""
    own = [axis for axis, rows in plan.mesh.groups().items() for ranks in rows
           if axis != "saved" and rank in ranks and len(ranks) > 1]
    return len(own) + own.count("shard") + 2 * sum(rank in pair for pair in plan.mesh.channels())


def place(config: Config, reader: Reader | None) -> Progress:
    """Where a run begins: where a checkpoint ends, or at its own beginning."""
    fresh = loss_scale(config)
    return Progress(fresh) if reader is None or config.checkpoint.finetune else resumed(reader.progress, fresh)


def recorded(run: Run, tokenizer: Tokenizer | None, reader: Reader | None, progress: Progress,
             lease: Lease | None, data: str) -> Record | None:
    """Where the run is saved, if it is. What it goes on from is there already where it loads from there."""
    p, k = run.plan, run.config.checkpoint
    if k.save is None:
        return None
    layout = {"tp": p.tp, "pp": p.pp, "dp": p.dp, "zero_stage": run.config.parallel.zero_stage,
              "global_batch_size": p.global_batch}
    facts = about(p.architecture, config=flatten(run.config), optimizer=run.config.optimizer.optimizer, layout=layout,
                  tokenizer=tokenizer, family=reader.index.get("family") if reader is not None else None, data=data)
    writer = Writer(Path(k.save), k.keep_last, k.async_save, run.wires.rank, run.wires["saved"], lease)
    there = reader is not None and in_place(run.config) and not k.finetune
    return Record(writer, facts, tokenizer, progress.step if there else -1)


def start(run: Run, splits: Splits, reader: Reader | None, record: Record | None) -> None:
    """Weights, and all that the optimizer keeps, from a checkpoint or afresh; tells what was found."""
    config, k = run.config, run.config.checkpoint
    for line in splits.describe():
        run.say(line)
    if reader is None:
        if k.load is not None:
            run.say(f"starting    afresh: --load {k.load} holds no complete checkpoint yet")
        run.initialise()
    else:
        restore(reader, run.units.values(), {} if k.finetune else run.updater.state)
        run.say(f"loaded      {reader.folder}{': weights alone' if k.finetune else ''}")
        # also where it follows
        before = reader.index["config"] | {"global_batch_size": reader.index["layout"].get("global_batch_size")}
        now = flatten(config) | {"global_batch_size": run.plan.global_batch}
        for line in [*changed(before, now), *([] if k.finetune else jumps(before, run.plan, reader.progress))]:
            run.say(f"changed     {line}")
        data = str(reader.index.get("data") or splits.identity())
        if data != splits.identity() and not k.finetune:
            run.say(f"changed     the data were {printable(data)}; are {splits.identity()}")
    same_start(run, -1 if reader is None else int(reader.index["step"]))
    same_folder(run)
    if set_back(config) and record is not None and run.wires.rank == 0:
        for path in set_aside(record.writer.folder, record.last):
            run.say(f"set aside   {path}: later than step {record.last}")


def measured(run: Run, progress: Progress) -> Metrics:
    """The log of the run; tells what its speed is measured against."""
    device, dtype = run.device, run.config.dtype
    peak, source = peak_flops(device, dtype, TORCH_DTYPE[dtype])
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{torch.get_num_threads()} threads of {platform.machine()}")
    run.say(f"device      {name}, torch {torch.__version__}; peak {peak / 1e12:.4g} TFLOP/s: {source}")
    run.say(f"            {MFU}")
    log = run.config.logging
    return Metrics(device, peak=peak, flops_per_token=flops_per_token(run.plan.architecture), world=run.plan.world,
                   steps=run.plan.train_iters, interval=log.log_interval, folder=log.log_dir,
                   resumed=None if run.config.training.skip_train else progress.step,
                   rank=run.wires.rank)


def writable(folder: Path) -> bool:
    """Can a file be made in this folder, or can the folder be made?"""
    while not os.path.exists(folder):
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that are free on a CUDA device, or that this machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def common(plan: Plan, splits: Splits) -> str:
    """What all ranks must have in common before they are joined: flags, files and data, told in few letters."""
    text = json.dumps(flatten(plan.config), sort_keys=True) + written(plan.programs) + splits.identity()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same_folder(run: Run) -> None:
    """Raises UserError unless all ranks see what the first one wrote to --save."""
    save, end = run.config.checkpoint.save, time.monotonic() + (SIGHT if run.wires.rank else 0)
    if save is None:
        return
    while not (seen := LEASE in os.listdir(save) if os.path.isdir(save) else False) and time.monotonic() < end:
        time.sleep(1)
    told = torch.tensor([0 if seen else run.wires.rank], dtype=torch.float64, device=run.device)
    if blind := int(run.wires["world"].all_reduce(told, "max").wait().item()):
        raise UserError(f"--save {save}: rank {blind} does not see what rank 0 wrote there; it must lie on a file "
                        "system that all of them share.")


def same_start(run: Run, step: int) -> None:
    """Raises UserError unless all ranks found the same checkpoint (-1: none)."""
    told = torch.tensor([step, -step], dtype=torch.float64, device=run.device)
    high, low = run.wires["world"].all_reduce(told, "max").wait().tolist()
    if high != -low:
        first = "none" if low == 1 else f"step {-low:g}"
        raise UserError(f"--load {run.config.checkpoint.load}: ranks do not see the same checkpoint, but {first} to "
                        f"step {high:g}; it must lie on a file system that all of them share.")


def choose_device(config: Config) -> torch.device:
    wanted, there = config.parallel.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; "
                        "write --device cpu, or auto.")
    if not there or wanted == "cpu":
        return torch.device("cpu")
    return own_device("write --device cpu")


def in_place(config: Config) -> bool:
    """Does the run load from where it saves?"""
    k = config.checkpoint
    return k.load is not None and k.save is not None and Path(k.load).resolve() == Path(k.save).resolve()


def set_back(config: Config) -> bool:
    """Was the run told to go on, where it is, from a checkpoint that need not be the newest?"""
    k = config.checkpoint
    return in_place(config) and k.ckpt_step is not None and not (k.finetune or config.training.skip_train)


def find_checkpoint(config: Config) -> Reader | None:
    """The checkpoint to load, if any. A run that loads from where it saves starts afresh the first time."""
    k = config.checkpoint
    if k.load is None or (in_place(config) and k.ckpt_step is None and not Reader.finds(Path(k.load))):
        return None
    return Reader(k.load, k.ckpt_step)
