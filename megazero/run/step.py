"""The transaction: one step at a time, whose verdict says whether it happened.

The host works a step ahead of the device. What a step decided (was it finite?) is read while the next one runs; until
then its learning rate and loss scale have two possible values, and the device picks the right one. So no step waits for
the host, and a skipped step moves neither the learning rate nor anything else.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megazero.model import Batch
from megazero.plan import LossScale, Progress
from megazero.run.executor import Turn
from megazero.run.run import Run
from megazero.units import Verdict, later

Tensor = torch.Tensor


@dataclass(frozen=True)
class Pending:
    """A step whose verdict the host has not read: its figures on the device, and what is known of it already."""

    verdict: Verdict
    # loss, norm, found_inf, wish to stop, lr, scale, when they have come to the host
    figures: Callable[[], list[float]]
    samples: int
    seconds: float
    witness: Mapping[str, Tensor]
    home: Mapping[str, float]           # what state at home elsewhere took on its way


class Settled(NamedTuple):
    """A step whose verdict was read."""

    figures: dict[str, Any]             # what the log says of it
    stop: bool                          # does a rank want to stop?
    reason: str = ""                    # why it was skipped, or nothing
    told: str = ""                      # the same as a line for people


class Step:
    """Steps of a run, one after the other, and where it is as of the last verdict that was read."""

    def __init__(self, run: Run, batches: Callable[[int, int], Sequence[Batch]], progress: Progress) -> None:
        """`batches`: (step, number of its first sample) -> this rank's micro-batches. Goes on from `progress`."""
        self.run, self.batches, self.progress = run, batches, progress
        self.pending: Pending | None = None
        self.clock = time.perf_counter()
        run.updater.set_steps(progress.applied - progress.unseen)

    def start(self, wish: Callable[[], str] = str) -> Settled | None:
        """Starts one step, then reads the verdict of the one before. `wish`, asked when the gradients are there: why
        this rank should stop, or nothing."""
        run, (good, bad) = self.run, self.futures()
        scale = self.choose(good.loss_scale.value, bad.loss_scale.value)
        lr = torch.stack([self.choose(*both) for both in zip(*map(run.plan.rates, (good, bad)), strict=True)])
        # a loss scale means the same for any batch: gradients of a sample's mean
        turn = Turn(scale, run.plan.architecture.seq_length, lr, wish, batches=self.batches(good.step, good.samples))
        verdict = run.executor.train(run.training_at(good.samples), turn).verdict
        assert verdict is not None, "a program judges"
        watch = run.actions.watch
        figures = later(torch.cat([torch.stack([
            x.double() for x in (verdict.loss, verdict.norm, verdict.found_inf, verdict.stop, lr[0], scale)]),
            *([] if watch is None else [watch.after()])]))
        settled = self.settle()
        samples = run.plan.batch_at(good.samples)
        self.pending = Pending(verdict, figures, samples, self.lap(), turn.witness, run.home.told())
        return settled

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
        wide, device = self.run.gate.wide, self.run.device
        one, other = (torch.full((), value, dtype=wide, device=device) for value in (good, bad))
        return one if self.pending is None else torch.where(self.pending.verdict.found_inf == 0, one, other)

    def settle(self, last: bool = False) -> Settled | None:
        """Reads the pending verdict, if any, and counts it.

        `last`: no step is running behind it, so waiting for it is part of its own time, not of the next one's.
        """
        if self.pending is None:
            return None
        done, self.pending = self.pending, None
        loss, norm, found_inf, stop, lr, scale, *more = done.figures()
        skipped = found_inf != 0
        waited = self.lap() if last else 0.0
        before, self.progress = self.progress, self.progress.after(not skipped, done.samples)
        figures = {
            "step": self.progress.step, "loss": loss, "grad_norm": norm, "lr": lr, "loss_scale": scale,
            "skipped": skipped, "samples": self.progress.samples,
            "tokens": done.samples * self.run.plan.architecture.seq_length, "seconds": done.seconds + waited,
            **(self.run.actions.watch.told(more) if self.run.actions.watch else {}), **done.home}
        return Settled(figures, stop > 0, *(self._explain(done, before.loss_scale) if skipped else ()))

    def _explain(self, done: Pending, before: LossScale) -> tuple[str, str]:
        """Why a step was skipped, and a line that says so: which parameters were not finite, and on which ranks the
        gradients of the last of them were not before they were summed."""
        run, after = self.run, self.progress
        units = {p.name: u.name for u in run.plan.units for p in u.parameters}
        everyone = list(units)
        bad = torch.zeros(len(everyone), device=run.device)
        for name, norm in zip(run.gate.names, done.verdict.norms.tolist(), strict=True):
            bad[everyone.index(name)] += float(norm - norm != 0)
        culprits = run.wires["world"].all_reduce(bad, "max").wait().nonzero().flatten().tolist()
        reason, where = "the loss is not finite", ""
        if culprits:
            last = everyone[culprits[-1]]
            mine = done.witness.get(units[last], torch.zeros((), device=run.device))
            seen = (run.wires["world"].all_gather(mine.isfinite().logical_not().float().view(1)).wait()
                    .nonzero().flatten().tolist())
            reason = f"the gradient of {last} is not finite ({len(culprits)} of {len(everyone)} parameters)"
            where = (f" on rank{'s' if len(seen) > 1 else ''} {', '.join(map(str, seen[:8]))}"
                     if run.plan.world > 1 and seen else "")
        moved = (f", loss scale {before.value:g} -> {after.loss_scale.value:g}"
                 if after.loss_scale.value != before.value else "")
        return reason, f"step {after.step:,} skipped: {reason}{where}{moved}; nothing was changed"
