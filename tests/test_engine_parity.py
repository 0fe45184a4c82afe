"""Stock modules in the engine: any level on any number of ranks equals plain autograd on one, with torch.optim.

Compared to 1e-12 in float64, as in test_parity.py: losses and norms of five steps, every gradient of the first, every weight after the fifth.
"""

import contextlib
import copy
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from modules import CALLS, LENGTH, MODELS, VOCABULARY, Choosing, Critic, chosen, loss, penalty, t5
from pool import Pool
from torch import nn

from megazero.base.errors import UserError
from megazero.comm.group import Stuck
from megazero.comm.shared import Slot
from megazero.comm.wires import Wires, connect
from megazero.engine.engine import Engine
from megazero.engine.hidden import Hidden
from megazero.plan.mesh import Mesh
from megazero.plan.program import Zero
from megazero.settings.config import Optimization as Settings
from megazero.state import checkpoint

pytest.importorskip("transformers", reason="the module is transformers' GPT-2, which is not installed")

STEPS, SAMPLES, LR, DECAY, EPS, MOMENTUM = 5, 12, 1e-2, 0.1, 1e-5, 0.9
Tensor = torch.Tensor


@dataclass(frozen=True)
class Row:
    """One run. `shard` 0 is all ranks; step `skip` has a gradient that is not finite on the last rank."""

    model: str = "gpt2"
    dp: int = 1
    level: int = 0
    shard: int = 0
    recompute: str = "none"
    accumulation: int = 1
    optimizer: str = "adam"
    clip: float = 0.5
    skip: int = -1
    late: bool = False
    overlap: bool = True
    every: int = 1
    keep: int = 1

    def __str__(self) -> str:
        plain = Row()
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)) or "plain"

    @property
    def zero(self) -> Zero:
        return Zero(self.level, self.keep, self.every, prefetch=self.overlap, lag=1 if self.overlap and self.level >= 2 else 0)

    @property
    def alone(self) -> "Row":
        """What plain torch is told: all that is not about layout."""
        return Row(self.model, optimizer=self.optimizer, clip=self.clip, skip=self.skip)


def wires(row: Row) -> Wires:
    import os
    shard = (row.shard or row.dp) if row.level else 1
    return connect(Mesh.of(dp=row.dp, shard=shard), int(os.environ["RANK"]) if row.dp > 1 else 0, "gloo+late" if row.late else "gloo", 60)


def engine(row: Row, seed: int = 0) -> Engine:
    w = wires(row)
    torch.manual_seed(seed + w.rank)                            # ranks begin with different weights: those of rank 0 count
    settings = Settings(row.optimizer, lr=LR, weight_decay=DECAY, adam_eps=EPS, sgd_momentum=MOMENTUM, clip_grad=row.clip)
    return Engine(MODELS[row.model](row.recompute), w, settings, row.zero, "fp64", row.accumulation)


def data(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(step))


Figures = list[tuple[float, float]]
Slices = list[tuple[str, Any, Tensor]]


def held(e: Engine, buffer: str) -> Slices:
    """What this rank's slices hold of each parameter."""
    for unit in (u for b in (e.root, *e.blocks) for u in b.units):
        unit.updated()
    return [(s.name, s.box, s.tensor.clone()) for b in (e.root, *e.blocks) for u in b.units
            for _, s in checkpoint.held(u.flat, u.low, {buffer: getattr(u, buffer)})]


def micro_batches(e: Engine, step: int) -> list[Tensor]:
    """This rank's, of a batch that all ranks and micro-batches divide."""
    n, rank = e.sums.micro_batches, e.wires.place.dp
    return list(data(step).chunk(n * e.wires.mesh.dp)[rank * n:(rank + 1) * n])


def play(row: Row) -> tuple[Figures, Slices, Slices]:
    """Five steps on this rank: (loss, norm) of each; gradients of the first that counts and weights after the last."""
    e = engine(row)
    figures, gradients, judge = [], [], e.gate.judge

    def looked(*arguments: Any) -> Any:
        if e.steps != row.skip:
            gradients.append([(n, box, t / (e.sums.micro_batches * row.dp)) for n, box, t in held(e, "grad_slice")])
        return judge(*arguments)

    e.gate.judge = looked  # type: ignore[method-assign]
    for step in range(STEPS):
        spoiled = [spoil(p) for p in list(e.module.parameters())[-2:-1] if step == row.skip and e.wires.rank == row.dp - 1]
        before = held(e, "master")
        for ids in micro_batches(e, step):
            e.backward(loss(e, ids))
            verdict = e.step()
        assert verdict is not None and bool(verdict.found_inf) == (step == row.skip)
        for hook in spoiled:
            hook.remove()
        if step == row.skip:
            assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(before, held(e, "master"), strict=True))
        else:
            figures.append((verdict.loss.item(), verdict.norm.item()))
    return figures, gradients[0], held(e, "master")


def spoil(p: nn.Parameter) -> Any:
    return p.register_hook(lambda g: g * torch.nan)


@cache
def alone(row: Row) -> tuple[Figures, dict[str, Tensor], dict[str, Tensor]]:
    """The same with nothing of ours."""
    torch.manual_seed(0)
    model = MODELS[row.model]("none")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p for p in named.values() if (p.dim() > 1) == big], "weight_decay": DECAY if big else 0.0} for big in (True, False)]
    optimizer: Any = torch.optim.AdamW(groups, lr=LR, eps=EPS) if row.optimizer == "adam" else torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    figures, gradients = [], {}
    for step in range(STEPS):
        mean = loss(model, data(step))
        mean.backward()
        for p in named.values():                                # a parameter that had no part has gradient zero: it is decayed
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if step != row.skip:
            gradients = gradients or {n: p.grad.clone() for n, p in named.items()}
            norm = torch.nn.utils.clip_grad_norm_(named.values(), row.clip or 1e30)
            optimizer.step()
            figures.append((mean.item(), norm.item()))
        optimizer.zero_grad()
    return figures, gradients, {n: p.detach() for n, p in model.named_parameters()}


def compare(row: Row, pool: Pool) -> None:
    want_figures, want_gradients, want_weights = alone(row.alone)
    if row.clip:
        assert any(norm > row.clip for _, norm in want_figures), "clipping should act"
    results = pool.run(row.dp, play, row) if row.dp > 1 else [play(row)]
    covered = Counter[tuple[str, str]]()
    for figures, gradients, weights in results:
        for got, want in zip(figures, want_figures, strict=True):
            assert got == pytest.approx(want, rel=1e-12, abs=0)
        for kind, found, wanted in (("gradient", gradients, want_gradients), ("weight", weights, want_weights)):
            largest = max(float(t.abs().max()) for t in wanted.values())
            for name, box, tensor in found:
                whole = wanted[name].reshape(wanted[name].shape or (1,))
                tolerance = 1e-12 * max(float(whole.abs().max()), 1e-3 * largest)                # a bias of k has only rounding
                assert (tensor - whole[box.slices]).abs().max() <= tolerance, (kind, name, box)
                covered[kind, name] += tensor.numel()
    copies = row.dp // ((row.shard or row.dp) if row.level else 1)
    for kind, wanted in (("gradient", want_gradients), ("weight", want_weights)):
        assert all(covered[kind, name] == copies * tensor.numel() for name, tensor in wanted.items()), "not every element was compared"


HOW = ("none", "reentrant", "nonreentrant")
CI = [
    *(Row(dp=2, level=level, recompute=HOW[level % 3], accumulation=1 + level % 2, skip=level) for level in range(4)),
    *(Row(dp=3, level=level, recompute=HOW[(level + 1) % 3], accumulation=2, optimizer="sgd", late=True) for level in range(4)),
    *(Row(dp=4, level=level, recompute=HOW[(level + 2) % 3], accumulation=3, late=True, every=2, keep=2, overlap=level % 2 == 0) for level in range(4)),
    *(Row("odd", dp=2 + level % 2, level=level, recompute=how, accumulation=2, late=True, skip=2)
      for level, how in enumerate(("reentrant inside", "nonreentrant inside", "reentrant", "nonreentrant"))),
    *(Row("odd", dp=2, level=3, recompute=how, late=True, optimizer="sgd") for how in ("none", "nonreentrant inside", "reentrant")),
    *(Row(dp=4, level=level, shard=2, accumulation=3, clip=0.0, late=True) for level in (1, 2, 3)),
    Row(level=3, accumulation=2, keep=4), Row("odd", level=3, recompute="reentrant inside"),
]
FULL = [Row(model, dp, level, shard, how, accumulation, optimizer, skip=skip, late=late, overlap=overlap, every=every, keep=keep)
        for model in MODELS for dp in (1, 2, 3, 4) for level in range(4) for shard in ((0, 2) if dp == 4 and level else (0,))
        for how in (*HOW, "reentrant inside", "nonreentrant inside") if model == "odd" or " " not in how
        for accumulation, every, keep in ((1, 1, 1), (3, 1, 1), (3, 2, 4))
        for optimizer, skip, late in (("adam", -1, False), ("sgd", 3, True)) for overlap in (True, False)]


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


@pytest.mark.parametrize("row", CI, ids=str)
def test_equal_to_plain_autograd(row: Row, pool: Pool) -> None:
    compare(row, pool)


@pytest.mark.full
@pytest.mark.parametrize("row", FULL, ids=str)
def test_equal_to_plain_autograd_in_full(row: Row, pool: Pool) -> None:
    compare(row, pool)


@pytest.mark.parametrize("level", range(4))
def test_overlap_changes_no_bit(level: int, pool: Pool) -> None:
    row = Row(dp=2, level=level, recompute="nonreentrant", accumulation=2)
    for (f, g, w), (f2, g2, w2) in zip(pool.run(2, play, row), pool.run(2, play, replace(row, overlap=False)), strict=True):
        assert f == f2 and all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(g + w, g2 + w2, strict=True))


def beside_fsdp() -> float:
    """The largest difference, relative to each weight's largest element, between level 3 and torch's fully_shard after five steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    row = Row(dp=2, level=3, accumulation=2, clip=0.0)
    e = engine(row)                                             # joins the ranks
    torch.manual_seed(0)
    model: Any = MODELS["gpt2"]("none")
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == big], "weight_decay": DECAY if big else 0.0} for big in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    for step in range(STEPS):
        for ids in micro_batches(e, step):
            (loss(model, ids) / 2).backward()
            e.backward(loss(e, ids))
            e.step()
        optimizer.step()
        optimizer.zero_grad()
    theirs = {n: p.full_tensor() for n, p in model.named_parameters()}
    return max(float((t - theirs[n][box.slices]).abs().max() / theirs[n].abs().max()) for n, box, t in held(e, "master") if t.numel())


def test_equal_to_fsdp(pool: Pool) -> None:
    assert max(pool.run(2, beside_fsdp)) <= 1e-12


def sent(row: Row) -> tuple[int, int, list[int], list[int]]:
    """Bytes that this rank sends in the second step over `shard` and `replicate`; of the root and each block its part, of weights and
    of those that are trained."""
    e = engine(row)
    for step in range(2):
        before = e.wires.line.sent.copy()
        for ids in micro_batches(e, step):
            e.backward(loss(e, ids))
            e.step()
    now = e.wires.line.sent - before
    whole, trained = ([sum(u.size * 8 * (row.dp - 1) // row.dp for u in b.units if u.trained >= least) for b in (e.root, *e.blocks)] for least in (0, 1))
    return now["shard"], now["replicate"], whole, trained


# Times that weights travel in a step of 3 micro-batches: of the root and each block; and gradients of all.
TRAVELS = {
    Row(level=0): ((0, 0, 0, 0), 0), Row(level=1): ((1, 1, 1, 1), 1), Row(level=2): ((1, 1, 1, 1), 3),
    **{Row(level=3, recompute=how): ((3, 6, 6, 6), 3) for how in HOW},
    Row("odd", level=3): ((3, 12, 6, 0), 3),                    # its first block is called twice, its last never
}


@pytest.mark.parametrize("row", TRAVELS, ids=str)
def test_bytes_are_those_of_the_level(row: Row, pool: Pool) -> None:
    times, reduced = TRAVELS[row]
    for shard, replicate, whole, trained in pool.run(2, sent, replace(row, dp=2, accumulation=3)):
        assert shard == sum(n * w for n, w in zip(times, whole, strict=True)) + reduced * sum(trained)
        assert replicate == (2 * sum(trained) if row.level == 0 else 0)


def alive() -> int:
    """Bytes of all storages that Python's tensors see, but for the memory that ranks share to send."""
    import gc
    gc.collect()
    everything = gc.get_objects()
    shared = {x.bytes.untyped_storage().data_ptr() for x in everything if type(x) is Slot}
    storages = [x.untyped_storage() for x in everything if type(x) in (Tensor, nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in shared}.values())


def memory(level: int) -> tuple[int, int, int, int, int]:
    """Bytes: alive before, after engine and a step; of borrowed buffers; elements of blocks and of the root, padded."""
    before = alive()
    e = engine(Row(dp=2, level=level, accumulation=3))
    for ids in micro_batches(e, 0):
        e.backward(loss(e, ids))
        e.step()
    del ids
    return before, alive(), e.root.units[0].sharing.buffers.bytes, sum(b.units[0].size for b in e.blocks), e.root.units[0].size


@pytest.mark.parametrize("level", range(4))
def test_memory_is_that_of_the_level(level: int, pool: Pool) -> None:
    """In float64, 2 ranks: 32 bytes per parameter at level 0 (weight, gradient, two moments), 16 + 16/2, 8 + 24/2, 32/2. Beside them
    from level 2 two blocks' gradients and the root's are borrowed, at level 3 their weights too; and a few scalars."""
    for before, after, borrowed, blocks, root in pool.run(2, memory, level):
        assert borrowed == (0, 0, 1, 2)[level] * 8 * (2 * blocks // 3 + root)
        assert 0 <= after - before - borrowed - (32, 24, 20, 16)[level] * (blocks + root) < 1024


# ---- as people use it: each rank its own losses, against one plain model that takes their mean

Weights = dict[str, Tensor]
SETTINGS = Settings(lr=LR, weight_decay=DECAY, adam_eps=EPS, clip_grad=0.0)


def made(make: Any, row: Row, **words: Any) -> Engine:
    w = wires(row)
    torch.manual_seed(w.rank)                                   # those of rank 0 count
    model = make()
    blocks = [*model.blocks, *model.heads] if isinstance(model, Choosing) else None
    return Engine(model, w, SETTINGS, row.zero, words.pop("dtype", "fp64"), row.accumulation, blocks=blocks, **words)


def whole(e: Engine) -> Weights:
    return {n: t.clone() for n, t in e.module.state_dict().items()}


def plainly(make: Any, losses: Any, steps: int = STEPS) -> Weights:
    """`losses(model, step)` of all ranks and micro-batches of a step; what had no part has gradient zero."""
    torch.manual_seed(0)
    model = make()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and (p.dim() > 1) == big], "weight_decay": DECAY if big else 0.0}
              for big in (True, False)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, eps=EPS)
    for step in range(steps):
        optimizer.zero_grad()
        torch.stack(losses(model, step)).mean().backward()                                       # type: ignore[no-untyped-call]
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
        optimizer.step()
    return {n: t.detach() for n, t in model.state_dict().items()}


def near(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert (found[name] - t).abs().max() <= 1e-12 * max(1.0, float(t.abs().max())), name


def choose(level: int, call: str) -> tuple[Weights, int]:
    e = made(Choosing, Row(dp=2, level=level, late=True))
    for step in range(STEPS):
        e.backward(chosen(e, call, e.wires.rank, step))
        e.step()
    return whole(e), e.sums.waited


@pytest.mark.parametrize("call", CALLS)
def test_ranks_may_call_different_blocks_where_weights_are_whole(call: str, pool: Pool) -> None:
    """Sums travel in one order; what a rank did not use is zero there. At level 2 whole sums that wait are counted."""
    wanted = plainly(Choosing, lambda model, step: [chosen(model, call, rank, step) for rank in (0, 1)])
    for level in range(3):
        found = pool.run(2, choose, level, call)
        for weights, _ in found:
            near(weights, wanted)
        assert any(waited for _, waited in found) or call != "each has another order"


def turning(model: Any, rank: int, step: int) -> Tensor:
    """From the third step on all ranks call blocks the other way round."""
    x = torch.rand(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x, [0, 1, 2, 3] if step < 2 else [3, 2, 1, 0], 0)                               # type: ignore[no-any-return]


def turned(level: int) -> tuple[Weights, list[str]]:
    e, orders = made(Choosing, Row(dp=2, level=level, late=True)), []
    for step in range(5):
        e.backward(turning(e, e.wires.rank, step))
        e.step()
        orders.append("".join(u.flat.name[-1] for u in e.sums.order if u.flat.name.startswith("blocks")))
    return whole(e), orders


def test_the_order_is_agreed_again_when_blocks_change(pool: Pool) -> None:
    wanted = plainly(Choosing, lambda model, step: [turning(model, rank, step) for rank in (0, 1)], 5)
    for level in range(4):
        for weights, orders in pool.run(2, turned, level):
            near(weights, wanted)
            assert orders == ["3210", "3210", "3210", "0123", "0123"]


def apart(call: str) -> str:
    with pytest.raises(Stuck) as told:
        choose(3, call)
    return str(told.value)


@pytest.mark.parametrize("call", CALLS)
def test_ranks_that_gather_different_blocks_are_told_both(call: str, pool: Pool) -> None:
    """All of them, at once."""
    for rank, told in enumerate(pool.run(2, apart, call)):
        assert re.fullmatch(rf"rank {rank} is in .* over shard, (.*) of (blocks|heads)\.\d, where rank {1 - rank} is in "
                            r"(all-gather|reduce-scatter) of (blocks|heads)\.\d: all ranks must call the same blocks .*", told)


def traced() -> tuple[float, str]:
    e = made(Choosing, Row(dp=2, level=3))
    before = held(e, "master")
    e.wires.line.marks.trace ^= e.wires.rank                    # as under NCCL, whose messages have no tags
    e.backward(chosen(e, "each drops another layer", 0, 0))
    verdict = e.step()
    assert verdict is not None and all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(before, held(e, "master"), strict=True))
    with pytest.raises(UserError) as told:
        e.step() or e.backward(chosen(e, "each drops another layer", 0, 1)) or e.step()
    return float(verdict.found_inf), str(told.value)


def test_calls_about_different_things_end_all_ranks_before_the_update(pool: Pool) -> None:
    for found_inf, told in pool.run(2, traced):
        assert found_inf == 1 and told.startswith("step 1: ranks gathered or summed different blocks, and nothing was changed")


# ---- weights between steps

def between(level: int, overlap: bool) -> tuple[Weights, Weights, float, float]:
    """After two steps: what readers see, the masters, and a block's own forward pass beside that of its weights."""
    e = made(partial(MODELS["gpt2"], "none"), Row(dp=2, level=level, late=True), overlap=overlap)
    for step in range(2):
        e.backward(loss(e, micro_batches(e, step)[0]))
        e.step()
    seen = whole(e)
    block, x = e.module.transformer.h[1].mlp.c_fc, torch.rand(2, 24, dtype=torch.float64)        # type: ignore[union-attr, operator, index]
    if level == 3 or overlap:
        e.module.eval()
        hidden = next(p for p in e.module.parameters() if type(p) is Hidden) if level == 3 else e.module.transformer.h[2].mlp.c_fc.weight   # type: ignore[union-attr, operator, index]
        assert level < 3 or (hidden.numel() == hidden.ds_numel == hidden.ds_shape.numel())
        reads = (torch.sum, lambda p: p.norm(), lambda p: p + 1, lambda p: p.data, copy.deepcopy, lambda p: F.linear(x, p))
        for read in reads if level == 3 else ():
            with pytest.raises(UserError, match=r"its weights are not whole here now; .* engine.whole\(parameter\)"):
                read(hidden)
    with torch.no_grad(), e.whole(*block.parameters()):
        mine, theirs = block.forward(x), x @ block.weight + block.bias
    masters = {}
    for name, box, t in held(e, "master"):
        masters[name] = seen[name].reshape(seen[name].shape or (1,))[box.slices] - t
    return seen, masters, float((mine - theirs).abs().max()), float(mine.abs().max())


@pytest.mark.parametrize("level, overlap", [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False)])
def test_weights_are_whole_between_steps(level: int, overlap: bool, pool: Pool) -> None:
    for seen, differ, apart, size in pool.run(2, between, level, overlap):
        assert all(t.isfinite().all() for t in seen.values()) and all(t.abs().max() == 0 for t in differ.values() if t.numel())
        assert apart < 1e-15 and size > 0


def written(level: int, dtype: str, how: str) -> tuple[Weights, Weights]:
    """One parameter is written between two steps of rate 0; what the module holds before and after."""
    w = wires(Row(dp=2, level=level))
    torch.manual_seed(0)
    e = Engine(Choosing(), w, replace(SETTINGS, lr=0.0, weight_decay=0.0), Zero(level), dtype)
    new, p = torch.full((8, 8), 0.123456), e.module.blocks[2][0].weight                         # type: ignore[union-attr, operator, index]
    before = whole(e)
    with torch.no_grad():
        if how == "load":
            e.module.load_state_dict({**before, "blocks.2.0.weight": new})
        elif how == "load a block":
            e.module.blocks[2].load_state_dict({"0.weight": new, "0.bias": before["blocks.2.0.bias"]})   # type: ignore[union-attr, operator, index]
        elif how == "in place" and level < 3:
            p.copy_(new)
        elif how == "data" and level < 3:
            p.data.copy_(new)
        else:
            with e.whole(p, writer=1 if how == "writer" else None):
                if how != "writer" or w.rank == 1:
                    p.copy_(new)
    e.backward(e(torch.ones(1, 8, dtype=p.dtype), [0, 1, 2, 3], 0))
    e.step()
    after = whole(e)
    masters = {n: t for n, box, t in held(e, "master") if n == "blocks.2.0.weight"}
    assert all((t - 0.123456).abs().max() < (1e-7 if dtype == "fp64" else 1e-3) for t in masters.values() if t.numel())
    return before, after


@pytest.mark.parametrize("level", range(4))
def test_what_is_written_into_weights_has_effect(level: int, pool: Pool) -> None:
    """Loaded, in place, within `whole`, by one rank alone: in masters too, which keep their precision elsewhere."""
    for dtype in ("fp64", "bf16"):
        for how in ("load", "load a block", "in place", "data", "whole", "writer"):
            for before, after in pool.run(2, written, level, dtype, how):
                want = torch.full((8, 8), 0.123456, dtype=after["blocks.2.0.weight"].dtype)
                assert (after["blocks.2.0.weight"].float() - want.float()).abs().max() < 1e-7
                assert all(torch.equal(t, after[n]) for n, t in before.items() if n != "blocks.2.0.weight")


# ---- windows, plain backward passes, tokens, failures

def ignoring(model: Any, ids: Tensor, keep: int) -> Tensor:
    """Mean over `keep` of the next tokens; of none it is no number."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, torch.where(torch.arange(len(logits)) < keep, ids[:, 1:].flatten(), -100))


WINDOWS = ((2, 2, 2), (1, 3, 2))                                # micro-batches of steps, by count and otherwise
KEPT = (7, 0, 30, 11, 45, 2)                                    # tokens that count of each micro-batch


def micro(step: int, i: int, rank: int) -> Tensor:
    return data(10 * step + 2 * i + rank)[:3]


def use(level: int, how: str, recompute: str = "none") -> Weights:
    """Three steps of this rank, in one of the ways in which engines are used."""
    e = made(partial(MODELS["gpt2"], recompute), Row(dp=2, level=level, late=True, accumulation=2))
    rank, seen = e.wires.rank, 0
    for step, n in enumerate(WINDOWS[how in ("switch", "partial", "no_sync")]):
        for i in range(n):
            ids = micro(step, i, rank)
            if how == "plain":
                loss(e, ids).backward()                                                          # type: ignore[no-untyped-call]
            elif how == "tokens":
                keep = KEPT[(seen + 3 * rank) % 6]
                e.backward(ignoring(e, ids, keep), tokens=keep if i else torch.tensor(keep))
            elif how == "no_sync" and i < n - 1:
                with e.no_sync():
                    e.backward(loss(e, ids))
            else:
                if how in ("switch", "no_sync"):
                    e.set_gradient_accumulation_boundary(i == n - 1)
                if how == "partial":
                    e.set_gradient_accumulation_boundary(False if n > 2 else None)
                e.backward(loss(e, ids), scale_wrt_gas=how != "sums")
                assert how not in ("switch", "no_sync") or e.is_gradient_accumulation_boundary() == (i == n - 1)
            seen += 1
            if how != "optional" or i == n - 1:
                e.step()
        if how == "partial":
            e.step(partial=True)
        if how == "dropped" and step == 0:
            e.backward(loss(e, micro(7, 7, rank)))
            e.zero_grad()
        e.zero_grad()
    assert e.global_steps == 3 and e.skipped_steps == 0 and e.was_step_applied() and (e.get_global_grad_norm() or 0) > 0
    return whole(e)


def used(how: str) -> Weights:
    def losses(model: Any, step: int) -> list[Tensor]:
        n = WINDOWS[how in ("switch", "partial", "no_sync")][step]
        ids = [(rank, i, micro(step, i, rank)) for rank in (0, 1) for i in range(n)]
        if how == "tokens":
            keeps = [KEPT[(2 * step + i + 3 * rank) % 6] for rank, i, _ in ids]
            sums = [ignoring(model, x, keep) * keep for keep, (_, _, x) in zip(keeps, ids, strict=True) if keep]
            return [torch.stack(sums).sum() / sum(keeps)]
        return [loss(model, x) * (n if how == "sums" else 1) for _, _, x in ids]
    return plainly(partial(MODELS["gpt2"], "none"), losses, 3)


@pytest.mark.parametrize("how", ["count", "optional", "plain", "tokens", "switch", "no_sync", "partial", "sums", "dropped"])
def test_engines_are_used_in_many_ways(how: str, pool: Pool) -> None:
    wanted = used(how)
    for level in range(4):
        for weights in pool.run(2, use, level, how):
            near(weights, wanted)


@pytest.mark.parametrize("recompute", HOW[1:])
def test_a_plain_backward_pass_may_recompute(recompute: str, pool: Pool) -> None:
    for level in (0, 2, 3):
        for weights in pool.run(2, use, level, "plain", recompute):
            near(weights, used("plain"))


def failing(level: int, plain: bool, dropped: bool = False) -> tuple[Weights, list[int]]:
    """In the second of four steps rank 1 has a sample whose backward pass fails in its middle; all go on. `dropped`: after a forward pass that came to nothing."""
    e = made(partial(MODELS["gpt2"], "none"), Row(dp=2, level=level, accumulation=2))
    applied = []
    for step in range(4):
        for i in range(2):
            if dropped:
                loss(e, micro(7, 7, e.wires.rank))
            mean = loss(e, micro(step, i, e.wires.rank))
            bad = step == i == 1 and e.wires.rank == 1
            hook = e.module.transformer.h[1].mlp.c_fc.weight.register_hook(fail) if bad else None    # type: ignore[union-attr, operator, index]
            try:
                (mean.backward if plain else partial(e.backward, mean))()                        # type: ignore[no-untyped-call]
            except MemoryError:
                assert hook and not hook.remove()
            e.step()
        applied.append(int(e.was_step_applied()))
    return whole(e), applied


def fail(_: Tensor) -> None:
    raise MemoryError


@pytest.mark.parametrize("plain, dropped", [(False, False), (True, False), (False, True)])
def test_a_backward_pass_that_fails_on_one_rank_drops_the_step_on_all(plain: bool, dropped: bool, pool: Pool) -> None:
    steps = (0, 2, 3)
    wanted = plainly(partial(MODELS["gpt2"], "none"),
                     lambda model, step: [loss(model, micro(steps[step], i, rank)) for i in (0, 1) for rank in (0, 1)], 3)
    for level in (3,) if dropped else range(4):
        for weights, applied in pool.run(2, failing, level, plain, dropped):
            assert applied == [1, 0, 1, 1]
            near(weights, wanted)


def again(level: int, destroyed: bool) -> tuple[Weights, int, int]:
    """Two engines, one after the other, on one module; what it holds after the second was destroyed, hooks and storages."""
    first = made(partial(MODELS["gpt2"], "none"), Row(dp=2, level=level))
    model, found = first.module, first
    for step in range(2):
        if step:
            if destroyed:
                first.destroy()
                before = {n: t.clone() for n, t in model.state_dict().items()}
            found = Engine(model, first.wires, SETTINGS, Zero(3 - level), "fp64")
            assert not destroyed or all(torch.equal(t, before[n]) for n, t in whole(found).items())
        found.backward(loss(found, micro(step, 0, found.wires.rank)))
        found.step()
    found.destroy()
    for e in (first, found):
        with pytest.raises(UserError, match="engine: was destroyed, or another one was made of its module .*; make a new one"):
            e.step()
    loss(model, micro(0, 0, 0)).backward()                                                       # type: ignore[no-untyped-call]
    assert all(p.grad is not None and type(p) is nn.Parameter for p in model.parameters())
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = sum(len(h) for m in model.modules() for n, h in vars(m).items() if n.endswith("_hooks") and isinstance(h, dict))
    return weights, hooks, len({p.untyped_storage().data_ptr() for p in model.parameters()}) - len(list(model.parameters()))


@pytest.mark.parametrize("destroyed", [False, True])
def test_a_second_engine_begins_with_the_trained_weights(destroyed: bool, pool: Pool) -> None:
    def both(model: Any, step: int) -> list[Tensor]:
        return [loss(model, micro(step, 0, rank)) for rank in (0, 1)]

    torch.manual_seed(0)
    model = plain = MODELS["gpt2"]("none")
    bare = sum(len(h) for m in model.modules() for n, h in vars(m).items() if n.endswith("_hooks") and isinstance(h, dict))
    for step in range(2):                                       # each engine with an optimizer of its own
        wanted = plainly(lambda: plain, lambda model, _, step=step: both(model, step), 1)
    for level in range(4):
        for weights, hooks, shared in pool.run(2, again, level, destroyed):
            near(weights, wanted)
            assert hooks == bare and shared == 0


def freeze(level: int, late: bool) -> Weights:
    """Parameters are frozen after the first step, and others get new data."""
    e = made(partial(MODELS["gpt2"], "none"), Row(dp=2, level=level, late=late))
    for step in range(3):
        change(e.module, step, e)
        e.backward(loss(e, micro(step, 0, e.wires.rank)))
        e.step()
    return whole(e)


def change(model: Any, step: int, e: Engine | None = None) -> None:
    if step == 1:
        model.transformer.h[1].requires_grad_(False)
        for p in model.transformer.h[1].parameters():
            p.grad = None
        with e.whole() if e else contextlib.nullcontext():
            model.transformer.ln_f.weight.data = torch.full((24,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("level", range(4))
def test_what_is_frozen_later_stays_and_other_data_count(level: int, pool: Pool) -> None:
    def losses(model: Any, step: int) -> list[Tensor]:
        change(model, step)
        return [loss(model, micro(step, 0, rank)) for rank in (0, 1)]

    wanted = plainly(partial(MODELS["gpt2"], "none"), losses, 3)
    for late in (False, True):
        for weights in pool.run(2, freeze, level, late):
            near(weights, wanted)


# ---- outside of the model's own forward pass

def parts(level: int, overlap: bool) -> list[Tensor]:
    """Parts of models called by themselves, after a step; beside what plain modules with the same weights give."""
    differ = []
    for make in (partial(MODELS["gpt2"], "none"), t5):
        e = made(make, Row(dp=2, level=level, late=True), overlap=overlap)
        ids = micro(0, 0, 0)
        e.backward(e(input_ids=ids, labels=ids).loss)
        e.step()
        torch.manual_seed(0)
        plain: Any = make()
        plain.load_state_dict(whole(e))
        for mode in (torch.no_grad, torch.inference_mode):
            for model in (plain, e.module):
                model.eval()
            with mode():
                for run in RUNS[make is t5]:
                    mine, theirs = run(e.module, ids), run(plain, ids)
                    differ.append((mine.double() - theirs.double()).abs().max().clone())
        hidden = sum(type(p) is Hidden for p in e.module.parameters())
        assert hidden == (len(list(e.module.parameters())) if level == 3 else 0), "what was lent is given back"
        if level == 3:
            with pytest.raises(UserError, match=r"was called outside of the model's own forward pass; .* or call it under torch.no_grad"):
                RUNS[make is t5][0](e.module, ids)
        e.module.train()
        e.backward(e(input_ids=ids, labels=ids).loss)
        verdict = e.step()
        assert verdict is not None and not verdict.found_inf
    return differ


RUNS: tuple[tuple[Any, ...], ...] = (
    (lambda m, x: m.transformer(x).last_hidden_state, lambda m, x: m.transformer.wte(x), lambda m, x: m.lm_head(m.transformer.h[1](m.transformer.wte(x))),
     lambda m, x: m.generate(x[:, :4], max_new_tokens=4, do_sample=False)),
    (lambda m, x: m.encoder(x).last_hidden_state, lambda m, x: m.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False)),
)


@pytest.mark.parametrize("level, overlap", [(0, False), (1, True), (2, False), (3, False)])
def test_parts_of_a_model_may_be_called_without_gradients(level: int, overlap: bool, pool: Pool) -> None:
    for differ in pool.run(2, parts, level, overlap):
        assert len(differ) == 12 and max(differ) < 1e-12


class Early(nn.Module):
    """Calls a part of its first block after all blocks, as diffusers' DiT does, and another before them without gradients."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.words, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)) for _ in range(3))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        with torch.no_grad():
            early = self.blocks[2][2](x)                                                         # type: ignore[index]
        for block in self.blocks:
            x = x + (torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return (self.head(x * early + self.blocks[0][2](x)) ** 2).mean()                 # type: ignore[index, no-any-return]


def early(level: int, recompute: bool) -> Weights:
    e = made(partial(Early, recompute), Row(dp=2, level=level, late=True))
    for step in range(3):
        e.backward(e(micro(step, 0, e.wires.rank)))
        e.step()
        with torch.no_grad():
            e(micro(step, 1, e.wires.rank))
    return whole(e)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_part_of_a_block_may_be_called_beside_its_turn(recompute: bool, pool: Pool) -> None:
    wanted = plainly(partial(Early, recompute), lambda model, step: [model(micro(step, 0, rank)) for rank in (0, 1)], 3)
    for level in range(4):
        for weights in pool.run(2, early, level, recompute):
            near(weights, wanted)


# ---- odd losses

def given(step: int, rank: int) -> Tensor:
    return torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()


def odd(model: Any, how: str, step: int, rank: int) -> Tensor:
    """A loss of shape [1]."""
    ids = micro(step, 0, rank)
    if how in ("one number", "sparse"):
        return model(ids)                                                                        # type: ignore[no-any-return]
    if how == "penalty within":
        return model(ids, within=True)                                                           # type: ignore[no-any-return]
    if how == "penalty outside":
        x = given(step, rank)
        score = model(ids, x)
        return score + penalty(score, x) + model(ids)                                            # type: ignore[no-any-return]
    x = given(step, rank)                                       # a look at the gradient of an input, before backward
    (seen,) = torch.autograd.grad(model(ids, x), x)
    return model(ids) * seen.abs().mean()                                                        # type: ignore[no-any-return]


def oddly(level: int, how: str, plain: bool) -> Weights | str:
    e = made(partial(Critic, how == "sparse"), Row(dp=2, level=level, late=True, accumulation=1))
    for step in range(3):
        try:
            mean = odd(e, how, step, e.wires.rank)
        except UserError as error:
            return str(error)
        (mean.backward if plain else partial(e.backward, mean))()                                # type: ignore[no-untyped-call]
        e.step()
    return whole(e)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("how", ["one number", "sparse", "penalty within", "penalty outside", "a look"])
def test_odd_losses_work_or_are_one_sentence(how: str, plain: bool, pool: Pool) -> None:
    wanted = plainly(Critic, lambda model, step: [odd(model, how, step, rank) for rank in (0, 1)], 3)
    for level in range(4):
        for weights in pool.run(2, oddly, level, how, plain):
            if level == 3 and how == "penalty outside":
                assert weights.startswith("create_graph=True outside of the model's forward pass: its weights are not whole there")
            else:
                near(weights, wanted)


def adversaries(level: int, plain: bool) -> tuple[Weights, Weights]:
    """Two engines: a loss goes through both, and its gradients of the second are dropped; then the second has its own."""
    maker, critic = (made(Critic, Row(dp=2, level=level, late=True)) for _ in range(2))
    for step in range(3):
        x = given(step, maker.wires.rank)
        both = critic(None, make_of(maker, x))
        (both.backward if plain else partial(maker.backward, both))()                            # type: ignore[no-untyped-call]
        maker.step()
        critic.zero_grad()
        critic.backward(critic(None, make_of(maker, x).detach()))
        critic.step()
    return whole(maker), whole(critic)


def make_of(model: Any, x: Tensor) -> Tensor:
    return x * model(None, x)                                                                    # type: ignore[no-any-return]


@pytest.mark.parametrize("plain", [False, True])
def test_a_loss_may_go_through_two_engines(plain: bool, pool: Pool) -> None:
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Critic())
        groups = [{"params": [p for p in models[-1].parameters() if (p.dim() > 1) == big], "weight_decay": DECAY * big} for big in (True, False)]
        optimizers.append(torch.optim.AdamW(groups, lr=LR, eps=EPS))
    for step in range(3):
        for i, through in enumerate((lambda x: make_of(models[0], x), lambda x: make_of(models[0], x).detach())):
            for m in models:
                for p in m.parameters():
                    p.grad = torch.zeros_like(p)
            sum(models[1](None, through(given(step, rank))) for rank in (0, 1)).div(2).backward()    # type: ignore[union-attr]
            optimizers[i].step()
    for level in range(4):
        for pair in pool.run(2, adversaries, level, plain):
            for found, model in zip(pair, models, strict=True):
                near(found, {n: t.detach() for n, t in model.state_dict().items()})


def copied(level: int) -> Weights:
    """A copy of the module is a module like any other; at level 3 it is made within `whole`."""
    e = made(partial(MODELS["gpt2"], "none"), Row(dp=2, level=level))
    if level == 3:
        with pytest.raises(UserError, match="its weights are not whole here now"):
            copy.deepcopy(e.module)
    with e.whole() if level == 3 else contextlib.nullcontext():
        other = copy.deepcopy(e.module)
    e.backward(loss(e, micro(0, 0, e.wires.rank)))
    e.step()
    loss(other, micro(0, 0, 0)).backward()                                                       # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in other.parameters())
    return {n: t.clone() for n, t in other.state_dict().items()}


@pytest.mark.parametrize("level", range(4))
def test_a_module_may_be_copied(level: int, pool: Pool) -> None:
    torch.manual_seed(0)
    model = MODELS["gpt2"]("none")
    for weights in pool.run(2, copied, level):
        near(weights, dict(model.state_dict()))


def buffered(level: int) -> tuple[list[Tensor], bool]:
    w = wires(Row(dp=2, level=level, late=True))
    torch.manual_seed(w.rank)
    model = Critic()
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.bool, torch.complex64)
    for i, dtype in enumerate(kinds):
        noise = (torch.rand(5, 3) - 0.5) * (2.0**62 if dtype == torch.int64 else 100)
        model.blocks[0].register_buffer(f"b{i}", (noise > 0 if dtype == torch.bool else noise).to(dtype), persistent=bool(i % 2))
    model.register_buffer("turned", torch.rand(3, 4).T)
    model.register_buffer("count", torch.tensor(w.rank + 7))
    model.register_buffer("none", torch.zeros(0))
    before = [b.clone() for b in model.buffers()]
    Engine(model, w, SETTINGS, Zero(level), "fp64")
    return [b.clone() for b in model.buffers()], all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_all_ranks_begin_with_the_buffers_of_the_first(pool: Pool) -> None:
    """To the bit, whatever they are."""
    (first, kept), (second, same) = pool.run(2, buffered, 2)
    assert kept and not same and len(first) == 10 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
