"""Families of Hugging Face, each as transformers itself has it: there and back to the byte, equal logits, twenty equal steps of training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    FOUR,
    GEMMA,
    IDS,
    LLAMA,
    LLAMA3,
    MODELS,
    NEOX,
    OPT,
    YARN,
    assert_equal_logits,
    in_float64,
    random_model,
    same_bytes,
    tensors,
    transformers,
    wide,
)
from support import resolved, stepping, words_of

from megazero.base.errors import UserError
from megazero.comm.wires import connect
from megazero.hf.convert import export_folder, import_folder
from megazero.model.decoder import Batch
from megazero.plan.architecture import Architecture
from megazero.plan.families import FAMILIES, from_config
from megazero.plan.mesh import Mesh
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
    plan = resolved(f"{words_of(dry)} --lr {LR} --min-lr {LR} --weight-decay {DECAY} --adam-eps {EPS} --clip-grad 0 --lr-decay-style constant --mock-data "
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


def said(kind: str, values: dict[str, Any], drop: str = "rope_parameters layer_types", **more: Any) -> dict[str, Any]:
    """A config.json of a family, some of it in another form."""
    config = getattr(transformers, f"{kind}Config")(**values).to_dict()
    return {k: v for k, v in config.items() if k not in drop.split()} | more


GEMMA3, LOCAL = MODELS["gemma3"][1], {"rope_type": "default", "rope_theta": 1000.0}
OLDER = {
    "gemma3": (said("Gemma3Text", GEMMA3 | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "sliding_attention": LOCAL}}, ""),
               said("Gemma3Text", GEMMA3, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 8.0}, rope_local_base_freq=1000.0, sliding_window_pattern=6)),
    "gemma3 by default": (said("Gemma3Text", GEMMA3, ""), said("Gemma3Text", GEMMA3)),
    "gemma": (said("Gemma", GEMMA, ""), said("Gemma", GEMMA, hidden_act="gelu", hidden_activation=None, rope_theta=10000.0)),
    "gemma2": (said("Gemma2", MODELS["gemma2"][1], ""), said("Gemma2", MODELS["gemma2"][1], rope_theta=10000.0)),
    "olmo3": (said("Olmo3", MODELS["olmo3-yarn"][1], "layer_types"),
              said("Olmo3", MODELS["olmo3-yarn"][1], rope_theta=5000.0, rope_scaling={"rope_type": "yarn", **YARN, "attention_factor": None})),
    "neox": (said("GPTNeoX", MODELS["neox"][1], ""), said("GPTNeoX", MODELS["neox"][1], rotary_pct=0.25, rotary_emb_base=10000)),
    "smollm3": (said("SmolLM3", MODELS["smollm3"][1], ""), said("SmolLM3", MODELS["smollm3"][1], "no_rope_layers rope_parameters layer_types", rope_theta=2e6)),
}


@pytest.mark.parametrize("name", OLDER)
def test_other_forms_of_a_configuration_mean_the_same(name: str) -> None:
    new, old = OLDER[name]
    assert from_config(new)[0] == from_config(old)[0]


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "a kind of layer": (said("Gemma2", GEMMA, layer_types=["chunked_attention", "full_attention"]), "layer_types: chunked_attention is not known here; there are full_attention, sliding"),
    "kinds of other layers": (said("Gemma2", GEMMA, layer_types=["full_attention"]), "layer_types: names 1 layers of 2"),
    "a window that is text": (said("Gemma2", GEMMA, sliding_window="7"), "sliding_window is '7', not null or a whole number"),
    "both directions": (said("Gemma", GEMMA, use_bidirectional_attention=True), "use_bidirectional_attention is True, this decoder has False"),
    "scores by nothing": (said("Gemma2", GEMMA, query_pre_attn_scalar=0), "query_pre_attn_scalar: is 0, not above 0"),
    "narrow embeddings": (said("OPT", OPT, word_embed_proj_dim=24), "word_embed_proj_dim is 24, this decoder has hidden_size 48"),
    "norms elsewhere": (said("OPT", OPT, do_layer_norm_before=False), "do_layer_norm_before is False, this decoder has True"),
    "rotation of some layers": (said("SmolLM3", FOUR | IDS, no_rope_layers=[1, 0]), r"no_rope_layers: is \[1, 0\], not a list of 0 and 1 for each of 4 layers"),
    "two stretches": (said("Gemma3Text", GEMMA, rope_parameters={"full_attention": LOCAL, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
                      "sliding_attention is stretched, and not as full_attention is"),
    "two ropes where there is one": (said("Llama", LLAMA, rope_parameters={"full_attention": LOCAL}), "rope_parameters: has full_attention, which is not known here"),
    "an odd part": (said("GPTNeoX", NEOX, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.2}), "its heads of 16 cannot turn 3 channels"),
    "a base that turns nothing": (said("Llama", LLAMA, rope_parameters={"rope_type": "yarn", **YARN, "rope_theta": 1.0}), "its rotary scaling cannot be on the base 1"),
    "a cap below zero": (said("Gemma2", GEMMA, attn_logit_softcapping=-1.0), "multiplies, caps or divides by a number below 0"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_family_cannot_be_here_is_one_sentence(name: str) -> None:
    config, sentence = STRANGE[name]
    with pytest.raises(UserError, match=sentence) as error:
        from_config(config)
    assert len(error.value.sentences) == 1 and str(error.value).endswith(".")
