"""What of a run outlives it, for whatever trains: units and moments as named logical tensors, its progress, what the
index says of it, the tokenizer's files beside the checkpoints; and why a checkpoint does not fit."""

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megazero.base import UserError, printable, whole
from megazero.data import Tokenizer, same_tokenizer
from megazero.plan import (
    Architecture,
    LossScale,
    Parameter,
    Plan,
    Progress,
    curve_of,
    group_of,
    sizes,
    tensors_of,
    told_apart,
)
from megazero.settings import Config, Optimization, build, flatten
from megazero.state.checkpoint import Reader, Slice, fill, mismatches, owned
from megazero.state.saving import Writer
from megazero.units import Moment, Unit

Moments = Mapping[str, Mapping[str, Moment]]            # unit -> kind -> what is kept beside the unit's master
# keys of a configuration that a run may change without a word
SILENT = {"load", "save", "config", "check", "exit_interval", "log_interval", "log_dir", "save_interval", "ckpt_step",
          "load_optim", "save_optim", "log_params_norm", "log_num_zeros_in_grad", "log_update_ratio",
          "pretrained_checkpoint", "use_checkpoint_args", "exit_on_missing_checkpoint",
          "world_size", "offload_optimizer", "offload_gradients", "offload_weights", "offload_fraction", "offload_dir",
          "offload_buffer_size", "offload_queue_depth", "offload_block_size"}


# ---- tensors

def buffers_of(unit: Unit, moments: Moments) -> dict[str, Moment]:
    """Everything a checkpoint holds of a unit, by kind: this rank's slice of it."""
    unit.updated()
    return {"weight": Moment(unit.flat, unit.low, unit.master), **moments.get(unit.flat.name, {})}


def slices(units: Iterable[Unit], moments: Moments) -> list[Slice]:
    """What this rank writes of its units. What is at home elsewhere comes when its turn does."""
    return [_from_home(u, s) for u in units if u.owner for kind, own in buffers_of(u, moments).items()
            if not own.factor or u.sharing.shard.rank == 0 for s in owned(own.flat, own.low, {kind: own.numbers()})]


def _from_home(unit: Unit, s: Slice) -> Slice:
    name, home, t = unit.flat.name, unit.home, s.tensor
    if not home.has(name, s.kind):
        return s
    return replace(s, load=lambda: home.copy(name, s.kind, int(t.storage_offset()), t.numel()).view(t.shape))


def restore(reader: Reader, units: Iterable[Unit], moments: Moments) -> None:
    """Weights and those `moments` from a checkpoint, whatever layout wrote it. Raises UserError for damage."""
    for unit in units:
        with unit.present():
            for kind, own in buffers_of(unit, moments).items():
                numbers = own.numbers()
                fill(reader, own.flat, own.low, {kind: numbers})
                own.take(numbers)
            unit.publish()


# ---- words

def about(a: Architecture, *, config: Mapping[str, Any], optimizer: str | None, layout: Mapping[str, int],
          tokenizer: Tokenizer | None, family: str | None, data: str | None = None) -> dict[str, Any]:
    """What every index of a run says. `optimizer`: None where weights alone are kept; `family`: the model_type that the
    weights were imported from, if they were."""
    return {"config": config, "optimizer": optimizer, "architecture": asdict(a),
            "tokenizer": tokenizer.identity() if tokenizer else None, "layout": layout, "family": family,
            **({"data": data} if data else {})}


def header(progress: Progress, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the index of one checkpoint says; `facts` as `about` gives them."""
    return {"step": progress.step, "progress": asdict(progress), **facts}


def resumed(saved: Progress, now: LossScale) -> Progress:
    """Where a run goes on from the progress of a checkpoint: the loss scale where it was, by the rule of `now`."""
    then = saved.loss_scale
    if not (then.constant or now.constant):
        now = replace(now, value=max(then.value, now.minimum), good=then.good, bad=min(then.bad, now.hysteresis - 1))
    return replace(saved, loss_scale=now)


@dataclass
class Record:
    """Where a run is kept: a folder of checkpoints, and the tokenizer's files beside them."""

    writer: Writer
    facts: Mapping[str, Any]            # as `about` gives them
    tokenizer: Tokenizer | None
    last: int = -1                      # the run's newest step that is there; -1 for none

    def save(self, progress: Progress, found: Sequence[Slice]) -> Path:
        """Saves these slices as they are after the last step; the folder they go to. Raises UserError."""
        path = self.writer.save(found, header(progress, self.facts))
        if self.writer.rank == 0:
            try:
                save_tokenizer(self.writer.folder, self.tokenizer)
            except OSError as error:
                raise UserError(f"--save {self.writer.folder}: the tokenizer's files cannot be written there "
                                f"({error.strerror}); the checkpoints are complete without them.") from error
        self.last = progress.step
        return path


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Copies the tokenizer's files beside the checkpoints, so that those are enough to generate and export."""
    if (folder / "tokenizer").is_symlink():
        raise OSError(errno.ELOOP, "tokenizer is a link to elsewhere")
    for name, path in (tokenizer.files() if tokenizer else {}).items():
        target = folder / "tokenizer" / name
        if not (target.is_file() and not target.is_symlink() and target.read_bytes() == path.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as file:
                file.write(path.read_bytes())


# ---- what does not fit

def unfit(reader: Reader, a: Architecture, parameters: Sequence[Parameter], o: Optimization | None,
          tokenizer: Tokenizer | None) -> list[str]:
    """Why a checkpoint is not of this model: by the flags that tell the two apart, else by the first of the weights.
    Where it fits and the run goes on with the optimizer's state: why that or the tokenizer is another."""
    errors = _other_model(reader, a) or mismatches(reader, {("weight", p.name): p.shape for p in parameters})
    if errors or o is None:
        return errors
    wanted = {(kind, p.name): shape for p in parameters
              for kind, shape in tensors_of(p.shape, group_of(p.name, p.group, o).rule).items()}
    return (_wrong_optimizer(reader, o.optimizer, dict.fromkeys(kind for kind, _ in wanted))
            or _wrong_tokenizer(reader, tokenizer) or mismatches(reader, wanted))


def _other_model(reader: Reader, a: Architecture) -> list[str]:
    """The flags that a checkpoint was trained with and this run is not, in one sentence; it may be none."""
    other = [f"{then} (now {now})" for then, now in told_apart(reader.architecture, a)]
    return [f"--load {reader.folder}: is of another model, with {', '.join(other)}; write those flags, or "
            "--use-checkpoint-args."] if other else []


def _wrong_optimizer(reader: Reader, optimizer: str, kinds: Iterable[str]) -> list[str]:
    missing = [k for k in kinds if k not in reader.kinds]
    theirs = reader.index.get("optimizer")
    saved = f"with {theirs}" if theirs else "without an optimizer"
    return [f"--optimizer {optimizer}: {reader.folder} has no {' and no '.join(missing)} (it was saved {saved}); add "
            "--no-load-optim to go on with a fresh one, or --finetune to begin afresh."] if missing else []


def _wrong_tokenizer(reader: Reader, tokenizer: Tokenizer | None) -> list[str]:
    theirs = reader.index.get("tokenizer")
    if theirs is None or tokenizer is None or same_tokenizer(theirs, tokenizer.identity()):
        return []
    return [f"--load {reader.folder}: was trained with another tokenizer ({theirs.get('type')}, other files than "
            "now); give that one (its files are in the folder `tokenizer` beside the checkpoints), or --finetune "
            "and a new --save."]


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the configuration says otherwise than the one that was saved: nothing fails silently."""
    return [printable(f"--{k.replace('_', '-')} was {_said(saved[k])}, is {_said(v)}")
            for k, v in now.items() if k not in SILENT and k in saved and saved[k] != v]


def _said(value: Any) -> Any:
    return "not given" if value is None or value == [] else value


def jumps(saved: Mapping[str, Any], now: Plan, at: Progress) -> list[str]:
    """That the learning rate goes on from another height than a saved configuration would have had it."""
    try:
        then = build(Config, {key: value for key, value in saved.items() if key in flatten(Config())})
        old, new = curve_of(then, sizes(then, now.world)).rate_after(at), now.curve.rate_after(at)
    except (AssertionError, TypeError, ValueError, ArithmeticError):
        return []                                               # nobody ran it: an import, or made up
    return [f"the learning rate of step {at.step + 1:,} would have been {old:.3e}, is {new:.3e}"] if old != new else []
