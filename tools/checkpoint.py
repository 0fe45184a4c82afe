"""Looks into checkpoints, compares them and makes one file of many:
python tools/checkpoint.py inspect|verify|merge|diff --help"""

import json
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tqdm import tqdm

from megazero.base import Bar
from megazero.settings import commands, option, run
from megazero.state import OF_DTYPE, Reader, check, checkpoints, merge, report


@dataclass(frozen=True)
class Inspect:
    """Prints what a checkpoint holds; reads the headers of its files alone."""

    load: str = option(help="folder of checkpoints", unit="dir", word=True)
    ckpt_step: int | None = option(None, "step to look at; default: the newest", unit="step")


@dataclass(frozen=True)
class Verify:
    """Reads a whole checkpoint and checks every checksum, and that its boxes cover every tensor."""

    load: str = option(help="folder of checkpoints", unit="dir", word=True)
    ckpt_step: int | None = option(None, "step to read; default: the newest", unit="step")


@dataclass(frozen=True)
class Merge:
    """Writes a checkpoint as one file into a new folder, which loads like any other:
    its weights, or with --optimizer all of it."""

    load: str = option(help="folder of checkpoints", unit="dir", word=True)
    output: str = option(help="new folder to write", unit="dir")
    ckpt_step: int | None = option(None, "step to merge; default: the newest", unit="step")
    optimizer: bool = option(False, "the optimizer's state too, so that training can go on from it")


@dataclass(frozen=True)
class Diff:
    """Compares two checkpoints of any layouts: diff A B. Exits with 0 if they are equal, with 1 if not."""

    a: str = option(help="folder of checkpoints, or of one", unit="dir", word=True)
    b: str = option(help="the other", unit="dir", word=True)
    tolerance: float = option(0.0, "distance that counts as equal, as a part of the largest element of a tensor (of a "
                              "vector: or of its like in the same operation)", unit="fraction")


def inspect(s: Inspect) -> None:
    reader = Reader(s.load, s.ckpt_step)
    index = reader.index
    for key in ("step", "progress", "optimizer", "architecture", "layout", "tokenizer"):
        print(f"{key:<13}{json.dumps(index[key])}")
    print(f"{'files':<13}{len(index['files'])}, {size(sum(f['bytes'] for f in index['files'].values()))} "
          f"in {reader.folder}\n")
    names = list(dict.fromkeys(name for _, name in reader.tensors))
    width = max(len(name) for name in names)
    for name in names:
        held = {kind: parts for (kind, n), parts in reader.tensors.items() if n == name}
        kinds = [f"{kind} {OF_DTYPE[reader.dtype(kind, name)]}" + (f" in {len(parts)} boxes" if len(parts) > 1 else "")
                 for kind, parts in held.items()]
        print(f"{name:<{width}}  {list(reader.shapes[next(iter(held)), name])!s:<16} {', '.join(kinds)}")
    weights = sum(prod(shape) for (kind, _), shape in reader.shapes.items() if kind == "weight")
    boxes = sum(map(len, reader.tensors.values()))
    print(f"\n{len(names)} tensors, {weights:,} weights; kinds {', '.join(sorted(reader.kinds))}; {boxes} boxes")


def verify(s: Verify) -> None:
    start, reader = time.perf_counter(), Reader(s.load, s.ckpt_step)
    with tqdm(total=len(reader.tensors), unit="tensor", disable=None, leave=False) as bar:
        count = reader.verify(lambda name: bar.update())
    seconds = time.perf_counter() - start
    print(f"{reader.folder} is whole: {len(reader.tensors)} tensors, {size(count)}, {count / seconds / 1e9:.2f} GB/s")


def merge_(s: Merge) -> None:
    start, reader = time.perf_counter(), Reader(s.load, s.ckpt_step)
    count = merge(reader, Path(s.output), s.optimizer, told=Bar())
    seconds = time.perf_counter() - start
    what = "weights and optimizer" if s.optimizer else "weights"
    print(f"merged {reader.folder} ({len(reader.index['files'])} files) into {s.output}: {what}, {size(count)}, "
          f"{count / seconds / 1e9:.2f} GB/s")


def diff(s: Diff) -> None:
    check(s.tolerance)
    a, b = Reader(s.a, flag="--a"), Reader(s.b, flag="--b")
    report(checkpoints(a, b, s.tolerance),
           f"{a.folder} and {b.folder} hold the same: {min(len(a.tensors), len(b.tensors))} tensors")


def size(count: int) -> str:
    return f"{count:,} bytes"


if __name__ == "__main__":
    run(lambda: commands("checkpoint.py", __doc__ or "", {
        "inspect": (Inspect, inspect), "verify": (Verify, verify), "merge": (Merge, merge_), "diff": (Diff, diff)}))
