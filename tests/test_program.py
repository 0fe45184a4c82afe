"""Programs of whole pipelines: that nobody waits for ever, that messages meet, that what a schedule and ZeRO weave together is sound; and
that a rank which hangs says where it stands."""

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool, RankError
from support import SHAPES, TINY, resolved, stepping, tool, train
from test_zero import started
from torch._subclasses.fake_tensor import FakeTensorMode

from megazero.base.errors import UserError
from megazero.comm.wires import connect
from megazero.model.decoder import Batch
from megazero.pipeline.schedule import SCHEDULES, most_held
from megazero.plan.action import Action, around, written
from megazero.plan.cost import memory, traffic
from megazero.plan.plan import Plan
from megazero.plan.program import Part
from megazero.plan.verify import undelivered, verify
from megazero.run.executor import Executor, Turn
from megazero.run.run import Run

SMALL = TINY.replace("--num-layers 2 --hidden-size 64 --num-attention-heads 4 ", "--hidden-size 48 --num-attention-heads 6 --micro-batch-size 1 ")
SMALL = f"{SMALL} --dtype fp64 --adam-eps 1e-5"


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


@dataclass(frozen=True)
class Case:
    """A random pipeline: `counts` layers in each stage."""

    schedule: str
    pp: int
    virtual: int
    counts: tuple[int, ...]
    dp: int
    micro: int
    level: int
    extra: str
    tied: bool

    @property
    def words(self) -> str:
        layout = "|".join("t" * n for n in self.counts)
        return (f"{self.model} --pp {self.pp} --dp {self.dp} --num-virtual-stages-per-pipeline-rank {self.virtual} --pipeline-schedule {self.schedule} "
                f"--zero-stage {self.level} {self.extra}" + (f" --pipeline-layout E{layout}L" if len(self.counts) > 1 else ""))

    @property
    def model(self) -> str:
        return (f"{SMALL} --num-layers {sum(self.counts)} --global-batch-size {self.dp * self.micro} "
                + ("" if self.tied else "--untie-embeddings-and-output-weights"))


def case(seed: int, most: int) -> Case:
    """Random, with at most `most` ranks."""
    r = random.Random(seed)
    schedule = r.choice(list(SCHEDULES))
    pp, virtual = r.randint(1, min(8, most)), r.randint(1, 3) if SCHEDULES[schedule].looped else 1
    counts = [r.randint(1, 3) for _ in range(pp * virtual)]
    if len(counts) > 1:
        counts[0], counts[-1] = r.randint(0, 2), r.randint(0, 2)
    counts[-1] += not sum(counts)
    level = r.randint(0, 3)
    extra = [r.choice(["", "--bucket-size 60000", "--no-overlap-grad-reduce"])]
    extra += [r.choice(["", "--no-overlap-param-gather"])] if level else []
    extra += [r.choice(["", "--reduce-every 3"])] if level >= 2 else []
    extra += [r.choice(["", "--keep-weights 2", "--keep-weights 5"])] if level == 3 else []
    return Case(schedule, pp, virtual, tuple(counts), r.randint(1, max(1, min(most // pp, 4))), r.randint(1, 13), level, " ".join(extra), r.random() < 0.5)


def pipeline(plan: Plan) -> list[list[Action]]:
    """The programs of the ranks of the first pipeline."""
    return [plan.training(rank) for rank in range(0, plan.world, plan.world // plan.pp)]


def test_500_random_pipelines_are_sound() -> None:
    for seed in range(500):
        c = case(seed, 32)
        plan = resolved(c.words, c.pp * c.dp)
        assert faults(plan, pipeline(plan)) == [], c
        assert seed % 10 or all(Action.parse(str(a)) == a for program in pipeline(plan) for a in program)
        evaluations = [plan.evaluation(rank) for rank in range(0, plan.world, plan.world // plan.pp)]
        assert undelivered(evaluations) == [] and sum(a.kind == "E" and a.part == len(plan.parts) - 1 for e in evaluations for a in e) == 1
        most = most_held(c.schedule, plan.pp, plan.micro_batches, plan.virtual)
        for rank, program in enumerate(pipeline(plan)):
            assert held(plan, program) <= most[rank], c


def faults(plan: Plan, programs: list[list[Action]]) -> list[str]:
    return verify(programs, [plan.stages_of(rank) for rank in range(0, plan.world, plan.world // plan.pp)], plan.zero.level, plan.micro_batches)


def held(plan: Plan, program: list[Action]) -> int:
    """The most micro-batches in stages whose activations wait for a backward at one time."""
    stage, now, most = {i: s for s, own in enumerate(plan.stages) for i in own}, set(), 0
    for a in program:
        if a.kind == "F":
            now.add((stage[a.part], a.part, a.micro))
        elif a.kind in ("B", "I"):
            now.remove((stage[a.part], a.part, a.micro))
        most = max(most, len({(s, m) for s, _, m in now}))
    return most


def test_who_holds_a_unit_is_found_from_what_the_parts_read() -> None:
    plan = resolved(f"{SMALL} --num-layers 4 --pp 4 --dp 2 --zero-stage 2 --global-batch-size 8", 8)
    assert plan.holders == {"embedding": (0, 3), "positions": (0,), **{f"layers.{i}": (i,) for i in range(4)}, "head": (3,)}
    assert plan.mesh.tied == (("tied", (0, 3)),) and plan.placement("embedding").holders == "tied"
    assert not plan.placement("positions").holders and [plan.stages_of(2 * place).tied for place in range(4)] == [("embedding",), (), (), ("embedding",)]
    plan = replace(plan)                                        # and if other parts read other units too?
    parts = list(plan.parts)
    parts[3] = Part((*parts[3].forward, "layers.0", "positions"), parts[3].backward)
    parts[4] = Part((*parts[4].forward, "layers.0"), parts[4].backward)
    vars(plan)["parts"] = tuple(parts)
    assert [plan.holders[unit] for unit in ("embedding", "positions", "layers.0", "layers.1")] == [(0, 3), (0, 2), (0, 2, 3), (1,)]
    assert dict(plan.mesh.tied) == {"tied": (0, 3), "tied1": (0, 2), "tied2": (0, 2, 3)} and plan.mesh.groups()["tied2"] == [(0, 4, 6), (1, 5, 7)]
    for place in range(4):
        run = Run(plan, torch.device("cpu"), connect(plan.mesh, 2 * place, "fake", 60))
        for name, unit in run.units.items():
            places = plan.holders[name]
            assert (unit.sharing.holders.size, unit.owner) == (len(places), place == places[0]) and unit.sharing.shard.size == 2
        assert [str(a) for a in plan.training(2 * place) if a.kind == "tie"] == [f"tie {u}" for u in run.units if len(plan.holders[u]) > 1]


def test_verify_finds_what_is_wrong() -> None:
    plan = resolved(f"{SMALL} --num-layers 4 --pp 4 --global-batch-size 4", 4)
    good = pipeline(plan)
    assert faults(plan, good) == []
    last = [i for i, a in enumerate(good[1]) if a.kind == "send" and a.way == "F"]
    mute = [*good[:1], good[1][:last[-1]] + good[1][last[-1] + 1:], *good[2:]]
    assert any("rank 2 waits for ever" in p and "[recv F2,3]" in p for p in faults(plan, mute))
    deaf = [*good[:2], [a for a in good[2] if a.kind != "recv" or a.way != "F" or a.micro != 3], good[3]]
    assert any("nobody takes send F1,3 of rank 1" in p for p in faults(plan, deaf))
    swapped = list(good[1])
    swapped[last[0]], swapped[last[1]] = swapped[last[1]], swapped[last[0]]
    found = faults(plan, [good[0], swapped, *good[2:]])
    assert any("rank 2 takes send F1,1 for recv F2,0" in sentence for sentence in found) and "send F1,1 takes the output of part 2 and finds nothing" in found[0]


@pytest.mark.parametrize("spoil, said", [
    ("drop F1,1", "rank 0: F1,1 runs 0 times"), ("drop W1,0", "rank 0: W1,0 runs 0 times"), ("double I1,0", "rank 0: I1,0 runs 2 times"),
    ("move W1,0 > I1,0", "rank 0: W1,0 runs before I1,0"), ("drop gather layers.0", "reads layers.0, which is not gathered"),
    ("drop release layers.0", "rank 0: gather layers.0 is out of turn"), ("drop open layers.0", "writes layers.0, which has no sum open"),
    ("drop reduce layers.0,0", "rank 0: land layers.0,0 is out of turn"), ("drop land layers.0,1", "the sum of layers.0 is left over"),
    ("drop settle layers.0", "the sum of layers.0 goes land, replicate, finish tp"), ("drop judge", "settle, finish tp, finish kv, update, publish, not"),
    ("move update > judge", "finish kv, update, judge, publish"), ("drop publish", "finish kv, judge, update, not"),
    ("drop expect F1,1", "recv F1,1 has no room"), ("drop recv F1,1", "rank 1: expect F1,1 is never received"),
    ("double update", "judge, update, update, publish"), ("drop finish tp", "settle, finish kv, judge"),
    ("move F1,0 > F0,0", "F1,0 takes the output of part 0 and finds nothing"), ("move send F0,0 > F1,0", "send F0,0 takes the output of part 1 and finds"),
    ("write land layers.0,1 > land layers.0,0", "rank 0: land layers.0,0 is out of turn"), ("write F1,1 > F99,1", "rank 0: F99,1 is not of this rank"),
    ("write gather layers.0 > gather nonsense", "rank 0: gather nonsense is not of this rank"), ("write finish tp > finish kv", "finish kv, finish kv, judge"),
    ("write F1,1 > F1,2", "its micro-batches are 3, this step has 2 on each rank"),
])
def test_verify_names_each_fault_of_a_program(spoil: str, said: str) -> None:
    plan = resolved(f"{SMALL} --num-layers 3 --pp 2 --dp 2 --zero-stage 3 --pipeline-schedule zb-h1 --pipeline-split even --global-batch-size 4 "
                    "--untie-embeddings-and-output-weights", 4)
    programs = pipeline(plan)
    what, first, _, second = re.fullmatch(r"(\w+) (.+?)( > (.+))?", spoil).groups()  # type: ignore[union-attr]
    program = programs[spoil.endswith(("expect F1,1", "recv F1,1"))]

    def at(word: str) -> int:
        return next(i for i, a in enumerate(program) if word in (str(a), a.kind))
    if what == "drop":
        del program[at(first)]
    elif what == "double":
        program.insert(at(first), program[at(first)])
    elif what == "move":
        moved = program[at(first)]
        program.remove(moved)
        program.insert(at(second), moved)
    else:
        program[at(first)] = Action.parse(second)
    found = faults(plan, programs)
    assert any(said in sentence for sentence in found), found


def test_verify_knows_what_waits_for_other_stages() -> None:
    """The last rank must not wait for the sum of a shared unit before it sends what the first needs to come to its own."""
    plan = resolved(f"{SMALL} --num-layers 2 --pp 2 --global-batch-size 1", 2)
    programs = pipeline(plan)
    last = programs[1]
    ties = [a for a in last if a.units == ("embedding",) and a.kind in ("reduce", "land", "replicate", "settle", "tie")]
    assert [a.kind for a in ties] == ["reduce", "land", "replicate", "settle", "tie", "settle"] and faults(plan, programs) == []
    early = [a for a in last if a not in ties]
    behind = early.index(Action("L", 3, 0)) + 1
    programs[1] = [*early[:behind], *ties, *early[behind:]]
    assert any("rank 1 waits for ever" in sentence and "L3,0" in sentence for sentence in faults(plan, programs))


ZB = f"{SMALL} --num-layers 4 --pp 2 --pipeline-schedule zb-h1 --global-batch-size 4 --zero-stage 2"


def own_program(words: str) -> list[tuple[float, float]]:
    """(loss, norm) of three steps by the schedule, and by a program that a file says: all W at the end, sums reduced once."""
    found = []
    for order in ("", "late"):
        plan = resolved(words, 2)
        if order:
            late = replace(plan, config=replace(plan.config, parallel=replace(plan.config.parallel, reduce_every=99)))
            last = [tuple(sorted(line, key=lambda p: p.kind == "W")) for line in plan.passes]
            vars(late)["passes"] = tuple(last)
            text = written([late.training(rank) for rank in range(2)])
            assert text != written([plan.training(rank) for rank in range(2)])
            plan = plan.programmed(text, "--pipeline-program file")
        step = stepping(started(plan, int(os.environ["RANK"]), "gloo"))
        for _ in range(3):
            step.start()
        assert step.pending
        found.append((float(step.pending.verdict.loss), float(step.pending.verdict.norm)))
    return found


def test_a_program_from_a_file_is_the_same_run(pool: Pool) -> None:
    for plain, own in pool.run(2, own_program, ZB):
        assert own == pytest.approx(plain, rel=1e-12)


def test_a_program_is_printed_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{SMALL.replace('--train-iters 5', '--train-iters 3')} --num-layers 2 --global-batch-size 3 --zero-stage 0"
    code, text, _ = tool(monkeypatch, capsys, "show_schedule.py", "program", *words.split())
    file = tmp_path / "program"
    file.write_text(text)
    assert code == 0 and text.count("\n") == 1 and text.startswith("gather embedding | ")
    assert [x["loss"] for x in train(f"{words} --pipeline-program {file} --save {tmp_path / 'ck'} --exit-interval 2", tmp_path / "a")] == [
        x["loss"] for x in train(f"{words} --exit-interval 2", tmp_path / "b")]
    resumed = [x["loss"] for x in train(f"{words} --load {tmp_path / 'ck'} --pipeline-schedule gpipe", tmp_path / "c")]
    assert resumed == [x["loss"] for x in train(words, tmp_path / "d")][2:], "saving and resuming know nothing of the program"
    for spoiled, said in ((text.replace("judge", "jugde"), f"--pipeline-program {file}: line 1: 'jugde' is no action; write a line"),
                          (text.replace("W0,0 | ", "").replace("B1,0 | ", ""), f"--pipeline-program {file}: rank 0: B1,0 runs 0 times."),
                          (text + text, f"--pipeline-program {file}: there are 2 programs for 1 pipeline ranks."),
                          ("", f"--pipeline-program {file}: is empty; write a line for each rank")):
        file.write_text(spoiled)
        with pytest.raises(UserError, match=re.escape(said)):
            train(f"{words} --pipeline-program {file}")


@cache
def alone(words: str) -> tuple[float, float]:
    return two_steps(words, 1)


def two_steps(words: str, world: int, backend: str = "gloo") -> tuple[float, float]:
    """(loss, norm) of the second step."""
    step = stepping(started(resolved(words, world), int(os.environ["RANK"]) if world > 1 else 0, backend))
    step.start()
    step.start()
    assert step.pending
    return float(step.pending.verdict.loss), float(step.pending.verdict.norm)


def runs_like_one_rank(seed: int, pool: Pool) -> None:
    c = case(1000 + seed, 8)
    world = c.pp * c.dp
    found = pool.run(world, two_steps, c.words, world, "gloo+late" if seed % 2 else "gloo") if world > 1 else [two_steps(c.words, 1)]
    for got in found:
        assert got == pytest.approx(alone(c.model), rel=1e-12), c


@pytest.mark.parametrize("seed", range(3))
def test_random_pipelines_run(seed: int, pool: Pool) -> None:
    runs_like_one_rank(seed, pool)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3, 38))
def test_more_random_pipelines_run(seed: int, pool: Pool) -> None:
    runs_like_one_rank(seed, pool)


@pytest.mark.parametrize("words", [
    "--num-layers 4 --pp 4 --tp 2 --global-batch-size 6", "--num-layers 5 --pp 2 --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 5",
    "--num-layers 4 --pp 2 --dp 2 --zero-stage 1 --tp 2 --global-batch-size 8", "--num-layers 3 --pp 3 --dp 4 --zero-stage 3 --zero-shard-size 2 --global-batch-size 8 --bf16",
    "--num-layers 4 --pp 2 --dp 2 --zero-stage 2 --pipeline-schedule gpipe --global-batch-size 6 --untie-embeddings-and-output-weights"])
def test_the_plan_knows_bytes_and_memory_of_each_stage(words: str) -> None:
    words = f"{SMALL.replace('--dtype fp64', '' if '--bf16' in words else '--dtype fp64')} {words}"
    sizes = dict(zip(words.split(), words.split()[1:], strict=False))
    world = int(sizes["--pp"]) * int(sizes.get("--dp", 1)) * int(sizes.get("--tp", 1))
    for rank in {0, world // 2, world - 1}:
        plan = resolved(words, world)
        run = started(plan, rank, "fake")
        stepping(run).start()
        expected = traffic(plan, rank)
        assert {axis: run.wires.line.sent[axis] for axis in expected} == expected and set(run.wires.line.sent) <= set(expected)
        assert memory(plan, rank)["optimizer"] == sum(own.tensor.nbytes for state in run.updater.state.values() for own in state.values())


def test_outputs_are_freed_once_they_have_left() -> None:
    """What stays of a micro-batch in flight is what its backward needs; the output itself is with the next stage."""
    plan = resolved(f"{SMALL} --num-layers 4 --pp 2 --global-batch-size 4 --recompute-granularity full", 2)
    run = started(plan, 0, "fake")
    seen: list[int] = []
    plain = run.executor._send

    def send(action: Action, turn: Turn) -> None:
        plain(action, turn)
        seen.append(sum(x.nbytes for (part, _), (x, _) in run.executor.kept.items() if part) // (24 * 48 * 8))
        assert not any(isinstance(t, torch.Tensor) and t.nbytes > 8 for micro, t in run.executor.flow.items() if micro == action.micro)

    run.executor.do["send"] = send
    stepping(run).start()
    assert max(seen) == 2 * 2, "two micro-batches in flight, one input for each of two blocks"


def stuck(words: str) -> None:
    """Rank 1 never comes to its third backward pass."""
    rank, plain = int(os.environ["RANK"]), Executor._send

    def send(self: Executor, action: Action, turn: Turn) -> None:
        if rank == 1 and action == Action("send", 1, 2, way="B"):
            import time
            time.sleep(60)
        plain(self, action, turn)

    Executor._send = send  # type: ignore[method-assign]
    plan = resolved(words, 3)
    run = Run(plan, torch.device("cpu"), connect(plan.mesh, rank, "gloo", 3))
    run.initialise()
    stepping(run).start()


def test_a_hang_says_where_the_rank_stands(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank [02] gave up in recv [FB]\d,\d, receiving over pp: rank 1 did not answer within 3 s"
                                        r".*where it stands: .*B\d,\d \| .*\[recv [FB]\d,\d\] \| [FB]\d,\d"):
        pool.run(3, stuck, f"{SMALL} --num-layers 3 --pp 3 --global-batch-size 6", seconds=60)


def test_around_shows_the_place() -> None:
    program = resolved(f"{SMALL} --num-layers 1 --global-batch-size 2").training(0)
    assert around(program, program.index(Action("L", 2, 0))) == "F0,0 | F1,0 | [L2,0] | B1,0 | B0,0 | F0,1 | F1,1 ..."


def test_llama_with_pipelines_has_every_weight_once() -> None:
    plan = resolved(f"{SMALL} {SHAPES['llama']} --num-layers 7 --pp 2 --pipeline-split even --pipeline-schedule breadth-first --num-virtual-stages-per-pipeline-rank 3", 2)
    held = [u.name for rank in range(2) for u in plan.units_of(rank)]
    assert sorted(held) == sorted(u.name for u in plan.units) and [len(s) for s in plan.stages] == [2, 1, 1, 1, 1, 3]


BUILD = """
import sys, torch
from megazero.comm import connect
from megazero.settings.config import from_command_line
from megazero.plan.cost import memory
from megazero.plan import resolve
from megazero.run import Run

def peak():         # ru_maxrss would count the parent that this process was forked from
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

p = resolve(from_command_line(sys.argv[1:]), 8 * 96 * 8, 50257)
wires, before = connect(p.mesh, 3000, "fake", 60), peak()
run = Run(p, torch.device("cpu"), wires)
run.initialise()
print(peak() - before, sum(n for what, n in memory(p, 3000).items() if what in ("weights", "master weights", "gradients", "optimizer")))
"""


def test_a_rank_of_a_175b_model_takes_the_memory_of_the_plan() -> None:
    """One layer's worth of ranks: built and initialised by itself, with nothing whole on the way."""
    words = ("--model gpt3-175b --tp 8 --pp 96 --dp 8 --zero-stage 2 --bf16 --lr 6e-5 --global-batch-size 1536 --train-iters 10 --eval-iters 0 "
             "--mock-data --vocab-size 50257")
    done = subprocess.run([sys.executable, "-c", BUILD, *words.split()], capture_output=True, text=True, check=True)
    took, planned = map(int, done.stdout.split())
    assert 0.9 * planned < took < 1.15 * planned, (took, planned)


def test_a_whole_step_of_a_175b_model_runs_on_tensors_that_hold_nothing() -> None:
    """torch's fake tensors have shapes alone. The last of 3,072 ranks sends what the plan says."""
    words = ("--model gpt3-175b --tp 8 --pp 48 --dp 8 --zero-stage 3 --pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2 "
             "--bf16 --lr 6e-5 --global-batch-size 8 --train-iters 10 --eval-iters 0 --mock-data --vocab-size 50257")
    p, rank = resolved(words, 8 * 48 * 8), 8 * 48 * 8 - 1
    with FakeTensorMode():
        run = Run(p, torch.device("cpu"), connect(p.mesh, rank, "fake", 60))
        tokens, one = torch.zeros(1, 2048, dtype=torch.int64), torch.ones(())
        micros = [Batch(tokens, tokens, torch.ones(1, 2048), torch.zeros(1, dtype=torch.int64), 0)] * p.micro_batches
        run.executor.train(run.training, Turn(one, p.tokens_per_step, one, batches=micros))
    assert {axis: run.wires.line.sent[axis] for axis in traffic(p, rank)} == traffic(p, rank)
