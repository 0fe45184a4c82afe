"""An engine in DeepSpeed's words: what scripts written for it call."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from megazero.base import UserError, printable, say
from megazero.engine.checkpoints import (
    LOAD,
    SAVE,
    buffers,
    load_state,
    parameters,
    save_state,
    save_weights,
    whole_weights,
)
from megazero.engine.engine import Engine
from megazero.engine.monitor import Monitor
from megazero.engine.optimizers import ZeroOptimizer
from megazero.engine.words import Meaning

Tensor = torch.Tensor
EMPTY: Mapping[str, Any] = {}
# DeepSpeed's names that are not here yet: no attribute of the module is meant
ABSENT = ("coalesce_grad_reduction", "train_batch", "eval_batch", "empty_partition_cache")


class DeepSpeedEngine(nn.Module):
    """Wraps a module: `engine(...)`, `engine.backward(loss)`, `engine.step()` for each micro-batch.

    What it has not itself is asked of `core`, the Engine, and of the module.
    """

    def __init__(self, core: Engine, meaning: Meaning, optimizer: ZeroOptimizer | None, scheduler: Any,
                 config: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.core, self.meaning, self.config = core.module, core, meaning, config
        self.optimizer, self.lr_scheduler = optimizer, scheduler
        if optimizer is not None:
            optimizer.core = core
        self.training_dataloader: DataLoader[Any] | None = None
        wires = core.wires
        self.device, self.global_rank, self.world_size = wires.device, wires.rank, wires.mesh.world
        self.dp_world_size = wires.mesh.dp
        self.monitor = Monitor(meaning.board, meaning.tables) if wires.rank == 0 else None
        self.global_samples = self.micro_steps = 0
        self._ended = False                                     # the last step() ended one
        self._before = 0                                        # micro-batches of the step before the one of now

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ABSENT:
                raise AttributeError(f"engine.{name}: is not here yet; leave it out.") from None
            return getattr(self.__dict__["core"], name)

    # ---- a step

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self._before = self.core.sums.micro
        return self.core(*inputs, **named)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True,
                 tokens: int | Tensor | None = None) -> Tensor:
        """Adds the gradients of a micro-batch's mean loss, as Engine.backward. Returns the loss, divided by the
        micro-batches of a step if it was not (`scale_wrt_gas` false)."""
        if self.optimizer is None:
            raise UserError(f"backward: this engine has no optimizer; write {self.meaning.where} optimizer, or give "
                            "initialize one.")
        self.core.backward(loss, retain_graph, scale_wrt_gas, tokens)
        return loss.detach() / (self.gradient_accumulation_steps() if scale_wrt_gas else 1)

    def step(self, lr_kwargs: Any = None, partial: bool = False) -> None:
        """After the last micro-batch of a step, or of what it has had if `partial`: changes the weights, then the
        scheduler steps. Else nothing."""
        if lr_kwargs:
            raise UserError("step: lr_kwargs is given; call the scheduler yourself, and give none to initialize.")
        micro, self.micro_steps = self.core.sums.micro, self.micro_steps + 1
        if self.core.sums.over and self.core.boundary is not None:      # as in DeepSpeed, and in accelerate's own loop
            self.core.count_as(self.gradient_accumulation_steps())
        self._ended = self.core.step(partial) is not None
        self._before = self.core.sums.micro
        if not self._ended:
            return
        self.global_samples += self.train_micro_batch_size_per_gpu() * micro * self.dp_world_size
        for stepped in (self.optimizer, self.optimizer and self.optimizer.client,
                        getattr(self.lr_scheduler, "optimizer", None)):
            if stepped is not None:                             # else torch's schedulers warn that no step was made
                vars(stepped)["_opt_called"] = True
        if self.lr_scheduler is not None and self.core.was_step_applied():
            self.lr_scheduler.step()
        if self.monitor is not None:
            self._tell(self.monitor)

    def _tell(self, monitor: Monitor) -> None:
        every, steps = self.meaning.print_every, self.core.global_steps
        assert self.core.verdict is not None, "a step was made"
        if self.meaning.board or self.meaning.tables:
            scale = {"loss_scale": self.core.scale.value} if self.fp16_enabled() else {}
            monitor.add(self.global_samples, {"train_loss": self.core.verdict.loss.item(), "lr": self.get_lr()[0],
                                              **scale})
        if every and steps % every == 0:
            rates = " ".join(f"{lr:.3g}" for lr in self.get_lr())
            say(f"step {steps:,}: loss {self.core.verdict.loss.item():.4f}, norm {self.core.verdict.norm.item():.3f}, "
                f"lr {rates}, skipped {self.core.skipped_steps}")

    def was_step_applied(self) -> bool:
        """Did the last step() change the weights?"""
        return self._ended and self.core.was_step_applied()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.core.zero_grad(set_to_none)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Is the micro-batch of now, from its forward pass to step(), the last of its step?"""
        if self.core.sums.over or self.core.boundary is not None:
            return self.core.is_gradient_accumulation_boundary()
        return self._before + 1 >= self.gradient_accumulation_steps()

    # ---- checkpoints: all ranks together

    def save_checkpoint(self, save_dir: str | Path, tag: str | None = None, client_state: Mapping[str, Any] = EMPTY,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Saves to save_dir/tag (default: global_step<N>), see checkpoints.py; True. Raises UserError."""
        if not isinstance(client_state or {}, Mapping):
            raise UserError(f"{SAVE}: client_state is a {type(client_state).__name__}; give a mapping.")
        kind = self._kind_of_scheduler()
        kept = {"type": kind, "state": self.lr_scheduler.state_dict()} if kind else None
        training = {"scheduler": kept, "samples": self.global_samples, "micro": self.micro_steps,
                    "settings": self._settings()}
        save_state(self.core, self.optimizer, _folder(SAVE, save_dir), tag, training, client_state or {},
             not exclude_frozen_parameters, save_latest)
        return True

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None
                        ) -> tuple[str | None, dict[str, Any]]:
        """Loads what any number of ranks saved at any level, by default the tag saved last: (its folder, client_state),
        or (None, {}) if there is none. Raises UserError; then nothing has changed."""
        found = load_state(self.core, self.optimizer, _folder(LOAD, load_dir), None if tag is None else str(tag),
                           load_module_strict, load_optimizer_states, load_module_only, custom_load_fn)
        if found is None:
            self._say(f"{LOAD} {load_dir}: holds no checkpoint; going on as it is")
            return None, {}
        path, training, client = found
        if training:
            self.global_samples, self.micro_steps = training["samples"], training["micro"]
            then, now = training.get("settings", {}), self._settings()
            if changed := [f"{key} was {printable(str(then[key]), 60)} and is {now[key]}" for key in now
                           if key in then and then[key] != now[key]]:
                self._say(f"{LOAD}: {'; '.join(changed)}")
            if load_lr_scheduler_states:
                self._go_on_with(training["scheduler"], path, load_optimizer_states)
        self._say(f"loaded {path}")
        return str(path), client

    def _settings(self) -> dict[str, Any]:
        """What a run may go on with otherwise, and is told."""
        return {"train_batch_size": self.train_batch_size(), "gradient_clipping": self.meaning.clip,
                "dtype": self.meaning.dtype or "that of the module"}

    def _kind_of_scheduler(self) -> str:
        """Nothing without one, or for one that keeps nothing."""
        keeps = hasattr(self.lr_scheduler, "state_dict")
        return str(getattr(self.lr_scheduler, "kind", type(self.lr_scheduler).__name__)) if keeps else ""

    def _go_on_with(self, saved: Mapping[str, Any] | None, path: Path, rates_too: bool) -> None:
        """The scheduler goes on; of another type than was saved it stays where it is, and that is said. Rates that were
        loaded stay until its next step."""
        kind, then = self._kind_of_scheduler(), saved["type"] if saved else ""
        groups = self.optimizer.param_groups if self.optimizer and rates_too else []
        rates = [group["lr"] for group in groups]
        if kind != then:
            self._say(f"{LOAD}: the scheduler was {printable(then) or 'none'}, is {kind or 'none'}, and begins anew")
        elif kind and saved:
            try:
                self.lr_scheduler.load_state_dict(saved["state"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{LOAD} {path}: holds no state of a {kind} ({error!r}), and the engine holds a part "
                                "of it; load another before it trains on.") from error
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors",
                         exclude_frozen_parameters: bool = False) -> bool:
        """Weights of the dtype that the module computes in, as from_pretrained reads them; True. Raises UserError."""
        name = save_filename
        if not name.endswith(".safetensors"):
            name = "model.safetensors"
            self._say(f"save_16bit_model: {save_filename} would be pickled; {name} is written instead")
        save_weights(self.core, Path(save_dir), name, not exclude_frozen_parameters)
        return True

    save_fp16_model = save_16bit_model

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """May weights be gathered to be saved? Always: block by block it takes no memory to speak of."""
        return True

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The module's whole state_dict on the host of rank 0, block by block; None on the others."""
        first, names = self.global_rank == 0, {p: n for n, p in parameters(self.core).items()}
        found = {name: t.cpu().clone() for name, t in whole_weights(self.core, not exclude_frozen_parameters) if first}
        again = {name: found[names[p]] for name, p in self.module.named_parameters(remove_duplicate=False)
                 if names[p] in found}                          # tied ones have several
        return {**again, **{n: b.cpu() for n, b in buffers(self.module).items()}} if first else None

    def module_state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False,
                          exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The module's own, whole, on every rank."""
        found = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        still = {prefix + n for n, p in self.module.named_parameters(remove_duplicate=False)
                 if not p.requires_grad}
        return {n: t for n, t in found.items() if not (exclude_frozen_parameters and n in still)}

    def load_module_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, custom_load_fn: Any = None,
                               fetch_z3_params: bool = False) -> None:
        """Every rank gives all of it."""
        if custom_load_fn is not None:
            with self.core.whole():
                custom_load_fn(src=state_dict, dst=self.module)
            return
        self.module.load_state_dict(state_dict, strict=strict)

    def offload_states(self, *_: Any, device: Any = "cpu", **__: Any) -> None:
        """State lies on the host already where the ranks are CPUs. Raises UserError elsewhere."""
        if self.device.type != "cpu" or str(getattr(device, "value", device)) != "cpu":
            raise UserError(f"offload_states: from {self.device} to {device} is not here yet; leave it out.")

    def reload_states(self, non_blocking: bool = False) -> None:
        """What `offload_states` moved comes back."""

    def _say(self, words: str) -> None:
        if self.global_rank == 0:
            say(words)

    # ---- sizes

    def train_batch_size(self) -> int:
        return self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps() * self.dp_world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.meaning.micro_batch

    def get_batch_info(self) -> tuple[int, int, int]:
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """By other accumulation, between two steps. Raises UserError."""
        one, sums = self.train_micro_batch_size_per_gpu() * self.dp_world_size, self.core.sums
        if not isinstance(train_batch_size, int) or train_batch_size < one or train_batch_size % one:
            raise UserError(f"set_train_batch_size: {train_batch_size} is no multiple of {one}, micro-batch x ranks.")
        if sums.micro:
            raise UserError("set_train_batch_size: a step is under way; call it after step().")
        sums.micro_batches = train_batch_size // one
        sums.begin()

    # ---- what is asked

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups()]

    def get_mom(self) -> list[Any]:
        return [group.get("betas", group.get("momentum")) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.optimizer else []

    def zero_optimization_stage(self) -> int:
        return self.meaning.level

    def zero_optimization(self) -> bool:
        return self.meaning.level > 0

    def gradient_clipping(self) -> float:
        return self.meaning.clip

    def fp16_enabled(self) -> bool:
        return self.meaning.dtype == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.meaning.dtype == "bf16"

    # ---- the module

    def compile(self, *given: Any, compile_kwargs: Any = None, **named: Any) -> None:  # type: ignore[override]
        """torch.compile of the module, which breaks at blocks."""
        self.module.compile(*given, **{**(compile_kwargs or {}), **named})

    # ---- data

    def deepspeed_io(self, dataset: Any, batch_size: int | None = None, route: str = "train", pin_memory: bool = True,
                     data_sampler: Any = None, collate_fn: Any = None, num_local_io_workers: int | None = None
                     ) -> DataLoader[Any]:
        """A loader of micro-batches. To train, ranks share the samples, shuffled (`loader.sampler.set_epoch` shuffles
        anew); by another `route` each reads all of them in order."""
        return DataLoader(dataset, batch_size or self.train_micro_batch_size_per_gpu(),
                          sampler=data_sampler or self._sampler(dataset, route), collate_fn=collate_fn,
                          num_workers=num_local_io_workers or 0, drop_last=self.meaning.drop_last,
                          pin_memory=pin_memory and self.device.type == "cuda")

    def together(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's micro-batches as long as every rank has one: ranks with unlike numbers of them end an epoch
        together. All ranks iterate."""
        for batch in loader:
            if not self.core.all_have(True):
                return
            yield batch
        self.core.all_have(False)

    def _sampler(self, dataset: Any, route: str) -> Any:
        if not isinstance(dataset, IterableDataset):
            return SequentialSampler(dataset) if route != "train" else (
                DistributedSampler(dataset, self.dp_world_size, self.global_rank))
        if self.dp_world_size > 1:
            raise UserError(f"training_data: {type(dataset).__name__} has no length, and each of {self.dp_world_size} "
                            "ranks would read all of it; give a loader of your own that reads a rank's part.")
        return None


def _folder(what: str, given: Any) -> Path:
    if not isinstance(given, str | Path):
        raise UserError(f"{what}: the folder is a {type(given).__name__}; give its path.")
    return Path(given)
