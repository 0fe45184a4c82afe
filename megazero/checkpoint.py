"""Checkpoints: boxes of logical tensors in safetensors files, and an index that exists only when all of them do.

    DIR/step-00000100/rank-00000.safetensors    the boxes that rank owns: weight/NAME, exp_avg/NAME ...  in fp32 (fp64)
    DIR/step-00000100/index.json                step, progress, configuration, architecture, list of files
    DIR/tokenizer/                              the tokenizer's files

A file's header says of each tensor which box of which logical tensor it is, and its checksum; the layout of the run that
wrote it appears nowhere else, so any layout can read what it needs. The index is written last and renamed into place: a
folder without one was cut short and is ignored. Saving a step that is there already goes to a folder of its own
(step-00000100.1), so that no save ever takes a good checkpoint apart.
"""

import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megazero.comm import Alone, Group
from megazero.errors import UserError
from megazero.layout import Box, Flat, Parameter, Piece, intersect

FORMAT, VERSION, INDEX = "megazero-checkpoint", 1, "index.json"
Tensor = torch.Tensor


@dataclass(frozen=True)
class Slice:
    """Owned elements of one logical tensor: `kind` is weight or the name of a moment."""

    kind: str
    name: str
    full: tuple[int, ...]
    box: Box
    tensor: Tensor

    @property
    def key(self) -> str:
        whole = self.box.size == self.full
        return f"{self.kind}/{self.name}" + ("" if whole else "@" + ",".join(map(str, self.box.offset)))


def held(flat: Flat, low: int, buffers: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Slice]]:
    """What buffers (kind -> the slice of a unit's flat buffer that starts at `low`) hold of logical tensors, as views of them."""
    for piece in flat.pieces:
        p = piece.shard.parameter
        for kind, buffer in buffers.items():
            for start, box in piece.boxes(low, low + len(buffer)):
                yield piece, Slice(kind, p.name, p.shape, box, buffer[start - low:start - low + box.numel].view(box.size))


def owned(flat: Flat, low: int, buffers: Mapping[str, Tensor]) -> list[Slice]:
    """The part of it that this tensor-parallel rank owns."""
    return [slice_ for piece, slice_ in held(flat, low, buffers) if piece.shard.owner]


class Writer:
    """Saves to a folder. With `background`, `save` returns when the slices are copied and a thread writes them."""

    def __init__(self, folder: Path, keep_last: int | None, background: bool, rank: int = 0, group: Group | None = None) -> None:
        """`group` are the ranks that save together (default: this one alone); nothing else may use it meanwhile.

        Makes the folder, so that one that cannot be written is told before the first step and not at the first save.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save {folder}: cannot be made ({error.strerror}); name a folder that can be written to.") from None
        self.folder, self.keep_last, self.background, self.rank, self.group = folder, keep_last, background, rank, group or Alone()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, slices: Iterable[Slice], header: Mapping[str, Any]) -> Path:
        """Saves step header["step"]. Raises UserError when the folder cannot be written; the previous checkpoint stays."""
        self.wait()
        target = _fresh_folder(self.folder, header["step"])
        if not self.background:
            self._commit(target, list(slices), header)
            return target
        copies = [Slice(s.kind, s.name, s.full, s.box, s.tensor.detach().to("cpu", copy=True)) for s in slices]
        self._thread = threading.Thread(target=self._write, args=(target, copies, header), name="checkpoint-writer")
        self._thread.start()
        return target

    def _commit(self, target: Path, slices: list[Slice], header: Mapping[str, Any]) -> None:
        write(target, slices, header, self.rank, self.group)
        if self.rank == 0:
            prune(self.folder, self.keep_last, target)

    def _write(self, target: Path, slices: list[Slice], header: Mapping[str, Any]) -> None:
        try:
            self._commit(target, slices, header)
        except BaseException as error:                          # told at the next wait(), on the main thread
            self._error = error

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what the background writer met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def write(folder: Path, slices: Sequence[Slice], header: Mapping[str, Any], rank: int = 0, group: Group | None = None) -> None:
    """This rank's part of a checkpoint: file, fsync; when all ranks have done that, rank 0 writes the index."""
    group = group or Alone()
    names = [f"rank-{r:05d}.safetensors" for r in range(group.size)]
    try:
        group.all_reduce(torch.zeros(1)).wait()                 # all have chosen this folder before any writes into it
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / names[rank], slices, header["step"])
        sync(folder / names[rank])
        group.all_reduce(torch.zeros(1)).wait()
        if rank == 0:
            files = {name: facts(folder / name) for name in names}
            write_index(folder, {"format": FORMAT, "version": VERSION, **header, "files": files})
        group.all_reduce(torch.zeros(1)).wait()
    except OSError as error:
        raise UserError(f"--save {folder}: cannot be written ({error.strerror}); the checkpoints before it are untouched.") from error
    except SafetensorError as error:
        raise UserError(f"--save {folder}: cannot be written ({error}); the checkpoints before it are untouched.") from error


def write_file(path: Path, slices: Sequence[Slice], step: int) -> None:
    tensors = {s.key: s.tensor.detach().to("cpu") for s in slices}
    boxes = {s.key: {"kind": s.kind, "name": s.name, "full": s.full, "offset": s.box.offset, "size": s.box.size,
                     "crc32": checksum(tensors[s.key])} for s in slices}
    save_file(tensors, path, {"format": FORMAT, "step": str(step), "boxes": json.dumps(boxes)})


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """The commit: after the rename the checkpoint exists, before it does not."""
    draft = folder / (INDEX + ".draft")
    draft.write_text(json.dumps({**index, "crc32": text_checksum(index)}, indent=1), encoding="utf-8")
    sync(draft)
    draft.rename(folder / INDEX)
    sync(folder)
    sync(folder.parent)


def facts(path: Path) -> dict[str, int]:
    """What the index says of a file: its size, and the checksum of its header, which holds the checksums of the rest."""
    with path.open("rb") as file:
        head = file.read(8)
        return {"bytes": path.stat().st_size, "header_crc32": zlib.crc32(head + file.read(int.from_bytes(head, "little")))}


def text_checksum(index: Mapping[str, Any]) -> int:
    """Of an index without its own checksum, however it is indented."""
    plain = {k: v for k, v in index.items() if k != "crc32"}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first; of equal steps the one saved later comes later."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
        if match and (path / INDEX).is_file():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [(step, path) for step, _, path in sorted(found)]


def _fresh_folder(folder: Path, step: int) -> Path:
    """Where to save a step: a folder that holds no complete checkpoint."""
    names = [f"step-{step:08d}", *(f"step-{step:08d}.{n}" for n in range(1, 10_000))]
    return next(folder / n for n in names if not (folder / n / INDEX).is_file())


def prune(folder: Path, keep_last: int | None, just_saved: Path | None = None) -> None:
    """Removes all but the newest `keep_last` checkpoints, and older saves of a step saved again; never `just_saved`. Index first."""
    found = complete(folder)
    newest = dict(found)
    kept = sorted(newest)[-keep_last:] if keep_last else sorted(newest)
    for step, path in found:
        if path != just_saved and (step not in kept or path != newest[step]):
            (path / INDEX).unlink()
            shutil.rmtree(path, ignore_errors=True)


class Reader:
    """One complete checkpoint, read by logical name and box; only the needed bytes are read.

    Raises UserError, naming file and place, for everything that is missing or damaged.
    """

    def __init__(self, folder: str | Path, step: int | None = None, flag: str = "--load") -> None:
        self.folder = find(Path(folder), step, flag)
        try:
            self.index: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{self.folder / INDEX}: cannot be read ({error}); {self._other()}.") from None
        if not isinstance(self.index, dict) or self.index.get("format") != FORMAT or self.index.get("version") != VERSION:
            raise UserError(f"{self.folder / INDEX}: is not a {FORMAT} of version {VERSION}.")
        if self.index.get("crc32") != text_checksum(self.index):
            raise UserError(f"{self.folder / INDEX}: is damaged (checksum differs); {self._other()}.")
        self.tensors: dict[tuple[str, str], list[tuple[Box, Path, str, int]]] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, known in self.index["files"].items():
            self._list(self.folder / name, known)

    def _list(self, path: Path, known: Mapping[str, int]) -> None:
        """Notes what a file's header says it holds."""
        if not path.is_file():
            raise UserError(f"{path}: is missing; {self._other()}.")
        size = path.stat().st_size
        if size != known["bytes"]:
            raise UserError(f"{path}: has {size:,} bytes instead of {known['bytes']:,}; {self._other()}.")
        if facts(path) != known:
            raise UserError(f"{path}: its header is damaged (checksum differs); {self._other()}.")
        with self._open(path) as file:
            metadata = file.metadata() or {}
        boxes, step = json.loads(metadata["boxes"]), int(metadata["step"])
        if step != self.index["step"]:
            raise UserError(f"{path}: is of step {step}, its index of step {self.index['step']}; {self._other()}.")
        for key, b in boxes.items():
            box = Box(tuple(b["offset"]), tuple(b["size"]))
            self.tensors.setdefault((b["kind"], b["name"]), []).append((box, path, key, b["crc32"]))
            self.shapes[b["kind"], b["name"]] = tuple(b["full"])

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is damaged ({error}); {self._other()}.") from None

    def _other(self) -> str:
        """What to do instead: the newest other checkpoint."""
        steps = [step for step, path in complete(self.folder.parent) if path != self.folder]
        return f"load another with --ckpt-step {steps[-1]}" if steps else "there is no other checkpoint beside it"

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.tensors}

    def read(self, kind: str, name: str, box: Box | None = None) -> Tensor:
        """A box (default: the whole) of a logical tensor."""
        box = box or Box((0,) * len(self.shapes[kind, name]), self.shapes[kind, name])
        out, filled = None, 0
        for theirs, path, key, crc in self.tensors[kind, name]:
            common = intersect(box, theirs)
            if common is None:
                continue
            part = self._part(path, key, theirs, common, crc)
            if common == box:
                return part
            out = torch.empty(box.size, dtype=part.dtype) if out is None else out
            out[common.moved(tuple(-o for o in box.offset)).slices] = part
            filled += common.numel
        if box.numel == 0:                                      # a rank beyond the end of the vocabulary
            return torch.empty(box.size)
        if filled != box.numel or out is None:
            raise UserError(f"{self.folder}: holds {filled} of {box.numel} elements of {kind}/{name}; {self._other()}.")
        return out

    def _part(self, path: Path, key: str, theirs: Box, common: Box, crc: int) -> Tensor:
        with self._open(path) as file:
            if common != theirs:
                return file.get_slice(key)[common.moved(tuple(-o for o in theirs.offset)).slices]
            tensor = file.get_tensor(key)
        if checksum(tensor) != crc:
            raise UserError(f"{path}: the bytes of {key} are damaged (checksum differs); {self._other()}.")
        return tensor

    def verify(self, progress: Callable[[str], object] = lambda _: None) -> int:
        """Reads everything and checks every checksum, and that the boxes cover each tensor; returns the bytes read."""
        total = 0
        for (kind, name), parts in self.tensors.items():
            progress(f"{kind}/{name}")
            covered = sum(box.numel for box, *_ in parts)
            if covered != Box((), self.shapes[kind, name]).numel:
                raise UserError(f"{self.folder}: its files hold {covered} elements of {kind}/{name} instead of "
                                f"{Box((), self.shapes[kind, name]).numel}; {self._other()}.")
            total += sum(self._part(path, key, box, box, crc).nbytes for box, path, key, crc in parts)
        return total


def find(folder: Path, step: int | None, flag: str = "--load") -> Path:
    """The folder of the newest complete checkpoint, or of a given step; `folder` may also be that of one checkpoint."""
    if (folder / INDEX).is_file():
        own = re.match(r"step-(\d+)", folder.name)
        if step is not None and own and int(own[1]) != step:
            raise UserError(f"--ckpt-step {step}: {flag} {folder} is the folder of step {int(own[1])} alone; give the folder above it.")
        return folder
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder.")
    found = dict(complete(folder))
    if not found:
        raise UserError(f"{flag} {folder}: holds no complete checkpoint.")
    if step is not None and step not in found:
        raise UserError(f"--ckpt-step {step}: {folder} holds steps {', '.join(map(str, found))}.")
    return found[max(found) if step is None else step]


def fill(reader: Reader, flat: Flat, low: int, buffers: Mapping[str, Tensor]) -> None:
    """Reads what a unit's buffers hold (see `held`), whatever layout wrote it."""
    for _, slice_ in held(flat, low, buffers):
        slice_.tensor.copy_(reader.read(slice_.kind, slice_.name, slice_.box))


def mismatches(reader: Reader, parameters: Sequence[Parameter], kinds: Sequence[str]) -> list[str]:
    """A sentence for everything a model needs and the checkpoint does not hold, or holds in another shape, or holds beyond."""
    wanted = {(kind, p.name): p.shape for p in parameters for kind in kinds}
    out = []
    for (kind, name), shape in wanted.items():
        theirs = reader.shapes.get((kind, name))
        if theirs is None:
            out.append(f"{reader.folder}: has no {kind}/{name}.")
        elif theirs != shape:
            out.append(f"{reader.folder}: {kind}/{name} has shape {list(theirs)}, this model {list(shape)}.")
    extra = [name for kind, name in reader.shapes if kind == "weight" and ("weight", name) not in wanted]
    return out + [f"{reader.folder}: holds weight/{name}, which this model does not have." for name in extra]
