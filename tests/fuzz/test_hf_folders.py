"""Hugging Face folders from strangers: configurations, indexes and headers that are damaged or say what is not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import TINY, built, header, kept

from fuzz.support import accident, cases, forged, hunt, limited, plain, spoiled
from megazero.base.errors import UserError
from megazero.hf.convert import export_folder, import_folder
from megazero.state.checkpoint import Reader, owned
from megazero.state.saving import write

SMALL = TINY.replace("--hidden-size 64", "--hidden-size 8 --ffn-hidden-size 16").replace("--vocab-size 101", "--vocab-size 11").replace(
    "--num-attention-heads 4", "--num-attention-heads 2")
MODELS = {"gpt2": "--openai-gelu", "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 1 --disable-bias-linear "
          "--use-rope-scaling --rope-original-length 16 --untie-embeddings-and-output-weights",
          "gemma3": "--geglu --openai-gelu --normalization RMSNorm --apply-layernorm-1p --norm-placement both --position-embedding-type rope --num-query-groups 1 "
          f"--disable-bias-linear --embedding-multiplier {8**0.5} --qk-layernorm --attention-window 9 --window-attn-skip-freq 2 --rope-local-base-freq 500 "
          "--use-rope-scaling --rope-scaling-type yarn --rope-original-length 16 --final-logit-softcapping 3"}


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


FIRST, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


def told(**values: Any) -> Callable[[Path], None]:
    """A configuration that says otherwise, by llama's names."""
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        gpt2 = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head", "rms_norm_eps": "layer_norm_epsilon"}
        names = gpt2 if config["model_type"] == "gpt2" else {}
        (folder / "config.json").write_text(json.dumps(config | {names.get(key, key): value for key, value in values.items()}))
    return change


def mapped(file: str, names: int = 1) -> Callable[[Path], None]:
    """An index that looks for its first tensors in another file."""
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        shutil.copy(folder / FIRST, folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": index | dict.fromkeys(list(index)[:names], file)}))
    return change


def headed(how: Callable[[dict[str, Any], list[str]], object], length: int = 0) -> Callable[[Path], None]:
    """A first file whose header says otherwise: its entries, and their names in the order of their bytes."""
    def change(folder: Path) -> None:
        data = (folder / FIRST).read_bytes()
        at = 8 + int.from_bytes(data[:8], "little")
        listed = json.loads(data[8:at])
        found = how(listed, sorted((k for k in listed if k != "__metadata__"), key=lambda k: listed[k]["data_offsets"][0]))
        text = (found if isinstance(found, str) else json.dumps(listed)).encode()
        (folder / FIRST).write_bytes((length or len(text)).to_bytes(8, "little") + text + data[at:])
    return change


def piped(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


FORGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a billion layers": (told(num_hidden_layers=10**9), r"config.json: (n_layer|num_hidden_layers) is 1000000000, not a whole number from 1 to 100000"),
    "many layers": (told(num_hidden_layers=99_999), r"its config.json asks for 99,999 layers, its files hold \d\d tensors; fetch it again|names 2 layers of 99999"),
    "a width of terabytes": (told(hidden_size=2**30, head_dim=2**29, num_attention_heads=2), "its config.json asks for"),
    "heads that are none": (told(num_attention_heads=0), r"config.json: (n_head|num_attention_heads) is 0, not a whole number from 1"),
    "a number that is text": (told(rms_norm_eps="1e-5"), r"config.json: (layer_norm_epsilon|rms_norm_eps) is '1e-5', not a number"),
    "a number beyond all": (told(rms_norm_eps=10**400), r"(layer_norm_epsilon|rms_norm_eps) is 1000.*, not a number"),
    "an end of text that is a text": (told(eos_token_id="x"), "config.json: cannot be read .eos_token_id is 'x', not null or a whole number or a list"),
    "a key twice": (lambda d: (d / "config.json").write_text('{"model_type": "opt", ' + (d / "config.json").read_text()[1:]), "key 'model_type' stands twice"),
    "a file elsewhere": (mapped("../outside.safetensors"), r"index.json: cannot be read .weight_map..* is '../outside.safetensors', not a word like"),
    "a file anywhere": (mapped("/etc/hostname"), "is '/etc/hostname', not a word like"),
    "a tensor that is not there": (mapped("model-00002-of-00002.safetensors"), r"model-00002-of-00002.safetensors: has no '.*', which model.safetensors.index.json looks for"),
    "a tensor in two files": (lambda d: (shutil.copy(d / FIRST, d / "x.safetensors"), mapped("x.safetensors")(d)), f"x.safetensors: holds .*, as {FIRST} does"),
    "a pipe": (piped, f"{FIRST}: cannot be read .is not a regular file.; fetch it again"),
    "a header beyond the file": (headed(lambda listed, names: None, 2**40), r"its header cannot have 1,099,511,627,776 bytes"),
    "a header key twice": (headed(lambda listed, names: json.dumps(listed).replace('"dtype"', '"dtype": "F64", "dtype"', 1)), "key 'dtype' stands twice"),
    "bytes of two tensors": (headed(lambda listed, names: listed[names[1]].update(data_offsets=listed[names[0]]["data_offsets"])), "does not lie where the tensor before it ends"),
    "bytes of none": (headed(lambda listed, names: listed.pop(names[1])), "does not lie where the tensor before it ends"),
    "bytes at the end": (headed(lambda listed, names: listed.pop(names[-1])), r"has [\d,]+ bytes, its tensors need"),
    "more elements than bytes": (headed(lambda listed, names: listed[names[0]].update(shape=[2**40, 2**40])), "or has not the bytes of its shape"),
    "a side below zero": (headed(lambda listed, names: listed[names[0]].update(shape=[-1, -1])), r"shape\[0\] is -1, not a whole number from 0"),
    "a name that a terminal obeys": (headed(lambda listed, names: listed.update({"\x1b[2J": listed.pop(names[0])})), r"has no '.*', which|which is no name of a weight"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_be_is_one_sentence(name: str, good: Path, tmp_path: Path) -> None:
    forge, sentence = FORGED[name]
    forge(Path(shutil.copytree(good, tmp_path / "theirs")))
    with limited(10, 2**30), pytest.raises(UserError, match=sentence) as caught:
        use(tmp_path / "theirs")
    assert plain(caught.value) and not (tmp_path / "ours").exists()
