"""Distributed checkpoints of torch (`.metadata`, `__0_0.distcp` ...): boxes of tensors at places of files.
Megatron-core's torch_dist is one with `common.pt` beside it."""

import io
import re
import stat
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megazero.base import Form, UserError, checked, said
from megazero.elsewhere.source import Lazy, Stub, Tensors
from megazero.plan import Box, Shape, intersect, tiles

Tensor = torch.Tensor
Item = Callable[[bytes, Path], Any]     # bytes of torch.save, the file they are of -> what they hold
FILE = re.compile(r"\w[\w.-]{0,200}")
SIZE, COUNT = range(2**53), range(2**62)
STORED: Form = {"relative_path": FILE, "offset": COUNT, "length": COUNT}


class Spot(NamedTuple):
    """A box of a tensor, and where it lies."""

    box: Box
    path: Path
    start: int
    length: int


class Distributed:
    """`.metadata` read: tensors, and objects by name. Raises UserError for what cannot be."""

    def __init__(self, folder: Path, metadata: Any, item: Item) -> None:
        self.folder, self.item = folder, item
        self.tensors: Tensors = {}
        self.objects: dict[str, Callable[[], Any]] = {}
        self._places: dict[str, list[Spot]] = {}
        self._last: tuple[Spot, Tensor] | None = None          # q, k and v come from one
        try:
            said_of = _fields(metadata)
            stored = {_key(index): self._place(info) for index, info in _mapping(said_of["storage_data"]).items()}
            for name, of in _mapping(said_of["state_dict_metadata"]).items():
                self._note(checked(name, str, "a name"), _fields(of), stored)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / '.metadata'}: cannot be ({said(str(error))}); fetch it again.") from None

    def _place(self, info: Any) -> tuple[Path, int, int]:
        found = _fields(info)
        if found.get("transform_descriptors"):
            raise ValueError("its files are compressed, which is not known here")
        checked({**found, "relative_path": str(found["relative_path"])}, STORED, "a place")
        return self.folder / found["relative_path"], found["offset"], found["length"]

    def _note(self, name: str, of: Mapping[str, Any], stored: Mapping[Any, tuple[Path, int, int]]) -> None:
        if "size" not in of:
            where = stored.get((name, None))
            if where is not None:
                self.objects[name] = partial(self._object, *where)
            return
        shape, dtype = _shape(of["size"]), _dtype(of["properties"])
        places = []
        for chunk in map(_fields, of["chunks"]):
            box = Box(_shape(chunk["offsets"]), _shape(chunk["sizes"]))
            if not len(shape) == len(box.offset) == len(box.size) or any(
                    o + n > f for o, n, f in zip(*box, shape, strict=True)):
                raise ValueError(f"a box of {name} is not inside its tensor")
            if (where := stored.get((name, box.offset)) or stored.get((name, None))) is None:
                raise ValueError(f"a box of {name} lies in no file")
            places.append(Spot(box, *where))
        if sum(p.box.numel for p in places) != prod(shape) or not tiles(shape, [p.box for p in places if p.box.numel]):
            raise ValueError(f"its boxes do not hold each element of {name} once")
        self._places[name] = places
        self.tensors[name] = Lazy(shape, dtype, lambda: self._rows(name, 0, shape[0] if shape else 1))

    def layer(self, name: str, number: int) -> Lazy:
        """One of the layers that lie stacked in a tensor [layers, ...]: of the files its boxes alone are read."""
        whole = self.tensors[name]
        return Lazy(whole.shape[1:], whole.dtype, lambda: self._rows(name, number, number + 1)[0])

    def _rows(self, name: str, low: int, high: int) -> Tensor:
        """Rows [low, high) of a tensor, box by box. Raises UserError."""
        shape, dtype = self.tensors[name].shape, self.tensors[name].dtype
        if not shape:
            return self._read(self._places[name][0], dtype)
        wanted = Box((low, *(0 for _ in shape[1:])), (high - low, *shape[1:]))
        out = torch.empty(wanted.size, dtype=dtype)
        for place in self._places[name]:
            if (common := intersect(place.box, wanted)) is not None:
                within = common.moved(tuple(-o for o in place.box.offset))
                out[common.moved((-low, *(0 for _ in shape[1:]))).slices] = self._read(place, dtype)[within.slices]
        return out

    def _read(self, place: Spot, dtype: torch.dtype) -> Tensor:
        if self._last is not None and self._last[0] == place:
            return self._last[1]
        self._last = None                                       # before the next is read
        found = self._object(place.path, place.start, place.length)
        if not isinstance(found, Tensor) or tuple(found.shape) != place.box.size or found.dtype != dtype:
            raise UserError(f"{place.path}: does not hold what .metadata says of it; fetch it again.")
        self._last = place, found
        return found

    def _object(self, path: Path, start: int, length: int) -> Any:
        return self.item(self._bytes(path, start, length), path)

    def _bytes(self, path: Path, start: int, length: int) -> bytes:
        try:
            of = path.stat()
            with path.open("rb") if stat.S_ISREG(of.st_mode) else io.BytesIO() as file:     # a pipe would wait for ever
                file.seek(start)
                found = file.read(length) if start + length <= of.st_size else b""
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again.") from None
        if len(found) != length:
            raise UserError(f"{path}: ends before byte {start + length:,}, up to which .metadata says it holds "
                            "tensors; fetch it again.")
        return found


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{said(value)} is no mapping")
    return value


def _fields(value: Any) -> Mapping[str, Any]:
    """What an object says of itself."""
    if not isinstance(value, Stub):
        raise ValueError(f"{said(value)} is no part of an index")
    return _mapping(value.state or {})


def _key(index: Any) -> tuple[str, Shape | None]:
    found = _fields(index)
    offset = found.get("offset")
    return checked(found["fqn"], str, "a name"), None if offset is None else _shape(offset)


def _shape(value: Any) -> Shape:
    return tuple(checked(list(value), [SIZE], "a shape"))


def _dtype(properties: Any) -> torch.dtype:
    state = properties.state
    found = [v for v in (state.values() if isinstance(state, Mapping) else state) if isinstance(v, torch.dtype)]
    return found[0]
