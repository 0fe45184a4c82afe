"""The decoder as values: its sizes, its fields, and the table of its weights.

    x = embedding[tokens] + positions                         unit `embedding`, unit `positions` (learned ones)
    x = x + attention(norm(x))                                unit `layers.0` ...
    x = x + mlp(norm(x))
    loss = cross_entropy(norm(x) outputT)                     unit `head`; a tied output is unit `embedding` again
"""

from dataclasses import dataclass
from math import prod, sqrt

from megazero.plan.layout import Cut, OperandSpec, Parameter, UnitSpec
from megazero.plan.program import Part
from megazero.settings import Config, Model


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
    pad_rows: int = 128                 # the stored vocabulary is a multiple of this on each tensor-parallel rank

    @property
    def norm_bias(self) -> bool:
        return self.bias and self.norm == "LayerNorm"

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"


def architecture(config: Config, vocab_size: int) -> Architecture:
    """The decoder a checked configuration asks for."""
    m = config.model
    assert m.num_layers and m.hidden_size and m.num_attention_heads and m.seq_length, "plan.checks() comes first"
    head_dim = m.kv_channels or m.hidden_size // m.num_attention_heads
    scaling = (m.rope_scaling_factor, m.rope_low_freq_factor, m.rope_high_freq_factor, m.rope_original_length)
    rotary = Rotary(m.rotary_base, round(head_dim * m.rotary_percent) // 2 * 2, scaling if m.use_rope_scaling else None)
    return Architecture(
        layers=m.num_layers, hidden=m.hidden_size, ffn=ffn_size(m) or 0, heads=m.num_attention_heads,
        kv_heads=m.num_query_groups or m.num_attention_heads, head_dim=head_dim,
        seq_length=m.seq_length, vocab_size=vocab_size,
        learned_positions=(m.max_position_embeddings or m.seq_length
                           if m.position_embedding_type == "learned_absolute" else 0),
        rotary=rotary if m.position_embedding_type == "rope" else None, norm=m.normalization, epsilon=m.norm_epsilon,
        activation="swiglu" if m.swiglu else "relu2" if m.squared_relu else "gelu_tanh" if m.openai_gelu else "gelu",
        bias=not m.disable_bias_linear, qkv_bias=m.add_qkv_bias or not m.disable_bias_linear, qk_norm=m.qk_layernorm,
        tied=not m.untie_embeddings_and_output_weights, init_std=m.init_method_std,
        attention_dropout=m.attention_dropout, hidden_dropout=m.hidden_dropout, pad_rows=m.make_vocab_size_divisible_by)


def ffn_size(m: Model) -> int | None:
    """Width inside the MLP, by Megatron's rule where it is not given; None when nothing says it."""
    default = m.hidden_size and (m.hidden_size * 8 // 3 // 64 * 64 if m.swiglu else 4 * m.hidden_size)
    return m.ffn_hidden_size or default


def units(a: Architecture) -> tuple[UnitSpec, ...]:
    """Every weight of the decoder, by unit, in the order of the forward pass."""
    cut, table = Cut(0, a.vocab_size, ragged=True), (a.vocab_size, a.hidden)
    embedding, output = (one(Parameter(name, table, a.init_std, cut=cut, group="table"), a.pad_rows)
                         for name in ("embedding.weight", "head.output.weight"))
    places = Parameter("positions.weight", (a.learned_positions, a.hidden), a.init_std, partial=True, group="table")
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
    heads = {"q": Cut(0, a.heads), "k": Cut(0, a.kv_heads), "v": Cut(0, a.kv_heads)}
    rows = {"q": q, "k": kv, "v": kv}
    operands = [
        *norm(f"{at}.norm", a.hidden, a.norm_bias),
        OperandSpec(f"{at}.qkv.weight",
                    tuple(Parameter(f"{at}.{n}.weight", (rows[n], a.hidden), a.init_std, cut=heads[n]) for n in "qkv")),
        one(Parameter(f"{at}.o.weight", (a.hidden, q), small, cut=Cut(1, a.heads))),
        *norm(f"{mlp}.norm", a.hidden, a.norm_bias),
        OperandSpec(f"{mlp}.up.weight",
                    tuple(Parameter(f"{mlp}.{n}.weight", (w, a.hidden), a.init_std, cut=Cut(0, a.ffn))
                          for n, w in widths.items())),
        one(Parameter(f"{mlp}.down.weight", (a.hidden, a.ffn), small, cut=Cut(1, a.ffn))),
    ]
    if a.qkv_bias:
        biases = tuple(Parameter(f"{at}.{n}.bias", (rows[n],), cut=heads[n], group="vector") for n in "qkv")
        operands.append(OperandSpec(f"{at}.qkv.bias", biases))
    if a.qk_norm:
        operands += [*norm(f"{at}.q_norm", a.head_dim, a.norm_bias), *norm(f"{at}.k_norm", a.head_dim, a.norm_bias)]
    if a.bias:
        wide = tuple(Parameter(f"{mlp}.{n}.bias", (w,), cut=Cut(0, a.ffn), group="vector") for n, w in widths.items())
        operands += [OperandSpec(f"{mlp}.up.bias", wide),
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


def matmul_count(a: Architecture) -> int:
    """Weights that every token is multiplied by: blocks and output, not the embedding look-up."""
    per_block = a.hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + a.hidden * a.ffn * (3 if a.gated else 2)
    return a.layers * per_block + a.vocab_size * a.hidden


def flops_per_token(a: Architecture) -> float:
    """Model FLOPs of one trained token: 6 N + 6 L h S,
    N the matmul weights, attention causal (half of the square counted)."""
    return 6.0 * matmul_count(a) + 6.0 * a.layers * a.heads * a.head_dim * a.seq_length
