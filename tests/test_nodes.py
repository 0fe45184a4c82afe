"""Two nodes on this machine: each with its own network, process numbers and host name, joined by one link. What one node would find in /proc, another must
not, and everything goes over the wire."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, lines, train

WORDS = ("--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 61 --lr 1e-2 --mock-data --eval-iters 0 --device cpu "
         "--global-batch-size 8 --dtype fp64 --adam-eps 1e-5 --make-vocab-size-divisible-by 4 --log-interval 1")
NAMES = tuple(f"mz{os.getpid()}{side}" for side in "ab")
SETUP = """set -e
for n in {0} {1}; do ip netns add $n; ip netns exec $n ip link set lo up; done
ip link add {0}v type veth peer name {1}v
ip link set {0}v netns {0}; ip link set {1}v netns {1}
ip netns exec {0} ip addr add 10.77.0.1/24 dev {0}v; ip netns exec {0} ip link set {0}v up
ip netns exec {1} ip addr add 10.77.0.2/24 dev {1}v; ip netns exec {1} ip link set {1}v up
ip netns exec {0} unshare --pid --uts --fork --mount-proc true
""".format(*NAMES)
NODE = "hostname $0; first=$1; shift; for local in 0 1; do RANK=$((first + local)) LOCAL_RANK=$local \"$@\" & done; wait"


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    if not all(map(shutil.which, ("ip", "unshare"))) or subprocess.run(["sh", "-c", SETUP], capture_output=True).returncode:
        subprocess.run(["sh", "-c", f"ip netns del {NAMES[0]}; ip netns del {NAMES[1]}"], capture_output=True)
        pytest.skip("needs namespaces of network and processes: ip, unshare, and the right to use them")
    yield
    subprocess.run(["sh", "-c", f"ip netns del {NAMES[0]}; ip netns del {NAMES[1]}"], check=True)


def started(words: str) -> list["subprocess.Popen[str]"]:
    """Two nodes of two ranks."""
    ranks = [sys.executable, str(ROOT / "pretrain_gpt.py"), *words.split()]
    found = []
    for node, name in enumerate(NAMES):
        env = os.environ | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
                            "GLOO_SOCKET_IFNAME": f"{name}v", "PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", name, "unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-c", NODE, name, str(2 * node)]
        found.append(subprocess.Popen([*command, *ranks], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return found


LAYOUTS = ["--tp 2 --zero-stage 3", pytest.param("--tp 4 --zero-stage 1", marks=pytest.mark.full), pytest.param("--pp 4", marks=pytest.mark.full),
           pytest.param("--pp 2 --zero-stage 3", marks=pytest.mark.full), pytest.param("--zero-stage 3", marks=pytest.mark.full),
           pytest.param("--tp 2 --pp 2 --pipeline-schedule zb-h1", marks=pytest.mark.full)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_nodes_train_what_one_rank_trains(layout: str, nodes: None, tmp_path: Path) -> None:
    runs = started(f"{WORDS} --train-iters 4 {layout} --log-dir {tmp_path / 'nodes'} --distributed-timeout-minutes 0.5")
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert "done at step 4" in told[0], "\n".join(told)
    one = train(f"{WORDS} --train-iters 4", tmp_path / "one")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in lines(tmp_path / "nodes")] == pytest.approx([r[key] for r in one], rel=1e-12)


def test_a_link_that_is_cut_is_told_on_both_sides(nodes: None) -> None:
    runs = started(f"{WORDS} --train-iters 100000 --tp 2 --zero-stage 2 --distributed-timeout-minutes 0.1")
    assert runs[0].stdout
    for line in runs[0].stdout:
        if line.startswith("step 3/"):
            break
    link = ["ip", "netns", "exec", NAMES[0], "ip", "link", "set", f"{NAMES[0]}v"]
    subprocess.run([*link, "down"], check=True)
    began = time.monotonic()
    told = [run.communicate(timeout=60)[0] for run in runs]
    subprocess.run([*link, "up"], check=True)
    assert time.monotonic() - began < 40
    for node, (text, theirs) in enumerate(zip(told, ("[23]", "[01]"), strict=True)):
        assert text.count("Traceback") == 0, text
        assert re.search(rf"^error: rank {'[01]' if node == 0 else '[23]'} gave up in .*: rank {theirs} did not answer within 6 s", text, re.M), text
