"""DeepSpeed's `zero`: modules that no rank ever holds whole, and who reads weights that are not here.

    with megazero.zero.Init(config_dict_or_path="ds_config.json"):
        model = Model(...)                                      # after each part of it ranks keep their slices
    engine, *_ = megazero.initialize(model=model, config="ds_config.json")

What is drawn or written within `Init` is what a plain module would have on rank 0: ranks run the same code, parts are
whole while they are made and whenever they are touched again, and rank 0's numbers count.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megazero.base import UserError, give_back, printable, say
from megazero.comm import Wires, connect, environment, ranks
from megazero.engine.hidden import Hidden
from megazero.engine.hooks import owner_of
from megazero.engine.initialize import PATIENCE, backend_of, device_of_rank, init_distributed
from megazero.engine.sliced import Sliced, sliced
from megazero.engine.words import read_config
from megazero.hf import HfFolder
from megazero.plan import Mesh
from megazero.units import viewed

Tensor = torch.Tensor
PATCHED: tuple[tuple[Any, str], ...] = (
    (nn.Module, "register_parameter"), (nn.Parameter, "__deepcopy__"), (nn.Parameter, "__new__"))
FREED = 2**20            # numbers that may be kept without need
# of DeepSpeed's signature: what has no meaning where slices have one home and travel in full precision
WITHOUT = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_param_parallel_group",
           "sequence_data_parallel_group", "param_swapper", "data_parallel_group", "mpu")


class Init:
    """Within, each rank keeps a slice of every parameter that is made. At levels 0 to 2 of the configuration, where
    ranks hold whole weights anyway, nothing happens; without a configuration it is level 3.

    module          one that is there already: its parameters are sliced now
    dtype           of the parameters; default: as the module makes them
    Raises UserError for what else of DeepSpeed's words would have an effect there and has none here.
    """

    def __init__(self, module: nn.Module | None = None, data_parallel_group: Any = None,
                 mem_efficient_linear: bool = True, remote_device: str | None = None, pin_memory: bool = False,
                 config_dict_or_path: Any = None, config: Any = None, enabled: bool = True,
                 dtype: torch.dtype | None = None, mpu: Any = None, **more: Any) -> None:
        given = {"data_parallel_group": data_parallel_group, "mpu": mpu, **more}
        if wrong := next((key for key, value in given.items() if value or key not in WITHOUT), None):
            raise UserError(f"zero.Init: {wrong}={printable(str(given[wrong]), 60)} is not here; leave it out.")
        if remote_device not in (None, "none", "cpu") or remote_device == "cpu" and device_of_rank().type != "cpu":
            raise UserError(f"zero.Init: remote_device={remote_device} is not here yet; leave it out.")
        self.level = _level(config_dict_or_path if config is None else config)
        self.on, self.dtype, self.device = enabled and self.level == 3, dtype, device_of_rank()
        self.opened: list[Sliced] = []
        self.module: nn.Module | None = None                    # whose parameters are whole now
        self.within, self.freed = False, 0                      # freed: numbers, whose room is perhaps not
        if self.on:
            init_distributed()
            self.wires: Wires = _all_ranks()
            for part in module.modules() if module is not None else ():
                for name, p in part.named_parameters(recurse=False):
                    self._adopt(part, f"{type(part).__name__}.{name}", p)
            self._close()
        elif enabled and environment()[0] == 0:
            say(f"zero.Init: at level {self.level} every rank holds the whole weights; nothing is sliced")

    def __enter__(self) -> "Init":
        if self.within:
            raise UserError("zero.Init: this one is entered already; make another for what is within.")
        if self.on:
            self.before = [(kind, name, vars(kind)[name]) for kind, name in PATCHED]
            register, copy, new = (getattr(kind, name) for kind, name in PATCHED)
            adopt = self._adopt

            def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
                register(module, name, param)
                if param is not None:
                    adopt(module, f"{type(module).__name__}.{name}", param)

            def deepcopy(p: nn.Parameter, memo: dict[int, Any]) -> Any:     # is not registered
                made = copy(p, memo)
                for home in sliced([p]):
                    adopt(home.module, home.name, made)
                return made

            def parameter(cls: type, data: Any = None, *given: Any, **named: Any) -> Any:       # of another's data
                if isinstance(data, Hidden):
                    data.fetch([data])
                return new(cls, data, *given, **named)

            ours = register_parameter, deepcopy, staticmethod(parameter)
            for (kind, name), function in zip(PATCHED, ours, strict=True):
                setattr(kind, name, function)
            self.within = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.on:
            for patched in self.before:
                setattr(*patched)
            self.within = False
            if error is None:
                self._close()

    def _adopt(self, module: nn.Module, name: str, p: nn.Parameter) -> None:
        """A parameter was made. It stays whole as long as those of its module do."""
        if sliced([p]) or not p.is_floating_point() or p.is_meta:
            return
        if self.dtype is not None:
            p.data = p.data.to(self.dtype)
        self._turn(Sliced(p, module, name, self.wires["world"], self.device, self._fetch))

    def _fetch(self, home: Sliced, wanted: Sequence[nn.Parameter]) -> bool:
        """Somebody touches a parameter again, together with others: within, all ranks do."""
        if self.within:
            self._turn(home, wanted)
            home.open()
        return self.within

    def _turn(self, home: Sliced, wanted: Sequence[nn.Parameter] = ()) -> None:
        """Parameters of one module are whole at a time, and those that somebody wants or has views of."""
        if home.module is not self.module:
            self._close(lambda other: viewed(other.p) or any(other.p is p for p in wanted))
            self.module = home.module
        self.opened.append(home)

    def _close(self, spared: Callable[[Sliced], bool] = lambda _: False) -> None:
        stay = []
        for home in dict.fromkeys(self.opened):
            if home.slice is None and spared(home):
                stay.append(home)
            elif home.slice is None:
                home.close(0)
                self.freed += home.shape.numel()
        self.opened, self.module = stay, None
        if self.freed > FREED or not self.within:
            give_back()
            self.freed = 0


def _level(config: Any) -> int:
    if config is None:
        return 3
    zero = read_config(config)[1].get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 0


def _all_ranks() -> Wires:
    rank, world = ranks() or environment()
    return connect(Mesh.of(dp=world), rank, backend_of(device_of_rank()), PATIENCE.total_seconds())


@contextmanager
def GatheredParameters(params: Any, modifier_rank: int | None = None, fwd_module: Any = None,
                       enabled: bool = True) -> Iterator[None]:
    """Within, these parameters are whole on all ranks, before and after `initialize`. What rank `modifier_rank` wrote
    counts; without it, what all ranks wrote, the same. Others than an engine's or Init's are whole anyway. `fwd_module`
    needs no word: the engine finds weights that are read beside their module. Raises UserError for a rank that is none.
    """
    world = (ranks() or environment())[1]
    if modifier_rank is not None and modifier_rank not in range(world):
        raise UserError(f"GatheredParameters: modifier_rank {modifier_rank} is no rank; they are counted from 0 to "
                        f"{world - 1}.")
    found: list[Tensor] = [params] if isinstance(params, Tensor) else _listed(params)
    homes = list(dict.fromkeys(sliced(found))) if enabled else []
    with ExitStack() as stack:
        for engine, own in _engines(found if enabled else ()).items():
            stack.enter_context(engine.whole(*own, writer=modifier_rank))
        opened = [home for home in homes if home.slice is not None]
        for home in opened:
            home.open()
        try:
            yield
        finally:
            for home in homes:
                if home in opened:
                    home.close(modifier_rank)
                elif modifier_rank is not None:
                    home.take(modifier_rank)                    # it was whole before, and stays so


def _listed(params: Any) -> list[Tensor]:
    given = params.parameters() if isinstance(params, nn.Module) else params.values() if isinstance(
        params, dict) else params
    return list(given)


def _engines(parameters: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    """Whose they are, by engine."""
    found: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if (engine := owner_of(p)) is not None:
            found.setdefault(engine, []).append(p)
    return found


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """DeepSpeed must be told that a module reads another's parameter; the engine finds it. Raises UserError for what is
    no parameter."""
    if not isinstance(parameter, nn.Parameter):
        raise UserError(f"register_external_parameter: is a {type(parameter).__name__}; give a parameter.")


unregister_external_parameter = register_external_parameter


# ---- pretrained weights

def from_pretrained(kind: Any, folder: str | Path, config: Any = None, **named: Any) -> nn.Module:
    """A model of transformers (`kind`: its class, such as AutoModelForCausalLM) with the weights of a folder that
    save_pretrained wrote, ready for `initialize`: at level 3 of `config` each rank reads its slices of each tensor and
    nothing else. `named`: what the model's configuration should say otherwise. Raises UserError.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights
    words = AutoConfig.from_pretrained(str(folder), **named)
    dtype = getattr(words, "dtype", None) or torch.float32
    with no_init_weights(), _default(dtype), Init(config_dict_or_path=config):
        model: Any = kind.from_config(words) if hasattr(kind, "from_config") else kind(words)
        model.tie_weights()
    held, read = HfFolder(Path(folder), f"{getattr(model, 'base_model_prefix', '')}.", r"(?!)"), set()
    for name, p in model.named_parameters():
        theirs = held.name(name)
        if theirs is None or held.tensors[theirs].shape != tuple(p.shape):
            raise UserError(f"from_pretrained {folder}: has no {name} of shape {list(p.shape)}: this family stores its "
                            "weights in another form; use transformers' from_pretrained under HfDeepSpeedConfig.")
        _take(p, held, theirs)
        read.add(theirs)
    for name, b in model.named_buffers():
        if (theirs := held.name(name)) is not None:
            b.copy_(held.read(theirs, 0, b.shape[0]))
            read.add(theirs)
    tied = {held.name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    if left := sorted(held.tensors.keys() - read - tied):
        say(f"from_pretrained {folder}: {left[0]} and {len(left) - 1} more tensors are not of this model")
    return model.eval()                                         # type: ignore[no-any-return]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _take(p: nn.Parameter, held: Any, name: str) -> None:
    """This rank's slice of a tensor, or all of it where it holds all."""
    home, rows = next(iter(sliced([p])), None), p.shape[0]
    if home is None:
        with torch.no_grad():
            p.copy_(held.read(name, 0, rows))
        return
    row = max(p.shape.numel() // rows, 1)
    low, high = (min(home.width * (home.group.rank + i), p.shape.numel()) for i in (0, 1))
    first, last = low // row, -(-high // row)
    part = torch.zeros(home.width, dtype=p.dtype, device=home.device)
    if high > low:
        part[:high - low] = held.read(name, first, last).flatten()[low - first * row:high - first * row].to(p.dtype)
    home.keep(part)
