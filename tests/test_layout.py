"""Boxes, shards and flats: every element of every logical tensor is where it should be, exactly once."""

import random
from math import prod

import numpy as np
import pytest
import torch
from support import SHAPES, TINY, resolved

from megazero.plan.architecture import units
from megazero.plan.layout import (
    ALIGN,
    Box,
    Cut,
    Parameter,
    boxes,
    cuts,
    divisible,
    flat,
    intersect,
    shard,
    spans,
    tiles,
)
from megazero.plan.mesh import Mesh


def test_boxes_are_the_flat_range() -> None:
    rng = random.Random(1)
    for _ in range(5000):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
        a = rng.randint(0, prod(shape))
        b = rng.randint(a, prod(shape))
        numbers, found = np.arange(prod(shape)).reshape(shape), list(boxes(shape, a, b))
        assert [n for box in found for n in numbers[box.slices].ravel()] == list(range(a, b)), (shape, a, b)
        assert len(found) <= 2 * len(shape) - 1


def test_intersect_is_the_common_elements() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        def any_box() -> Box:
            offset = tuple(rng.randint(0, 4) for _ in range(3))
            return Box(offset, tuple(rng.randint(1, 5) for _ in range(3)))
        a, b = any_box(), any_box()
        one, two = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
        one[a.slices], two[b.slices] = True, True
        both, common = one & two, intersect(a, b)
        mark = np.zeros_like(both)
        if common:
            mark[common.slices] = True
        assert (mark == both).all(), (a, b)


def test_boxes_tile_a_tensor_if_each_element_is_in_one() -> None:
    """Of pieces that do, and of the same with one changed, doubled or lost."""
    rng, seen = random.Random(3), set()
    for _ in range(1500):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        edges = sorted({0, prod(shape), *(rng.randint(0, prod(shape)) for _ in range(3))})
        parts = [box for a, b in zip(edges, edges[1:], strict=False) for box in boxes(shape, a, b)]
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            some = rng.choice(parts)
            parts.remove(some)
            parts += rng.choice(([], [some, some], [some.moved(tuple(rng.randint(-1, 1) for _ in shape))]))
            parts = [p for p in parts if all(0 <= o <= f - n for o, n, f in zip(*p, shape, strict=True))] or [some]
        count = np.zeros(shape, int)
        for part in parts:
            count[part.slices] += 1
        right = bool((count == 1).all())
        assert tiles(shape, parts) == right, (shape, parts)
        seen.add((right, sum(p.numel for p in parts) == prod(shape)))
    assert len(seen) == 3, "some are wrong though their sizes add up"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_element_has_one_owner(shape: str, tp: int) -> None:
    a = resolved(f"{TINY} {SHAPES[shape]} --num-attention-heads 8 --kv-channels 8").architecture
    for unit in units(a):
        assert all(divisible(p, tp) for p in unit.parameters)
        owners = {p.name: np.zeros(p.shape, int) for p in unit.parameters}
        sizes = set()
        for rank in range(tp):
            layout = flat(unit, {"tp": (rank, tp)})
            sizes.add(layout.size)
            taken = np.zeros(layout.size, int)
            groups = spans(layout, layout.size, lambda piece: piece.shard.parameter.group)
            assert [a for _, a, _ in groups] == [0, *(b for _, _, b in groups[:-1])] and groups[-1][2] == layout.size
            for operand in layout.operands:
                assert operand.start % ALIGN == 0
                assert [g for g, a, b in groups if a <= operand.start and operand.stop <= b] == [operand.pieces[0].shard.parameter.group]
                assert sum(p.shard.box.size[0] for p in operand.pieces) <= operand.shape[0]
                taken[operand.start:operand.stop] += 1
            assert taken.max() == 1, "operands overlap"
            for piece in layout.pieces:
                if piece.shard.owner:
                    owners[piece.shard.parameter.name][piece.shard.box.slices] += 1
        assert all((n == 1).all() for n in owners.values()), unit.name
        assert len(sizes) == 1, "ranks of one group must hold flats of one size"


@pytest.mark.parametrize("experts, rows, ep, tp", [(4, 6, 2, 3), (4, 6, 4, 1), (2, 6, 4, 2), (2, 2, 4, 4), (8, 12, 1, 6)])
@pytest.mark.parametrize("cut_rows", [True, False])
def test_a_parameter_may_be_cut_on_two_axes(experts: int, rows: int, ep: int, tp: int, cut_rows: bool) -> None:
    """Stacked matrices: experts over ep, rows over tp or not; where there are fewer parts than ranks, neighbours hold copies. Boxes
    tile the tensor, each element is held equally often and has one owner."""
    p = Parameter("experts.up.weight", (experts, rows * 2, 5), cuts=(Cut(0, experts, axis="ep"), *([Cut(1, rows)] if cut_rows else [])), partial=True)
    mesh = Mesh((("pp", 1), ("replicate", 1), ("shard", 2), ("ep", ep), ("tp", tp)))
    held, owned = np.zeros(p.shape, int), np.zeros(p.shape, int)
    for rank in range(mesh.world):
        place = mesh.place(rank)
        s = shard(p, place)
        assert s.box.size[0] == max(experts // ep, 1) and s.box.size[1] == (max(rows // tp, 1) * 2 if cut_rows else rows * 2)
        assert s.replicas == max(ep // experts, 1) * (max(tp // rows, 1) if cut_rows else tp)
        assert s.cut == (cut_rows and tp > 1) and s.partial == (s.replicas > 1)
        if place.shard == 0:
            held[s.box.slices] += 1
            owned[s.box.slices] += s.owner
    assert (owned == 1).all() and (held == s.replicas).all()


def test_cuts_are_of_different_axes_and_dimensions() -> None:
    for cuts_ in ((Cut(0, 4), Cut(1, 4)), (Cut(0, 4), Cut(0, 4, axis="ep"))):
        with pytest.raises(AssertionError):
            shard(Parameter("both", (4, 4), cuts=cuts_))


def test_pieces_of_a_flat_range_are_boxes_of_logical_tensors() -> None:
    a = resolved(f"{TINY} {SHAPES['gpt2']}").architecture
    for rank in range(2):
        layout = flat(units(a)[2], {"tp": (rank, 2)})
        logical = {p.shard.parameter.name: torch.arange(prod(p.shard.parameter.shape)).view(p.shard.parameter.shape) for p in layout.pieces}
        buffer = torch.full((layout.size,), -1)
        for piece in layout.pieces:
            buffer[piece.start:piece.stop] = logical[piece.shard.parameter.name][piece.shard.box.slices].flatten()
        bounds = cuts(layout.size, 3)
        for low, high in zip(bounds, bounds[1:], strict=False):
            for piece in layout.pieces:
                for at, box in piece.boxes(low, min(high, layout.size)):
                    assert low <= at and at + box.numel <= high
                    assert torch.equal(buffer[at:at + box.numel], logical[piece.shard.parameter.name][box.slices].flatten())


def test_cuts_cover_a_flat_and_are_aligned() -> None:
    for size in (1, 63, 64, 65, 1000, 4096):
        for ranks in (1, 2, 3, 4, 8):
            bounds = cuts(size, ranks)
            assert len(bounds) == ranks + 1 and bounds[0] == 0 and bounds[-1] >= size
            assert all(b % ALIGN == 0 for b in bounds) and len({b - a for a, b in zip(bounds, bounds[1:], strict=False)}) == 1
