"""One rank of a training run: one step, the loop around it, its state.

The host works a step ahead of the device. What a step decided (was it finite?) is read while the next one runs; until
then its learning rate and loss scale have two possible values, and the device picks the right one. So no step waits for
the host, and a skipped step moves neither the learning rate nor anything else.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError, clock, say
from megazero.comm import Wires
from megazero.data import SampleSource, Tokenizer, same_tokenizer, samples
from megazero.model import Batch, Decoder
from megazero.plan import RULES, LossScale, Plan, Progress, flat, loss_scale
from megazero.run.executor import Executor, Turn
from megazero.run.loader import Loader, documents_of, positions_of, read
from megazero.run.metrics import Metrics
from megazero.settings import flatten
from megazero.state import Reader, Writer, fill, mismatches, owned
from megazero.units import FIGURES, TORCH_DTYPE, Buffers, Gate, Sharing, Unit, UnitActions, Updater, Verdict

Tensor = torch.Tensor
EVALUATING = 16                         # micro-batches of an evaluation that may be in a pipeline


@dataclass(frozen=True)
class Pending:
    """A step whose verdict the host has not read: its figures on the device, and what is known of it already."""

    verdict: Verdict
    # loss, norm, found_inf, wish to stop, lr, scale, when they have come to the host
    figures: Callable[[], list[float]]
    samples: int
    seconds: float
    witness: Mapping[str, Tensor]


class Run:
    """A training run on one rank: its parts, and where it is."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer | None, device: torch.device, wires: Wires) -> None:
        self.plan, self.config, self.tokenizer, self.device, self.wires = plan, plan.config, tokenizer, device, wires
        a, c = plan.architecture, plan.config
        stages, dtype = plan.stages_of(wires.rank), TORCH_DTYPE[c.dtype]
        buffers = Buffers(poison=wires.late)
        self.units = {}
        for unit in plan.units_of(wires.rank):
            at = plan.placement(unit.name)
            sharing = Sharing(plan.zero.level, wires[at.shard], wires[at.replicate], wires[at.holders], buffers)
            self.units[unit.name] = Unit(flat(unit, wires.place), dtype, device, sharing)
        self.decoder = Decoder(a, self.units, wires["tp"], c.training.seed, c.training.recompute_granularity, device,
                               plan.head_chunk, [i for own in stages.own.values() for i in own])
        self.training, self.evaluation = plan.training(wires.rank), plan.evaluation(wires.rank)
        units, tells = list(self.units.values()), wires.place.tp == 0
        self.gate = Gate(units, c.optimizer.clip_grad, wires["world"], tells)
        self.updater = Updater(units, c.optimizer, {a.units for a in self.training if a.kind == "update"})
        actions = UnitActions(self.units, wires, self.gate, self.updater)
        self.executor = Executor(self.decoder, wires, plan.parts, actions)
        self.progress = Progress(loss_scale(c))                 # as of the last verdict that was read
        self.pending: Pending | None = None
        self.train_samples = samples(plan, "train", tokenizer)
        self.valid_samples = samples(plan, "valid", tokenizer) if c.training.eval_iters and plan.train_iters else None
        self.test_samples = samples(plan, "test", tokenizer) if c.data.test_data_path else None
        self.loader = Loader(self.train_samples.sample, pin=device.type == "cuda")
        k = c.checkpoint
        self.writer = Writer(Path(k.save), k.keep_last, k.async_save, wires.rank, wires["saved"]) if k.save else None
        self.stop_reason = self.signalled = ""
        self.metrics: Metrics           # made when the step to go on from is known
        self.started = self.clock = time.perf_counter()

    # ---- one step

    def step(self) -> None:
        """Starts one step, then reads the verdict of the one before."""
        good, bad = self.futures()
        scale = self.choose(good.loss_scale.value, bad.loss_scale.value)
        lr = self.choose(*(self.plan.curve.rate_after(p) for p in (good, bad)))
        tokens = self.plan.architecture.seq_length      # a loss scale means the same for any batch: a sample's mean
        turn = Turn(scale, tokens, lr, bool(self.asked_to_stop()), batches=self.batches(good.step, good.samples))
        verdict = self.executor.train(self.training, turn).verdict
        assert verdict is not None
        figures = later(torch.stack([x.double() for x in (verdict.loss, verdict.norm, verdict.found_inf,
                                                          verdict.stop, lr, scale)]))
        self.settle()
        self.pending = Pending(verdict, figures, len(self.plan.samples_of(good.step)), self.lap(), turn.witness)

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def futures(self) -> tuple[Progress, Progress]:
        """Where the run is if the pending step was finite, and if it was not."""
        if self.pending is None:
            return self.progress, self.progress
        return self.progress.after(True, self.pending.samples), self.progress.after(False, self.pending.samples)

    def choose(self, good: float, bad: float) -> Tensor:
        """The value that fits the pending verdict, on the device."""
        one, other = (torch.full((), value, dtype=self.gate.wide, device=self.device) for value in (good, bad))
        return one if self.pending is None else torch.where(self.pending.verdict.found_inf == 0, one, other)

    def batches(self, step: int, first: int) -> list[Batch]:
        """This rank's micro-batches of a step, whose samples start at number `first`;
        those of the next step are read meanwhile."""
        now = self.numbers(first)
        tokens = self.loader.take(now, self.numbers(first + len(self.plan.samples_of(step))))
        return [self.batch(own, mine, step) for own, mine in zip(tokens, now, strict=True)]

    def numbers(self, first: int) -> list[range]:
        """The samples of this rank's micro-batches of the step that starts at sample `first`:
        data-parallel ranks take turns."""
        size, dp, rank = self.plan.micro_batch, self.plan.dp, self.wires.place.dp
        starts = [first + (m * dp + rank) * size for m in range(self.plan.micro_batches)]
        return [range(start, start + size) for start in starts]

    def batch(self, tokens: Tensor, numbers: range, step: int | None) -> Batch:
        """One micro-batch of tokens [b, s + 1] of the samples of these numbers.
        Without a step it is for evaluation: nothing is dropped."""
        tokens = tokens.to(self.device, non_blocking=True)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        mask = torch.ones(x.shape, dtype=self.gate.wide, device=self.device)
        d = self.config.data
        if d.eod_mask_loss:
            mask = mask.masked_fill(x == self.eod, 0)
        places = positions_of(x, self.eod) if d.reset_position_ids else None
        documents = documents_of(x, self.eod) if d.reset_attention_mask else None
        return Batch(x, y, mask, torch.arange(numbers.start, numbers.stop, device=self.device), step, places, documents)

    @property
    def eod(self) -> int:
        """The id that ends a document; flags that need one are refused without it."""
        assert self.tokenizer is not None and self.tokenizer.eod is not None
        return self.tokenizer.eod

    def settle(self, last: bool = False) -> None:
        """Reads the pending verdict, if any: logs it, counts it, ends the run after too many skipped steps.

        `last`: no step is running behind it, so waiting for it is part of its own time, not of the next one's.
        """
        if self.pending is None:
            return
        done, self.pending = self.pending, None
        loss, norm, found_inf, stop, lr, scale = done.figures()
        skipped = found_inf != 0
        waited = self.lap() if last else 0.0
        before, self.progress = self.progress, self.progress.after(not skipped, done.samples)
        self.metrics.step({
            "step": self.progress.step, "loss": loss, "grad_norm": norm, "lr": lr, "loss_scale": scale,
            "skipped": skipped, "samples": self.progress.samples,
            "tokens": done.samples * self.plan.architecture.seq_length, "seconds": done.seconds + waited})
        if stop > 0:
            self.stop_reason = self.asked_to_stop() or "another rank was asked to stop"
        if skipped:
            self._explain(done, before.loss_scale, self.progress)

    def _explain(self, done: Pending, scale: LossScale, after: Progress) -> None:
        """Tells which parameters were not finite, and on which ranks the gradients of the last of them were not
        before they were summed."""
        units = {p.name: u.name for u in self.plan.units for p in u.parameters}
        everyone = list(units)
        bad = torch.zeros(len(everyone), device=self.device)
        for name, norm in zip(self.gate.names, done.verdict.norms.tolist(), strict=True):
            bad[everyone.index(name)] += float(norm - norm != 0)
        culprits = self.wires["world"].all_reduce(bad, "max").wait().nonzero().flatten().tolist()
        what, where = "the loss is not finite", ""
        if culprits:
            last = everyone[culprits[-1]]
            mine = done.witness.get(units[last], torch.zeros((), device=self.device))
            seen = (self.wires["world"].all_gather(mine.isfinite().logical_not().float().view(1)).wait()
                    .nonzero().flatten().tolist())
            what = f"the gradient of {last} is not finite ({len(culprits)} of {len(everyone)} parameters)"
            where = (f" on rank{'s' if len(seen) > 1 else ''} {', '.join(map(str, seen[:8]))}"
                     if self.plan.world > 1 else "")
        moved = (f", loss scale {scale.value:g} -> {after.loss_scale.value:g}"
                 if after.loss_scale.value != scale.value else "")
        self.say(f"step {after.step:,} skipped: {what}{where}{moved}; nothing was changed")
        limit = self.config.training.max_skipped_steps
        if after.skipped_in_a_row >= limit:
            if self.writer is not None:
                self.writer.wait()                              # what is being saved in the background is good
            raise UserError(f"--max-skipped-steps {limit}: {limit} steps in a row were not finite, the last because "
                            f"{what}; the weights are those of step {after.step - limit}. Lower --lr, or look at the "
                            "data of the last steps.")

    # ---- the loop

    def train(self) -> None:
        """From where the run is to its end, with evaluations, checkpoints and early exits."""
        t, k = self.config.training, self.config.checkpoint
        there = k.save is not None and k.load is not None and Path(k.load).resolve() == Path(k.save).resolve()
        self.saved = self.progress.step if there and not k.finetune else -1
        step = self.progress.step
        self.lap()
        while step < self.plan.train_iters and not self.stop_reason:
            self.step()
            step += 1
            if self.writer is not None:
                self.writer.look()
            if self.valid_samples is not None and (step % t.eval_interval == 0 or step == self.plan.train_iters):
                self.settle(last=True)
                self.metrics.evaluation(step, "valid", self.evaluate(self.valid_samples))
                self.lap()                                      # an evaluation is not part of the next step's time
            if self.writer is not None and k.save_interval and step % k.save_interval == 0:
                self.save()
            if t.exit_interval and step % t.exit_interval == 0:
                self.stop_reason = f"--exit-interval {t.exit_interval}"
        self.settle(last=True)
        if self.writer is not None and self.saved != self.progress.step:
            self.save()
        if self.test_samples is not None and step == self.plan.train_iters:
            self.metrics.evaluation(step, "test", self.evaluate(self.test_samples))
        self.close()
        why = f": {self.stop_reason}" if self.stop_reason else ""
        self.say(f"done at step {self.progress.step:,}{why}, after {clock(time.perf_counter() - self.started)}")

    def asked_to_stop(self) -> str:
        """Why this rank should stop, or nothing. Ranks may differ: the gate of the next step tells all of them."""
        t = self.config.training
        if self.signalled:
            return self.signalled
        if t.exit_duration_in_mins and time.perf_counter() - self.started > 60 * t.exit_duration_in_mins:
            return f"--exit-duration-in-mins {t.exit_duration_in_mins:g}"
        return ""

    def evaluate(self, source: SampleSource) -> float:
        """Mean loss over the first samples of the validation order, or over all of them: the same ones each time."""
        t, size = self.config.training, self.plan.micro_batch
        count = source.full_pass() if t.full_validation else t.eval_iters * self.plan.global_batch
        sample = source.in_order if t.full_validation else source.sample
        mine = torch.zeros(len(FIGURES), dtype=torch.float64, device=self.device)
        for turn, first in enumerate(range(0, count, self.plan.dp * size)):
            if turn % EVALUATING == EVALUATING - 1:
                self.wires.barrier()                            # the first stage must not run far ahead of the last
            low = first + self.wires.place.dp * size
            numbers = range(low, min(low + size, count)) or range(1)
            batch = self.batch(read(sample, numbers), numbers, None)
            # no sample is left for this rank, but its peers need it to gather weights
            if low >= count:
                batch = replace(batch, mask=torch.zeros_like(batch.mask))
            told = self.executor.evaluate(self.evaluation, batch).told
            mine += torch.stack([told.get(figure, mine[0] * 0) for figure in FIGURES])
        self.wires.line.doing = f"the end of the evaluation after step {self.progress.step}"
        total, valid = self.wires["world"].all_reduce(mine * self.gate.tells).wait()
        return (total / valid).item()

    # ---- state

    def initialise(self) -> None:
        for unit in self.units.values():
            unit.initialise(self.config.training.seed)

    def buffers(self, unit: Unit) -> dict[str, Tensor]:
        """Everything a checkpoint holds of a unit: kind -> this rank's slice of the flat buffer."""
        unit.updated()
        return {"weight": unit.master, **self.updater.state[unit.flat.name]}

    def save(self) -> None:
        """Saves the run as it is after the last step."""
        assert self.writer is not None
        self.settle(last=True)
        slices = [s for u in self.units.values() if u.owner for s in owned(u.flat, u.low, self.buffers(u))]
        path = self.writer.save(slices, self.header())
        if self.wires.rank == 0:
            try:
                save_tokenizer(self.writer.folder, self.tokenizer)
            except OSError as error:
                raise UserError(f"--save {self.writer.folder}: the tokenizer's files cannot be written there "
                                f"({error.strerror}); the checkpoints are complete without them.") from error
        self.saved = self.progress.step
        self.say(f"step {self.progress.step:,} | saved to {path}"
                 + (" (writing in the background)" if self.writer.background else ""))
        self.lap()

    def header(self) -> dict[str, Any]:
        """What the index says of the run."""
        p = self.plan
        return {"step": self.progress.step, "progress": asdict(self.progress), "config": flatten(self.config),
                "optimizer": self.config.optimizer.optimizer, "architecture": asdict(p.architecture),
                "tokenizer": self.tokenizer.identity() if self.tokenizer else None,
                "layout": {"tp": p.tp, "pp": p.pp, "dp": p.dp, "zero_stage": self.config.parallel.zero_stage,
                           "global_batch_size": p.global_batch}}

    def load(self, reader: Reader) -> None:
        """Continues from a checkpoint, or with --finetune takes its weights alone."""
        finetune = self.config.checkpoint.finetune
        kinds = ("weight",) if finetune else ("weight", *RULES[self.config.optimizer.optimizer].moments)
        errors = unfit(reader, self.plan)
        errors = errors or self._wrong_optimizer(reader, kinds) or ([] if finetune else self._wrong_tokenizer(reader))
        errors = errors or mismatches(reader, [p for u in self.plan.units for p in u.parameters], kinds)
        if errors:
            raise UserError(*errors)
        for unit in self.units.values():
            fill(reader, unit.flat, unit.low, {k: v for k, v in self.buffers(unit).items() if k in kinds})
            unit.publish()
        if not finetune:
            saved = dict(reader.index["progress"])
            then, now = LossScale(**saved.pop("loss_scale")), self.progress.loss_scale
            if not (then.constant or now.constant):             # where it was, by the rule of this run
                now = replace(now, value=max(then.value, now.minimum), good=then.good,
                              bad=min(then.bad, now.hysteresis - 1))
            self.progress = Progress(**saved, loss_scale=now)
            self.updater.set_steps(self.progress.applied)
            self.plan = self.plan.going_on(self.progress.step, self.progress.samples)

    def _wrong_tokenizer(self, reader: Reader) -> list[str]:
        theirs = reader.index.get("tokenizer")
        if theirs is None or self.tokenizer is None or same_tokenizer(theirs, self.tokenizer.identity()):
            return []
        return [f"--load {reader.folder}: was trained with another tokenizer ({theirs.get('type')}, other files than "
                "now); give that one (its files are in the folder `tokenizer` beside the checkpoints), or --finetune "
                "and a new --save."]

    def _wrong_optimizer(self, reader: Reader, kinds: Sequence[str]) -> list[str]:
        missing = [k for k in kinds if k not in reader.kinds]
        theirs = reader.index.get("optimizer")
        saved = f"with {theirs}" if theirs else "without an optimizer"
        return [f"--optimizer {self.config.optimizer.optimizer}: {reader.folder} has no {' and no '.join(missing)} "
                f"(it was saved {saved}); add --finetune to start the optimizer afresh."] if missing else []

    def say(self, text: str) -> None:
        if self.wires.rank == 0:
            say(text)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.wait()
        self.loader.close()
        self.metrics.close()


def later(figures: Tensor) -> Callable[[], list[float]]:
    """The figures on their way to the host; the call waits until they are there,
    and for nothing that was started after them."""
    there = figures.to("cpu", non_blocking=True)                # from CUDA: into pinned memory
    if not figures.is_cuda:
        return there.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return there.tolist()

    return read


def unfit(reader: Reader, plan: Plan) -> list[str]:
    """Why a checkpoint is not of this model: a sentence for each field of the architecture,
    and for the first of the weights."""
    return [*different(reader.index["architecture"], asdict(plan.architecture), reader.folder),
            *mismatches(reader, [p for u in plan.units for p in u.parameters], ("weight",))]


def different(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """A sentence for each field of the architecture in which a checkpoint differs."""
    free = ("seq_length", "init_std", "attention_dropout", "hidden_dropout", "pad_rows")  # do not change the weights
    return [f"--load {folder}: its {key.replace('_', ' ')} is {saved.get(key)}, this model's {value}; "
            "give the flags it was trained with."
            for key, value in now.items() if key not in free and _plain(saved.get(key)) != _plain(value)]


def _plain(value: Any) -> Any:
    """JSON makes lists of tuples: compare them as one."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Copies the tokenizer's files beside the checkpoints, so that those are enough to generate and export."""
    for name, path in (tokenizer.files() if tokenizer else {}).items():
        target = folder / "tokenizer" / name
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(name + ".draft")
            draft.write_bytes(path.read_bytes())
            draft.replace(target)
