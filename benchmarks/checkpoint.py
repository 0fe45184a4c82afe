"""Saving, verifying, merging and exporting a checkpoint of several GB, against cp of the same bytes.

    python benchmarks/checkpoint.py [--model gpt2-medium] [--layout "--tp 2 --pp 2"] [--rounds 3] [--folder DIR]

Makes the checkpoint first: the ranks of the layout initialise the model and save it, weights and optimizer, without a
step. Then cp and each tool in turns, every output new, and on the disk when the clock stops (`sync` after cp; the tools
do it themselves). What is read lies in the page cache for all of them. GB are 10^9 bytes of what is written; of verify,
of what is read. Start-up is not counted; peak memory is the resident set of the tool's process, beside what Python and
its imports take of it.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megazero.settings import option, parse, run

TOOL = """
import runpy, sys, time
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
import megazero.state, megazero.hf
before, sys.argv, start = peak(), sys.argv[1:], time.perf_counter()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(time.perf_counter() - start, before, peak())
"""


@dataclass(frozen=True)
class Settings:
    """Times what is done to a large checkpoint against cp."""

    model: str = option("gpt2-medium", "preset of the model")
    layout: str = option("--tp 2 --pp 2", "flags of the layout that saves it")
    ranks: int = option(4, "ranks of that layout")
    rounds: int = option(3, "runs of each")
    folder: str | None = option(None, "where to work; default: a new folder for temporary files", unit="dir")


def main() -> None:
    s = parse(Settings)
    with tempfile.TemporaryDirectory(dir=s.folder) as name:
        folder = Path(name)
        saved(s, folder / "ck")
        size = bytes_of(folder / "ck")
        print(f"{s.model}, {s.layout}: {size / 1e9:.2f} GB in {len(list(folder.glob('ck/*/rank-*')))} files")
        best: dict[str, tuple[float, int, str]] = {}
        for _ in range(s.rounds):
            for what, found in (("cp -r, sync", copied(folder)), *tools(folder)):
                best[what] = min(found, best.get(what, found))
        for what, (seconds, done, memory) in best.items():
            print(f"{what:<28}{seconds:7.2f} s {done / 1e9:6.2f} GB {done / 1e9 / seconds:6.2f} GB/s  {memory}")


def saved(s: Settings, ck: Path) -> None:
    flags = (f"--model {s.model} {s.layout} --vocab-size 50257 --mock-data --lr 1e-4 --train-iters 0 --eval-iters 0 "
             f"--device cpu --save {ck}")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(s.ranks),
                    "pretrain_gpt.py", *flags.split()], check=True, stdout=subprocess.DEVNULL)


def tools(folder: Path) -> list[tuple[str, tuple[float, int, str]]]:
    ck, out = folder / "ck", folder / "out"
    return [("verify", timed(bytes_of(ck), "tools/checkpoint.py", "verify", "--load", ck)),
            ("merge --optimizer",
             timed(out, "tools/checkpoint.py", "merge", "--optimizer", "--load", ck, "--output", out)),
            ("merge (weights)", timed(out, "tools/checkpoint.py", "merge", "--load", ck, "--output", out)),
            ("convert_hf.py export", timed(out, "tools/convert_hf.py", "export", "--load", ck, "--output", out))]


def copied(folder: Path) -> tuple[float, int, str]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "ck", folder / "out"], check=True)
    subprocess.run(["sync", "-f", folder / "out"], check=True)
    seconds = time.perf_counter() - start
    return seconds, removed(folder / "out"), ""


def timed(what: Path | int, *words: object) -> tuple[float, int, str]:
    """Seconds, bytes done, and memory of one run of a tool; its output is measured and goes."""
    told = subprocess.run([sys.executable, "-c", TOOL, *map(str, words)],
                          check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, before, peak = map(float, told.splitlines()[-1].split())
    done = what if isinstance(what, int) else removed(what)
    return seconds, done, f"peak {peak / 2**20:.0f} MiB, {before / 2**20:.0f} of it loaded"


def removed(folder: Path) -> int:
    size = bytes_of(folder)
    shutil.rmtree(folder)
    return size


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


if __name__ == "__main__":
    run(main)
