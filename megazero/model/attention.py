"""Attention and rotary positions. [b, s, n, d]: samples, tokens, heads of this rank, channels of a head."""

from typing import Any

import torch
import torch.nn.functional as F

from megazero.comm import Group
from megazero.plan import Rotary
from megazero.units import keep_mask

Tensor = torch.Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: Group, keep: Tensor | None = None,
              bounds: Tensor | None = None, window: int = 0, scale: float | None = None, cap: float = 0) -> Tensor:
    """Causal softmax(scale q kT) v: q [b, s, n, d], k and v [b, s, n_kv, d] -> [b, s, n, d].

    mask        [b or 1, 1, s, s] of `hiding`, which is added to scores; None: tokens see all before them
    group       ranks that share the sequence (one: the whole sequence is here)
    keep        [b, n, s, s] scale of each attention weight for dropout, which needs a mask; None: no dropout
    bounds      [documents + 1] where documents begin among the b s tokens, and their end, instead of a mask, where the
                device `knows_documents`: what is hidden is not computed
    window      tokens that each sees, for `bounds`; 0 for all
    scale       None: 1 / sqrt(d)
    cap         c: scores become c tanh(scores / c), which needs a mask; 0: they do not (Gemma Team 2024, section 2)
    """
    assert group.size == 1, "a sequence cut over ranks needs context parallelism"
    if bounds is not None:
        from torch.nn.attention.varlen import varlen_attn  # it takes two seconds, for torch's compiler
        flat, k, v = (_repeat(x, q.shape[2], 2).flatten(0, 1) for x in (q, k, v))
        out = varlen_attn(flat, k, v, bounds, bounds, q.shape[1], q.shape[1], scale=scale,
                          window_size=(window - 1, 0))
        assert isinstance(out, Tensor)
        return out.view(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flash = mask is None and (not q.is_cuda or q.dtype in (torch.bfloat16, torch.float16))
    # of CUDA's kernels that make no [s, s] flash alone knows groups
    if not flash:
        k, v = _repeat(k, q.shape[1], 1), _repeat(v, q.shape[1], 1)
    if keep is not None or cap:
        assert mask is not None, "what is written out needs what hides tokens from each other"
        out = _explicit(q, k, v, mask, keep, scale or q.shape[-1] ** -0.5, cap)
    elif mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def knows_documents(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Has torch a kernel for documents in a row? Flash, from Ampere on, for heads of up to 256 channels, in eights."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or channels > 256 or channels % 8:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 8


def hiding(at: Tensor, documents: Tensor | None, dtype: torch.dtype, window: int = 0) -> Tensor:
    """[b or 1, 1, s, s]: 0 where the query of the row may see the key of the column, else -inf.

    at          [b or 1, s] place of each token in its sequence: none sees what comes later, or `window` before
    documents   [b, s] number of each token's document: none sees another; None: all are one
    """
    see = at[:, None, :, None] >= at[:, None, None, :]
    if window:
        see = see & (at[:, None, :, None] - at[:, None, None, :] < window)
    if documents is not None:
        see = see & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.zeros(see.shape, dtype=dtype, device=at.device).masked_fill_(~see, -torch.inf)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, keep: Tensor | None, scale: float, cap: float) -> Tensor:
    """The formula itself, for dropout whose mask is ours, and for scores that are capped."""
    scores = (q * scale) @ k.transpose(-1, -2)                  # in this order fp16 does not overflow
    scores = torch.tanh(scores / cap) * cap if cap else scores
    weights = torch.softmax(scores.add_(mask), -1)
    return (weights if keep is None else weights * keep) @ v


def _repeat(x: Tensor, heads: int, dim: int) -> Tensor:
    return x if heads == x.shape[dim] else x.repeat_interleave(heads // x.shape[dim], dim)


def attention_keep(stream: int, samples: Tensor, heads: range, all_heads: int, s: int, p: float,
                   dtype: torch.dtype) -> Tensor:
    """Dropout of attention weights, [b, heads, s, s]: 0 or 1 / (1 - p), the same for a head on whichever rank it is."""
    head = torch.arange(heads.start, heads.stop, device=samples.device)
    rows = ((samples[:, None] * all_heads + head)[:, :, None] * s + torch.arange(s, device=samples.device)).flatten()
    return (keep_mask(stream, rows, s, p).to(dtype) / (1 - p)).view(len(samples), len(heads), s, s)


def rotary_table(rotary: Rotary, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """cos and sin of positions 0 .. length - 1, each [length, channels / 2]: angles in fp64 on the host, so that all
    devices have the same."""
    frequencies = torch.tensor(rotary.frequencies(length), dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return tuple((rotary.amplitude * turned).to(dtype).to(device) for turned in (angle.cos(), angle.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel j of the first half with channel j of the second:
    x [b, s, n, d], cos and sin [b or 1, s, 1, r / 2], r <= d."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Backward turns back: autograd's own would fill a tensor of x's size for each slice of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dy.contiguous(), cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *([rest] if rest.shape[-1] else [])), -1)
