"""Checkpoints of each released format, committed as they were written: they load, go on, merge and become Hugging Face's for ever."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import lines, tool, train

from megazero.state.checkpoint import Reader

FOLDERS = sorted((Path(__file__).parent / "checkpoints").iterdir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: Any) -> Path:
    return Path(request.param)


def told(folder: Path) -> Any:
    return json.loads((folder / "provenance.json").read_text())


def test_every_byte_is_as_it_was(folder: Path) -> None:
    reader = Reader(folder)
    assert reader.verify() > 0 and reader.index["step"] == told(folder)["then"][0][0] - 1


def test_a_run_goes_on_as_it_did(folder: Path, tmp_path: Path) -> None:
    train(f"{told(folder)['words']} --load {folder}", tmp_path)
    found = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(tmp_path)]
    assert found == [pytest.approx(tuple(then), rel=1e-10, abs=0) for then in told(folder)["then"]]


def test_it_merges_and_exports(folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    code, _, error = tool(monkeypatch, capsys, "checkpoint.py", "merge", "--load", folder, "--output", tmp_path / "one", "--optimizer")
    assert code == 0, error
    many, one = Reader(folder), Reader(tmp_path / "one")
    assert many.shapes == one.shapes and all(torch.equal(many.read(*key), one.read(*key)) for key in many.shapes)
    code, _, error = tool(monkeypatch, capsys, "convert_hf.py", "export", "--load", folder, "--output", tmp_path / "hf")
    assert code == 0, error
    code, _, error = tool(monkeypatch, capsys, "convert_hf.py", "import", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert code == 0, error
    back = Reader(tmp_path / "back")
    assert back.index["family"] == "llama", "whose weights it was imported from"
    for kind, name in many.shapes:
        if kind == "weight":
            assert torch.allclose(back.read(kind, name).double(), many.read(kind, name), rtol=1e-7)
