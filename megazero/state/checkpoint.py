"""Checkpoints: boxes of logical tensors in safetensors files, and an index that exists only when all of them do.

    DIR/step-00000100/rank-00000.safetensors    the boxes that rank owns: weight/NAME, exp_avg/NAME ...  in fp32 (fp64)
    DIR/step-00000100/index.json                step, progress, configuration, architecture, list of files
    DIR/tokenizer/                              the tokenizer's files

A file's header says of each tensor which box of which logical tensor it is, and its checksums; the layout of the run
that wrote it appears nowhere else, so any layout can read what it needs. The index is written last, and then the folder
takes its name: what was cut short is called draft-RUN-step-00000100, and a folder without an index is ignored. Saving
a step that is there already goes to a folder of its own (step-00000100.1), so that no save ever takes a good checkpoint
apart. Here is how one is read; saving.py writes it.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from megazero.base import UserError
from megazero.plan import Box, Flat, Parameter, Piece, intersect
from megazero.state.tensor_files import Stored, checksums, contents, header_of

FORMAT, VERSION, INDEX = "megazero-checkpoint", 2, "index.json"
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
    """What buffers (kind -> the slice of a unit's flat buffer that starts at `low`) hold of logical tensors,
    as views of them."""
    for piece in flat.pieces:
        p = piece.shard.parameter
        for kind, buffer in buffers.items():
            for start, box in piece.boxes(low, low + len(buffer)):
                yield piece, Slice(kind, p.name, p.shape, box,
                                   buffer[start - low:start - low + box.numel].view(box.size))


def owned(flat: Flat, low: int, buffers: Mapping[str, Tensor]) -> list[Slice]:
    """The part of it that this tensor-parallel rank owns."""
    return [slice_ for piece, slice_ in held(flat, low, buffers) if piece.shard.owner]


def facts(path: Path, header: bytes) -> dict[str, int]:
    """What the index says of a file: its size, and the checksum of its header,
    which holds the checksums of the rest."""
    return {"bytes": path.stat().st_size, "header_crc32": zlib.crc32(header)}


def text_checksum(index: Mapping[str, Any]) -> int:
    """Of an index without its own checksum, however it is indented."""
    plain = {k: v for k, v in index.items() if k != "crc32"}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first; of equal steps the one saved later comes later."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
        if match and (path / INDEX).is_file():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [(step, path) for step, _, path in sorted(found)]


@dataclass(frozen=True)
class StoredBox:
    """A box of a logical tensor in a file, and the checksums of its runs of rows."""

    box: Box
    stored: Stored
    crc32: list[int]


class Reader:
    """One complete checkpoint, read by logical name and box:
    only the rows that are needed are read, and all that is read is checked.

    Raises UserError, naming file and place, for everything that is missing or damaged.
    """

    def __init__(self, folder: str | Path, step: int | None = None, flag: str = "--load") -> None:
        self.folder = find(Path(folder), step, flag)
        try:
            self.index: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{self.folder / INDEX}: cannot be read ({error}); {self._other()}.") from None
        if (not isinstance(self.index, dict) or self.index.get("format") != FORMAT
                or self.index.get("version") != VERSION):
            raise UserError(f"{self.folder / INDEX}: is not a {FORMAT} of version {VERSION}; {self._other()}.")
        if self.index.get("crc32") != text_checksum(self.index):
            raise UserError(f"{self.folder / INDEX}: is damaged (checksum differs); {self._other()}.")
        self.tensors: dict[tuple[str, str], list[StoredBox]] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, known in self.index["files"].items():
            self._list(self.folder / name, known)

    def _list(self, path: Path, known: Mapping[str, int]) -> None:
        """Notes what a file's header says it holds."""
        try:
            header = header_of(path)
            found = facts(path, header)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; {self._other()}.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {self._other()}.") from None
        if found["bytes"] != known["bytes"]:
            raise UserError(f"{path}: has {found['bytes']:,} bytes instead of {known['bytes']:,}; {self._other()}.")
        if found != known:
            raise UserError(f"{path}: its header is damaged (checksum differs); {self._other()}.")
        stored, metadata = contents(path, header)
        if int(metadata["step"]) != self.index["step"]:
            raise UserError(f"{path}: is of step {metadata['step']}, its index of step {self.index['step']}; "
                            f"{self._other()}.")
        for key, b in json.loads(metadata["boxes"]).items():
            part = StoredBox(Box(tuple(b["offset"]), tuple(b["size"])), stored[key], b["crc32"])
            self.tensors.setdefault((b["kind"], b["name"]), []).append(part)
            self.shapes[b["kind"], b["name"]] = tuple(b["full"])

    def _other(self) -> str:
        """What to do instead: the newest other checkpoint."""
        steps = [step for step, path in complete(self.folder.parent) if path != self.folder]
        return f"load another with --ckpt-step {steps[-1]}" if steps else "there is no other checkpoint beside it"

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.tensors}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self.tensors[kind, name][0].stored.dtype

    def read(self, kind: str, name: str, box: Box | None = None) -> Tensor:
        """A box (default: the whole) of a logical tensor."""
        box = box or Box((0,) * len(self.shapes[kind, name]), self.shapes[kind, name])
        out, filled = None, 0
        for part in self.tensors[kind, name]:
            common = intersect(box, part.box)
            if common is None:
                continue
            found = self._read(part, common)
            if common == box:
                return found
            out = torch.empty(box.size, dtype=found.dtype) if out is None else out
            out[common.moved(tuple(-o for o in box.offset)).slices] = found
            filled += common.numel
        if box.numel == 0:                                      # a rank beyond the end of the vocabulary
            return torch.empty(box.size)
        if filled != box.numel or out is None:
            raise UserError(f"{self.folder}: holds {filled} of {box.numel} elements of {kind}/{name}; {self._other()}.")
        return out

    def _read(self, part: StoredBox, common: Box) -> Tensor:
        """What a file holds of `common`.
        The rows it lies in are read and checked, out to the borders of their checksums."""
        stored, (at, *_) = part.stored, common.moved(tuple(-o for o in part.box.offset))
        low, high = at[0] // stored.run, ceil((at[0] + common.size[0]) / stored.run)
        try:
            rows = stored.rows(low * stored.run, min(high * stored.run, stored.shape[0]))
        except OSError as error:
            raise UserError(f"{stored.path}: cannot be read ({error.strerror}); {self._other()}.") from None
        if checksums(rows) != part.crc32[low:high]:
            raise UserError(f"{stored.path}: the bytes of {stored.name} are damaged (checksum differs); "
                            f"{self._other()}.")
        return rows[Box((at[0] - low * stored.run, *at[1:]), common.size).slices]

    def verify(self, progress: Callable[[str], object] = lambda _: None) -> int:
        """Reads everything and checks every checksum, and that the boxes cover each tensor; returns the bytes read."""
        total = 0
        for (kind, name), parts in self.tensors.items():
            progress(f"{kind}/{name}")
            covered = sum(part.box.numel for part in parts)
            if covered != Box((), self.shapes[kind, name]).numel:
                raise UserError(f"{self.folder}: its files hold {covered} elements of {kind}/{name} instead of "
                                f"{Box((), self.shapes[kind, name]).numel}; {self._other()}.")
            total += sum(self._read(part, part.box).nbytes for part in parts)
        return total


def find(folder: Path, step: int | None, flag: str = "--load") -> Path:
    """The folder of the newest complete checkpoint, or of a given step; `folder` may also be that of one checkpoint."""
    if (folder / INDEX).is_file():
        own = re.match(r"step-(\d+)", folder.name)
        if step is not None and own and int(own[1]) != step:
            raise UserError(f"--ckpt-step {step}: {flag} {folder} is the folder of step {int(own[1])} alone; "
                            "give the folder above it.")
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


def mismatches(reader: Reader, parameters: Sequence[Parameter], kinds: Sequence[str], most: int = 6) -> list[str]:
    """A sentence for each tensor that a model needs and the checkpoint does not hold, or holds in another shape, or
    holds beyond: the first few of many."""
    wanted = {(kind, p.name): p.shape for p in parameters for kind in kinds}
    out = []
    for (kind, name), shape in wanted.items():
        theirs = reader.shapes.get((kind, name))
        if theirs is None:
            out.append(f"{reader.folder}: has no {kind}/{name}.")
        elif theirs != shape:
            out.append(f"{reader.folder}: {kind}/{name} has shape {list(theirs)}, this model {list(shape)}.")
    extra = [name for kind, name in reader.shapes if kind == "weight" and ("weight", name) not in wanted]
    out += [f"{reader.folder}: holds weight/{name}, which this model does not have." for name in extra]
    return (out if len(out) <= most
            else [*out[:most], f"{reader.folder}: and {len(out) - most} more tensors like these."])
