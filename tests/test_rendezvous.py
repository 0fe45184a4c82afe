"""How ranks meet, start again, and leave: with torchrun and without, when somebody is missing and when somebody dies."""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from support import train

from megazero.base.errors import UserError
from megazero.comm import ports, rendezvous
from megazero.comm.rendezvous import address
from megazero.comm.shared import CARD, Memory, domain, supported
from megazero.comm.told import say_each, say_first
from megazero.state.checkpoint import Reader

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 61 --lr 1e-2 --mock-data --eval-iters 0 --device cpu "
         "--global-batch-size 4 --dtype fp64 --log-interval 1000 --train-iters 160 --save-interval 20 --zero-stage 2")


@contextmanager
def torchrun(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Two ranks of the real program, which torchrun starts once more if one is lost."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "--max-restarts", "1",
               "--monitor-interval", "0.1", str(ROOT / "pretrain_gpt.py"), *WORDS.split(), "--save", str(folder), "--load", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ranks_of(launcher: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found += [int(path.parent.name)] if int(parent) == launcher and state != "Z" else []
    return found


def until(there: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Whoever adopts a process may be slow to notice that it has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_lost_rank_is_started_again_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    """torchrun keeps one store over all starts: the second must not find the addresses of the first."""
    with torchrun(tmp_path / "run") as run:
        until(lambda: (tmp_path / "run" / "step-00000020" / "index.json").exists())
        os.kill(max(ranks_of(run.pid)), signal.SIGKILL)
        told, _ = run.communicate(timeout=90)
    assert run.returncode == 0, told
    assert told.count("error: ") <= 1, told                     # none if torchrun was quicker, which tells it too
    assert re.search(r"rank 0 gave up .* rank 1 is gone|exitcode: -9. local_rank: 1", told), told
    assert re.search(r"loaded +\S+/step-\d+\n", told) and "done at step 160" in told, told
    pool = Pool()
    pool.run(2, train, f"{WORDS} --save {tmp_path / 'whole'}")
    pool.close()
    one, two = Reader(tmp_path / "whole"), Reader(tmp_path / "run")
    assert two.index["step"] == 160
    assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)


def test_ranks_of_a_killed_launcher_leave(tmp_path: Path) -> None:
    with torchrun(tmp_path / "run") as run:
        until(lambda: (tmp_path / "run" / "step-00000020" / "index.json").exists())
        ranks = ranks_of(run.pid)
        run.kill()
        until(lambda: all(map(ended, ranks)), 10)
        told, _ = run.communicate(timeout=10)
    assert len(ranks) == 2 and told.count(f"error: torchrun (process {run.pid}) is gone; its ranks leave.") == 1, told


# ---- who does not come

@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    for module in (ports, rendezvous):
        monkeypatch.setattr(module, "QUIET", 0.1)
    return port


@pytest.mark.parametrize("port", ["0", "-1", "65536", "x", ""])
def test_a_port_that_is_none_is_told(port: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=rf"MASTER_ADDR 127.0.0.1, MASTER_PORT {re.escape(port) or '.none.'}: ranks cannot meet there; start them"):
        address()


def test_a_port_in_use_is_told(place: int) -> None:
    with socket.create_server(("127.0.0.1", place)), pytest.raises(UserError, match=rf"MASTER_PORT {place}: is in use here; choose another"):
        rendezvous._opened(0, time.monotonic() + 2)


def test_nobody_at_the_place_is_told(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=rf"MASTER_PORT {place}: rank 1 finds nobody there \(Connection refused\); start rank 0"):
        rendezvous._opened(1, time.monotonic() + 0.5)
    assert capsys.readouterr().out == f"rank 1: waiting for somebody at 127.0.0.1:{place} (Connection refused)\n"


def gathered(words: dict[int, str], world: int, seconds: float) -> list[Any]:
    """What each rank's gathering raised, or None."""
    store = dist.HashStore()

    def come(rank: int) -> Any:
        try:
            return rendezvous._gathered(store, rank, world, time.monotonic() + seconds, words[rank])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(words)) as threads:
        return list(threads.map(come, words))


def test_ranks_that_are_awaited_are_named(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    zero, two = gathered({0: "a", 2: "a"}, 4, 0.6)
    assert capsys.readouterr().out == f"waiting for 2 of 4 ranks at 127.0.0.1:{place}: 1, 3\n"
    assert zero.startswith(f"--distributed-timeout-minutes: rank 0 waited at 127.0.0.1:{place} in vain for 2 of 4 ranks (1, 3); start all")
    assert two.startswith(f"--distributed-timeout-minutes: rank 2 waited at 127.0.0.1:{place} in vain for other ranks; start all")


def test_ranks_with_other_flags_are_told_before_they_are_joined(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags that say who is in which group, too: with those nobody would find his peers."""
    assert gathered({0: "a", 1: "a", 2: "a"}, 3, 5) == [None] * 3
    for told in gathered({0: "a", 1: "b", 2: "a"}, 3, 5):
        assert told == "--config: ranks were started with different flags, files or data, or for different numbers of ranks; start all of them with the same command."
    assert capsys.readouterr().out == ""


def test_what_many_ranks_meet_is_told_once_and_never_lost(place: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.TCPStore("127.0.0.1", place, is_master=True, wait_for_workers=False)
    say_first("failure", "one")
    say_first("failure", "two")                                 # said already
    assert capsys.readouterr().err == "one\n"
    rendezvous.of_this_start(store).add("word/other", 1)       # somebody took the word, and died
    say_first("other", "three")
    assert capsys.readouterr().err == "three\n"
    say_each("mistakes", ["four", "five"])
    say_each("mistakes", ["five", "six"])
    say_first("mistakes", "seven")
    assert capsys.readouterr().err == "four\nfive\nsix\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")       # the next start may fail the same way
    say_first("failure", "eight")
    assert capsys.readouterr().err == "eight\n"
    del store
    monkeypatch.setenv("MASTER_PORT", str(free_port()))         # nobody listens
    say_first("failure", "nine")
    assert capsys.readouterr().err == "nine\n"


@pytest.mark.skipif(not supported(), reason="this system has no anonymous files")
def test_shared_memory_is_opened_only_where_it_is_ours() -> None:
    """In another container a number is another process, whose file of that number may be a pipe: to read it would wait, or take what is in it."""
    mine, theirs = Memory(0, 2), Memory(1, 2)
    assert mine.meet(torch.stack([mine.card(), theirs.card()]))
    (pipe, end), card = os.pipe(), theirs.card()
    os.write(end, b"not for us, and 16 bytes")
    with open(__file__) as file:
        for where, number in ((domain(), pipe), (domain(), file.fileno()), (domain(), 10_000), (domain() + 1, int(card[2]))):
            other = torch.tensor([where, os.getpid(), number, *card[3:].tolist()])
            assert len(other) == CARD and not mine.meet(torch.stack([mine.card(), other]))
        wrong = card.clone()
        wrong[4] += 1                                           # somebody's memory, but not of this group
        assert not mine.meet(torch.stack([mine.card(), wrong]))
    assert os.read(pipe, 100) == b"not for us, and 16 bytes"


def test_a_listener_that_never_answers_is_told_in_time(place: int) -> None:
    """torch would wait for ever, and no signal would end it."""
    with socket.create_server(("127.0.0.1", place)):
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"MASTER_PORT {place}: does not answer as a store of torch; is another program there\? .no answer within"):
            rendezvous._opened(1, time.monotonic() + 1)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("rank, world", [("5", "2"), ("-1", "2"), ("abc", "2"), ("0", "0"), ("1", "x")])
def test_a_rank_without_a_place_is_told(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert rendezvous.no_place().startswith(f"RANK {rank}, WORLD_SIZE {world}: no place of a rank; they are counted from 0")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rendezvous.no_place() == ""


def test_two_processes_of_one_rank_are_told(tmp_path: Path) -> None:
    """Whoever of them comes first; rank 0 is told too, which would wait for a rank that never comes."""
    place = free_port()

    def start(rank: int) -> "subprocess.Popen[str]":
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place)}
        return subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *WORDS.split(), "--global-batch-size", "3", "--save", str(tmp_path)], env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    ended = [(run.communicate(timeout=90), run.returncode) for run in [start(0), start(1), start(1)]]
    said = "".join(err for (_, err), _ in ended)
    assert {code for _, code in ended} == {2}, said
    assert {line for line in said.splitlines() if line.startswith("error: ")} == {"error: RANK 1: two processes were started as this rank; give each a number of its own from 0 to 2, as torchrun does."}
    assert "Traceback" not in said


def test_a_port_in_use_is_told_without_torchs_own_frames() -> None:
    place = free_port()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place)}
    with socket.create_server(("127.0.0.1", place)):
        ran = subprocess.run([sys.executable, str(ROOT / "pretrain_gpt.py"), *WORDS.replace("--save-interval 20 ", "").split()], env=env, capture_output=True, text=True,
                             timeout=90)
    assert ran.returncode == 2
    assert ran.stderr == f"error: MASTER_PORT {place}: is in use here; choose another with --master_port, and start one process as rank 0.\n"


def test_too_few_open_files_are_told_as_that() -> None:
    """Whatever the library says that ran out of them. (torch itself may abort: so the limit is not tried with it.)"""
    told = "rank 3 has too many open files to reach its peers over gloo; raise ulimit -n"
    for error in (OSError(errno.EMFILE, "no"), RuntimeError("socket: Too many open files")):
        assert str(ports.unreachable(3, "gloo", error)) == told
    other = RuntimeError("Cannot resolve 127.0.0.1 to a (local) address\nframe #0")
    assert str(ports.unreachable(3, "gloo", other)).startswith("rank 3 and its peers cannot reach each other over gloo (Cannot resolve 127.0.0.1 to a (local) address); all must")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    try:
        assert str(ports.unreachable(3, "gloo", other)) == told
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
