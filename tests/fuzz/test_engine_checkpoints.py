"""Checkpoints of an engine from disks that fail and from strangers: what they hold, or a sentence and an engine that is as it was."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import megazero
from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.base.errors import UserError
from megazero.state.checkpoint import INDEX, facts, text_checksum
from megazero.state.tensor_files import header_of

TAG, FILE = "global_step2", "rank-00000.safetensors"
CONFIG = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "zero_optimization": {"stage": 3},
          "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}, "bf16": {"enabled": True}}
CLIENT = {"epoch": 3, "best": float("inf"), "seen": torch.arange(4), "deep": {"names": ["a", None, 0.5], 7: {"x": (1, torch.ones(()))}}}


class Keeping(nn.Module):
    """Keeps something of its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.register_buffer("count", torch.zeros(2))
        self.kept: Any = {"a": 1}

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def engine(seed: int) -> Any:
    torch.manual_seed(seed)
    made = megazero.initialize(model=Keeping(), config=CONFIG)[0]
    for _ in range(2):
        made.backward(made(torch.rand(2, 3)))
        made.step()
    return made


@cache
def reading() -> Any:
    return engine(1)


def state(e: Any) -> list[Any]:
    tensors = [t.clone() for t in e.module_state_dict().values() if isinstance(t, torch.Tensor)]
    moments = [t.clone() for own in e.optimizer.state_dict()["state"].values() for t in own.values()]
    return [*tensors, *moments, torch.tensor([*e.get_lr(), e.global_steps, e.global_samples], dtype=torch.float64), repr(e.module.kept),
            repr(e.lr_scheduler.state_dict())]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    engine(0).save_checkpoint(folder, client_state=CLIENT)
    return folder


def use(folder: Path) -> tuple[list[Any], str]:
    """What it is after loading, and the script's words; if it cannot be loaded, it is what it was."""
    e = reading()
    before = state(e)
    try:
        path, client = e.load_checkpoint(folder)
    except UserError as error:
        assert "holds a part of it" in str(error) or equal(state(e), before), "a load that failed changed something"
        raise
    return state(e), repr(client) if path else "none"


def resealed(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / TAG
    index = change(json.loads((path / INDEX).read_text()))
    index["files"] = {FILE: facts(path / FILE, header_of(path / FILE))}
    (path / INDEX).write_text(json.dumps(index | {"crc32": text_checksum(index)}))


def forge(rng: Random, folder: Path) -> str:
    """What the index says of the module, of the run or of all, under a checksum that fits; or the note of the newest."""
    what, notes = rng.choice(("module", "module", "training", "client", "all", "latest")), []

    def change(index: dict[str, Any]) -> dict[str, Any]:
        if what == "all":
            fixed = {k: index[k] for k in ("format", "version")}
            found, how = forged(rng, {k: v for k, v in index.items() if k not in (*fixed, "files", "crc32")})
            notes.append(how)
            return {**fixed, **(found if isinstance(found, dict) else {})}
        inner = index["module"] if what == "module" else index["module"][what]
        found, how = forged(rng, inner)
        notes.append(how)
        return index | {"module": found if what == "module" else index["module"] | {what: found}}

    if what == "latest":
        text, how = spoiled(rng, TAG)
        (folder / "latest").write_bytes(text)
        return f"latest: {how}"
    resealed(folder, change)
    return f"{what}: {notes[0]}"


@pytest.mark.parametrize(("damage", "share"), [(accident, 0.4), (forge, 0.6)])
@cases(200, 2500)
def test_no_engine_checkpoint_is_believed(damage: Callable[[Random, Path], str], share: float, count: int, good: Path, tmp_path: Path) -> None:
    wanted = use(good)
    right: Callable[[Any], bool] = lambda found: damage is forge or found[1] == "none" or (equal(found[0], wanted[0]) and found[1] == wanted[1])  # noqa: E731
    hunt(f"engine {damage.__name__}", int(count * share), good, tmp_path, damage, use, right)
