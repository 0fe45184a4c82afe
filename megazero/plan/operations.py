"""What each part of a decoder does, as rows: cost.py adds them up. decoder.py is the same as plain code. Pure.

    share     tokens of this tensor-parallel rank: [t/tp, h] between operations
    tokens    tokens of the micro-batch, padded to a multiple of tp: [t, o] in an operation, o channels of this rank
    real      the same without padding: [b s, n, d] in attention, n heads of this rank
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import NamedTuple

from megazero.plan.architecture import Architecture, parts, units
from megazero.plan.layout import Operand, flat


class Micro(NamedTuple):
    """One micro-batch of `samples` x `length` tokens on one of `ranks` tensor-parallel ranks, and how it is trained.
    `width` bytes an activation; `documents` and `positions`: are there such masks, and positions of its own?"""

    samples: int
    length: int
    rank: int = 0
    ranks: int = 1
    width: int = 4
    recompute: str = "none"
    documents: bool = False
    positions: bool = False

    @property
    def wide(self) -> int:
        """Bytes of a sum over channels."""
        return max(self.width, 4)

    @property
    def real(self) -> int:
        return self.samples * self.length

    @property
    def share(self) -> int:
        return ceil(self.real / self.ranks)

    @property
    def tokens(self) -> int:
        return self.share * self.ranks


@dataclass(frozen=True)
class Operation:
    """A row. Bytes are of one micro-batch on one rank, tensor by tensor, so that one which two operations keep counts
    once. A batch's own tensors, what all layers share (mask, angles) and vectors without tokens are not in them.

    weights   the operands it reads
    flops     forward, per token: 2 for each weight of a product
    kept      what autograd keeps of it until its backward pass (B, or I)
    again     what it keeps besides while its part is run again in that pass (full recompute)
    between   what its weights' gradient needs, from the input's gradient (I) to the weights' (W): x and dy
    moves     how often [t/tp, h] travels over tp in each kind of pass
    sums      elements per token of each all-reduce over tp in each kind of pass
    """

    name: str
    weights: tuple[str, ...] = ()
    flops: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)
    between: Mapping[str, int] = field(default_factory=dict)
    moves: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


COLUMN = {"F": 1, "B": 2, "I": 1, "W": 1}       # gathers; gathers again, and scatters the gradient
ROW = {"F": 1, "B": 1, "I": 1}                  # scatters; gathers the gradient
TABLE = {"F": 1, "B": 1, "W": 1}                # a look-up has no gradient for its input
OUTPUT = {"L": 2, "E": 1}
LOSS = {"L": (1, 2), "E": (1, 2)}               # a maximum, then two sums
MEANS = {"F": (2,), "B": (2,), "I": (2,)}       # of q and k over all heads; backward's


def operations(a: Architecture, part: int, m: Micro) -> tuple[Operation, ...]:
    """The rows of a part (0 embedding, 1 .. n blocks, n + 1 head), in the order of its forward pass."""
    read = parts(a)[part].forward
    w = {o.name: o for u in units(a) if u.name in read for o in flat(u, {"tp": (m.rank, m.ranks)}).operands}
    if part == 0:
        return _embedding(a, m, w)
    if part > a.layers:
        return _head(a, w)
    rows = _block(a, m, w, part - 1)
    return tuple(map(_twice, rows)) if m.recompute == "full" else rows


def table(a: Architecture, m: Micro) -> list[tuple[Operation, ...]]:
    """The rows of every part; blocks of a kind are alike."""
    kinds = [a.kind(layer) for layer in range(a.layers)]
    blocks = {kind: operations(a, 1 + kinds.index(kind), m) for kind in dict.fromkeys(kinds)}
    return [operations(a, 0, m), *(blocks[kind] for kind in kinds), operations(a, a.layers + 1, m)]


def distinct(rows: Sequence[Operation], *whats: str) -> int:
    """Bytes of all tensors that the rows name under `kept`, `again` or `between`, each once."""
    return sum({name: n for row in rows for what in whats for name, n in getattr(row, what).items()}.values())


def flops_per_token(a: Architecture) -> float:
    """Model FLOPs of one trained token, three times forward: 6 N + 6 L h S,
    N the matmul weights, attention causal (half of the square counted)."""
    return 3.0 * sum(row.flops for rows in table(a, Micro(1, a.seq_length)) for row in rows)


def _twice(row: Operation) -> Operation:
    """With full recompute: only the part's input is kept, and backward begins with the forward pass."""
    moves = {kind: n + (row.moves["F"] if kind in ("B", "I") else 0) for kind, n in row.moves.items()}
    sums = {kind: n + (row.sums["F"] if kind in ("B", "I") else ()) for kind, n in row.sums.items()}
    return replace(row, kept={name: n for name, n in row.kept.items() if name == "input"}, again=row.kept, moves=moves,
                   sums=sums)


def _embedding(a: Architecture, m: Micro, w: Mapping[str, Operand]) -> tuple[Operation, ...]:
    """It keeps its graph under every recompute mode: running it again would gather its weights again."""
    (words,), padded, numbers = w["embedding.weight"].pieces, m.tokens > m.real, m.tokens * 8
    stream = m.share * a.hidden * m.width
    dy, scaled = {"d embedding": stream}, a.learned_positions and a.embedding_multiplier != 1
    if words.shard.box.size[0] == a.vocab_size:             # every token is here: the batch's own numbers serve
        index = {"tokens": numbers} if padded else {}
    else:
        index = {"rows": numbers, "here": m.tokens}
    # positions of every rank, of which a share is read; a batch's own need no copy unless they are padded
    places = {"places": numbers} if padded or not m.positions else {}
    return (
        Operation("embedding", ("embedding.weight",), kept=index,
                  between=index | ({"d words": stream} if scaled else dy), moves=TABLE),
        *([Operation("positions", ("positions.weight",), kept=places, between=places | dy)]
          if a.learned_positions else []),
        *_dropout(a, m, "embedding"))


def _block(a: Architecture, m: Micro, w: Mapping[str, Operand], layer: int) -> tuple[Operation, ...]:
    at, mlp, again = f"layers.{layer}.attention", f"layers.{layer}.mlp", m.recompute == "selective"
    up, inner = (m.tokens * n * m.width for n in (w[f"{mlp}.up.weight"].shape[0], w[f"{mlp}.down.weight"].shape[1]))
    activation = {"activation": inner}
    # relu knows its gradient from its result, which relu2 squares
    needs = {"relu": activation, "relu2": {"relu": inner}}.get(a.activation, {"up": up})
    return (
        *_column(a, m, w, f"{at}.norm", f"{at}.qkv", "input"),
        *_attention(a, m, w, layer),
        *_post_norm(a, m, w, at),
        *_dropout(a, m, at),
        *_column(a, m, w, f"{mlp}.norm", f"{mlp}.up", "input" if a.parallel_residual else "middle"),
        Operation(f"{mlp}.{a.activation}", kept={} if again else needs),
        _row(a, m, w, f"{mlp}.down", {"up": up} if again else activation, activation),
        *_post_norm(a, m, w, mlp),
        *_dropout(a, m, mlp))


def _head(a: Architecture, w: Mapping[str, Operand]) -> tuple[Operation, ...]:
    """Forward and backward at once: nothing is kept."""
    output = "embedding" if a.tied else "head.output"
    return (Operation("head.norm", *_reads(w, "head.norm")),
            Operation("head.output", *_reads(w, output), moves=OUTPUT, sums=LOSS))


def _column(a: Architecture, m: Micro, w: Mapping[str, Operand], norm: str, name: str, x: str) -> list[Operation]:
    """A norm of the residual stream `x`, if there is one, and the column operation that reads it. With selective
    recompute the stream is all that is kept."""
    stream = m.share * a.hidden * m.width
    normal = {norm if a.pre_norm else x: stream}
    dy = {f"d {name}": m.tokens * w[f"{name}.weight"].shape[0] * m.width}
    kept = {x: stream, **_statistics(a, m, norm, m.share)}
    again = m.recompute == "selective"
    return [*([Operation(norm, *_reads(w, norm), {} if again else kept)] if a.pre_norm else []),
            Operation(name, *_reads(w, name), {x: stream} if again else normal, between=normal | dy, moves=COLUMN)]


def _attention(a: Architecture, m: Micro, w: Mapping[str, Operand], layer: int) -> list[Operation]:
    """Norms of heads, rotation, attention, and the row operation behind it."""
    at, kind = f"layers.{layer}.attention", a.kind(layer)
    real, pairs, d, hides = m.real * m.width, m.samples * m.length**2, a.head_dim, 0 < kind.window < m.length
    together = {"qkv": m.tokens * w[f"{at}.qkv.weight"].shape[0] * m.width}         # q, k and v are views of it
    q, k, _ = (p.shard.box.size[0] for p in w[f"{at}.qkv.weight"].pieces)
    names, turned = (f"{at}.q_norm", f"{at}.k_norm"), kind.rotary or a.qk_norm != "none"
    norms = {
        "none": [], "width": [Operation(f"{at}.qk_norm", tuple(f"{name}.weight" for name in names), sums=MEANS,
                                        kept=together | _statistics(a, m, "qk_norm", 2 * m.real))],
        "head": [Operation(name, *_reads(w, name), together | _statistics(a, m, name, m.real * size // d))
                 for name, size in zip(names, (q, k), strict=True) if f"{name}.weight" in w]}[a.qk_norm]
    views = {"q": {"q": real * q} if turned else together, "k": {"k": real * k} if turned else together, "v": together}
    repeated, out = q != k, {"attention": real * q}
    if a.attention_dropout or a.attention_softcap:
        # one matrix per sample and head: k and v are copied for it unless one stride serves for both
        own = {"scaled q": real * q, "copied k": real * q, "copied v": real * q}
        copied = repeated or (m.samples > 1 and q > d)
        square = pairs * q // d * m.width
        kept = (own if copied else {"scaled q": real * q, **views["k"], **views["v"]}) | {
            "softmax": square} | ({"capped": square} if a.attention_softcap else {}) | (
            {"keep": square, "weights": square} if a.attention_dropout else {})
    else:
        # Kernels of the CPU; CUDA's flash keeps the same. Its memory-efficient one (fp32, masks) repeats k and v of
        # grouped heads, as masks do here, and rounds logsumexp up to 32 tokens.
        fewer = {"repeated k": real * q, "repeated v": real * q} if repeated and (m.documents or hides) else (
            views["k"] | views["v"])
        kept = views["q"] | fewer | out | {"logsumexp": m.real * q // d * m.wide}
    x = {"padded attention": m.tokens * q * m.width} if m.tokens > m.real else out
    return [*norms, *([Operation(f"{at}.rotary")] if kind.rotary else []),
            Operation(f"{at}.attention", flops=round(2 * a.heads * d * a.seen(layer)), kept=kept),
            _row(a, m, w, f"{at}.o", x, x)]


def _row(a: Architecture, m: Micro, w: Mapping[str, Operand], name: str, kept: Mapping[str, int],
         x: Mapping[str, int]) -> Operation:
    """It keeps x, or what x is computed from again."""
    dy = {f"d {name}": m.tokens * a.hidden * m.width}
    return Operation(name, *_reads(w, name), kept, between={**x, **dy}, moves=ROW)


def _post_norm(a: Architecture, m: Micro, w: Mapping[str, Operand], site: str) -> list[Operation]:
    """Of what a row operation gives, which it keeps under every recompute mode but full."""
    name, y = f"{site}.post_norm", {f"{site} out": m.share * a.hidden * m.width}
    return [Operation(name, *_reads(w, name), y | _statistics(a, m, name, m.share))] if a.post_norm else []


def _dropout(a: Architecture, m: Micro, site: str) -> list[Operation]:
    mask = {f"{site} mask": m.share * a.hidden * m.width}
    return [Operation(f"{site}.dropout", kept=mask)] if a.hidden_dropout else []


def _statistics(a: Architecture, m: Micro, norm: str, rows: int) -> dict[str, int]:
    """Of a norm over so many rows: 1 / deviation; for LayerNorm the mean too."""
    return {f"{norm} statistics": (2 if a.norm == "LayerNorm" else 1) * rows * m.wide}


def _reads(w: Mapping[str, Operand], name: str) -> tuple[tuple[str, ...], int]:
    """The operands of an operation, and the FLOPs of its product per token on all ranks together (vectors: none)."""
    shapes = [p.shard.parameter.shape for p in w[f"{name}.weight"].pieces]
    return (tuple(n for n in (f"{name}.weight", f"{name}.bias") if n in w),
            2 * sum(prod(shape) for shape in shapes if len(shape) == 2))
