"""What a program finds under DeepSpeed's name, printed line by line."""

import importlib.metadata
import sys

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.zero.partition_parameters import _orig_torch_arange
from deepspeed.utils import groups, logger, set_z3_leaf_modules


def told(do: object) -> str:
    try:
        do()                                                                                     # type: ignore[operator]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def from_utils() -> None:
    from deepspeed.utils import groop  # noqa: F401


def module() -> None:
    import deepspeed.inference  # noqa: F401


class Net(torch.nn.Module):
    pass


p = torch.nn.Parameter(torch.ones(2))
print(deepspeed.__version__, importlib.metadata.version("deepspeed"), deepspeed.__file__.endswith("door/deepspeed/__init__.py"), "sitecustomize" in sys.modules)
print(deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES, deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_NAME, _orig_torch_arange is torch.arange)
print(get_accelerator().device_name(), get_accelerator().current_device_name(), get_accelerator().communication_backend_name(), get_accelerator().is_available())
print(deepspeed.comm.is_initialized(), deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), groups.get_data_parallel_world_size(), logger.name)
print(set_z3_leaf_modules(Net(), [Net]), hasattr(deepspeed, "nothing"), getattr(deepspeed.comm, "nothing", 3))
print(FusedAdam([p], lr=0.5).defaults["decoupled_weight_decay"], DeepSpeedCPUAdam([p], adamw_mode=False).defaults["decoupled_weight_decay"])
kept = deepspeed.checkpoint.utils.clone_tensors_for_torch_save({"a": [p], "b": p})
print(kept["a"][0].data_ptr() != p.data_ptr(), kept["a"][0].requires_grad or kept["b"] is not kept["a"][0])
x = torch.ones(2, requires_grad=True)
deepspeed.checkpointing.checkpoint(lambda y: y * 2, x).sum().backward()
print(x.grad.tolist(), isinstance(p, PipelineModule))
deepspeed.runtime.utils.see_memory_usage("here", force=True)
for do in (lambda: deepspeed.initialise, lambda: deepspeed.zero.Inti, from_utils, module, lambda: PipelineModule([Net()]), lambda: type("Mine", (PipelineModule,), {}),
           lambda: MoE(8), lambda: deepspeed.init_inference(Net()), lambda: deepspeed.tp_model_init(Net()), lambda: FusedAdam([p], bias_correction=False)):
    print(told(do))
