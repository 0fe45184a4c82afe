"""Preprocessing that is killed: at every commit point, at random moments, with workers; the same command ends with the same bytes."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megazero.base.errors import UserError
from megazero.corpus import sources
from megazero.corpus.preprocess import PreprocessSettings, preprocess

REPOSITORY = Path(__file__).parents[1]
module = sys.modules["megazero.corpus.preprocess"]      # the folder shows the function of that name


def settings(folder: Path, **more: object) -> PreprocessSettings:
    plain = PreprocessSettings(input=(str(folder / "in"),), output_prefix=str(folder / "out" / "d"), tokenizer_type="ByteTokenizer",
                               json_keys=("text", "note"), append_eod=True)
    return replace(plain, **more)


def source(folder: Path, lines: int) -> None:
    """Two plain files and a compressed one, with bad and empty documents."""
    (folder / "in").mkdir()
    rows = [json.dumps({"text": "é" * (i % 97) + str(i), "note": "" if i % 3 else "n" * (i % 5)}) for i in range(lines)]
    rows[lines // 2] = '{"text": broken'
    third = lines // 3
    (folder / "in" / "a.jsonl").write_text("\n".join(rows[:third]) + "\n")
    (folder / "in" / "b.jsonl.gz").write_bytes(gzip.compress(("\n".join(rows[third:2 * third]) + "\n").encode()))
    (folder / "in" / "c.jsonl").write_text("\n".join(rows[2 * third:]))


def result(folder: Path) -> dict[str, bytes]:
    """The files that were written, but for the sidecar's list of sources."""
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def forked(do: Callable[[], object]) -> int:
    """Exit status of a child that does it: 0, or -9 when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, do: Callable[[], object]) -> Callable[[], None]:
    """Does it, but dies at the number-th call that makes something lasting."""
    def run() -> None:
        count = 0

        def dying(plain: Callable) -> Callable:
            def call(*a: object, **k: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*a, **k)
            return call

        os.replace, os.fsync, Path.unlink = dying(os.replace), dying(os.fsync), dying(Path.unlink)     # type: ignore[method-assign]
        do()
    return run


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note after every batch, and batches of a few lines."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "CHUNK", 4000)
    monkeypatch.setattr(sources, "CHUNK", 4000)


def test_killed_at_every_commit_point(tmp_path: Path, small_steps: None) -> None:
    source(tmp_path, 60)
    preprocess(settings(tmp_path))
    whole, number, seen = result(tmp_path), 0, 0
    assert set(whole) == {f"d_{key}_document.{end}" for key in ("text", "note") for end in ("bin", "idx", "json")}
    while True:
        number += 1
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        status = forked(killed_at(number, lambda: preprocess(settings(tmp_path))))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        seen += (tmp_path / "out" / "d.progress.json").exists()
        preprocess(settings(tmp_path))
        assert result(tmp_path) == whole, f"after a kill at call {number}"
    assert number > 40 and seen > number / 2


def test_killed_at_random_moments(tmp_path: Path, small_steps: None) -> None:
    source(tmp_path, 6000)
    preprocess(settings(tmp_path))
    whole, rng, kills = result(tmp_path), random.Random(0), 0
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    while True:
        child = os.fork()
        if child == 0:
            preprocess(settings(tmp_path))
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        if kills == 20:
            assert forked(lambda: preprocess(settings(tmp_path))) == 0
            break
    assert kills >= 3 and result(tmp_path) == whole


SCRIPT = """
import sys, time
import megazero.corpus.preprocess
p = sys.modules["megazero.corpus.preprocess"]
from megazero.corpus import sources
p.SAVE_SECONDS = 0.0
p.CHUNK = sources.CHUNK = 4000
write = p.IndexedWriter.add
p.IndexedWriter.add = lambda *a: (time.sleep(0.003), write(*a))
if __name__ == "__main__":
    p.preprocess(p.PreprocessSettings(input=(sys.argv[1],), output_prefix=sys.argv[2], tokenizer_type="ByteTokenizer",
                                      json_keys=("text", "note"), append_eod=True, workers=2))
"""


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_with_workers(tmp_path: Path, kills: int) -> None:
    """Real processes at random moments; a killed run's workers end with it."""
    source(tmp_path, 3000 * min(kills, 8))
    preprocess(settings(tmp_path))
    whole, rng, deadline = result(tmp_path), random.Random(1), time.monotonic() + 60 * kills
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "run.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "in"), str(tmp_path / "out" / "d")]
    environment, note, children = {**os.environ, "PYTHONPATH": str(REPOSITORY)}, tmp_path / "out" / "d.progress.json", []
    for _ in range(kills):
        process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        before = note.read_bytes() if note.exists() else b""
        while (not note.exists() or note.read_bytes() == before) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2) if kills > 1 else 0)
        children += Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(children) >= 2 * kills
    again = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on after" in again.stderr and result(tmp_path) == whole
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_only_the_same_command_goes_on(tmp_path: Path, small_steps: None) -> None:
    source(tmp_path, 300)
    assert forked(killed_at(25, lambda: preprocess(settings(tmp_path)))) == -signal.SIGKILL
    note = tmp_path / "out" / "d.progress.json"
    for other in ({"append_eod": False}, {"json_keys": ("text",)}, {"input": (str(tmp_path / "in" / "a.jsonl"),)}):
        with pytest.raises(UserError, match="d.progress.json: is of an unfinished run with other inputs, tokenizer or flags; give those"):
            preprocess(settings(tmp_path, **other))
    kept = note.read_text()
    note.write_text(kept[:40])
    with pytest.raises(UserError, match="d.progress.json: is damaged .*; remove it to begin again"):
        preprocess(settings(tmp_path))
    told = json.loads(kept)
    note.write_text(kept.replace('"finished": false', '"finished": true'))
    with pytest.raises(UserError, match=r"d.progress.json: is damaged \(its checksum is of other words\)"):
        preprocess(settings(tmp_path))
    del told["sum"]
    for change, said in {"place=[0, 0]": "place is not a file, a byte and a line", "place=[9, 0, 1]": r"its place is \(9, 0, 1\) of [0-9]+ files", "place=[0, -1, 1]": "from 0",
                         "seconds=-1": "after -1 s", "bytes='x'": "bytes is 'x', not a whole number", "written={}": r"it tells of \[\], not of \['text', 'note'\]",
                         "written={k: [1, 2, 3, [1, 2]] for k in ('text', 'note')}": "2 checksums for 3 tokens of text",
                         "written={'text': [1]}": "written.'text' is not three counts", "finished=0": "finished is 0, not true or false"}.items():
        key, _, value = change.partition("=")
        note.write_text(json.dumps({**told, key: eval(value)}))
        with pytest.raises(UserError, match=f"d.progress.json: is damaged .*{said}.*; remove it to begin again"):
            preprocess(settings(tmp_path))
    forged = {k: [d, s - 1, *rest] for k, (d, s, *rest) in told["written"].items()}
    note.write_text(json.dumps({**told, "written": forged}))
    with pytest.raises(UserError, match=r"d_text_document.documents.partial: ends at sequence [0-9]+, the unfinished run wrote [0-9]+; begin again"):
        preprocess(settings(tmp_path))
    note.write_text(kept)
    (tmp_path / "out" / "d_text_document.bin.partial").write_bytes(b"")
    with pytest.raises(UserError, match="d_text_document.bin.partial: has 0 bytes, the unfinished run wrote [0-9]+; begin again"):
        preprocess(settings(tmp_path))


def test_a_note_is_held_against_the_sources(tmp_path: Path, small_steps: None) -> None:
    """Who can write its checksum, too, cannot make it lose documents by a place where no run can be."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}", "note": "x"}) + "\n" for i in range(400)))
    assert forked(killed_at(25, lambda: preprocess(settings(tmp_path)))) == -signal.SIGKILL
    note, size = tmp_path / "out" / "d.progress.json", (tmp_path / "in" / "a.jsonl").stat().st_size
    told = json.loads(note.read_text())
    del told["sum"]
    at, nothing = told["place"][1], {key: [0, 0, 0, [], [0, 0]] for key in ("text", "note")}
    assert 0 < at < size
    for change, said in (
        ({"place": [0, size + 1, 9], "bytes": size + 1}, f"a.jsonl ends before byte {size + 1:,}"),
        ({"place": [0, at + 5, 9], "bytes": at + 5}, f"no document begins at byte {at + 5:,} of .*a.jsonl"),
        ({"place": [0, at, at + 2]}, "its place is"), ({"place": [1, 7, 1]}, "its place is"),
        ({"finished": True, "place": [0, 0, 1], "bytes": 0, "written": nothing}, "its place is"),
        ({"finished": True, "place": [1, 0, 1], "bytes": 0, "written": nothing}, f"it tells of 0 bytes of text, before its place are {size:,}"),
        ({"finished": True, "place": [1, 0, 1], "bytes": size, "written": nothing}, "text_document.bin.partial has [0-9,]+ bytes, it tells of 0"),
        ({"bytes": at + 1}, f"it tells of {at + 1:,} bytes of text, before its place are {at:,}"),
        ({"written": {key: [9, 9, 8, [1]] for key in nothing}}, "8 tokens in 9 sequences of 9 documents of text are not made of"),
        ({"written": {key: [at + 1, 9, 9, [1]] for key in nothing}}, "documents of text are not made of"),
    ):
        words = {**told, **change}
        note.write_text(json.dumps({**words, "sum": module._sum(words)}))
        with pytest.raises(UserError, match=rf"d.progress.json: is damaged \(.*{said}.*; remove it to begin again"):
            preprocess(settings(tmp_path))
    note.write_text(json.dumps(told))
    preprocess(settings(tmp_path))
    resumed = result(tmp_path)
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    preprocess(settings(tmp_path))
    assert result(tmp_path) == resumed


@pytest.mark.parametrize("name", ["lengths", "documents", "bin"])
def test_damage_of_what_an_unfinished_run_left_is_told(tmp_path: Path, small_steps: None, name: str) -> None:
    """Lengths that are swapped have the same sum."""
    source(tmp_path, 300)
    assert forked(killed_at(25, lambda: preprocess(settings(tmp_path)))) == -signal.SIGKILL
    path = tmp_path / "out" / f"d_text_document.{name}.partial"
    good = path.read_bytes()
    path.write_bytes(good[:8] + good[12:16] + good[8:12] + good[16:] if name != "bin" else good[:-4000] + b"x" * 4000)
    assert path.read_bytes() != good
    with pytest.raises(UserError, match=f"d_text_document.{name}.partial: is damaged, its checksum is not that of what the unfinished run wrote"):
        preprocess(settings(tmp_path))
    path.write_bytes(good)
    preprocess(settings(tmp_path))
