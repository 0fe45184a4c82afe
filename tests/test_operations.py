"""A block told as rows, against the block that runs: what autograd keeps, operation by operation, and whole steps."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from support import SHAPES, TINY, resolved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megazero.comm.wires import connect
from megazero.model.activations import ACTIVATIONS
from megazero.model.decoder import Batch, Block
from megazero.model.ops import column, row
from megazero.plan import architecture
from megazero.plan.action import Action
from megazero.plan.cost import memory, micro, peak
from megazero.plan.operations import Operation, distinct, table
from megazero.plan.plan import Plan
from megazero.run.executor import Turn
from megazero.run.run import Run

Tensor = torch.Tensor
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"


def bytes_of(tensors: list[Tensor], besides: list[Tensor]) -> int:
    """Of their storages, each once, but for those of `besides`."""
    known = {t.untyped_storage().data_ptr() for t in besides}
    return sum({s.data_ptr(): s.nbytes() for t in tensors if (s := t.untyped_storage()).data_ptr() not in known}.values())


@contextmanager
def packing(seen: list[Tensor]) -> Iterator[None]:
    """What autograd saves; `detach`, since a saved result would hold the graph that holds it."""
    def pack(t: Tensor) -> Tensor:
        seen.append(t.detach())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


def started(plan: Plan, rank: int) -> Run:
    """Weights are not filled: only sizes are looked at."""
    return Run(plan, torch.device("cpu"), connect(plan.mesh, rank, "fake", 60))


def batch_of(plan: Plan, documents: bool = False, positions: bool = False) -> Batch:
    tokens = torch.zeros(plan.micro_batch, plan.architecture.seq_length, dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones_like(tokens), torch.arange(plan.micro_batch), 0,
                 tokens.clone() if positions else None, tokens.clone() if documents else None)


def elsewhere(run: Run, batch: Batch) -> list[Tensor]:
    """What lives whether or not autograd keeps it."""
    shared = [t for i in range(run.decoder.a.layers) for t in tree_leaves(run.decoder.shared(batch, run.decoder.a.kind(i)))]
    return [*(u.weights for u in run.units.values() if u.weights is not None), *tree_leaves(list(run.decoder.rotary.values())), batch.tokens,
            *(t for t in (batch.positions, batch.documents, *shared) if t is not None)]


def configurations(shape: str, tp: int) -> Iterator[tuple[str, bool]]:
    """(words, masks): every dtype, dropout, and masks; several samples, one, and tokens that tp does not divide."""
    for size, dtypes in (("--micro-batch-size 2", "fp32 bf16 fp64"), ("--micro-batch-size 1", "bf16"), ("--micro-batch-size 3 --seq-length 25", "fp16")):
        for dtype in dtypes.split():
            for dropout in ("", DROPOUT, "--attention-dropout 0.1"):
                for masks in (False, True):
                    flags = "--reset-attention-mask --reset-position-ids --tokenizer-type NullTokenizer" if masks else ""
                    if masks and "position-embedding-type none" in SHAPES[shape]:
                        flags = flags.replace("--reset-position-ids ", "")
                    yield f"{TINY} {SHAPES[shape]} {size} --dtype {dtype} {dropout} {flags} --tp {tp}", masks


CASES = list(product(SHAPES, ("none", "selective", "full"), (1, 2, 4)))
DRAWN = Random(13).sample(CASES, 60)                            # the others run under `full`


@pytest.mark.parametrize("shape, recompute, tp", DRAWN)
def test_the_rows_know_what_autograd_keeps(shape: str, recompute: str, tp: int) -> None:
    compare(shape, recompute, tp)


@pytest.mark.full
@pytest.mark.parametrize("shape, recompute, tp", [case for case in CASES if case not in DRAWN])
def test_the_rows_know_what_autograd_keeps_in_full(shape: str, recompute: str, tp: int) -> None:
    compare(shape, recompute, tp)


def compare(shape: str, recompute: str, tp: int) -> None:
    """To the byte, of the embedding and of a block of each kind, on the first and the last rank."""
    for words, masks in configurations(shape, tp):
        plan = resolved(f"{words} --recompute-granularity {recompute}", tp)
        for rank in {0, tp - 1}:
            run, rows = started(plan, rank), table(plan.architecture, micro(plan, rank))
            batch = batch_of(plan, masks, plan.config.data.reset_position_ids)
            x = torch.zeros(())
            for part in (0, 1, 2) if plan.architecture.kinds else (0, 1):
                seen: list[Tensor] = []
                x = x.detach().requires_grad_()
                with packing(seen):
                    y = run.decoder.parts[part](x, batch)
                found = bytes_of([*seen, *([x] if part else [])], elsewhere(run, batch))
                expected = distinct(rows[part], *(("kept", "again") if recompute == "full" and part else ("kept",)))
                assert found == expected, (part, rank, words)
                assert recompute != "full" or not part or distinct(rows[part], "kept") == x.nbytes
                x = y


def alone(decoder_block: Block, plan: Plan) -> dict[str, Callable[[], Any]]:
    """What runs one row of block 0 by itself, by the row's name."""
    a, m, run = plan.architecture, plan.micro_batch * plan.architecture.seq_length, decoder_block
    share, at, mlp = -(-m // plan.tp), "layers.0.attention", "layers.0.mlp"
    dtype, selective = run.d.dtype, run.d.recompute == "selective"

    def of(rows: int, channels: int) -> Tensor:
        return torch.randn(rows, channels).to(dtype).requires_grad_()

    t, inner, up = share * plan.tp, run.down.value.shape[1], run.up.value.shape[0]
    activation, group = ACTIVATIONS[a.activation], run.d.group
    pre = {f"{at}.norm": lambda: run.norm(of(share, a.hidden)), f"{mlp}.norm": lambda: run.mlp_norm(of(share, a.hidden))}
    post = {f"{at}.post_norm": lambda: run.post_norm(of(share, a.hidden)), f"{mlp}.post_norm": lambda: run.mlp_post_norm(of(share, a.hidden))}
    return (pre if a.pre_norm else {}) | (post if a.post_norm else {}) | {
        f"{at}.qkv": lambda: column(of(share, a.hidden), run.qkv, run.qkv_bias, group, run.norm if selective else None),
        f"{at}.o": lambda: row(of(t, run.o.value.shape[1]), run.o, run.o_bias, group),
        f"{at}.dropout": lambda: run.d.dropped(of(share, a.hidden), batch_of(plan), at),
        f"{mlp}.up": lambda: column(of(share, a.hidden), run.up, run.up_bias, group, run.mlp_norm if selective else None),
        f"{mlp}.{a.activation}": lambda: activation(of(t, up)),
        f"{mlp}.down": lambda: row(of(t, up if selective else inner), run.down, run.down_bias, group, activation if selective else None),
        f"{mlp}.dropout": lambda: run.d.dropped(of(share, a.hidden), batch_of(plan), mlp),
    }


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_knows_what_it_keeps(shape: str, recompute: str) -> None:
    """All that can be run by themselves; attention's share is what is left of the block. With selective recompute norms and
    activations are run again inside the operation behind them."""
    for tp in (1, 4):
        for dtype in ("fp32", "bf16"):
            plan = resolved(f"{TINY} {SHAPES[shape]} --micro-batch-size 3 --seq-length 25 --dtype {dtype} {DROPOUT} --tp {tp} "
                            f"--recompute-granularity {recompute}", tp)
            run = started(plan, tp - 1)
            block = run.decoder.parts[1]
            assert isinstance(block, Block)
            rows, does = {r.name: r for r in table(plan.architecture, micro(plan, tp - 1))[1]}, alone(block, plan)
            assert set(does) == {n for n in rows if "attention.attention" not in n and "q_norm" not in n and "k_norm" not in n and "rotary" not in n}
            for name, do in does.items():
                seen: list[Tensor] = []
                with packing(seen):
                    do()
                inside = recompute == "selective" and not rows[name].kept
                assert inside or bytes_of(seen, elsewhere(run, batch_of(plan))) == sum(rows[name].kept.values()), (name, dtype, tp)


def test_the_halves_of_a_backward_pass_in_numbers() -> None:
    """llama at tp 2: x and dy of each product under every recompute mode, and what travels."""
    for recompute in ("none", "selective", "full"):
        plan = resolved(f"{TINY} {SHAPES['llama']} --micro-batch-size 2 --tp 2 --recompute-granularity {recompute}", 2)
        rows = table(plan.architecture, micro(plan, 1))
        t, share, h, q, kv, f = 48, 24, 64, 32, 16, 64
        between = {"qkv": share * h + t * (q + 2 * kv), "o": t * q + t * h, "up": share * h + t * 2 * f, "down": t * f + t * h}
        found = {r.name.split(".")[-1]: sum(r.between.values()) // 4 for r in rows[1] if r.between}
        assert found == between and distinct(rows[1], "between") == 4 * sum(between.values())
        index = 9 * t                                           # number of the row, and is it here?
        assert distinct(rows[0], "between") == share * h * 4 + index and not distinct(rows[3], "between")
        again = 4 if recompute == "full" else 0
        for kind, moves in {"F": (1, 4, 0), "B": (1, 6 + again, 0), "I": (0, 4 + again, 0), "W": (1, 2, 0), "L": (0, 0, 2), "E": (0, 0, 1)}.items():
            assert tuple(sum(r.moves.get(kind, 0) for r in rows[part]) for part in (0, 1, 3)) == moves, kind


def test_every_weight_is_read_by_one_row_and_one_name_is_one_tensor() -> None:
    for shape in SHAPES:
        plan = resolved(f"{TINY} {SHAPES[shape]} {DROPOUT} --tp 2", 2)
        rows = table(plan.architecture, micro(plan, 0))
        parts = [rows[0], rows[1], rows[-1]]
        read = [w for part in parts for row in part for w in row.weights]
        held = [o.name for u in plan.units for o in u.operands if not u.name.startswith("layers.1")]
        assert sorted(read) == sorted(held + (["embedding.weight"] if plan.architecture.tied else [])), shape
        for part in parts:
            sizes = {(name, n) for row in part for what in (row.kept, row.between) for name, n in what.items()}
            assert len(sizes) == len({name for name, _ in sizes})


def test_the_peak_of_a_program() -> None:
    """By hand: a split backward pass trades what was kept for what lies between its halves."""
    embedding = (Operation("embedding", kept={"rows": 8}, between={"rows": 8, "dy": 10}),)
    block, twice = (Operation("o", kept={"x": 100, "y": 7}, between={"x": 100, "dy": 30}), Operation("o", kept={"x": 100}, again={"x": 100, "z": 900}))

    def of(text: str, middle: Operation = block) -> int:
        parts = [embedding, (middle,), (Operation("head"),)]
        return peak([Action(word[0], int(word[1]), int(word[2])) for word in text.split()], parts, 10)
    assert of("F00") == 8 + 10 and of("F00 F10") == of("F00 F10 L20 B10 B00") == 8 + 10 + 107
    assert of("F00 F10 L20 B10 B00", twice) == of("F00 F10 L20 I10 I00 W10 W00", twice) == 8 + 10 + 100 + 900
    assert of("F00 F10 L20 I10 W10 I00 W00") == (8 + 10) + 130
    assert of("F00 F10 L20 I10 I00 F01 F11") == (8 + 10) + 130 + (8 + 10 + 107)
    assert of("F00 F10 L20 I10 I00 W10 W00 F01 F11") == 130 + (8 + 10)
    message = [Action("expect", 1, 0, way="F"), Action("recv", 1, 0, way="F"), Action("F", 1, 0), Action("send", 1, 0, way="F")]
    assert peak(message, [embedding, (block,)], 10) == 10 + 107


class Watched:
    """A rank's run whose activations are counted: what autograd holds, what the executor does, and room for messages."""

    def __init__(self, run: Run) -> None:
        self.run, self.most, self.kind = run, 0, ""
        self.held: weakref.WeakSet[Any] = weakref.WeakSet()
        self.batches: Sequence[Batch] = ()
        for kind, do in run.executor.do.items():
            run.executor.do[kind] = self.around(kind, do)

    def around(self, kind: str, do: Callable[[Action, Turn], None]) -> Callable[[Action, Turn], None]:
        def action(a: Action, turn: Turn) -> None:
            self.kind, self.batches = kind, turn.batches
            do(a, turn)
            self.count()
        return action

    def count(self) -> None:
        executor, besides = self.run.executor, [t for b in self.batches for t in elsewhere(self.run, b)]
        aside = [t for begins in executor.aside.values() for begin in begins for t in reached(begin) if t.dim() > 1 or not t.is_floating_point()]
        inputs = [x for (part, _), (x, _) in executor.kept.items() if part]
        rooms = [work.wait() for work in executor.expected.values()]
        self.most = max(self.most, bytes_of([*(h.t for h in self.held), *inputs, *executor.flow.values(), *rooms, *aside], besides))

    def pack(self, t: Tensor) -> Any:
        kept = Kept(t.detach())
        self.held.add(kept)
        if self.kind in ("B", "I") and self.run.decoder.recompute == "full":           # the part is run again: the peak lies inside
            self.count()
        return kept


def reached(f: Any) -> list[Tensor]:
    """The tensors that a function will use: what was put aside."""
    if isinstance(f, Tensor):
        return [f]
    inside = [*f.args, f.func] if isinstance(f, partial) else [c.cell_contents for c in getattr(f, "__closure__", None) or ()]
    return [t for x in inside for t in reached(x)]


class Kept:
    def __init__(self, t: Tensor) -> None:
        self.t = t


@pytest.mark.parametrize("words", [
    "", "--pipeline-schedule gpipe", "--pipeline-schedule zb-h1 --pp 2", "--pipeline-schedule zb-h1 --pp 2 --tp 2 --zero-stage 2 --dp 2", "--pp 2", "--pp 2 --tp 2 --hidden-dropout 0.1", "--pp 2 --pipeline-schedule gpipe",
    "--pp 2 --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2",
    "--pp 2 --pipeline-schedule breadth-first --num-virtual-stages-per-pipeline-rank 2 --zero-stage 3 --dp 2 --bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma"])
def test_activations_of_a_whole_step_are_those_of_the_plan(words: str, recompute: str, shape: str) -> None:
    """The most that lives between two actions, on the first and the last rank of a pipeline; with full recompute also within
    a backward pass, when its part has been run again."""
    dp, tp, pp = (2 if "--dp 2" in words else 1, 2 if "--tp 2" in words else 1, 2 if "--pp 2" in words else 1)
    plan = resolved(f"{TINY.replace('--num-layers 2', '--num-layers 5')} {SHAPES[shape]} --global-batch-size {4 * dp} --micro-batch-size 1 "
                    f"--recompute-granularity {recompute} {words}", dp * tp * pp)
    for rank in {0, plan.world - 1}:
        run = started(plan, rank)
        run.initialise()
        batches = [batch_of(plan) for _ in range(plan.micro_batches)]
        watched = Watched(run)
        with torch.autograd.graph.saved_tensors_hooks(watched.pack, lambda kept: kept.t):
            run.executor.train(run.training, Turn(batches=batches))
        assert watched.most == memory(plan, rank)["activations"], rank


class Alive(TorchDispatchMode):
    """The most bytes of storages of at least `least` bytes that are alive at a time, of tensors that were made under it."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most, self.made = least, 0, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        sizes = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in [r() for r in self.made] if t is not None}
        self.most = max(self.most, sum(n for n in sizes.values() if n >= self.least))
        return out


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("tp, wide", [(1, 40), (2, 40), (1, 24), (2, 24)])
def test_logits_are_those_of_the_plan(dtype: str, tp: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, and of half precisions some tokens in fp32; nothing else of its size (gradients of the output matrix are smaller here)."""
    monkeypatch.setitem(architecture.LOGITS, "cpu", 1024 * 40 // tp)
    monkeypatch.setattr(architecture, "WIDE_LOGITS", 1024 * wide // tp)
    plan = resolved(f"{TINY} --hidden-size 16 --vocab-size 1000 --micro-batch-size 2 --dtype {dtype} --tp {tp}", tp)
    run, batch = started(plan, tp - 1), batch_of(plan)
    run.initialise()
    assert plan.head_chunk == 40 and run.decoder.head
    x = torch.zeros(plan.micro_batch * plan.architecture.seq_length // tp, plan.architecture.hidden, dtype=run.decoder.dtype)
    for unit in run.units.values():
        unit.open()
    with Alive(24 * 1024 // tp * x.element_size()) as alive:
        run.decoder.head.forward_backward(x, batch, torch.ones(()))
    assert alive.most == memory(plan, tp - 1)["logits"]
