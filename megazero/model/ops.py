"""The operations that read weights. Each is right by itself for any number of tensor-parallel ranks.

Activations between operations are [tokens / tp, hidden]: every rank of a tensor-parallel group holds its share of the
tokens. A column operation gathers the tokens, a row operation scatters their sums, and each is the other's backward
(sequence parallelism, Korthikanti et al. 2022, section 4). With one rank both hand their input on.

    t  tokens of the micro-batch     t/tp  this rank's share     i, o  input and output channels of this rank

What autograd saves are activations and handles, never weights. In backward the gradient for the input comes first, so
that it can travel while the weight's gradient is computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megazero.comm import Done, Group
from megazero.model.products import input_gradient, product, weight_gradient
from megazero.plan import wide_tokens
from megazero.units import Weight

Tensor = torch.Tensor
Pointwise = Callable[[Tensor], Tensor]


def column(x: Tensor, weight: Weight, bias: Weight | None, group: Group, before: Pointwise | None = None) -> Tensor:
    """[t/tp, i] -> [t, o]: gathers the tokens, multiplies by this rank's rows of the weight.

    `before` is a pointwise function of x that is computed again in backward instead of kept (selective recompute).
    """
    return _Column.apply(x, weight, bias, group, before)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, group: Group,
                before: Pointwise | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.group, ctx.before = weight, bias, group, before
        return product(group.all_gather(before(x) if before else x).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x, again = recomputed(x, ctx.before)
        gather = partial(ctx.group.all_gather, again.detach())                    # anew rather than kept
        end = weight_gradient(dy, gather, ctx.weight)                    # travels under the product for dx
        dx = ctx.group.reduce_scatter(input_gradient(dy, ctx.weight))    # travels under that for the weight
        end()
        if ctx.bias:
            ctx.bias.add_sum(dy)
        return through(x, again, dx.wait()), None, None, None, None


def row(x: Tensor, weight: Weight, bias: Weight | None, group: Group, before: Pointwise | None = None) -> Tensor:
    """[t, i] -> [t/tp, o]: multiplies by this rank's columns of the weight, sums over ranks,
    keeps this rank's tokens."""
    return _Row.apply(x, weight, bias, group, before)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, group: Group,
                before: Pointwise | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.group, ctx.before = weight, bias, group, before
        inner = before(x) if before else x
        if group.size == 1:
            return product(inner, weight, bias)                            # the bias fused into the product
        y = group.reduce_scatter(product(inner, weight)).wait()
        return y.add_(bias.value) if bias else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gather = ctx.group.all_gather(dy)
        x, again = recomputed(x, ctx.before)
        if ctx.bias:
            ctx.bias.add_sum(dy)                                # of this rank's tokens: partial over tp
        full = gather.wait()
        dx = input_gradient(full, ctx.weight)
        weight_gradient(full, lambda: Done(again.detach()), ctx.weight)()
        return through(x, again, dx), None, None, None, None


def recomputed(x: Tensor, before: Pointwise | None) -> tuple[Tensor, Tensor]:
    """(x as a leaf, before(x) with its graph), or x twice."""
    if before is None:
        return x, x
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return leaf, before(leaf)


def through(leaf: Tensor, again: Tensor, grad: Tensor) -> Tensor:
    """The gradient for x from the gradient for before(x)."""
    return grad if again is leaf else torch.autograd.grad(again, leaf, grad)[0]


def layer_norm(x: Tensor, weight: Weight, bias: Weight | None, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016); statistics in fp32 or wider."""
    return _LayerNorm.apply(x, weight, bias, epsilon)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, epsilon: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *gains(x, weight, bias), epsilon)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight, ctx.bias = weight, bias
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        w, b = gains(x, ctx.weight, ctx.bias)
        back, narrow = torch.ops.aten.native_layer_norm_backward, x.dtype != mean.dtype
        dx, dw, db = back(dy, x, x.shape[-1:], mean, rstd, w, b, [True, not narrow, not narrow and b is not None])
        if narrow:                                  # torch rounds what it adds up over tokens, on the CPU at each token
            dy, x, w = (t.to(mean.dtype) for t in (dy, x, w))
            b = None if b is None else b.to(mean.dtype)
            _, dw, db = back(dy, x, x.shape[-1:], mean, rstd, w, b, [False, True, b is not None])
        ctx.weight.add(dw)
        if ctx.bias:
            ctx.bias.add(db)
        return dx, None, None, None


def gains(x: Tensor, weight: Weight, bias: Weight | None) -> tuple[Tensor, Tensor | None]:
    """The vectors as torch's kernels want them: in half precisions those of the CPU have statistics in fp32 only beside
    vectors in fp32, those of CUDA only know vectors of x's dtype."""
    dtype = x.dtype if x.is_cuda else statistics(x.dtype)
    return weight.value.to(dtype), bias.value.to(dtype) if bias else None


def rms_norm(x: Tensor, weight: Weight, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019); statistics in fp32 or wider."""
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, epsilon: float) -> Tensor:
        if x.is_cuda:
            y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight.value, epsilon)
        else:
            wide = x.to(statistics(x.dtype))
            rstd = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
            y = (wide * rstd).to(x.dtype) * weight.value
        ctx.save_for_backward(x, rstd)
        ctx.weight = weight
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd = ctx.saved_tensors
        normal = x * rstd                                       # in fp32 or wider, as what is added up over tokens
        ctx.weight.add((dy * normal).flatten(0, -2).sum(0))
        if x.is_cuda:
            dx, _ = torch.ops.aten._fused_rms_norm_backward(dy, x, x.shape[-1:], rstd, ctx.weight.value, [True, False])
            return dx, None, None
        scaled = dy.to(rstd.dtype) * ctx.weight.value
        dx = scaled.sub_(normal.mul_((scaled * normal).mean(-1, keepdim=True))).mul_(rstd)
        return dx.to(x.dtype), None, None


def statistics(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over channels are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def embedding(tokens: Tensor, weight: Weight, group: Group, leaf: Tensor) -> Tensor:
    """Tokens [t] -> [t/tp, h]: each rank looks up the rows it holds, the sum over ranks is scattered along tokens.

    `leaf` is any tensor that requires a gradient: autograd calls backward only of functions of such a one.
    """
    return _Embedding.apply(leaf, tokens, weight, group)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tokens: Tensor, weight: Weight, group: Group) -> Tensor:
        index, here = local_rows(tokens, weight)
        ctx.save_for_backward(index, here)
        ctx.weight, ctx.group = weight, group
        rows = F.embedding(index, weight.value)
        return group.reduce_scatter(rows if here is None else rows * here[:, None]).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        index, here = ctx.saved_tensors
        group, weight = ctx.group, ctx.weight

        def begin() -> Callable[[], None]:
            full = group.all_gather(dy)
            return lambda: weight.add_rows(index, full.wait() if here is None else full.wait() * here[:, None])

        weight.unit.now_or_later(begin)()
        return None, None, None, None


def positions(x: Tensor, at: Tensor, weight: Weight) -> Tensor:
    """x [t/tp, h] + learned rows at positions [t/tp]."""
    return _Positions.apply(x, at, weight)


class _Positions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(at)
        ctx.weight = weight
        return x + F.embedding(at, weight.value)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weight.add_rows(ctx.saved_tensors[0], dy)
        return dy, None, None


def local_rows(tokens: Tensor, weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Tokens as rows of this rank's part of the vocabulary, and which of them it holds (None: all)."""
    box = weight.box
    low, count = box.offset[0], box.size[0]
    if low == 0 and count == weight.logical[0].parameter.shape[0]:
        return tokens, None
    index = tokens - low
    here = (index >= 0) & (index < count)
    return index % max(count, 1), here                        # tokens of other ranks: any row, but not all the same one


def cross_entropy(
    x: Tensor, targets: Tensor, mask: Tensor, weight: Weight, group: Group, chunk: int, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Head and loss in chunks of tokens, so that full logits never exist.

    x [t, h] (gathered), targets and mask [t] -> (sum of the masked losses, float32 or wider; gradient for x [t, h]).
    `scale` is what the sum of losses is multiplied by before backward (None: no gradients wanted). Forward and backward
    of a chunk happen together, so logits are computed once; the gradient for x is this rank's part of the vocabulary's.
    """
    rows, total = weight.box.size[0], torch.zeros((), dtype=statistics(x.dtype), device=x.device)
    dx = torch.empty_like(x) if scale is not None else None
    room = torch.empty(min(chunk, len(x)), len(weight.value), dtype=x.dtype, device=x.device)
    index, here = local_rows(targets, weight)
    for low in range(0, len(x), chunk):
        part = slice(low, min(low + chunk, len(x)))
        logits = torch.mm(x[part], weight.value.T, out=room[:part.stop - low])      # [c, rows], refilled for each chunk
        logits[:, rows:] = -torch.inf                                               # padding is never predicted
        factor = None if scale is None else mask[part] * scale
        losses = softmax_loss(logits, index[part], None if here is None else here[part], group, factor)
        total += (losses * mask[part]).sum()
        if dx is not None:
            input_gradient(logits, weight, out=dx[part])
            weight.add_product(logits, x[part])
    return total, dx


def softmax_loss(logits: Tensor, index: Tensor, here: Tensor | None, group: Group, factor: Tensor | None) -> Tensor:
    """Cross entropy of each token [c], in fp32 or wider, from logits [c, rows], which become the gradient of factor [c]
    x loss (None: of no use). Half precisions are widened a few tokens at a time, once more for the gradient."""
    wide = statistics(logits.dtype)
    count = max(len(logits), 1) if logits.dtype == wide else wide_tokens(logits.shape[1])
    room = logits if logits.dtype == wide else torch.empty(
        min(count, len(logits)), logits.shape[1], dtype=wide, device=logits.device)
    pieces = [slice(low, min(low + count, len(logits))) for low in range(0, len(logits), count)]
    top = group.all_reduce(logits.amax(-1).to(wide), "max").wait()
    hit = logits.gather(-1, index[:, None])[:, 0].to(wide) - top

    def exponents(p: slice) -> Tensor:
        return torch.sub(logits[p], top[p, None], out=room[:p.stop - p.start]).exp_()

    sums = [(e := exponents(p)).sum(-1) for p in pieces]
    both = torch.stack((torch.cat(sums), hit if here is None else torch.where(here, hit, 0)))
    norm, hit = group.all_reduce(both).wait()
    if factor is None:
        return norm.log() - hit
    for p in pieces:
        e = e if len(pieces) == 1 else exponents(p)
        e.mul_((factor[p] / norm[p])[:, None])                                      # softmax x factor
        e[torch.arange(len(e), device=e.device), index[p]] -= factor[p] if here is None else factor[p] * here[p]
        if room is not logits:
            logits[p] = e
    return norm.log() - hit
