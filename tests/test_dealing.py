"""Whole matrices dealt to ranks: each arrives whole and once, goes back to all who hold pieces, and nobody has much more to do than others."""

import pytest
import torch
from support import SHAPES, TINY, resolved

from megazero.plan.cost import flats, stored
from megazero.plan.dealing import Ranks, deal
from megazero.plan.layout import tiles
from megazero.units.muon import COEFFICIENTS, orthogonal


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen"])
@pytest.mark.parametrize("ranks", [Ranks(), Ranks(3), Ranks(1, 3, 2), Ranks(2, 2, 2), Ranks(1, 16, 4)], ids=str)
def test_every_matrix_arrives_whole_and_goes_back_to_all(shape: str, ranks: Ranks) -> None:
    plan = resolved(f"{TINY} {SHAPES[shape]} --num-attention-heads 8 --kv-channels 8 --tp {ranks.tp} --dp {ranks.replicate * ranks.shard} --global-batch-size 192 "
                    f"--optimizer muon {f'--zero-stage 1 --zero-shard-size {ranks.shard}' if ranks.shard > 1 else ''}", ranks.all)
    units = [(f, stored(f, plan)) for f in flats(plan, 0).values()]
    waves = deal(units, ranks, lambda piece: piece.shard.parameter.group == "matrix")
    matrices = [m for wave in waves for m in wave]
    names = [p.name for u in plan.units for p in u.parameters if p.group == "matrix"]
    assert sorted(m.name for m in matrices) == sorted(names)
    for m in matrices:
        assert tiles(m.shape, [box for r in range(ranks.all) for _, box in m.sent(r, ranks)])
        for replica in range(ranks.replicate):                  # ranks of one copy hold all of it, shared heads more than once
            held = [box for r in range(replica * ranks.each, (replica + 1) * ranks.each) for _, box in m.held(r, ranks)]
            taken = torch.zeros(m.shape)
            for box in held:
                taken[box.slices] += 1
            assert taken.min() >= 1 and taken.max() <= ranks.tp
    assert all(len({m.worker for m in wave}) == len(wave) for wave in waves)
    work = [sum(m.flops for m in matrices if m.worker == r) for r in range(ranks.all)]
    assert max(work) <= sum(work) / ranks.all + max(m.flops for m in matrices)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_a_matrix_of_zeros_stays_so_and_others_come_near_orthogonal(coefficients: str) -> None:
    assert orthogonal(torch.zeros(4, 7), 5, coefficients).eq(0).all()
    x = orthogonal(torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 5, coefficients)
    singular = torch.linalg.svdvals(x)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
