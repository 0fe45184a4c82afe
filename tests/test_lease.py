"""One run writes to a folder at a time; who is gone is followed by one, and never by two."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import byte_dataset, train

from megazero.base import lease as leases
from megazero.base.errors import UserError
from megazero.base.lease import Lease, process_of
from megazero.corpus.edit import merge_datasets, split_dataset
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.run.step import Step
from megazero.state.checkpoint import complete
from megazero.state.logs import metrics_log

WORDS = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 31 --lr 1e-3 --mock-data --eval-iters 0 --global-batch-size 1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "WATCH", 0.5)
    yield


def left_by(path: Path, *, process: str, pid: int = 1) -> None:
    path.write_text(json.dumps({"run": "0123abcd", "host": "elsewhere", "pid": pid, "process": process}))


def dead() -> tuple[int, str]:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_of(child.pid)
    child.communicate(b"\n")
    assert name and not process_of(child.pid) and name.startswith(process_of(os.getpid()).rpartition(" ")[0])
    return child.pid, name


def test_a_second_holder_is_told_who_is_there(tmp_path: Path) -> None:
    one = Lease(tmp_path / "lease.json", "--save x")
    with pytest.raises(UserError, match=rf"^--save x: run {one.holder.run} on \S+, process {os.getpid()} writes there; wait until it has ended"):
        Lease(tmp_path / "lease.json", "--save x")
    one.close()
    assert [*tmp_path.iterdir()] == []
    Lease(tmp_path / "lease.json", "--save x").close()


def test_who_has_ended_here_is_followed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "WATCH", 1e9)
    pid, process = dead()
    left_by(tmp_path / "lease.json", process=process, pid=pid)
    Lease(tmp_path / "lease.json", "--save x").close()
    assert capsys.readouterr().out == f"--save x: taken over from run 0123abcd on elsewhere, process {pid}, which has ended\n"


def test_who_is_elsewhere_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another boot, another container: only its touching the file tells."""
    left_by(tmp_path / "lease.json", process="another boot")
    monkeypatch.setattr(leases, "WATCH", 1e9)
    with ThreadPoolExecutor() as thread:
        second = thread.submit(Lease, tmp_path / "lease.json", "--save x")
        while not second.done():
            time.sleep(0.05)
            os.utime(tmp_path / "lease.json")
        with pytest.raises(UserError, match="^--save x: run 0123abcd on elsewhere, process 1 writes there"):
            second.result()
    monkeypatch.setattr(leases, "WATCH", 0.5)
    Lease(tmp_path / "lease.json", "--save x").close()
    assert capsys.readouterr().out.endswith("taken over from run 0123abcd on elsewhere, process 1, which has not been heard of for 0.5 s\n")


def test_who_lost_it_ends_and_leaves_it_alone(tmp_path: Path) -> None:
    mine = Lease(tmp_path / "lease.json", "--save x")
    mine.look()
    left_by(tmp_path / "lease.json", process="another boot")
    mine.renew()
    with pytest.raises(UserError, match="^--save x: run 0123abcd on elsewhere, process 1 took over, since this process had not been heard of"):
        mine.look()
    mine.close()
    assert (tmp_path / "lease.json").exists()


def test_a_lease_that_was_deleted_comes_back(tmp_path: Path) -> None:
    mine = Lease(tmp_path / "lease.json", "--save x")
    (tmp_path / "lease.json").unlink()
    mine.renew()
    with pytest.raises(UserError, match=mine.holder.run):
        Lease(tmp_path / "lease.json", "--save x")
    mine.close()


def test_what_is_no_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text('{"run": 3}')
    with pytest.raises(UserError, match="lease.json: is no lease .run is 3, not a word like .*; delete it"):
        Lease(tmp_path / "lease.json", "--save x")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_many_one_wins(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 races of 4 for what is free, and for what somebody left who is gone."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    monkeypatch.setattr(leases, "WATCH", 1e9)
    pid, process = dead()

    def come(path: Path) -> Lease | None:
        try:
            return Lease(path, "--save x")
        except UserError:
            return None

    with ThreadPoolExecutor(4) as threads:
        for race in range(50):
            path = tmp_path / f"{race}.json"
            if race % 2:
                left_by(path, process=process, pid=pid)
            won = [x for x in threads.map(come, [path] * 4) if x is not None]
            assert len(won) == 1 and won[0]._read() == won[0].holder
            won[0].close()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("flag", ["--save", "--log-dir"])
def test_two_runs_do_not_share_a_folder(flag: str, tmp_path: Path) -> None:
    words, folder = f"{WORDS} --train-iters 3 --save {tmp_path / 'run'}", tmp_path / "run"
    log = tmp_path / "run" if flag == "--save" else tmp_path / "log"
    log.mkdir()
    other = Lease(log / "lease.json", "somebody")
    with pytest.raises(UserError, match=rf"^{flag} {log}: run {other.holder.run} on \S+, process {os.getpid()} writes there"):
        train(words, log)
    assert not complete(folder)
    other.close()
    train(words, log)
    assert [step for step, _ in complete(folder)] == [3] and not (log / "lease.json").exists()


def test_a_run_that_lost_its_folder_saves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a save that was under way nothing is seen."""
    from megazero.state import saving
    plain = saving.write_index

    def overtaken(folder: Path, *more: object) -> None:
        plain(folder, *more)  # type: ignore[arg-type]
        left_by(tmp_path / "lease.json", process="another boot")

    monkeypatch.setattr(saving, "write_index", overtaken)
    with pytest.raises(UserError, match=rf"^--save {tmp_path}: run 0123abcd on elsewhere, process 1 took over"):
        train(f"{WORDS} --train-iters 4 --save-interval 2 --save {tmp_path}")
    assert not complete(tmp_path)


@pytest.mark.parametrize("flag", ["--save", "--log-dir"])
def test_a_run_that_was_stopped_and_followed_leaves_its_successors_files_alone(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes in the middle of its third step, before its own clock has looked again."""
    run, log = tmp_path / "run", tmp_path / "log"
    there = {"--save": run, "--log-dir": log}[flag]
    draft = run / "draft-0123abcd-step-00000004" / "rank-00000.safetensors"
    monkeypatch.setattr(leases, "BEAT", 1e9)
    start, seen = Step.start, []

    def started(self: Step, *given: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            left_by(there / "lease.json", process="another boot")
            monkeypatch.setattr(leases, "BEAT", -1.0)           # it has not been heard of for long
            draft.parent.mkdir()
            draft.write_text("the successor's")
            (log / "metrics.jsonl").write_text("the successor's\n")
        return start(self, *given)

    monkeypatch.setattr(Step, "start", started)
    with pytest.raises(UserError, match=rf"^{flag} {there}: run 0123abcd on elsewhere, process 1 took over"):
        train(f"{WORDS} --train-iters 4 --save {run} --save-interval 1", log)
    assert draft.read_text() == "the successor's" and (log / "metrics.jsonl").read_text() == "the successor's\n"
    assert [step for step, _ in complete(run)] == [1, 2] and (there / "lease.json").exists()


def test_two_do_not_make_one_dataset(tmp_path: Path) -> None:
    data = byte_dataset(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    for name, make in (("new", lambda: merge_datasets([data], str(tmp_path / "new"))), ("new_train", lambda: split_dataset(data, str(tmp_path / "new"), "8,2")),
                       ("p", lambda: preprocess(PreprocessSettings(input=(str(tmp_path / "a.jsonl"),), output_prefix=str(tmp_path / "p"), tokenizer_type="ByteTokenizer")))):
        other, before = Lease(tmp_path / f"{name}.lease.json", "somebody"), sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=rf"^--output-prefix {tmp_path / name}: run {other.holder.run} on \S+, process {os.getpid()} writes there"):
            make()
        assert sorted(tmp_path.iterdir()) == before
        other.close()
        make()
    assert not [*tmp_path.glob("*lease*")]


def test_what_was_left_by_who_died_asking_is_swept_away(tmp_path: Path) -> None:
    pid, process = dead()
    left_by(tmp_path / "lease.json-0123abcd", process=process, pid=pid)
    left_by(tmp_path / "lease.json-elsewhere", process="another boot")
    (tmp_path / "lease.json-empty").touch()
    Lease(tmp_path / "lease.json", "--save x").close()
    assert [p.name for p in tmp_path.iterdir()] == ["lease.json-elsewhere"]


@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder", "a name that leads elsewhere"])
def test_what_lies_in_the_place_of_a_lease_is_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    {"a link": lambda: path.symlink_to("nowhere"), "a pipe": lambda: os.mkfifo(path), "a folder": path.mkdir,
     "a name that leads elsewhere": lambda: path.write_text(json.dumps({"run": "../../x", "host": "h", "pid": 1, "process": "x"}))}[what]()
    with pytest.raises(UserError, match="lease.json: is no lease .*; delete it if nobody writes there"):
        Lease(path, "--save x")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A folder from a stranger may hold links where a run writes."""
    victim, run, log = tmp_path / "victim", tmp_path / "run", tmp_path / "log"
    victim.write_text("precious")
    (run / "tokenizer").mkdir(parents=True)
    log.mkdir()
    words = f"{WORDS.replace('--vocab-size 31', '--tokenizer-type CharTokenizer --tokenizer-model ' + str(tmp_path / 'c.json'))} --train-iters 1 --save {run}"
    (tmp_path / "c.json").write_text('["a", "b"]')
    for link in (run / "tokenizer" / "characters.json.draft", run / "tokenizer" / "characters.json"):
        link.symlink_to(victim)
    train(words)
    assert victim.read_text() == "precious" and (run / "tokenizer" / "characters.json").read_text() == '["a", "b"]'
    (log / "metrics.jsonl").symlink_to(victim)
    metrics_log(log, 3).add({"step": 4})
    assert victim.read_text() == "precious"
    (run / "tokenizer").rename(tmp_path / "moved")
    (run / "tokenizer").symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="the tokenizer's files cannot be written there .tokenizer is a link to elsewhere"):
        train(words.replace("--train-iters 1", "--train-iters 2") + f" --load {run}")


def test_who_follows_waits_for_no_pipe_and_shows_no_terminal_what_it_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid, process = dead()
    left_by(tmp_path / "lease.json", process=process, pid=pid)
    path = tmp_path / "lease.json"
    path.write_text(path.read_text().replace("elsewhere", r"a\u001b[2Jb"))
    os.mkfifo(tmp_path / "lease.json-after-0123abcd")
    Lease(path, "--save x").close()
    assert capsys.readouterr().out == f"--save x: taken over from run 0123abcd on a\\x1b[2Jb, process {pid}, which has ended\n"
