"""Masters and moments at home on disk: the same bits as in memory, in any layout, by any rule; the bytes of the plan; and a disk that fails."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from support import ROOT, SHAPES, TINY, built, lines, resolved, stepping, tool, train
from test_parity import Row, compare

from megazero.base import UserError
from megazero.plan import GRADIENT, GRADIENTS, MASTER, PAGE, PUBLISHED, STATE, WEIGHTS
from megazero.plan.cost import disk_traffic, memory, on_disk
from megazero.state.checkpoint import Reader, complete
from megazero.state.compare import checkpoints
from megazero.units.homes import Disk, File


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


SMALL = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --global-batch-size 12 --mock-data --vocab-size 301 " \
    "--lr 1e-2 --lr-warmup-iters 1 --train-iters 4 --eval-iters 1 --eval-interval 2 --weight-decay 0.1 --save-interval 2"
LLAMA = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --num-query-groups 2"
STATES, SUMS, SLICES = (f"--offload-{what} disk" for what in ("optimizer", "gradients", "weights"))
ALL = f"{STATES} {SUMS} {SLICES}"
# ranks, layout, homes, the rest; every value of a column meets those of the others as often as rows allow
ROWS = [
    (1, "", STATES, "--bf16 --optimizer adam"), (1, "", f"{STATES} --offload-fraction 0.4", "--fp16 --initial-loss-scale 1e12 --optimizer sgd"),
    (2, "--zero-stage 1", STATES, "--bf16 --optimizer ademamix --ema 0.9 --recompute-granularity full"),
    (2, "--zero-stage 3", ALL, "--fp16 --initial-loss-scale 1e13 --optimizer adam --clip-grad 0.5"), (2, "--tp 2", STATES, "--bf16 --optimizer muon"),
    (4, "--tp 2 --zero-stage 2 --reduce-every 2", f"{STATES} {SUMS}", f"--bf16 --optimizer lion {LLAMA}"),
    (2, "--pp 2 --pipeline-schedule zb-h1", STATES, f"--bf16 --optimizer lamb {LLAMA}"), (4, "--pp 2 --zero-stage 3", ALL, "--fp16 --optimizer adafactor --lr 1e-3"),
    (4, "--dp 4 --zero-stage 2 --zero-shard-size 2", f"{STATES} {SUMS}", "--bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype 8bit --main-params-dtype bf16"),
    (2, "--zero-stage 1", STATES, "--dtype fp64 --optimizer adam --hidden-dropout 0.1"), (3, "--zero-stage 2", f"{STATES} {SUMS}", "--dtype fp32 --optimizer muon --ema 0.5"),
    (2, "--pp 2 --num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule interleaved", f"{STATES} --offload-fraction 0.5",
     "--bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
    (1, "--zero-stage 3 --keep-weights 2", ALL, "--dtype fp32 --optimizer adam --ema 0.9"), (2, "--zero-stage 3", f"{SUMS} {SLICES}", "--dtype fp64 --optimizer lamb"),
    (4, "--tp 2 --pp 2 --zero-stage 3", f"{SUMS} {SLICES}", f"--bf16 --optimizer adam {LLAMA} --log-params-norm --log-num-zeros-in-grad --log-update-ratio"),
    (4, "--dp 4 --zero-stage 3 --zero-shard-size 2", ALL, "--bf16 --optimizer muon"),
    (2, "--zero-stage 3", SLICES, "--bf16 --optimizer sgd --main-params-dtype fp32"), (2, "--zero-stage 2", SUMS, "--fp16 --initial-loss-scale 1e13"),
]


@pytest.mark.parametrize("ranks, layout, homes, rest", [
    pytest.param(*row, marks=() if i in (1, 2, 4, 7, 8, 12, 14, 15) else pytest.mark.full) for i, row in enumerate(ROWS)])
def test_the_same_bits_as_in_memory(ranks: int, layout: str, homes: str, rest: str, pool: Pool, tmp_path: Path) -> None:
    """Steps, skipped ones among them, evaluations by means, checkpoints on the way; then one that goes on from the other's."""
    disk = f"{homes} --offload-dir {tmp_path / 'home'} --offload-buffer-size 100000 --offload-block-size 8192"
    disk = disk if STATES in homes else disk.replace("--offload-buffer-size 100000 ", "")
    words = f"{SMALL} {layout} {rest}"
    pool.run(ranks, train, f"{words} --save {tmp_path / 'a'}", tmp_path / "la")
    pool.run(ranks, train, f"{words} {disk} --save {tmp_path / 'b'}", tmp_path / "lb")
    names = ("step", "loss", "grad_norm", "skipped", "split")
    assert [{n: r.get(n) for n in names} for r in lines(tmp_path / "la")] == [{n: r.get(n) for n in names} for r in lines(tmp_path / "lb")]
    if "1e1" in rest:
        assert any(r.get("skipped") for r in lines(tmp_path / "lb"))
    for (_, one), (_, two) in zip(complete(tmp_path / "a"), complete(tmp_path / "b"), strict=True):
        assert not list(checkpoints(Reader(one), Reader(two)))
    assert not list((tmp_path / "home").iterdir())
    pool.run(ranks, train, f"{words} {disk} --load {tmp_path / 'a'} --ckpt-step 2 --save {tmp_path / 'c'}")
    assert not list(checkpoints(Reader(tmp_path / "a"), Reader(tmp_path / "c")))


@pytest.mark.parametrize("row", [
    Row(tp=2, dp=2, level=1, late=True, shape="gpt2-plain", optimizer="adam"), Row(dp=3, level=3, late=True, shape="llama", optimizer="muon"),
    Row(pp=2, dp=2, level=2, late=True, schedule="zb-h1", shape="llama-tied-scaled", optimizer="lamb"),
    Row(tp=2, pp=2, level=1, late=True, schedule="interleaved", virtual=2, layers=4, recompute="full", shape="llama", optimizer="sgd")])
def test_nobody_reads_what_is_not_here(row: Row, pool: Pool, tmp_path: Path) -> None:
    """Under `late` what has left is NaN, and an update runs when somebody asks: one rank in memory is equalled all the same."""
    homes = {0: STATES, 1: STATES, 2: f"{STATES} {SUMS}", 3: ALL}[row.level]
    compare(Row(**{**vars(row), "extra": f"{homes} --offload-dir {tmp_path} --offload-buffer-size 50000"}), pool)


@pytest.mark.parametrize("words, homes", [
    ("--bf16", STATES), ("--bf16 --optimizer muon --ema 0.9 --zero-stage 2", f"{STATES} {SUMS}"), ("--fp16 --optimizer sgd", f"{STATES} --offload-fraction 0.6"),
    ("--dtype fp64 --optimizer ademamix --zero-stage 3", ALL), ("--bf16 --exp-avg-dtype 8bit --exp-avg-sq-dtype bf16", STATES),
    ("--bf16 --zero-stage 3 --reduce-every 2 --keep-weights 2 --global-batch-size 6", ALL), ("--dtype fp32 --zero-stage 3 --optimizer lion", f"{SUMS} {SLICES}")])
def test_bytes_are_those_of_the_plan(words: str, homes: str, tmp_path: Path) -> None:
    words = f"{TINY} {SHAPES['llama']} {words}"
    size = " --offload-buffer-size 40000" if STATES in homes else ""
    run = built(f"{words} {homes} --offload-dir {tmp_path}{size}")
    plan, home = run.plan, run.home
    assert isinstance(home, Disk) and home.used == on_disk(plan) > 0 and os.fstat(home.file.number).st_size == home.used
    run.initialise()
    before = home.read, home.written
    step = stepping(run)
    for _ in range(3):
        step.start()
    step.settle(last=True)
    home.settle()
    read, written = disk_traffic(plan)
    assert (home.read - before[0], home.written - before[1]) == (3 * read, 3 * written)
    units = run.units.values()
    masters = sum(u.master.nbytes for u in units if u.master is not u.weight_slice and not u.away)
    kept = sum(m.nbytes for name, own in run.updater.state.items() for kind, m in own.items() if not home.has(name, kind))
    weights = sum(u.weight_slice.nbytes for u in units if not (home.has(u.flat.name, PUBLISHED) or u.master is u.weight_slice and home.has(u.flat.name, MASTER)))
    sums = sum(u.grad_slice.nbytes for u in units if not home.has(u.flat.name, GRADIENT))
    told, plain = memory(plan), memory(resolved(words))
    assert (told["weights"], told["master weights"], told["gradients"], told["optimizer"]) == (weights, masters, sums, kept)
    gone = sum(home.bytes for home in plan.homes(0).values())
    names = ("weights", "master weights", "gradients", "optimizer")
    assert sum(told[name] for name in names) == sum(plain[name] for name in names) - gone
    most = {what: max((h.largest for (_, w), h in plan.homes(0).items() if w == what), default=0) for what in (STATE, GRADIENTS, WEIGHTS)}
    assert told["pieces under way"] == 3 * most[STATE] + most[GRADIENTS] + 2 * most[WEIGHTS]


def test_a_piece_is_whole_pages_and_covers_the_slice_once(tmp_path: Path) -> None:
    for zero, size in ((0, 4096), (1, 50_000), (3, 123_456), (2, 10**9)):
        plan = resolved(f"{TINY} --bf16 --zero-stage {zero} --offload-optimizer disk --offload-dir {tmp_path} --offload-buffer-size {size}", 2)
        for rank in (0, 1):
            homes = plan.homes(rank)
            assert list(homes) == [(u.name, STATE) for u in plan.units_of(rank)]
            for home in homes.values():
                assert home.pieces[0][0] == home.kinds[MASTER].start and home.pieces[-1][1] == home.kinds[MASTER].stop
                assert all(a[1] == b[0] and (a[1] - a[0]) % PAGE == 0 for a, b in zip(home.pieces, home.pieces[1:], strict=False))
                assert home.largest <= max(size, 12 * PAGE)
    half = resolved(f"{TINY} --bf16 --offload-optimizer disk --offload-dir {tmp_path} --offload-fraction 0.5").homes(0)
    assert half and ("embedding", STATE) not in half and ("head", STATE) in half
    assert not resolved(f"{TINY} --bf16 --offload-optimizer disk --offload-dir {tmp_path} --offload-fraction 0").homes(0)


# ---- a disk that fails

class Broken(File):
    """After so many calls, a fault."""

    fault: Any = staticmethod(lambda what, count: None)
    calls = 0

    def read(self, into: memoryview, at: int) -> None:
        Broken.calls += 1
        self.fault("read", Broken.calls)
        super().read(into, at)

    def write(self, out: memoryview, at: int) -> None:
        Broken.calls += 1
        self.fault("write", Broken.calls)
        super().write(out, at)


@pytest.mark.parametrize("what, number", [("read", errno.EIO), ("write", errno.EIO), ("write", errno.ENOSPC)])
def test_a_disk_that_fails_ends_the_run_and_nothing_torn_is_saved(what: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(kind: str, count: int) -> None:
        if kind == what and count > 150:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("megazero.units.homes.File", Broken)
    monkeypatch.setattr(Broken, "fault", staticmethod(fault))
    monkeypatch.setattr(Broken, "calls", 0)
    words = f"{SMALL} --bf16 --save {tmp_path / 'ck'} --offload-optimizer disk --offload-dir {tmp_path} --offload-buffer-size 100000 --train-iters 50 --save-interval 1"
    with pytest.raises(UserError) as error:
        train(words)
    assert error.value.sentences == (f"--offload-dir {tmp_path}: what is at home there cannot be read or written ({os.strerror(number)}); nothing is saved of "
                                     "this step. Go on from the last checkpoint, with another folder if that disk fails.",)
    found = complete(tmp_path / "ck")
    for _, path in found:
        Reader(path).verify()
    monkeypatch.setattr(Broken, "fault", staticmethod(lambda kind, count: None))
    if found:
        train(f"{words.replace('--train-iters 50', '--train-iters 8')} --load {tmp_path / 'ck'}")
        train(f"{SMALL} --bf16 --save {tmp_path / 'whole'} --train-iters 8")
        assert not list(checkpoints(Reader(tmp_path / "whole"), Reader(tmp_path / "ck")))


def test_torn_state_is_given_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megazero.units.homes.File", Broken)
    run = built(f"{TINY} --bf16 --offload-optimizer disk --offload-dir {tmp_path}")
    run.initialise()
    home = run.home
    assert isinstance(home, Disk)

    def fault(kind: str, count: int) -> None:
        if kind == "write":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Broken, "fault", staticmethod(fault))
    with pytest.raises(UserError, match="Input/output error"), home.present("layers.0", STATE):
        pass
    monkeypatch.setattr(Broken, "fault", staticmethod(lambda kind, count: None))
    for ask in (lambda: home.present("layers.1", STATE).__enter__(), lambda: home.copy("layers.1", MASTER, 0, 8), lambda: next(home.through("head"))):
        with pytest.raises(UserError, match="nothing is saved of this step"):
            ask()


def test_a_file_that_was_cut_is_told(tmp_path: Path) -> None:
    run = built(f"{TINY} --bf16 --offload-optimizer disk --offload-dir {tmp_path}")
    run.initialise()
    assert isinstance(run.home, Disk)
    os.truncate(f"/proc/self/fd/{run.home.file.number}", PAGE)
    with pytest.raises(UserError, match="it is shorter than it was"):
        stepping(run).start()


def test_a_full_disk_is_told_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"--offload-dir {tmp_path}: has no room for the [\d,]+ bytes of a rank \(No space left on device\); name"):
        train(f"{SMALL} --bf16 --offload-optimizer disk --offload-dir {tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_nameless_files_or_direct_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def plain(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", plain)
    file = File(tmp_path, 3 * PAGE)
    assert not file.direct and not list(tmp_path.iterdir())
    file.write(memoryview(b"x" * 5000), 100)
    into = bytearray(5000)
    file.read(memoryview(into), 100)
    assert bytes(into) == b"x" * 5000


def test_a_killed_run_leaves_no_file_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    words = (f"{SMALL} --bf16 --save {tmp_path / 'ck'} --load {tmp_path / 'ck'} --offload-optimizer disk --offload-dir {tmp_path / 'home'} "
             "--offload-buffer-size 100000 --train-iters 100000 --eval-iters 0").split()
    with subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        end = time.monotonic() + 120
        while len(complete(tmp_path / "ck")) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert complete(tmp_path / "ck") and not list((tmp_path / "home").iterdir())
    step = complete(tmp_path / "ck")[-1][0]
    train(f"{' '.join(words)} --train-iters {step + 3}")
    assert complete(tmp_path / "ck")[-1][0] == step + 3


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, told in {
        "--offload-optimizer disk": "--offload-optimizer disk: needs --offload-dir",
        f"--offload-optimizer disk --offload-dir {tmp_path} --save x --async-save": "--async-save: cannot be combined with --offload-optimizer disk",
        "--offload-optimizer cpu --offload-fraction 1.5": "--offload-fraction 1.5: must be between 0 and 1.",
        f"--offload-optimizer disk --offload-dir {tmp_path} --offload-block-size 5000": "--offload-block-size 5000: must be a multiple of 4096 bytes",
        f"--offload-optimizer disk --offload-dir {tmp_path} --offload-buffer-size 10": "--offload-buffer-size 10: must be at least 4096 bytes.",
        f"--offload-optimizer disk --offload-dir {tmp_path} --offload-queue-depth 0": "--offload-queue-depth 0: must be at least 1.",
        "--offload-dir x": "--offload-dir x: has no effect without --offload-optimizer disk.",
        "--offload-fraction 0.5": "--offload-fraction 0.5: has no effect without --offload-optimizer.",
        f"--offload-gradients disk --offload-dir {tmp_path} --zero-stage 1": "--offload-gradients disk: is of slices, which --zero-stage 2 and 3 have; write one.",
        f"--offload-weights disk --offload-dir {tmp_path} --zero-stage 2": "--offload-weights disk: is of slices, which --zero-stage 3 has; write that.",
        "--offload-optimizer nvme": "--offload-optimizer nvme: must be one of none, cpu, disk",
        f"--offload-optimizer disk --offload-dir {tmp_path / 'file' / 'x'}": f"--offload-dir {tmp_path / 'file' / 'x'}: is not a folder that can be written to; name",
    }.items():
        with pytest.raises(UserError, match=re.escape(told)):
            train(f"{SMALL} {words}")


def test_the_way_is_told_at_start_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(f"{SMALL} --bf16 {STATES} --offload-dir {tmp_path}", tmp_path / "log")
    assert re.search(rf"home        --offload-dir {tmp_path}: read and written (around|through) the page cache", capsys.readouterr().out)
    steps = [line for line in found if "split" not in line]
    assert all(line["disk_seconds"] > 0 and line["disk_bytes"] > 0 for line in steps) and steps[2]["disk_bytes"] == steps[3]["disk_bytes"]


def test_on_a_cpu_the_hosts_memory_is_where_things_are(tmp_path: Path) -> None:
    plain, cpu = (memory(resolved(f"{TINY} --bf16 {words}")) for words in ("", "--offload-optimizer cpu"))
    assert plain == cpu and not torch.cuda.is_available()


def test_a_disk_is_measured_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, error = tool(monkeypatch, capsys, "disk_speed.py", tmp_path, "--size", 2**23)
    rows = [line.split() for line in told.splitlines()[2:-1]]
    assert code == 0 and len(rows) == 10 and all(float(x) > 0 for row in rows for x in row), error
    best = max(rows, key=lambda row: float(row[4]))
    assert f"write --offload-queue-depth {best[0]} --offload-block-size {best[1]}: {best[4]} GB/s" in told and not list(tmp_path.iterdir())
    assert tool(monkeypatch, capsys, "disk_speed.py", tmp_path / "file" / "x")[0] == 2
    assert "--size 5: must be at least 8388608" in tool(monkeypatch, capsys, "disk_speed.py", tmp_path, "--size", 5)[2]
