"""What people hold as an engine's optimizer: torch's groups of parameters, whose rates and options are read when a step
begins."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megazero.base import UserError, printable
from megazero.engine.engine import Engine


class FusedAdam(torch.optim.Adam):
    """DeepSpeed's name for Adam with its words; AdamW unless `adam_w_mode` is false."""

    def __init__(self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999),
                 eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
                 set_grad_none: bool = True) -> None:
        if not bias_correction or amsgrad:
            raise UserError(f"{type(self).__name__}: bias_correction {bias_correction}, amsgrad {amsgrad}: there is no "
                            "such kernel here; leave it out.")
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode)


class DeepSpeedCPUAdam(FusedAdam):
    """The same; on a CPU moments and masters are in its memory already."""

    def __init__(self, model_params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, adamw_mode: bool = True,
                 fp32_optimizer_states: bool = True) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


class FusedLamb(torch.optim.Optimizer):
    """DeepSpeed's name for Lamb with its words: groups for an engine, which measures tensors over all ranks."""

    def __init__(self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999),
                 eps: float = 1e-8, eps_inside_sqrt: bool = False, weight_decay: float = 0.0,
                 max_grad_norm: float = 0.0, max_coeff: float = 10.0, min_coeff: float = 0.01,
                 amsgrad: bool = False) -> None:
        if eps_inside_sqrt or max_grad_norm or amsgrad:
            raise UserError(f"FusedLamb: eps_inside_sqrt {eps_inside_sqrt}, max_grad_norm {max_grad_norm}, amsgrad "
                            f"{amsgrad}: there is no such kernel here; leave it out.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "bias_correction": bias_correction, "max_coeff": max_coeff, "min_coeff": min_coeff})


class FusedLion(torch.optim.Optimizer):
    """The same for Lion."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.99), weight_decay: float = 0.0,
                 set_grad_none: bool = True) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


class DeepSpeedCPULion(FusedLion):
    """The same; on a CPU moments and masters are in its memory already."""


RULES_OF: Mapping[type, str] = {torch.optim.Adam: "adam", torch.optim.AdamW: "adam", torch.optim.SGD: "sgd",
                                torch.optim.Adafactor: "adafactor",
                                FusedAdam: "adam", DeepSpeedCPUAdam: "adam", FusedLamb: "lamb", FusedLion: "lion",
                                DeepSpeedCPULion: "lion"}
NOT_DONE = ("amsgrad", "maximize", "dampening", "differentiable")   # options of theirs that the kernels do not have
RANGES: Mapping[str, tuple[float, float]] = {                   # of numbers, the upper one left out
    "lr": (0, math.inf), "eps": (0, math.inf), "weight_decay": (0, math.inf), "momentum": (0, math.inf),
    "betas": (0, 1), "d": (0, math.inf)}
Given = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


class ZeroOptimizer(torch.optim.Optimizer):
    """Groups of parameters; what they are changed by, and moments, are the engine's.

    rule        of plan.RULES
    core        the engine, once there is one
    client      the user's own, whose groups these are
    """

    core: Engine
    client: torch.optim.Optimizer | None = None

    def __init__(self, groups: Any, rule: str, defaults: dict[str, Any]) -> None:
        groups = list(groups)
        for text in (text for i, group in enumerate(groups) if isinstance(group, dict) for text in _wrong(i, group)):
            raise UserError(text)
        try:
            super().__init__(groups, defaults)
        except (TypeError, ValueError) as error:
            raise UserError(f"model_parameters: {error}; give parameters, or mappings with params.") from None
        self.rule = rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "core" in self.__dict__:
            raise UserError("optimizer.add_param_group: the engine holds its parameters already; give the group to "
                            "initialize, in model_parameters.")
        super().add_param_group(param_group)

    def step(self, closure: Any = None) -> None:                # type: ignore[override]
        raise UserError("optimizer.step(): the engine changes the weights; write engine.step().")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.core.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with whole moments on every rank; all ranks call it. engine.save_checkpoint needs no such memory."""
        number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        updates = float(self.core.updates)
        state = {number[p]: {"step": torch.tensor(updates), **own} for p, own in self.core.moments() if p in number}
        return {"state": state, "param_groups": [{**group, "params": [number[p] for p in group["params"]]}
                                                 for group in self.param_groups]}

    def load_state_dict(self, state_dict: Any) -> None:
        """What `state_dict` gave, on every rank. Raises UserError."""
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise UserError("optimizer.load_state_dict: has no state and param_groups; give what state_dict() gave.")
        given, own = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in given] != [len(g["params"]) for g in own]:
            raise UserError(f"optimizer.load_state_dict: has groups of {[len(g['params']) for g in given]} parameters, "
                            f"there are {[len(g['params']) for g in own]} now; give the same groups.")
        number = {p: i for now, then in zip(own, given, strict=True)
                  for p, i in zip(now["params"], then["params"], strict=True)}
        self.core.set_moments({p: state_dict["state"][i] for p, i in number.items() if i in state_dict["state"]})
        for now, then in zip(own, given, strict=True):
            now.update({key: value for key, value in then.items() if key != "params"})

    @property
    def loss_scale(self) -> float:
        """Waits for the last step's verdict."""
        self.core.settle()
        return self.core.scale.value

    cur_scale = loss_scale

    @property
    def overflow(self) -> bool:
        return self.core.global_steps > 0 and not self.core.was_step_applied()


def _wrong(number: int, group: Mapping[str, Any]) -> Iterator[str]:
    """What a group says that cannot be."""
    where = f"model_parameters: group {number}"
    if "params" not in group:
        yield f"{where} has no params; give it a list of parameters."
    for key, (low, high) in RANGES.items():
        values = group.get(key, low)
        for value in values if key in ("betas", "eps") and isinstance(values, tuple | list) else [values]:
            if key == "eps" and value is None and value is not values:          # that of the dtype
                continue
            if not isinstance(value, int | float | torch.Tensor) or not low <= float(value) < high:
                yield f"{where}: its {key} is {printable(str(values), 60)}; write numbers from {low}, below {high}."
    if wrong := next((option for option in NOT_DONE if group.get(option)), None):
        yield f"{where}: its {wrong} is {printable(str(group[wrong]), 60)}, which is not here; leave it out."


def of_config(rule: str, options: Mapping[str, Any], parameters: Iterable[Any]) -> ZeroOptimizer:
    """A group that does not say an option has that of the configuration."""
    return ZeroOptimizer(parameters, rule, dict(options))


def halves(model: nn.Module, parameters: Iterable[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups for Muon, as DeepSpeed makes them: each is parted into matrices that Muon changes and the rest, which is
    Adam's. What a parameter's own `use_muon` does not say, its dimensions and its name do."""
    given = list(parameters)
    groups = [g for g in given if isinstance(g, Mapping)]
    loose = [p for p in given if not isinstance(p, Mapping)]
    groups += [{"params": loose}] if loose or not groups else []
    names = {p: name.lower() for name, p in model.named_parameters()}

    def is_matrix(p: nn.Parameter) -> bool:
        own = p.dim() > 1 and not any(word in names.get(p, "") for word in ("embed", "lm_head"))
        return bool(getattr(p, "use_muon", own))

    shared = {"weight_decay": options["weight_decay"]}
    lr = {True: (options["muon_lr"], options["lr"], 0.02), False: (options["adam_lr"], options["lr"], 3e-4)}
    own = {True: {"momentum": options["momentum"]}, False: {"betas": options["betas"], "eps": options["eps"]}}
    made = []
    for i, group in enumerate(groups):
        for muon in (True, False):
            half = [p for p in group.get("params", ()) if is_matrix(p) == muon]
            wish = {key: value for key, value in group.items() if key in ("lr", *own[muon], *shared)}
            name = f"{'muon' if muon else 'adam'}-params"
            name = f"{group.get('name', f'group{i}')}-{name}" if len(groups) > 1 or "name" in group else name
            made += [{"lr": next(r for r in lr[muon] if r is not None), **own[muon], **shared, **wish, "params": half,
                      "use_muon": muon, "name": name}] if half else []
    return made


def of_client(given: Given, parameters: Iterable[nn.Parameter]) -> ZeroOptimizer:
    """The groups of a torch optimizer of the user's own, the very dicts, or of what it makes of the parameters. Raises
    UserError for one that is not known to run over slices, or that has begun."""
    client = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    kind = type(client)
    if kind not in RULES_OF:
        known = ", ".join(f"torch.optim.{k.__name__}" for k in RULES_OF)
        raise UserError(f"optimizer {kind.__module__}.{kind.__name__}: is not known to run over slices; give one of "
                        f"{known}, or an optimizer of the config.")
    if client.state:
        raise UserError(f"optimizer {kind.__name__}: has made steps, whose moments would be lost; give a new one.")
    made = ZeroOptimizer(client.param_groups, RULES_OF[kind], dict(client.defaults))
    made.client = client
    return made
