"""ds_config.json files that nobody should have written: what they mean on two ranks, or a sentence."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ds_configs import TUTORIALS

from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.engine.rates import SCHEDULES
from megazero.engine.words import Meaning, meaning

GOOD = [config for config, wrong in TUTORIALS.values() if wrong is None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "of"
    folder.mkdir()
    (folder / "ds.json").write_text(json.dumps(GOOD[0]))
    return folder


def damage(rng: Random, folder: Path) -> str:
    config, kind = rng.choice(GOOD), rng.choice(("accident", "forged", "forged", "forged", "spoiled"))
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    if kind == "accident":
        return accident(rng, folder)
    found, what = forged(rng, config) if kind == "forged" else spoiled(rng, config)
    path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    return what


def use(folder: Path) -> Meaning:
    return meaning(next(folder.iterdir(), folder / "ds.json"), 1, cuda=False)


def right(found: Any) -> bool:
    """Its numbers are numbers, of a size that a step can have; its schedule gives rates."""
    assert isinstance(found, Meaning)
    rates = [SCHEDULES[found.schedule[0]](i, 0.1, {k: 0.1 if isinstance(v, list) else v for k, v in found.schedule[1].items()})
             for i in (-1, 0, 7, 10**6)] if found.schedule else []
    return found.batch == found.micro_batch * found.accumulation >= 1 and all(map(math.isfinite, (*rates, found.clip, found.scale.value)))


@cases(350, 3500)
def test_ds_configs(count: int, good: Path, tmp_path: Path) -> None:
    assert right(use(good))
    hunt("ds_config", count, good, tmp_path, damage, use, right)
