"""The decoder: an embedding part, blocks, and a head part, each a function of (input, batch) over units.

    b samples   s tokens of a sample   t = b s, padded to a multiple of tp   h hidden
    n heads and o channels of this tensor-parallel rank

Activations between parts are [t / tp, h]. Which units a part reads is said by architecture.parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

from megazero.comm import Alone, Group
from megazero.model.activations import ACTIVATIONS
from megazero.model.attention import attention, attention_keep, hiding, knows_documents, rotary_table, rotate
from megazero.model.ops import (
    capped,
    column,
    cross_entropy,
    embedding,
    layer_norm,
    positions,
    rms_norm,
    row,
    width_norm,
)
from megazero.plan import Architecture, LayerKind, Rotary
from megazero.units import Unit, Weight, keep_mask, key

Tensor = torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `step` is None outside training: then nothing is dropped."""

    tokens: Tensor                      # [b, s] int64
    targets: Tensor                     # [b, s] int64
    mask: Tensor                        # [b, s] weight of each target's loss, float
    samples: Tensor                     # [b] int64, numbers of the samples in the run
    step: int | None = None
    positions: Tensor | None = None     # [b, s] for embeddings and rotations, not for what sees what; None: 0 .. s - 1
    documents: Tensor | None = None     # [b, s]; None: the whole sample is one document
    bounds: Tensor | None = None        # [documents + 1] int32: where each begins among the b s tokens, and their end


class Shared(NamedTuple):
    """What all layers of a kind share in a pass over a micro-batch."""

    mask: Tensor | None                 # [b or 1, 1, s, s]: hides tokens from each other; None where kernels know it
    bounds: Tensor | None               # of documents, where kernels read them
    angles: tuple[Tensor, ...]          # cos and sin, [b or 1, s, 1, r / 2]; none where nothing turns


Norm = Callable[[Tensor], Tensor]
Masks = Callable[[int], Tensor | None]
Angles = Callable[[Rotary | None], tuple[Tensor, ...]]


class Decoder:
    """The parts of an architecture over its units, or those of one rank's stages.
    Holds no tensors of its own but the rotary table."""

    def __init__(self, a: Architecture, units: Mapping[str, Unit], group: Group, seed: int, recompute: str,
                 device: torch.device, chunk: int, own: Sequence[int] | None = None) -> None:
        """`chunk`: tokens whose logits exist at a time. `own`: the numbers of the parts to be built here, whose units
        these are; default all."""
        self.a, self.units, self.group, self.seed, self.recompute = a, units, group, seed, recompute
        self.dtype = next(iter(units.values())).weight_slice.dtype
        self.packs = knows_documents(device, self.dtype, a.head_dim)
        self.last: tuple[Batch, Masks, Angles] | None = None    # of the last pass
        own = range(a.layers + 2) if own is None else own
        ways = {kind.rotary for kind in map(a.kind, range(a.layers)) if kind.rotary}
        self.rotary = {way: rotary_table(way, a.seq_length, self.dtype, device) for way in ways}
        self.parts = {i: Block(self, i - 1) if i else Embedding(self) for i in own if i <= a.layers}
        self.head = Head(self, chunk) if a.layers + 1 in own else None

    def weight(self, name: str) -> Weight:
        """The handle of an operand, by name."""
        return next(u.weight(name) for u in self.units.values() if name in u)

    def maybe(self, name: str) -> Weight | None:
        return self.weight(name) if any(name in u for u in self.units.values()) else None

    def norm(self, name: str) -> Norm:
        """The norm of that name as a function; where there is none, what goes in comes out."""
        weight, bias = self.maybe(f"{name}.weight"), self.maybe(f"{name}.bias")
        if weight is None:
            return lambda x: x
        plus, epsilon = float(self.a.norm_plus_one), self.a.epsilon
        if self.a.norm == "RMSNorm":
            return partial(rms_norm, weight=weight, epsilon=epsilon, plus=plus)
        return partial(layer_norm, weight=weight, bias=bias, epsilon=epsilon, plus=plus)

    def qk_norm(self, at: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """That of q and k [b, s, n, d]: over each head, or over all heads of all ranks together."""
        if self.a.qk_norm == "width":
            weights = self.weight(f"{at}.q_norm.weight"), self.weight(f"{at}.k_norm.weight")
            return partial(width_norm, weights=weights, epsilon=self.a.epsilon, plus=float(self.a.norm_plus_one),
                           group=self.group)
        q_norm, k_norm = self.norm(f"{at}.q_norm"), self.norm(f"{at}.k_norm")
        return lambda q, k: (q_norm(q), k_norm(k))

    def padded(self, x: Tensor) -> Tensor:
        """[b s, ...] -> [t, ...]: zeros up to a multiple of tp.
        Padded tokens have no loss, and no other token sees them."""
        missing = -len(x) % self.group.size
        return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x

    def mine(self, per_token: Tensor) -> Tensor:
        """[b, s] -> [t / tp]: this rank's share of the tokens."""
        return self.padded(per_token.flatten()).chunk(self.group.size)[self.group.rank]

    def shared(self, batch: Batch, kind: LayerKind) -> Shared:
        """Made once for all layers of a kind in a pass: each mask, each table of angles."""
        if self.last is None or self.last[0] is not batch:
            self.last = batch, cache(partial(self.mask, batch)), cache(partial(self.angles, batch))
        _, mask, angles = self.last
        bounds = batch.bounds if self.packs and not self.written_out(batch) else None
        return Shared(mask(kind.window) if bounds is None else None, bounds, angles(kind.rotary))

    def mask(self, batch: Batch, window: int) -> Tensor | None:
        s = batch.tokens.shape[1]
        if batch.documents is None and not self.written_out(batch) and not 0 < window < s:
            return None
        return hiding(torch.arange(s, device=batch.tokens.device)[None], batch.documents, self.dtype, window)

    def angles(self, batch: Batch, rotary: Rotary | None) -> tuple[Tensor, ...]:
        s = batch.tokens.shape[1]
        return tuple((t[None, :s] if batch.positions is None else t[batch.positions])[:, :, None]
                     for t in (self.rotary[rotary] if rotary else ()))

    def written_out(self, batch: Batch) -> bool:
        """Is attention its formula, for what no kernel knows?"""
        return self.drops(batch) or self.a.attention_softcap > 0

    def drops(self, batch: Batch) -> bool:
        """Are attention weights dropped?"""
        return self.a.attention_dropout > 0 and batch.step is not None

    def dropped(self, x: Tensor, batch: Batch, site: str) -> Tensor:
        """Hidden dropout of x [t / tp, h], a pure function of (seed, step, site, sample, token, channel)."""
        p = self.a.hidden_dropout
        if p == 0 or batch.step is None:
            return x
        s = batch.tokens.shape[1]
        rows = self.mine(batch.samples[:, None] * s + torch.arange(s, device=x.device))
        return x * (keep_mask(key(self.seed, batch.step, site), rows, x.shape[1], p).to(x.dtype) / (1 - p))


class Embedding:
    """Tokens -> [t / tp, h]. Its input is only a leaf for autograd to start from."""

    def __init__(self, decoder: Decoder) -> None:
        self.d = decoder
        self.words, self.places = decoder.weight("embedding.weight"), decoder.maybe("positions.weight")
        # as a number of the weights' dtype: in bf16 sqrt(3072) is 55.5 (Gemma)
        self.multiplier = torch.tensor(decoder.a.embedding_multiplier, dtype=decoder.dtype).item()

    def __call__(self, leaf: Tensor, batch: Batch) -> Tensor:
        x = embedding(self.d.padded(batch.tokens.flatten()), self.words, self.d.group, leaf)
        x = x if self.multiplier == 1 else x * self.multiplier
        if self.places:
            s = torch.arange(batch.tokens.shape[1], device=x.device).expand_as(batch.tokens)
            at = self.d.mine(s if batch.positions is None else batch.positions)
            x = positions(x, at, self.places, self.d.a.position_offset)
        return self.d.dropped(x, batch, "embedding")


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm (Radford et al. 2019). What comes out may have a norm of
    its own, and the MLP may read what attention reads. A norm that is not there changes nothing."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self.d, self.name = decoder, f"layers.{layer}"
        self.kind = decoder.a.kind(layer)
        at, mlp = f"{self.name}.attention", f"{self.name}.mlp"
        w, maybe = decoder.weight, decoder.maybe
        self.norm, self.mlp_norm = decoder.norm(f"{at}.norm"), decoder.norm(f"{mlp}.norm")
        self.post_norm, self.mlp_post_norm = decoder.norm(f"{at}.post_norm"), decoder.norm(f"{mlp}.post_norm")
        self.qk_norm = decoder.qk_norm(at)
        self.qkv, self.qkv_bias = w(f"{at}.qkv.weight"), maybe(f"{at}.qkv.bias")
        self.o, self.o_bias = w(f"{at}.o.weight"), maybe(f"{at}.o.bias")
        self.up, self.up_bias = w(f"{mlp}.up.weight"), maybe(f"{mlp}.up.bias")
        self.down, self.down_bias = w(f"{mlp}.down.weight"), maybe(f"{mlp}.down.bias")
        self.heads = self.qkv.logical[0].box                                             # rows of q on this rank

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        y = self.added(x, self.post_norm(self.attention(x, batch)), batch, "attention")
        return self.added(y, self.mlp_post_norm(self.mlp(x if self.d.a.parallel_residual else y)), batch, "mlp")

    def added(self, x: Tensor, y: Tensor, batch: Batch, site: str) -> Tensor:
        """x + y, both [t / tp, h]."""
        return torch.add(x, self.d.dropped(y, batch, f"{self.name}.{site}"), alpha=self.d.a.residual_multiplier)

    def attention(self, x: Tensor, batch: Batch) -> Tensor:
        a, (b, s), shared = self.d.a, batch.tokens.shape, self.d.shared(batch, self.kind)
        y = self.column(x, self.norm, self.qkv, self.qkv_bias)
        qkv = (y if len(y) == b * s else y[:b * s]).view(b, s, -1, a.head_dim)          # [b, s, n + 2 n_kv, d]
        q, k, v = qkv.split([shard.box.size[0] // a.head_dim for shard in self.qkv.logical], dim=2)
        q, k = self.qk_norm(q, k)
        if shared.angles:
            q, k = rotate(q, *shared.angles), rotate(k, *shared.angles)
        y = attention(q, k, v, shared.mask, Alone(), self.attention_dropout(q, batch), shared.bounds,
                      self.kind.window, a.attention_multiplier or None, a.attention_softcap)
        return row(self.d.padded(y.reshape(b * s, -1)), self.o, self.o_bias, self.d.group)

    def attention_dropout(self, q: Tensor, batch: Batch) -> Tensor | None:
        a = self.d.a
        if not self.d.drops(batch):
            return None
        assert batch.step is not None
        first = self.heads.offset[0] // a.head_dim
        stream = key(self.d.seed, batch.step, self.name, "weights")
        return attention_keep(stream, batch.samples, range(first, first + q.shape[2]), a.heads, q.shape[1],
                              a.attention_dropout, q.dtype)

    def mlp(self, x: Tensor) -> Tensor:
        inner = self.column(x, self.mlp_norm, self.up, self.up_bias)
        activation = ACTIVATIONS[self.d.a.activation]
        if self.d.recompute == "selective":
            return row(inner, self.down, self.down_bias, self.d.group, before=activation)
        return row(activation(inner), self.down, self.down_bias, self.d.group)

    def column(self, x: Tensor, norm: Norm, weight: Weight, bias: Weight | None) -> Tensor:
        """norm, then a column operation; with selective recompute the norm's result is not kept."""
        if self.d.recompute == "selective":
            return column(x, weight, bias, self.d.group, before=norm)
        return column(norm(x), weight, bias, self.d.group)


class Head:
    """Final norm, output matrix (the embedding's when tied), loss."""

    def __init__(self, decoder: Decoder, chunk: int) -> None:
        self.d, self.chunk = decoder, chunk
        self.last_norm = decoder.norm("head.norm")
        self.output = decoder.weight("embedding.weight" if decoder.a.tied else "head.output.weight")

    def norm(self, x: Tensor) -> Tensor:
        """Of what the output matrix reads: logits that are divided are products of what is divided."""
        normal, scaling = self.last_norm(x), self.d.a.logits_scaling
        return normal if scaling == 1 else normal / scaling

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Sum of the masked losses, a scalar; no gradients."""
        with torch.no_grad():
            return self._loss(self.norm(x), batch, None)[0]

    def forward_backward(self, x: Tensor, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the masked losses, gradient of scale x that sum for x [t / tp, h]):
        one pass, logits are computed once."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            normal = self.norm(x)
        with torch.no_grad():
            total, dx = self._loss(normal, batch, scale)
        assert dx is not None
        return total, torch.autograd.grad(normal, x, self.d.group.reduce_scatter(dx).wait())[0]

    def logits(self, x: Tensor) -> Tensor:
        """[t, h] -> [t, vocabulary], for generation on one rank."""
        with torch.no_grad():
            logits = (self.norm(x) @ self.output.value.T)[:, :self.output.box.size[0]]
            return capped(logits, self.d.a.logits_softcap)[0]

    def _loss(self, normal: Tensor, batch: Batch, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        targets, mask = self.d.padded(batch.targets.flatten()), self.d.padded(batch.mask.flatten())
        return cross_entropy(self.d.group.all_gather(normal.detach()).wait(), targets, mask, self.output, self.d.group,
                             self.chunk, scale, self.d.a.logits_softcap)
