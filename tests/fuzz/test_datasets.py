"""Datasets from disks that fail and from strangers: damaged files, forged entries of the index, forged words of the sidecar."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.corpus.edit import document_lengths, merge_datasets, split_dataset
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.corpus.verify import problems
from megazero.data.dataset import Reading, open_stages
from megazero.data.indexed import IndexedDataset

S, D = 18, 20                   # sequences and documents of the dataset; some are empty
FIELDS = {"dtype": (17, "<b"), "sequences": (18, "<q"), "boundaries": (26, "<q"), **{f"length {i}": (34 + 4 * i, "<i") for i in range(S)},
          **{f"offset {i}": (34 + 4 * S + 8 * i, "<q") for i in range(S)}, **{f"document {i}": (34 + 12 * S + 8 * i, "<q") for i in range(D + 1)}}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    lines = [json.dumps({"text": "" if i % 11 == 5 else "word " * (1 + i * 7 % 13)}) for i in range(D)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    preprocess(PreprocessSettings((str(folder / "in.jsonl"),), str(folder / "set" / "d"), "ByteTokenizer", append_eod=True))
    for path in (folder / "set").iterdir():
        path.rename(path.with_name("d" + path.suffix))
    assert struct.unpack("<QQ", (folder / "set" / "d.idx").read_bytes()[18:34]) == (S, D + 1)
    return folder / "set"


def use(folder: Path) -> tuple[list[str], list[list[int]]]:
    """All that is done with a dataset: looked through, read, trained on, merged and cut. What verify says, and its documents."""
    prefix, out = str(folder / "d"), folder.parent
    said, dataset = list(problems(prefix)), IndexedDataset(prefix)
    assert all(prefix in sentence and sentence.endswith(".") and sentence.isprintable() for sentence in said), said
    found = [dataset.document(i).tolist() for i in range(dataset.document_count)]
    assert [n for lengths in document_lengths(dataset) for n in lengths] == list(map(len, found))
    for megatron in (False, True):
        samples = open_stages([(0, [prefix])], "80,20", "train", Reading(16, 1, True, megatron, 20), 257)
        assert all(len(samples.sample(k)) == 17 for k in range(20))
    merged = merge_datasets([prefix, prefix], str(out / "twice"))
    assert [merged.document(i).tolist() for i in range(merged.document_count)] == found * 2
    parts = split_dataset(prefix, str(out / "part"), "50,50")
    assert sum(part.token_count for part in parts) == dataset.token_count
    return said, found


def damage(rng: Random, folder: Path) -> str:
    kind = rng.choice(("accident", "field", "field", "forged", "spoiled"))
    if kind == "accident":
        return accident(rng, folder)
    if kind == "field":
        name, (at, form) = rng.choice(list(FIELDS.items()))
        value = rng.choice((-1, -5, 0, 3, 20, 200, 2**20, 2**31 - 1, *([2**40, 2**62, -2**63] if form == "<q" else [])))
        raw = bytearray((folder / "d.idx").read_bytes())
        struct.pack_into(form, raw, at, value % 100 if form == "<b" else value)
        (folder / "d.idx").write_bytes(raw)
        return f"{name} is {value}"
    words = json.loads((folder / "d.json").read_text())
    found, what = forged(rng, words) if kind == "forged" else spoiled(rng, words)
    (folder / "d.json").write_bytes(json.dumps(found).encode() if kind == "forged" else found)      # type: ignore[arg-type]
    return what


@cases(300, 3000)
def test_datasets(count: int, good: Path, tmp_path: Path) -> None:
    """What verify passes is what was written; what it does not pass may be read, as other tokens, or is a sentence."""
    (tmp_path / "untouched").mkdir()
    said, expected = use(good.rename(tmp_path / "untouched" / "set"))
    (tmp_path / "untouched" / "set").rename(good)
    assert said == []

    def right(found: Any) -> bool:
        return bool(found[0]) or found[1] == expected

    hunt("dataset", count, good, tmp_path, damage, use, right)
