"""What the program says to people."""

import os
import sys
from contextlib import suppress

from tqdm import tqdm


def say(text: str) -> None:
    """What cannot be shown (a terminal that was closed, a full disk) is no reason to end."""
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")                      # noqa: SIM115  (for the rest of the process)
        with suppress(OSError):
            print(f"warning: the screen cannot be written ({error.strerror}); nothing more is shown there",
                  file=sys.stderr, flush=True)


def gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"


def clock(seconds: float) -> str:
    """1h02m, 3m05s, 12s."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


class Bar:
    """Progress by bytes; silent when nobody watches."""

    def __init__(self) -> None:
        self.bar = tqdm(unit="B", unit_scale=True, disable=None, leave=False)

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)
