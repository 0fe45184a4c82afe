"""The loop: steps, evaluations, checkpoints, early exits."""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from megazero.base import Lease, UserError, clock
from megazero.comm import Stuck
from megazero.data import SampleSource
from megazero.run.feed import Feed
from megazero.run.metrics import Metrics
from megazero.run.run import Run
from megazero.run.step import Settled, Step
from megazero.settings import Training
from megazero.state import Record, slices
from megazero.units import FIGURES

EVALUATING = 16                         # micro-batches of an evaluation that may be in a pipeline


# What asks a run to stop: of a person, of torchrun, of a terminal that closes, of a batch system some minutes ahead
ASKING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


GRACE = 3.0                             # seconds in which a signal that comes twice was sent once: torchrun hands it on


class Wish:
    """Why this rank should stop: its time is over, or while this lasts it was sent one of these signals, of which a
    second one, later, ends it at once (--exit-signal-handler). Ranks may differ: the gate of the next step tells all of
    them."""

    def __init__(self, settings: Training) -> None:
        self.settings, self.started = settings, time.perf_counter()
        self._heard, self._when = "", 0.0
        self._before: dict[signal.Signals, Any] = {}

    def reason(self) -> str:
        """Nothing while there is none."""
        minutes = self.settings.exit_duration_in_mins
        over = minutes and self.seconds() > 60 * minutes
        return self._heard or (f"--exit-duration-in-mins {minutes:g}" if over else "")

    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    def __enter__(self) -> None:
        if self.settings.exit_signal_handler:
            numbers = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
            self._before = {s: signal.signal(s, self._handle) for s in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._heard:
            self._heard, self._when = f"signal {signal.Signals(number).name}", time.perf_counter()
        elif time.perf_counter() - self._when > GRACE:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Loop:
    """A run from where it is to its end."""

    def __init__(self, run: Run, feed: Feed, step: Step, metrics: Metrics, record: Record | None,
                 wish: Wish, leases: Sequence[Lease] = ()) -> None:
        """`record`: where it is saved, if it is. `leases`: on what it writes to; without them it ends."""
        self.leases = leases
        self.run, self.feed, self.step, self.metrics, self.record, self.wish = run, feed, step, metrics, record, wish
        self.stop_reason = ""

    def train(self) -> None:
        """All of it, with evaluations, checkpoints and early exits. What is being saved when something fails is saved
        to its end, unless it was the link to other ranks."""
        try:
            self._train()
        except Stuck:
            raise
        except Exception:
            if self.record is not None:
                with suppress(Exception):
                    self.record.writer.wait()
            raise

    def _train(self) -> None:
        t, k, (_, valid, test) = self.run.config.training, self.run.config.checkpoint, self.feed.splits
        at = self.step.progress.step
        end = at if t.skip_train else self.run.plan.train_iters
        if at > end:
            self.run.say(f"nothing     to train: it begins at step {at:,}, and the run ends at step {end:,}; give a "
                         "larger --train-iters (or --train-samples), or --finetune to begin at step 0")
        if at >= end:                                           # nothing to train: what is the loss of these weights?
            self.evaluations(valid)
        self.step.lap()
        while at < end and not self.stop_reason:
            self.tell(self.step.start(self.wish.reason))
            at += 1
            if self.record is not None:
                self.record.writer.look()
            if valid and (at % t.eval_interval == 0 or at == end):
                self.tell(self.step.settle(last=True))
                self.evaluations(valid)
                self.step.lap()                                 # an evaluation is not part of the next step's time
            if self.record is not None and k.save_interval and at % k.save_interval == 0:
                self.save(self.record)
            if t.exit_interval and at % t.exit_interval == 0:
                self.stop_reason = f"--exit-interval {t.exit_interval}"
        self.tell(self.step.settle(last=True))
        if self.record is not None and self.record.last != self.step.progress.step and not t.skip_train:
            self.save(self.record)
        if self.record is not None:
            self.record.writer.wait()
        if at >= end:
            self.evaluations(test)
        self.feed.loader.close()
        self.metrics.close()
        why = f": {self.stop_reason}" if self.stop_reason else ""
        self.run.say(f"done at step {self.step.progress.step:,}{why}, after {clock(self.wish.seconds())}")

    def look(self) -> None:
        """Nothing is written where another run does now. Raises UserError."""
        for lease in self.leases:
            lease.look()

    def tell(self, done: Settled | None) -> None:
        """Logs a step. Raises UserError after too many skipped ones."""
        if done is None:
            return
        self.look()
        self.metrics.step(done.figures)
        if done.stop:
            self.stop_reason = self.wish.reason() or "another rank was asked to stop"
        if not done.reason:
            return
        self.run.say(done.told)
        limit, progress = self.run.config.training.max_skipped_steps, self.step.progress
        if progress.skipped_in_a_row >= limit:
            if self.record is not None:
                self.record.writer.wait()                       # what is being saved in the background is good
            raise UserError(f"--max-skipped-steps {limit}: {limit} steps in a row were not finite, the last because "
                            f"{done.reason}; the weights are those of step {progress.step - limit}. Lower --lr, or "
                            "look at the data of the last steps.")

    def evaluations(self, sets: Mapping[str, SampleSource]) -> None:
        if not sets:
            return
        self.run.actions.hold()                                 # somebody may still copy what changes places
        with self.run.updater.means():
            for name, split in sets.items():
                loss = self.evaluate(split)
                self.look()
                self.metrics.evaluation(self.step.progress.step, name, loss)

    def evaluate(self, split: SampleSource) -> float:
        """Mean loss over the samples that an evaluation takes of a split."""
        run = self.run
        told = torch.zeros(len(FIGURES), dtype=torch.float64, device=run.device)
        for turn, batch in enumerate(self.feed.evaluation(split)):
            if turn % EVALUATING == EVALUATING - 1:
                run.wires.barrier()                             # the first stage must not run far ahead of the last
            told += run.gate.figures(run.executor.evaluate(run.evaluation, batch))
        run.wires.line.doing = f"the end of the evaluation after step {self.step.progress.step}"
        total, valid = run.wires["world"].all_reduce(told).wait()
        return (total / valid).item()

    def save(self, record: Record) -> None:
        """Saves the run as it is after the last step."""
        self.tell(self.step.settle(last=True))
        self.step.lap()
        path = record.save(self.step.progress, slices(
            self.run.units.values(), self.run.updater.state if self.run.config.checkpoint.save_optim else {}))
        self.run.actions.hold = record.writer.hold
        seconds = self.step.lap()
        beside = ", the rest in the background" if record.writer.background else ""
        self.run.say(f"step {self.step.progress.step:,} | saved to {path} ({seconds:.1f} s{beside})")
