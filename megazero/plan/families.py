"""Model families of Hugging Face, as rows of values that are read in both directions.

    Field   a key of config.json      <->  a field of Architecture
    Row     one tensor of theirs      <->  one or several of ours, stacked along dimension 0,
                                           then transposed if it says so

A new family is one more entry of FAMILIES. Whether a family can express an architecture is not written down but tried:
Architecture -> config.json -> Architecture must give the same, and the rows must cover the weights. Pure.
"""

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
    """`fixed`: fields of ours that it has no key for.
    `only`: keys of theirs that must have this value where they are given."""

    model_type: str
    class_name: str
    base: str                           # prefix that checkpoints of the bare model, without a head, leave out
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any]
    rows: tuple[Row, ...]
    buffers: str                        # pattern of tensors that are no weights: older files hold some


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
    buffers=r".*\.attn\.(masked_)?bias")

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
    buffers=r".*rotary_emb\.inv_freq")

FAMILIES = {f.model_type: f for f in (GPT2, LLAMA)}


# ---- config.json

def to_config(a: Architecture, family: Family) -> dict[str, Any]:
    """The config.json of an architecture. A value that the family has no word for is left out: `obstacles` finds it."""
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(a, field.ours)
        if field.ours == "rotary":
            config |= _rope_to_config(value or Rotary(10000.0, a.head_dim))
        elif field.words is None:
            config[field.theirs] = value
        else:
            words = [theirs for theirs, word in field.words.items() if word == value]
            config |= {field.theirs: words[0]} if words else {}
    return config


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
    values: dict[str, Any] = {"pad_rows": 128}
    for field in family.fields:
        value = _value(config, field, values, errors)
        if values.setdefault(field.ours, value) != value:
            errors.append(f"config.json: {field.theirs} is {value} where another key that means the same here says "
                          f"{values[field.ours]}; make them equal.")
    if errors:
        raise UserError(*errors)
    values |= {k: v(values) if callable(v) else v for k, v in family.fixed.items()}
    return Architecture(**values), family


def _word(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 40 else said(value)


def _value(config: Mapping[str, Any], field: Field, values: Mapping[str, Any], errors: list[str]) -> Any:
    """One field of ours, checked; appends what is wrong with it."""
    if field.ours == "rotary":
        return _rope_from_config(config, values["head_dim"], errors)
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


def _rope_to_config(rotary: Rotary) -> dict[str, Any]:
    """Both forms: transformers reads rope_parameters from version 5 on, rope_theta and rope_scaling before."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", **dict(zip(names, rotary.scaling, strict=True))} if rotary.scaling else None
    return {"rope_theta": rotary.base, "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": rotary.base, **(scaling or {"rope_type": "default"})}}


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


def _rope_from_config(config: Mapping[str, Any], channels: int, errors: list[str]) -> Rotary:
    """Both forms; appends what is wrong with it."""
    wrong = list(faults(config, ROPES)) or _contradictions(config)
    told = {} if wrong else {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base, kind = (told.get("rope_theta", config.get("rope_theta") or 10000.0),
                  told.get("rope_type", told.get("type", "default")))
    if kind == "llama3":
        wrong += faults(told, SCALING, "rope_parameters")
    elif kind != "default":
        wrong.append(f"rope_parameters: rope_type {_word(kind)} is not known here; there are default, llama3")
    errors += [f"config.json: {fault}." for fault in wrong]
    if wrong:
        return Rotary(1.0, channels)
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


def nearest_family(a: Architecture) -> tuple[Family, list[str]]:
    """The first family that expresses this architecture, or the one with the fewest obstacles, and those."""
    found = [(family, obstacles(a, family)) for family in FAMILIES.values()]
    return min(found, key=lambda each: len(each[1]))


def family_of(a: Architecture) -> Family:
    """The family that expresses this architecture. Raises UserError saying what is in the way of the nearest."""
    family, reasons = nearest_family(a)
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
    }
