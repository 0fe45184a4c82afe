"""The decoder as values: its sizes, its fields, and the table of its weights.

    x = embedding[tokens] + positions                         unit `embedding`, unit `positions` (learned ones)
    x = x + attention(norm(x))                                unit `layers.0` ...
    x = x + mlp(norm(x))
    loss = cross_entropy(norm(x) outputT)                     unit `head`; a tied output is unit `embedding` again

Fields say what is otherwise: where norms stand, what is multiplied or capped, which layers see a window.
"""

from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import NamedTuple

from megazero.plan.layout import Cut, OperandSpec, Parameter, UnitSpec, ragged_rows
from megazero.plan.program import Part
from megazero.plan.rope import Rotary

# Elements of logits that exist at a time in head and loss. The kind of device says it, not its free memory, on which no
# bit may depend. CUDA's are 4,096 tokens of 128,256: the output matrix and its gradient are read once, not 32 times.
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}
WIDE_LOGITS = 1 << 24               # of half precisions, those of them that exist in fp32 too

FREE = ("seq_length", "init_std", "attention_dropout", "hidden_dropout", "pad_rows")     # fields that change no weights
KINDS = ("local", "full", "local-nope", "full-nope")        # does a layer see a window alone? nope: it turns nothing


class LayerKind(NamedTuple):
    """What attention is like in a layer: tokens that each sees (0: all before it), and how q and k turn."""

    window: int
    rotary: Rotary | None


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
    learned_positions: int = 0          # 0 for none
    position_offset: int = 0            # rows of their table before that of position 0
    rotary: Rotary | None = None
    norm: str = "LayerNorm"             # LayerNorm | RMSNorm
    epsilon: float = 1e-5
    norm_plus_one: bool = False         # norms multiply by 1 + weight
    pre_norm: bool = True               # norm(x) goes into attention and MLP
    post_norm: bool = False             # norm(y) of what comes out of them is added to x
    parallel_residual: bool = False     # x + attention(norm(x)) + mlp(norm(x))
    activation: str = "gelu"            # gelu | gelu_tanh | relu | relu2 | swiglu | geglu | geglu_tanh
    bias: bool = True                   # in the MLP
    qkv_bias: bool = True
    o_bias: bool = True                 # of attention's output
    norm_bias: bool = True              # in LayerNorms; RMSNorms have none
    qk_norm: str = "none"               # none | head, over each head of q and k | width, over all of them together
    tied: bool = True
    init_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    window: int = 0                     # tokens that each sees in local layers, itself and those before it; 0 for all
    kinds: tuple[str, ...] = ()         # of each layer a word of KINDS; () where all are local
    local_base: float = 0.0             # rotary base of local layers, never scaled; 0: they turn as the others
    embedding_multiplier: float = 1.0   # rounded to the dtype of the weights
    residual_multiplier: float = 1.0    # of what is added to x
    attention_multiplier: float = 0.0   # of q kT; 0 for 1 / sqrt(head_dim)
    attention_softcap: float = 0.0      # c: scores are c tanh(scores / c); 0 for none
    logits_scaling: float = 1.0         # logits are divided by it
    logits_softcap: float = 0.0         # the same as of scores
    pad_rows: int = 128                 # the stored vocabulary is a multiple of this on each tensor-parallel rank

    def kind(self, layer: int) -> LayerKind:
        """What attention is like in a layer."""
        word = self.kinds[layer] if self.kinds else "local"
        rotary = self.rotary
        if rotary and self.local_base and word.startswith("local"):
            rotary = Rotary(self.local_base, rotary.channels)
        return LayerKind(self.window if word.startswith("local") else 0, None if word.endswith("nope") else rotary)

    def seen(self, layer: int) -> float:
        """Tokens that one sees on average, twice: as many as the sequence has where none are hidden but later ones."""
        w = min(self.kind(layer).window or self.seq_length, self.seq_length)
        return 2 * w - w * w / max(self.seq_length, 1)

    @property
    def gated(self) -> bool:
        return "glu" in self.activation


# ---- its weights

def units(a: Architecture) -> tuple[UnitSpec, ...]:
    """Every weight of the decoder, by unit, in the order of the forward pass."""
    cut, table = Cut(0, a.vocab_size, ragged=True, name="vocabulary"), (a.vocab_size, a.hidden)
    embedding, output = (one(Parameter(name, table, a.init_std, cuts=(cut,), group="table"), a.pad_rows)
                         for name in ("embedding.weight", "head.output.weight"))
    places = Parameter("positions.weight", (a.position_offset + a.learned_positions, a.hidden), a.init_std,
                       partial=True, group="positions")
    return (
        UnitSpec("embedding", (embedding,)),
        *([UnitSpec("positions", (one(places),))] if a.learned_positions else []),
        *(block(a, i) for i in range(a.layers)),
        UnitSpec("head", (*norm("head.norm", a), *([] if a.tied else [output]))),
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
        *(norm(f"{at}.norm", a) if a.pre_norm else []),
        OperandSpec(f"{at}.qkv.weight",
                    tuple(Parameter(f"{at}.{n}.weight", (rows[n], a.hidden), a.init_std, cuts=heads[n])
                          for n in "qkv")),
        one(Parameter(f"{at}.o.weight", (a.hidden, q), small, cuts=(replace(heads["q"][0], dim=1),))),
        *(norm(f"{mlp}.norm", a) if a.pre_norm else []),
        OperandSpec(f"{mlp}.up.weight",
                    tuple(Parameter(f"{mlp}.{n}.weight", (w, a.hidden), a.init_std, cuts=wide)
                          for n, w in widths.items())),
        one(Parameter(f"{mlp}.down.weight", (a.hidden, a.ffn), small, cuts=(replace(wide[0], dim=1),))),
    ]
    if a.qkv_bias:
        biases = tuple(Parameter(f"{at}.{n}.bias", (rows[n],), cuts=heads[n], group="vector") for n in "qkv")
        operands.append(OperandSpec(f"{at}.qkv.bias", biases))
    for n in "qk":
        operands += {"none": [], "head": norm(f"{at}.{n}_norm", a, a.head_dim),
                     "width": norm(f"{at}.{n}_norm", a, rows[n], heads[n])}[a.qk_norm]
    if a.post_norm:
        operands += [*norm(f"{at}.post_norm", a), *norm(f"{mlp}.post_norm", a)]
    if a.o_bias:
        operands.append(one(residual_bias(f"{at}.o.bias", a)))
    if a.bias:
        biases = tuple(Parameter(f"{mlp}.{n}.bias", (w,), cuts=wide, group="vector") for n, w in widths.items())
        operands += [OperandSpec(f"{mlp}.up.bias", biases), one(residual_bias(f"{mlp}.down.bias", a))]
    return UnitSpec(f"layers.{i}", tuple(operands))


def one(parameter: Parameter, pad_rows: int = 1) -> OperandSpec:
    return OperandSpec(parameter.name, (parameter,), pad_rows)


def norm(name: str, a: Architecture, width: int = 0, cuts: tuple[Cut, ...] = ()) -> list[OperandSpec]:
    """Of so many channels (0: the stream's), which each rank has as a whole, and so of its tokens alone; or of those
    that `cuts` give it, of all tokens."""
    parts = [("weight", 0.0 if a.norm_plus_one else 1.0), *([("bias", 0.0)] if a.norm_bias else [])]
    return [one(Parameter(f"{name}.{part}", (width or a.hidden,), mean=mean, cuts=cuts, group="vector",
                          partial=not cuts)) for part, mean in parts]


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
