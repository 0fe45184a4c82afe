"""Python runs this when it starts with the door on its path, in every process under `python -m megazero.deepspeed`:
accelerate, when it is imported, learns to see ranks on CPUs. Light, and it runs the file that it stands before."""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

DOOR = Path(__file__).parent


class Watch:
    """Finds `deepspeed` in the door, whatever lies beside a script; and accelerate.state as Python does, and changes
    what it holds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "deepspeed":
            return PathFinder.find_spec(name, [str(DOOR)])
        spec = PathFinder.find_spec(name, path) if name == "accelerate.state" else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                see_ranks(module)

            spec.loader.exec_module = exec_module               # type: ignore[method-assign]
        return spec


def see_ranks(state: Any) -> None:
    """Without CUDA, accelerate finds no backend for DeepSpeed's ranks: each would take itself for the only one, and
    where it is told to use the CPU it would train by DDP without a word."""
    from importlib.metadata import version

    from megazero.base import UserError
    before = getattr(state.PartialState, "_prepare_backend", None)
    if before is None:
        raise UserError(f"accelerate {version('accelerate')}: is not known here; install accelerate==1.15.0.")

    def prepare_backend(self: Any, cpu: bool = False, *given: Any, **named: Any) -> Any:
        asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        by_word = state.parse_flag_from_env("ACCELERATE_USE_CPU")
        if cpu and (asked or by_word):
            raise UserError(f"{'ACCELERATE_USE_CPU' if by_word else 'cpu=True'}: accelerate would not use the engine; "
                            "leave it out: without CUDA ranks compute on CPUs anyway.")
        backend, kind = before(self, cpu, *given, **named)
        if asked and backend is None and "LOCAL_RANK" in os.environ:
            return "gloo", state.DistributedType.MULTI_CPU
        return backend, kind

    state.PartialState._prepare_backend = prepare_backend


def _next() -> None:
    """The sitecustomize that Python would have run."""
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if Path(p) != DOOR])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if find_spec("megazero") is None:                               # started beside a checkout
    sys.path.append(str(DOOR.parents[1]))
sys.meta_path.insert(0, Watch())                                # type: ignore[arg-type]
if __name__ == "sitecustomize":                                 # not run by megazero.Trainer
    _next()
