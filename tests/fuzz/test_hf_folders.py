"""Hugging Face folders from strangers: configurations, indexes and headers that are damaged or say what is not there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import TINY, built, header, kept

from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.hf.convert import export_folder, import_folder
from megazero.state.checkpoint import Reader, owned
from megazero.state.saving import write

SMALL = TINY.replace("--hidden-size 64", "--hidden-size 8 --ffn-hidden-size 16").replace("--vocab-size 101", "--vocab-size 11").replace(
    "--num-attention-heads 4", "--num-attention-heads 2")
MODELS = {"gpt2": "--openai-gelu", "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 1 --disable-bias-linear "
          "--use-rope-scaling --rope-original-length 16 --untie-embeddings-and-output-weights"}


@pytest.fixture(scope="module", params=MODELS)
def good(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files and an index, as transformers would write it; a third file lies outside."""
    root, run = tmp_path_factory.mktemp("good"), built(f"{SMALL} {MODELS[request.param]}")
    write(root / "ours" / "step-00000000", [s for u in run.units.values() for s in owned(u.flat, 0, {"weight": kept(run, u)["weight"]})],
          header(run) | {"optimizer": None})
    export_folder(Reader(root / "ours"), root / "theirs", shard=5000)
    return root / "theirs"


def use(folder: Path) -> bool:
    """Imports and exports it again: is what comes back what another library reads in its files?"""
    ours, back = (folder.parent / name for name in ("ours", "back"))
    import_folder(folder, ours)
    reader = Reader(ours)
    reader.verify()
    export_folder(reader, back)
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    there = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    returned = {name: tensor for path in back.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return all(torch.equal(tensor.view(torch.uint8), there[name].to(tensor.dtype).view(torch.uint8)) for name, tensor in returned.items())


def rewrite(name: str, how: Callable[[Random, Any], tuple[Any, str]]) -> Callable[[Random, Path], str]:
    """Damages the JSON of one file."""
    def damage(rng: Random, folder: Path) -> str:
        found, told = how(rng, json.loads((folder / name).read_text()))
        (folder / name).write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
        return f"{name}: {told}"
    return damage


def forge_map(rng: Random, folder: Path) -> str:
    """An index whose names lead elsewhere, to a good file there or to one that is not."""
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    index, file = json.loads(path.read_text()), rng.choice((
        "../outside.safetensors", str(folder.parent / "outside.safetensors"), "config.json", "x/../model-00001-of-00002.safetensors", ".", "a\nb.safetensors"))
    names = rng.sample(sorted(index["weight_map"]), rng.choice((1, 3, 9)))
    path.write_text(json.dumps({"weight_map": index["weight_map"] | dict.fromkeys(names, file)}))
    return f"{len(names)} names at {file}"


def forge_header(rng: Random, folder: Path) -> str:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    at = 8 + int.from_bytes(data[:8], "little")
    found, how = rng.choice((forged, forged, spoiled))(rng, json.loads(data[8:at]))
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(text) + 1))
    path.write_bytes(length.to_bytes(8, "little") + text + data[at:])
    return f"{path.name} {how}"


DAMAGES = {"accident": (accident, 0.3), "config": (rewrite("config.json", forged), 0.3), "spoiled config": (rewrite("config.json", spoiled), 0.05),
           "index": (rewrite("model.safetensors.index.json", forged), 0.1), "spoiled index": (rewrite("model.safetensors.index.json", spoiled), 0.05),
           "map": (forge_map, 0.05), "header": (forge_header, 0.15)}


@pytest.mark.parametrize("name", DAMAGES)
@cases(200, 1500)
def test_no_folder_is_believed(name: str, count: int, good: Path, tmp_path: Path) -> None:
    damage, share = DAMAGES[name]
    assert use(Path(shutil.copytree(good, tmp_path / "plain" / "folder")))
    hunt(name, int(count * share), good, tmp_path, damage, use, bool)
