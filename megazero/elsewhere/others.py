"""Checkpoints of nanoGPT, of torchtitan and what else torch.distributed.checkpoint wrote, and of Hugging Face's names:
which weights they hold, with which moments, and what they say of their model."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError, printable
from megazero.elsewhere.dcp import Distributed
from megazero.elsewhere.names import NANOGPT, TORCHTITAN, NamedRow, named_rows, sound
from megazero.elsewhere.source import Read, Source, Tensors, here, words_of
from megazero.plan import Architecture, Rotary, from_config, obstacles, rows

Tensor = torch.Tensor
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?=\.)")
MOMENTS = ("exp_avg", "exp_avg_sq")


def bare(name: str) -> str:
    """A name without what compiling or wrapping its module put into it."""
    return WRAPPERS.sub("", name).lstrip(".")


# ---- nanoGPT

def nanogpt_source(path: Path, content: Any) -> Source:
    """What a ckpt.pt holds. Raises UserError."""
    kept = words_of(content)
    if not isinstance(kept.get("model"), Mapping) or not isinstance(kept.get("model_args"), Mapping):
        raise UserError(f"--input {path}: is no checkpoint of nanoGPT, which holds model and model_args; name a folder "
                        "if it is a part of another's.")
    weights = {bare(name): here(t) for name, t in kept["model"].items() if isinstance(t, Tensor)}
    weights = {name: t for name, t in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    trained = {name: t for name, t in weights.items() if name != "lm_head.weight"}      # it is wte's, once more
    moments = by_number(kept.get("optimizer"), [[n for n, t in trained.items() if (len(t.shape) > 1) == matrix]
                                                for matrix in (True, False)], trained)
    step, config = kept.get("iter_num", 0), words_of(kept.get("config"))
    samples = [config.get("batch_size"), config.get("gradient_accumulation_steps", 1), step]
    known = all(isinstance(n, int) for n in samples)
    return Source(path, trained, moments, words_of(kept["model_args"]), step if isinstance(step, int) else 0,
                  samples[0] * samples[1] * samples[2] if known else 0,
                  [] if moments else ["its optimizer's state is not in an order that is known here"])


def by_number(optimizer: Any, groups: list[list[str]], weights: Tensors) -> dict[str, Tensors]:
    """The moments of torch's AdamW, which numbers parameters by group; nothing where those are not the weights'."""
    said = words_of(optimizer)
    states, of = said.get("state"), said.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(of, list):
        return {}
    numbers = [n for group in map(words_of, of) for n in group.get("params", [])]
    names = [name for group in groups for name in group]
    if len(numbers) != len(names):
        return {}
    found: dict[str, Tensors] = {kind: {} for kind in MOMENTS}
    for kind in MOMENTS:
        for number, name in zip(numbers, names, strict=True):
            tensor = words_of(states.get(number)).get(kind)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != weights[name].shape:
                return {}
            found[kind][name] = here(tensor)
    return found


def of_nanogpt(source: Source) -> tuple[Architecture, list[NamedRow]]:
    """The decoder that model_args describe, with nn.GELU as nanoGPT has it since 2023. Raises UserError."""
    said = source.words
    try:
        hidden, heads, length = said["n_embd"], said["n_head"], said["block_size"]
        biased, dropout = bool(said.get("bias", True)), float(said.get("dropout") or 0)
        a = Architecture(layers=said["n_layer"], hidden=hidden, ffn=4 * hidden, heads=heads, kv_heads=heads,
                         head_dim=hidden // heads, seq_length=length, vocab_size=said["vocab_size"] or 50257,
                         learned_positions=length, bias=biased, qkv_bias=biased, o_bias=biased, norm_bias=biased,
                         hidden_dropout=dropout, attention_dropout=dropout)
        a = sound(a)
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        raise UserError(f"--input {source.path}: its model_args cannot be ({printable(str(error), 200)}).") from None
    return a, named_rows(NANOGPT, a)


# ---- DCP

STATE = re.compile(r"(?:optim\w*\.)?(?:optim\w*\.)?state\.(.+)\.(exp_avg|exp_avg_sq)")
TRAINING = re.compile(r"(optim|lr_scheduler|scheduler|dataloader|train_state|param_groups|state\.|rng).*")
STEPS = re.compile(r"train_state\.step|step|.*state\.(.+)\.step")


def dcp_source(folder: Path, found: Distributed) -> Source:
    """What a distributed checkpoint of a state_dict holds. Raises UserError."""
    weights, moments, steps = Tensors(), dict[str, Tensors](), []
    for name, lazy in found.tensors.items():
        if match := STATE.fullmatch(name):
            moments.setdefault(match[2], {})[bare(match[1])] = lazy
        elif STEPS.fullmatch(name):
            steps.append(name)
        elif not TRAINING.fullmatch(name):
            weights[bare(name)] = lazy
    shared = "model."
    if all(name.startswith(shared) for name in weights) and any("tok_embeddings" in name for name in weights):
        weights = {name.removeprefix(shared): t for name, t in weights.items()}
        moments = {kind: {n.removeprefix(shared): t for n, t in of.items()} for kind, of in moments.items()}
    step = 0
    if steps:
        value = found.tensors[min(steps, key=len)].read()
        step = int(value.reshape(-1)[0]) if value.numel() else 0
    left = [] if moments else ["it holds no moments of an optimizer that are known here"]
    weights = {name: t for name, t in weights.items() if not name.endswith(("freqs_cis", "inv_freq", "rope.cache"))}
    return Source(folder, weights, moments, {}, step, 0, left)


def of_torchtitan(source: Source, heads: int | None, base: float | None, epsilon: float,
                  length: int) -> tuple[Architecture, list[NamedRow]]:
    """Llama by torchtitan's names, whose sizes its shapes say, but for those given. Raises UserError."""
    shape = {name: t.shape for name, t in source.weights.items()}
    if heads is None or base is None:
        missing = " and ".join(["--num-attention-heads"] * (heads is None) + ["--rotary-base"] * (base is None))
        raise UserError(f"--input {source.path}: the shapes of its weights do not say {missing}; give what it was "
                        "trained with, or --hf-config config.json.")
    try:
        vocab, hidden = shape["tok_embeddings.weight"]
        width = hidden // heads
        if width * heads != hidden:
            raise ValueError(f"they do not divide its width of {hidden}")
        a = Architecture(
            layers=len({n.split(".")[1] for n in shape if n.startswith("layers.")}), hidden=hidden, heads=heads,
            ffn=shape["layers.0.feed_forward.w1.weight"][0], kv_heads=shape["layers.0.attention.wk.weight"][0] // width,
            head_dim=width, seq_length=length, vocab_size=vocab, rotary=Rotary(base, width), norm="RMSNorm",
            epsilon=epsilon, activation="swiglu", bias=False, o_bias=False, norm_bias=False,
            qkv_bias="layers.0.attention.wq.bias" in shape, tied="output.weight" not in shape,
            qk_norm="head" if "layers.0.attention.q_norm.weight" in shape else "none")
        a = sound(a)
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError) as error:
        raise UserError(f"--input {source.path}: cannot be a Llama of --num-attention-heads {heads} "
                        f"({printable(str(error), 200)}).") from None
    return a, named_rows(TORCHTITAN, a)


# ---- names of Hugging Face

def bin_source(folder: Path, read: Read) -> Source:
    """What the pytorch_model*.bin of a Hugging Face folder hold. Raises UserError."""
    weights: Tensors = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        for name, tensor in words_of(read(path)).items():
            if not isinstance(tensor, Tensor) or name in weights:
                raise UserError(f"{path}: {printable(name, 100)} is no tensor, or in another file too; fetch it again.")
            weights[name] = here(tensor)
    return Source(folder, weights)


def of_hugging_face(source: Source, config: Mapping[str, Any]) -> tuple[Architecture, list[NamedRow], Source]:
    """The decoder of a config.json, and its rows; the source without buffers, by the family's full names. Raises
    UserError."""
    a, family = from_config(config)
    if reasons := obstacles(a, family):
        raise UserError(f"--hf-config: is a model that this decoder cannot be: {'; '.join(reasons)}.")
    if a.layers > len(source.weights):                          # before a row is made for each
        raise UserError(f"--hf-config: asks for {a.layers:,} layers, {source.path} holds {len(source.weights):,} "
                        "tensors; give the config.json of this model.")
    every = [NamedRow(r.theirs, r.ours, "transposed" if r.transpose else "stacked") for r in rows(a, family)]
    known = {r.theirs for r in every}

    def named(tensors: Tensors) -> Tensors:
        tensors = {bare(name): t for name, t in tensors.items()}
        full = {name if name in known or family.base + name not in known else family.base + name: t
                for name, t in tensors.items()}
        return {name: t for name, t in full.items() if not re.fullmatch(family.buffers, name)
                and not (a.tied and name == "lm_head.weight")}

    moments = {kind: named(tensors) for kind, tensors in source.moments.items()}
    return a, every, replace(source, weights=named(source.weights), moments=moments)
