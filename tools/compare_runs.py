"""Where two runs differ, in their logs or in their checkpoints: python tools/compare_runs.py A B [--tolerance T]"""

from dataclasses import dataclass
from pathlib import Path

from megazero.settings import option, parse, run
from megazero.state import check, report, runs


@dataclass(frozen=True)
class Settings:
    """Names the first difference of two runs, A and B, and the largest. Exits with 0 if there is none, with 1 if there
    is. Times and memory are left out."""

    a: str = option(help="a log (metrics.jsonl or its folder), or a folder of checkpoints", unit="path", word=True)
    b: str = option(help="the other, of the same kind", unit="path", word=True)
    tolerance: float = option(
        0.0, "distance that counts as equal: a part of a figure, or of a tensor's largest element", unit="fraction")


def main() -> None:
    s = parse(Settings, prog="compare_runs.py")
    check(s.tolerance)
    report(runs(Path(s.a), Path(s.b), s.tolerance),
           f"{s.a} and {s.b} are equal" + (f" to {s.tolerance:g}" if s.tolerance else ""))


if __name__ == "__main__":
    run(main)
