"""Where two runs differ: two logs line by line, or two checkpoints tensor by tensor, whatever layouts they are of."""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megazero.base import Form, UserError, checked, loads, printable, read_bytes
from megazero.state.checkpoint import MODEL, Reader
from megazero.state.merge import Key, in_order

Tensor = torch.Tensor
LONGEST = 2**31                         # bytes of a log
LINE: Form = {"step": range(2**53), "split?": re.compile(r"[\w -~]{1,200}")}
# of a log: no two runs agree on them
TIMES = {"seconds", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes", "disk_seconds", "disk_bytes"}
ROUNDINGS = 8               # of the largest element: what sums in another order may come to


@dataclass(frozen=True)
class Difference:
    """A place, what stands there on both sides, and how far apart that is: relative to the larger value or the size of
    the tensor; infinity where there is nothing to measure. `rounding`: sums in another order explain as much.
    `lacking`: one side has not come there."""

    where: str
    a: Any
    b: Any
    far: float = math.inf
    more: str = ""
    rounding: bool = False
    lacking: bool = False

    def __str__(self) -> str:
        far = f", {self.far:.3g} of the larger" if self.far < math.inf else ""
        rounding = ", which rounding explains" if self.rounding else ""
        return f"{self.where}: {shown(self.a)} against {shown(self.b)}{far}{self.more}{rounding}"


def shown(value: Any) -> str:
    """A value as text, every digit of a number."""
    if value is None:
        return "nothing"
    return printable(value) if isinstance(value, str) else repr(value)


def plain(where: str, a: Any, b: Any, tolerance: float) -> Iterator[Difference]:
    """What differs in two values of JSON."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from plain(f"{where} {printable(key)}".strip(), a.get(key), b.get(key), tolerance)
    elif isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
        far = 0.0 if a == b or (a != a and b != b) else abs(a - b) / max(abs(a), abs(b))
        if not far <= tolerance:
            yield Difference(where, a, b, far if far == far else math.inf)
    elif a != b:
        yield Difference(where, a, b)


def there(side: object) -> str:
    return "not there" if side is None else "there"


# ---- logs

def log_lines(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """(step, split or train) -> what a metrics.jsonl says of it, times and memory left out. A last line torn by a kill
    is forgotten. Raises UserError."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    try:
        lines = read_bytes(path, LONGEST).decode().removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the metrics.jsonl of a run.") from None
    for number, line in enumerate(lines, 1):
        try:
            record = checked(loads(line, infinite=True), LINE)
            if any(isinstance(value, int) and abs(value) >= 2**63 for value in record.values()):
                raise ValueError("no number of a log")
            found[record["step"], record.get("split", "train")] = {k: v for k, v in record.items() if k not in TIMES}
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged; "
                                "each should be one step or one evaluation.") from None
    if not found:
        raise UserError(f"{path}: holds no step; give the metrics.jsonl of a run.")
    return found


def logs(a: Path, b: Path, tolerance: float = 0.0) -> Iterator[Difference]:
    """Where two logs differ: in what both hold, then what one of them lacks (a run that went on has not the steps
    before)."""
    one, two = log_lines(a), log_lines(b)
    for step, split in sorted(one.keys() & two.keys()):
        yield from plain(f"step {step} {split}", one[step, split], two[step, split], tolerance)
    for step, split in sorted(one.keys() ^ two.keys()):
        key = (step, split)
        yield Difference(f"step {step} {split}", there(one.get(key)), there(two.get(key)), lacking=True)


# ---- checkpoints

def checkpoints(a: Reader, b: Reader, tolerance: float = 0.0) -> Iterator[Difference]:
    """Where two checkpoints differ: step and position, model, then tensor by tensor, with one tensor of each in memory.
    Where one of them holds weights alone, as a merged one does, the other's optimizer does not count."""
    weights_alone = a.kinds <= MODEL or b.kinds <= MODEL
    one, two = (r.index | {"architecture": None if r.of_module else asdict(r.architecture),
                           "progress": asdict(r.progress)} for r in (a, b))
    for key in ("step", "progress", "architecture", *(() if weights_alone else ("optimizer", "module"))):
        yield from plain(key, one.get(key), two.get(key), 0.0)
    for which in sorted((k for k in {*a.shapes, *b.shapes} if k[0] in MODEL or not weights_alone), key=in_order):
        where, left, right = "/".join(which), a.shapes.get(which), b.shapes.get(which)
        if left is None or right is None:
            yield Difference(where, there(left), there(right))
        elif left != right:
            yield Difference(where, f"shape {list(left)}", f"shape {list(right)}")
        else:
            mine, other = (t if t.is_floating_point() else t.double() for t in (a.read(*which), b.read(*which)))
            if not torch.equal(mine, other):
                yield from tensors(where, mine, other, tolerance, _beside(a, b, which), _is_rounding(a, b, which))


def _beside(a: Reader, b: Reader, which: Key) -> float:
    """The largest element of the vectors of the same operation and kind. One of them can be nothing but rounding
    (softmax does not feel a bias on k), and next to itself it would look all wrong."""
    kind, name = which
    of, sort = name.rsplit(".", 2)[0], name.rpartition(".")[2]
    like = [n for k, n in a.shapes if k == kind and n.rsplit(".", 2)[0] == of and n.rpartition(".")[2] == sort
            and len(a.shapes[k, n]) == len(a.shapes[which]) == 1]
    return max((_largest(r.read(kind, n)) for n in like for r in (a, b) if (kind, n) in r.shapes), default=0.0)


def _is_rounding(a: Reader, b: Reader, which: Key) -> bool:
    """Are a vector's gradients, by its moments, no more than rounding beside those of its like? An adaptive optimizer
    makes steps of them all the same."""
    if len(a.shapes[which]) != 1:
        return False
    moments = [(kind, which[1]) for kind in a.kinds & b.kinds - MODEL]
    return any(0 < _largest(r.read(*m)) <= ROUNDINGS * torch.finfo(r.dtype(*m)).eps * _beside(a, b, m)
               for m in moments if m in a.shapes and m in b.shapes for r in (a, b))


def _largest(t: Tensor) -> float:
    return float(t.abs().nan_to_num(0, 0, 0).max())


def tensors(where: str, a: Tensor, b: Tensor, tolerance: float, beside: float,
            noise: bool = False) -> Iterator[Difference]:
    """At most one difference: the first element that differs, how many do, and the largest distance, relative to the
    largest element of the tensor, or `beside` it. Of `noise` rounding explains more than of a sum: its square root."""
    apart = torch.sub(a, b.double()).abs_()
    apart[(a == b) | (a.isnan() & b.isnan())] = 0               # of two infinities too
    apart[apart.isnan()] = math.inf
    size = max(_largest(a), _largest(b), beside)
    wrong = apart > tolerance * size
    count, far = int(wrong.count_nonzero()), float(apart.max()) / size if size else math.inf
    eps = torch.finfo(a.dtype).eps
    if count:
        first = [int(i) for i in torch.unravel_index(wrong.flatten().byte().argmax(), wrong.shape)]
        yield Difference(f"{where} {first}", a[tuple(first)].item(), b[tuple(first)].item(), far,
                         f" at most, {count:,} of {a.numel():,} elements",
                         far <= (math.sqrt(eps) if noise else ROUNDINGS * eps))


# ---- either

def check(tolerance: float) -> None:
    """Raises UserError."""
    if not tolerance >= 0:
        raise UserError(f"--tolerance {tolerance:g}: must be 0 or greater.")


def runs(a: Path, b: Path, tolerance: float = 0.0) -> Iterator[Difference]:
    """Two logs (files, or folders that hold a metrics.jsonl) or two checkpoints. Raises UserError."""
    one, two = log_of(a), log_of(b)
    if (one is None) != (two is None):
        raise UserError(f"{a} and {b}: one is a log, the other is not; give two logs or two checkpoints.")
    if one is not None and two is not None:
        return logs(one, two, tolerance)
    return checkpoints(Reader(a, flag="--a"), Reader(b, flag="--b"), tolerance)


def log_of(path: Path) -> Path | None:
    """The log that a path means; None where it means checkpoints."""
    return next((file for file in (path / "metrics.jsonl", path) if os.path.isfile(file)), None)


def report(found: Iterable[Difference], equal: str) -> None:
    """Prints the differences and ends the process with 1, or that there are none."""
    lines = summary(found)
    print("\n".join(lines or [equal]))
    if lines:
        sys.exit(1)


def summary(found: Iterable[Difference], most: int = 5) -> list[str]:
    """Lines that name the first difference and the largest ones."""
    every = list(found)
    if not every:
        return []
    largest = sorted(every[1:], key=lambda d: (d.lacking, d.rounding, -d.far))[:most]
    return [f"first difference   {every[0]}",
            *(f"{'then, the largest' if i == 0 else '':<18} {d}" for i, d in enumerate(largest)),
            f"{len(every):,} difference{'s' if len(every) > 1 else ''}" + _explained(sum(d.rounding for d in every))]


def _explained(count: int) -> str:
    return f", {count:,} of which rounding explains" if count else ""
