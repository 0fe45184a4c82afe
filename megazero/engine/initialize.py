"""megazero.initialize: an engine, its optimizer, a loader and a scheduler from a module and a ds_config.json."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from megazero.base import UserError, say
from megazero.comm import Wires, connect, environment, join, own_device, ranks
from megazero.engine.deepspeed_engine import DeepSpeedEngine
from megazero.engine.engine import Engine, part
from megazero.engine.optimizers import ZeroOptimizer, halves, of_client, of_config
from megazero.engine.rates import Scheduler
from megazero.engine.sliced import sliced
from megazero.engine.words import Meaning, meaning, read_config
from megazero.plan import RULES, Mesh, Zero
from megazero.settings import Optimization
from megazero.units import TORCH_DTYPE

PATIENCE = timedelta(minutes=10)        # that a rank waits for another
Parts = tuple[DeepSpeedEngine, ZeroOptimizer | None, Any, Any]


def initialize(
    args: Any = None, model: nn.Module | None = None, optimizer: Any = None, model_parameters: Any = None,
    training_data: Any = None, lr_scheduler: Any = None, distributed_port: int = 29500, mpu: Any = None,
    dist_init_required: bool | None = None, collate_fn: Any = None, config: Any = None, mesh_param: Any = None,
    config_params: Any = None,
) -> Parts:
    """(engine, optimizer, loader, scheduler) with DeepSpeed's signature; the last two may be None. Without an optimizer
    anywhere the weights are frozen, and shared as `stage` says: to be evaluated, to generate, a teacher.

    model_parameters    to be trained: a list, or groups of their own rates; default: all of the module's
    optimizer           Adam, AdamW or SGD of torch over the parameters, or what makes one of them
    lr_scheduler        what steps after each step that changed the weights, or what makes one of an optimizer
    config              a mapping, a file or base64; else args.deepspeed_config. config_params is its old name

    Raises UserError.
    """
    given = _config(args, config, config_params)
    rank, world = ranks() or environment()
    if errors := list(_mistakes(model, mpu, mesh_param, world, dist_init_required)):
        raise UserError(*errors)
    assert model is not None
    device = device_of_rank()
    means = meaning(given, world, device.type == "cuda")
    chosen = _optimizer(model, means, optimizer, model_parameters)
    scheduler = _scheduler(means, lr_scheduler, chosen)
    _join(means, device, distributed_port)
    part(model)
    core = _engine(_moved(model, device), means, chosen, _wires(means, rank, world, device))
    if rank == 0:
        for line in means.told:
            say(f"{means.where}: {line}")
    engine = DeepSpeedEngine(core, means, chosen, scheduler, read_config(given)[1])
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    return engine, chosen, engine.training_dataloader, scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """DeepSpeed's own flags, for a script that hands its arguments to `initialize`."""
    group = parser.add_argument_group("DeepSpeed", "the engine of megazero.initialize")
    group.add_argument("--deepspeed", action="store_true", help="train with the engine")
    group.add_argument("--deepspeed_config", help="its ds_config.json")
    return parser


def init_distributed(
    dist_backend: str | None = None, auto_mpi_discovery: bool = True, distributed_port: int = 29500,
    verbose: bool = True, timeout: timedelta = PATIENCE, init_method: str | None = None,
    dist_init_required: bool | None = None, config: Any = None, rank: int = -1, world_size: int = -1,
) -> None:
    """Joins the ranks that torchrun started; nothing to do for one process by itself, or a second time. Who is where
    is what torchrun says: MPI is not asked, and the rest of DeepSpeed's words has no effect."""
    if dist_init_required is not False:
        _meet(dist_backend or backend_of(device_of_rank()), timeout, distributed_port, "")


def device_of_rank() -> torch.device:
    """The CUDA device of this rank, or the CPU (DeepSpeed's DS_ACCELERATOR=cpu too). Raises UserError."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    return own_device("set DS_ACCELERATOR=cpu")


def _config(args: Any, config: Any, config_params: Any) -> Any:
    given = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    if len(given) != 1:
        raise UserError("config: is missing; give initialize(config=...), or --deepspeed_config FILE." if not given else
                        "config: is given more than once; keep one of config, config_params, --deepspeed_config.")
    return given[0]


def _mistakes(model: Any, mpu: Any, mesh_param: Any, world: int, may_join: bool | None) -> Iterator[str]:
    if may_join is False and not ranks() and world > 1:
        yield f"dist_init_required: is False, but the {world} ranks have not joined; leave it out."
    if not isinstance(model, nn.Module):
        yield f"model: is a {type(model).__name__}; give a torch.nn.Module."
    elif foreign := next((m for m in model.modules() if type(m).__module__.startswith("deepspeed.")
                          or type(m).__name__ == "PipelineModule"), None):
        yield f"model: has a {type(foreign).__name__} of DeepSpeed, which is not here yet; give plain modules."
    if mpu is not None:
        yield "mpu: is given, but all ranks are data-parallel ranks; leave it out."
    if mesh_param is not None and tuple(mesh_param) != (world, 1):
        yield f"mesh_param: is {tuple(mesh_param)}, but all ranks are data-parallel ranks; leave it out."


def _optimizer(model: nn.Module, means: Meaning, given: Any, parameters: Any) -> ZeroOptimizer | None:
    trained = list(model.parameters() if parameters is None else parameters)
    if given is None and means.optimizer is None:
        if parameters is not None:
            raise UserError(f"optimizer: is missing; write {means.where} optimizer, or give one.")
        return None
    if given is not None and means.optimizer is not None:
        raise UserError(f"optimizer: is given, and {means.where} has one too; keep one.")
    if means.optimizer is None:
        return of_client(given, trained)
    rule, options = means.optimizer
    return of_config(rule, options, trained if rule != "muon" else halves(model, trained, options))


def _scheduler(means: Meaning, given: Any, optimizer: ZeroOptimizer | None) -> Any:
    if optimizer is None:
        if given is not None:
            raise UserError("lr_scheduler: is given, and there is no optimizer whose rates it moves; leave it out.")
        return None
    if given is not None and means.schedule is not None:
        raise UserError(f"lr_scheduler: is given, and {means.where} has a scheduler too; keep one.")
    if means.schedule is not None:
        return Scheduler(*means.schedule, optimizer)
    return given(optimizer) if callable(given) else given


def _join(means: Meaning, device: torch.device, port: int) -> None:
    """All ranks, who must have the same configuration, wherever it lies."""
    _meet(backend_of(device), PATIENCE, port, repr(replace(means, where="")))


def _meet(backend: str, timeout: timedelta, port: int, words: str) -> None:
    if "MASTER_ADDR" in os.environ:                             # else it is one process by itself
        os.environ.setdefault("MASTER_PORT", str(port))
        join(backend, timeout.total_seconds(), words)


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    """On this rank's device, where slices of zero.Init are already."""
    if not sliced(model.parameters()):
        return model.to(device)
    for t in (*(p for p in model.parameters() if not sliced([p])), *model.buffers()):
        t.data = t.data.to(device)
    return model


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _wires(means: Meaning, rank: int, world: int, device: torch.device) -> Wires:
    matrices = means.optimizer is not None and RULES[means.optimizer[0]].scope == "matrix"
    mesh = Mesh.of(dp=world, shard=means.shard if means.level else 1, stage=matrices)
    return connect(mesh, rank, backend_of(device), PATIENCE.total_seconds())


def _engine(model: nn.Module, means: Meaning, optimizer: ZeroOptimizer | None, wires: Wires) -> Engine:
    rule = optimizer.rule if optimizer else "sgd"
    settings = Optimization(rule, lr=0.0, clip_grad=means.clip, muon_nesterov=True, muon_coefficient_type="simple",
                            muon_scale_mode="shape_scaling")                   # the rest is the groups'
    zero = Zero(means.level, prefetch=means.overlap, lag=int(means.overlap and means.level >= 2),
                replicas=int(means.overlap))
    return Engine(model, wires, settings, zero, means.dtype or _dtype(model, means.where), means.accumulation,
                  means.scale, groups=optimizer.param_groups if optimizer else (), trains=optimizer is not None)


def _dtype(model: nn.Module, where: str) -> str:
    """That of the module's parameters, where neither fp16 nor bf16 is asked for."""
    found = {p.dtype for p in model.parameters()}
    one = next((name for name in ("fp32", "fp64") if found == {TORCH_DTYPE[name]}), None)
    if one is None:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise UserError(f"{where} bf16.enabled: is false, and so is fp16.enabled, but parameters of the model are "
                        f"{kinds}; set one of the two, or call model.float().")
    return one
