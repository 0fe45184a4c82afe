"""The files of a Hugging Face folder: how an export is cut into files, and the tensors of what others wrote."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megazero.base import UserError
from megazero.state import OF_CODE, Planned

Tensor = torch.Tensor
INDEX = "model.safetensors.index.json"


def shards(plan: Sequence[Planned], limit: int) -> dict[str, list[Planned]]:
    """file name -> tensors, in order, no file above `limit` bytes unless one tensor is."""
    parts: list[list[Planned]] = [[]]
    held = 0
    for p in plan:
        if parts[-1] and held + p.nbytes > limit:
            parts.append([])
            held = 0
        parts[-1].append(p)
        held += p.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return value


class HfFolder:
    """The tensors of a Hugging Face folder. Raises UserError naming file and tensor for what is missing or damaged.

    base        prefix of names that checkpoints of the bare model, without a head, leave out
    buffers     pattern of tensors that are no weights
    """

    def __init__(self, folder: Path, base: str, buffers: str) -> None:
        self.folder, self.base = folder, base
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self._paths():
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if not re.fullmatch(buffers, name):
                        self._note(path, name, file.get_slice(name))

    def _paths(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            names = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f"{self.folder / INDEX}: has no weight_map; fetch it again.")
            return [self.folder / name for name in sorted(set(names.values()))]
        if (self.folder / "model.safetensors").is_file():
            return [self.folder / "model.safetensors"]
        pickled = any(self.folder.glob("*.bin"))
        raise UserError(f"--input {self.folder}: holds no model.safetensors; " + (
            "its .bin files are pickles, which could run any code and are never opened: "
            "save it again with transformers' save_pretrained."
            if pickled else "give a folder that transformers' save_pretrained wrote."))

    def _note(self, path: Path, name: str, part: Any) -> None:
        if part.get_dtype() not in OF_CODE:
            raise UserError(f"{path}: {name} is {part.get_dtype()}; only {', '.join(OF_CODE)} can be imported.")
        self.files[name], self.shapes[name] = path, tuple(part.get_shape())
        self.dtypes[name] = OF_CODE[part.get_dtype()]

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); fetch it again.") from None

    def name(self, theirs: str) -> str | None:
        """The name a tensor has here, if it is here."""
        return next((n for n in (theirs, theirs.removeprefix(self.base)) if n in self.files), None)

    def read(self, theirs: str, low: int, high: int, transpose: bool = False) -> Tensor:
        """Rows [low, high) of a tensor, or of its transpose."""
        name = self.name(theirs)
        assert name is not None, theirs
        with self._open(self.files[name]) as file:
            part = file.get_slice(name)
            return part[:, low:high].T if transpose else part[low:high]
