"""The only writer of pickles: files of torch.save and distributed checkpoints, for tools/convert_checkpoint.py export.
What trains here never reads them."""

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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


def save_distributed(content: Mapping[str, Any], folder: Path) -> None:
    """By torch's own writer, of one rank. Raises OSError."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # that there is no process group
        write(dict(content), storage_writer=FileSystemWriter(folder), no_dist=True)


def save_torch_dist(content: Mapping[str, Any], common: Mapping[str, Any], folder: Path) -> None:
    """Megatron-core's folder. Raises OSError."""
    save_distributed(content, folder)
    save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
        "common_backend_version": 1}))
