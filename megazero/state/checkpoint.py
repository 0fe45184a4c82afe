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
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from numbers import Number
from pathlib import Path
from typing import Any

import torch

from megazero.base import Form, UserError, checked, load, loads, read_bytes, said
from megazero.data import IDENTITY
from megazero.plan import EMA, Architecture, Box, Flat, Piece, architecture_of, intersect, progress_of, tiles
from megazero.state.elsewhere import foreign
from megazero.state.tensor_files import CODES, READABLE, Stored, checksums, contents, header_of

FORMAT, VERSION, INDEX = "megazero-checkpoint", 2, "index.json"
MODEL = {"weight", "buffer"}             # kinds that are the model's; the others are how it is trained
DRAFT, BEFORE, LATEST = "draft-", "before-", "latest"    # not complete yet; to be replaced by one of its tag; its note
TAG = re.compile(r"(?!draft-|before-)\w[\w.+=-]{0,199}")
STEP, FILE = re.compile(r"^step-(\d+)(?:\.\d+)?$"), re.compile(r"rank-\d{5,9}\.safetensors")
CRC, COUNT = range(2**32), range(2**53)
WORD, PLAIN = re.compile(r"\w{1,60}"), (None, bool, Number, str)
WORDS: Form = {                         # of an index; about architecture and progress plan/ knows more
    "step": COUNT, "progress": dict, "config": {str: (*PLAIN, [PLAIN])}, "optimizer": (None, WORD),
    "architecture": (None, dict), "layout": {str: COUNT}, "tokenizer": (None, IDENTITY), "family?": (None, WORD),
    "special_ids?": dict, "module?": dict, "files": {str: {"bytes": COUNT, "header_crc32": CRC}}}
SIZES = [range(1, 2**53)]
BOXES: Form = {str: {"kind": WORD, "name": re.compile(r"[\w.:+/-]{1,500}"), "full": SIZES, "offset": [COUNT],
                     "size": SIZES, "crc32": list}}
Tensor = torch.Tensor


@dataclass(frozen=True)
class Slice:
    """Owned elements of one logical tensor: `kind` is weight or the name of a moment. `load`: gives them, where they
    are not in `tensor` now."""

    kind: str
    name: str
    full: tuple[int, ...]
    box: Box
    tensor: Tensor
    load: Callable[[], Tensor] | None = None

    @property
    def key(self) -> str:
        return key_of(self.kind, self.name, self.full, self.box)


def key_of(kind: str, name: str, full: tuple[int, ...], box: Box) -> str:
    """The name of a box in its file."""
    return f"{kind}/{name}" + ("" if box.size == full else "@" + ",".join(map(str, box.offset)))


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
    for path in folder.glob("step-*") if os.path.isdir(folder) else ():
        match = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", path.name)
        if match and os.path.isfile(path / INDEX):
            found.append((int(match[1]), int(match[2] or 0), path))
    return [(step, path) for step, _, path in sorted(found)]


def tagged(folder: Path) -> dict[str, Path]:
    """The complete checkpoints of an engine, by tag. One whose successor was about to take its name stands for it."""
    found = [path for path in folder.iterdir() if os.path.isfile(path / INDEX)] if os.path.isdir(folder) else []
    return ({path.name.removeprefix(BEFORE): path for path in found if path.name.startswith(BEFORE)}
            | {path.name: path for path in found if not path.name.startswith((BEFORE, DRAFT))})


def newest(folder: Path) -> str | None:
    """The tag that an engine saved last, as it noted. Raises UserError."""
    try:
        words = read_bytes(folder / LATEST, 1000).decode().strip()
        return str(checked(words, TAG, "the tag in it"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LATEST}: cannot be read ({getattr(error, 'strerror', None) or error}); name a tag, "
                        "or write one into it.") from None


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_special(ids: Any) -> bool:
    """Can they stand in a Hugging Face configuration: no id, one, or a list? Theirs may lie beyond the vocabulary."""
    listed = ids if isinstance(ids, list) and ids else [ids]
    return ids is None or all(type(i) is int and 0 <= i < 2**31 for i in listed)


@dataclass(frozen=True)
class StoredBox:
    """A box of a logical tensor in a file, and the checksums of its runs of rows."""

    box: Box
    stored: Stored
    crc32: list[int]


class Reader:
    """One complete checkpoint, read by logical name and box:
    only the rows that are needed are read, and all that is read is checked.

    Whoever wrote it is not believed: that its words have their form, that files are as long as they say and hold each
    element of each tensor once is seen here, before anything is made of it. Raises UserError, naming file and place,
    for everything that is missing, damaged or cannot be.
    """

    def __init__(self, folder: str | Path, step: int | None = None, flag: str = "--load", ema: bool = False) -> None:
        """`ema`: its weights are the means of them (--ema), and nothing else is there."""
        self.folder = find(Path(folder), step, flag)
        self.index = self._words()
        self._architecture = None if self.of_module else architecture_of(self.index["architecture"])
        self.tensors: dict[tuple[str, str], list[StoredBox]] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name, known in self.index["files"].items():
            self._list(self.folder / name, known)
        self._complete()
        if ema:
            self._take_means()

    def _take_means(self) -> None:
        means = {name for kind, name in self.shapes if kind == EMA}
        if not means or means != {name for kind, name in self.shapes if kind == "weight"}:
            raise UserError(f"--ema: {self.folder} holds no means of its weights; load one of a run with --ema DECAY, "
                            "or leave it out.")
        self.tensors = {("weight", n): parts for (kind, n), parts in self.tensors.items() if kind == EMA}
        self.shapes = {("weight", n): shape for (kind, n), shape in self.shapes.items() if kind == EMA}

    @staticmethod
    def finds(folder: Path) -> bool:
        """Is anything complete in a folder, of a run or of an engine?"""
        return bool(complete(folder) or tagged(folder))

    def _words(self) -> dict[str, Any]:
        """The index, of which each word was looked at."""
        path = self.folder / INDEX
        try:
            index = load(path, object, infinite=True)           # --clip-grad inf
        except (ValueError, OSError) as error:
            raise self._bad(path, f"cannot be read ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            raise self._bad(path, f"is not a {FORMAT} of version {VERSION}")
        if index.get("crc32") != text_checksum(index):
            raise self._bad(path, "is damaged (checksum differs)")
        try:
            self.progress = progress_of(checked(index, WORDS)["progress"])
            steps = [index["step"], self.progress.step, *(int(n) for n in STEP.findall(self.folder.name))]
            if len(set(steps)) > 1:
                raise ValueError(f"is of the steps {', '.join(map(str, steps))} at once")
            for name in index["files"]:
                checked(name, FILE, "a name in files")
            for name, ids in index.get("special_ids", {}).items():
                if name not in SPECIAL or not is_special(ids):
                    raise ValueError(f"special_ids.{said(name)} is {said(ids)}")
        except ValueError as error:
            raise self._bad(path, f"cannot be: {error}") from None
        return index

    def _list(self, path: Path, known: Mapping[str, int]) -> None:
        """Notes what a file's header says it holds."""
        try:
            found = path.stat().st_size
            if found != known["bytes"]:
                raise ValueError(f"has {found:,} bytes instead of {known['bytes']:,}")
            header = header_of(path)
            if zlib.crc32(header) != known["header_crc32"]:
                raise ValueError("its header is damaged (checksum differs)")
            stored, metadata = contents(path, header)
            if metadata.get("step") != str(self.index["step"]):
                raise ValueError(f"is of step {said(metadata.get('step'))}, its index of step {self.index['step']}")
            boxes = checked(loads(metadata.get("boxes", "")), BOXES, "boxes")
            if boxes.keys() != stored.keys():
                raise ValueError("its boxes are not those of its tensors")
            for key, box in boxes.items():
                self._note(stored[key], box)
        except FileNotFoundError:
            raise self._bad(path, "is missing") from None
        except OSError as error:
            raise self._bad(path, f"cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise self._bad(path, str(error)) from None

    def _note(self, stored: Stored, b: Mapping[str, Any]) -> None:
        """One tensor of a file. Raises ValueError."""
        which, full, box = (b["kind"], b["name"]), tuple(b["full"]), Box(tuple(b["offset"]), tuple(b["size"]))
        if not full:
            raise ValueError(f"{said(stored.name)} is no tensor of a model")
        if not len(full) == len(box.offset) == len(box.size) or any(
                o + n > f for o, n, f in zip(*box, full, strict=True)):
            raise ValueError(f"the box of {said(stored.name)} is not inside its tensor")
        if box.size != stored.shape or stored.name != key_of(*which, full, box) or stored.dtype not in (
                CODES if which[0] == "weight" else READABLE.values()):
            raise ValueError(f"{said(stored.name)} is not what its box says")
        sums = b["crc32"]                                       # a million of them may be: no form, a quick look
        if len(sums) != ceil(box.size[0] / stored.run) or not all(type(c) is int and 0 <= c < 2**32 for c in sums):
            raise ValueError(f"{said(stored.name)} has checksums that none could have")
        others = self.tensors.setdefault(which, [])
        if self.shapes.setdefault(which, full) != full or (others and others[0].stored.dtype != stored.dtype):
            raise ValueError(f"{stored.name} is part of another shape or dtype than in other files")
        others.append(StoredBox(box, stored, sums))

    def _complete(self) -> None:
        """Do the boxes of each tensor hold each of its elements once, and has the model no more layers than weights?"""
        for (kind, name), parts in self.tensors.items():
            full, held = self.shapes[kind, name], sum(part.box.numel for part in parts)
            if held != prod(full):
                raise self._bad(self.folder, f"holds {held} of {prod(full)} elements of {kind}/{name}")
            if len(parts) > 1 and not tiles(full, [part.box for part in parts]):
                raise self._bad(self.folder, f"holds elements of {kind}/{name} twice")
        weights = sum(kind == "weight" for kind, _ in self.shapes)
        if self._architecture is not None and self.architecture.layers > weights:
            raise self._bad(self.folder / INDEX, f"cannot be: {self.architecture.layers:,} layers of {weights} weights")

    def _bad(self, path: Path, what: str) -> UserError:
        return UserError(f"{path}: {what}; {self._other()}.")

    def _other(self) -> str:
        """What to do instead: the newest other checkpoint."""
        steps = [step for step, path in complete(self.folder.parent) if path != self.folder]
        return f"load another with --ckpt-step {steps[-1]}" if steps else "there is no other checkpoint beside it"

    @property
    def of_module(self) -> bool:
        """Was it an engine that saved a module of somebody's own, and not a run that saved our decoder?"""
        return self.index["architecture"] is None

    @property
    def architecture(self) -> Architecture:
        """Raises UserError where a module of somebody's own was saved."""
        if self._architecture is None:
            raise UserError(f"{self.folder}: holds a module that megazero.initialize trained, whose own code alone "
                            "knows what it computes; load it with engine.load_checkpoint.")
        return self._architecture

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.tensors}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self.tensors[kind, name][0].stored.dtype

    def read(self, kind: str, name: str, box: Box | None = None) -> Tensor:
        """A box (default: the whole) of a logical tensor."""
        box = box or Box((0,) * len(self.shapes[kind, name]), self.shapes[kind, name])
        if box.numel == 0:                                      # a rank beyond the end of the vocabulary
            return torch.empty(box.size)
        out = torch.empty(0)
        for part in self.tensors[kind, name]:
            common = intersect(box, part.box)
            if common is None:
                continue
            found = self._read(part, common)
            if common == box:
                return found
            out = out if out.shape == box.size else torch.empty(box.size, dtype=found.dtype)
            out[common.moved(tuple(-o for o in box.offset)).slices] = found
        return out                                              # all of it: the boxes tile the tensor

    def _read(self, part: StoredBox, common: Box) -> Tensor:
        """What a file holds of `common`.
        The rows it lies in are read and checked, out to the borders of their checksums."""
        stored, (at, *_) = part.stored, common.moved(tuple(-o for o in part.box.offset))
        low, high = at[0] // stored.run, ceil((at[0] + common.size[0]) / stored.run)
        try:
            rows = stored.rows(low * stored.run, min(high * stored.run, stored.shape[0]))
        except OSError as error:
            raise self._bad(stored.path, f"cannot be read ({error.strerror})") from None
        if checksums(rows) != part.crc32[low:high]:
            raise self._bad(stored.path, f"the bytes of {stored.name} are damaged (checksum differs)")
        return rows[Box((at[0] - low * stored.run, *at[1:]), common.size).slices]

    def verify(self, progress: Callable[[str], object] = lambda _: None) -> int:
        """Reads everything and checks every checksum; returns the bytes read."""
        total = 0
        for (kind, name), parts in self.tensors.items():
            progress(f"{kind}/{name}")
            total += sum(self._read(part, part.box).nbytes for part in parts)
        return total


def find(folder: Path, step: int | None, flag: str = "--load") -> Path:
    """The folder of the newest complete checkpoint, or of a given step; `folder` may also be that of one checkpoint."""
    if os.path.isfile(folder / INDEX):         # unlike Path's, no error where a name is too long
        own = re.match(r"step-(\d+)", folder.name)
        if step is not None and own and int(own[1]) != step:
            raise UserError(f"--ckpt-step {step}: {flag} {folder} is the folder of step {int(own[1])} alone; "
                            "give the folder above it.")
        return folder
    if not os.path.isdir(folder):
        raise foreign(folder, flag) or UserError(f"{flag} {folder}: there is no such folder.")
    found = dict(complete(folder))
    if not found:
        return _by_tag(folder, step, flag)
    if step is not None and step not in found:
        raise UserError(f"--ckpt-step {step}: {folder} holds steps {', '.join(map(str, found))}.")
    return found[max(found) if step is None else step]


def _by_tag(folder: Path, step: int | None, flag: str) -> Path:
    """The same of an engine's folder, whose last tag is the newest, and whose own tags tell steps."""
    tags = tagged(folder)
    tag = newest(folder) if step is None else f"global_step{step}"
    if not tags:
        raise foreign(folder, flag) or UserError(f"{flag} {folder}: holds no complete checkpoint.")
    if tag not in tags:
        raise UserError(f"{flag} {folder}: holds {', '.join(sorted(tags))}, and "
                        f"{'no file latest that names one' if tag is None else f'not {tag}'}; name the folder of one.")
    return tags[tag]


def fill(reader: Reader, flat: Flat, low: int, buffers: Mapping[str, Tensor], lenient: bool = False) -> None:
    """Reads what a unit's buffers hold (see `held`), whatever layout wrote it; if `lenient`, what there is of it."""
    for _, slice_ in held(flat, low, buffers):
        if not lenient or reader.shapes.get((slice_.kind, slice_.name)) == slice_.full:
            slice_.tensor.copy_(reader.read(slice_.kind, slice_.name, slice_.box))


def mismatches(reader: Reader, wanted: Mapping[tuple[str, str], tuple[int, ...]], most: int = 6) -> list[str]:
    """A sentence for each tensor, (kind, name) -> shape, that is wanted and the checkpoint does not hold, or holds in
    another shape, and for each weight that it holds beyond, where weights are wanted: the first few of many."""
    out = []
    for (kind, name), shape in wanted.items():
        theirs = reader.shapes.get((kind, name))
        if theirs is None:
            out.append(f"{reader.folder}: has no {kind}/{name}.")
        elif theirs != shape:
            out.append(f"{reader.folder}: {kind}/{name} has shape {list(theirs)}, this model {list(shape)}.")
    weights = any(kind == "weight" for kind, _ in wanted)
    extra = [name for kind, name in reader.shapes if weights and kind == "weight" and (kind, name) not in wanted]
    out += [f"{reader.folder}: holds weight/{name}, which this model does not have." for name in extra]
    return (out if len(out) <= most
            else [*out[:most], f"{reader.folder}: and {len(out) - most} more tensors like these."])
