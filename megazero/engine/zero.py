"""(interim) Contexts of DeepSpeed's `zero`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from megazero.engine.hooks import Hook


class Init:
    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@contextmanager
def GatheredParameters(params: Any, modifier_rank: int | None = None, fwd_module: Any = None,
                       enabled: bool = True) -> Iterator[None]:
    params = [params] if isinstance(params, nn.Parameter) else list(params)
    engines: dict[Any, list[nn.Parameter]] = {}
    for p in params if enabled else ():
        for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values():
            if isinstance(hook, Hook) and hook.owner:
                engines.setdefault(hook.owner, []).append(p)
    if not engines:
        yield
        return
    (engine, own), = engines.items()
    with engine.whole(*own, writer=modifier_rank):
        yield


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    pass
