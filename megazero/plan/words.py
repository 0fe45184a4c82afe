"""An architecture in words: those of the command line, in both directions, and those of a checkpoint's index, which may
be a stranger's. Pure.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from math import isfinite
from typing import Any

from megazero.base import Form, UserError, checked, made
from megazero.plan.architecture import FREE, KINDS, Architecture
from megazero.plan.rope import SCALINGS, Rotary, Scaling
from megazero.settings import Config, Model, flagged

SIZE = range(1, 2**31)
ACTIVATIONS = {                         # activation -> the flags that say it
    "gelu": "", "gelu_tanh": "openai_gelu", "relu": "relu", "relu2": "squared_relu", "swiglu": "swiglu",
    "geglu": "geglu", "geglu_tanh": "geglu openai_gelu"}
OF_TYPE: dict[Any, Form] = {float: float, int: SIZE, bool: bool, str: str}
ROPE_TYPE = {"rope_type": re.compile("|".join(SCALINGS))}
ROTARY: Form = {"base": float, "channels": range(2, 2**31, 2), "scaling?": (None, [float], ROPE_TYPE)}
FIELDS: dict[str, Form] = {             # each field's form
    "layers": range(1, 10**5 + 1), "hidden": SIZE, "ffn": SIZE, "heads": SIZE, "kv_heads": SIZE, "head_dim": SIZE,
    "seq_length": SIZE, "vocab_size": SIZE, "learned_positions": range(2**31), "position_offset": range(2**31),
    "rotary": (None, ROTARY), "norm": re.compile("LayerNorm|RMSNorm"), "epsilon": float, "norm_plus_one": bool,
    "pre_norm": bool, "post_norm": bool, "parallel_residual": bool, "activation": re.compile("|".join(ACTIVATIONS)),
    "bias": bool, "qkv_bias": bool, "o_bias": bool, "norm_bias": bool, "qk_norm": re.compile("none|head|width"),
    "tied": bool, "init_std": float, "attention_dropout": float, "hidden_dropout": float, "window": range(2**31),
    "kinds": [re.compile("|".join(KINDS))], "local_base": float, "embedding_multiplier": float,
    "residual_multiplier": float, "attention_multiplier": float, "attention_softcap": float, "logits_scaling": float,
    "logits_softcap": float, "pad_rows": SIZE}
PLACEMENTS = {"before": (True, False), "after": (False, True), "both": (True, True)}    # of norms: pre_norm, post_norm
ARCHITECTURE: Form = {f.name + ("" if f.default is MISSING else "?"): FIELDS[f.name] for f in fields(Architecture)}

# field of a scaling -> the flag that says it
OF_SCALING = {"rope_type": "rope_scaling_type", "factor": "rope_scaling_factor",
              "original_max_position_embeddings": "rope_original_length",
              "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
              "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "mscale": "yarn_mscale",
              "mscale_all_dim": "yarn_mscale_all_dim", "attention_factor": "yarn_attention_factor",
              "truncate": "yarn_untruncated"}


# ---- what cannot be

def impossible(a: Architecture) -> Iterator[str]:
    """Why no decoder can be like this, though each of its fields has the form."""
    if a.heads % a.kv_heads:
        yield f"its {a.heads} heads cannot share {a.kv_heads} key-value heads"
    if 0 < a.learned_positions < a.seq_length:
        yield f"its sequences of {a.seq_length} have {a.learned_positions} positions"
    if a.epsilon <= 0 or a.init_std < 0 or not (0 <= a.attention_dropout < 1 and 0 <= a.hidden_dropout < 1):
        yield "its epsilon is not above 0, its deviation below 0, or a dropout not at least 0 and below 1"
    if a.norm == "RMSNorm" and a.norm_bias:
        yield "its norms are RMSNorm with biases"
    if a.qk_norm == "width" and a.norm != "RMSNorm":
        yield f"the norm over all heads together is a {a.norm}"
    if not (a.pre_norm or a.post_norm):
        yield "its layers have no norms"
    if min(a.attention_multiplier, a.attention_softcap, a.logits_softcap) < 0 or a.logits_scaling <= 0:
        yield "it multiplies, caps or divides by a number below 0, or divides by 0"
    if a.kinds and len(a.kinds) != a.layers:
        yield f"its {a.layers} layers have {len(a.kinds)} kinds"
    if a.local_base < 0:
        yield f"its local layers have the rotary base {a.local_base:g}"
    if a.rotary and not (a.rotary.base > 0 and a.rotary.channels % 2 == 0 and a.rotary.channels <= a.head_dim):
        yield f"its heads of {a.head_dim} cannot turn {a.rotary.channels} channels on the base {a.rotary.base:g}"
    if a.rotary and a.rotary.scaling and not stretches(a.rotary.scaling):
        yield f"its rotary scaling {a.rotary.scaling.rope_type} has a number that is not above 0, or not above another"
    elif a.rotary and a.rotary.base > 0 and not turns(a.rotary, a.seq_length):
        yield f"its rotary scaling cannot be on the base {a.rotary.base:g}"


def stretches(scaling: Scaling) -> bool:
    """Can frequencies be stretched so? Each number is above 0, but those of YaRN that may be left out."""
    zero = ("attention_factor", "mscale", "mscale_all_dim")
    low, high = next(((low, high) for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))
                      if hasattr(scaling, low)), ("", ""))
    numbers = {f.name: v for f in fields(scaling) if not isinstance(v := getattr(scaling, f.name), str | bool)}
    return (all(v > 0 or (name in zero and v == 0) for name, v in numbers.items())
            and (not low or numbers[low] < numbers[high]))


def turns(rotary: Rotary, length: int) -> bool:
    """Are its frequencies numbers? Of some channels: a stranger's heads may be of any width."""
    try:
        some = replace(rotary, channels=min(rotary.channels, 256))
        return all(isfinite(f) for f in (*some.frequencies(length), some.amplitude))
    except (ArithmeticError, ValueError):
        return False


# ---- what a configuration says

def architecture(config: Config, vocab_size: int) -> Architecture:
    """The decoder a configuration asks for. A size that nobody gives is 0: checks() tells it."""
    m = config.model
    layers, hidden, heads, length = (
        size or 0 for size in (m.num_layers, m.hidden_size, m.num_attention_heads, m.seq_length))
    head_dim = m.kv_channels or hidden // (heads or 1)
    channels = round(head_dim * min(1, max(0, m.rotary_percent))) // 2 * 2
    rope = m.position_embedding_type == "rope"
    rotary = Rotary(m.rotary_base, channels, scaling_of(m) if m.use_rope_scaling else None) if rope else None
    every, (pre, post) = not m.disable_bias_linear, PLACEMENTS[m.norm_placement]
    return Architecture(
        layers=layers, hidden=hidden, ffn=ffn_size(m), heads=heads, kv_heads=m.num_query_groups or heads,
        head_dim=head_dim, seq_length=length, vocab_size=vocab_size,
        learned_positions=(m.max_position_embeddings or length
                           if m.position_embedding_type == "learned_absolute" else 0),
        rotary=rotary, norm=m.normalization, epsilon=m.norm_epsilon,
        position_offset=m.position_offset if m.position_embedding_type == "learned_absolute" else 0,
        norm_plus_one=m.apply_layernorm_1p, pre_norm=pre, post_norm=post, parallel_residual=m.parallel_residual,
        activation=[word for word, given in ACTIVATIONS.items() if all(getattr(m, flag) for flag in given.split())][-1],
        bias=every or m.add_mlp_bias, qkv_bias=every or m.add_qkv_bias, o_bias=every or m.add_o_bias,
        norm_bias=m.normalization == "LayerNorm" and (every or m.add_norm_bias),
        qk_norm=m.qk_layernorm_over if m.qk_layernorm else "none",
        tied=not m.untie_embeddings_and_output_weights, init_std=m.init_method_std,
        attention_dropout=m.attention_dropout, hidden_dropout=m.hidden_dropout, window=m.attention_window or 0,
        kinds=kinds_of(m, layers), local_base=local_base(m.rope_local_base_freq or 0.0, rotary),
        embedding_multiplier=m.embedding_multiplier, residual_multiplier=m.residual_multiplier,
        attention_multiplier=usual_scale(m.attention_multiplier or 0.0, head_dim),
        attention_softcap=m.attn_logit_softcapping or 0.0, logits_scaling=m.logits_scaling,
        logits_softcap=m.final_logit_softcapping or 0.0,
        pad_rows=m.make_vocab_size_divisible_by)


def scaling_of(m: Model) -> Scaling:
    kind = SCALINGS[m.rope_scaling_type]
    return kind(**{f.name: _meant(f.name, getattr(m, OF_SCALING[f.name])) for f in fields(kind)})


def _meant(name: str, value: Any) -> Any:
    """The field of a scaling by its flag, or the flag by the field: one of them says the opposite."""
    return not value if name == "truncate" else value


def kinds_of(m: Model, layers: int) -> tuple[str, ...]:
    """By Megatron's two patterns. What cannot be read is none here: checks() tells it."""
    other, rope = m.attention_window or m.rope_local_base_freq, m.position_embedding_type == "rope"
    local = pattern(m.window_attn_skip_freq, layers, last=False) if m.window_attn_skip_freq and other else None
    still = pattern(m.no_rope_freq, layers, last=True) if m.no_rope_freq and rope else None
    if local is None and still is None:
        return ()
    return alike([("local" if local is None or local[i] else "full") + ("-nope" if still and still[i] else "")
                  for i in range(layers)])


def alike(kinds: Sequence[str]) -> tuple[str, ...]:
    """Kinds as an architecture says them."""
    return tuple(kinds) if any(word != "local" for word in kinds) else ()


def local_base(base: float, rotary: Rotary | None) -> float:
    """The base of local layers as an architecture says it: 0 where they turn as the others do."""
    return 0.0 if rotary is None or rotary == Rotary(base, rotary.channels) else base


def usual_scale(multiplier: float, head_dim: int) -> float:
    """The scale of scores as an architecture says it: 0 where it is the usual one."""
    return 0.0 if head_dim and multiplier == head_dim**-0.5 else multiplier


def pattern(text: str, layers: int, last: bool) -> list[bool] | None:
    """Of each layer a yes or no, as Megatron says it: N, of each N layers the last is `last` and the others are not; or
    a list such as [1,1,0] or ([1]*3+[0])*2, or 1,1,0. None for what is neither, or not of so many layers."""
    try:
        told = _listed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if layers not in FIELDS["layers"]:
        return None
    if isinstance(told, int):
        return [((i + 1) % told == 0) == last for i in range(layers)] if told > 0 else None
    return [bit == 1 for bit in told] if len(told) == layers and all(bit in (0, 1) for bit in told) else None


def _listed(node: ast.expr) -> Any:
    """A whole number, or a list of them, of an expression of sums and products. Raises ValueError."""
    match node:
        case ast.Constant(int(value)) if value < 10**5:
            return value
        case ast.List(parts) | ast.Tuple(parts):
            return [_listed(part) for part in parts]
        case ast.BinOp(left, ast.Add(), right) if isinstance(a := _listed(left), list):
            b = _listed(right)
            if isinstance(b, list):
                return a + b
        case ast.BinOp(left, ast.Mult(), right):
            a, b = _listed(left), _listed(right)
            if isinstance(a, list) and isinstance(b, int) and len(a) * b < 10**6:
                return a * b
    raise ValueError("not a list of whole numbers")


def told_pattern(bits: Sequence[bool]) -> str:
    """A list that `pattern` reads, without blanks."""
    return ",".join(str(int(bit)) for bit in bits)


def ffn_size(m: Model) -> int:
    """Width inside the MLP, by Megatron's rule where it is not given; 0 when nothing says it."""
    hidden = m.hidden_size or 0
    return m.ffn_hidden_size or (hidden * 8 // 3 // 64 * 64 if m.swiglu or m.geglu else 4 * hidden)


def flags(a: Architecture) -> dict[str, Any]:
    """The configuration that asks for this architecture: `architecture()` turned round. None: not to be said."""
    rope = a.rotary
    scaling = {OF_SCALING[name]: _meant(name, value)
               for name, value in (vars(rope.scaling) if rope and rope.scaling else {}).items()}
    positions = "learned_absolute" if a.learned_positions else "none"
    positions = "rope" if rope else positions
    biases = {"add_mlp_bias": a.bias, "add_qkv_bias": a.qkv_bias, "add_o_bias": a.o_bias}
    if a.norm == "LayerNorm":
        biases["add_norm_bias"] = a.norm_bias
    some = not all(biases.values())
    local, still = [word.startswith("local") for word in a.kinds], [word.endswith("nope") for word in a.kinds]
    used = ACTIVATIONS[a.activation].split()
    return {
        "num_layers": a.layers, "hidden_size": a.hidden, "ffn_hidden_size": a.ffn, "num_attention_heads": a.heads,
        "num_query_groups": a.kv_heads, "kv_channels": a.head_dim, "seq_length": a.seq_length,
        "vocab_size": a.vocab_size, "max_position_embeddings": a.learned_positions or None,
        "position_offset": a.position_offset, "position_embedding_type": positions,
        **({"rotary_base": rope.base, "rotary_percent": rope.channels / a.head_dim} if rope else {}),
        "use_rope_scaling": bool(scaling), **scaling, "attention_window": a.window or None,
        "window_attn_skip_freq": None if all(local) else told_pattern(local),
        "no_rope_freq": told_pattern(still) if any(still) else None, "rope_local_base_freq": a.local_base or None,
        "normalization": a.norm, "norm_epsilon": a.epsilon, "apply_layernorm_1p": a.norm_plus_one,
        "norm_placement": next(word for word, two in PLACEMENTS.items() if two == (a.pre_norm, a.post_norm)),
        "parallel_residual": a.parallel_residual, "embedding_multiplier": a.embedding_multiplier,
        "residual_multiplier": a.residual_multiplier, "attention_multiplier": a.attention_multiplier or None,
        "attn_logit_softcapping": a.attention_softcap or None, "logits_scaling": a.logits_scaling,
        "final_logit_softcapping": a.logits_softcap or None,
        **{flag: flag in used for flags in ACTIVATIONS.values() for flag in flags.split()},
        "disable_bias_linear": some, **{flag: some and given for flag, given in biases.items()},
        "qk_layernorm": a.qk_norm != "none", "qk_layernorm_over": "width" if a.qk_norm == "width" else "head",
        "untie_embeddings_and_output_weights": not a.tied, "init_method_std": a.init_std,
        "attention_dropout": a.attention_dropout, "hidden_dropout": a.hidden_dropout,
    }


def told_apart(a: Architecture, b: Architecture) -> list[tuple[str, str]]:
    """Two models by the flags in which they differ: (the first's, the second's). What changes no weights aside."""
    one, other = (flags(x) for x in (a, replace(b, **{key: getattr(a, key) for key in FREE})))
    both = [(flagged(name, one.get(name)), flagged(name, other.get(name))) for name in dict.fromkeys((*one, *other))]
    return [(mine, theirs) for mine, theirs in both if mine != theirs]


# ---- what an index says

def architecture_of(values: Any) -> Architecture:
    """The architecture that a checkpoint's index holds (`asdict`, after JSON made lists of tuples). A field that is not
    there is what it was before there was one. Raises UserError for fields that are not known here or cannot be."""
    what = "the checkpoint's architecture"
    try:
        told = before(checked(values, EARLIER, what))
        if told.get("rotary") is not None:
            told["rotary"] = rotary_of(told["rotary"])
        found = made(Architecture, {**told, "kinds": tuple(told.get("kinds", ()))}, {}, what)
    except ValueError as error:
        raise UserError(f"--load: {error}; load it with the version that wrote it.") from None
    for wrong in impossible(found):
        raise UserError(f"--load: {what} cannot be: {wrong}; load another checkpoint.")
    return found


EARLIER: Form = {**ARCHITECTURE, "qk_norm?": (bool, ARCHITECTURE["qk_norm?"])}


def before(values: Any) -> dict[str, Any]:
    """With what fields were before there were such: most are their default, some followed from others. A norm of q and
    k was over each head, or was not."""
    bias, qk = values.get("bias", True), values.get("qk_norm", "none")
    return {"o_bias": bias, "norm_bias": bias and values.get("norm", "LayerNorm") == "LayerNorm", **values,
            "qk_norm": {True: "head", False: "none"}.get(qk, qk)}


def rotary_of(values: Any) -> Rotary:
    """Of an index. Four numbers were Llama 3's scaling, before there were others. Raises ValueError."""
    what, scaling = "the checkpoint's rotary", values.get("scaling")
    if isinstance(scaling, list):
        if len(scaling) != 4:
            raise ValueError(f"{what} has a scaling of {len(scaling)} numbers, not 4")
        scaling = dict(zip(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                           scaling, strict=True)) | {"rope_type": "llama3"}
    return made(Rotary, {**values, "scaling": None if scaling is None else scaling_from(scaling, what)}, {}, what)


def scaling_from(values: Any, what: str) -> Scaling:
    """The scaling that these keys say. Raises ValueError."""
    kind = SCALINGS[values["rope_type"]]
    form = {f.name + ("" if f.default is MISSING else "?"): OF_TYPE[f.type] for f in fields(kind)}
    return made(kind, values, form, what)


