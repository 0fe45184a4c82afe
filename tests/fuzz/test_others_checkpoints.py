"""Checkpoints of other trainers from strangers: their files and the pickles in them are damaged. What comes out is a sentence, or a checkpoint that
is whole: bytes of a weight have no checksum there."""

import io
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from convert_checkpoint import Import, import_
from test_elsewhere import dcp, nanogpt
from test_elsewhere_deepspeed import deepspeed

from fuzz.support import accident, bent, cases, hunt
from megazero.state.checkpoint import Reader

FORMS = {"nanogpt": lambda d: (d.mkdir(), nanogpt(d / "ckpt.pt")), "dcp": dcp, "level 2": lambda d: deepspeed(d, 2), "level 3": lambda d: deepspeed(d, 3)}


@pytest.fixture(scope="module", params=FORMS)
def good(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "theirs"
    FORMS[request.param](folder)
    return folder


def use(folder: Path) -> bool:
    ours = folder.parent / "ours"
    import_(Import(str(folder), str(ours), num_attention_heads=4, rotary_base=1e4))
    return Reader(ours).verify() > 0


def pickled(rng: Random, folder: Path) -> str:
    """A file of torch.save whose archive is whole, and its pickle is not; or the index of a distributed checkpoint."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.suffix == ".pt" or p.name == ".metadata"))
    data = path.read_bytes()
    if path.name == ".metadata":
        found, how = bent(rng, data)
        path.write_bytes(found)
        return f".metadata: {how}"
    out, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    writer = torch._C.PyTorchFileWriter(out)
    for name in old.namelist():
        short, content = name.split("/", 1)[1], old.read(name)
        if short == "data.pkl":
            content, how = bent(rng, content)
        if short == "byteorder" or short.startswith("data"):
            writer.write_record(short, content, len(content))
    writer.write_end_of_file()
    path.write_bytes(out.getvalue())
    return f"{path.name}: data.pkl {how}"


@pytest.mark.parametrize("damage", [accident, pickled])
@cases(60, 600)
def test_no_checkpoint_of_another_trainer_is_believed(damage: Any, count: int, good: Path, tmp_path: Path) -> None:
    assert use(Path(shutil.copytree(good, tmp_path / "plain" / "folder")))
    hunt(damage.__name__, count, good, tmp_path, damage, use, bool)
