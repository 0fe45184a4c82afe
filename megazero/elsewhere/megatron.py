"""Checkpoints of Megatron-LM and Megatron-core: the legacy form, a file for each tensor- and pipeline-parallel
rank, and torch_dist; of each its names, and what its arguments say of the model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError, printable, said
from megazero.elsewhere.dcp import Distributed
from megazero.elsewhere.names import MEGATRON, NamedRow, named_rows, sound
from megazero.elsewhere.source import Lazy, Read, Source, Tensors, here, side_by_side, words_of
from megazero.plan import Architecture, Llama3, Rotary

Tensor = torch.Tensor
RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
FILES = ("model_optim_rng.pt", "model_rng.pt")
LEFT = re.compile(r".*(_extra_state(/.*)?|inv_freq|masked_bias|attention\.bias|rotary_pos_emb.*)")      # no weights

# names of before, and of Transformer Engine's fused layers -> those of the local layers
RENAMED = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^(module\.|model\.|language_model\.)+", ""), (r"^(encoder|transformer)\.", "decoder."),
    (r"\.attention\.", ".self_attention."), (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."), (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."), (r"\.linear_qkv\.layer_norm_", ".!input_layernorm."),
    (r"self_attention\.!", ""), (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."), (r"\.input_norm\.", ".input_layernorm."),
    (r"\.(q|k)_norm\.", r".\1_layernorm."), (r"^decoder\.final_norm\.", "decoder.final_layernorm.")))


def core_name(name: str) -> str:
    """A name of any of Megatron's versions as that of Megatron-core's local layers."""
    for pattern, new in RENAMED:
        name = pattern.sub(new, name)
    return name


# ---- what its arguments say

# arguments that change the function -> values with which they do not
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_experts": (None, 0, 1), "multi_latent_attention": (False, None), "rotary_interleaved": (False, None),
    "apply_residual_connection_post_layernorm": (False, None), "rotary_seq_len_interpolation_factor": (None, 1),
    "mtp_num_layers": (None, 0), "is_hybrid_model": (False, None), "quick_geglu": (False, None),
    "glu_activation": (None,), "embed_layernorm": (False, None), "no_rope_freq": (None,), "qk_l2_norm": (False, None),
    "heterogeneous_layers_config_path": (None,), "attention_output_gate": (False, None),
    "experimental_attention_variant": (None,), "softmax_type": ("vanilla", None), "window_attn_skip_freq": (None,),
    "mlp_type": ("standard", None)}
POSITIONS = {"learned_absolute": "learned_absolute", "absolute": "learned_absolute", "rope": "rope", "rotary": "rope",
             "none": "none"}
NORMS = {"LayerNorm": "LayerNorm", "layernorm": "LayerNorm", "RMSNorm": "RMSNorm", "rmsnorm": "RMSNorm"}


def megatron_architecture(args: Mapping[str, Any], rows: int, vocab_size: int | None, path: Path) -> Architecture:
    """The decoder that a checkpoint's arguments describe, whose embedding has so many rows. Raises UserError."""
    if not {"num_layers", "hidden_size", "num_attention_heads"} <= args.keys():
        raise UserError(f"--input {path}: holds no arguments of Megatron, which would say what its model is; describe "
                        "it with --hf-config config.json.")
    for name, plain in PLAIN.items():
        if args.get(name, plain[0]) not in plain:
            raise UserError(f"--input {path}: was trained with --{name.replace('_', '-')} {said(args[name])}, which "
                            "this decoder cannot be.")
    kind = "rope" if args.get("use_rotary_position_embeddings") else args.get("position_embedding_type")
    for name, value, known in (("position-embedding-type", kind or "learned_absolute", POSITIONS),
                               ("normalization", args.get("normalization") or "LayerNorm", NORMS)):
        if value not in known:
            raise UserError(f"--input {path}: was trained with --{name} {said(value)}, which this decoder cannot be.")
    try:
        made = _described(args, POSITIONS[kind or "learned_absolute"])
        size = min(vocab_size or args.get("vocab_size") or rows, rows)
        return sound(replace(made, vocab_size=size))
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"--input {path}: its arguments cannot be ({printable(str(error))}).") from None
    except UserError as error:
        raise UserError(*(f"--input {path}: {s.removeprefix('--load: ')}" for s in error.sentences)) from None


def _described(args: Mapping[str, Any], positions: str) -> Architecture:
    hidden, heads, gated = args["hidden_size"], args["num_attention_heads"], bool(args.get("swiglu"))
    biased = bool(args.get("add_bias_linear", True))
    tanh = args.get("openai_gelu") or (biased and args.get("bias_gelu_fusion", True))   # as its fused kernel has it
    width = args.get("kv_channels") or hidden // heads
    length = args.get("seq_length") or args["max_position_embeddings"]
    scaling = (Llama3(float(args.get("rope_scaling_factor") or 8.0), 1.0, 4.0, 8192) if args.get("use_rope_scaling")
               else None)
    norm = NORMS[args.get("normalization") or "LayerNorm"]
    channels = round(width * (args.get("rotary_percent") or 1.0)) // 2 * 2
    return Architecture(
        layers=args["num_layers"], hidden=hidden, heads=heads, head_dim=width, seq_length=length, vocab_size=1,
        ffn=args.get("ffn_hidden_size") or (hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden),
        kv_heads=(args.get("num_query_groups") or 1) if args.get("group_query_attention") else heads,
        learned_positions=(args.get("max_position_embeddings") or length) if positions == "learned_absolute" else 0,
        rotary=Rotary(float(args.get("rotary_base") or 10000), channels, scaling) if positions == "rope" else None,
        norm=norm, norm_plus_one=bool(args.get("apply_layernorm_1p")),
        epsilon=args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
        activation="swiglu" if gated else "relu2" if args.get("squared_relu") else "gelu_tanh" if tanh else "gelu",
        bias=biased, o_bias=biased, qkv_bias=biased or bool(args.get("add_qkv_bias")), norm_bias=norm == "LayerNorm",
        qk_norm="head" if args.get("qk_layernorm") else "none",
        tied=not args.get("untie_embeddings_and_output_weights"), init_std=args.get("init_method_std") or 0.02,
        attention_dropout=args.get("attention_dropout") or 0.0, hidden_dropout=args.get("hidden_dropout") or 0.0,
        window=args["window_size"][0] + 1 if args.get("window_size") else 0,
        pad_rows=args.get("make_vocab_size_divisible_by") or 128)


# ---- the legacy form

# where tensor-parallel ranks share a tensor: the dimension; other tensors each of them has whole
SHARED = {"word_embeddings.weight": 0, "output_layer.weight": 0, "linear_qkv.weight": 0, "linear_qkv.bias": 0,
          "linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_proj.weight": 1, "linear_fc2.weight": 1}


def legacy_source(folder: Path, read: Read) -> Source:
    """What the files of all tensor- and pipeline-parallel ranks hold. Raises UserError."""
    files = _rank_files(folder)
    ranks = {place: _mapping_of(read(path), path) for place, path in files.items()}
    first = ranks[0, 0]
    words, version = words_of(first.get("args")), first.get("checkpoint_version", 0)
    tp, pp = (1 + max(place[i] for place in files) for i in (0, 1))
    for name, size in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if words.get(name, size) != size:
            raise UserError(f"--input {folder}: holds files of {size} ranks of --{name.replace('_', '-')}, its "
                            f"arguments say {said(words[name])}; fetch the others.")
    stages: list[list[Tensors]] = [[_per_rank(ranks[rank, stage], files[rank, stage], words, version, tp)
                                    for rank in range(tp)] for stage in range(pp)]
    states = [[_optimizer_states(ranks[rank, stage], stages[stage][rank]) for rank in range(tp)]
              for stage in range(pp)]
    kinds = {"weight": _of_stages(stages, words, folder)}
    if all(state for stage in states for state in stage):
        for kind in states[0][0]:
            kinds[kind] = _of_stages([[rank[kind] for rank in stage] for stage in states], words, folder)
    there = any("optimizer" in of for of in ranks.values()) or next(folder.glob("mp_rank_*/distrib_optim.pt"), None)
    notes = [] if len(kinds) > 1 or not there else [
        "its optimizer's state is not in its ranks' files, or not in an order that is known here: it stays behind"]
    weights, moments = kinds.pop("weight") | kinds.pop("master", {}), kinds
    step = first.get("iteration", 0)
    return Source(folder, weights, moments, words, step if isinstance(step, int) else 0,
                  int(words.get("consumed_train_samples") or 0), notes)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, stage) -> its file."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = RANK.fullmatch(path.name)
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if match is None:
            raise UserError(f"--input {path}: is of expert-parallel ranks, or of none that is known here.")
        if file is None:
            raise UserError(f"--input {path}: holds no {FILES[0]}; fetch it again.")
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise UserError(f"--input {path}: is of the same rank as {found[place].parent.name}; remove one of them.")
        found[place] = file
    tp, pp = (1 + max((place[i] for place in found), default=0) for i in (0, 1))
    for place in ((r, s) for r in range(tp) for s in range(pp)):
        if place not in found:
            name = f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if pp > 1 else "")
            raise UserError(f"--input {folder}: has no {name}, though there are files of {tp} x {pp} ranks; fetch it.")
    return found


def _of_stages(stages: Sequence[Sequence[Tensors]], words: Mapping[str, Any], folder: Path) -> Tensors:
    """The whole tensors of what the ranks of each stage hold. Raises UserError."""
    whole = []
    for stage, parts in enumerate(stages):
        if lost := [name for part in parts for name in parts[0].keys() ^ part.keys()]:
            raise UserError(f"--input {folder}: only some tensor-parallel ranks of stage {stage} hold "
                            f"{said(lost[0].partition('!')[2])}; its files are not of one model.")
        whole.append({name: _of_ranks(name, [part[name] for part in parts], words, folder) for name in parts[0]})
    return _renumbered(whole)


def _mapping_of(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: is no checkpoint of Megatron.")
    return value


def _per_rank(of: Mapping[str, Any], path: Path, words: Mapping[str, Any], version: Any, tp: int) -> Tensors:
    """The weights of one rank by Megatron-core's names, their layers numbered within the rank; those of a virtual stage
    v are marked `v!`. Raises UserError."""
    parts = [key for key in of if re.fullmatch(r"model\d*", str(key))]
    found: Tensors = {}
    for key in sorted(parts, key=lambda k: int(k[5:] or 0)):
        for name, tensor in _flat(_mapping_of(of[key], path)):
            core = core_name(name)
            if LEFT.fullmatch(core) or tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise UserError(f"{path}: {said(name)} is no tensor.")
            lazy = here(tensor)
            if "linear_qkv." in core and version in (0, 1, 1.0) and not isinstance(version, bool):
                lazy = lazy.but(lambda t: _in_order(t, version, words["num_attention_heads"] // tp))
            found[f"{key[5:] or 0}!{core}"] = lazy
    return found


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Names joined by dots, of mappings within mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _in_order(qkv: Tensor, version: float, heads: int) -> Tensor:
    """q, k, v of each head together, from the orders of checkpoint_version 0 [3, heads, d] and 1 [heads, d, 3]."""
    if version == 0:
        return qkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    return qkv.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)


def _of_ranks(name: str, parts: Sequence[Lazy], words: Mapping[str, Any], folder: Path) -> Lazy:
    """The tensor of which tensor-parallel ranks hold these parts. Raises UserError."""
    dim = next((d for end, d in SHARED.items() if name.endswith(end)), None)
    if len(parts) == 1:
        return parts[0]
    if dim is None:
        if not all(torch.equal(parts[0].read(), p.read()) for p in parts[1:]):
            raise UserError(f"--input {folder}: {name.partition('!')[2]} differs between its tensor-parallel ranks, "
                            "which should hold the same; its files are not of one step.")
        return parts[0]
    if len({p.shape[:dim] + p.shape[dim + 1:] for p in parts}) > 1:
        raise UserError(f"--input {folder}: {name.partition('!')[2]} has other shapes on other ranks; its files are "
                        "not of one model.")
    if "linear_fc1" in name and words.get("swiglu"):            # each rank has its rows of gate, then of up
        halves = [[p.but(lambda t, i=i: t.chunk(2)[i], (p.shape[0] // 2, *p.shape[1:]))     # type: ignore[misc]
                   for p in parts] for i in (0, 1)]
        return side_by_side([*halves[0], *halves[1]])
    return side_by_side(parts, dim)


def _renumbered(weights: Sequence[Tensors]) -> Tensors:
    """Layers numbered through: those of stage 0, 1 ... of virtual stage 0, then of virtual stage 1 ..."""
    found, first = Tensors(), 0
    chunks = sorted({int(name.split("!")[0]) for stage in weights for name in stage})
    for chunk in chunks:
        for stage in weights:
            own = {name.partition("!")[2]: t for name, t in stage.items() if name.startswith(f"{chunk}!")}
            numbers = {int(m[0]) for name in own if (m := LAYER.search(name))}
            for name, tensor in own.items():
                new = LAYER.sub(lambda m: str(int(m[0]) + first), name)     # noqa: B023
                found.setdefault(new, tensor)                   # the last stage has a copy of a tied embedding
            first += len(numbers)
    return found


# ---- the optimizer's state

def _optimizer_states(of: Mapping[str, Any], weights: Tensors) -> dict[str, Tensors]:
    """master, exp_avg, exp_avg_sq of one rank's weights, by their names; nothing if it is not there or not understood.

    Megatron numbers parameters by group: those that are decayed, those that are not, each in the model's order."""
    outer = words_of(of.get("optimizer"))
    inner = words_of(outer.get("optimizer")) or outer
    states, groups = inner.get("state"), inner.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        return {}
    found: dict[str, Tensors] = {}
    masters = outer.get("fp32_from_fp16_params") or [[] for _ in groups]
    for group, own in zip(map(words_of, groups), masters, strict=False):
        vector, numbers = group.get("wd_mult", 1.0) == 0, group.get("params", [])
        apart = [group.get("is_decoupled_lr", False)] if any(words_of(g).get("is_decoupled_lr") for g in groups) else []
        names = [n for n, w in weights.items() if (len(w.shape) == 1 or n.endswith(".bias")) == vector
                 and apart in ([], ["embedding." in n or "output_layer." in n])]
        each = {"master": list(own), **{kind: [words_of(states.get(i)).get(kind) for i in numbers]
                                        for kind in ("exp_avg", "exp_avg_sq")}}
        for kind, tensors in each.items():
            if kind == "master" and not tensors:
                continue
            if len(tensors) != len(names) or not all(
                    isinstance(t, Tensor) and tuple(t.shape) == weights[n].shape
                    for t, n in zip(tensors, names, strict=True)):
                return {}
            found.setdefault(kind, {}).update({n: here(t) for t, n in zip(tensors, names, strict=True)})
    return found if found.get("exp_avg", {}).keys() == weights.keys() else {}


# ---- torch_dist

STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(exp_avg|exp_avg_sq|fp32_param)\.(.+)")


def torch_dist_source(folder: Path, found: Distributed, read: Read) -> Source:
    """What a torch_dist folder holds. Layers that lie stacked in one tensor are told apart. Raises UserError."""
    common = _mapping_of(read(folder / "common.pt"), folder / "common.pt")
    words = words_of(common.get("args"))
    kinds: dict[str, Tensors] = {"weight": {}}
    left = set()
    for name in found.tensors:
        match = STATE.fullmatch(name)
        if match is None and name.startswith(("optimizer", "chained_", "rng_state", "rerun_")):
            left.add("optimizer" if "optim" in name else "")
            continue
        kind, inner = (match[1], match[2]) if match else ("weight", name)
        if not LEFT.fullmatch(inner):
            kinds.setdefault(kind, {}).update(_unstacked(found, name, core_name(inner)))
    notes = ["its optimizer's state is cut into buckets, whose order its files do not say: it stays behind"] * (
        "optimizer" in left and len(kinds) == 1)
    step = common.get("iteration", 0)
    weights = kinds.pop("weight") | kinds.pop("fp32_param", {})
    return Source(folder, weights, kinds, words, step if isinstance(step, int) else 0,
                  int(words.get("consumed_train_samples") or 0), notes)


def _unstacked(found: Distributed, name: str, core: str) -> Iterator[tuple[str, Lazy]]:
    """A tensor by its name, or each layer of it by its own."""
    if core.startswith("decoder.layers.") and not LAYER.search(core):
        for i in range(found.tensors[name].shape[0]):
            yield core.replace("layers.", f"layers.{i}.", 1), found.layer(name, i)
    else:
        yield core, found.tensors[name]


# ---- both

def of_megatron(source: Source, a: Architecture) -> tuple[list[NamedRow], Source]:
    """The rows of Megatron-core's names; the source without what its model does not read, the copy of a tied
    embedding."""
    def read(theirs: Tensors) -> Tensors:
        return {name: t for name, t in theirs.items() if not (a.tied and name == "output_layer.weight")}

    moments = {kind: read(tensors) for kind, tensors in source.moments.items()}
    return named_rows(MEGATRON, a), replace(source, weights=read(source.weights), moments=moments)
