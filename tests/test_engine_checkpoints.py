"""Checkpoints of an engine: from any number of ranks and level to any other, all that it takes to go on, and what does not fit."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import LENGTH, VOCABULARY, Oddities
from pool import Pool, RankError, _free_port
from support import TINY, tool
from support import train as train_gpt
from torch import nn

import megazero
from megazero.base.errors import UserError
from megazero.comm.wires import connect
from megazero.engine import names
from megazero.engine.values import packed, unpacked
from megazero.plan.mesh import Mesh
from megazero.state import Reader, saving

Tensor = torch.Tensor
BATCH, GAS, STEPS = 12, 2, 6
CONFIG = {"train_batch_size": BATCH, "gradient_accumulation_steps": GAS, "gradient_clipping": 0.5,
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
          "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 12, "warmup_num_steps": 3}}}
CLIENT = {"epoch": 3, "best": float("inf"), "nothing": None, "names": ["a", "b"], "seen": torch.arange(5), "deep": {"x": [torch.tensor(1.5), True]}}


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


def data(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def loss(e: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(e(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Vectors do not decay and have a rate of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-3}]


def made(level: int, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = Oddities("none")
    return megazero.initialize(model=model, model_parameters=groups(model), config={**CONFIG, "zero_optimization": {"stage": level}, **more})[0]


def train(e: Any, steps: range) -> None:
    for step in steps:
        n = GAS * e.world_size
        for ids in data(step).chunk(n)[e.global_rank * GAS:(e.global_rank + 1) * GAS]:
            e.backward(loss(e, ids))
            e.step()


def state(e: Any) -> dict[str, Any]:
    """Everything that goes on, whole."""
    moments = e.optimizer.state_dict()
    return {**{f"weight {n}": t.double().clone() for n, t in e.module_state_dict().items() if not n.endswith("seen")},
            **{f"{m} {i}": t.double().clone() for i, own in moments["state"].items() for m, t in own.items()},
            "lr": torch.tensor(e.get_lr(), dtype=torch.float64), "count": torch.tensor([e.global_steps, e.skipped_steps, e.global_samples])}


def saved(folder: Path, level: int, **more: Any) -> dict[str, Any]:
    e = made(level, **more)
    train(e, range(STEPS // 2))
    e.save_checkpoint(folder, client_state=CLIENT)
    before = state(e)
    train(e, range(STEPS // 2, STEPS))
    return {"before": before, "after": state(e)}


def resumed(folder: Path, level: int, **more: Any) -> dict[str, Any]:
    e = made(level, seed=5, **more)
    train(e, range(1))                                          # what it had is gone
    path, client = e.load_checkpoint(folder)
    assert path == str(folder / f"global_step{STEPS // 2}")
    before = state(e)
    train(e, range(STEPS // 2, STEPS))
    return {"before": before, "after": state(e), "client": client, "buffer": e.module.blocks[0].seen.clone()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(("world", "level", "into"), [(2, 3, [(1, 0), (3, 1), (2, 2)]), (1, 0, [(2, 3)]), (3, 1, [(2, 2), (3, 3)])])
def test_any_ranks_and_level_go_on_as_if_nothing_had_happened(tmp_path: Path, pool: Pool, world: int, level: int, into: list[tuple[int, int]]) -> None:
    want = run(pool, world, saved, tmp_path, level)[0]
    alone = run(pool, 1, saved, tmp_path / "alone", 0)[0]
    equal(want["after"], alone["after"])
    for ranks, other in into:
        for got in run(pool, ranks, resumed, tmp_path, other):
            equal(got["before"], want["before"], 0)
            equal(got["after"], want["after"])
            assert {k: v for k, v in got["client"].items() if k not in ("seen", "deep")} == {k: v for k, v in CLIENT.items() if k not in ("seen", "deep")}
            assert got["client"]["seen"].tolist() == [0, 1, 2, 3, 4] and got["client"]["deep"]["x"][0].shape == ()


@pytest.mark.parametrize(("kind", "kinds"), [("Muon", {"momentum_buffer", "exp_avg", "exp_avg_sq"}), ("Adafactor", {"row_var", "col_var", "variance"})])
def test_what_is_kept_otherwise_goes_on_too(kind: str, kinds: set[str], tmp_path: Path, pool: Pool) -> None:
    more = {"optimizer": {"type": kind, "params": {"lr": 1e-2}}}
    want = pool.run(2, with_optimizer, saved, tmp_path, 3, more)[0]
    assert {name.split()[0] for name in want["before"]} == {"weight", "lr", "count", "step", *kinds}
    for got in pool.run(3, with_optimizer, resumed, tmp_path, 1, more):
        equal(got["before"], want["before"], 0)
        equal(got["after"], want["after"])


def with_optimizer(function: Callable[..., Any], folder: Path, level: int, more: dict[str, Any]) -> Any:
    return function(folder, level, **more)


def run(pool: Pool, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return pool.run(world, function, *arguments) if world > 1 else [function(*arguments)]


def halves(folder: Path, level: int) -> Any:
    """In fp16 with a scale that moves; torch's own scheduler on the client's optimizer."""
    def begin() -> Any:
        torch.manual_seed(0)
        model = Oddities("none").float()
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-2, total_steps=20)
        config = {"train_batch_size": BATCH, "gradient_accumulation_steps": GAS, "zero_optimization": {"stage": level},
                  "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}}
        return megazero.initialize(model=model, optimizer=adam, lr_scheduler=scheduler, config=config)[0]

    one = begin()
    train(one, range(12))
    assert 0 < one.skipped_steps < 10, "some steps should overflow"
    one.save_checkpoint(folder, "a.tag")
    scale = one.core.scale
    train(one, range(12, 15))
    two = begin()
    two.load_checkpoint(folder)
    assert two.core.scale == scale
    train(two, range(12, 15))
    return one, two


@pytest.mark.parametrize("level", [1, 3])
def test_fp16_goes_on_bit_for_bit_with_its_scale_and_a_scheduler_of_torch(tmp_path: Path, level: int) -> None:
    one, two = halves(tmp_path, level)
    equal(state(two), state(one), 0)
    assert (tmp_path / "latest").read_text() == "a.tag"
    assert {Reader(tmp_path).dtype("weight", n) for _, n in Reader(tmp_path).shapes if n == "head.weight"} == {torch.float32}


def of_transformers(folder: Path, level: int) -> dict[str, Tensor]:
    import transformers
    torch.manual_seed(3)
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=LENGTH, vocab_size=VOCABULARY)
    e = megazero.initialize(model=transformers.GPT2LMHeadModel(config), config={**CONFIG, "bf16": {"enabled": True}, "zero_optimization": {"stage": level}})[0]
    e.eval()
    train(e, range(2))
    assert e.save_16bit_model(folder, "pytorch_model.bin") and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    consolidated = e._zero3_consolidated_16bit_state_dict()
    assert (consolidated is None) == (e.global_rank > 0)
    whole = {n: t.detach().clone() for n, t in e.module_state_dict().items()}
    for name, t in (consolidated or {}).items():
        assert torch.equal(whole[name], t)
    return whole


@pytest.mark.parametrize(("world", "level"), [(2, 3), (1, 1)])
def test_from_pretrained_reads_the_weights(tmp_path: Path, pool: Pool, world: int, level: int) -> None:
    transformers = pytest.importorskip("transformers")
    want = run(pool, world, of_transformers, tmp_path, level)[0]
    got = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_frozen_parameters_may_be_left_out_and_other_modules_take_what_fits(tmp_path: Path) -> None:
    e = made(0)
    train(e, range(1))
    e.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    assert not any("frozen" in n for _, n in Reader(tmp_path).shapes)
    other = made(1, seed=9)
    frozen = other.module.blocks[0].frozen.clone()
    other.load_checkpoint(tmp_path)
    assert torch.equal(other.module.blocks[0].frozen, frozen) and torch.equal(other.module.head.weight, e.module.head.weight)
    wide = megazero.initialize(model=Wider(), config=CONFIG)[0]
    with pytest.raises(UserError, match=r"give load_module_strict=False to take what has the same name and shape"):
        wide.load_checkpoint(tmp_path, load_module_only=True)
    more = wide.module.more.weight.clone()
    assert wide.load_checkpoint(tmp_path, load_module_strict=False, load_module_only=True)[1] == {}
    assert torch.equal(wide.module.head.weight, e.module.head.weight) and torch.equal(wide.module.more.weight, more) and wide.global_steps == 0


class Wider(Oddities):
    def __init__(self) -> None:
        super().__init__("none")
        self.more = nn.Linear(3, 3).double()


def test_weights_alone_leave_the_optimizer_as_it_is(tmp_path: Path) -> None:
    e = made(2)
    train(e, range(2))
    e.save_checkpoint(tmp_path)
    other = made(2, seed=9)
    other.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert other.global_steps == 2 and not any(t.any() for _, own in other.core.moments() for t in own.values())
    assert torch.equal(other.module.head.weight, e.module.head.weight) and other.get_lr() != e.get_lr()
    given = e.optimizer.state_dict()
    other.optimizer.load_state_dict(given)
    equal(state(other), state(e), 0)


def fake(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"PK")


WRONG: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "no folder": (lambda e, f: e.load_checkpoint(f / "nowhere"), r"load_checkpoint .*nowhere: there is no such folder\."),
    "another tag": (lambda e, f: e.load_checkpoint(f / "there", "other"), "has no complete checkpoint 'other'; there are global_step1, mine"),
    "a tag that leads out": (lambda e, f: e.save_checkpoint(f, "../up"), r"the tag '\.\./up' is no name of a folder"),
    "a tag of ours": (lambda e, f: e.save_checkpoint(f, "draft-1"), "the tag 'draft-1' is no name of a folder"),
    "what is pickled": (lambda e, f: e.save_checkpoint(f, client_state={"a": [{"b": object()}]}), r"save_checkpoint.client.a\[0\].b: is a object, which could"),
    "a tuple for a key": (lambda e, f: e.save_checkpoint(f, client_state={"a": {(1, 2): 2}}), r"save_checkpoint.client.a: has the key \(1, 2\); name it by"),
    "a key of ours": (lambda e, f: e.save_checkpoint(f, client_state={"$tensor": 2}), r"save_checkpoint.client: has the key .*\$tensor"),
    "DeepSpeed's": (lambda e, f: (fake(f, "global_step1/mp_rank_00_model_states.pt"), e.load_checkpoint(f)), "is a checkpoint of DeepSpeed; import it first: python tools/convert_checkpoint.py import --input"),
    "latest without its folder": (lambda e, f: ((f / "latest").write_text("gone\n"), e.load_checkpoint(f)), "has no complete checkpoint 'gone'; there is none"),
    "a latest that leads out": (lambda e, f: ((f / "latest").write_text("../there\n"), e.load_checkpoint(f)), "latest: cannot be read"),
    "other groups": (lambda e, f: megazero.initialize(model=Oddities("none"), config=CONFIG)[0].load_checkpoint(f / "there"),
                     "has 2 groups of parameters, there are 1 now, and group 0 differs"),
    "another optimizer": (lambda e, f: made(0, optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}).load_checkpoint(f / "there"),
                          "was saved with adam, and has no momentum_buffer"),
    "a file": (lambda e, f: ((f / "x").write_text("x"), e.save_checkpoint(f / "x")), "save_checkpoint .*x: cannot be written to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_and_changes_nothing(tmp_path: Path, case: str) -> None:
    act, said = WRONG[case]
    e = made(0)
    train(e, range(1))
    e.save_checkpoint(tmp_path / "there")
    e.save_checkpoint(tmp_path / "there", "mine", save_latest=False)
    before = state(e)
    with pytest.raises(UserError, match=said) as told:
        act(e, tmp_path)
    assert "\n" not in str(told.value) or case == "another optimizer"
    equal(state(e), before, 0)
    assert e.load_checkpoint(tmp_path / "there")[0] == str(tmp_path / "there" / "global_step1")


def test_a_folder_without_checkpoints_is_told_and_nothing_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made(0).load_checkpoint(tmp_path) == (None, {})
    assert f"load_checkpoint {tmp_path}: holds no checkpoint; going on as it is" in capsys.readouterr().out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_call_to_the_disk_one_of_two_checkpoints_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The second save, of the same tag or of another, is killed at each rename, open and sync."""
    e = made(1)
    train(e, range(1))
    point, ended = 0, False
    while not ended:
        folder = tmp_path / str(point)
        e.save_checkpoint(folder, "one")
        head = e.module.head.weight.clone()
        train(e, range(1))
        left = point

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def maybe(*given: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return call(*given, **named)
            return maybe

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")):
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                e.save_checkpoint(folder, "one" if again else "two")
                ended = True
            except Killed:
                pass
        new = e.module.head.weight.clone()
        other = made(0, seed=4)
        other.load_checkpoint(folder)
        assert any(torch.equal(other.module.head.weight, w) for w in (head, new)) and (not ended or torch.equal(other.module.head.weight, new))
        e.save_checkpoint(folder, "one")
        assert sorted(p.name for p in folder.iterdir() if "draft" in p.name or "before" in p.name) == []
        point += 1
    assert point > 5


def test_the_tools_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    e = made(0)
    train(e, range(2))
    e.save_checkpoint(tmp_path / "a", client_state=CLIENT)
    train(e, range(1))
    e.save_checkpoint(tmp_path / "a", client_state=CLIENT)
    a, b = tmp_path / "a" / "global_step2", tmp_path / "a" / "global_step3"
    code, out, _ = tool(monkeypatch, capsys, "checkpoint.py", "inspect", "--load", tmp_path / "a")
    assert code == 0 and re.search(r"^step +3$", out, re.MULTILINE) and "blocks.0.seen" in out
    assert tool(monkeypatch, capsys, "checkpoint.py", "verify", "--load", tmp_path / "a", "--ckpt-step", 2)[0] == 0
    assert tool(monkeypatch, capsys, "checkpoint.py", "diff", a, a)[0] == 0 and tool(monkeypatch, capsys, "checkpoint.py", "diff", a, b)[0] == 1
    for words, kinds in ((["--optimizer"], {"weight", "buffer", "state", "exp_avg", "exp_avg_sq"}), ([], {"weight", "buffer"})):
        out_dir = tmp_path / f"merged{len(words)}"
        assert tool(monkeypatch, capsys, "checkpoint.py", "merge", "--load", tmp_path / "a", "--output", out_dir, *words)[0] == 0
        assert Reader(out_dir).kinds == kinds
        other = made(1, seed=8)
        path, client = other.load_checkpoint(out_dir)
        assert path and torch.equal(other.module.head.weight, e.module.head.weight) and bool(client) == bool(words)
        if words:
            equal(state(other), state(e), 0)
    for name in ("generate.py", "convert_hf.py"):
        words = ("--load", tmp_path / "a", "--prompt", "x") if name == "generate.py" else ("export", "--load", tmp_path / "a", "--output", tmp_path / "hf")
        code, _, err = tool(monkeypatch, capsys, name, *words)
        assert code == 2 and "holds a module that megazero.initialize trained" in err


def test_values_come_back() -> None:
    tensors: dict[str, Tensor] = {}
    words = json.loads(json.dumps(packed({**CLIENT, "tuple": (1, 2.5), "nan": float("nan"), "empty": torch.empty(0, 3), "half": torch.ones(2).half()}, "x", tensors)))
    back = unpacked(words, tensors.__getitem__)
    assert back["tuple"] == [1, 2.5] and back["nan"] != back["nan"] and back["best"] == float("inf") and back["empty"].shape == (0, 3)
    assert back["half"].dtype == torch.float16 and back["deep"]["x"][0] == 1.5 and back["names"] == ["a", "b"]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "a lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "two in turn": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                                                                       torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)], [2]),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedulers_of_torch_go_on(tmp_path: Path, kind: str) -> None:
    def begin() -> Any:
        torch.manual_seed(0)
        model = Oddities("none")
        adam = torch.optim.AdamW(groups(model), lr=1e-2)
        words = {k: v for k, v in CONFIG.items() if k not in ("optimizer", "scheduler")}
        return megazero.initialize(model=model, optimizer=adam, lr_scheduler=SCHEDULES[kind], config=words)[0]

    one, two = begin(), begin()
    train(one, range(3))
    one.save_checkpoint(tmp_path)
    two.load_checkpoint(tmp_path)
    assert two.get_lr() == one.get_lr()
    for e in (one, two):
        train(e, range(3, 6))
    equal(state(two), state(one), 0)


def test_another_scheduler_begins_anew_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    e = made(0)
    train(e, range(2))
    e.save_checkpoint(tmp_path)
    other = made(0, scheduler={"type": "WarmupLR", "params": {}})
    other.load_checkpoint(tmp_path)
    assert "the scheduler was WarmupDecayLR, is WarmupLR, and begins anew" in capsys.readouterr().out and other.get_lr() == e.get_lr()


class Keeps(Oddities):
    """A part of it keeps something of its own."""

    def __init__(self) -> None:
        super().__init__("none")
        self.note: Any = None

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def test_what_a_module_keeps_of_its_own_and_keys_of_numbers(tmp_path: Path) -> None:
    one, two = (megazero.initialize(model=Keeps(), config=CONFIG)[0] for _ in range(2))
    one.module.note = {3: torch.ones(2), "x": {None: 1.5}}
    one.save_checkpoint(tmp_path, client_state={0: {1: "one"}})
    assert two.load_checkpoint(tmp_path)[1] == {0: {1: "one"}} and two.module.note[3].tolist() == [1, 1] and two.module.note["x"] == {None: 1.5}


def test_what_no_engine_saved_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    e = made(0)
    with pytest.raises(UserError, match="mine is there already, and no engine of megazero saved it; give another tag"):
        e.save_checkpoint(tmp_path, "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def full_disk(folder: Path) -> str:
    """Rank 1 cannot write its file; both are told, and train on."""
    e = made(2)
    train(e, range(1))
    e.save_checkpoint(folder, "good")
    target = folder / "bad"
    before = os.fsync
    if e.global_rank == 1:
        def fsync(handle: int) -> None:
            raise OSError(28, "No space left on device")
        os.fsync = fsync
    try:
        with pytest.raises(UserError) as told:
            e.save_checkpoint(folder, "bad")
    finally:
        os.fsync = before
    train(e, range(1, 2))
    assert not target.exists() and e.load_checkpoint(folder)[0] == str(folder / "good")
    e.save_checkpoint(folder, "bad")
    return str(told.value)


def test_a_full_disk_of_one_rank_is_told_by_all(tmp_path: Path, pool: Pool) -> None:
    for said in pool.run(2, full_disk, tmp_path):
        assert said == f"save_checkpoint {tmp_path / 'bad'}: cannot be written (No space left on device); the checkpoints before it are untouched."


def test_forged_words_are_one_sentence(tmp_path: Path) -> None:
    """What an index says of a module is not believed."""
    from megazero.state.checkpoint import text_checksum
    e = made(0)
    e.save_checkpoint(tmp_path, client_state={"x": torch.ones(3), "y": float("nan")})
    path = tmp_path / "global_step0" / "index.json"
    index = json.loads(path.read_text())
    for wrong in ({"client": {"x": {"$tensor": "0", "shape": [2**40], "dtype": "float32"}}}, {"client": {"x": {"$tensor": "7", "shape": [3], "dtype": "float32"}}},
                  {"client": {"x": {"$float": "1e999"}}}, {"client": {"x": {"$pairs": [[[], 1]]}}}, {"client": {"x": {"$other": 1}}}, {"client": []}, {"excluded": 3},
                  {"training": {}}, {"training": {**index["module"]["training"], "groups": [{"parameters": 3, "options": {}}]}}):
        forged = {**index, "module": {**index["module"], **wrong}}
        path.write_text(json.dumps({**forged, "crc32": text_checksum(forged)}))
        with pytest.raises(UserError, match="global_step0: cannot be"):
            e.load_checkpoint(tmp_path)


def test_ranks_with_other_tags_are_told(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(RankError, match="ranks give different tags, here "):
        pool.run(2, other_tags, tmp_path)


def other_tags(folder: Path) -> None:
    e = made(1)
    e.save_checkpoint(folder, f"tag{e.global_rank}")


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["megazero.engine.initialize", "torch._dynamo", "pytest"])


def dies(rank: int, port: int, folder: Path) -> None:
    """One of two ranks; the second is killed in the middle of its file, while the same tag is saved again."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    e = made(3)
    train(e, range(1))
    e.save_checkpoint(folder, "same")
    train(e, range(1, 2))

    def torn(path: Path, *_: Any) -> None:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        saving.stream = torn
    e.save_checkpoint(folder, "same")


def test_a_rank_that_is_killed_leaves_what_was_there(tmp_path: Path) -> None:
    """The other one ends at once; the next to save takes the folder over and sweeps it."""
    port = _free_port()
    ranks = [SERVER.Process(target=dies, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    e, alone = made(1, seed=4), made(0)
    assert e.load_checkpoint(tmp_path)[0] == str(tmp_path / "same") and Reader(tmp_path).verify() > 0
    train(alone, range(1))
    equal(state(e), state(alone))
    e.save_checkpoint(tmp_path, "same")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "same"]


def test_a_tag_may_be_a_number(tmp_path: Path) -> None:
    e = made(0)
    e.save_checkpoint(tmp_path, 7)
    assert e.load_checkpoint(tmp_path, 7)[0] == str(tmp_path / "7")


def test_a_run_does_not_begin_in_an_engines_folder(tmp_path: Path) -> None:
    """Nor go on from it: --load and --save of one folder begin afresh in an empty one alone."""
    made(0).save_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds a module that megazero.initialize trained"):
        train_gpt(f"{TINY} --load {tmp_path} --save {tmp_path}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step0", "latest"]


def test_what_goes_on_otherwise_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options and clipping that differ; the group's own options are those that were saved."""
    e = made(0)
    train(e, range(1))
    e.save_checkpoint(tmp_path)
    other = made(0, gradient_clipping=0.25, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-7, "weight_decay": 0.2}})
    capsys.readouterr()
    other.load_checkpoint(tmp_path)
    told = capsys.readouterr().out
    assert other.optimizer.param_groups[0]["weight_decay"] == e.optimizer.param_groups[0]["weight_decay"] != 0.2
    assert f"weight_decay of group 0 is {e.optimizer.param_groups[0]['weight_decay']} as saved, not 0.2" in told and "eps of group 1 is" in told
    assert f"gradient_clipping was {e.meaning.clip} and is 0.25" in told and "weight_decay of group 1" not in told and "lr of" not in told


def test_groups_in_another_order_are_told(tmp_path: Path) -> None:
    e = made(0)
    train(e, range(1))
    e.save_checkpoint(tmp_path)
    model = Oddities("none")
    other = megazero.initialize(model=model, model_parameters=groups(model)[::-1], config=CONFIG)[0]
    with pytest.raises(UserError, match=r"has the same groups of parameters in another order, the group of blocks\.0\..* as number 0; give them in that order"):
        other.load_checkpoint(tmp_path)


def test_what_was_frozen_then_begins_without_moments_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def engine(frozen: bool) -> Any:
        torch.manual_seed(0)
        model = Oddities("none")
        model.head.weight.requires_grad_(not frozen)
        return megazero.initialize(model=model, config=CONFIG)[0]
    e = engine(True)
    train(e, range(2))
    e.save_checkpoint(tmp_path)
    other = engine(False)
    with pytest.raises(UserError, match=r"has no moments of head.weight, which was not trained then; .*load_module_strict=False"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_module_strict=False)
    assert "load_checkpoint: moments of head.weight, not trained then, stay as they are\n" in capsys.readouterr().out
    kept = {w.operand.name: m for (p, m) in other.core.moments() for b in other.core.all for q, w, _ in b.views if q is p}
    then = {w.operand.name: m for (p, m) in e.core.moments() for b in e.core.all for q, w, _ in b.views if q is p}
    assert not kept["head.weight"]["exp_avg"].any() and then["head.bias"]["exp_avg"].any()
    for name, moments in then.items():
        equal(kept[name], moments, 0)


def test_a_damaged_one_names_the_others(tmp_path: Path) -> None:
    e = made(0)
    for tag in ("one", "two"):
        e.save_checkpoint(tmp_path, tag)
    index = tmp_path / "two" / "index.json"
    index.write_text(index.read_text()[:-20])
    with pytest.raises(UserError, match=r"(?s)two.*load_checkpoint .*: has one too\."):
        e.load_checkpoint(tmp_path)


def mistaken(folder: Path) -> str:
    """Rank 0 finds that somebody else saves there now, when its file is written."""
    rank = names.get_rank()
    wires = connect(Mesh.of(dp=2), rank, "gloo", 60)
    asked: list[int] = []

    def ready() -> None:
        asked.append(1)
        if rank == 0 and len(asked) == 2:
            raise UserError("--save there: another run has taken it over.")
    with pytest.raises(UserError) as told:
        saving.write(folder / "step-00000001", [], {"step": 1}, rank, wires["saved"], ready=ready)
    assert not (folder / "step-00000001").exists()
    return str(told.value)


def test_a_mistake_that_one_rank_meets_while_it_saves_ends_all(tmp_path: Path, pool: Pool) -> None:
    one, two = pool.run(2, mistaken, tmp_path)
    assert one == "--save there: another run has taken it over." and two == f"--save {tmp_path / 'step-00000001'}: was not written; another rank says why."


def test_what_lies_beside_an_export_of_another_name_stays(tmp_path: Path) -> None:
    e = made(0)
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("base")
    e.save_16bit_model(tmp_path, "epoch1.safetensors")
    assert (tmp_path / "epoch1.safetensors").is_file()
    assert all((tmp_path / n).read_text() == "base" for n in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"))
    e.save_16bit_model(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch1.safetensors", "model.safetensors"]


@pytest.mark.parametrize("level", [0, 3])
def test_a_load_that_fails_keeps_the_gradients_so_far(tmp_path: Path, level: int) -> None:
    e, plain = made(level), made(level)
    train(plain, range(1))
    for ids in data(0).chunk(GAS)[:1]:
        e.backward(loss(e, ids))
        e.step()
    with pytest.raises(UserError, match="there is no such folder"):
        e.load_checkpoint(tmp_path / "nowhere")
    for ids in data(0).chunk(GAS)[1:]:
        e.backward(loss(e, ids))
        e.step()
    equal(state(e), state(plain), 0)


class Nothing(Oddities):
    """Has a parameter of no elements."""

    def __init__(self) -> None:
        super().__init__("none")
        self.blocks[0].empty = nn.Parameter(torch.empty(0))                                      # type: ignore[index]


@pytest.mark.parametrize("level", [0, 3])
def test_a_parameter_of_no_elements_is_no_fault(tmp_path: Path, level: int) -> None:
    e, other = (megazero.initialize(model=Nothing().double(), config={**CONFIG, "zero_optimization": {"stage": level}})[0] for _ in range(2))
    train(e, range(1))
    e.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    equal(state(other), state(e), 0)


@pytest.mark.parametrize("level", [0, 3])
def test_a_function_of_the_users_own_puts_weights_into_the_module(tmp_path: Path, level: int) -> None:
    """All weights by name, whole; moments and buffers come as ever."""
    e, other = made(level), made(level, seed=3)
    train(e, range(1))
    e.save_checkpoint(tmp_path)

    def put(src: dict[str, Tensor], dst: nn.Module) -> None:
        with torch.no_grad():
            for name, p in dst.named_parameters():
                p.copy_(src[name].view(p.shape) * (2 if name == "head.bias" else 1))
    other.load_checkpoint(tmp_path, custom_load_fn=put)
    mine, theirs = state(other), state(e)
    theirs["weight head.bias"] *= 2
    equal(mine, theirs, 0)
