"""What a program finds under DeepSpeed's name: a table of its modules, and what makes them of it.

A name that is not there is one sentence, whether it is read, imported from a module or imported as one.
"""

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megazero.base import UserError, gib, say
from megazero.comm import environment, ranks
from megazero.engine.deepspeed_engine import DeepSpeedEngine
from megazero.engine.full import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from megazero.engine.initialize import add_config_arguments, device_of_rank, init_distributed, initialize
from megazero.engine.optimizers import DeepSpeedCPUAdam, DeepSpeedCPULion, FusedAdam, FusedLamb, FusedLion
from megazero.engine.rates import SCHEDULES
from megazero.engine.zero import GatheredParameters, Init, register_external_parameter
from megazero.settings import nearest

Names = Mapping[str, Any]
VERSION = "0.19.8"
LOGGER = logging.getLogger("DeepSpeed")


# ---- what stands behind a name

class Accelerator:
    """The device of this rank, as `get_accelerator()` speaks of it."""

    def device_name(self, index: int | None = None) -> str:
        kind = device_of_rank().type
        return kind if index is None or kind == "cpu" else f"{kind}:{index}"

    def current_device_name(self) -> str:
        return str(device_of_rank())

    def current_device(self) -> int:
        return device_of_rank().index or 0

    def device_count(self) -> int:
        return torch.cuda.device_count() if device_of_rank().type == "cuda" else 1

    def device(self, index: int | None = None) -> torch.device:
        return torch.device(self.device_name(index))

    def set_device(self, index: int) -> None:
        """A rank has the device that LOCAL_RANK says."""

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return True

    is_fp16_supported = is_bf16_supported

    def communication_backend_name(self) -> str:
        return "nccl" if device_of_rank().type == "cuda" else "gloo"

    def memory_allocated(self, index: int | None = None) -> int:
        return torch.cuda.memory_allocated(index)

    def max_memory_allocated(self, index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(index)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self, index: int | None = None) -> None:
        if device_of_rank().type == "cuda":
            torch.cuda.synchronize(index)

    def manual_seed_all(self, seed: int) -> None:
        torch.cuda.manual_seed_all(seed)


def get_accelerator() -> Accelerator:
    return Accelerator()


def get_rank(group: Any = None) -> int:
    return torch.distributed.get_rank(group) if ranks() else environment()[0]


def get_world_size(group: Any = None) -> int:
    return torch.distributed.get_world_size(group) if ranks() else environment()[1]


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0)


def log_dist(message: str, ranks: Any = None, level: int = logging.INFO) -> None:
    """On these ranks, or all."""
    if not ranks or -1 in ranks or get_rank() in ranks:
        LOGGER.log(level, message)


def see_memory_usage(message: str, force: bool = False) -> None:
    """What this rank has at most had, if `force`."""
    if force and get_rank() == 0:
        status = Path("/proc/self/status")
        there = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")] \
            if status.exists() else []
        cuda = [f"CUDA {gib(torch.cuda.max_memory_allocated())}"] if torch.cuda.is_available() else []
        say(f"{message}: at most {', '.join([gib(n * 1024) + ' of memory' for n in there] + cuda)}")


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu", made: dict[Any, Any] | None = None) -> Any:
    """Its tensors with storage of their own; what is tied stays so."""
    made = {} if made is None else made
    if isinstance(item, torch.Tensor):
        place = (item.data_ptr(), item.shape, item.stride(), item.dtype)
        if place not in made:
            made[place] = item.detach().clone().to(device)
        return made[place]
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(v, device, made) for v in item)
    if isinstance(item, dict):
        return type(item)({k: clone_tensors_for_torch_save(v, device, made) for k, v in item.items()})
    return item


def checkpointed(function: Any, *given: Any) -> Any:
    return checkpoint(function, *given, use_reentrant=True)


def checkpointed_once(function: Any, *given: Any) -> Any:
    return checkpoint(function, *given, use_reentrant=False)


def _nothing(*given: Any, **named: Any) -> None:
    """Blocks travel whole: there is nothing to set."""


def _none_of_them(*given: Any, **named: Any) -> list[Any]:
    return []


def refused(name: str, instead: str) -> type:
    """What stands for a name that is not here, so that it can be imported: whoever uses it is told."""
    def tell(cls: type, *given: Any, **named: Any) -> Any:
        raise UserError(f"{name}: is not here; {instead}.")

    return type(name.split(".")[-1], (), {"__new__": tell, "__init_subclass__": classmethod(tell)})


# ---- the table

def _of(module: Any, names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names.split() if hasattr(module, name)}


PIPELINE = "give initialize the whole module: its blocks are shared by level 3; pipelines are those of pretrain_gpt.py"
PIPELINES = {name: refused(name, PIPELINE) for name in ("PipelineModule", "LayerSpec", "TiedLayerSpec")}
EXPERTS = "write experts as plain modules, as those of transformers' Mixtral, which are trained like any other"
ZERO = {"Init": Init, "GatheredParameters": GatheredParameters,
        "register_external_parameter": register_external_parameter,
        "MiCS_Init": refused("MiCS_Init", "write zero_optimization.mics_shard_size"),
        "TiledLinear": refused("TiledLinear", "write nn.Linear")}
LEAVES = {"set_z3_leaf_modules": _none_of_them, "unset_z3_leaf_modules": _none_of_them,
          "get_z3_leaf_modules": _none_of_them}
FULL = {one.__name__: one for one in (
    safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state, safe_set_full_fp32_param,
    safe_set_full_grad, safe_set_full_optimizer_state)}
LOGS = {"logger": LOGGER, "log_dist": log_dist}
RECOMPUTE = {"checkpoint": checkpointed, "non_reentrant_checkpoint": checkpointed_once, "configure": _nothing,
             "is_configured": lambda: True, "reset": _nothing}
ADAMS = {"FusedAdam": FusedAdam, "DeepSpeedCPUAdam": DeepSpeedCPUAdam}
LATER = "write AdamW, Adam, SGD, Lamb or Lion"
WORLD = {"get_rank": get_rank, "get_world_size": get_world_size, "get_local_rank": get_local_rank,
         "is_initialized": lambda: ranks() is not None, "init_distributed": init_distributed,
         **_of(torch.distributed, "ReduceOp ProcessGroup new_group barrier monitored_barrier all_reduce all_gather "
                                  "all_gather_object all_gather_into_tensor reduce_scatter_tensor broadcast "
                                  "broadcast_object_list reduce gather scatter send recv isend irecv all_to_all "
                                  "all_to_all_single is_available destroy_process_group get_backend get_global_rank")}
MODULES: Mapping[str, Names] = {
    "deepspeed": {
        "__version__": VERSION, "version": VERSION, "initialize": initialize, "init_distributed": init_distributed,
        "add_config_arguments": add_config_arguments, "DeepSpeedEngine": DeepSpeedEngine,
        "get_accelerator": get_accelerator, "PipelineModule": PIPELINES["PipelineModule"],
        "init_inference": refused("init_inference", "call the module under torch.no_grad(), or give initialize a "
                                  "config with stage 3 and no optimizer"),
        "tp_model_init": refused("tp_model_init", "all ranks are data-parallel ranks; leave tensor_parallel out"),
        "OnDevice": refused("OnDevice", "write torch.device, or zero.Init")},
    "deepspeed.comm": WORLD, "deepspeed.comm.comm": WORLD,
    "deepspeed.zero": ZERO, "deepspeed.runtime.zero": ZERO,
    "deepspeed.runtime": {},
    "deepspeed.runtime.zero.partition_parameters": {
        **ZERO, "zero_wrapper_for_fp_tensor_constructor": lambda make, *_, **__: make,
        "_orig_torch_arange": torch.arange, "get_accelerator": get_accelerator},
    "deepspeed.runtime.engine": {"DeepSpeedEngine": DeepSpeedEngine},
    "deepspeed.runtime.lr_schedules": {"VALID_LR_SCHEDULES": list(SCHEDULES)},
    "deepspeed.runtime.utils": {"see_memory_usage": see_memory_usage},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": RECOMPUTE, "deepspeed.checkpointing": RECOMPUTE,
    "deepspeed.utils": {**LOGS, **LEAVES, **FULL, "is_initialized": WORLD["is_initialized"],
                        "z3_leaf_module": lambda module: False},
    "deepspeed.utils.logging": LOGS, "deepspeed.utils.tensor_fragment": FULL,
    "deepspeed.utils.z3_leaf_module": LEAVES,
    "deepspeed.utils.groups": {"get_data_parallel_rank": get_rank, "get_data_parallel_world_size": get_world_size,
                               "get_data_parallel_group": lambda: torch.distributed.group.WORLD,
                               "_get_data_parallel_group": lambda: torch.distributed.group.WORLD},
    "deepspeed.accelerator": {"get_accelerator": get_accelerator},
    "deepspeed.checkpoint": {}, "deepspeed.checkpoint.utils": {
        "clone_tensors_for_torch_save": clone_tensors_for_torch_save},
    "deepspeed.ops": {}, "deepspeed.ops.adam": ADAMS,
    "deepspeed.ops.lamb": {"FusedLamb": FusedLamb},
    "deepspeed.ops.lion": {"FusedLion": FusedLion, "DeepSpeedCPULion": DeepSpeedCPULion},
    "deepspeed.ops.adagrad": {"DeepSpeedCPUAdagrad": refused("DeepSpeedCPUAdagrad", LATER)},
    "deepspeed.pipe": PIPELINES, "deepspeed.runtime.pipe": PIPELINES,
    "deepspeed.moe": {}, "deepspeed.moe.layer": {"MoE": refused("MoE", EXPERTS)},
    "deepspeed.launcher": {}, "deepspeed.launcher.runner": {
        "DEEPSPEED_ENVIRONMENT_NAME": os.environ.get("DS_ENV_FILE", ".deepspeed_env")},
}


# ---- modules made of it

class Finder:
    """Makes the modules of the table. Any other below `deepspeed` is one sentence."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("deepspeed."):
            return None
        if name not in MODULES:
            raise ImportError(absent(*name.rsplit(".", 1)), name=name)
        return ModuleSpec(name, self, is_package=True)          # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        furnish(module.__name__)


def furnish(name: str) -> None:
    """Gives a module of the table its names, and `deepspeed` its modules."""
    def missing(asked: str) -> Any:
        raise AttributeError(asked if asked.startswith("__") else absent(name, asked))

    vars(sys.modules[name]).update(MODULES[name], __getattr__=missing)
    if name == "deepspeed":
        sys.meta_path.insert(0, Finder())                       # type: ignore[arg-type]
        for below in MODULES:
            importlib.import_module(below)


def absent(module: str, name: str) -> str:
    """In words."""
    below = [m.rsplit(".", 1)[1] for m in MODULES if m.startswith(f"{module}.")]
    return (f"{module}.{name}: is not here{nearest(name, [*MODULES.get(module, ()), *below])}; this is MegaZero's "
            f"engine under the name of DeepSpeed {VERSION}: leave it out.")
