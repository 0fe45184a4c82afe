"""What a machine could not do is a sentence with rank, place, what was asked for, what was planned and what helps; never a traceback."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import train

from megazero.run.executor import Executor
from megazero.run.failures import Failure

WORDS = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 31 --lr 1e-3 --mock-data --eval-iters 0 --global-batch-size 1 --train-iters 2"


def too_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 3, hard))
    files = []
    try:
        for _ in range(10):
            files.append(open(os.devnull))  # noqa: SIM115
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def too_large_a_file() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with open("large", "wb", buffering=0) as file:
            while True:
                file.write(bytes(600))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.10 GiB is free.")


def storage() -> None:
    raise OSError(5, "Input/output error", "data.bin")


PLANNED = r"the plan said [\d.]+ MiB for this rank\. Lower --micro-batch-size or --seq-length, write --recompute-granularity full, or share with --tp"
FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "torch": (lambda: torch.empty(1 << 50), rf"out of memory, 4194304\.00 GiB more were asked for; {PLANNED}"),
    "numpy": (lambda: np.empty((1 << 43,)), rf"out of memory, 64\.0 TiB more were asked for; {PLANNED}"),
    "python": (lambda: bytearray(1 << 60), rf"out of memory, of the host; {PLANNED}"),
    "cuda": (cuda, rf"out of memory, 2\.00 GiB more were asked for on the device; {PLANNED}"),
    "files": (too_many_files, r"too many open files; this process may have \d+ \(ulimit -n; up to \d+ without asking"),
    "file size": (too_large_a_file, r"grew beyond the largest file that is allowed here \(ulimit -f\)"),
    "storage": (storage, r"data\.bin: Input/output error"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_the_machine_could_not_do_is_a_sentence(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strike, said = FAILURES[what]
    monkeypatch.setattr(Executor, "_loss", lambda *_: strike())
    with pytest.raises(Failure, match=rf"^rank 0 in L2,0: .*{said}"):
        train(WORDS)


def test_another_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "_loss", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train(WORDS)


def test_tools_say_what_the_disk_could_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megazero.settings import command_line

    def fails() -> None:
        raise OSError(28, "No space left on device", "out.bin")

    for main, said in ((fails, "error: out.bin: No space left on device\n"), (lambda: bytearray(1 << 60), "error: out of memory\n")):
        with pytest.raises(SystemExit) as ended:
            command_line.run(main)  # type: ignore[arg-type]
        assert ended.value.code == 1 and capsys.readouterr().err == said
