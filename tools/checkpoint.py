"""Looks into checkpoints, merges and compares them: python tools/checkpoint.py inspect|verify|merge|diff --help"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from megazero.checkpoint import Reader, Slice
from megazero.command_line import commands, option, run
from megazero.errors import UserError
from megazero.files import CODES
from megazero.saving import planned, write_alone


@dataclass(frozen=True)
class Inspect:
    """Prints what a checkpoint holds; reads the headers of its files alone."""

    load: str = option(help="folder of checkpoints", unit="dir")
    ckpt_step: int | None = option(None, "step to look at; default: the newest", unit="step")


@dataclass(frozen=True)
class Verify:
    """Reads a whole checkpoint and checks every checksum, and that its boxes cover every tensor."""

    load: str = option(help="folder of checkpoints", unit="dir")
    ckpt_step: int | None = option(None, "step to read; default: the newest", unit="step")


@dataclass(frozen=True)
class Merge:
    """Writes a checkpoint of any layout as one file, tensor after tensor: its weights, or all of it."""

    load: str = option(help="folder of checkpoints", unit="dir")
    output: str = option(help="folder of checkpoints to write to; becomes another --load", unit="dir")
    ckpt_step: int | None = option(None, "step to merge; default: the newest", unit="step")
    optimizer: bool = option(False, "the optimizer's state too, so that training can go on from it")


@dataclass(frozen=True)
class Diff:
    """Compares two checkpoints, whatever their layouts, tensor after tensor. Exit code 1 if they differ."""

    a: str = option(help="folder of checkpoints", unit="dir")
    b: str = option(help="folder of checkpoints", unit="dir")
    a_step: int | None = option(None, "step of the first; default: the newest", unit="step")
    b_step: int | None = option(None, "step of the second; default: the newest", unit="step")
    most: int = option(10, "differences to print", unit="tensors")


def inspect(s: Inspect) -> None:
    reader = Reader(s.load, s.ckpt_step)
    index = reader.index
    for key in ("step", "progress", "optimizer", "architecture", "layout", "tokenizer"):
        print(f"{key:<13}{json.dumps(index[key])}")
    print(f"{'files':<13}{len(index['files'])}, {size(sum(f['bytes'] for f in index['files'].values()))} in {reader.folder}\n")
    names = list(dict.fromkeys(name for _, name in reader.tensors))
    width = max(len(name) for name in names)
    for name in names:
        held = {kind: parts for (kind, n), parts in reader.tensors.items() if n == name}
        kinds = [f"{kind} {CODES[reader.dtype(kind, name)]}" + (f" in {len(parts)} boxes" if len(parts) > 1 else "")
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


def merge(s: Merge) -> None:
    start, reader, output = time.perf_counter(), Reader(s.load, s.ckpt_step), Path(s.output)
    if output.resolve() in (reader.folder.resolve(), reader.folder.parent.resolve()):
        raise UserError(f"--output {output}: is where the checkpoint itself lies; name another folder.")
    keys = [key for key in reader.tensors if s.optimizer or key[0] == "weight"]
    slices = [planned(*key, reader.shapes[key], reader.dtype(*key)) for key in keys]
    header = {k: v for k, v in reader.index.items() if k not in ("format", "version", "files", "crc32")}
    header |= {"layout": {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 0}} | ({} if s.optimizer else {"optimizer": None})
    with tqdm(total=len(keys), unit="tensor", disable=None, leave=False) as bar:

        def load(slice_: Slice) -> torch.Tensor:
            bar.update()
            return reader.read(slice_.kind, slice_.name)

        try:
            target = write_alone(output, slices, header, load)
            if (reader.folder.parent / "tokenizer").is_dir():
                shutil.copytree(reader.folder.parent / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); there is no new checkpoint.") from None
    count = sum(slice_.tensor.nbytes for slice_ in slices)
    print(f"{target}: {len(keys)} tensors, {size(count)}, {count / (time.perf_counter() - start) / 1e9:.2f} GB/s")


def diff(s: Diff) -> None:
    one, two = Reader(s.a, s.a_step, "--a"), Reader(s.b, s.b_step, "--b")
    found = [f"{kind}/{name}: only in {reader.folder}" for reader, other in ((one, two), (two, one))
             for kind, name in reader.tensors if (kind, name) not in other.tensors]
    common = [key for key in one.tensors if key in two.tensors]
    for kind, name in tqdm(common, unit="tensor", disable=None, leave=False):
        a, b = one.shapes[kind, name], two.shapes[kind, name]
        said = f"shape {list(a)} and {list(b)}" if a != b else differ(one.read(kind, name), two.read(kind, name))
        found += [f"{kind}/{name}: {said}"] if said else []
    for line in found[:s.most]:
        print(line)
    print(f"{len(found)} differences, {len(common)} tensors in both" if found else f"equal to the bit: {len(common)} tensors")
    sys.exit(1 if found else 0)


def differ(a: torch.Tensor, b: torch.Tensor) -> str:
    """How two tensors of one shape differ, or nothing."""
    if a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return ""
    x, y = a.double().flatten(), b.double().flatten()
    far = (x - y).abs().nan_to_num(nan=torch.inf)
    worst = int(far.argmax())
    return (f"{int((far > 0).sum()):,} of {len(x):,} elements, most at {worst}: {x[worst]:.9g} and {y[worst]:.9g}"
            if far[worst] > 0 else f"equal values, stored as {a.dtype} and {b.dtype}")


def size(count: int) -> str:
    return f"{count:,} bytes"


if __name__ == "__main__":
    run(lambda: commands("checkpoint.py", __doc__ or "", {
        "inspect": (Inspect, inspect), "verify": (Verify, verify), "merge": (Merge, merge), "diff": (Diff, diff)}))
