"""One file of what many ranks saved, tensor by tensor."""

import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from megazero.base import UserError, draft_of
from megazero.data import kept_files
from megazero.state.checkpoint import MODEL, Reader, Slice
from megazero.state.saving import planned, write_alone

Key = tuple[str, str]                   # (kind, name)


def in_order(key: Key) -> tuple[bool, Key]:
    """Weights first, then moment by moment: the same order whatever layout saved them."""
    return key[0] != "weight", key


def merge(reader: Reader, output: Path, optimizer: bool = False,
          told: Callable[[int, int], None] = lambda *_: None) -> int:
    """Writes a folder of checkpoints that holds this one in one file: its weights, or with `optimizer` all of it.
    Returns bytes of tensors.

    `told` hears (bytes done, bytes in all). No more than one tensor is in memory, with the part of it that was read
    last. The folder appears when it is complete. Checkpoints of one state make the same file, whatever their layouts.
    Raises UserError.
    """
    if optimizer and reader.kinds <= MODEL:
        raise UserError(f"--optimizer: {reader.folder} holds weights alone; leave it out.")
    keys = sorted((k for k in reader.shapes if optimizer or k[0] in MODEL), key=in_order)
    slices = [planned(*key, reader.shapes[key], reader.dtype(*key)) for key in keys]
    total, done = sum(prod(s.full) * s.tensor.itemsize for s in slices), 0

    def load(slice_: Slice) -> torch.Tensor:
        nonlocal done
        tensor = reader.read(slice_.kind, slice_.name)
        done += tensor.nbytes
        told(done, total)
        return tensor

    header = {k: v for k, v in reader.index.items() if k not in ("format", "version", "files", "crc32")}
    header["layout"] = {**header["layout"], "tp": 1, "pp": 1, "dp": 1, "zero_stage": 0}
    if not optimizer:
        header["optimizer"] = None
        if "module" in header:                                  # what the script kept is not the model's
            header["module"] = {"excluded": header["module"].get("excluded", False), "client": {}}
    tokenizer = reader.folder.parent / "tokenizer"
    kept = kept_files(header["tokenizer"] or {"files": {}}, tokenizer) if tokenizer.is_dir() else {}
    with draft_of(output) as draft:
        write_alone(draft, slices, header, load)
        for name, path in kept.items():                         # whatever else lies there was not the run's
            (draft / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(path, draft / "tokenizer" / name)
    return total
