"""The decoder as values: its sizes, its fields, and the table of its weights.

    x = embedding[tokens] + positions                         unit `embedding`, unit `positions` (learned ones)
    x = x + attention(norm(x))                                unit `layers.0` ...
    x = x + mlp(norm(x))
    loss = cross_entropy(norm(x) outputT)                     unit `head`; a tied output is unit `embedding` again
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from math import prod, sqrt

from megazero.base import Form
from megazero.plan.layout import Cut, OperandSpec, Parameter, UnitSpec, ragged_rows
from megazero.plan.program import Part
from megazero.settings import Config, Model

# Elements of logits that exist at a time in head and loss. The kind of device says it, not its free memory, on which no
# bit may depend. CUDA's are 4,096 tokens of 128,256: the output matrix and its gradient are read once, not 32 times.
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}
WIDE_LOGITS = 1 << 24               # of half precisions, those of them that exist in fp32 too


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021); `scaling` is Llama 3.1's (factor, low, high, original length)."""

    base: float
    channels: int
    scaling: tuple[float, float, float, int] | None = None


FREE = ("seq_length", "init_std", "attention_dropout", "hidden_dropout", "pad_rows")     # fields that change no weights


@dataclass(frozen=True)
class Architecture:
    """A decoder, completely said: nothing is None that has a value. Sizes must be given, the others have the default of
    their flags. The default of one that is added means what was true before it: checkpoints load for ever."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    seq_length: int
    vocab_size: int
    learned_positions: int = 0          # rows; 0 for none
    rotary: Rotary | None = None
    norm: str = "LayerNorm"             # LayerNorm | RMSNorm
    epsilon: float = 1e-5
    activation: str = "gelu"            # gelu | gelu_tanh | relu2 | swiglu
    bias: bool = True                   # in linear layers and LayerNorms
    qkv_bias: bool = True
    qk_norm: bool = False
    tied: bool = True
    init_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    window: int = 0                     # tokens that each sees, itself and those before it; 0 for all
    pad_rows: int = 128                 # the stored vocabulary is a multiple of this on each tensor-parallel rank

    @property
    def norm_bias(self) -> bool:
        return self.bias and self.norm == "LayerNorm"

    @property
    def seen(self) -> float:
        """Tokens that one sees on average, twice: as many as the sequence has where none are hidden but later ones."""
        w = min(self.window or self.seq_length, self.seq_length)
        return 2 * w - w * w / max(self.seq_length, 1)

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"


# ---- what strangers say of one

SIZE = range(1, 2**31)
ROTARY: Form = {"base": float, "channels": range(2, 2**31, 2), "scaling?": (None, [float])}
FIELDS: dict[str, Form] = {             # each field's form
    "layers": range(1, 10**5 + 1), "hidden": SIZE, "ffn": SIZE, "heads": SIZE, "kv_heads": SIZE, "head_dim": SIZE,
    "seq_length": SIZE, "vocab_size": SIZE, "learned_positions": range(2**31), "rotary": (None, ROTARY),
    "norm": re.compile("LayerNorm|RMSNorm"), "epsilon": float, "activation": re.compile("gelu|gelu_tanh|relu2|swiglu"),
    "bias": bool, "qkv_bias": bool, "qk_norm": bool, "tied": bool, "init_std": float, "attention_dropout": float,
    "hidden_dropout": float, "window": range(2**31), "pad_rows": SIZE}
ARCHITECTURE: Form = {f.name + ("" if f.default is MISSING else "?"): FIELDS[f.name] for f in fields(Architecture)}


def impossible(a: Architecture) -> Iterator[str]:
    """Why no decoder can be like this, though each of its fields has the form."""
    if a.heads % a.kv_heads:
        yield f"its {a.heads} heads cannot share {a.kv_heads} key-value heads"
    if 0 < a.learned_positions < a.seq_length:
        yield f"its sequences of {a.seq_length} have {a.learned_positions} positions"
    if a.epsilon <= 0 or a.init_std < 0 or not (0 <= a.attention_dropout < 1 and 0 <= a.hidden_dropout < 1):
        yield "its epsilon is not above 0, its deviation below 0, or a dropout not at least 0 and below 1"
    if a.rotary and not (a.rotary.base > 0 and a.rotary.channels % 2 == 0 and a.rotary.channels <= a.head_dim):
        yield f"its heads of {a.head_dim} cannot turn {a.rotary.channels} channels on the base {a.rotary.base:g}"
    if a.rotary and a.rotary.scaling is not None and not _stretches(a.rotary.scaling):
        yield "its rotary scaling is not a factor, a low and a higher frequency, and a whole length, all above 0"


def _stretches(scaling: tuple[float, ...]) -> bool:
    return (len(scaling) == 4 and min(scaling) > 0 and scaling[1] < scaling[2]
            and isinstance(scaling[3], int) and scaling[3] in SIZE)


# ---- what a configuration says

def architecture(config: Config, vocab_size: int) -> Architecture:
    """The decoder a configuration asks for. A size that nobody gives is 0: checks() tells it."""
    m = config.model
    layers, hidden, heads, length = (
        size or 0 for size in (m.num_layers, m.hidden_size, m.num_attention_heads, m.seq_length))
    head_dim = m.kv_channels or hidden // (heads or 1)
    scaling = (m.rope_scaling_factor, m.rope_low_freq_factor, m.rope_high_freq_factor, m.rope_original_length)
    channels = round(head_dim * min(1, max(0, m.rotary_percent))) // 2 * 2
    rotary = Rotary(m.rotary_base, channels, scaling if m.use_rope_scaling else None)
    return Architecture(
        layers=layers, hidden=hidden, ffn=ffn_size(m), heads=heads, kv_heads=m.num_query_groups or heads,
        head_dim=head_dim, seq_length=length, vocab_size=vocab_size,
        learned_positions=(m.max_position_embeddings or length
                           if m.position_embedding_type == "learned_absolute" else 0),
        rotary=rotary if m.position_embedding_type == "rope" else None, norm=m.normalization, epsilon=m.norm_epsilon,
        activation=next((word for word, said in (("swiglu", m.swiglu), ("relu2", m.squared_relu),
                                                 ("gelu_tanh", m.openai_gelu)) if said), "gelu"),
        bias=not m.disable_bias_linear, qkv_bias=m.add_qkv_bias or not m.disable_bias_linear, qk_norm=m.qk_layernorm,
        tied=not m.untie_embeddings_and_output_weights, init_std=m.init_method_std,
        attention_dropout=m.attention_dropout, hidden_dropout=m.hidden_dropout, window=m.attention_window or 0,
        pad_rows=m.make_vocab_size_divisible_by)


def ffn_size(m: Model) -> int:
    """Width inside the MLP, by Megatron's rule where it is not given; 0 when nothing says it."""
    hidden = m.hidden_size or 0
    return m.ffn_hidden_size or (hidden * 8 // 3 // 64 * 64 if m.swiglu else 4 * hidden)


def units(a: Architecture) -> tuple[UnitSpec, ...]:
    """Every weight of the decoder, by unit, in the order of the forward pass."""
    cut, table = Cut(0, a.vocab_size, ragged=True, name="vocabulary"), (a.vocab_size, a.hidden)
    embedding, output = (one(Parameter(name, table, a.init_std, cuts=(cut,), group="table"), a.pad_rows)
                         for name in ("embedding.weight", "head.output.weight"))
    places = Parameter("positions.weight", (a.learned_positions, a.hidden), a.init_std, partial=True,
                       group="positions")
    return (
        UnitSpec("embedding", (embedding,)),
        *([UnitSpec("positions", (one(places),))] if a.learned_positions else []),
        *(block(a, i) for i in range(a.layers)),
        UnitSpec("head", (*norm("head.norm", a.hidden, a.norm_bias), *([] if a.tied else [output]))),
    )


def parts(a: Architecture) -> tuple[Part, ...]:
    """The units that the embedding, each block and the head read. The embedding's backward needs no weights."""
    blocks = (Part((f"layers.{i}",), (f"layers.{i}",)) for i in range(a.layers))
    head = ("head", "embedding") if a.tied else ("head",)
    return Part(("embedding", "positions") if a.learned_positions else ("embedding",), ()), *blocks, Part(head, head)


def block(a: Architecture, i: int) -> UnitSpec:
    """The weights of transformer block `i`.
    What writes into the residual stream starts smaller, by sqrt(2 layers) (GPT-2)."""
    q, kv, small = a.heads * a.head_dim, a.kv_heads * a.head_dim, a.init_std / sqrt(2 * a.layers)
    at, mlp, widths = (f"layers.{i}.attention", f"layers.{i}.mlp",
                       {"gate": a.ffn, "up": a.ffn} if a.gated else {"up": a.ffn})
    groups, wide = (Cut(0, a.kv_heads, name="kv_heads"),), (Cut(0, a.ffn, name="ffn"),)
    heads = {"q": (Cut(0, a.heads, name="heads"),), "k": groups, "v": groups}
    rows = {"q": q, "k": kv, "v": kv}
    operands = [
        *norm(f"{at}.norm", a.hidden, a.norm_bias),
        OperandSpec(f"{at}.qkv.weight",
                    tuple(Parameter(f"{at}.{n}.weight", (rows[n], a.hidden), a.init_std, cuts=heads[n])
                          for n in "qkv")),
        one(Parameter(f"{at}.o.weight", (a.hidden, q), small, cuts=(replace(heads["q"][0], dim=1),))),
        *norm(f"{mlp}.norm", a.hidden, a.norm_bias),
        OperandSpec(f"{mlp}.up.weight",
                    tuple(Parameter(f"{mlp}.{n}.weight", (w, a.hidden), a.init_std, cuts=wide)
                          for n, w in widths.items())),
        one(Parameter(f"{mlp}.down.weight", (a.hidden, a.ffn), small, cuts=(replace(wide[0], dim=1),))),
    ]
    if a.qkv_bias:
        biases = tuple(Parameter(f"{at}.{n}.bias", (rows[n],), cuts=heads[n], group="vector") for n in "qkv")
        operands.append(OperandSpec(f"{at}.qkv.bias", biases))
    if a.qk_norm:
        operands += [*norm(f"{at}.q_norm", a.head_dim, a.norm_bias), *norm(f"{at}.k_norm", a.head_dim, a.norm_bias)]
    if a.bias:
        biases = tuple(Parameter(f"{mlp}.{n}.bias", (w,), cuts=wide, group="vector") for n, w in widths.items())
        operands += [OperandSpec(f"{mlp}.up.bias", biases),
                     one(residual_bias(f"{at}.o.bias", a)), one(residual_bias(f"{mlp}.down.bias", a))]
    return UnitSpec(f"layers.{i}", tuple(operands))


def one(parameter: Parameter, pad_rows: int = 1) -> OperandSpec:
    return OperandSpec(parameter.name, (parameter,), pad_rows)


def norm(name: str, width: int, bias: bool) -> list[OperandSpec]:
    weight = one(Parameter(f"{name}.weight", (width,), mean=1.0, group="vector", partial=True))
    return [weight, one(Parameter(f"{name}.bias", (width,), group="vector", partial=True))] if bias else [weight]


def residual_bias(name: str, a: Architecture) -> Parameter:
    return Parameter(name, (a.hidden,), group="vector", partial=True)


def parameter_count(a: Architecture) -> int:
    """Logical weights: padding and copies do not count, a tied matrix counts once."""
    return sum(prod(p.shape) for u in units(a) for p in u.parameters)


def head_chunk(a: Architecture, ranks: int, device: str) -> int:
    """Tokens whose logits exist at a time on each of `ranks` tensor-parallel ranks, in head and loss."""
    return max(LOGITS[device] // ragged_rows(a.vocab_size, ranks, a.pad_rows), 1)


def wide_tokens(rows: int) -> int:
    """Tokens whose logits, so many rows of the vocabulary, exist in fp32 at a time where they are half precision."""
    return max(WIDE_LOGITS // rows, 1)
