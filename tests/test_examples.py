"""What stands in examples/ and docs/: every configuration is accepted at its world size, the scripts run, the generated page is up to date."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, lines, program, train
from tokenizers import Tokenizer, models

from megazero.data.indexed import IndexedWriter
from megazero.state.checkpoint import complete

EXAMPLES = {"quickstart": 1, "laptop": 1, "gpt2-124m": 1, "llama-7b": 8, "gpt3-175b": 1024}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the tokenizer that the examples name."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "run" / "tokenizer").mkdir(parents=True)
    Tokenizer(models.BPE({chr(256 + i): i for i in range(258)}, [])).save(str(folder / "run" / "tokenizer" / "tokenizer.json"))
    with IndexedWriter(str(folder / "run" / "data_text_document"), np.uint16) as writer:
        for text in np.random.default_rng(0).integers(0, 258, (1000, 5000), np.uint16):
            writer.add_document([text])
    return folder


def test_every_configuration_is_known_here() -> None:
    assert {p.stem for p in (ROOT / "examples").glob("*.toml")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_check_accepts_it_at_its_world_size(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    own: tuple[str, ...] = ("--data-path", "run/data_text_document", "--tokenizer-model", "run/tokenizer", *(("--save", "run") if name == "quickstart" else ()))
    code, told, wrong = program(monkeypatch, capsys, "pretrain_gpt.py", "--config", ROOT / "examples" / f"{name}.toml", "--check", *own)
    assert code == 0 and not wrong, wrong
    assert re.search(r"^ranks +(\d+) = ", told, re.M)[1] == str(EXAMPLES[name])  # type: ignore[index]
    assert sorted(place.rglob("*")) == before


SRUN = """#!/usr/bin/env bash
# As Slurm's: the words after the flags, once on each of two nodes.
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & ids+=($!); done
for id in "${ids[@]}"; do wait "$id" || exit 1; done
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_slurm_script_runs_two_nodes_as_one_run(place: Path, tmp_path: Path) -> None:
    """Two nodes of one process each, through both scripts; the losses are those of one process."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho 127.0.0.1; echo 127.0.0.2\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    small = (f"--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --vocab-size 300 --data-path {place}/run/data_text_document "
             "--split 1 --lr 1e-3 --train-iters 3 --eval-iters 0 --global-batch-size 4 --dtype fp64 --device cpu --log-interval 1")
    env = {**os.environ, "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "RANKS_PER_NODE": "1",
           "SLURM_JOB_NODELIST": "a,b", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "examples/slurm.sh", *small.split(), "--zero-stage", "1", "--log-dir", str(tmp_path / "two")], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ranks       2 = tp 1 x pp 1 x dp 2" in done.stdout, done.stdout + done.stderr
    one = [r["loss"] for r in train(small, tmp_path / "one")]
    assert [r["loss"] for r in lines(tmp_path / "two")] == pytest.approx(one, rel=1e-12) and len(one) == 3


def test_slurm_script_saves_and_is_queued_again_when_time_is_nearly_over(tmp_path: Path) -> None:
    stubs, queued = tmp_path / "bin", tmp_path / "queued"
    stubs.mkdir()
    for name, text in (("srun", SRUN.replace("0 1", "0")), ("scontrol", f'#!/usr/bin/env bash\n[ "$1" = requeue ] && echo "$@" > {queued}\necho 127.0.0.1\n')):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    words = ("--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 30 --mock-data --lr 1e-3 --train-iters 1000000 --eval-iters 0 "
             f"--global-batch-size 1 --device cpu --log-interval 1 --save {tmp_path / 'run'}")
    env = {**os.environ, "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "RANKS_PER_NODE": "1",
           "SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "17", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, "-u", "-c", "import time; print('here'); time.sleep(300)", "pretrain_gpt.py"], stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"here\n"              # a rank of another job
    job = subprocess.Popen(["bash", "examples/slurm.sh", *words.split()], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert job.stdout
    for line in job.stdout:
        if line.startswith("step 3/"):
            break
    job.send_signal(signal.SIGUSR1)
    told = job.stdout.read()
    assert job.wait(60) == 0 and "signal SIGUSR1, after" in told, told
    assert queued.read_text() == "requeue 17\n" and len(complete(tmp_path / "run")) == 1
    assert other.poll() is None
    other.kill()
    other.wait()


def test_scripts_say_what_they_need() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("NODES", "NODE_RANK", "MASTER_ADDR")}
    done = subprocess.run(["bash", "examples/multi_node.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "NODES: how many nodes there are" in done.stderr


def test_the_page_of_flags_is_that_of_the_code() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "flags.py"))["page"]()
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page, "python tools/flags.py > docs/flags.md"
