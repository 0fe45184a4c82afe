"""The collectives of every backend, what they count, and what happens when a rank is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RankError
from support import SHAPES, TINY, resolved, stepping

from megazero.comm import shared
from megazero.comm.gloo import Gloo
from megazero.comm.group import Group, Line
from megazero.comm.late import Late
from megazero.comm.nccl import Nccl, before_cuda
from megazero.comm.shared import Memory, supported
from megazero.comm.wires import connect
from megazero.plan import architecture
from megazero.plan.cost import traffic
from megazero.plan.mesh import Mesh
from megazero.run.run import Run


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


def test_groups_cover_the_world_and_neighbours_share_tensors() -> None:
    mesh = Mesh.of(pp=2, dp=6, tp=4, kv=2, shard=3)
    groups = mesh.groups()
    for axis, size in (("tp", 4), ("kv", 2), ("shard", 3), ("replicate", 2), ("world", 48)):
        assert all(len(g) == size for g in groups[axis]) and sorted(r for g in groups[axis] for r in g) == list(range(48))
    assert groups["tp"][0] == (0, 1, 2, 3) and groups["shard"][0] == (0, 4, 8) and groups["kv"][1] == (2, 3)
    assert mesh.describe()[0] == "tp (0 1 2 3) (4 5 6 7) (8 9 10 11) (12 13 14 15) and 8 more"
    assert mesh.place(29) == {"pp": (1, 2), "replicate": (0, 2), "shard": (1, 3), "tp": (1, 4), "dp": (1, 6)}
    assert (25, 29, 33) in groups["shard"] and (29, 41) in groups["replicate"]


def test_an_axis_is_a_row_of_the_table() -> None:
    """A row for cp is all it takes: numbers, places, groups, sets of axes that vary; the other groups know of it."""
    mesh = Mesh((("pp", 2), ("replicate", 1), ("shard", 2), ("cp", 3), ("tp", 2)), tied=(("tied", (0, 1)), ("tied1", (1,))))
    groups = mesh.groups()
    assert list(groups) == ["tp", "kv", "cp", "shard", "replicate", "tied", "tied1", "world", "saved"] and mesh.world == 24
    assert groups["cp"] == [(0, 2, 4), (6, 8, 10), (1, 3, 5), (7, 9, 11), *((12, 14, 16), (18, 20, 22), (13, 15, 17), (19, 21, 23))]
    assert groups["tp"][:3] == [(0, 1), (2, 3), (4, 5)] and groups["shard"][:3] == [(0, 6), (2, 8), (4, 10)]
    assert mesh.varying("shard", "cp")[:2] == [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)] and mesh.size("shard", "cp") == 6
    assert groups["tied"][5] == (5, 17) and groups["tied1"] == [(r,) for r in range(12, 24)] and mesh.channels()[:2] == [(0, 12), (1, 13)]
    at = mesh.place(21)
    assert (at.pp, at.shard, at.cp, at.tp, at.dp) == (1, 1, 1, 1, 1) and at["cp"] == (1, 3) and mesh.describe()[1].startswith("cp (0 2 4) ")
    with pytest.raises(AttributeError, match="there is no axis ep"):
        _ = at.ep


def joined(backend: str, one_host: bool) -> Group:
    """All ranks as one group; without `one_host`, as if each were on a host of its own. `torch`: the class for NCCL, whose calls torch's own
    gloo knows too; a world of one is made by hand, since `connect` never makes it."""
    if backend == "torch":
        dist.init_process_group("gloo")
        line = Line(int(os.environ["RANK"]), 60)
        return Nccl("tp", range(int(os.environ["WORLD_SIZE"])), line, dist.group.WORLD, dist.new_group())
    rank, world, meet = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Memory.meet
    if not one_host:
        Memory.meet = lambda self, cards: False  # type: ignore[method-assign]
    group = connect(Mesh.of(tp=world), rank, backend, 60)["tp"]
    Memory.meet = meet  # type: ignore[method-assign]
    gloo = group.inner if isinstance(group, Late) else group
    assert isinstance(gloo, Gloo) and (gloo.memory is not None) == (one_host and supported())
    return group


def ragged(rank: int, world: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int], list[int]]:
    """(what this rank sends, how much of it to each, how much comes from each): nothing between some, and the amounts of two ways differ."""
    amount = [[3 * a if (a + b) % 3 == 2 else a + 2 * b for b in range(world)] for a in range(world)]
    return 100 * rank + torch.arange(sum(amount[rank]), dtype=dtype), amount[rank], [amount[a][rank] for a in range(world)]


def several(dtype: torch.dtype, backend: str, one_host: bool) -> list[torch.Tensor]:
    """Every collective, all under way at once and waited for in another order than they were started."""
    group = joined(backend, one_host)
    rank, world = group.rank, group.size
    x = torch.arange(6 * world, dtype=dtype).view(2 * world, 3) + 100 * rank
    works = [group.all_gather(x), group.reduce_scatter(x.clone()), group.all_reduce(x.clone()[:, :1].contiguous()),
             group.all_reduce((x * (-1) ** rank).flatten()[:5].clone(), "max"), group.all_gather(x.new_empty(0, 3))]
    whole = torch.zeros_like(x.repeat(world, 1))
    whole[len(x) * rank:len(x) * (rank + 1)] = x
    both = x.clone()
    works += [group.all_gather(whole.chunk(world)[rank], whole), group.reduce_scatter(both, both.chunk(world)[rank])]       # in place
    works += [group.all_to_all(*ragged(rank, world, dtype)), group.all_to_all(x.new_empty(0), [0] * world, [0] * world)]
    return [w.wait() for w in reversed(works)][::-1]


@pytest.mark.parametrize("world, backend", [(world, backend) for backend in ("gloo", "gloo+late") for world in (2, 3, 4)] + [(1, "torch"), (2, "torch")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_host", [True, False], ids=["shared memory", "messages"])
def test_collectives(world: int, dtype: torch.dtype, backend: str, one_host: bool, pool: Pool) -> None:
    given = [torch.arange(6 * world, dtype=dtype).view(2 * world, 3) + 100 * r for r in range(world)]
    total = torch.stack([g.float() for g in given]).sum(0).to(dtype)
    for rank, (gathered, scattered, summed, highest, nothing, *placed) in enumerate(pool.run(world, several, dtype, backend, one_host)):
        assert torch.equal(gathered, torch.cat(given))
        assert torch.equal(scattered, total[2 * rank:2 * rank + 2])
        assert torch.equal(summed, total[:, :1])
        assert torch.equal(highest, torch.stack([(g * (-1) ** r).flatten()[:5] for r, g in enumerate(given)]).amax(0))
        assert nothing.shape == (0, 3)
        assert torch.equal(placed[0], gathered) and torch.equal(placed[1], scattered)
        sent = [ragged(r, world, dtype) for r in range(world)]
        assert torch.equal(placed[2], torch.cat([x.split(out)[rank] for x, out, _ in sent])) and placed[3].shape == (0,)


def many_steps(steps: int) -> int:
    """How many slots this rank has made in so many steps with several calls under way."""
    group = joined("gloo", True)
    rank, world = group.rank, group.size
    for step in range(steps):
        x = torch.full((world << 14,), float(rank + step))
        works = [group.all_gather(x), group.reduce_scatter(x.clone()), group.all_reduce(x.clone())]
        gathered, scattered, summed = (w.wait() for w in works)
        assert torch.equal(gathered[::len(x)], torch.arange(world) + float(step))
        assert scattered.eq(sum(range(world)) + world * step).all() and summed.eq(sum(range(world)) + world * step).all()
    assert isinstance(group, Gloo) and group.memory
    return len(group.memory.slots)


@pytest.mark.skipif(not supported(), reason="this system has no anonymous files")
def test_shared_memory_stops_growing(pool: Pool) -> None:
    """1,200 times something is written (more often than there is room for letters), in three sizes, never more than four at once, and
    neighbours may be a step apart."""
    assert all(1 <= slots <= 2 * 3 * 4 for slots in pool.run(3, many_steps, 300))


def half_sum(backend: str) -> torch.Tensor:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    x = torch.full((world,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    return connect(Mesh.of(tp=world), rank, backend, 60)["tp"].reduce_scatter(x).wait()


def test_half_precision_is_summed_in_fp32_and_rounded_once(pool: Pool) -> None:
    """256 + 1 is 256 in bf16, so adding four ones one by one would be lost."""
    assert all(part.item() == 260.0 for part in pool.run(5, half_sum, "gloo"))


def far_ahead() -> list[float]:
    """Rank 0 sends more than there is room for; rank 1 begins to read late."""
    rank = int(os.environ["RANK"])
    channels = connect(Mesh.of(pp=2), rank, "gloo", 60).channels
    if rank == 0:
        for i in range(shared.ROOM + 300):
            channels["send", "F"].send(torch.full((3,), float(i)))
        return []
    time.sleep(0.5)
    return [float(channels["recv", "F"].receive(torch.empty(3)).wait()[1]) for _ in range(shared.ROOM + 300)]


def test_a_sender_waits_for_a_reader_that_is_far_behind(pool: Pool) -> None:
    assert pool.run(2, far_ahead)[1] == [float(i) for i in range(shared.ROOM + 300)]


def changes_too_early() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = connect(Mesh.of(tp=world), rank, "gloo+late", 60)["tp"]
    x = torch.ones(world)
    work = group.all_gather(x)
    x += 1
    work.wait()


def test_late_finds_an_input_that_changed_before_the_wait(pool: Pool) -> None:
    with pytest.raises(RankError, match="the input of all-gather changed before it was waited for"):
        pool.run(2, changes_too_early)


def test_fake_plays_any_rank_of_any_mesh() -> None:
    wires = connect(Mesh.of(pp=16, dp=8, tp=8), 777, "fake", 1)
    at = wires.place
    assert (at.pp, at.dp, at.tp) == (12, 1, 1) and wires["tp"].size == 8 and wires["replicate"].rank == 1
    assert wires["tp"].all_gather(torch.ones(2, 3)).wait().shape == (16, 3)
    assert wires["tp"].reduce_scatter(torch.ones(16, 3)).wait().shape == (2, 3)
    assert wires.line.sent["tp"] == 7 * 6 * 4 + 7 * 6 * 4


LAYOUTS = [
    "--tp 2", "--tp 3 --seq-length 25", "--tp 4 --num-query-groups 2", "--tp 8 --num-query-groups 1 --recompute-granularity full",
    "--tp 2 --dp 2 --recompute-granularity selective", "--dp 3", "--tp 4 --dp 2 --micro-batch-size 2 --bf16", "--tp 2 --dp 3 --qk-layernorm",
    "--tp 2 --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights", "--tp 6 --dp 1 --fp16",
]


@pytest.mark.parametrize("words", LAYOUTS)
@pytest.mark.parametrize("logits", [1 << 24, 128 * 10])
def test_the_plan_knows_the_bytes_on_the_wire(words: str, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of one rank of each layout, without its peers."""
    monkeypatch.setitem(architecture.LOGITS, "cpu", logits)
    words = f"{TINY} --hidden-size 48 --num-attention-heads 24 --global-batch-size 12 {words}"
    sizes = words.split()
    world = int(sizes[sizes.index("--tp") + 1] if "--tp" in sizes else 1) * int(sizes[sizes.index("--dp") + 1] if "--dp" in sizes else 1)
    plan = resolved(words, world)
    run = Run(plan, torch.device("cpu"), connect(plan.mesh, world - 1, "fake", 60))
    run.initialise()
    stepping(run).start()
    expected = traffic(plan, world - 1)
    assert {axis: run.wires.line.sent[axis] for axis in expected} == expected
    assert set(run.wires.line.sent) <= set(expected)


def test_the_fake_backend_runs_on_one_rank_what_the_shapes_say() -> None:
    for i, shape in enumerate(SHAPES.values()):
        plan = resolved(f"{TINY} {shape} --num-attention-heads 8 --tp 4 --seq-length 25 --recompute-granularity {('none', 'full')[i % 2]}", 4)
        run = Run(plan, torch.device("cpu"), connect(plan.mesh, 3, "fake", 60))
        run.initialise()
        step = stepping(run)
        step.start()
        assert step.pending and step.pending.verdict.norm.shape == () and run.wires.line.sent["tp"] > 0
        assert {axis: run.wires.line.sent[axis] for axis in traffic(plan, 3)} == traffic(plan, 3), shape


FAULTY = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from megazero.settings import config
from megazero.run.executor import Executor
from megazero.run.launch import launch
what, who = sys.argv[2], int(sys.argv[3])
plain, calls = Executor._forward, [0]

def forward(self, action, turn):
    calls[0] += 1
    if calls[0] == 7 and int(os.environ["RANK"]) == who:
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
        if what == "raise": raise ValueError("made up in forward")
    plain(self, action, turn)

Executor._forward = forward
launch(lambda: config.from_command_line(sys.argv[4:]))
"""


@pytest.mark.parametrize("what, who", [
    ("kill", 1), ("stop", 2), ("raise", 0), *(pytest.param(*row, marks=pytest.mark.full) for row in (("raise", 1), ("kill", 0)))])
def test_a_lost_rank_is_named_and_nobody_hangs(what: str, who: int, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    words = f"{TINY} --hidden-size 48 --num-attention-heads 6 --tp 3 --distributed-timeout-minutes 0.1".split()
    command = [sys.executable, str(script), str(Path(__file__).resolve().parents[1]), what, str(who), *words]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)          # the launcher's, as under torchrun: outlives any rank
    common = os.environ | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              text=True) for r in range(3)]
    start = time.monotonic()
    try:
        others = [p.communicate(timeout=60)[1] for r, p in enumerate(ranks) if r != who or what != "stop"]
    finally:
        ranks[who].send_signal(signal.SIGKILL)
        ranks[who].wait()
    told = "".join(others)
    assert time.monotonic() - start < 45
    assert all(p.returncode != 0 for p in ranks), told
    if what == "raise":
        assert f"rank {who} failed:" in told and told.count("ValueError: made up in forward") == 1, told
        assert told.count("error: ") == 0, told
    else:
        assert f"rank {who} {'is gone' if what == 'kill' else 'did not answer within 6 s'} (" in told and " gave up in " in told and " over tp: " in told, told


def test_a_pipeline_loads_its_kernels_before_it_waits_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")               # so that what it was comes back
    for pipeline, said, want in ((False, None, None), (True, None, "EAGER"), (True, "LAZY", "LAZY")):
        monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
        if said:
            monkeypatch.setenv("CUDA_MODULE_LOADING", said)
        before_cuda(pipeline)
        assert os.environ.get("CUDA_MODULE_LOADING") == want
