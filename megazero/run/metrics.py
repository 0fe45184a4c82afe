"""What a run tells: one dict per step to metrics.jsonl (exact floats) and TensorBoard,
and one line per interval to the screen."""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megazero.base import clock, gib, say
from megazero.plan import device_of
from megazero.state import board_log, metrics_log

MFU = "MFU counts 6 N + 6 L h S FLOPs per token (causal attention, recompute not counted)"


SIZES = {"cpu": (128, 256, 512, 1024, 1536), "cuda": (1024, 2048, 4096, 8192)}      # of products that measure a peak


def peak_flops(device: torch.device, dtype_name: str, dtype: torch.dtype) -> tuple[float, str]:
    """(peak FLOP/s of the device in that dtype, where the number is from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        row = device_of(name)
        if row is not None and dtype_name in row.peaks:
            return row.peaks[dtype_name], f"stated for {name}, {dtype_name} without sparsity"
    return measured_peak(device, dtype), "best of a few large matrix products, measured now"


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the best square matrix product within about `seconds`, from small ones up."""
    best, end, sizes = 0.0, time.perf_counter() + seconds, SIZES[device.type]
    for n in itertools.chain(sizes[:-1], itertools.repeat(sizes[-1])):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for _ in range(3):
            best = max(best, 2 * n**3 / seconds_of(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
            if time.perf_counter() > end:
                return best
    raise AssertionError("the sizes never end")


def seconds_of(do: Callable[[], object], device: torch.device) -> float:
    """Of one call: a CUDA device tells by its own clock, without the host's part."""
    if device.type != "cuda":
        start = time.perf_counter()
        do()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    do()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def memory_bytes(device: torch.device) -> int:
    """Highest use so far: of the allocator on CUDA, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")                          # ru_maxrss would also count the process that started us
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Metrics:
    """The sinks, of rank 0.

    peak        FLOP/s of one of the `world` devices
    steps       of the whole run; a line tells of `interval` of them
    folder      --log-dir, if any
    resumed     the step from where this run goes on: what an earlier one logged beyond it is set aside; None for one
                that trains nothing, and only adds
    """

    def __init__(self, device: torch.device, *, peak: float, flops_per_token: float, world: int, steps: int,
                 interval: int, folder: str | None = None, resumed: int | None = 0, rank: int = 0) -> None:
        self.device, self.peak, self.steps, self.interval = device, peak, steps, interval
        self.flops = flops_per_token / world                    # of one device, per token of all
        self.window: list[Mapping[str, Any]] = []
        self.tells = rank == 0
        self.logs = [log(Path(folder), resumed) for log in (metrics_log, board_log)] if folder and self.tells else []

    def step(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Logs one step; adds what follows from its time. Returns the whole record."""
        rate = figures["tokens"] / figures["seconds"]
        flops = rate * self.flops
        record = figures | {"tokens_per_second": rate, "tflops_per_device": flops / 1e12, "mfu": flops / self.peak,
                            "memory_bytes": memory_bytes(self.device)}
        self._write(record)
        self.window.append(record)
        if record["step"] % self.interval == 0 or record["step"] == self.steps:
            if self.tells:
                say(self._line())
            self.window.clear()
        return record

    def evaluation(self, step: int, split: str, loss: float) -> None:
        self._write({"step": step, "split": split, "loss": loss})
        if self.tells:
            say(f"step {step:,} | {split} loss {loss:.4f}")

    def _write(self, record: Mapping[str, Any]) -> None:
        for log in self.logs:
            log.add(record)

    def _line(self) -> str:
        """The means of an interval, as people read them."""
        records, last = self.window, self.window[-1]
        good = [r["loss"] for r in records if not r["skipped"]]
        seconds = sum(r["seconds"] for r in records) / len(records)
        rate = sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records)
        flops = rate * self.flops
        extra = "".join(f" | {words} {last[key]:{form}}" for key, words, form in (
            ("params_norm", "params norm", ".3f"), ("num_zeros", "zeros", ",.0f")) if key in last)
        scale = f" | scale {last['loss_scale']:g}" if last["loss_scale"] != 1 else ""
        loss = sum(good) / len(good) if good else float("nan")
        return (f"step {last['step']:,}/{self.steps:,} | loss {loss:.4f} | norm {last['grad_norm']:.3f} | "
                f"lr {last['lr']:.3e}{scale}{extra} | {rate:,.0f} tok/s | {flops / 1e12:.4g} TFLOP/s | "
                f"MFU {flops / self.peak:.1%} causal | {gib(last['memory_bytes'])} | "
                f"{clock(seconds * (self.steps - last['step']))} left")

    def close(self) -> None:
        for log in self.logs:
            log.close()
