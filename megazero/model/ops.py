"""The operations that read weights. Each is right by itself for any number of tensor-parallel ranks.

Activations between operations are [tokens / tp, hidden]: every rank of a tensor-parallel group holds its share of the
tokens. A column operation gathers the tokens, a row operation scatters their sums, and each is the other's backward
(sequence parallelism, Korthikanti et al. 2022, section 4). With one rank both hand their input on.

    t  tokens of the micro-batch     t/tp  this rank's share     i, o  input and output channels of this rank

What autograd saves are activations and handles, never weights. In backward the gradient for the input comes first, so
that it can travel while the weight's gradient is computed.
"""

from collections.abc import Callable, Sequence
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


def layer_norm(x: Tensor, weight: Weight, bias: Weight | None, epsilon: float, plus: float = 0) -> Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016) times weight + `plus`; statistics in fp32 or wider."""
    return _LayerNorm.apply(x, weight, bias, epsilon, plus)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Weight | None, epsilon: float, plus: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *gains(x, weight, bias, plus), epsilon)
        ctx.save_for_backward(x, mean, rstd)
        ctx.weight, ctx.bias, ctx.plus = weight, bias, plus
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        w, b = gains(x, ctx.weight, ctx.bias, ctx.plus)
        back, narrow = torch.ops.aten.native_layer_norm_backward, x.dtype != mean.dtype
        dx, dw, db = back(dy, x, x.shape[-1:], mean, rstd, w, b, [True, not narrow, not narrow and b is not None])
        if narrow:                                  # torch rounds what it adds up over tokens, on the CPU at each token
            dy, x, w = (t.to(mean.dtype) for t in (dy, x, w))
            b = None if b is None else b.to(mean.dtype)
            _, dw, db = back(dy, x, x.shape[-1:], mean, rstd, w, b, [False, True, b is not None])
        ctx.weight.add(dw)
        if ctx.bias:
            ctx.bias.add(db)
        return dx, None, None, None, None


def gains(x: Tensor, weight: Weight, bias: Weight | None, plus: float) -> tuple[Tensor, Tensor | None]:
    """The vectors as torch's kernels want them: in half precisions those of the CPU have statistics in fp32 only beside
    vectors in fp32, those of CUDA only know vectors of x's dtype."""
    dtype = x.dtype if x.is_cuda else statistics(x.dtype)
    return gain(weight, plus).to(dtype), bias.value.to(dtype) if bias else None


def gain(weight: Weight, plus: float) -> Tensor:
    """weight + `plus`, which in half precisions has digits that the weight's dtype has not."""
    return weight.value.to(statistics(weight.value.dtype)) + plus if plus else weight.value


def rms_norm(x: Tensor, weight: Weight, epsilon: float, plus: float = 0) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019) times weight + `plus`; statistics in fp32 or wider."""
    return _RMSNorm.apply(x, weight, epsilon, plus)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, epsilon: float, plus: float) -> Tensor:
        by, ctx.fused = gain(weight, plus), x.is_cuda and not plus             # the kernel's gains have x's dtype
        if ctx.fused:
            y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], by, epsilon)
        else:
            wide = x.to(statistics(x.dtype))
            rstd = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
            y = ((wide * rstd).to(x.dtype) * by).to(x.dtype)
        ctx.save_for_backward(x, rstd)
        ctx.weight, ctx.plus = weight, plus
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd = ctx.saved_tensors
        by = gain(ctx.weight, ctx.plus)
        normal = x * rstd                                       # in fp32 or wider, as what is added up over tokens
        ctx.weight.add((dy * normal).flatten(0, -2).sum(0))
        if ctx.fused:
            back = torch.ops.aten._fused_rms_norm_backward
            return back(dy, x, x.shape[-1:], rstd, by, [True, False])[0], None, None, None
        scaled = dy.to(rstd.dtype) * by
        dx = scaled.sub_(normal.mul_((scaled * normal).mean(-1, keepdim=True))).mul_(rstd)
        return dx.to(x.dtype), None, None, None


def width_norm(q: Tensor, k: Tensor, weights: tuple[Weight, Weight], epsilon: float, plus: float,
               group: Group) -> tuple[Tensor, Tensor]:
    """RMSNorm of q [b, s, n, d] and of k [b, s, n_kv, d], each over all heads of all ranks together (OLMo 2, section
    3.1). Ranks add up what each has of both means, and in backward again."""
    out = _WidthNorm.apply(q, k, weights, epsilon, plus, group)
    return out[0], out[1]


class _WidthNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: tuple[Weight, Weight], epsilon: float, plus: float,
                group: Group) -> tuple[Tensor, ...]:
        ctx.weights, ctx.plus, ctx.group = weights, plus, group
        wide = [x.to(statistics(x.dtype)) for x in (q, k)]
        rstd = _means([x.square() for x in wide], weights, group).add_(epsilon).rsqrt_()
        ctx.save_for_backward(q, k, rstd)
        return tuple(((x * r).to(q.dtype) * gain(w, plus).view(x.shape[2:])).to(q.dtype)
                     for x, r, w in zip(wide, rstd, weights, strict=True))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        q, k, rstd = ctx.saved_tensors
        normal = [x * r for x, r in zip((q, k), rstd, strict=True)]
        for w, dy, n in zip(ctx.weights, dys, normal, strict=True):
            w.add((dy * n).flatten(0, 1).sum(0).flatten())
        scaled = [dy.to(rstd.dtype) * gain(w, ctx.plus).view(dy.shape[2:])
                  for w, dy in zip(ctx.weights, dys, strict=True)]
        # of a head that several ranks have, each has a part of the gradient, and takes off as much of the mean's
        along = _means([s * n for s, n in zip(scaled, normal, strict=True)], ctx.weights, ctx.group)
        dx = [s.sub_(n.mul_(a)).mul_(r).to(q.dtype) for s, n, a, r in zip(scaled, normal, along, rstd, strict=True)]
        return *dx, None, None, None, None


def _means(xs: Sequence[Tensor], weights: Sequence[Weight], group: Group) -> Tensor:
    """[2, b, s, 1, 1]: the mean of each x [b, s, n, d] over the channels of all ranks. What r ranks have counts 1 / r
    on each."""
    here = [x.sum((-2, -1), keepdim=True) / (w.logical[0].parameter.shape[0] * w.logical[0].replicas)
            for x, w in zip(xs, weights, strict=True)]
    return group.all_reduce(torch.stack(here)).wait()


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


def positions(x: Tensor, at: Tensor, weight: Weight, offset: int = 0) -> Tensor:
    """x [t/tp, h] + learned rows at positions [t/tp], the first of which is row `offset`."""
    return _Positions.apply(x, at, weight, offset)


class _Positions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, weight: Weight, offset: int) -> Tensor:
        ctx.save_for_backward(at)
        ctx.weight, ctx.offset = weight, offset
        return x + F.embedding(at, weight.value[offset:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weight.add_rows(ctx.saved_tensors[0] + ctx.offset, dy)
        return dy, None, None, None


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
    x: Tensor, targets: Tensor, mask: Tensor, weight: Weight, group: Group, chunk: int, scale: Tensor | None,
    cap: float = 0,
) -> tuple[Tensor, Tensor | None]:
    """Head and loss in chunks of tokens, so that full logits never exist.

    x [t, h] (gathered), targets and mask [t] -> (sum of the masked losses, float32 or wider; gradient for x [t, h]).
    `scale` is what the sum of losses is multiplied by before backward (None: no gradients wanted). Forward and backward
    of a chunk happen together, so logits are computed once; the gradient for x is this rank's part of the vocabulary's.
    `cap`: of the logits; 0 for none.
    """
    rows, total = weight.box.size[0], torch.zeros((), dtype=statistics(x.dtype), device=x.device)
    dx = torch.empty_like(x) if scale is not None else None
    room = torch.empty(min(chunk, len(x)), len(weight.value), dtype=x.dtype, device=x.device)
    index, here = local_rows(targets, weight)
    for low in range(0, len(x), chunk):
        part = slice(low, min(low + chunk, len(x)))
        logits = torch.mm(x[part], weight.value.T, out=room[:part.stop - low])      # [c, rows], refilled for each chunk
        logits, slope = capped(logits, cap)
        logits[:, rows:] = -torch.inf                                               # padding is never predicted
        factor = None if scale is None else mask[part] * scale
        losses = softmax_loss(logits, index[part], None if here is None else here[part], group, factor)
        total += (losses * mask[part]).sum()
        if dx is not None:
            logits = logits if slope is None else logits.mul_(slope)
            input_gradient(logits, weight, out=dx[part])
            weight.add_product(logits, x[part])
    return total, dx


def capped(logits: Tensor, cap: float) -> tuple[Tensor, Tensor | None]:
    """cap tanh(logits / cap) in place, and its derivative; 0: as they are, and None."""
    if not cap:
        return logits, None
    slope = logits.div_(cap).tanh_().square().neg_().add_(1)
    return logits.mul_(cap), slope


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
