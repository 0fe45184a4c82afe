"""Checkpoints of Megatron: written by Megatron-core itself (torch_dist), and in the legacy layout, built of its model's state_dict by the
documented keys; at tp 1 and 2, pp 1 and 2. Bits and logits are its own. `pip install megatron-core` runs it; elsewhere it is skipped."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tool, train

from megazero.run.generate import build_from_checkpoint, logits
from megazero.state.checkpoint import Reader

warnings.filterwarnings("ignore", module="megatron")
core = pytest.importorskip("megatron.core", reason="the oracle is Megatron-core, which is not installed")
S, HEADS, HIDDEN, ROWS, TOKENS, STEP = 32, 4, 64, 384, 300, 7
LAYERS = 4


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Megatron's process groups of one rank, on a CPU; its random states and its synchronisation are CUDA's."""
    from megatron.core import parallel_state, tensor_parallel
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    patched = pytest.MonkeyPatch()
    tracker = SimpleNamespace(fork=lambda *_: nullcontext(), is_initialized=lambda: True)
    for module in (tensor_parallel, tensor_parallel.random, tensor_parallel.layers):
        patched.setattr(module, "get_cuda_rng_tracker", lambda *_, **__: tracker, raising=False)
    patched.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    patched.setattr(torch.cuda, "synchronize", lambda *_: None)
    yield
    patched.undo()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: tool(monkeypatch, capsys, "convert_checkpoint.py", *words)


def megatrons(llama: bool, stage: int = 0, stages: int = 1) -> Any:
    """Its GPTModel, on the tensor-parallel ranks that there are; of several stages that one."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=2 if llama else HEADS, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5, gated_linear_unit=llama, activation_func=F.silu if llama else F.gelu,
        ffn_hidden_size=128 if llama else 4 * HIDDEN, add_bias_linear=not llama, bias_activation_fusion=False, pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32,
        normalization="RMSNorm" if llama else "LayerNorm", qk_layernorm=llama, masked_softmax_fusion=False)
    model = GPTModel(config, get_gpt_layer_local_spec(qk_layernorm=llama, normalization=config.normalization), ROWS, S, stage == 0, stage == stages - 1,
                     share_embeddings_and_output_weights=not llama, position_embedding_type="rope" if llama else "learned_absolute")
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


def arguments(llama: bool, tp: int = 1, pp: int = 1) -> argparse.Namespace:
    """What Megatron keeps of its command line, as far as it is the model's."""
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, group_query_attention=llama, num_query_groups=2 if llama else 1,
        ffn_hidden_size=128 if llama else 4 * HIDDEN, kv_channels=None, seq_length=S, max_position_embeddings=S, norm_epsilon=1e-5, swiglu=llama,
        normalization="RMSNorm" if llama else "LayerNorm", position_embedding_type="rope" if llama else "learned_absolute", add_bias_linear=not llama,
        bias_gelu_fusion=False, qk_layernorm=llama, untie_embeddings_and_output_weights=llama, rotary_base=10000, rotary_percent=1.0, init_method_std=0.02,
        attention_dropout=0.0, hidden_dropout=0.0, make_vocab_size_divisible_by=128, padded_vocab_size=ROWS, num_experts=None,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, consumed_train_samples=56, exit_signal=15, params_dtype=torch.float32)


def plain(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def cut(name: str, t: torch.Tensor, rank: int, tp: int, llama: bool) -> torch.Tensor:
    """A tensor-parallel rank's part, as ColumnParallelLinear and RowParallelLinear have it."""
    if "linear_fc1" in name and llama:
        return torch.cat([half.chunk(tp)[rank] for half in t.chunk(2)]).clone()
    if any(word in name for word in ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")):
        return t.chunk(tp)[rank].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return t.chunk(tp, 1)[rank].clone()
    return t.clone()


def legacy(state: dict[str, torch.Tensor], folder: Path, llama: bool, tp: int, pp: int, chunks: int = 1, extra: dict[str, Any] | None = None,
           args: argparse.Namespace | None = None) -> Path:
    """Megatron's legacy layout: layers numbered within a stage, `model0` ... of virtual stages."""
    each = LAYERS // (pp * chunks)
    for stage in range(pp):
        for rank in range(tp):
            content: dict[str, Any] = {"args": args or arguments(llama, tp, pp), "checkpoint_version": 3.0, "iteration": STEP, **(extra or {})}
            for chunk in range(chunks):
                first = (chunk * pp + stage) * each
                part: dict[str, Any] = {}
                for name, t in state.items():
                    words = name.split(".")
                    if words[:2] == ["decoder", "layers"]:
                        if first <= int(words[2]) < first + each:
                            part[".".join([*words[:2], str(int(words[2]) - first), *words[3:]])] = cut(name, t, rank, tp, llama)
                    elif name.startswith("embedding.") and (stage, chunk) == (0, 0) or not name.startswith("embedding.") and (stage, chunk) == (pp - 1, chunks - 1):
                        part[name] = cut(name, t, rank, tp, llama)
                if not llama and pp > 1 and (stage, chunk) == (pp - 1, chunks - 1):
                    part["output_layer.weight"] = cut("output_layer.weight", state["embedding.word_embeddings.weight"], rank, tp, llama)
                part["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
                content["model" if chunks == 1 else f"model{chunk}"] = part
            path = folder / f"iter_{STEP:07d}" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            path.mkdir(parents=True)
            torch.save(content, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    return folder


def expected(model: Any, llama: bool, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Its weights by our names, from the documented meaning of its own."""
    state, out, groups = plain(model) if state is None else state, {}, 2 if llama else HEADS
    out["embedding.weight"] = state["embedding.word_embeddings.weight"][:TOKENS]
    if llama:
        out["head.output.weight"] = state["output_layer.weight"][:TOKENS]
    else:
        out["positions.weight"] = state["embedding.position_embeddings.weight"]
    for kind in ["weight"] + ["bias"] * (not llama):
        out[f"head.norm.{kind}"] = state[f"decoder.final_layernorm.{kind}"]
        for i in range(LAYERS):
            at, mlp, layer = f"layers.{i}.attention", f"layers.{i}.mlp", f"decoder.layers.{i}"
            each = state[f"{layer}.self_attention.linear_qkv.{kind}"].unflatten(0, (groups, -1, HIDDEN // HEADS))
            for n, part in zip("qkv", each.split((HEADS // groups, 1, 1), 1), strict=True):
                out[f"{at}.{n}.{kind}"] = part.flatten(0, 2)
            up = state[f"{layer}.mlp.linear_fc1.{kind}"]
            out |= {f"{mlp}.{n}.{kind}": half for n, half in zip(("gate", "up"), up.chunk(2), strict=True)} if llama else {f"{mlp}.up.{kind}": up}
            out |= {f"{at}.norm.{kind}": state[f"{layer}.input_layernorm.{kind}"], f"{mlp}.norm.{kind}": state[f"{layer}.pre_mlp_layernorm.{kind}"],
                    f"{at}.o.{kind}": state[f"{layer}.self_attention.linear_proj.{kind}"], f"{mlp}.down.{kind}": state[f"{layer}.mlp.linear_fc2.{kind}"]}
            if llama:
                out |= {f"{at}.{n}_norm.weight": state[f"{layer}.self_attention.{n}_layernorm.weight"] for n in "qk"}
    return out


def assert_same(reader: Reader, wanted: dict[str, torch.Tensor], kind: str = "weight") -> None:
    assert {n for k, n in reader.shapes if k == kind} == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(reader.read(kind, name), tensor.to(reader.dtype(kind, name))), name


def assert_logits(reader: Reader, model: Any) -> None:
    """fp32 to 1e-5 of the largest, float64 to 1e-12 of it (its fused GELU has a constant of 8 digits, so not that one). The model is in float64 afterwards."""
    tokens = torch.randint(TOKENS, (2, S), generator=torch.Generator().manual_seed(5))
    hidden = torch.triu(torch.ones(S, S, dtype=torch.bool), 1)[None, None]
    places = torch.arange(S).expand_as(tokens)
    for dtype, within in ((None, 1e-5), ("fp64", 1e-12)):
        with torch.no_grad():
            theirs = in_float64(model)(tokens, places, hidden) if dtype else model.eval()(tokens, places, hidden)
            ours = logits(build_from_checkpoint(reader, dtype) if dtype else build_from_checkpoint(reader), tokens)
        assert (ours - theirs[..., :TOKENS]).abs().max() <= within * theirs.abs().max(), dtype


def in_float64(model: Any) -> Any:
    """Its rotation too, whose angles are fp32 in it whatever its weights are."""
    model = model.double()
    if hasattr(model, "rotary_pos_emb"):
        d = HIDDEN // HEADS
        model.rotary_pos_emb.inv_freq = 1.0 / 10000 ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        model.rotary_pos_emb.forward.cache_clear()
    return model


@pytest.mark.parametrize("llama", [False, True], ids=["gpt", "llama"])
@pytest.mark.parametrize("tp, pp, chunks", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_the_legacy_layout_imports_to_the_bit(llama: bool, tp: int, pp: int, chunks: int, one_rank: None, tmp_path: Path, convert: Any) -> None:
    model = megatrons(llama)
    legacy(plain(model), tmp_path / "theirs", llama, tp, pp, chunks)
    code, out, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--vocab-size", TOKENS)
    assert code == 0, err
    reader = Reader(tmp_path / "ours")
    assert_same(reader, expected(model, llama))
    assert_logits(reader, model)
    if (tp, pp) == (2, 2):
        words = out.split("train on with: ")[1].strip()
        assert len(train(f"{words} --mock-data --lr 1e-3 --train-iters 2 --eval-iters 0", tmp_path / "log")) == 2


def of_torch_dist(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What Megatron-LM gives the writer: the model's tensors, and for each of them the optimizer's under its key."""
    from megatron.core.dist_checkpointing import optimizer, utils
    sharded = model.sharded_state_dict()
    parameters = list(model.parameters())
    found, _ = utils.extract_sharded_tensors_or_nonpersistent(sharded)
    states = {}
    for number, of in optimizer.get_param_id_to_sharded_param_map(found, parameters).items():
        for kind, times in (("exp_avg", 2.0), ("exp_avg_sq", 3.0), ("fp32_param", 1.0)):
            states[f"{kind}{number}"] = optimizer.make_sharded_optimizer_tensor(of, parameters[number].detach() * times, prefix=f"optimizer.state.{kind}")
    return {**sharded, **states, "args": args, "iteration": STEP, "checkpoint_version": 3.0}


@pytest.mark.parametrize("llama", [False, True], ids=["gpt", "llama"])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_torch_dist_of_its_own_writer_imports_to_the_bit(llama: bool, tp: int, pp: int, one_rank: None, tmp_path: Path, convert: Any) -> None:
    from megatron.core import dist_checkpointing
    model = megatrons(llama)
    folder = tmp_path / "theirs" / f"iter_{STEP:07d}"
    folder.mkdir(parents=True)
    if tp * pp == 1:
        dist_checkpointing.save(of_torch_dist(model, arguments(llama)), str(folder))
    else:
        torch.save(plain(model), tmp_path / "full.pt")
        on_ranks(tp, pp, folder, tmp_path / "full.pt", llama)
    code, out, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--vocab-size", TOKENS)
    assert code == 0 and not err, err
    assert "a checkpoint of Megatron-core (torch_dist)" in out and "with their optimizer, at step 7" in out
    reader, wanted = Reader(tmp_path / "ours"), expected(model, llama)
    assert_same(reader, wanted)
    assert_same(reader, {n: t * 2 for n, t in wanted.items()}, "exp_avg")
    assert_same(reader, {n: t * 3 for n, t in wanted.items()}, "exp_avg_sq")
    assert_logits(reader, model)


def on_ranks(tp: int, pp: int, folder: Path, full: Path, llama: bool) -> None:
    """This file as a program on tp x pp ranks: its writer starts a process, which those of tests/pool.py may not."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, __file__, str(tp), str(pp), str(folder), str(full), str(int(llama))], env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(tp * pp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for rank in range(tp * pp)]
    for rank in ranks:
        _, err = rank.communicate(timeout=240)
        assert rank.returncode == 0, err[-2000:]


def one_of_them(tp: int, pp: int, folder: str, full: str, llama: bool) -> None:
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp)
    tracker = SimpleNamespace(fork=lambda *_: nullcontext(), is_initialized=lambda: True)
    for module in (tensor_parallel, tensor_parallel.random, tensor_parallel.layers):
        module.get_cuda_rng_tracker = lambda *_, **__: tracker
    torch.cuda.current_device, torch.cuda.synchronize = (lambda: torch.device("cpu")), (lambda *_: None)
    torch.Tensor.cuda = lambda t, *_, **__: t                   # where the last stage makes its copy of a tied embedding
    rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    model, state = megatrons(llama, stage, pp), torch.load(full)
    with torch.no_grad():
        for name, p in model.named_parameters():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                name = ".".join([*words[:2], str(int(words[2]) + stage * LAYERS // pp), *words[3:]])
            name = name if name in state else "embedding.word_embeddings.weight"        # the last stage's copy of a tied one
            p.copy_(cut(name, state[name], rank, tp, llama))
    dist_checkpointing.save(of_torch_dist(model, arguments(llama, tp, pp)), folder)


# ---- the optimizer's state in the legacy layout

@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_the_legacy_optimizer_comes_too(half: bool, tp: int, pp: int, one_rank: None, tmp_path: Path, convert: Any) -> None:
    """As FP32Optimizer and as Float16OptimizerWithFloat16Params keep it: numbered through two groups."""
    model = megatrons(True)
    state, folder = plain(model), tmp_path / "theirs"
    legacy({n: t.bfloat16() for n, t in state.items()} if half else state, folder, True, tp, pp)
    for path in folder.glob("*/*/*.pt"):
        content = torch.load(path, weights_only=False)
        stage = int(path.parent.name.split("_")[3]) if pp > 1 else 0
        rank = int(path.parent.name.split("_")[2])
        own = [n for n, t in content["model"].items() if t is not None]
        groups = [[n for n in own if content["model"][n].dim() > 1], [n for n in own if content["model"][n].dim() == 1]]
        numbers = {n: i for i, n in enumerate(n for g in groups for n in g)}

        def master(name: str, stage: int = stage, rank: int = rank) -> torch.Tensor:
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                name = ".".join([*words[:2], str(int(words[2]) + stage * LAYERS // pp), *words[3:]])
            return cut(name, state[name], rank, tp, True)

        inner = {"state": {i: {"exp_avg": master(n) * 2, "exp_avg_sq": master(n) * 3} for n, i in numbers.items()},
                 "param_groups": [{"params": [numbers[n] for n in g], "wd_mult": wd, "lr": 1e-3} for g, wd in zip(groups, (1.0, 0.0), strict=True)]}
        content["optimizer"] = {"optimizer": inner, "fp32_from_fp16_params": [[master(n) for n in g] for g in groups]} if half else inner
        torch.save(content, path)
    code, out, err = convert("import", "--input", folder, "--output", tmp_path / "ours", "--vocab-size", TOKENS)
    assert code == 0 and not err, err
    reader, wanted = Reader(tmp_path / "ours"), expected(model, True)
    assert (reader.progress.step, reader.progress.samples) == (STEP, 56)
    for kind, times in (("weight", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
        assert_same(reader, {n: t * times for n, t in wanted.items()}, kind)
    lines = train(f"{out.split('train on with: ')[1].strip()} --mock-data --lr 1e-3 --train-iters {STEP + 2} --eval-iters 0 --log-interval 1", tmp_path / "log")
    assert [line["step"] for line in lines] == [STEP + 1, STEP + 2]


# ---- out again

@pytest.mark.parametrize("llama", [False, True], ids=["gpt", "llama"])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_megatron_core_loads_an_export(llama: bool, tp: int, pp: int, one_rank: None, tmp_path: Path, convert: Any) -> None:
    """The legacy layout of one rank and torch_dist by its own loaders; of several ranks, what comes back is the same."""
    from megatron.core import dist_checkpointing
    model = megatrons(llama)
    legacy(plain(model), tmp_path / "theirs", llama, 1, 1)
    assert convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--vocab-size", TOKENS)[0] == 0
    words = ("--load", tmp_path / "ours", "--tp", tp, "--pp", pp)
    code, out, err = convert("export", *words, "--output", tmp_path / "out", "--to", "megatron", "--transformer-impl", "local")
    assert code == 0, err
    wanted = {n: t if t.shape[:1] != (ROWS,) else torch.cat([t[:TOKENS], torch.zeros(ROWS - TOKENS, HIDDEN)]) for n, t in plain(model).items()}
    if tp * pp == 1:
        assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
        content, fresh = torch.load(tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False), megatrons(llama)
        for p in fresh.parameters():
            p.data.zero_()
        extra = {k: None for k in fresh.state_dict() if k.endswith("_extra_state")}
        fresh.load_state_dict({**extra, **content["model"]}, strict=True)
        assert all(torch.equal(t, wanted[n]) for n, t in plain(fresh).items())
        assert convert("export", "--load", tmp_path / "ours", "--output", tmp_path / "dist", "--to", "torch_dist")[0] == 0
        for p in fresh.parameters():
            p.data.zero_()
        sharded = {k: v for k, v in fresh.sharded_state_dict().items() if "output_layer._extra" not in k}
        loaded = dist_checkpointing.load(sharded, str(tmp_path / "dist" / "release"))
        fresh.load_state_dict({**extra, **{n: t for n, t in loaded.items() if n in wanted}}, strict=True)
        assert all(torch.equal(t, wanted[n]) for n, t in plain(fresh).items())
    assert convert("export", *words, "--output", tmp_path / "te", "--to", "megatron")[0] == 0        # by Transformer Engine's names of norms
    for name in ("out", "te", "dist") if tp * pp == 1 else ("out", "te"):
        code, out, err = convert("import", "--input", tmp_path / name, "--output", tmp_path / f"again-{name}")
        assert code == 0, err
        assert_same(Reader(tmp_path / f"again-{name}"), expected(model, llama))
    code, _, err = convert("export", *words[:2], "--tp", 3, "--output", tmp_path / "no", "--to", "megatron")
    assert code == 2 and "--tp 3: cannot share" in err


# ---- older forms, and damage

def test_names_and_orders_of_before(one_rank: None, tmp_path: Path, convert: Any) -> None:
    """language_model.encoder, and q, k, v in the order of checkpoint_version 0."""
    model = megatrons(False)
    state, old = plain(model), dict[str, Any]()
    table = {"self_attention.linear_qkv": "self_attention.query_key_value", "self_attention.linear_proj": "self_attention.dense",
             "pre_mlp_layernorm": "post_attention_layernorm", "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"}
    for name, t in state.items():
        if name.startswith("decoder."):
            t = t.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2) if "linear_qkv" in name else t
            name = name.removeprefix("decoder.")
            for new, before in table.items():
                name = name.replace(new, before)
            old[name] = t
    embedding = {kind: {"weight": state[f"embedding.{kind}.weight"]} for kind in ("word_embeddings", "position_embeddings")}
    folder = tmp_path / "theirs" / "iter_0000007" / "mp_rank_00"
    folder.mkdir(parents=True)
    args = arguments(False)
    args.apply_layernorm_1p = True                              # the same flag here: weights stay less one
    content = {"args": args, "checkpoint_version": 0, "iteration": STEP, "model": {"language_model": {"embedding": embedding, "encoder": old}}}
    torch.save(content, folder / "model_optim_rng.pt")
    code, _, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours", "--vocab-size", TOKENS)
    assert code == 0, err
    reader = Reader(tmp_path / "ours")
    assert_same(reader, expected(model, False))
    assert reader.architecture.norm_plus_one and reader.architecture.norm_bias


def rewrite(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


RANK = "mp_rank_0{}_00{}/model_optim_rng.pt"
DAMAGE: dict[str, tuple[Any, str]] = {
    "cut": (lambda d: (d / RANK.format(1, 0)).write_bytes((d / RANK.format(1, 0)).read_bytes()[:-100]), "was cut or damaged"),
    "a missing rank": (lambda d: shutil.rmtree(d / "mp_rank_00_001"), "has no mp_rank_00_001, though there are files of 2 x 2 ranks"),
    "missing stages": (lambda d: [shutil.rmtree(p) for p in d.glob("*_001")], "holds files of 1 ranks of --pipeline-model-parallel-size, its arguments say 2"),
    "a rank twice": (lambda d: shutil.copytree(d / "mp_rank_00_000", d / "mp_rank_000_000"), "is of the same rank as mp_rank_000_000"),
    "no file": (lambda d: (d / RANK.format(1, 1)).unlink(), "holds no model_optim_rng.pt"),
    "an unknown weight": (lambda d: [rewrite(d / RANK.format(r, 0), lambda c: c["model"].update({"adapter.weight": torch.ones(2)})) for r in (0, 1)],
                          "holds 'adapter.weight', which its model does not have"),
    "on one rank alone": (lambda d: rewrite(d / RANK.format(1, 0), lambda c: c["model"].update({"adapter.weight": torch.ones(2)})), "only some tensor-parallel ranks"),
    "of another step": (lambda d: rewrite(d / RANK.format(1, 1), lambda c: c["model"]["decoder.final_layernorm.weight"].add_(1)), "differs between its tensor-parallel"),
    "another width": (lambda d: rewrite(d / RANK.format(0, 0), lambda c: setattr(c["args"], "ffn_hidden_size", 100)), "its model needs"),
    "experts": (lambda d: rewrite(d / RANK.format(0, 0), lambda c: setattr(c["args"], "num_experts", 8)), "was trained with --num-experts 8, which this decoder cannot be"),
    "words for numbers": (lambda d: rewrite(d / RANK.format(0, 0), lambda c: setattr(c["args"], "hidden_size", "wide")), "its arguments cannot be"),
    "no arguments": (lambda d: rewrite(d / RANK.format(0, 0), lambda c: c.pop("args")), "holds no arguments of Megatron"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_one_sentence(name: str, one_rank: None, tmp_path: Path, convert: Any) -> None:
    legacy(plain(megatrons(True)), tmp_path / "theirs", True, 2, 2)
    damage, sentence = DAMAGE[name]
    damage(tmp_path / "theirs" / "iter_0000007")
    code, _, err = convert("import", "--input", tmp_path / "theirs", "--output", tmp_path / "ours")
    assert code == 2 and sentence in err and "Traceback" not in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


if __name__ == "__main__":
    one_of_them(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "1")
