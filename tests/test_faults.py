"""Faults while four ranks save, drawn by seed: what is told is clear, and a good checkpoint is always there to go on from.

The ranks run the real program. They are forked from a server that has imported torch, so a case costs about a second.
"""

import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import train

from megazero.base import disk
from megazero.base.errors import UserError
from megazero.run import train as program
from megazero.run.launch import launch
from megazero.settings import config
from megazero.state import saving
from megazero.state.checkpoint import Reader, complete

WORDS = ("--num-layers 2 --hidden-size 48 --num-attention-heads 4 --seq-length 16 --vocab-size 61 --lr 1e-2 --mock-data --train-iters 5 --eval-iters 0 "
         "--global-batch-size 4 --dtype fp64 --adam-eps 1e-5 --make-vocab-size-divisible-by 8")
LAYOUTS = ("--tp 4", "--tp 2 --zero-stage 1", "--pp 2 --zero-stage 3", "--zero-stage 2 --zero-shard-size 2")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["megazero.run.launch", "torch._dynamo", "pytest"])      # what torch.optim imports when first used, too


def end(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What happens on rank `rank` while step 4 is saved: `what` in `phase`. `part` says how far into the file, the index or the calls."""

    what: str                           # kill, full (the disk), readonly (the folder)
    phase: str                          # write, fsync, index, rename (of the index), commit (the folder takes its name); mkdir for readonly
    rank: int
    part: float
    background: bool
    layout: str

    def __str__(self) -> str:
        return f"{self.what} in {self.phase} on {self.rank} at {self.part:.2f}{' in background' if self.background else ''} {self.layout}"

    def strike(self, *_: Any, **__: Any) -> None:
        if self.what == "kill":
            end()
        raise OSError(*{"full": (28, "No space left on device"), "readonly": (30, "Read-only file system")}[self.what])

    def arm(self) -> None:
        """From now on it happens."""
        stream, index = saving.stream, saving.write_index

        def torn(path: Path, plan: Any, make: Callable[[str], torch.Tensor], metadata: Any) -> None:
            names = [p.name for p in plan]

            def made(name: str) -> torch.Tensor:
                return make(name) if name != names[int(self.part * len(names))] else self.strike()  # type: ignore[func-returns-value, return-value]
            stream(path, plan, made, metadata)

        def half(folder: Path, *more: Any) -> None:
            (folder / "index.json.draft").write_text('{"format": "megazero-checkpoint", "version"'[:int(self.part * 40)])
            self.strike()
            index(folder, *more)

        if self.phase == "write":
            saving.stream = torn
        elif self.phase == "index":
            saving.write_index = half
        else:
            owner, name = {"fsync": (disk.os, "fsync"), "rename": (Path, "replace"), "commit": (Path, "rename"), "mkdir": (Path, "mkdir")}[self.phase]  # type: ignore[attr-defined]
            setattr(owner, name, self.strike)


def drawn(seed: int) -> Fault:
    rng = random.Random(seed)
    what = ("kill", "kill", "full", "readonly")[seed % 4]
    phase = "mkdir" if what == "readonly" else rng.choice(("write", "fsync", "index", "rename", "commit"))
    rank = 0 if phase in ("index", "rename", "commit") else rng.randrange(4)
    fault = Fault(what, phase, rank, rng.random(), rng.random() < 0.4, rng.choice(LAYOUTS))
    repeats = phase == "write" and "shard" in fault.layout      # ranks 2 and 3 repeat what 0 and 1 write, so they write no tensor
    return replace(fault, rank=rank % 2) if repeats else fault


def play(rank: int, port: int, words: list[str], fault: Fault | None, said: str) -> None:
    """One rank of the program."""
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
    program.peak_flops = lambda *_: (1e12, "assumed in tests")  # type: ignore[assignment]
    if fault is not None and rank == fault.rank:
        write = saving.write

        def armed(folder: Path, slices: Any, header: Any, *more: Any) -> None:
            if header["step"] == 4:
                fault.arm()
            write(folder, slices, header, *more)
        saving.write = armed
    launch(lambda: config.from_command_line(words))


@dataclass
class Ended:
    """How the ranks ended, and all that they said, without the ranks' own lines of progress."""

    codes: list[int | None]
    told: str = ""
    errors: list[str] = field(default_factory=list)


def four_ranks(words: str, fault: Fault | None, folder: Path) -> Ended:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)       # the launcher's: outlives any rank
    logs = [folder / f"said-{rank}" for rank in range(4)]
    ranks = [SERVER.Process(target=play, args=(r, store.port, words.split(), fault, str(logs[r]))) for r in range(4)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(60)
    left = [p for p in ranks if p.is_alive()]
    for p in left:
        p.kill()
        p.join()
    told = "".join(log.read_text() for log in logs if log.exists())
    assert not left, f"ranks were still there after a minute:\n{told}"
    return Ended([p.exitcode for p in ranks], told, re.findall(r"^error: .*", told, re.MULTILINE))


@cache
def reference(folder: str) -> dict[tuple[str, str], torch.Tensor]:
    """What five steps on one rank make of the weights and moments."""
    train(f"{WORDS} --save {folder}")
    reader = Reader(folder)
    return {key: reader.read(*key) for key in reader.shapes}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    return reference(str(tmp_path_factory.mktemp("whole")))


def goes_on(words: str, folder: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    """One rank resumes what is there, and ends where a run ends that never met a fault."""
    train(f"{WORDS} --save {folder} --load {folder} {words}")
    reader = Reader(folder)
    assert reader.index["step"] == 5 and reader.verify() > 0
    for key, tensor in wanted.items():
        if not key[1].endswith("k.bias"):                       # rounding alone: softmax does not feel it
            assert (reader.read(*key) - tensor).abs().max() <= 1e-10 * tensor.abs().max(), key


def survives(fault: Fault, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    ck = tmp_path / "ck"
    ended = four_ranks(f"{WORDS} {fault.layout} --save {ck} --load {ck} --save-interval 2 --distributed-timeout-minutes 0.3"
                       + (" --async-save" if fault.background else ""), fault, tmp_path)
    assert all(code != 0 for code in ended.codes) and "Traceback" not in ended.told, ended.told
    assert len(ended.errors) == 1, ended.told
    if fault.what == "kill":
        assert ended.codes[fault.rank] == -signal.SIGKILL
        assert f"rank {fault.rank} is gone (" in ended.errors[0], ended.errors
        assert fault.background or "gave up in saving a checkpoint" in ended.errors[0], ended.errors
    else:
        reason = {"full": "No space left on device", "readonly": "Read-only file system"}[fault.what]
        assert ended.codes[fault.rank] == 2
        assert f"cannot be written ({reason}); the checkpoints before it are untouched." in ended.errors[0], ended.errors
    assert [step for step, _ in complete(ck)] == [2] and Reader(ck).verify() > 0
    if fault.what != "kill":
        assert not [*ck.glob(f"*step-00000004/rank-0000{fault.rank}.safetensors")], "a full disk has better use for it"
    goes_on("", ck, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_a_fault_while_saving_leaves_the_checkpoint_before(seed: int, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    survives(drawn(seed), tmp_path, wanted)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8, 44))
def test_more_faults_while_saving(seed: int, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    survives(drawn(seed), tmp_path, wanted)


# ---- what happens to files afterwards

@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints by four ranks, of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("good")
    ended = four_ranks(f"{WORDS.replace('--train-iters 5', '--train-iters 4')} --tp 2 --zero-stage 1 --save {folder / 'ck'} --save-interval 2".replace(
        "--lr 1e-2", "--lr 1e-2 --lr-decay-iters 5"), None, folder)
    assert ended.codes == [0] * 4, ended.told
    return folder / "ck"


def damage(seed: int, folder: Path) -> tuple[Path, str]:
    """Spoils one file of a checkpoint; returns it and what must be said of it."""
    rng = random.Random(seed)
    path = rng.choice([*folder.glob("rank-*"), folder / "index.json"])
    data, what = path.read_bytes(), ("torn", "flipped", "missing", "swapped")[seed % 4]
    if path.name == "index.json" and what in ("missing", "swapped"):
        path = folder / "rank-00002.safetensors"
    if what == "torn":
        path.write_bytes(data[:rng.randrange(len(data))])
    elif what == "flipped":
        at = rng.randrange(len(data))
        while path.suffix == ".json" and chr(data[at]) in " \n":
            at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:])
    elif what == "missing":
        path.unlink()
    else:
        shutil.copy(folder.parent / "step-00000002" / path.name, path)
    return path, {"torn": "bytes instead of|cannot be read", "flipped": "damaged|cannot be read|is not a megazero", "missing": "is missing",
                  "swapped": "damaged|instead of"}[what]


def is_found(seed: int, good: Path, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    ck = tmp_path / "ck"
    shutil.copytree(good, ck)
    path, words = damage(seed, ck / "step-00000004")
    with pytest.raises(UserError) as error:                     # by one rank, in another layout
        train(f"{WORDS} --load {ck}")
    (sentence,) = error.value.sentences
    assert sentence.startswith(str(path)) and re.search(words, sentence) and sentence.endswith("load another with --ckpt-step 2."), sentence
    (ck / "step-00000004").rename(tmp_path / "aside")
    goes_on("", ck, wanted)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_named_and_the_checkpoint_before_loads(seed: int, good: Path, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    is_found(seed, good, tmp_path, wanted)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4, 24))
def test_more_damage_is_named(seed: int, good: Path, tmp_path: Path, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    is_found(seed, good, tmp_path, wanted)
