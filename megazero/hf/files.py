"""The files of a Hugging Face folder: how an export is cut into files, and the tensors of what others wrote."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megazero.base import Form, UserError, load, said
from megazero.state import CODES, OF_CODE, Planned, Stored, contents, header_of

Tensor = torch.Tensor
INDEX = "model.safetensors.index.json"
FILE, NAME = re.compile(r"\w[\w.-]{0,99}\.safetensors"), re.compile(r"[\w.:+/-]{1,500}")    # of what an index may name


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


def read_json(path: Path, form: Form = dict) -> dict[str, Any]:
    """A JSON object of this form. Raises UserError."""
    try:
        return dict(load(path, form))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again.") from None


class HfFolder:
    """The tensors of a Hugging Face folder. Raises UserError naming file and tensor for what is missing or damaged.

    base        prefix of names that checkpoints of the bare model, without a head, leave out
    buffers     pattern of tensors that are no weights
    """

    def __init__(self, folder: Path, base: str, buffers: str) -> None:
        self.folder, self.base = folder, base
        self.tensors: dict[str, Stored] = {}
        for path, named in self._paths().items():
            held = self._held(path)
            lost = [name for name in named if name not in held]
            if lost:
                raise UserError(f"{path}: has no {said(lost[0])}, which {INDEX} looks for there; fetch it again.")
            for name, stored in held.items():
                if not re.fullmatch(buffers, name):
                    self._note(name, stored)

    def _paths(self) -> dict[Path, list[str]]:
        """The files, and which tensors the index says of each."""
        if os.path.isfile(self.folder / INDEX) and os.path.isfile(self.folder / "model.safetensors"):
            raise UserError(f"--input {self.folder}: holds model.safetensors and {INDEX}, and readers differ on which "
                            "counts; remove one of them.")
        if os.path.isfile(self.folder / INDEX):
            paths: dict[Path, list[str]] = {}
            for name, file in read_json(self.folder / INDEX, {"weight_map": {str: FILE}})["weight_map"].items():
                paths.setdefault(self.folder / file, []).append(name)
            return dict(sorted(paths.items()))
        if os.path.isfile(self.folder / "model.safetensors"):
            return {self.folder / "model.safetensors": []}
        pickled = any(self.folder.glob("*.bin"))
        raise UserError(f"--input {self.folder}: holds no model.safetensors; " + (
            "its .bin files are pickles, which are not opened here: python tools/convert_checkpoint.py import takes it."
            if pickled else "give a folder that transformers' save_pretrained wrote."))

    def _held(self, path: Path) -> dict[str, Stored]:
        try:
            return contents(path, header_of(path))[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); fetch it again.") from None

    def _note(self, name: str, stored: Stored) -> None:
        if not re.fullmatch(NAME, name):
            raise UserError(f"{stored.path}: holds {said(name)}, which is no name of a weight; fetch it again.")
        if name in self.tensors:
            raise UserError(f"{stored.path}: holds {name}, as {self.tensors[name].path.name} does; fetch it again.")
        if stored.dtype not in CODES:
            raise UserError(f"{stored.path}: {name} is {str(stored.dtype).removeprefix('torch.')}; "
                            f"only {', '.join(OF_CODE)} can be imported.")
        self.tensors[name] = stored

    def name(self, theirs: str) -> str | None:
        """The name a tensor has here, if it is here."""
        return next((n for n in (theirs, theirs.removeprefix(self.base)) if n in self.tensors), None)

    def read(self, theirs: str, low: int, high: int, transpose: bool = False) -> Tensor:
        """Rows [low, high) of a tensor, or of its transpose. Raises UserError."""
        name = self.name(theirs)
        assert name is not None, theirs
        stored = self.tensors[name]
        try:
            return stored.rows(0, stored.shape[0])[:, low:high].T if transpose else stored.rows(low, high)
        except OSError as error:
            raise UserError(f"{stored.path}: cannot be read ({error.strerror}); fetch it again.") from None
