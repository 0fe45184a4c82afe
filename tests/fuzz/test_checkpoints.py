"""Checkpoints from disks that fail and from strangers: damaged bytes, and words, headers and boxes forged under checksums that fit."""

import hashlib
import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support import TINY, built, header, kept

from fuzz.support import accident, cases, forged, hunt, near, spoiled
from megazero.plan.layout import Box
from megazero.plan.progress import loss_scale
from megazero.run.generate import build_from_checkpoint, logits
from megazero.state.checkpoint import INDEX, Reader, facts, owned, text_checksum
from megazero.state.compare import checkpoints
from megazero.state.merge import merge
from megazero.state.record import resumed, unfit
from megazero.state.saving import write_file, write_index
from megazero.state.tensor_files import header_of

STEP, RANKS = "step-00000000", ("rank-00000.safetensors", "rank-00001.safetensors")
WORDS = TINY.replace("--num-layers 2 --hidden-size 64", "--num-layers 1 --hidden-size 8 --ffn-hidden-size 16 --swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2").replace(
    "--vocab-size 101", "--vocab-size 11").replace("--num-attention-heads 4", "--num-attention-heads 2 --kv-channels 4")
SECRET = "what lies beside is nobody's business"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks, whose tensors are cut anywhere, and a tokenizer beside it."""
    run, folder = built(WORDS), tmp_path_factory.mktemp("good") / "run"
    (folder / STEP).mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "characters.json").write_text(json.dumps(sorted("abcdefghijk")))
    digest = hashlib.sha256((folder / "tokenizer" / "characters.json").read_bytes()).hexdigest()
    for rank, name in enumerate(RANKS):
        halves = [(u, u.flat.size // 3 * rank, u.flat.size // 3 if rank == 0 else u.flat.size) for u in run.units.values()]
        write_file(folder / STEP / name, [s for u, low, high in halves for s in owned(
            u.flat, low, {k: b[low:high] for k, b in kept(run, u).items() if k in ("weight", "exp_avg")})], 0)
    words = header(run)
    words |= {"config": {k: words["config"][k] for k in ("lr", "seed", "data_path", "split", "num_layers", "dtype", "save")},
              "tokenizer": {"type": "CharTokenizer", "vocab_size": 11, "eod": None, "files": {"characters.json": digest}}}
    write_index(folder / STEP, words, RANKS)
    (folder.parent / "secret").write_text(SECRET)
    return folder


def use(folder: Path) -> dict[str, Any]:
    """All that is done with a checkpoint: read, run on, compared, made one, asked for text. What it holds, which is what its files say."""
    reader, out = Reader(folder), folder.parent / "merged"
    merge(reader, out, optimizer=True)
    reader.verify()
    found = {"/".join(key): reader.read(*key) for key in reader.shapes}
    for key, (tensor, count) in assembled(reader.folder).items():
        assert bool((count == 1).all()) and torch.equal(tensor, found[key]), f"{key} is not what the files hold"
    resumed(reader.progress, loss_scale(model().config))
    unfit(reader, model().plan.architecture, [p for u in model().plan.units for p in u.parameters], "adam", None)
    again = Reader(out)
    assert not list(checkpoints(reader, again))
    assert all(torch.equal(again.read(*key).view(torch.uint8), found["/".join(key)].view(torch.uint8)) for key in reader.shapes)
    text = "".join(p.read_text(errors="replace") for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    assert SECRET not in text and not [p for p in out.rglob("*") if p.is_symlink()], "what lies beside is copied"
    logits(build_from_checkpoint(reader, longest=8), torch.arange(6).view(2, 3))
    return found


def assembled(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor put together from the files by another library, and how often each element was there."""
    out: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in json.loads((folder / INDEX).read_text())["files"]:
        with safe_open(folder / name, framework="pt") as file:
            for key, b in json.loads(file.metadata()["boxes"]).items():
                part = file.get_tensor(key)
                whole, count = out.setdefault(f"{b['kind']}/{b['name']}", (torch.empty(b["full"], dtype=part.dtype), torch.zeros(b["full"])))
                at = Box(tuple(b["offset"]), tuple(b["size"])).slices
                whole[at], count[at] = part, count[at] + 1
    return out


@cache
def model() -> Any:
    return built(WORDS)


def same(good: Path) -> Callable[[dict[str, Any]], bool]:
    """Are these the tensors of the good one, bit for bit?"""
    wanted = {key: tensor for key, (tensor, _) in assembled(good / STEP).items()}
    return lambda found: found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda index: index) -> None:
    """Checksums of headers and index that fit what is there, as a forger would write them."""
    index = json.loads((folder / STEP / INDEX).read_text())
    for name in index["files"]:
        if (folder / STEP / name).is_file():
            index["files"][name] = facts(folder / STEP / name, header_of(folder / STEP / name))
    index = change(index)
    if isinstance(index, dict) and "crc32" in index:
        index["crc32"] = text_checksum(index)
    (folder / STEP / INDEX).write_text(json.dumps(index))


def forge_index(rng: Random, folder: Path) -> str:
    notes = []

    def change(index: dict[str, Any]) -> Any:
        fixed = ("format", "version", "crc32")                  # others would be refused for these alone
        found, how = forged(rng, {k: v for k, v in index.items() if k not in fixed})
        notes.append(how)
        return {**{k: index[k] for k in fixed}, **found}
    reseal(folder, change)
    return f"index: {notes[0]}"


def spoil_index(rng: Random, folder: Path) -> str:
    text, how = spoiled(rng, json.loads((folder / STEP / INDEX).read_text()))
    (folder / STEP / INDEX).write_bytes(text)
    return f"index: {how}"


def forge_header(rng: Random, folder: Path) -> str:
    """Of a file: its entries, or what its boxes say; the index knows the new checksum."""
    path = folder / STEP / rng.choice(RANKS)
    old = header_of(path)
    listed, data = json.loads(old[8:]), path.read_bytes()[len(old):]
    if rng.random() < 0.6:
        boxes, how = forged(rng, json.loads(listed["__metadata__"]["boxes"]))
        listed["__metadata__"]["boxes"] = json.dumps(boxes)
        text = json.dumps(listed).encode()
    elif rng.random() < 0.7:
        listed, how = forged(rng, listed)
        text = json.dumps(listed).encode()
    else:
        text, how = spoiled(rng, listed)
    length = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(text) + len(data) + 1))
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    index = json.loads((folder / STEP / INDEX).read_text())
    index["files"][path.name] = {"bytes": path.stat().st_size, "header_crc32": zlib.crc32(length.to_bytes(8, "little") + text)}
    (folder / STEP / INDEX).write_text(json.dumps(index | {"crc32": text_checksum(index)}))
    return f"{path.name} {how}"


def forge_boxes(rng: Random, folder: Path) -> str:
    """Boxes moved, grown or shrunk so that each alone may be right: overlaps and holes, of one tensor or two."""
    path = folder / STEP / rng.choice(RANKS)
    old = header_of(path)
    listed, data = json.loads(old[8:]), path.read_bytes()[len(old):]
    boxes, notes = json.loads(listed["__metadata__"]["boxes"]), []
    for key in rng.sample(sorted(boxes), 2):
        part, dim = boxes[key], rng.randrange(len(boxes[key]["full"]))
        what = rng.choice(("offset", "full", "size", "name"))
        if what == "name":
            part[what] = rng.choice(list(boxes.values()))["name"]
        elif what == "offset" and rng.random() < 0.7:           # somewhere inside
            part[what] = [rng.randint(0, max(f - n, 0)) for f, n in zip(part["full"], part["size"], strict=True)]
        else:
            part[what] = [n + rng.choice((-1, 1, 2, 2**38)) * (d == dim) for d, n in enumerate(part[what])]
        if what == "size" and len(part["size"]) == 1:
            listed[key]["shape"] = part["size"]
        name = f"{part['kind']}/{part['name']}" + ("" if part["size"] == part["full"] else "@" + ",".join(map(str, part["offset"])))
        boxes[name], listed[name] = boxes.pop(key), listed.pop(key)
        notes.append(f"{key} {what} {part[what]}")
    listed["__metadata__"]["boxes"] = json.dumps(boxes)
    text = json.dumps(listed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    reseal(folder)
    return "; ".join(notes)


def forge_tokenizer(rng: Random, folder: Path) -> str:
    """Files beside the checkpoint that are others, or links; an index that names them with a hash that fits, or not."""
    target, name = folder / "tokenizer" / "characters.json", rng.choice(("characters.json", "../../secret", "/etc/hostname", "more.json", "..", "a/b"))
    what = rng.choice(("link", "loop", "text", "named", "fits"))
    if what in ("link", "loop"):
        target.unlink()
        target.symlink_to("../../../secret" if what == "link" else "characters.json")
    elif what == "text":
        target.write_text(json.dumps(near(rng, sorted("abcdefghijk"))))
    (folder / "tokenizer" / "planted").symlink_to("../../secret")
    digest = hashlib.sha256(target.read_bytes()).hexdigest() if target.is_file() and what != "named" else "0" * 64
    reseal(folder, lambda index: index | {"tokenizer": index["tokenizer"] | {"files": {name: digest} if what != "fits" else {
        "characters.json": digest, "../../secret": hashlib.sha256(SECRET.encode()).hexdigest()}}})
    return f"tokenizer {what} {name}"


@pytest.mark.parametrize(("damage", "share"), {
    accident: 0.25, forge_index: 0.3, spoil_index: 0.1, forge_header: 0.2, forge_boxes: 0.1, forge_tokenizer: 0.05}.items())
@cases(600, 7000)
def test_no_checkpoint_is_believed(damage: Callable[[Random, Path], str], share: float, count: int, good: Path, tmp_path: Path) -> None:
    forger = damage is not accident                             # makes another checkpoint, if it makes one
    hunt(damage.__name__, int(count * share), good, tmp_path, damage, use, (lambda found: True) if forger else same(good))
