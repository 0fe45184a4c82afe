"""Checkpoints from disks that fail and from strangers: damaged bytes, and words, headers and boxes forged under checksums that fit."""

import hashlib
import json
import os
import shutil
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

from fuzz.support import accident, cases, forged, hunt, limited, near, plain, spoiled
from megazero.base.errors import UserError
from megazero.plan.layout import Box
from megazero.plan.progress import loss_scale
from megazero.run.generate import build_from_checkpoint, logits
from megazero.settings.config import Optimization
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
    unfit(reader, model().plan.architecture, [p for u in model().plan.units for p in u.parameters], Optimization(), None)
    again = Reader(out)
    assert not list(checkpoints(reader, again))
    assert all(torch.equal(again.read(*key).view(torch.uint8), found["/".join(key)].view(torch.uint8)) for key in reader.shapes)
    text = "".join(p.read_text(errors="replace") for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors")
    assert SECRET not in text and not [p for p in out.rglob("*") if p.is_symlink()], "what lies beside is copied"
    logits(build_from_checkpoint(reader, longest=8), torch.arange(2 * min(3, reader.architecture.seq_length)).view(2, -1))
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


def words(**values: Any) -> Callable[[Path], None]:
    """An index that says otherwise; `a__b` is key b of a."""
    def change(index: dict[str, Any]) -> dict[str, Any]:
        for name, value in values.items():
            holder, *keys = index, *name.split("__")
            for key in keys[:-1]:
                holder = holder[key]
            holder[keys[-1]] = value
        return index
    return lambda folder: reseal(folder, change)


def boxes(**values: Any) -> Callable[[Path], None]:
    """A file whose box of a whole bias says otherwise."""
    def change(folder: Path) -> None:
        path = folder / STEP / RANKS[1]
        old, data = header_of(path), path.read_bytes()
        listed = json.loads(old[8:])
        found = json.loads(listed["__metadata__"]["boxes"])
        found["weight/layers.0.mlp.down.bias"] |= values
        text = json.dumps(listed | {"__metadata__": listed["__metadata__"] | {"boxes": json.dumps(found)}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[len(old):])
        reseal(folder)
    return change


def twice(name: str) -> Callable[[Path], None]:
    """Text of the index or of a header in which a key stands twice; the last is the good one."""
    def change(folder: Path) -> None:
        path = folder / STEP / name
        raw = path.read_bytes()
        head = header_of(path)[8:] if name in RANKS else raw
        text = head.replace(b'"step"', b'"step":"9","step"', 1)
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + len(head):] if name in RANKS else text)
        if name in RANKS:
            reseal(folder)
    return change


def piped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return change


SECRET_HASH = hashlib.sha256(SECRET.encode()).hexdigest()
FORGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file elsewhere": (words(files={"../../x.safetensors": {"bytes": 9, "header_crc32": 9}}), r"a name in files is '../../x.safetensors', not a word like rank-"),
    "a file anywhere": (words(files={"/etc/hostname": {"bytes": 9, "header_crc32": 9}}), "a name in files is '/etc/hostname', not"),
    "a billion layers": (words(architecture__layers=10**9), "architecture.layers is 1000000000, not a whole number from 1 to 100000"),
    "many layers": (words(architecture__layers=99_999), "index.json: cannot be: 99,999 layers of 18 weights"),
    "a step that another word contradicts": (words(step=3), "is of the steps 3, 0, 0 at once"),
    "heads that cannot share": (words(architecture__kv_heads=3), "its 2 heads cannot share 3 key-value heads"),
    "a rotation wider than a head": (words(architecture__rotary={"base": 1e4, "channels": 64}), "its heads of 4 cannot turn 64 channels"),
    "a scaling of half a token": (words(architecture__rotary={"base": 1e4, "channels": 4, "scaling": [8.0, 1.0, 4.0, 8192.5]}), "rotary.original_max_position_embeddings is 8192.5, not a whole number"),
    "more steps applied than made": (words(progress__applied=7), "progress.step is 0, less than the steps that were applied"),
    "more samples than steps could read": (words(progress__samples=2**52), "progress.samples is 4,503,599,627,370,496 after 0 steps"),
    "a scale that is no number": (words(progress__loss_scale__value=float("nan")), "progress.loss_scale.value is nan, not a number"),
    "special ids that are other keys": (words(special_ids={"num_hidden_layers": 1}), "special_ids.'num_hidden_layers' is 1"),
    "special ids that are none": (words(special_ids={"eos_token_id": []}), r"special_ids.'eos_token_id' is \[\]"),
    "depth": (words(config={"a": eval("[" * 90 + "]" * 90)}), r"config.a\[0\] is \[\[\[.*, not"),
    "a key twice": (twice(INDEX), "index.json: cannot be read .key 'step' stands twice"),
    "a key twice in a header": (twice(RANKS[1]), "rank-00001.safetensors: key 'step' stands twice"),
    "a box of 2^38 rows": (boxes(full=[2**38], size=[2**38]), "rank-00001.safetensors: 'weight/layers.0.mlp.down.bias' is not what its box says"),
    "a tensor of 2^38 rows": (boxes(full=[2**38], size=[8]), "'weight/layers.0.mlp.down.bias' is not what its box says"),
    "a box beyond its tensor": (boxes(offset=[1]), "the box of 'weight/layers.0.mlp.down.bias' is not inside its tensor"),
    "a tensor of no dimension": (boxes(full=[], offset=[], size=[], crc32=[]), "is no tensor of a model"),
    "checksums of nothing": (boxes(crc32=[]), "has checksums that none could have"),
    "a checksum that is no number": (boxes(crc32=[-1]), "has checksums that none could have"),
    "a name that leads elsewhere": (boxes(name="../x y"), "boxes.weight/layers.0.mlp.down.bias.name is '../x y', not"),
    "a pipe for a file": (piped(f"{STEP}/{RANKS[0]}"), "rank-00000.safetensors: has 0 bytes instead of"),
    "a pipe for an index": (piped(f"{STEP}/{INDEX}"), "holds no complete checkpoint"),
    "a pipe for a tokenizer": (piped("tokenizer/characters.json"), "characters.json: cannot be read .is not a regular file.; restore it"),
    "a tokenizer's file elsewhere": (words(tokenizer__files={"../../secret": SECRET_HASH}), "cannot hold a tokenizer's file '../../secret'"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_be_is_one_sentence(name: str, good: Path, tmp_path: Path) -> None:
    forge, sentence = FORGED[name]
    forge(Path(shutil.copytree(good, tmp_path / "run")))
    with limited(10, 2**30), pytest.raises(UserError, match=sentence) as caught:
        use(tmp_path / "run")
    assert plain(caught.value) and not (tmp_path / "merged").exists()


def test_a_merge_copies_only_what_was_kept(good: Path, tmp_path: Path) -> None:
    """Not what lies beside, nor what a link points at unless it is the very file."""
    shutil.copytree(good, tmp_path / "run")
    kept_, target = tmp_path / "elsewhere.json", tmp_path / "run" / "tokenizer" / "characters.json"
    target.rename(kept_)
    target.symlink_to(kept_)
    (tmp_path / "run" / "tokenizer" / "more").symlink_to("/etc")
    merge(Reader(tmp_path / "run"), tmp_path / "one")
    assert [(p.name, p.is_symlink(), p.read_bytes()) for p in (tmp_path / "one" / "tokenizer").iterdir()] == [("characters.json", False, kept_.read_bytes())]
    kept_.write_text(SECRET)
    with pytest.raises(UserError, match="characters.json: is not the tokenizer file that was kept here"):
        merge(Reader(tmp_path / "run"), tmp_path / "two")
