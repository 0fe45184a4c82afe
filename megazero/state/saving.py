"""How a checkpoint is written: each rank its file, then one of them the index, in a folder that bears the run's name
until all is there and it takes its own; beside training if asked."""

import errno
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megazero.base import Lease, UserError, sync, unwritable, whole
from megazero.comm import Alone, Group
from megazero.plan import Box
from megazero.state.checkpoint import BEFORE, DRAFT, FORMAT, INDEX, VERSION, Slice, complete, facts, text_checksum
from megazero.state.tensor_files import Planned, RowSums, header_of, stream

Tensor = torch.Tensor
MISTAKE = 1 << 30                       # no number of an operating system's


@dataclass(frozen=True)
class Copies:
    """Slices on their way from a device to the host; from a CPU they are there already."""

    slices: list[Slice]
    event: Any = None

    def hold(self) -> None:
        """What this stream does next waits for them: it may change what they are copies of."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def there(self) -> list[Slice]:
        """Returns when they are complete."""
        if self.event is not None:
            self.event.synchronize()
        return self.slices


class Staging:
    """Room on the host for copies of what is on a device: pinned, so that they come at the speed of the bus, and kept
    from save to save, since to pin memory takes longer than to fill it. They travel beside what the device does next.
    """

    def __init__(self) -> None:
        self.rooms: dict[str, Tensor] = {}
        self.stream: Any = None

    def copies(self, slices: Sequence[Slice]) -> Copies:
        device = next((s.tensor.device for s in slices if s.tensor.is_cuda), None)
        if device is None:
            return Copies([replace(s, tensor=s.tensor.detach().clone()) for s in slices])
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            made = [replace(s, tensor=self._copy(s.key, s.tensor.detach())) for s in slices]
            return Copies(made, self.stream.record_event())

    def _copy(self, key: str, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return x.clone()
        x.record_stream(self.stream)                            # its memory is no one else's until then
        if key not in self.rooms:
            self.rooms[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return self.rooms[key].copy_(x, non_blocking=True)


class Writer:
    """Saves to a folder. With `background`, `save` returns when the slices are being copied, and a thread writes them:
    who changes them calls `hold` before."""

    def __init__(self, folder: Path, keep_last: int | None, background: bool, rank: int = 0,
                 group: Group | None = None, lease: Lease | None = None) -> None:
        """`group` are the ranks that save together (default: this one alone); nothing else may use it meanwhile.
        `lease`: rank 0's on the folder.

        Makes the folder, so that one that cannot be written is told before the first step and not at the first save.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save {folder}: {unwritable(error)}.") from None
        self.folder, self.keep_last, self.background, self.rank, self.group = (
            folder, keep_last, background, rank, group or Alone())
        self.lease, self.run = lease, lease.holder.run if lease else secrets.token_hex(4)
        self.staging, self.hold = Staging(), lambda: None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, slices: Iterable[Slice], header: Mapping[str, Any]) -> Path:
        """Saves step header["step"].
        Raises UserError when the folder cannot be written; the previous checkpoint stays."""
        self.wait()
        target = self._agreed(header["step"])
        if not self.background:
            self._commit(target, list(slices), header)
            return target
        copies = self.staging.copies(list(slices))
        self.hold = copies.hold
        self._thread = threading.Thread(target=self._write, args=(target, copies, header), name="checkpoint-writer")
        self._thread.start()
        return target

    def _agreed(self, step: int) -> Path:
        """Where all ranks save a step, and under which run's name until it is there: as rank 0 says."""
        own = [_saves(self.folder, step), int(self.run, 16)] if self.rank == 0 else [0, 0]
        saves, run = self.group.all_reduce(torch.tensor(own), "max").wait().tolist()
        self.run = f"{run:08x}"
        return _folder(self.folder, step, saves)

    def _commit(self, target: Path, slices: list[Slice], header: Mapping[str, Any]) -> None:
        write(target, slices, header, self.rank, self.group, self.run, self._still_ours)
        if self.rank == 0:
            try:
                prune(self.folder, self.keep_last, target)
            except OSError as error:
                raise UserError(f"--save {self.folder}: a checkpoint that is not to be kept cannot be removed "
                                f"({error.strerror}); {target} is complete.") from error

    def _still_ours(self) -> None:
        if self.lease is not None:
            self.lease.renew()
            self.lease.look()

    def _write(self, target: Path, copies: Copies, header: Mapping[str, Any]) -> None:
        try:
            self._commit(target, copies.there(), header)
        except BaseException as error:                          # told at the next wait(), on the main thread
            self._error = error

    def look(self) -> None:
        """Raises what the background writer has met so far; does not wait for it."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what the background writer met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def planned(kind: str, name: str, full: tuple[int, ...], dtype: torch.dtype) -> Slice:
    """A whole logical tensor that is not here yet: its slice holds no data (torch's meta device)."""
    return Slice(kind, name, full, Box((0,) * len(full), full), torch.empty(full, dtype=dtype, device="meta"))


def on_host(slice_: Slice) -> Tensor:
    return slice_.load() if slice_.load else slice_.tensor.detach().to("cpu")


def write(target: Path, slices: Sequence[Slice], header: Mapping[str, Any], rank: int = 0, group: Group | None = None,
          run: str = "0" * 8, ready: Callable[[], None] = lambda: None, flag: str = "--save") -> None:
    """This rank's part of a checkpoint: file, fsync; when all ranks have done that, rank 0 writes the index and gives
    the folder its name. `ready` is asked before, and raises what stands against it. Where a rank's disk fails all ranks
    say so."""
    group, draft = group or Alone(), target.with_name(f"{DRAFT}{run}-{target.name}")
    names = [f"rank-{r:05d}.safetensors" for r in range(group.size)]

    def clear() -> None:
        if rank == 0:
            ready()
            for left in [target, *target.parent.glob(f"{DRAFT}{'[0-9a-f]' * 8}-*")]:    # of saves that were cut short
                if not (left == target and (left / INDEX).is_file()):
                    shutil.rmtree(left, ignore_errors=True)

    def fill_in() -> None:
        draft.mkdir(parents=True, exist_ok=True)
        write_file(draft / names[rank], slices, header["step"])

    def commit() -> None:
        if rank == 0:
            write_index(draft, header, names)
            ready()
            _named(draft, target)

    for part in (clear, fill_in, commit):
        if failed := _together(part, group):
            with suppress(OSError):
                (draft / names[rank]).unlink(missing_ok=True)   # a full disk has better use for it
            if failed == MISTAKE:
                raise UserError(f"{flag} {target}: was not written; another rank says why.")
            raise UserError(f"{flag} {target}: cannot be written ({os.strerror(failed)}); "
                            "the checkpoints before it are untouched.")


def _together(part: Callable[[], None], group: Group) -> int:
    """Each rank does its part: the number of what a disk said against it on one of them, MISTAKE where a rank met one,
    which it raises itself, or 0."""
    failed, mistake = 0, None
    try:
        part()
    except OSError as error:
        failed = error.errno or errno.EIO
    except UserError as error:
        failed, mistake = MISTAKE, error
    failed = int(group.all_reduce(torch.tensor([failed]), "max").wait().item())
    if mistake is not None:
        raise mistake
    return failed


def _named(draft: Path, target: Path) -> None:
    """The folder takes its name. A checkpoint that has it already stands for it until then, and goes."""
    before = target.with_name(BEFORE + target.name)
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        target.rename(before)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_alone(folder: Path, slices: Sequence[Slice], header: Mapping[str, Any],
                load: Callable[[Slice], Tensor]) -> Path:
    """A checkpoint in one file, each tensor loaded when its turn comes; its folder. Raises OSError."""
    target = _folder(folder, header["step"], _saves(folder, header["step"]))
    shutil.rmtree(target, ignore_errors=True)                   # what was cut short left here
    target.mkdir(parents=True)
    write_file(target / "rank-00000.safetensors", slices, header["step"], load)
    write_index(target, header, ["rank-00000.safetensors"])
    return target


def write_file(path: Path, slices: Sequence[Slice], step: int, load: Callable[[Slice], Tensor] = on_host) -> None:
    """One file, on the disk when this returns;
    of its tensors one at a time is in memory besides those that are here already."""
    own = {s.key: s for s in slices}

    def metadata(sums: RowSums) -> dict[str, str]:
        boxes = {key: {"kind": s.kind, "name": s.name, "full": s.full, "offset": s.box.offset, "size": s.box.size,
                       "crc32": sums[key]} for key, s in own.items()}
        return {"format": FORMAT, "step": str(step), "boxes": json.dumps(boxes, separators=(",", ":"))}

    stream(path, [Planned(key, s.box.size, s.tensor.dtype) for key, s in own.items()],
           lambda key: load(own[key]), metadata)


def write_index(folder: Path, header: Mapping[str, Any], names: Sequence[str]) -> None:
    """What makes a folder with files a checkpoint."""
    files = {name: facts(folder / name, header_of(folder / name)) for name in names}
    index = {"format": FORMAT, "version": VERSION, **header, "files": files}
    with whole(folder / INDEX) as file:
        file.write(json.dumps({**index, "crc32": text_checksum(index)}, indent=1).encode())
    sync(folder.parent)


def _saves(folder: Path, step: int) -> int:
    """How often a step has been saved here."""
    return max((int(path.suffix[1:] or 0) + 1 for s, path in complete(folder) if s == step), default=0)


def _folder(folder: Path, step: int, saves: int) -> Path:
    """Where to save a step that was saved so often before: no save takes a good checkpoint apart."""
    return folder / (f"step-{step:08d}.{saves}" if saves else f"step-{step:08d}")


def set_aside(folder: Path, step: int) -> list[Path]:
    """Moves the checkpoints after a step to a folder of their own, out of the way of a run that goes on from it.
    Returns where they are now. Raises UserError."""
    later = [path for s, path in complete(folder) if s > step]
    names = [f"after-{step:08d}", *(f"after-{step:08d}.{n}" for n in range(1, 10_000))]
    aside = next(folder / name for name in names if not (folder / name).exists())
    try:
        if later:
            aside.mkdir()
        return [path.rename(aside / path.name) for path in later]
    except OSError as error:
        raise UserError(f"--save {folder}: later checkpoints cannot be moved to {aside.name} ({error.strerror}); "
                        "name a new folder.") from None


def prune(folder: Path, keep_last: int | None, just_saved: Path | None = None) -> None:
    """Removes all but the newest `keep_last` checkpoints, and older saves of a step saved again;
    never `just_saved`. Index first."""
    found = complete(folder)
    newest = dict(found)
    kept = sorted(newest)[-keep_last:] if keep_last else sorted(newest)
    for step, path in found:
        if path != just_saved and (step not in kept or path != newest[step]):
            if path.is_symlink():                               # the checkpoint is another's, the link alone is here
                path.unlink()
            else:
                (path / INDEX).unlink()
                shutil.rmtree(path, ignore_errors=True)
