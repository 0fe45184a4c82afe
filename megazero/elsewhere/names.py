"""Tensors of other trainers in terms of ours, as rows of values that are read in both directions.

    stacked     ours along dimension 0, one after the other (of one: itself)
    grouped     Megatron's q, k, v: for each group of heads its queries, its key, its value
    transposed  the same, then transposed: [in, out]
    turned      rotary pairs that lie side by side, where ours are half a head apart (Llama's own layout)

A row is there if the model has one of its weights; it then holds those that the model has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch

from megazero.base import UserError, said
from megazero.elsewhere.source import Lazy, Source, Tensors
from megazero.plan import Architecture, Shape, architecture_of, shapes

Tensor = torch.Tensor


def sound(a: Architecture) -> Architecture:
    """The architecture, looked at as that of a checkpoint's index is. Raises ValueError, TypeError or UserError."""
    return architecture_of(json.loads(json.dumps(asdict(a))))


class NamedRow(NamedTuple):
    """`{}` is the number of the layer."""

    theirs: str
    ours: tuple[str, ...]
    form: str = "stacked"

    def of(self, layer: int) -> "NamedRow":
        return NamedRow(self.theirs.format(layer), tuple(n.format(layer) for n in self.ours), self.form)


def both(theirs: str, *ours: str, form: str = "stacked") -> tuple[NamedRow, ...]:
    """A weight and its bias."""
    return tuple(NamedRow(f"{theirs}.{kind}", tuple(f"{n}.{kind}" for n in ours), form) for kind in ("weight", "bias"))


AT, MLP = "layers.{}.attention", "layers.{}.mlp"
QKV, UP = tuple(f"{AT}.{n}" for n in "qkv"), (f"{MLP}.gate", f"{MLP}.up")
CORE = "decoder.layers.{}"
MEGATRON = (
    NamedRow("embedding.word_embeddings.weight", ("embedding.weight",)),
    NamedRow("embedding.position_embeddings.weight", ("positions.weight",)),
    *both(f"{CORE}.input_layernorm", f"{AT}.norm"), *both(f"{CORE}.self_attention.linear_qkv", *QKV, form="grouped"),
    *both(f"{CORE}.self_attention.q_layernorm", f"{AT}.q_norm"),
    *both(f"{CORE}.self_attention.k_layernorm", f"{AT}.k_norm"),
    *both(f"{CORE}.self_attention.linear_proj", f"{AT}.o"), *both(f"{CORE}.pre_mlp_layernorm", f"{MLP}.norm"),
    *both(f"{CORE}.mlp.linear_fc1", *UP), *both(f"{CORE}.mlp.linear_fc2", f"{MLP}.down"),
    *both("decoder.final_layernorm", "head.norm"), NamedRow("output_layer.weight", ("head.output.weight",)))
H = "transformer.h.{}"
NANOGPT = (
    NamedRow("transformer.wte.weight", ("embedding.weight",)),
    NamedRow("transformer.wpe.weight", ("positions.weight",)),
    *both(f"{H}.ln_1", f"{AT}.norm"), *both(f"{H}.attn.c_attn", *QKV), *both(f"{H}.attn.c_proj", f"{AT}.o"),
    *both(f"{H}.ln_2", f"{MLP}.norm"), *both(f"{H}.mlp.c_fc", f"{MLP}.up"), *both(f"{H}.mlp.c_proj", f"{MLP}.down"),
    *both("transformer.ln_f", "head.norm"), NamedRow("lm_head.weight", ("head.output.weight",)))
L = "layers.{}"
TORCHTITAN = (
    NamedRow("tok_embeddings.weight", ("embedding.weight",)), *both(f"{L}.attention_norm", f"{AT}.norm"),
    *both(f"{L}.attention.wq", f"{AT}.q", form="turned"), *both(f"{L}.attention.wk", f"{AT}.k", form="turned"),
    *both(f"{L}.attention.wv", f"{AT}.v"), *both(f"{L}.attention.wo", f"{AT}.o"),
    *both(f"{L}.attention.q_norm", f"{AT}.q_norm"), *both(f"{L}.attention.k_norm", f"{AT}.k_norm"),
    *both(f"{L}.ffn_norm", f"{MLP}.norm"), *both(f"{L}.feed_forward.w1", f"{MLP}.gate"),
    *both(f"{L}.feed_forward.w3", f"{MLP}.up"), *both(f"{L}.feed_forward.w2", f"{MLP}.down"),
    *both("norm", "head.norm"), NamedRow("output.weight", ("head.output.weight",)))


def named_rows(table: Sequence[NamedRow], a: Architecture) -> list[NamedRow]:
    """The rows of a model, each with those weights that it has."""
    there = shapes(a)
    single, layered = ([r for r in table if ("{}" in r.theirs) == of_layer] for of_layer in (False, True))
    every = [*single, *(r.of(i) for r in layered for i in range(a.layers))]     # layers may lie stacked in one tensor
    found = [r._replace(ours=tuple(n for n in r.ours if n in there)) for r in every]
    return [r for r in found if r.ours]


def their_shape(row: NamedRow, ours: Mapping[str, Shape]) -> Shape:
    shape = (sum(ours[n][0] for n in row.ours), *ours[row.ours[0]][1:])
    return shape[::-1] if row.form == "transposed" else shape


def parted(row: NamedRow, theirs: Tensor, a: Architecture, ours: Mapping[str, Shape]) -> list[Tensor]:
    """Theirs [rows, ...] as ours, in the row's order."""
    if row.form == "grouped":
        each = theirs.unflatten(0, (a.kv_heads, -1, a.head_dim))
        many = a.heads // a.kv_heads
        return [p.flatten(0, 2) for p in each.split((many, 1, 1), 1)]
    if row.form == "turned":
        return [theirs.unflatten(0, (-1, a.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)]
    theirs = theirs.T if row.form == "transposed" and theirs.dim() == 2 else theirs
    return list(theirs.split([ours[n][0] for n in row.ours]))


def put_together(row: NamedRow, ours: Sequence[Tensor], a: Architecture) -> Tensor:
    """`parted` turned round."""
    if row.form == "grouped":
        return torch.cat([t.unflatten(0, (a.kv_heads, -1, a.head_dim)) for t in ours], 1).flatten(0, 2)
    if row.form == "turned":
        return ours[0].unflatten(0, (-1, 2, a.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    stacked = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
    return stacked.T if row.form == "transposed" and stacked.dim() == 2 else stacked


PADDED = ("embedding.weight", "head.output.weight")     # theirs may have rows beyond the vocabulary


def as_ours(rows: Sequence[NamedRow], a: Architecture, theirs: Tensors, source: Source) -> Tensors:
    """Our weights of theirs. Raises UserError unless the two sides match, name by name and shape by shape."""
    ours, found, errors = shapes(a), Tensors(), list[str]()
    for row in rows:
        shape, lazy = their_shape(row, ours), theirs.get(row.theirs)
        if lazy is None:
            errors.append(f"--input {source.path}: has no {row.theirs}, which its model needs.")
            continue
        if row.ours[0] in PADDED and row.form == "stacked" and len(lazy.shape) == 2 and lazy.shape[0] > shape[0]:
            lazy = lazy.but(lambda t, n=shape[0]: t[:n], (shape[0], *lazy.shape[1:]))       # type: ignore[misc]
        if lazy.shape != shape:
            errors.append(f"--input {source.path}: {row.theirs} has shape {list(lazy.shape)}, its model needs "
                          f"{list(shape)}.")
            continue
        for i, name in enumerate(row.ours):
            found[name] = _part(row, i, lazy, a, ours)
    known = {row.theirs for row in rows}
    errors += [f"--input {source.path}: holds {said(name)}, which its model does not have." for name in theirs
               if name not in known]
    if errors:
        more = [f"--input {source.path}: and {len(errors) - 5} more like these."] if len(errors) > 5 else []
        raise UserError(*errors[:5], *more)
    return found


def _part(row: NamedRow, i: int, lazy: Lazy, a: Architecture, ours: Mapping[str, Shape]) -> Lazy:
    if len(row.ours) == 1 and row.form == "stacked":
        return lazy
    return lazy.but(lambda t: parted(row, t, a, ours)[i], ours[row.ours[i]])


def adopted(a: Architecture, rows: Sequence[NamedRow], source: Source) -> tuple[Tensors, dict[str, Tensors]]:
    """Our weights and moments. Moments that are not all there stay behind, and that is noted. Raises UserError."""
    weights, moments = as_ours(rows, a, source.weights, source), dict[str, Tensors]()
    try:
        moments = {kind: as_ours(rows, a, tensors, source) for kind, tensors in source.moments.items()}
    except UserError as error:
        source.notes.append(f"its optimizer's state stays behind: {error.sentences[0]}")
    return weights, moments
