"""Checkpoints of nanoGPT, of torchtitan and what else torch.distributed.checkpoint wrote: the modules are written here as theirs are, the files by
torch itself. Bits, logits and the next steps are theirs; what is wrong is one sentence."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import program, tool, train
from torch import nn

from megazero.run.generate import build_from_checkpoint, logits
from megazero.state.checkpoint import Reader

S, V = 24, 61
Call = Any


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """convert_checkpoint.py of words: (exit code, stdout, stderr)."""
    return lambda *words: tool(monkeypatch, capsys, "convert_checkpoint.py", *words)


# ---- nanoGPT, as in its model.py

class Norm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).split(x.shape[-1], 2))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(width, bias), Attention(width, heads, bias), Norm(width, bias), Mlp(width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, width), "wpe": nn.Embedding(S, width),
                                          "h": nn.ModuleList([Block(width, heads, bias) for _ in range(layers)]), "ln_f": Norm(width, bias)})
        self.lm_head = nn.Linear(width, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[:tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def stepped(model: nn.Module, steps: int = 3) -> torch.optim.AdamW:
    """AdamW over matrices and vectors, some steps of it."""
    parameters = list(dict.fromkeys(model.parameters()))
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1}, {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    g = torch.Generator().manual_seed(2)
    for _ in range(steps):
        tokens = torch.randint(V, (4, S), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.step()
    return optimizer


def nanogpt(path: Path, bias: bool = True, **more: Any) -> tuple[NanoGPT, torch.optim.AdamW]:
    torch.manual_seed(1)
    model = NanoGPT(bias=bias)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    optimizer = stepped(model)
    content = {"model": {f"_orig_mod.{n}": t for n, t in model.state_dict().items()}, "optimizer": optimizer.state_dict(), "iter_num": 3,
               "model_args": {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": S, "bias": bias, "vocab_size": V, "dropout": 0.0},
               "best_val_loss": torch.tensor(3.0), "config": {"batch_size": 4, "gradient_accumulation_steps": 1}}
    torch.save({**content, **more}, path)
    return model, optimizer


def assert_logits(reader: Reader, model: nn.Module) -> None:
    """fp32 to 1e-5 of the largest, float64 to 1e-12 of it. The model is in float64 afterwards."""
    tokens = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(5))
    for dtype, within in (("fp32", 1e-5), ("fp64", 1e-12)):
        with torch.no_grad():
            theirs = (model.double() if dtype == "fp64" else model)(tokens)
            ours = logits(build_from_checkpoint(reader, dtype), tokens)
        assert (ours - theirs).abs().max() <= within * theirs.abs().max(), dtype


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_imports_with_its_optimizer_and_goes_on(bias: bool, tmp_path: Path, convert: Call) -> None:
    model, optimizer = nanogpt(tmp_path / "ckpt.pt", bias)
    code, out, err = convert("import", "--input", tmp_path, "--output", tmp_path / "ours")
    assert code == 0 and not err and "with their optimizer, at step 3" in out, err
    reader = Reader(tmp_path / "ours")
    assert reader.progress.step == 3 and reader.progress.samples == 12
    state, h = optimizer.state, model.transformer["h"][1]
    q, k, v = h.attn.c_attn.weight.split(32)
    for name, p in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(reader.read("weight", f"layers.1.attention.{name}.weight"), p)
    assert torch.equal(reader.read("exp_avg", "layers.1.attention.k.weight"), state[h.attn.c_attn.weight]["exp_avg"][32:64])
    assert torch.equal(reader.read("exp_avg_sq", "embedding.weight"), state[model.lm_head.weight]["exp_avg_sq"])
    assert torch.equal(reader.read("exp_avg", "head.norm.weight"), state[model.transformer["ln_f"].weight]["exp_avg"])
    words = out.split("train on with: ")[1].strip()
    assert "--finetune" not in words
    lines = train(f"{words} --mock-data --lr 1e-3 --train-iters 5 --eval-iters 0 --log-interval 1", tmp_path / "log")
    assert [line["step"] for line in lines] == [4, 5]
    assert_logits(reader, model)


# ---- torchtitan's Llama, as in its model.py: pairs of channels that turn lie side by side

def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    d = x.shape[-1]
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), 1 / base ** (torch.arange(0, d, 2, dtype=torch.float64) / d))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]).flatten(-2).to(x.dtype)


class TitanAttention(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.d = width // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, n * self.d, bias=False) for n in (heads, groups, groups, heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.d)) for w in (self.wq, self.wk, self.wv))
        q, k = turned(q, 5e5), turned(k, 5e5)
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        return self.wo(F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False), nn.Linear(width, inner, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = TitanAttention(width, heads, groups), FeedForward(width, 88)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(V, width)
        self.layers = nn.ModuleDict({str(i): TitanBlock(width, heads, groups) for i in range(2)})
        self.norm, self.output = nn.RMSNorm(width, 1e-5), nn.Linear(width, V, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))


def dcp(folder: Path, prefix: str = "") -> tuple[Titan, dict[str, Any]]:
    """A step of torchtitan, its optimizer's state flattened as there, written by torch's own writer."""
    from torch.distributed.checkpoint import FileSystemWriter, save
    torch.manual_seed(1)
    model = Titan()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    optimizer = stepped(model)
    names = {p: n for n, p in model.named_parameters()}
    state = {f"optimizer.state.{names[p]}.{k}": v for p, of in optimizer.state.items() for k, v in of.items()}
    weights = {prefix + n: t for n, t in model.state_dict().items()}
    save({**weights, **state, "optimizer.param_groups.norm.weight.lr": 1e-3, "train_state.step": torch.tensor(3, dtype=torch.int32),
          "lr_scheduler": {"last_epoch": 3}, "dataloader": {"dp_rank_0": b"x"}}, storage_writer=FileSystemWriter(folder), no_dist=True)
    return model, state


LLAMA = ("--num-attention-heads", 4, "--rotary-base", 5e5, "--seq-length", S)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchtitan_imports_with_its_optimizer_and_goes_on(prefix: str, tmp_path: Path, convert: Call) -> None:
    model, state = dcp(tmp_path / "theirs" / "step-3", prefix)
    code, out, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", *LLAMA)
    assert code == 0 and not err and "with their optimizer, at step 3" in out, err
    reader = Reader(tmp_path / "ours")
    block = model.layers["1"]
    assert torch.equal(reader.read("weight", "layers.1.mlp.gate.weight"), block.feed_forward.w1.weight)
    assert torch.equal(reader.read("weight", "layers.1.attention.v.weight"), block.attention.wv.weight)
    first = reader.read("weight", "layers.1.attention.q.weight")[:8]
    assert torch.equal(first, block.attention.wq.weight[[0, 2, 4, 6, 1, 3, 5, 7]])
    assert torch.equal(reader.read("exp_avg", "layers.1.attention.q.weight")[:8],
                       state["optimizer.state.layers.1.attention.wq.weight.exp_avg"][[0, 2, 4, 6, 1, 3, 5, 7]])
    words = out.split("train on with: ")[1].strip()
    assert len(train(f"{words} --mock-data --lr 1e-3 --train-iters 5 --eval-iters 0 --log-interval 1", tmp_path / "log")) == 2
    assert_logits(reader, model)


def test_a_dcp_of_hugging_faces_names_becomes_a_decoder(tmp_path: Path, convert: Call) -> None:
    pytest.importorskip("transformers")
    from hf_models import assert_equal_logits, random_model
    from torch.distributed.checkpoint import FileSystemWriter, save
    model = random_model("qwen2", tmp_path / "hf")
    save(model.state_dict(), storage_writer=FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    code, _, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "no")
    assert code == 2 and "names of no trainer that is known here; give --hf-config" in err
    code, _, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--hf-config", tmp_path / "hf" / "config.json")
    assert code == 0, err
    assert_equal_logits(model, Reader(tmp_path / "ours"))


def flip(path: Path, change: Any) -> None:
    path.write_bytes(change(path.read_bytes()))


WRONG: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "no heads": (lambda d: None, (), "the shapes of its weights do not say --num-attention-heads and --rotary-base"),
    "other heads": (lambda d: None, ("--num-attention-heads", 3, "--rotary-base", 1e4), "cannot be a Llama of --num-attention-heads 3"),
    "cut": (lambda d: flip(d / "__0_0.distcp", lambda b: b[:len(b) // 2]), LLAMA, "ends before byte"),
    "missing file": (lambda d: (d / "__0_0.distcp").unlink(), LLAMA, "cannot be read"),
    "index": (lambda d: flip(d / ".metadata", lambda b: b[:len(b) // 2]), LLAMA, "is no index of a distributed checkpoint"),
    "other bytes": (lambda d: flip(d / "__0_0.distcp", lambda b: bytes(len(b))), LLAMA, "is no file of torch.save, or was cut or damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_dcp_is_one_sentence(name: str, tmp_path: Path, convert: Call) -> None:
    dcp(tmp_path / "theirs")
    damage, words, sentence = WRONG[name]
    damage(tmp_path / "theirs")
    code, _, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", *words)
    assert code == 2 and sentence in err and err.count("error: ") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


NANO: dict[str, tuple[dict[str, Any], str]] = {
    "no arguments": ({"model_args": None}, "is no checkpoint of nanoGPT"),
    "other sizes": ({"model_args": {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": S, "bias": True, "vocab_size": V}}, "its model needs"),
    "more layers": ({"model_args": {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": S, "bias": True, "vocab_size": V}}, "has no transformer.h.2"),
    "no sizes": ({"model_args": {"n_layer": 10**9}}, "its model_args cannot be"),
}


@pytest.mark.parametrize("name", NANO)
def test_what_is_wrong_with_nanogpts_is_said(name: str, tmp_path: Path, convert: Call) -> None:
    more, sentence = NANO[name]
    nanogpt(tmp_path / "ckpt.pt", **more)
    code, _, err = convert("import", "--input", tmp_path / "ckpt.pt", "--output", tmp_path / "ours")
    assert code == 2 and sentence in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_an_optimizer_that_is_not_understood_stays_behind(tmp_path: Path, convert: Call) -> None:
    nanogpt(tmp_path / "ckpt.pt", optimizer={"state": {}, "param_groups": []})
    code, out, err = convert("import", "--input", tmp_path / "ckpt.pt", "--output", tmp_path / "ours", "--vocab-size", 50)
    assert code == 0 and "weights alone, at step 0" in out and "cut         11 rows" in out and "left        its optimizer's state" in err
    reader = Reader(tmp_path / "ours")
    assert reader.shapes["weight", "embedding.weight"] == (50, 32) and reader.progress.step == 0 and "--finetune" in out
    assert math.isfinite(reader.read("weight", "embedding.weight").sum().item())


# ---- out again

def test_nanogpt_and_torchtitan_load_what_leaves(tmp_path: Path, convert: Call) -> None:
    from torch.distributed.checkpoint import FileSystemReader, load
    nano, _ = nanogpt(tmp_path / "ckpt.pt")
    titan, _ = dcp(tmp_path / "titan")
    assert convert("import", "--input", tmp_path / "ckpt.pt", "--output", tmp_path / "nano")[0] == 0
    assert convert("import", "--input", tmp_path / "titan", "--output", tmp_path / "llama", *LLAMA)[0] == 0
    code, out, err = convert("export", "--load", tmp_path / "nano", "--output", tmp_path / "a", "--to", "nanogpt")
    assert code == 0 and "weights alone, of step 3" in out, err
    content, fresh = torch.load(tmp_path / "a" / "ckpt.pt"), NanoGPT()
    fresh.load_state_dict(content["model"])
    assert all(torch.equal(t, nano.state_dict()[n]) for n, t in fresh.state_dict().items())
    assert content["model_args"] == {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": S, "bias": True, "vocab_size": V, "dropout": 0.0}
    assert content["model"]["lm_head.weight"].data_ptr() == content["model"]["transformer.wte.weight"].data_ptr()
    assert convert("export", "--load", tmp_path / "llama", "--output", tmp_path / "b", "--to", "dcp")[0] == 0
    state = {n: torch.zeros_like(t) for n, t in titan.state_dict().items()}
    load(state, storage_reader=FileSystemReader(tmp_path / "b"), no_dist=True)
    assert all(torch.equal(t, titan.state_dict()[n]) for n, t in state.items())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["ckpt.pt"] and not (tmp_path / "b" / "scratch").exists()
    assert convert("export", "--load", tmp_path / "llama", "--output", tmp_path / "c", "--to", "dcp", "--dtype", "bf16")[0] == 0
    for to, source, sentence in (("nanogpt", "llama", "that format cannot say this model: --ffn-hidden-size 88, there --ffn-hidden-size 128"),
                                 ("dcp", "nano", "--normalization LayerNorm, there --normalization RMSNorm")):
        code, _, err = convert("export", "--load", tmp_path / source, "--output", tmp_path / "no", "--to", to)
        assert code == 2 and sentence in err and not (tmp_path / "no").exists(), err


LAID = {"megatron": ("iter_0000007/mp_rank_00/model_optim_rng.pt", "Megatron-LM (legacy"), "torch_dist": ("iter_0000007/common.pt", "torch_dist"),
        "deepspeed": ("global_step3/mp_rank_00_model_states.pt", "a checkpoint of DeepSpeed"), "level 3": ("global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed"),
        "universal": ("global_step3_universal/zero/a.weight/fp32.pt", "universal"), "dcp": ("step-10/.metadata", "DCP"), "nanogpt": ("ckpt.pt", "nanoGPT"),
        "bin": ("pytorch_model-00001-of-00002.bin", "pickled weights"), "hf": ("model.safetensors", "a Hugging Face folder")}


@pytest.mark.parametrize("name", LAID)
def test_whoever_loads_a_strangers_folder_is_told_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    file, what = LAID[name]
    (tmp_path / "x" / file).parent.mkdir(parents=True)
    (tmp_path / "x" / file).touch()
    tool_name = "convert_hf.py" if name == "hf" else "convert_checkpoint.py"
    for words in (("checkpoint.py", "inspect", "--load"), ("generate.py", "--prompt", "a", "--load"), ("convert_hf.py", "export", "--output", tmp_path / "y", "--load")):
        code, _, err = tool(monkeypatch, capsys, *words, tmp_path / "x")
        assert code == 2 and what in err and f"python tools/{tool_name} import --input {tmp_path / 'x'}" in err, err
    for more in (f"--load {tmp_path / 'x'}", f"--load {tmp_path / 'x'} --save {tmp_path / 'x'}"):      # no run starts afresh among its files
        code, _, err = program(monkeypatch, capsys, "pretrain_gpt.py", *f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 9 "
                               f"--lr 1 --mock-data --train-iters 1 {more}".split())
        assert code == 2 and what in err and f"python tools/{tool_name} import" in err, err
