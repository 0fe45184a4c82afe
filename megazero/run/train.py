"""The program: everything that can be wrong is looked for first, then the run is built, started and trained."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megazero.base import Lease, UserError, printable, say, unwritable
from megazero.comm import Wires, before_cuda, connect, environment
from megazero.data import Tokenizer, configured_tokenizer
from megazero.plan import EMA, Plan, Progress, checks, describe, flags, flops_per_token, ranks_asked, written
from megazero.run.ahead import (
    UNBOUND,
    at_home,
    begun,
    choose_device,
    fresh_moments,
    in_place,
    look_ahead,
    nothing_later,
    place,
    preview,
    programmed,
    room,
    set_back,
    vocabulary,
)
from megazero.run.failures import failure
from megazero.run.feed import Feed, Splits
from megazero.run.loop import Loop, Wish
from megazero.run.metrics import MFU, Metrics, peak_flops
from megazero.run.run import Run
from megazero.run.step import Step
from megazero.settings import Config, flatten
from megazero.state import Reader, Record, Writer, about, changed, jumps, restore, set_aside
from megazero.units import TORCH_DTYPE

LEASE = "lease.json"
SIGHT = 60.0            # seconds in which a file server shows a host what another wrote
NCCL = 128 << 20        # bytes of a communicator's buffers, about: nobody has measured them here


def main(config: Config, words: Sequence[str] = ()) -> None:
    """The whole program: everything that can be wrong is found before anything is written. `words`: what became of
    those of the command line."""
    rank, here = environment()
    config = begun(config)
    world = ranks_asked(config) if config.check and here == 1 else here
    errors = checks(config, world)
    if errors:
        raise UserError(*errors)
    if rank == 0:
        for line in words:
            say(line)
    if config.check:
        for line in preview(config, world, rank, here=world == here):
            if rank == 0:
                say(line)
        return
    before_cuda(config.parallel.pipeline_model_parallel_size > 1)
    device = choose_device(config)
    at_home(config, device.type)
    tokenizer = configured_tokenizer(config)
    plan = Plan.of(config, world, vocabulary(config, tokenizer), device.type)
    if config.parallel.pipeline_program:
        plan = programmed(plan, config.parallel.pipeline_program)
    if rank == 0:
        say(describe(plan))
    splits, reader = look_ahead(plan, tokenizer)
    room(plan, rank, device)
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


def recorded(run: Run, tokenizer: Tokenizer | None, reader: Reader | None, progress: Progress,
             lease: Lease | None, data: str) -> Record | None:
    """Where the run is saved, if it is. What it goes on from is there already where it loads from there."""
    p, k = run.plan, run.config.checkpoint
    if k.save is None:
        return None
    layout = {"tp": p.tp, "pp": p.pp, "dp": p.dp, "zero_stage": run.config.parallel.zero_stage,
              "global_batch_size": p.global_batch}
    facts = about(p.architecture, config=flatten(run.config), layout=layout,
                  optimizer=run.config.optimizer.optimizer if k.save_optim else None,
                  tokenizer=tokenizer, family=reader.index.get("family") if reader is not None else None, data=data)
    writer = Writer(Path(k.save), k.keep_last, k.async_save, run.wires.rank, run.wires["saved"], lease)
    there = reader is not None and in_place(run.config) and not k.finetune
    return Record(writer, facts, tokenizer, progress.step if there else -1)


def start(run: Run, splits: Splits, reader: Reader | None, record: Record | None) -> None:
    """Weights, and all that the optimizer keeps, from a checkpoint or afresh; tells what was found."""
    config, k = run.config, run.config.checkpoint
    for line in (*splits.describe(), *run.home.describe()):
        run.say(line)
    if reader is None:
        if k.load is not None:
            run.say(f"starting    afresh: --load {k.load} holds no complete checkpoint yet")
        run.initialise()
    else:
        why = "" if k.finetune else fresh_moments(config, reader)
        fresh = k.finetune or bool(why)
        kept = {name: {kind: t for kind, t in state.items() if kind != EMA or EMA in reader.kinds}
                for name, state in run.updater.state.items()}
        restore(reader, run.units.values(), {} if fresh else kept)
        run.say(f"loaded      {reader.folder}{': weights alone' if fresh else ''}"
                f"{f', moments begin afresh: {why}' if why else ''}")
        # also where it follows
        model = flags(reader.architecture).keys() - UNBOUND     # fits, however it was said
        before = {key: value for key, value in reader.index["config"].items() if key not in model} | {
            "global_batch_size": reader.index["layout"].get("global_batch_size")}
        now = flatten(config) | {"global_batch_size": run.plan.global_batch}
        for line in [*changed(before, now), *([] if k.finetune else jumps(before, run.plan, reader.progress))]:
            run.say(f"changed     {line}")
        data = str(reader.index.get("data") or splits.identity())
        if data != splits.identity() and not k.finetune:
            run.say(f"changed     the data were {printable(data)}; are {splits.identity()}")
    if config.optimizer.ema is not None and (reader is None or fresh or EMA not in reader.kinds):
        run.updater.begin_means()
        if reader is not None:
            run.say("mean        --ema begins with these weights")
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
