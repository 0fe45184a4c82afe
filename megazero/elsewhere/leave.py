"""One of our checkpoints in the names and the order of other trainers. What is written to a file is the caller's: here
is which tensor goes where.

Tensors of a file go through a scratch file beside it, which is mapped: torch writes all of a file at once, and memory
holds one of them at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError
from megazero.elsewhere.megatron import LAYER, SHARED
from megazero.elsewhere.names import (
    MEGATRON,
    NANOGPT,
    PADDED,
    TORCHTITAN,
    NamedRow,
    named_rows,
    put_together,
    their_shape,
)
from megazero.elsewhere.source import Lazy, Tensors, side_by_side
from megazero.plan import FREE, Architecture, Llama3, Rotary, shapes, told_apart
from megazero.state import Reader

Tensor = torch.Tensor
Told = Callable[[int, int], None]


def theirs(reader: Reader, rows: Sequence[NamedRow], dtype: torch.dtype | None = None) -> Tensors:
    """The tensors of these rows, of a checkpoint of ours. Raises UserError for what a checkpoint lacks, or fp16 cannot
    hold."""
    a, ours = reader.architecture, shapes(reader.architecture)
    if lost := next((n for n in ours if reader.shapes.get(("weight", n)) != ours[n]), None):
        raise UserError(f"{reader.folder}: has no weight/{lost} of shape {list(ours[lost])}, which its architecture "
                        "asks for.")
    known = {n for row in rows for n in row.ours}
    if homeless := next((n for n in ours if n not in known), None):
        raise UserError(f"--to: that format has no place for {homeless}.")

    def read(row: NamedRow) -> Tensor:
        made = put_together(row, [reader.read("weight", n) for n in row.ours], a)
        out = made.to(dtype or made.dtype)
        if dtype == torch.float16 and not out.isfinite().all() and made.isfinite().all():
            raise UserError(f"--dtype fp16: {row.theirs} holds {made.abs().max().item():g}, more than fp16 can hold; "
                            "write bf16 or fp32.")
        return out.contiguous()

    return {row.theirs: Lazy(their_shape(row, ours), dtype or reader.dtype("weight", row.ours[0]), partial(read, row))
            for row in rows}


def mapped(tensors: Tensors, scratch: Path, told: Callable[[int], None]) -> dict[str, Tensor]:
    """The tensors, read one by one into a file and mapped from there. `told` hears the bytes of each."""
    found, starts, at = {}, {}, 0
    for name, t in tensors.items():
        starts[name], at = at, ceil((at + prod(t.shape) * t.dtype.itemsize) / 64) * 64
    whole = torch.from_file(str(scratch), shared=True, size=max(at, 1), dtype=torch.uint8)
    for name, t in tensors.items():
        size = prod(t.shape) * t.dtype.itemsize
        found[name] = whole[starts[name]:starts[name] + size].view(t.dtype).view(t.shape)
        t.fill(found[name])
        told(size)
    return found


# ---- who can be said in which format

SIZES = "layers hidden ffn heads kv_heads head_dim seq_length vocab_size epsilon"


def cannot_say(a: Architecture, format_: str, says: str, **fixed: Any) -> None:
    """Raises UserError where the model is not as the format has it, which `says` these fields; the others are `fixed`,
    or as a decoder has them that does not name them."""
    wanted = {f.name: fixed.get(f.name, f.default) for f in fields(Architecture)
              if f.name in fixed or f.name not in (*FREE, *SIZES.split(), *says.split())}
    wrong = [f"{mine}, there {theirs}" for mine, theirs in told_apart(a, replace(a, **wanted))]
    if wrong:
        raise UserError(f"--to {format_}: that format cannot say this model: {'; '.join(wrong)}.")


def nanogpt_rows(a: Architecture) -> tuple[list[NamedRow], dict[str, Any]]:
    """Its rows and model_args. Raises UserError."""
    cannot_say(a, "nanogpt", "bias", kv_heads=a.heads, head_dim=a.hidden // a.heads, ffn=4 * a.hidden, epsilon=1e-5,
               qkv_bias=a.bias, o_bias=a.bias, norm_bias=a.bias, learned_positions=a.learned_positions or a.seq_length)
    return named_rows(NANOGPT, a), {
        "n_layer": a.layers, "n_head": a.heads, "n_embd": a.hidden, "block_size": a.learned_positions, "bias": a.bias,
        "vocab_size": a.vocab_size, "dropout": a.hidden_dropout}


def torchtitan_rows(a: Architecture) -> list[NamedRow]:
    """Raises UserError."""
    turns = replace(a.rotary, channels=a.head_dim) if a.rotary else Rotary(10000.0, a.head_dim)
    cannot_say(a, "dcp", "qkv_bias tied", qk_norm="none" if a.qk_norm == "none" else "head", norm="RMSNorm",
               norm_bias=False, activation="swiglu", bias=False, o_bias=False,
               rotary=turns)
    return named_rows(TORCHTITAN, a)


# ---- Megatron

# the norms of Transformer Engine's fused layers
FUSED = (("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
         ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))
LINEAR = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def fused(name: str) -> str:
    for plain, new in FUSED:
        name = name.replace(plain, new)
    return name


def megatron_rows(a: Architecture) -> list[NamedRow]:
    """Raises UserError."""
    says = "learned_positions rotary norm norm_plus_one activation bias qkv_bias qk_norm tied window"
    cannot_say(a, "megatron", says, norm_bias=a.norm == "LayerNorm", o_bias=a.bias)
    if a.rotary and a.rotary.scaling and not isinstance(a.rotary.scaling, Llama3):
        raise UserError("--to megatron: its rotary scaling is Llama 3's alone, this model's is another.")
    if a.activation not in ("gelu", "gelu_tanh", "relu2", "swiglu") or a.qk_norm == "width":
        raise UserError(f"--to megatron: has no {a.activation} with a norm of q and k over {a.qk_norm}; it has GELU, "
                        "squared ReLU and SwiGLU, and norms over each head.")
    return named_rows(MEGATRON, a)


def arguments_of(a: Architecture, tp: int, pp: int, step: int, samples: int) -> dict[str, Any]:
    """The model in Megatron's arguments."""
    positions = "rope" if a.rotary else "learned_absolute" if a.learned_positions else "none"
    scaling = {"use_rope_scaling": True, "rope_scaling_factor": a.rotary.scaling.factor} if (
        a.rotary and isinstance(a.rotary.scaling, Llama3)) else {"use_rope_scaling": False}
    return {
        "num_layers": a.layers, "hidden_size": a.hidden, "ffn_hidden_size": a.ffn, "num_attention_heads": a.heads,
        "group_query_attention": a.kv_heads != a.heads, "num_query_groups": a.kv_heads, "kv_channels": a.head_dim,
        "seq_length": a.seq_length, "max_position_embeddings": a.learned_positions or a.seq_length,
        "position_embedding_type": positions, "rotary_base": int(a.rotary.base) if a.rotary else 10000, **scaling,
        "rotary_percent": a.rotary.channels / a.head_dim if a.rotary else 1.0, "normalization": a.norm,
        "norm_epsilon": a.epsilon, "layernorm_epsilon": a.epsilon, "swiglu": a.gated,
        "squared_relu": a.activation == "relu2", "openai_gelu": a.activation == "gelu_tanh", "bias_gelu_fusion": False,
        "add_bias_linear": a.bias, "add_qkv_bias": a.qkv_bias and not a.bias, "qk_layernorm": a.qk_norm == "head",
        "apply_layernorm_1p": a.norm_plus_one,
        "untie_embeddings_and_output_weights": not a.tied, "init_method_std": a.init_std,
        "attention_dropout": a.attention_dropout, "hidden_dropout": a.hidden_dropout,
        "window_size": (a.window - 1, 0) if a.window else None, "vocab_size": a.vocab_size,
        "padded_vocab_size": padded(a, tp), "make_vocab_size_divisible_by": a.pad_rows, "num_experts": None,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "iteration": step,
        "consumed_train_samples": samples}


def padded(a: Architecture, tp: int) -> int:
    """Rows of the vocabulary that Megatron stores."""
    return ceil(a.vocab_size / (a.pad_rows * tp)) * a.pad_rows * tp


def with_padding(tensors: Tensors, a: Architecture, rows: Sequence[NamedRow], tp: int) -> Tensors:
    """Zeros below the vocabulary, as many as Megatron stores."""
    more, found = padded(a, tp) - a.vocab_size, dict(tensors)
    for row in rows:
        if row.ours[0] in PADDED and more:
            t = tensors[row.theirs]
            pad = Lazy((more, *t.shape[1:]), t.dtype, partial(torch.zeros, (more, *t.shape[1:]), dtype=t.dtype))
            found[row.theirs] = side_by_side([t, pad])
    return found


def on_rank(whole: Tensors, a: Architecture, rank: int, tp: int, stage: int, pp: int) -> Tensors:
    """What a tensor-parallel rank of a stage holds of Megatron's tensors, layers numbered within the stage."""
    each, found = a.layers // pp, Tensors()
    for name, t in whole.items():
        number = LAYER.search(name)
        at = int(number[0]) // each if number else 0 if name.startswith("embedding.") else pp - 1
        if at == stage:
            found[LAYER.sub(lambda m: str(int(m[0]) % each), name)] = _cut(name, t, a, rank, tp)
    if a.tied and 0 < stage == pp - 1:                         # the last stage has a copy of the embedding
        table = whole["embedding.word_embeddings.weight"]
        found["output_layer.weight"] = _cut("output_layer.weight", table, a, rank, tp)
    return found


def _cut(name: str, t: Lazy, a: Architecture, rank: int, tp: int) -> Lazy:
    dim = next((d for end, d in SHARED.items() if name.endswith(end)), None)
    if dim is None or tp == 1:
        return t
    shape = tuple(n // tp if d == dim else n for d, n in enumerate(t.shape))
    if "linear_fc1" in name and a.gated:
        return t.but(lambda x: torch.cat([half.chunk(tp)[rank] for half in x.chunk(2)]), shape)
    return t.but(lambda x: x.chunk(tp, dim)[rank].contiguous(), shape)


def divisible_by(a: Architecture, tp: int, pp: int) -> None:
    """Raises UserError for ranks that cannot share the model."""
    for flag, ranks, size, what in (("--tp", tp, a.kv_heads, "key-value heads"),
                                    ("--tp", tp, a.ffn, "channels of its MLP"), ("--pp", pp, a.layers, "layers")):
        if ranks < 1 or size % ranks:
            raise UserError(f"{flag} {ranks}: cannot share {size} {what} evenly; write a divisor.")


def stacked(name: str) -> tuple[str, int | None]:
    """The name of torch_dist's tensor that holds this one, by those of Transformer Engine's layers; if it is one of
    [layers, ...], which of them."""
    number = LAYER.search(name)
    return fused(LAYER.sub("", name, count=1).replace("layers..", "layers.")), int(number[0]) if number else None
