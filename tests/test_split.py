"""Layers of stages against all splits there are, the clock of many splits against the timeline's, and values that can be told by hand."""

import random
from itertools import product

import numpy as np
import pytest

from megazero.pipeline import split
from megazero.pipeline.schedule import KINDS, SCHEDULES, Costs, Order, Pass, passes
from megazero.pipeline.split import MICRO_BATCHES, by_cost, ends_as_layers, shares
from megazero.pipeline.timeline import simulate
from megazero.pipeline.weighing import Load, Loads, Weighing

Case = tuple[int, str, int, int, Loads]             # layers, schedule, pp, virtual


def cases(seed: int, count: int, layers: int, stages: int) -> list[Case]:
    choose, found = random.Random(seed), []
    while len(found) < count:
        name = choose.choice(list(SCHEDULES))
        pp, virtual = choose.randint(1, stages), choose.randint(1, 3 if SCHEDULES[name].looped else 1)
        if pp * virtual <= stages:
            each = [Load(choose.randint(0, most), choose.randint(0, 5), choose.randint(0, 5)) for most in (5, 2, 15)]
            found.append((choose.randint(pp * virtual, layers), name, pp, virtual, Loads(*each, again=choose.choice((0, 3)))))
    return found


def weighing(name: str, pp: int, virtual: int, loads: Loads) -> Weighing:
    return Weighing(passes(name, pp, MICRO_BATCHES * pp, virtual), pp * virtual, loads)


def makespan(case: Case, counts: tuple[int, ...]) -> float:
    return float(weighing(*case[1:]).makespans(np.array([counts]))[0][0])


class OfStages(Costs):
    """Costs of the timeline that differ from stage to stage, said once more."""

    loads: Loads
    counts: list[int]

    def of(self, p: Pass) -> float:
        layers, (f, again) = self.counts[p.stage], (self.loads.layer.forward, self.loads.again)
        embedding = self.loads.embedding.forward * (p.stage == 0)
        head = 3 * self.loads.head.forward * (p.stage == len(self.counts) - 1)
        return {"F": layers * f + embedding, "B": layers * (2 * f + again) + embedding + head, "I": layers * (f + again) + head,
                "W": layers * f + embedding}[p.kind]


def fullest(order: Order, loads: Loads, counts: list[int]) -> int:
    """Bytes of all that F and I left and that nothing took yet, on the rank and at the time where they are most."""
    most = 0
    for line in order:
        waits: dict[tuple[str, int, int], int] = {}
        for p in line:
            waits.pop((KINDS[p.kind].after, p.stage, p.micro), None)
            if left := KINDS[p.kind].leaves:
                waits[p] = (counts[p.stage] * getattr(loads.layer, left) + getattr(loads.embedding, left) * (p.stage == 0)
                            + getattr(loads.head, left) * (p.stage == len(counts) - 1))
            most = max(most, sum(waits.values()))
    return most


def test_the_clock_of_many_splits_is_the_timeline_and_a_longest_way_bounds_all_splits() -> None:
    choose = random.Random(2)
    for _, name, pp, virtual, loads in cases(1, 120, 12, 12):
        order, splits = passes(name, pp, MICRO_BATCHES * pp, virtual), [[choose.randint(0, 4) for _ in range(pp * virtual)] for _ in range(4)]
        table = Weighing(order, pp * virtual, loads)
        spans, slopes = table.makespans(np.array(splits))
        for split_, span, slope in zip(splits, spans, slopes, strict=True):
            costs = OfStages()
            costs.loads, costs.counts = loads, split_
            assert simulate(order, costs).makespan == span, (name, pp, virtual, loads, split_)
            assert all(span + slope @ (np.array(other) - split_) <= its for other, its in zip(splits, spans, strict=True))
        assert table.held(np.array(splits)).tolist() == [fullest(order, loads, s) for s in splits]


@pytest.mark.parametrize("fixed", [False, True])
def test_no_split_is_better(fixed: bool) -> None:
    choose = random.Random(4)
    for layers, name, pp, virtual, loads in cases(3, 250, 8, 6):
        stages = pp * virtual
        first, last = (choose.choice((None, 0, 1, 2)) if fixed else None for _ in range(2))
        ends = {0: first, stages - 1: last} if stages > 1 else {}
        ways = [range(1, layers + 1) if s not in ends else range(layers + 1) if ends[s] is None else [ends[s]] for s in range(stages)]
        every = np.array([counts for counts in product(*ways) if sum(counts) == layers])
        if not len(every):
            with pytest.raises(ValueError, match=f"^{layers} layers cannot be dealt to {stages} stages, which need (at least|just) "):
                by_cost(layers, name, pp, virtual, loads, first, last)
            continue
        table = weighing(name, pp, virtual, loads)
        best = min(zip(table.makespans(every)[0].tolist(), table.held(every).tolist(), map(tuple, every.tolist()), strict=True))
        assert by_cost(layers, name, pp, virtual, loads, first, last) == best[2], (layers, name, pp, virtual, loads, first, last)


def test_what_moves_one_layer_at_a_time_comes_as_far_or_nearly(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = []
    for case in cases(5, 150, 12, 8):
        exact = makespan(case, by_cost(*case))
        monkeypatch.setattr(split, "SMALL", 0)
        longer.append(makespan(case, by_cost(*case)) / exact - 1 if exact else 0)
        monkeypatch.undo()
    assert min(longer) == 0 and max(longer) < 0.05 and np.mean(longer) < 0.001


@pytest.mark.parametrize("layers, name, pp, virtual", [
    (96, "interleaved", 16, 3), (80, "breadth-first", 8, 4), (61, "1f1b", 16, 1), (128, "zb-h1", 32, 1), (126, "gpipe", 16, 1)])
@pytest.mark.parametrize("head", [0, 130, 410])
def test_large_models(layers: int, name: str, pp: int, virtual: int, head: int) -> None:
    loads = Loads(Load(100, 34, 20), Load(0, 1), Load(head, 2), again=100)
    case, even = (layers, name, pp, virtual, loads), shares(layers, pp * virtual)
    counts = by_cost(*case)
    assert counts == by_cost(*case) and sum(counts) == layers and len(counts) == pp * virtual and min(counts[1:-1]) > 0
    assert makespan(case, counts) <= makespan(case, even)
    assert not head or makespan(case, counts) < makespan(case, even)
    costly = loads._replace(layer=Load(100, 7, 900), head=Load(head, 10_000))
    assert makespan(case, by_cost(*case[:4], costly)) == pytest.approx(makespan(case, counts), rel=0.02)


def test_six_layers_in_four_looped_stages() -> None:
    """Ranks have stages 0 and 2, and 1 and 3. Rank 1 waits for stage 0's first forward, and rank 0 runs its last backward alone."""
    small = Loads(Load(100, 1), Load(0), Load(1))
    even, best = shares(6, 4), by_cost(6, "interleaved", 2, 2, small)
    assert even == (1, 2, 1, 2)                                 # 2 layers on rank 0; 4 and the head on rank 1
    assert best == (1, 2, 2, 1)                                 # 3 on each; of those the least to wait for
    case = 6, "interleaved", 2, 2, small
    assert makespan(case, even) >= 8 * 4 * 300 and makespan(case, best) < 8 * 3 * 300 + 3 * 300
    large = small._replace(head=Load(200))
    assert by_cost(6, "interleaved", 2, 2, large) == (1, 2, 3, 0)           # 4 on rank 0; 2 and a head like 2 on rank 1
    assert by_cost(6, "1f1b", 2, 1, large) == (4, 2) and by_cost(6, "1f1b", 2, 1, small) == (3, 3)
    assert by_cost(6, "1f1b", 2, 1, large, first=3) == (3, 3)
    assert by_cost(6, "interleaved", 2, 2, large, last=1) == (2, 1, 2, 1)   # 4 on rank 0; 1 + 1 and the head on rank 1
    assert by_cost(6, "1f1b", 1, 1, large, first=2) == (6,) and by_cost(2, "gpipe", 4, 1, small) == (0, 1, 1, 0)


def test_memory_chooses_among_equals_only_and_then_early_stages_have_less() -> None:
    """Without layers' FLOPs all splits take as long. GPipe's rank holds all 8 micro-batches of its layers, 1F1B's first one more than its last."""
    free = Loads(Load(0, 1), Load(0, 5), Load(0))
    assert by_cost(9, "gpipe", 2, 1, free) == (2, 7)            # 8 x (2 + 5), 8 x 7
    assert by_cost(9, "1f1b", 2, 1, free) == (0, 9)             # 2 x (0 + 5) and 1 x 9
    assert by_cost(3, "1f1b", 2, 1, Loads(Load(0), Load(0), Load(0))) == (0, 3)
    assert by_cost(8, "gpipe", 2, 1, Loads(Load(1, 9), Load(0, 10**6), Load(0))) == (4, 4)


def test_ends_counted_as_layers() -> None:
    """Megatron's --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split."""
    assert ends_as_layers(30, 4, 1, 1) == (7, 8, 8, 7)
    assert ends_as_layers(31, 4, 1, 0) == (7, 8, 8, 8) and ends_as_layers(31, 4, 0, 1) == (8, 8, 8, 7)
    assert ends_as_layers(4, 2, 0, 0) == (2, 2) and ends_as_layers(2, 4, 1, 1) == (0, 1, 1, 0) and ends_as_layers(5, 1, 1, 1) == (5,)
    with pytest.raises(ValueError, match="^32 layers and the embedding and the loss are 34 in all, which 4 stages cannot share evenly$"):
        ends_as_layers(32, 4, 1, 1)
    with pytest.raises(ValueError, match="^32 layers and the loss are 33 in all, "):
        ends_as_layers(32, 4, 0, 1)
