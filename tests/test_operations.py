"""A block told as rows, against the block that runs: what autograd keeps, operation by operation, and whole steps."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import SHAPES, TINY, resolved

from megazero.comm.wires import connect
from megazero.model.decoder import Batch, Block
from megazero.plan.cost import memory, peak, share, table
from megazero.plan.operations import Operation, distinct
from megazero.plan.plan import Plan
from megazero.plan.program import Action
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
    return Run(plan, None, torch.device("cpu"), connect(plan.mesh, rank, "fake", 60))


def batch_of(plan: Plan, documents: bool = False, positions: bool = False) -> Batch:
    tokens = torch.zeros(plan.micro_batch, plan.architecture.seq_length, dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones_like(tokens), torch.arange(plan.micro_batch), 0,
                 tokens.clone() if positions else None, tokens.clone() if documents else None)


def elsewhere(run: Run, batch: Batch) -> list[Tensor]:
    """What lives whether or not autograd keeps it."""
    return [*(u.weights for u in run.units.values()), *(run.decoder.rotary or ()), batch.tokens,
            *(t for t in (batch.positions, batch.documents) if t is not None)]


def configurations(shape: str, tp: int) -> Iterator[tuple[str, bool]]:
    """(words, masks): every dtype, dropout, and masks; several samples, one, and tokens that tp does not divide."""
    for size in ("--micro-batch-size 2", "--micro-batch-size 1", "--micro-batch-size 3 --seq-length 25"):
        for dtype in ("fp32", "bf16", "fp64", "fp16"):
            if "micro-batch-size 2" not in size and dtype in ("fp64", "fp16"):
                continue
            for dropout in ("", DROPOUT, "--attention-dropout 0.1"):
                for masks in (False, True):
                    flags = "--reset-attention-mask --reset-position-ids --tokenizer-type NullTokenizer" if masks else ""
                    if masks and "position-embedding-type none" in SHAPES[shape]:
                        flags = flags.replace("--reset-position-ids ", "")
                    yield f"{TINY} {SHAPES[shape]} {size} --dtype {dtype} {dropout} {flags} --tp {tp}", masks


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rows_know_what_autograd_keeps(shape: str, recompute: str, tp: int) -> None:
    """To the byte, of the embedding and of a block, on the first and the last rank."""
    for words, masks in configurations(shape, tp):
        plan = resolved(f"{words} --recompute-granularity {recompute}", tp)
        for rank in {0, tp - 1}:
            run, rows = started(plan, rank), table(plan, rank)
            batch = batch_of(plan, masks, plan.config.data.reset_position_ids)
            x = torch.zeros(())
            for part in (0, 1):
                seen: list[Tensor] = []
                x = x.detach().requires_grad_()
                with packing(seen):
                    y = run.decoder.parts[part](x, batch)
                found = bytes_of([*seen, *([x] if part else [])], elsewhere(run, batch))
                expected = distinct(rows[part], *(("kept", "again") if recompute == "full" and part else ("kept",)))
                assert found == expected, (part, rank, words)
                assert recompute != "full" or not part or distinct(rows[part], "kept") == x.nbytes
                x = y
