"""Configuration files that nobody should have written: a configuration comes of them, or a sentence."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.settings.command_line import flatten
from megazero.settings.config import Config, from_command_line

WORDS = {"num_layers": 2, "hidden_size": 64, "seq-length": 24, "lr": 1e-2, "mock_data": True, "split": "969,30,1", "data_path": ["0.5", "a", "0.5", "b"],
         "optimizer": {"adam_beta1": 0.9, "weight_decay": 0.1, "clip_grad": 1.0}, "parallel": {"tp": 2, "pp": 1}, "save": None, "dtype": "bf16"}
NAMES = ("c.json", "c.yaml", "c.toml")


def toml(words: dict[str, Any]) -> str:
    tables = {k: v for k, v in words.items() if isinstance(v, dict)}
    plain = "".join(f"{k} = {json.dumps(v)}\n" for k, v in words.items() if k not in tables and v is not None)
    return plain + "".join(f"[{k}]\n" + "".join(f"{a} = {json.dumps(b)}\n" for a, b in v.items()) for k, v in tables.items())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "of"
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(WORDS))
    (folder / "c.yaml").write_text(json.dumps(WORDS, indent=1))         # JSON is YAML
    (folder / "c.toml").write_text(toml(WORDS))
    return folder


def damage(rng: Random, folder: Path) -> str:
    kind, name = rng.choice(("accident", "forged", "forged", "forged", "spoiled")), rng.choice(NAMES)
    for other in set(NAMES) - {name}:
        (folder / other).unlink()
    if kind == "accident":
        return accident(rng, folder)
    found, what = forged(rng, WORDS) if kind == "forged" else spoiled(rng, WORDS)
    if isinstance(found, bytes):
        (folder / name).write_bytes(found)
    else:
        (folder / name).write_text(toml(found) if name.endswith("toml") and isinstance(found, dict) else json.dumps(found), errors="replace")
    return f"{name}: {what}"


def use(folder: Path) -> list[Config]:
    """What the files say."""
    return [replace(from_command_line(["--config", str(path)]), config=None) for path in folder.iterdir()]


@cases(350, 3500)
def test_configurations(count: int, good: Path, tmp_path: Path) -> None:
    expected, *others = use(good)
    assert others == [expected] * 2 and expected.model.hidden_size == 64

    def right(found: Any) -> bool:
        return all(isinstance(c, Config) and json.dumps(flatten(c)) for c in found)

    hunt("configuration", count, good, tmp_path, damage, use, right)
