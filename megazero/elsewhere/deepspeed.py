"""Checkpoints of DeepSpeed: at levels 0 to 3, and universal ones. Weights are the optimizer's masters in fp32, cut into
ranks' flat partitions; the module's own are read where it keeps no others."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError, said
from megazero.elsewhere.others import by_number
from megazero.elsewhere.source import Lazy, Read, Source, Tensors, here, words_of
from megazero.plan import Shape

Tensor = torch.Tensor
RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
KINDS = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Flats = dict[str, list[list[Tensor]]]   # kind -> group -> the partition of each rank


def deepspeed_source(folder: Path, read: Read) -> Source:
    """What a folder of one step holds, whatever its level. Raises UserError."""
    states = [_mapping_in(read(path), path) for path in _files(folder, "optim")]
    models = [_mapping_in(read(path), path) for path in _model_files(folder)]
    shapes = _shapes(models[0], folder)
    kinds: dict[str, Tensors]
    if not states:
        kinds = _level_0(models[0])
    else:
        outer = [words_of(state.get("optimizer_state_dict")) for state in states]
        _same_world(outer, folder)
        whole = "fp32_flat_groups" in outer[0]
        try:
            kinds = _level_3(outer, shapes) if whole else _levels_1_2(outer, shapes)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"--input {folder}: its flat partitions are not those of its parameters "
                            f"({said(str(error))}); its files are not of one step, or not of a form that is "
                            "known here.") from None
    weights = kinds.pop("weight", {}) | _frozen(models)
    if not weights:
        raise UserError(f"--input {folder}: its files name no parameters (param_shapes); fetch it again.")
    return _with_words(folder, models[0], weights, kinds, _groups(states, shapes))


def universal_source(folder: Path, read: Read) -> Source:
    """zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt, and what lies beside them. Raises UserError."""
    beside = _model_files(folder)
    model = _mapping_in(read(beside[0]), beside[0])
    shapes = _shapes(model, folder)
    kinds: dict[str, Tensors] = {kind: {} for kind in KINDS.values()}
    for name, shape in (each for group in shapes for each in group.items()):
        for file, kind in KINDS.items():
            path = folder / "zero" / name / f"{file}.pt"
            tensor = _parameter(read(path), path)
            if tuple(tensor.shape) != shape:
                raise UserError(f"{path}: has shape {list(tensor.shape)}, its param_shapes say {list(shape)}; convert "
                                "it again with DeepSpeed's ds_to_universal.")
            kinds[kind][name] = here(tensor)
    optimizer = folder / "zero" / "optimizer_state.pt"
    state = words_of(read(optimizer)) if optimizer.is_file() else {}
    weights = kinds.pop("weight") | _frozen([model])
    return _with_words(folder, model, weights, kinds, _groups([{"optimizer_state_dict": state}], shapes))


def _parameter(value: Any, path: Path) -> Tensor:
    found = value.get("param") if isinstance(value, Mapping) else value
    if not isinstance(found, Tensor):
        raise UserError(f"{path}: holds no tensor of a parameter.")
    return found


# ---- files

def _files(folder: Path, kind: str) -> list[Path]:
    """One for each rank, in order. Raises UserError for one that is missing, or there twice."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = RANK.fullmatch(path.name)
        if match and match[3] == kind:
            if int(match[2]):
                raise UserError(f"--input {path}: is of tensor-parallel ranks of DeepSpeed; save it at mp 1.")
            if int(match[1]) in found:
                raise UserError(f"--input {path}: is of the same rank as {found[int(match[1])].name}; remove one.")
            found[int(match[1])] = path
    for rank in range(max(found, default=-1) + 1):
        if rank not in found:
            raise UserError(f"--input {folder}: holds no {kind}_states.pt of rank {rank}; fetch it again.")
    return [found[rank] for rank in sorted(found)]


def _model_files(folder: Path) -> list[Path]:
    """That of all ranks, or at level 3 one for each."""
    whole = [path for path in sorted(folder.glob("mp_rank_*_model_states.pt")) if MODEL.fullmatch(path.name)]
    if len(whole) > 1:
        raise UserError(f"--input {whole[1]}: is of tensor-parallel ranks of DeepSpeed; save it at mp 1.")
    files = whole or _files(folder, "model")
    if not files:
        raise UserError(f"--input {folder}: holds no mp_rank_00_model_states.pt; fetch it again.")
    return files


def _mapping_in(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: is no checkpoint of DeepSpeed.")
    return value


def _listed(model: Mapping[str, Any]) -> list[Any]:
    given = model.get("param_shapes") or []
    return list(given) if isinstance(given, list | tuple) else [given]


def _shapes(model: Mapping[str, Any], folder: Path) -> list[dict[str, Shape]]:
    """name -> shape of each group's parameters, in the order of their partitions."""
    found = [{name: tuple(shape) for name, shape in words_of(group).items()} for group in _listed(model)]
    if not all(isinstance(n, int) and n >= 0 for group in found for shape in group.values() for n in shape):
        raise UserError(f"--input {folder}: its param_shapes are none.")
    return found


def _same_world(states: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Raises UserError unless all ranks' files are here."""
    count = states[0].get("partition_count")
    counts = set(count) if isinstance(count, list | tuple) else {count}
    if counts != {len(states)}:
        raise UserError(f"--input {folder}: holds the optimizer's state of {len(states)} ranks, there were "
                        f"{said(max(counts, key=str))}; fetch the others.")


# ---- partitions

def _levels_1_2(states: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Shape]]) -> dict[str, Tensors]:
    """Parameters of a group lie one after the other in a flat buffer, each rank has an even part of it."""
    flats: Flats = {"weight": [list(parts) for parts in zip(*(s["single_partition_of_fp32_groups"] for s in states),
                                                            strict=True)]}
    inner = [words_of(s["base_optimizer_state"]).get("state", {}) for s in states]
    for kind in ("exp_avg", "exp_avg_sq"):
        flats[kind] = [[words_of(state.get(i))[kind] for state in inner if kind in words_of(state.get(i))]
                       for i in range(len(shapes))]
    gaps = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    kinds: dict[str, Tensors] = {}
    for kind, groups in flats.items():
        if not all(len(parts) == len(states) for parts in groups):
            continue                                            # of an optimizer without moments
        for group, parts, gap in zip(shapes, groups, gaps, strict=True):
            at = 0
            for (name, shape), pad in zip(group.items(), gap, strict=True):
                kinds.setdefault(kind, {})[name] = _range(parts, at, shape)
                at += prod(shape) + pad
            if at > sum(p.numel() for p in parts):
                raise ValueError(f"a group has {at} elements, its partitions fewer")
    return kinds


def _range(parts: Sequence[Tensor], start: int, shape: Shape) -> Lazy:
    """Elements from `start` on of flat partitions one after the other."""
    def read() -> Tensor:
        found, at, stop = [], 0, start + prod(shape)
        for part in parts:
            found.append(part.reshape(-1)[max(start - at, 0):max(stop - at, 0)])
            at += part.numel()
        return torch.cat(found).view(shape)

    return Lazy(shape, parts[0].dtype, read)


def _level_3(states: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Shape]]) -> dict[str, Tensors]:
    """Each rank has an even part of each parameter, padded; those of a sub-group lie one after the other."""
    inner = [words_of(words_of(s["optimizer_state_dict"]).get("state")) or words_of(s["optimizer_state_dict"]).get(
        "state", {}) for s in states]
    flats: dict[str, list[list[Tensor]]] = {"weight": [list(s["fp32_flat_groups"]) for s in states]}
    for kind in ("exp_avg", "exp_avg_sq"):
        flats[kind] = [[words_of(state[i])[kind] for i in sorted(state) if kind in words_of(state[i])]
                       for state in inner]
    every = {name: shape for group in shapes for name, shape in group.items()}
    each, kinds = len(states), dict[str, Tensors]()
    for kind, ranks in flats.items():
        if not all(len(groups) == len(flats["weight"][0]) for groups in ranks):
            continue
        at = 0
        for name, shape in every.items():
            own = ceil(prod(shape) / each)
            reads = [_range(groups, at, (own,)) for groups in ranks]
            kinds.setdefault(kind, {})[name] = Lazy(shape, ranks[0][0].dtype, partial(_put_together, reads, shape))
            at += own
        if any(at > sum(g.numel() for g in groups) for groups in ranks):
            raise ValueError(f"a rank's parameters have {at} elements, its partitions fewer")
    return kinds


def _put_together(parts: Sequence[Lazy], shape: Shape) -> Tensor:
    return torch.cat([p.read() for p in parts])[:prod(shape)].view(shape)


def _level_0(model: Mapping[str, Any]) -> dict[str, Tensors]:
    """The module as it is, and torch's own optimizer, which numbers parameters: all, or matrices before vectors."""
    left, weights, places = {*model.get("buffer_names", ()), *words_of(model.get("shared_params"))}, Tensors(), set()
    for name, t in words_of(model.get("module")).items():
        if isinstance(t, Tensor) and name not in left:
            place = t.data_ptr(), t.shape                       # a tied one lies where its first name does
            weights |= {} if place in places and t.numel() else {name: here(t)}
            places.add(place)
    split = [[n for n, t in weights.items() if (len(t.shape) > 1) == matrix] for matrix in (True, False)]
    for groups in ([list(weights)], split):
        if moments := by_number(model.get("optimizer"), groups, weights):
            return {"weight": weights, **moments}
    return {"weight": weights}


def _frozen(models: Sequence[Mapping[str, Any]]) -> Tensors:
    """Parameters that are not trained, of which at level 3 each rank has an even part."""
    found: Tensors = {}
    for name, size in words_of(models[0].get("frozen_param_shapes")).items():
        parts = [words_of(m.get("frozen_param_fragments")).get(name) for m in models]
        held = [here(p.reshape(-1)) for p in parts if isinstance(p, Tensor)]
        if len(held) == len(models):
            found[name] = Lazy(tuple(size), held[0].dtype, partial(_put_together, held, tuple(size)))
    return found


# ---- words

def _groups(states: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Shape]]) -> list[dict[str, Any]]:
    """The optimizer's groups: names of parameters, and options. At level 3 a group may be cut into sub-groups."""
    outer = words_of(states[0].get("optimizer_state_dict")) if states else {}
    inner = words_of(outer.get("base_optimizer_state")) or words_of(outer.get("optimizer_state_dict")) or outer
    given = [words_of(group) for group in inner.get("param_groups") or []]
    names = [list(group) for group in shapes]
    if len(given) != len(names):
        numbers = [len(group.get("params", ())) for group in given]
        if sum(numbers) != len(names):
            return []
        ends = [sum(numbers[:i]) for i in range(len(numbers) + 1)]
        names = [[n for group in names[a:b] for n in group] for a, b in zip(ends, ends[1:], strict=False)]
    return [{"parameters": own, "options": {k: v for k, v in group.items() if k != "params" and _plain(v)}}
            for own, group in zip(names, given, strict=True)]


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value))


OWN = """module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments
    lr_scheduler data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size ds_config
    ds_version sparse_tensor_module_names csr_tensor_module_names universal_checkpoint_info num_experts rng_states
    checkpoint_parallel_dimensions"""


def _with_words(folder: Path, model: Mapping[str, Any], weights: Tensors, moments: dict[str, Tensors],
                groups: list[dict[str, Any]]) -> Source:
    module, names = words_of(model.get("module")), model.get("buffer_names") or []
    count: Callable[[str], int] = lambda key: model[key] if isinstance(model.get(key), int) else 0     # noqa: E731
    config = words_of(model.get("ds_config"))
    micro = config.get("gradient_accumulation_steps")
    words = {"groups": groups, "skipped": count("skipped_steps"), "micro": micro if isinstance(micro, int) else 1,
             "buffers": {n: here(module[n]) for n in names if isinstance(module.get(n), Tensor)},
             "shared": words_of(model.get("shared_params")),
             "scheduler": (words_of(config.get("scheduler")).get("type"), model.get("lr_scheduler")),
             "client": {k: v for k, v in model.items() if k not in OWN.split()}}
    notes = [] if moments else ["it holds no moments of an optimizer that are known here"]
    return Source(folder, weights, moments, words, count("global_steps"), count("global_samples"), notes)
