"""An engine in DeepSpeed's words: what scripts written for it call."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from megazero.base import UserError, say
from megazero.engine.engine import Engine
from megazero.engine.monitor import Monitor
from megazero.engine.optimizers import ZeroOptimizer
from megazero.engine.words import Meaning

Tensor = torch.Tensor
# DeepSpeed's names that are not here yet: no attribute of the module is meant
ABSENT = ("save_checkpoint", "load_checkpoint", "save_16bit_model", "save_fp16_model", "module_state_dict",
          "load_module_state_dict", "offload_states", "reload_states", "coalesce_grad_reduction", "train_batch",
          "eval_batch", "empty_partition_cache")


class DeepSpeedEngine(nn.Module):
    """Wraps a module: `engine(...)`, `engine.backward(loss)`, `engine.step()` for each micro-batch.

    What it has not itself is asked of `core`, the Engine, and of the module.
    """

    def __init__(self, core: Engine, meaning: Meaning, optimizer: ZeroOptimizer, scheduler: Any, config: Any) -> None:
        super().__init__()
        self.module, self.core, self.meaning, self.config = core.module, core, meaning, config
        self.optimizer, self.lr_scheduler = optimizer, scheduler
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
        self.core.backward(loss, retain_graph, scale_wrt_gas, tokens)
        return loss.detach() / (self.gradient_accumulation_steps() if scale_wrt_gas else 1)

    def step(self, lr_kwargs: Any = None, partial: bool = False) -> None:
        """After the last micro-batch of a step, or of what it has had if `partial`: changes the weights, then the
        scheduler steps. Else nothing."""
        if lr_kwargs:
            raise UserError("step: lr_kwargs is given; call the scheduler yourself, and give none to initialize.")
        micro, self.micro_steps = self.core.sums.micro, self.micro_steps + 1
        self._ended = self.core.step(partial) is not None
        self._before = self.core.sums.micro
        if not self._ended:
            return
        self.global_samples += self.train_micro_batch_size_per_gpu() * micro * self.dp_world_size
        if self.lr_scheduler is not None and self.core.was_step_applied():
            # else torch's schedulers warn that no step was made
            vars(getattr(self.lr_scheduler, "optimizer", self.optimizer))["_opt_called"] = True
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
        if train_batch_size < one or train_batch_size % one:
            raise UserError(f"set_train_batch_size: {train_batch_size} is no multiple of {one}, micro-batch x ranks.")
        if sums.micro:
            raise UserError("set_train_batch_size: a step is under way; call it after step().")
        sums.micro_batches = train_batch_size // one
        sums.begin()

    # ---- what is asked

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups]

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

    def _sampler(self, dataset: Any, route: str) -> Any:
        if not isinstance(dataset, IterableDataset):
            return SequentialSampler(dataset) if route != "train" else (
                DistributedSampler(dataset, self.dp_world_size, self.global_rank))
        if self.dp_world_size > 1:
            raise UserError(f"training_data: {type(dataset).__name__} has no length, and each of {self.dp_world_size} "
                            "ranks would read all of it; give a loader of your own that reads a rank's part.")
        return None
