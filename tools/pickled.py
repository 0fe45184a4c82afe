"""The only writer of pickles: files of torch.save and distributed checkpoints, for tools/convert_checkpoint.py export.
What trains here never reads them."""

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint import save as write
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Tensor = torch.Tensor


def namespace(values: Mapping[str, Any]) -> argparse.Namespace:
    """As Megatron keeps its arguments."""
    return argparse.Namespace(**values)


def save(content: Mapping[str, Any], path: Path) -> None:
    """Raises OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(content), path)
    except RuntimeError as error:                               # torch's own word for a full disk
        raise OSError(0, re.sub(r"\s+", " ", str(error))[:200]) from None


class _Planned(DefaultSavePlanner):
    """Tensors by name, some of which lie as rows of larger ones: each row is a box of its own, so that whoever reads
    one layer reads no other."""

    def __init__(self, rows: Mapping[str, tuple[str, int, int]]) -> None:
        super().__init__()
        self.rows = rows                    # name -> (the larger one, row, of how many)
        self.own = {(above, row): name for name, (above, row, _) in rows.items()}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, items=[self._placed(item) for item in plan.items])

    def _placed(self, item: WriteItem) -> WriteItem:
        if item.index.fqn not in self.rows:
            return item
        name, row, count = self.rows[item.index.fqn]
        held, zeros = item.tensor_data, (0,) * len(self.state_dict[item.index.fqn].shape)
        assert held is not None
        box = ChunkStorageMetadata(torch.Size((row, *zeros)), torch.Size((1, *held.size)))
        return replace(item, index=MetadataIndex(name, box.offsets), type=WriteItemType.SHARD,
                       tensor_data=TensorWriteData(box, held.properties, torch.Size((count, *held.size))))

    def lookup_object(self, index: MetadataIndex) -> Any:
        own = self.own.get((index.fqn, index.offset[0])) if index.offset else None
        return super().lookup_object(index) if own is None else self.state_dict[own][None]


def save_distributed(content: Mapping[str, Any], folder: Path,
                     rows: Mapping[str, tuple[str, int, int]] | None = None) -> None:
    """By torch's own writer, of one rank; `rows`: name -> (the tensor that holds it, its row there, of how many).
    Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # that there is no process group
        write(dict(content), storage_writer=FileSystemWriter(folder), planner=_Planned(rows or {}), no_dist=True)


def save_torch_dist(content: Mapping[str, Any], rows: Mapping[str, tuple[str, int, int]], common: Mapping[str, Any],
                    folder: Path) -> None:
    """Megatron-core's folder. Raises OSError."""
    save_distributed(content, folder, rows)
    save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
        "common_backend_version": 1}))
