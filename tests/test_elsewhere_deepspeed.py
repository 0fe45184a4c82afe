"""Checkpoints of DeepSpeed, built here by torch in its documented layout, of two ranks: what zero_to_fp32.py reads. Bits come over, and an engine goes
on from them as torch's own optimizer does. (Files of DeepSpeed 0.19.8 itself were read by hand: levels 0 to 3, fp32 and bf16, universal.)"""

import shutil
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tool
from torch import nn

import megazero
from megazero.state.checkpoint import Reader

Call = Any
GROUPS = (["emb.weight", "a.weight", "b.weight"], ["scale", "a.bias"])
EMPTY: dict[str, Any] = {}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.b = nn.Embedding(37, 24), nn.Linear(24, 41), nn.Linear(41, 24, bias=False)
        self.out = nn.Linear(24, 37, bias=False)
        self.out.weight = self.emb.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.arange(5.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.emb(tokens)
        return F.cross_entropy(self.out(h + self.b(torch.relu(self.a(h))) * self.scale).flatten(0, 1), tokens.roll(1, 1).flatten())


def batches(count: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(37, (2, 8), generator=g) for _ in range(count)]


def trained(steps: int) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(0)
    net = Net()
    of = dict(net.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [of[n] for n in names], "weight_decay": decay} for names, decay in zip(GROUPS, (0.1, 0.0), strict=True)],
                                  lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    for tokens in batches(steps):
        optimizer.zero_grad()
        net(tokens).backward()
        optimizer.step()
    return net, optimizer


def parted(tensors: list[torch.Tensor], ranks: int, gaps: list[int] | None = None) -> list[torch.Tensor]:
    """Levels 1 and 2: one flat buffer, aligned, an even part for each rank."""
    flat = torch.cat([part for t, gap in zip(tensors, gaps or [0] * len(tensors), strict=True) for part in (t.detach().reshape(-1), torch.zeros(gap))])
    size = ceil(len(flat) / (2 * ranks)) * 2
    return list(F.pad(flat, (0, size * ranks - len(flat))).split(size))


def sliced(tensors: list[torch.Tensor], ranks: int) -> list[torch.Tensor]:
    """Level 3: an even part of each parameter, padded, one after the other."""
    rows = [F.pad(t.detach().reshape(-1), (0, -t.numel() % ranks)).view(ranks, -1) for t in tensors]
    return list(torch.cat(rows, 1).unbind())


def deepspeed(folder: Path, level: int, ranks: int = 2, gaps: bool = False) -> tuple[Net, torch.optim.AdamW]:
    net, optimizer = trained(3)
    of = dict(net.named_parameters())
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    kinds = {"weight": of, **{k: {n: optimizer.state[p][k] for n, p in of.items()} for k in ("exp_avg", "exp_avg_sq")}}
    groups = [{k: v for k, v in g.items() if k != "params"} | {"params": [i]} for i, g in enumerate(optimizer.state_dict()["param_groups"])]
    shapes = [{n: of[n].shape for n in names} for names in GROUPS]
    words = {"buffer_names": ["count"], "param_shapes": shapes, "shared_params": {"out.weight": "emb.weight"}, "frozen_param_shapes": EMPTY,
             "frozen_param_fragments": EMPTY, "lr_scheduler": None, "skipped_steps": 0, "global_steps": 3, "global_samples": 6, "dp_world_size": ranks,
             "mp_world_size": 1, "ds_config": {"gradient_accumulation_steps": 1}, "ds_version": "0.19.8", "optimizer": None, "epoch": 2}
    whole = {**words, "module": net.state_dict()}
    if level == 0:
        torch.save({**whole, "param_shapes": None, "shared_params": None, "optimizer": optimizer.state_dict()}, tag / "mp_rank_00_model_states.pt")
        return net, optimizer
    if level < 3:
        torch.save(whole, tag / "mp_rank_00_model_states.pt")
    padding = [[8] * len(names) for names in GROUPS] if gaps else None
    cut = {kind: [sliced([t[n] for n in names], ranks) if level == 3 else parted([t[n] for n in names], ranks, padding[i] if padding else None)
                  for i, names in enumerate(GROUPS)] for kind, t in kinds.items()}
    for rank in range(ranks):
        states = {i: {k: cut[k][i][rank] for k in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(3.0)} for i in range(len(GROUPS))}
        inner = {"state": states, "param_groups": groups}
        flats = [cut["weight"][i][rank] for i in range(len(GROUPS))]
        if level == 3:
            outer = {"zero_stage": 3, "partition_count": ranks, "optimizer_state_dict": inner, "fp32_flat_groups": flats}
            torch.save({**words, "module": {"count": net.count}}, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:
            outer = {"zero_stage": level, "partition_count": [ranks] * 2, "base_optimizer_state": inner, "single_partition_of_fp32_groups": flats,
                     **({"param_alignment_paddings": padding} if padding else {})}
        torch.save({"optimizer_state_dict": outer, "ds_version": "0.19.8"}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return net, optimizer


def universal(folder: Path) -> tuple[Net, torch.optim.AdamW]:
    net, optimizer = deepspeed(folder, 2)
    (folder / "global_step3").rename(folder / "global_step3_universal")
    tag = folder / "global_step3_universal"
    (folder / "latest_universal").write_text("global_step3_universal")
    for path in tag.glob("zero_pp*"):
        path.unlink()
    for name, p in net.named_parameters(remove_duplicate=False):
        (tag / "zero" / name).mkdir(parents=True)
        for file, tensor in {"fp32": p, **{k: optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}}.items():
            torch.save({"param": tensor.detach()}, tag / "zero" / name / f"{file}.pt")
    groups = [{k: v for k, v in g.items() if k != "params"} | {"params": [i]} for i, g in enumerate(optimizer.state_dict()["param_groups"])]
    torch.save({"base_optimizer_state": {"param_groups": groups}}, tag / "zero" / "optimizer_state.pt")
    return net, optimizer


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return lambda *words: tool(monkeypatch, capsys, "convert_checkpoint.py", *words)


@pytest.mark.parametrize("form", ["level 0", "level 1", "level 2", "level 2, aligned", "level 3", "universal"])
def test_an_engine_goes_on_from_deepspeeds(form: str, tmp_path: Path, convert: Call) -> None:
    net, optimizer = universal(tmp_path / "ds") if form == "universal" else deepspeed(tmp_path / "ds", int(form[6]), gaps="aligned" in form)
    code, out, err = convert("import", "--input", tmp_path / "ds", "--output", tmp_path / "ours")
    assert code == 0, err
    reader = Reader(tmp_path / "ours")
    of = dict(net.named_parameters())
    assert {n for k, n in reader.shapes if k == "weight"} == of.keys()
    assert all(torch.equal(reader.read("weight", n), p) for n, p in of.items()) and torch.equal(reader.read("buffer", "count"), net.count)
    if form == "level 0":                                       # its groups stand in no file: the weights alone
        assert "weights alone, at step 0" in out
        return
    assert "with their optimizer, at step 3" in out and not err
    assert all(torch.equal(reader.read(k, n), optimizer.state[p][k]) for n, p in of.items() for k in ("exp_avg", "exp_avg_sq"))
    module = Net()
    own = dict(module.named_parameters())
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}, "zero_optimization": {"stage": 1}, "gradient_clipping": 0.0}
    engine, *_ = megazero.initialize(model=module, config=config, model_parameters=[{"params": [own[n] for n in names]} for names in GROUPS])
    _, client = engine.load_checkpoint(str(tmp_path / "ours"))
    assert client == {"epoch": 2} and engine.global_steps == 3
    for tokens in batches(6)[3:]:
        engine.backward(engine(tokens))
        engine.step()
        optimizer.zero_grad()
        net(tokens).backward()
        optimizer.step()
    engine.destroy()
    for name, p in own.items():
        torch.testing.assert_close(p, of[name], rtol=0, atol=1e-6)


DAMAGE: dict[str, tuple[int, Any, str]] = {
    "a missing rank": (2, lambda d: (d / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "holds the optimizer's state of 1 ranks, there were 2"),
    "the first rank": (2, lambda d: (d / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(), "holds no optim_states.pt of rank 0"),
    "a rank twice": (2, lambda d: shutil.copy(d / "zero_pp_rank_1_mp_rank_00_optim_states.pt", d / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
                     "is of the same rank as"),
    "no model": (2, lambda d: (d / "mp_rank_00_model_states.pt").unlink(), "holds no mp_rank_00_model_states.pt"),
    "tensor-parallel": (2, lambda d: shutil.copy(d / "mp_rank_00_model_states.pt", d / "mp_rank_01_model_states.pt"), "is of tensor-parallel ranks"),
    "cut": (3, lambda d: (d / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes((d / "zero_pp_rank_1_mp_rank_00_optim_states.pt").read_bytes()[:-99]),
            "was cut or damaged"),
    "another's partitions": (3, lambda d: other(d / "zero_pp_rank_1_mp_rank_00_optim_states.pt"), "its flat partitions are not those of its parameters"),
}


def other(path: Path) -> None:
    content = torch.load(path)
    content["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(3)
    torch.save(content, path)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_one_sentence(name: str, tmp_path: Path, convert: Call) -> None:
    level, damage, sentence = DAMAGE[name]
    deepspeed(tmp_path / "ds", level)
    damage(tmp_path / "ds" / "global_step3")
    code, _, err = convert("import", "--input", tmp_path / "ds", "--output", tmp_path / "ours")
    assert code == 2 and sentence in err and err.count("error: ") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["ds"]


def test_names_of_hugging_face_become_a_decoder(tmp_path: Path, convert: Call) -> None:
    """At level 3, and as pickled weights of save_pretrained."""
    transformers = pytest.importorskip("transformers")
    from hf_models import assert_equal_logits, random_model
    model = random_model("llama", tmp_path / "hf")
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    tag = tmp_path / "ds" / "global_step1"
    tag.mkdir(parents=True)
    shapes = [{n: t.shape for n, t in state.items()}]
    for rank, flat in enumerate(sliced(list(state.values()), 2)):
        outer = {"zero_stage": 3, "partition_count": 2, "optimizer_state_dict": {"state": {}, "param_groups": []}, "fp32_flat_groups": [flat]}
        torch.save({"optimizer_state_dict": outer}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"module": {}, "param_shapes": shapes, "global_steps": 1}, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    code, out, err = convert("import", "--input", tmp_path / "ds", "--output", tmp_path / "ours", "--hf-config", tmp_path / "hf" / "config.json")
    assert code == 0 and "--num-layers 2" in out, err
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    code, _, err = convert("import", "--input", tmp_path / "hf", "--output", tmp_path / "again")
    assert code == 0 and transformers, err
    for name in ("ours", "again"):
        assert_equal_logits(model, Reader(tmp_path / name))
