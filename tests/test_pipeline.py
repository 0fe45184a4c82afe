"""Pipeline schedules against their published formulas, published figures, torch's lists, and everything that could be wrong with one."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from support import ROOT, tool
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from megazero.pipeline.schedule import SCHEDULES, Costs, Pass, most_held, needs, passes
from megazero.pipeline.timeline import draw, simulate

Row = tuple[str, int, int, int]                     # schedule, pp, micro-batches, virtual


def grid() -> Iterator[Row]:
    for name, row in SCHEDULES.items():
        for pp in range(1, 9):
            for virtual in range(1, 5 if row.looped else 2):
                for micro_batches in range(1, 33):
                    yield name, pp, micro_batches, virtual


def published_bubble(pp: int, virtual: int, costs: Costs) -> float:
    """(p - 1)(F + B) / v (GPipe, PipeDream-flush, Megatron's interleaved schedule), for at least pp micro-batches."""
    return (pp - 1) * (costs.forward + costs.backward) / virtual


def zero_bubble(pp: int, costs: Costs) -> float:
    """(p - 1)(F + B - W), B without W (Qi et al. 2023, table 2: ZB-H1), for at least pp micro-batches and a W no longer than F and B."""
    return (pp - 1) * (costs.forward + costs.backward - 2 * costs.weight)


def published_held(name: str, pp: int, micro_batches: int, virtual: int) -> float:
    """Peak on the fullest rank, in activations of one micro-batch in all its layers: m for GPipe, p for 1F1B, p (1 + (p - 1) / (p v))
    interleaved; but never more than there are micro-batches."""
    if name in ("gpipe", "breadth-first"):
        return micro_batches
    return min(micro_batches, pp if virtual == 1 else pp * (1 + (pp - 1) / (pp * virtual)))


def test_bubble_and_held_activations_are_those_of_the_formulas() -> None:
    costs = Costs(12.0, 21.0)                       # their halves, thirds and quarters add up exactly
    for case in grid():
        name, pp, micro_batches, virtual = case
        if SCHEDULES[name].delay:
            continue
        timeline = simulate(passes(*case), costs.shared(virtual))
        (idle,), most = set(timeline.idle), max(timeline.held) / virtual         # every rank idles as long
        assert idle == SCHEDULES[name].bubble(pp, micro_batches, virtual, costs.shared(virtual)), case
        assert timeline.held == most_held(*case), case
        if micro_batches >= pp:
            assert idle == published_bubble(pp, virtual, costs), case
        else:                                       # a loop waits for its first micro-batch, but no longer than a pipeline without loops
            assert published_bubble(pp, virtual, costs) <= idle <= published_bubble(pp, 1, costs), case
        if virtual == 1 or name == "breadth-first" or micro_batches % pp == 0:
            assert most == pytest.approx(published_held(*case)), case
        else:                                       # rounds are longer than pp micro-batches, in all by what is left over
            assert most <= min(micro_batches, published_held(name, pp, 10**9, virtual) + micro_batches % pp), case


def test_a_split_backward_is_as_published() -> None:
    for pp, micro_batches in product(range(1, 9), range(1, 33)):
        for costs in (Costs(10, 20), Costs(1, 2), Costs(3, 8, split=0.25), Costs(2, 8, split=0.75), Costs(1, 6)):
            timeline = simulate(passes("zb-h1", pp, micro_batches, 1), costs)
            idle = SCHEDULES["zb-h1"].bubble(pp, micro_batches, 1, costs)
            assert timeline.makespan == idle + micro_batches * (costs.forward + costs.backward), (pp, micro_batches, costs)
            if micro_batches >= pp and costs.weight <= min(costs.forward, costs.backward - costs.weight):
                assert idle == zero_bubble(pp, costs)
            assert timeline.held == most_held("zb-h1", pp, micro_batches, 1) == most_held("1f1b", pp, micro_batches, 1)
            for rank, line in enumerate(passes("zb-h1", pp, micro_batches, 1)):         # what waits for I or for W: at most 1F1B's first rank's
                both = [sum(q.kind == "F" for q in line[:i]) - sum(q.kind == "W" for q in line[:i]) for i in range(len(line) + 1)]
                assert max(both) <= min(pp, micro_batches), (pp, micro_batches, rank)


def test_each_rank_of_1f1b_holds_one_activation_less() -> None:
    assert most_held("1f1b", 4, 8, 1) == (4, 3, 2, 1) and most_held("1f1b", 4, 2, 1) == (2, 2, 2, 1)
    for rank, line in enumerate(passes("1f1b", 4, 8, 1)):
        warm_up = 3 - rank
        assert "".join(p.kind for p in line) == "F" * warm_up + "FB" * (8 - warm_up) + "B" * warm_up


def test_one_stage_on_a_rank_is_the_plain_schedule() -> None:
    for pp in range(1, 6):
        for micro_batches in range(1, 12):
            assert passes("interleaved", pp, micro_batches, 1) == passes("1f1b", pp, micro_batches, 1)
            assert passes("breadth-first", pp, micro_batches, 1) == passes("gpipe", pp, micro_batches, 1)


# Profiled times in ms and the bubble rates of 1F1B and ZB-H1: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", tables 9 and 5.
PROFILED = [                                        # pp, micro-batches, F, B, W, message, rates
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585), (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242), (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323), (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045), (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397), (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088), (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0576),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421), (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106), (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594),
]


@pytest.mark.parametrize("pp, micro_batches, f, b, w, message, rate, split", PROFILED)
def test_published_bubble_rates(pp: int, micro_batches: int, f: float, b: float, w: float, message: float, rate: float, split: float) -> None:
    costs = Costs(f, b + w, message, w / (b + w))
    assert round(simulate(passes("1f1b", pp, micro_batches, 1), costs).bubble_rate, 4) == rate
    step = simulate(passes("zb-h1", pp, micro_batches, 1), costs).makespan
    assert round(1 - micro_batches * (f + b + w) / step, 4) == split


def test_messages_take_time_between_ranks_only() -> None:
    assert simulate(passes("gpipe", 2, 1, 1), Costs(1, 2, 0.5)).makespan == 1 + 0.5 + 1 + 2 + 0.5 + 2
    assert simulate(passes("breadth-first", 1, 1, 3), Costs(1, 2, 0.5)).makespan == 9


def torch_order(pp: int, micro_batches: int, virtual: int) -> tuple[tuple[Pass, ...], ...]:
    """The interleaved lists of torch.distributed.pipelining, of a schedule that has no stages and no process group."""
    rounds = max(1, micro_batches // pp)
    schedule: Any = SimpleNamespace(n_local_stages=virtual, microbatches_per_round=micro_batches // rounds, pp_group_size=pp, _n_microbatches=micro_batches)
    lines = (ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank) for rank in range(pp))
    return tuple(tuple(Pass(a.computation_type.value, a.stage_index, a.microbatch_index) for a in line if a) for line in lines)


def test_interleaved_is_the_order_of_torch() -> None:
    compared = 0
    for pp in range(1, 9):
        for micro_batches in (m for m in range(1, 33) if m % max(1, m // pp) == 0):         # torch refuses others
            for virtual in range(1, 5):
                ours, theirs = passes("interleaved", pp, micro_batches, virtual), torch_order(pp, micro_batches, virtual)
                assert ours == theirs or virtual == 1, (pp, micro_batches, virtual)
                if ours != theirs:                  # it then holds two activations for each hop, where one will do
                    a, b = simulate(ours, Costs()), simulate(theirs, Costs())
                    assert a.makespan <= b.makespan and max(a.held) <= max(b.held), (pp, micro_batches)
                compared += 1
    assert compared == 652


def test_stages_lie_in_a_loop() -> None:
    assert all(p.stage % 3 == rank for rank, line in enumerate(passes("interleaved", 3, 7, 4)) for p in line)
    assert [str(p) for p in needs(Pass("F", 0, 1), 3)] == []
    assert [str(p) for p in needs(Pass("F", 2, 1), 3)] == ["F1,1"]
    assert [str(p) for p in needs(Pass("B", 2, 1), 3)] == ["F2,1"]
    assert [str(p) for p in needs(Pass("B", 1, 0), 3)] == ["F1,0", "B2,0"]


def test_two_ranks_in_a_loop_need_a_wire_for_each_kind() -> None:
    """Forward outputs and gradients that rank 1 sends to rank 0 may overtake each other, but each kind in order."""
    receiver, sender = passes("interleaved", 2, 5, 2)
    sent = [p for p in sender if p[:2] != ("F", 3)]         # the last stage has nobody to send to
    taken = [n for p in receiver for n in needs(p, 4) if n in sender]
    assert sent != taken and sorted(sent) == sorted(taken)
    assert all([p for p in sent if p.kind == kind] == [p for p in taken if p.kind == kind] for kind in "FB")


def test_an_order_that_stands_still_is_told() -> None:
    with pytest.raises(ValueError, match="ranks wait for ever before B0,0"):
        simulate([[Pass("B", 0, 0), Pass("F", 0, 0)]], Costs())
    crossed = [list(line) for line in passes("1f1b", 3, 4, 1)]
    crossed[1].insert(0, crossed[1].pop(2))
    with pytest.raises(ValueError, match="ranks wait for ever before B0,0, B1,0, F2,0"):
        simulate(crossed, Costs())


def test_drawings() -> None:
    assert draw(simulate(passes("interleaved", 2, 4, 2), Costs(1, 1))) == "\n".join([
        "rank 0  a0 a1 b0 b1 a2 B0 a3 B1 b2 A0 b3 A1 ...B2 ...B3 A2 A3",
        "rank 1  ...a0 a1 b0 B0 b1 B1 a2 A0 a3 A1 b2 B2 b3 B3 A2 A3 ..."])
    assert draw(simulate(passes("1f1b", 2, 11, 1), Costs(1, 1.5, 0.25))).splitlines()[1].startswith(
        "rank 1  .....a0  A0    a1  A1    ")


def test_the_page_shows_what_is_drawn() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for name, row in SCHEDULES.items():
        assert draw(simulate(passes(name, 4, 8, 1 + row.looped), Costs(1, 1 + (row.delay is not None)))) in page, name


def test_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = tool(monkeypatch, capsys, "show_schedule.py", *f"interleaved --pp 2 --micro-batches 4 --virtual 2 --backward 1 --svg {tmp_path / 'a.svg'}".split())
    assert (code, out) == (0, SHOWN)
    boxes = list(ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}rect"))
    assert sorted(box[0].text or "" for box in boxes) == sorted(str(p) for line in passes("interleaved", 2, 4, 2) for p in line)
    assert len({box.get("fill") for box in boxes}) == 4
    for wrong, sentence in {
        "zbh1": "show_schedule.py zbh1: write gpipe or breadth-first or 1f1b or interleaved or zb-h1 (did you mean zb-h1?).",
        "1f1b --pp 2": "--micro-batches is missing: micro-batches in a step.",
        "1f1b --pp 0 --micro-batches 2": "--pp 0: must be at least 1.",
        "1f1b --pp 2 --micro-batches 2 --virtual 2": "--virtual 2: 1f1b has one stage on each rank; write 1, or take breadth-first or interleaved.",
        "1f1b --pp 2 --micro-batches 2 --backward nan": "--backward nan: must be finite and greater than 0.",
        "1f1b --pp 2 --micro-batches 2 --communication -1": "--communication -1: must be finite, 0 or greater.",
        "1f1b --pp 2000 --micro-batches 9000": "--pp 2000 x --micro-batches 9000 x --virtual 1: more than 1,000,000 passes; choose less.",
        "1f1b --pp 2 --micro-batches 2 --forward 1e-9": "make too large a drawing; choose fewer ranks, or times nearer to each other.",
        f"1f1b --pp 2 --micro-batches 2 --svg {tmp_path / 'no' / 'a.svg'}": "cannot be written (No such file or directory)",
    }.items():
        code, _, said = tool(monkeypatch, capsys, "show_schedule.py", *wrong.split())
        assert code == 2 and said.startswith("error: ") and sentence in said and said.count("\n") == 1, said


SHOWN = """\
interleaved: pp 2, 4 micro-batches, 4 stages
makespan     9
bubble       1, rate 0.1111; formula, without messages: 1, 0.1111
held         2.5 1.5; formula: 2.5 1.5
             activations of one micro-batch in all layers of a rank, at most, by rank

rank 0  a0 a1 b0 b1 a2 B0 a3 B1 b2 A0 b3 A1 ...B2 ...B3 A2 A3
rank 1  ...a0 a1 b0 B0 b1 B1 a2 A0 a3 A1 b2 B2 b3 B3 A2 A3 ...
"""
