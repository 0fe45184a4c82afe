"""How fast a disk is as a home of masters and moments: python tools/disk_speed.py DIR

Reads and writes a file without a name as --offload-optimizer disk does, by blocks of several sizes, several at a time,
and says which flags are best here."""

import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, unwritable
from megazero.plan import PAGE
from megazero.settings import option, parse, run
from megazero.units import File

DEPTHS, BLOCKS = (1, 2, 4, 8, 16), (2**20, 2**23)


@dataclass(frozen=True)
class Settings:
    """Measures reads, writes, and both at once, of a file in DIR that leaves nothing behind."""

    dir: str = option(help="folder on the disk, as for --offload-dir", unit="dir", word=True)
    size: int = option(2**30, "bytes of the file: more than the disk's own cache", unit="bytes")


def main() -> None:
    s = parse(Settings, prog="disk_speed.py")
    if s.size < max(BLOCKS) or s.size % PAGE:
        raise UserError(f"--size {s.size}: must be at least {max(BLOCKS)} and a multiple of {PAGE} bytes.")
    try:
        file = File(Path(s.dir), s.size)
    except OSError as error:
        raise UserError(f"--dir {s.dir}: {unwritable(error)}.") from None
    print(f"{s.dir}: {'around' if file.direct else 'through'} the page cache, {s.size / 1e9:.2f} GB")
    print(f"{'depth':>5} {'block':>10} {'read':>8} {'write':>8} {'both':>8}  GB/s")
    passes(file, s.size, 4, max(BLOCKS))                        # what was never written is read too fast
    found = {}
    for block in BLOCKS:
        for depth in DEPTHS:
            read, write, both = passes(file, s.size, depth, block)
            found[depth, block] = both
            print(f"{depth:>5} {block:>10} {read:>8.2f} {write:>8.2f} {both:>8.2f}", flush=True)
    depth, block = max(found, key=lambda key: found[key])
    speed = found[depth, block]
    print(f"write --offload-queue-depth {depth} --offload-block-size {block}: {speed:.2f} GB/s, so masters and AdamW's "
          f"moments of a billion weights take {24 / speed:.1f} s a step")


def passes(file: File, size: int, depth: int, block: int) -> list[float]:
    """GB/s of reads, of writes, and of a write for each read."""
    rooms = [mmap.mmap(-1, block) for _ in range(2 * depth)]
    for i, room in enumerate(rooms):
        room[:] = bytes([i % 251 + 1]) * block
    starts = range(0, size - block + 1, block)

    def each(do: Callable[[int], Callable[[memoryview, int], None]]) -> float:
        with ThreadPoolExecutor(depth) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda i: do(i)(memoryview(rooms[i % len(rooms)]), starts[i]), range(len(starts))))
            return len(starts) * block / (time.perf_counter() - begin) / 1e9

    return [each(lambda i: file.read), each(lambda i: file.write), each(lambda i: (file.read, file.write)[i % 2])]


if __name__ == "__main__":
    run(main)
