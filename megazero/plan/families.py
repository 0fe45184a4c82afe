"""Model families of Hugging Face, as rows of values that are read in both directions.

    Field   a key of config.json      <->  a field of Architecture
    Row     one tensor of theirs      <->  one or several of ours, stacked along dimension 0,
                                           then transposed if it says so

A new family is one more entry of FAMILIES. Whether a family can express an architecture is not written down but tried:
Architecture -> config.json -> Architecture must give the same, and the rows must cover the weights. Pure.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from megazero.base import Form, UserError, checked, faults, made, said
from megazero.plan.architecture import ARCHITECTURE, FIELDS, FREE, SIZE, Architecture, Rotary, impossible, units

REQUIRED = object()                     # a key that config.json must have


class Field(NamedTuple):
    """`default` stands where the key is absent or null (of other fields, if a function);
    `words` are theirs -> ours, if they differ."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    words: Mapping[Any, Any] | None = None


class Row(NamedTuple):
    """`{}` is the number of the layer. A row is there if Architecture has what `when` names, or always."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    when: str = ""

    def of(self, layer: int) -> "Row":
        return self._replace(theirs=self.theirs.format(layer), ours=tuple(n.format(layer) for n in self.ours))


@dataclass(frozen=True)
class Family:
    """
    fixed       fields of ours that it has no key for
    only        keys of theirs that must have this value where they are given
    always      keys that an export writes as they are here
    partial     may a part of each head stay unrotated?
    """

    model_type: str
    class_name: str
    base: str                           # prefix that checkpoints of the bare model, without a head, leave out
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any]
    rows: tuple[Row, ...]
    buffers: str                        # pattern of tensors that are no weights: older files hold some
    always: Mapping[str, Any]
    partial: bool = False


def attention_rows(ours: str, theirs: str, kind: str, when: str) -> tuple[Row, ...]:
    return tuple(Row(f"{theirs}.{t}.{kind}", (f"{ours}.{o}.{kind}",), when=when)
                 for o, t in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")))


def mlp_rows(ours: str, theirs: str, kind: str, when: str) -> tuple[Row, ...]:
    return tuple(Row(f"{theirs}.{n}_proj.{kind}", (f"{ours}.{n}.{kind}",), when=when) for n in ("gate", "up", "down"))


def conv_rows(theirs: str, *ours: str) -> tuple[Row, ...]:
    """A Conv1D of GPT-2: a linear layer whose matrix is stored [in, out]."""
    return (Row(f"{theirs}.weight", tuple(f"{n}.weight" for n in ours), transpose=True),
            Row(f"{theirs}.bias", tuple(f"{n}.bias" for n in ours)))


def norm_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    return (Row(f"{theirs}.weight", (f"{ours}.weight",)), Row(f"{theirs}.bias", (f"{ours}.bias",)))


AT, MLP = "layers.{}.attention", "layers.{}.mlp"
H, LAYER = "transformer.h.{}", "model.layers.{}"

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "transformer.",
    fields=(
        Field("n_layer", "layers"), Field("n_embd", "hidden"), Field("n_head", "heads"),
        Field("vocab_size", "vocab_size"), Field("n_inner", "ffn", lambda v: 4 * v["hidden"]),
        Field("n_positions", "learned_positions"), Field("layer_norm_epsilon", "epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", True), Field("initializer_range", "init_std", 0.02),
        Field("activation_function", "activation", "gelu_new",
              {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}),
        Field("attn_pdrop", "attention_dropout", 0.1), Field("resid_pdrop", "hidden_dropout", 0.1),
        Field("embd_pdrop", "hidden_dropout", 0.1),
    ),
    fixed={"kv_heads": lambda v: v["heads"], "head_dim": lambda v: v["hidden"] // v["heads"],
           "seq_length": lambda v: v["learned_positions"], "rotary": None,
           "norm": "LayerNorm", "bias": True, "qkv_bias": True, "qk_norm": False},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
          "quantization_config": None},
    rows=(
        Row("transformer.wte.weight", ("embedding.weight",)), Row("transformer.wpe.weight", ("positions.weight",)),
        *norm_rows(f"{H}.ln_1", f"{AT}.norm"), *conv_rows(f"{H}.attn.c_attn", f"{AT}.q", f"{AT}.k", f"{AT}.v"),
        *conv_rows(f"{H}.attn.c_proj", f"{AT}.o"), *norm_rows(f"{H}.ln_2", f"{MLP}.norm"),
        *conv_rows(f"{H}.mlp.c_fc", f"{MLP}.up"), *conv_rows(f"{H}.mlp.c_proj", f"{MLP}.down"),
        *norm_rows("transformer.ln_f", "head.norm"), Row("lm_head.weight", ("head.output.weight",), when="untied"),
    ),
    buffers=r".*\.attn\.(masked_)?bias", always={})

LLAMA = Family(
    "llama", "LlamaForCausalLM", "model.",
    fields=(
        Field("num_hidden_layers", "layers"), Field("hidden_size", "hidden"), Field("intermediate_size", "ffn"),
        Field("num_attention_heads", "heads"), Field("num_key_value_heads", "kv_heads", lambda v: v["heads"]),
        Field("head_dim", "head_dim", lambda v: v["hidden"] // v["heads"]),
        Field("max_position_embeddings", "seq_length", 2048), Field("vocab_size", "vocab_size"),
        Field("rms_norm_eps", "epsilon", 1e-6), Field("tie_word_embeddings", "tied", False),
        Field("initializer_range", "init_std", 0.02), Field("hidden_act", "activation", "silu", {"silu": "swiglu"}),
        Field("attention_bias", "qkv_bias", False), Field("mlp_bias", "bias", False),
        Field("attention_dropout", "attention_dropout", 0.0), Field("rope_parameters", "rotary"),
    ),
    fixed={"learned_positions": 0, "norm": "RMSNorm", "qk_norm": False, "hidden_dropout": 0.0},
    only={"partial_rotary_factor": 1.0, "quantization_config": None},
    rows=(
        Row("model.embed_tokens.weight", ("embedding.weight",)),
        Row(f"{LAYER}.input_layernorm.weight", (f"{AT}.norm.weight",)),
        *attention_rows(AT, f"{LAYER}.self_attn", "weight", ""),
        *attention_rows(AT, f"{LAYER}.self_attn", "bias", "qkv_bias"),
        Row(f"{LAYER}.post_attention_layernorm.weight", (f"{MLP}.norm.weight",)),
        *mlp_rows(MLP, f"{LAYER}.mlp", "weight", ""), *mlp_rows(MLP, f"{LAYER}.mlp", "bias", "bias"),
        Row("model.norm.weight", ("head.norm.weight",)), Row("lm_head.weight", ("head.output.weight",), when="untied"),
    ),
    buffers=r".*rotary_emb\.inv_freq", always={})

NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}


def _llama_but(without: str, *more: Field) -> tuple[Field, ...]:
    """Llama's fields without some, which is said of a whole head at last."""
    *first, rope = (f for f in LLAMA.fields if f.theirs not in without.split())
    return *first, *more, rope


BIASES = tuple(r for r in LLAMA.rows if r.theirs.endswith(".bias"))
WEIGHTS = tuple(r for r in LLAMA.rows if r not in BIASES)

WINDOW = Field("sliding_window", "window", 0)

MISTRAL = replace(
    LLAMA, model_type="mistral", class_name="MistralForCausalLM", rows=WEIGHTS,
    fields=_llama_but("attention_bias mlp_bias max_position_embeddings",
                      Field("max_position_embeddings", "seq_length", 4096 * 32), WINDOW),
    fixed={**LLAMA.fixed, "bias": False, "qkv_bias": False})

# biases on q, k and v alone
QWEN2 = replace(
    LLAMA, model_type="qwen2", class_name="Qwen2ForCausalLM", always=NO_WINDOW,
    fields=_llama_but("attention_bias mlp_bias head_dim max_position_embeddings",
                      Field("max_position_embeddings", "seq_length", 32768)),
    fixed={**LLAMA.fixed, "bias": False, "qkv_bias": True, "head_dim": lambda v: v["hidden"] // v["heads"]},
    rows=(*WEIGHTS, *(r for r in BIASES if ".self_attn." in r.theirs and ".o_proj." not in r.theirs)))

# norms over each head of q and k
QWEN3 = replace(
    LLAMA, model_type="qwen3", class_name="Qwen3ForCausalLM", always=NO_WINDOW,
    fields=_llama_but("mlp_bias head_dim max_position_embeddings", Field("head_dim", "head_dim", 128),
                      Field("max_position_embeddings", "seq_length", 32768)),
    fixed={**LLAMA.fixed, "bias": False, "qk_norm": True},
    rows=(*WEIGHTS, *(r for r in BIASES if ".self_attn." in r.theirs),
          Row(f"{LAYER}.self_attn.q_norm.weight", (f"{AT}.q_norm.weight",)),
          Row(f"{LAYER}.self_attn.k_norm.weight", (f"{AT}.k_norm.weight",))))

# q, k, v in one matrix, gate and up in another
PHI3 = replace(
    LLAMA, model_type="phi3", class_name="Phi3ForCausalLM", partial=True,
    fields=_llama_but("attention_bias mlp_bias head_dim rms_norm_eps max_position_embeddings",
                      Field("rms_norm_eps", "epsilon", 1e-5), Field("resid_pdrop", "hidden_dropout", 0.0),
                      Field("embd_pdrop", "hidden_dropout", 0.0), Field("max_position_embeddings", "seq_length", 4096),
                      WINDOW),
    fixed={**{k: v for k, v in LLAMA.fixed.items() if k != "hidden_dropout"}, "bias": False, "qkv_bias": False,
           "head_dim": lambda v: v["hidden"] // v["heads"]},
    only={"quantization_config": None},
    rows=(*(r for r in WEIGHTS if not re.search(r"[qkv]_proj|gate_proj|up_proj", r.theirs)),
          Row(f"{LAYER}.self_attn.qkv_proj.weight", tuple(f"{AT}.{n}.weight" for n in "qkv")),
          Row(f"{LAYER}.mlp.gate_up_proj.weight", (f"{MLP}.gate.weight", f"{MLP}.up.weight"))))

# LayerNorm, biases everywhere, an MLP of two matrices
STARCODER2 = replace(
    LLAMA, model_type="starcoder2", class_name="Starcoder2ForCausalLM",
    fields=_llama_but(
        "attention_bias mlp_bias head_dim rms_norm_eps hidden_act tie_word_embeddings initializer_range "
        "max_position_embeddings",
        Field("norm_epsilon", "epsilon", 1e-5), Field("use_bias", "bias", True), Field("use_bias", "qkv_bias", True),
        Field("hidden_act", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}),
        Field("tie_word_embeddings", "tied", True), Field("initializer_range", "init_std", 0.018042),
        Field("residual_dropout", "hidden_dropout", 0.0), Field("embedding_dropout", "hidden_dropout", 0.0),
        Field("max_position_embeddings", "seq_length", 4096), WINDOW),
    fixed={**{k: v for k, v in LLAMA.fixed.items() if k != "hidden_dropout"}, "norm": "LayerNorm",
           "head_dim": lambda v: v["hidden"] // v["heads"]},
    rows=(Row("model.embed_tokens.weight", ("embedding.weight",)),
          *norm_rows(f"{LAYER}.input_layernorm", f"{AT}.norm"),
          *attention_rows(AT, f"{LAYER}.self_attn", "weight", ""),
          *attention_rows(AT, f"{LAYER}.self_attn", "bias", "bias"),
          *norm_rows(f"{LAYER}.post_attention_layernorm", f"{MLP}.norm"),
          Row(f"{LAYER}.mlp.c_fc.weight", (f"{MLP}.up.weight",)),
          Row(f"{LAYER}.mlp.c_proj.weight", (f"{MLP}.down.weight",)),
          Row(f"{LAYER}.mlp.c_fc.bias", (f"{MLP}.up.bias",), when="bias"),
          Row(f"{LAYER}.mlp.c_proj.bias", (f"{MLP}.down.bias",), when="bias"),
          *norm_rows("model.norm", "head.norm"), Row("lm_head.weight", ("head.output.weight",), when="untied")))

FAMILIES = {f.model_type: f for f in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, STARCODER2)}


# ---- config.json

def to_config(a: Architecture, family: Family) -> dict[str, Any]:
    """The config.json of an architecture. A value that the family has no word for is left out: `obstacles` finds it."""
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(a, field.ours)
        if field.ours == "rotary":
            config |= _rope_to_config(value or Rotary(10000.0, a.head_dim), a.head_dim if family.partial else None)
        elif field.words is None:
            config[field.theirs] = None if field.ours == "window" and not value else value
        else:
            words = [theirs for theirs, word in field.words.items() if word == value]
            config |= {field.theirs: words[0]} if words else {}
    return {**config, **family.always}


def from_config(config: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """The architecture that a config.json describes. Raises UserError for what this decoder cannot be."""
    found, family = _from_config(config)
    wrong = [*faults({**asdict(found), "rotary": None}, ARCHITECTURE), *impossible(found)]
    if wrong:
        raise UserError(f"config.json: is a model that cannot be: {'; '.join(wrong)}.")
    return found, family


def _from_config(config: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """The same, of numbers that may not go together."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(f"config.json: model_type {_word(config.get('model_type'))} is not known here; "
                        f"there are {', '.join(FAMILIES)}.")
    errors = [f"config.json: {k} is {said(config[k])}, this decoder has {'none' if v is None else v}; "
              "such a model cannot be imported." for k, v in family.only.items() if config.get(k, v) != v]
    values: dict[str, Any] = {"pad_rows": 128, **{k: v for k, v in family.fixed.items() if not callable(v)}}
    for field in family.fields:
        value = _value(config, field, values, errors, family)
        if values.setdefault(field.ours, value) != value:
            errors.append(f"config.json: {field.theirs} is {value} where another key that means the same here says "
                          f"{values[field.ours]}; make them equal.")
    if errors:
        raise UserError(*errors)
    values |= {k: v(values) if callable(v) else v for k, v in family.fixed.items()}
    if "window" not in values and (window := _window(config, values["seq_length"])) is not None:
        raise UserError(f"config.json: sliding_window is {window}, less than its {values['seq_length']:,} positions, "
                        "and this decoder's tokens see all before them; such a model cannot be imported.")
    return Architecture(**values), family


def _window(config: Mapping[str, Any], length: int) -> int | None:
    """Tokens that each sees before it, where that is fewer than there are."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", True) or not isinstance(window, int) or isinstance(window, bool):
        return None
    return window if window < length else None


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 40 else said(value)


def _value(config: Mapping[str, Any], field: Field, values: Mapping[str, Any], errors: list[str],
           family: Family) -> Any:
    """One field of ours, checked; appends what is wrong with it."""
    if field.ours == "rotary":
        width = values["head_dim"] if "head_dim" in values else family.fixed["head_dim"](values)
        return _rope_from_config(config, width, errors, family.partial)
    value = config.get(field.theirs)
    if value is None:
        value = field.default(values) if callable(field.default) else field.default
    if value is REQUIRED:
        errors.append(f"config.json: {field.theirs} is missing.")
        return 1
    if field.words is not None:
        if not isinstance(value, str) or value not in field.words:
            errors.append(f"config.json: {field.theirs} {_word(value)} is not known here; "
                          f"there are {', '.join(field.words)}.")
            return value
        return field.words[value]
    wrong = [f"config.json: {fault}." for fault in faults(value, FIELDS[field.ours], field.theirs)]
    errors += wrong
    if wrong:
        return 1
    return float(value) if FIELDS[field.ours] is float else value


def _rope_to_config(rotary: Rotary, width: int | None) -> dict[str, Any]:
    """Both forms: transformers reads rope_parameters from version 5 on, rope_theta and rope_scaling before. `width` of
    a head, where the family may rotate a part of it."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    stretched = rotary.scaling and not width                    # such families know others
    scaling = {"rope_type": "llama3", **dict(zip(names, rotary.scaling or (), strict=True))} if stretched else None
    part = {"partial_rotary_factor": rotary.channels / width} if width else {}
    return {"rope_theta": rotary.base, "rope_scaling": scaling, **part,
            "rope_parameters": {"rope_theta": rotary.base, **(scaling or {"rope_type": "default"}), **part}}


ROPE: Form = {"rope_theta?": float, "rope_type?": str, "type?": str}
ROPES: Form = {"rope_scaling?": (None, ROPE), "rope_parameters?": (None, ROPE), "rope_theta?": (None, float)}
SCALING: Form = {"factor": float, "low_freq_factor": float, "high_freq_factor": float,
                 "original_max_position_embeddings": SIZE}


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    """Where both forms say something, and not the same: readers differ on which counts."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    old = {"rope_theta": config.get("rope_theta"), **({"rope_type": old.get("type", "default"), **old} if old else {})}
    return [f"rope_parameters: {key} is {said(new[key])}, elsewhere {said(old[key])}; let both say the same"
            for key in new.keys() & old.keys() - {"type"} if old[key] is not None and old[key] != new[key]]


def _rope_from_config(config: Mapping[str, Any], width: int, errors: list[str], partial: bool) -> Rotary:
    """Both forms, of heads so wide; appends what is wrong with it."""
    wrong = list(faults(config, ROPES)) or _contradictions(config)
    told = {} if wrong else {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base, kind = (told.get("rope_theta", config.get("rope_theta") or 10000.0),
                  told.get("rope_type", told.get("type", "default")))
    if kind == "llama3" and not partial:
        wrong += faults(told, SCALING, "rope_parameters")
    elif kind != "default":
        known = "default" if partial else "default, llama3"
        wrong.append(f"rope_parameters: rope_type {_word(kind)} is not known here; there are {known}")
    part = told.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if not isinstance(part, int | float) or not 0 < part <= 1 or (part != 1 and not partial):
        wrong.append(f"partial_rotary_factor: is {said(part)}, this decoder has 1.0; such a model cannot be imported")
    errors += [f"config.json: {fault}." for fault in wrong]
    if wrong:
        return Rotary(1.0, width)
    channels = int(width * part)
    scaling = (float(told["factor"]), float(told["low_freq_factor"]), float(told["high_freq_factor"]),
               told["original_max_position_embeddings"]) if kind == "llama3" else None
    return Rotary(float(base), channels, scaling)


# ---- which family, which rows

def rows(a: Architecture, family: Family) -> list[Row]:
    """The family's rows for this architecture: those without a layer, then layer by layer."""
    there = {"": True, "untied": not a.tied, "qkv_bias": a.qkv_bias, "bias": a.bias}
    mine = [r for r in family.rows if there[r.when]]
    single, layered = [r for r in mine if "{}" not in r.theirs], [r for r in mine if "{}" in r.theirs]
    return [*single, *(r.of(i) for i in range(a.layers) for r in layered)]


def shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """name -> shape of every weight."""
    return {p.name: p.shape for u in units(a) for p in u.parameters}


def zeros(name: str, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a bias that the family has and the model has not: it is zero there. None: no such bias."""
    return ours[name.replace(".bias", ".weight")][:1] if name.endswith(".bias") and name not in ours else None


def obstacles(a: Architecture, family: Family) -> list[str]:
    """What keeps this family from expressing this architecture exactly;
    biases it has beyond the model's are no obstacle."""
    a = replace(a, layers=1)                                    # one is like the other
    back, ours = _from_config(to_config(a, family))[0], shapes(a)
    theirs = [name for row in rows(a, family) for name in row.ours]
    said = asdict(a)
    different = [f"{k.replace('_', ' ')} is {said[k]}, {family.model_type} has {v}" for k, v in asdict(back).items()
                 if k not in FREE and said[k] != v and not (k in ("bias", "qkv_bias") and v)]
    if different:
        return different
    homeless = [f"{family.model_type} has no place for {n}" for n in ours if n not in theirs]
    missing = [f"{family.model_type} needs {n}" for n in theirs if n not in ours and zeros(n, ours) is None]
    return [*homeless[:1], *missing[:1]]


def nearest_family(a: Architecture, before: str | None = None) -> tuple[Family, list[str]]:
    """The family that the weights were imported from, if it still expresses this architecture; else the first that does
    with the fewest biases beyond the model's; else the one with the fewest obstacles. And those."""
    found = [(family, obstacles(a, family)) for family in FAMILIES.values()]
    ours = shapes(replace(a, layers=1))

    def rank(each: tuple[Family, list[str]]) -> tuple[int, bool, int]:
        family, reasons = each
        beyond = [n for row in rows(replace(a, layers=1), family) for n in row.ours if n not in ours]
        return len(reasons), not reasons and family.model_type != before, 0 if reasons else len(beyond)

    return min(found, key=rank)


def family_of(a: Architecture, before: str | None = None) -> Family:
    """The family that expresses this architecture; `before` is the model_type that its weights had. Raises UserError
    saying what is in the way of the nearest."""
    family, reasons = nearest_family(a, before)
    if reasons:
        raise UserError(f"--load: no Hugging Face family known here ({', '.join(FAMILIES)}) can express this model: "
                        f"{'; '.join(reasons)}.")
    return family


def architecture_of(values: Any) -> Architecture:
    """The architecture that a checkpoint's index holds (`asdict`, after JSON made lists of tuples). A field that is not
    there is what it was before there was one: its default. Raises UserError for fields that are not known here or
    cannot be."""
    what = "the checkpoint's architecture"
    try:
        rotary = checked(values, ARCHITECTURE, what).get("rotary")
        if rotary is not None:
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in rotary.items()}
            rotary = made(Rotary, plain, {}, "the checkpoint's rotary")
        found = made(Architecture, {**values, "rotary": rotary}, {}, what)
    except ValueError as error:
        raise UserError(f"--load: {error}; load it with the version that wrote it.") from None
    for wrong in impossible(found):
        raise UserError(f"--load: {what} cannot be: {wrong}; load another checkpoint.")
    return found


def flags(a: Architecture) -> dict[str, Any]:
    """The configuration that asks for this architecture: `architecture()` turned round."""
    rope = a.rotary
    scaling = dict(zip(("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"),
                       rope.scaling, strict=True)) if rope and rope.scaling else {}
    positions = "learned_absolute" if a.learned_positions else "none"
    positions = "rope" if rope else positions
    return {
        "num_layers": a.layers, "hidden_size": a.hidden, "ffn_hidden_size": a.ffn, "num_attention_heads": a.heads,
        "num_query_groups": a.kv_heads, "kv_channels": a.head_dim,
        "seq_length": a.seq_length, "vocab_size": a.vocab_size,
        **({"max_position_embeddings": a.learned_positions} if a.learned_positions else {}),
        "position_embedding_type": positions,
        **({"rotary_base": rope.base, "rotary_percent": rope.channels / a.head_dim} if rope else {}),
        "use_rope_scaling": bool(scaling), **scaling, "normalization": a.norm, "norm_epsilon": a.epsilon,
        "swiglu": a.activation == "swiglu", "squared_relu": a.activation == "relu2",
        "openai_gelu": a.activation == "gelu_tanh", "disable_bias_linear": not a.bias,
        "add_qkv_bias": a.qkv_bias and not a.bias, "qk_layernorm": a.qk_norm,
        "untie_embeddings_and_output_weights": not a.tied, "init_method_std": a.init_std,
        "attention_dropout": a.attention_dropout, "hidden_dropout": a.hidden_dropout,
        **({"attention_window": a.window} if a.window else {}),
    }
