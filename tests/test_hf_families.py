"""Families of Hugging Face, each as transformers itself has it: there and back to the byte, equal logits, twenty equal steps of training."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    LLAMA,
    LLAMA3,
    MODELS,
    YARN,
    assert_equal_logits,
    in_float64,
    random_model,
    same_bytes,
    tensors,
    transformers,
    wide,
)
from support import resolved, stepping

from megazero.comm.wires import connect
from megazero.hf.convert import export_folder, import_folder
from megazero.model.decoder import Batch
from megazero.plan.architecture import Architecture
from megazero.plan.families import FAMILIES, from_config
from megazero.plan.mesh import Mesh
from megazero.plan.words import flags
from megazero.run.run import Run
from megazero.state import record
from megazero.state.checkpoint import Reader

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
STEPS, LR, DECAY, EPS = 20, 1e-3, 0.1, 1e-5
# keys of theirs that our export may leave to their defaults, or say where the original did not
SAID_OTHERWISE = {"transformers_version", "architectures", "_name_or_path"}
# what vLLM reads of every config.json, and of each family's beside that
SIZES = "architectures model_type vocab_size hidden_size num_attention_heads num_hidden_layers max_position_embeddings tie_word_embeddings"
LLAMAS = f"{SIZES} num_key_value_heads intermediate_size rms_norm_eps hidden_act rope_theta rope_scaling rope_parameters"
GEMMAS = f"{LLAMAS} head_dim query_pre_attn_scalar sliding_window layer_types attention_bias".replace("hidden_act ", "hidden_activation ")
VLLM = {
    "gpt2": "architectures model_type vocab_size n_embd n_head n_layer n_positions n_inner layer_norm_epsilon activation_function",
    "llama": f"{LLAMAS} head_dim attention_bias mlp_bias", "mistral": f"{LLAMAS} head_dim sliding_window",
    "qwen2": f"{LLAMAS} use_sliding_window sliding_window", "qwen3": f"{LLAMAS} head_dim attention_bias use_sliding_window sliding_window",
    "phi3": f"{LLAMAS} sliding_window partial_rotary_factor",
    "granite": f"{LLAMAS} attention_bias mlp_bias embedding_multiplier attention_multiplier residual_multiplier logits_scaling",
    "smollm3": f"{LLAMAS} attention_bias mlp_bias no_rope_layers sliding_window layer_types",
    "gpt_neox": f"{SIZES} intermediate_size layer_norm_eps hidden_act use_parallel_residual attention_bias rotary_pct rotary_emb_base rope_parameters",
    "opt": f"{SIZES} ffn_dim activation_function enable_bias do_layer_norm_before word_embed_proj_dim layer_norm_elementwise_affine",
    "gemma": f"{LLAMAS} head_dim", "gemma2": f"{GEMMAS} attn_logit_softcapping final_logit_softcapping",
    "gemma3_text": f"{GEMMAS} final_logit_softcapping rope_local_base_freq", "olmo2": f"{LLAMAS} attention_bias",
    "olmo3": f"{LLAMAS} attention_bias sliding_window layer_types",
    "starcoder2": f"{SIZES} num_key_value_heads intermediate_size norm_epsilon hidden_act use_bias sliding_window rope_theta rope_scaling rope_parameters",
}


def test_every_family_is_in_the_table() -> None:
    kinds = {getattr(transformers, f"{kind}Config").model_type for kind, _ in MODELS.values()}
    assert kinds == set(FAMILIES) == set(VLLM)


@pytest.mark.parametrize("name", MODELS)
def test_a_family(name: str, tmp_path: Path) -> None:
    model = random_model(name, tmp_path / "theirs")
    a, _ = import_folder(tmp_path / "theirs", tmp_path / "ours")
    reader = Reader(tmp_path / "ours")
    assert reader.verify() == sum(t.nbytes for t in tensors(tmp_path / "theirs").values())
    export_folder(reader, tmp_path / "back")
    assert same_bytes(tensors(tmp_path / "theirs"), tensors(tmp_path / "back"))
    assert_same_config(tmp_path)
    assert_equal_logits(model, reader)
    assert_equal_training(model, a, reader)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def assert_same_config(folder: Path) -> None:
    """As transformers reads both, and with the keys that vLLM asks for."""
    theirs, back = (transformers.AutoConfig.from_pretrained(folder / d).to_dict() for d in ("theirs", "back"))
    for config in (theirs, back):
        if (config.get("rope_parameters") or {}).get("rope_type") == "dynamic":             # it counts from max_position_embeddings anyway
            config["rope_parameters"].pop("original_max_position_embeddings", None)
    different = {k: (theirs[k], back.get(k)) for k in theirs if k not in SAID_OTHERWISE and theirs[k] != back.get(k)}
    assert different in ({}, {"n_inner": (None, 192)}), different
    raw = json.loads((folder / "back" / "config.json").read_text())
    assert not [key for key in VLLM[raw["model_type"]].split() if key not in raw]


def data(step: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the ids that families name for padding, whose embedding transformers leaves as it is."""
    tokens = torch.randint(3, vocabulary, (2, 33), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def assert_equal_training(model: Any, a: Architecture, reader: Reader) -> None:
    """In float64: the loss of each step from the logits, since transformers takes its own in fp32."""
    twin, run = in_float64(model), started(a, reader)
    groups = [{"params": [p for p in twin.parameters() if (p.dim() > 1) == big], "weight_decay": DECAY * big} for big in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)

    def batches(step: int, first: int) -> list[Batch]:
        x, y = data(step, a.vocab_size)
        return [Batch(x, y, torch.ones(x.shape, dtype=torch.float64), torch.arange(2), step)]

    step = stepping(run, batches)
    for i in range(STEPS):
        x, y = data(i, a.vocab_size)
        loss = F.cross_entropy(twin(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step.start()
        assert step.pending and float(step.pending.verdict.loss) == pytest.approx(loss.item(), rel=1e-12, abs=0), i


def started(a: Architecture, reader: Reader) -> Run:
    """A run by the flags that the import names, with its weights."""
    dry = replace(a, attention_dropout=0.0, hidden_dropout=0.0)
    words = " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {shlex.quote(str(v))}") for k, v in flags(dry).items() if v is not None and v is not False)
    plan = resolved(f"{words} --lr {LR} --min-lr {LR} --weight-decay {DECAY} --adam-eps {EPS} --clip-grad 0 --lr-decay-style constant --mock-data "
                    f"--train-iters {STEPS} --eval-iters 0 --micro-batch-size 2 --dtype fp64")
    assert plan.architecture == replace(dry, pad_rows=plan.architecture.pad_rows)
    run = Run(plan, torch.device("cpu"), connect(Mesh.of(), 0, "gloo", 60))
    record.restore(reader, run.units.values(), {})
    return run


@pytest.mark.parametrize("words", [
    {"rope_type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 2.0}, LLAMA3, {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 5e5}], ids=str)
def test_frequencies_are_those_of_transformers(words: dict[str, Any]) -> None:
    """Also of sequences that are longer than the original length."""
    config = transformers.LlamaConfig(**LLAMA | {"head_dim": 64, "rope_parameters": {"rope_theta": 10000.0, **words}})
    rotary = from_config(config.to_dict())[0].rotary
    assert rotary
    for length in (32, 96):
        with wide():
            want, amplitude = ROPE_INIT_FUNCTIONS[words["rope_type"]](config, torch.device("cpu"), seq_len=length)
        assert rotary.frequencies(length) == pytest.approx(want.tolist(), rel=1e-14) and rotary.amplitude == pytest.approx(amplitude, rel=1e-15)
