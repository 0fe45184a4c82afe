"""Tiny random models of transformers, one row for each way in which a family can be said, and what they are held against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megazero.run.generate import build_from_checkpoint, logits
from megazero.state.checkpoint import Reader

transformers = pytest.importorskip("transformers", reason="conversion is tested against transformers, which is not installed")


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
GPT2 = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
LLAMA = {"vocab_size": 101, "max_position_embeddings": 32, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GRANITE = {"embedding_multiplier": 5.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 3.0}
PHI3 = LLAMA | IDS
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"hidden_size": 64}
OPT = {"vocab_size": 101, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0}
GEMMA = LLAMA | {"head_dim": 20}
CAPPED = {"num_hidden_layers": 3, "sliding_window": 7, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5, "query_pre_attn_scalar": 30}
OLMO = {"pad_token_id": 0, "eos_token_id": 2}
FOUR = LLAMA | {"num_hidden_layers": 4}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
# the classes' name, and what is said of one
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 100}),
    "gpt2-relu2": ("GPT2", GPT2 | {"activation_function": "relu2", "layer_norm_epsilon": 1e-6}),
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-scaled": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "head_dim": 20, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-biases": ("Llama", LLAMA | {"attention_bias": True}), "llama-mlp-biases": ("Llama", LLAMA | {"mlp_bias": True}),
    "llama-linear": ("Llama", LLAMA | rope("linear", factor=3.0)), "llama-dynamic": ("Llama", LLAMA | rope("dynamic", factor=2.0)),
    "llama-yarn": ("Llama", LLAMA | rope("yarn", **YARN)),
    "llama-yarn-said": ("Llama", LLAMA | rope("yarn", **YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.25, truncate=False)),
    "llama-yarn-mscale": ("Llama", LLAMA | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.5)),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 20}), "mistral-window": ("Mistral", LLAMA | {"sliding_window": 7}),
    "qwen2": ("Qwen2", LLAMA), "qwen2-tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-upper-window": ("Qwen2", FOUR | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 20}), "qwen3-biases": ("Qwen3", LLAMA | {"attention_bias": True, "head_dim": 12}),
    "qwen3-window": ("Qwen3", LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3-mixed": ("Qwen3", FOUR | {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED, "max_window_layers": 1}),
    "phi3": ("Phi3", PHI3), "phi3-partial": ("Phi3", PHI3 | rope("default", partial_rotary_factor=0.5)),
    "phi3-window": ("Phi3", PHI3 | {"sliding_window": 5}), "starcoder2-window": ("Starcoder2", LLAMA | {"sliding_window": 40}),
    "starcoder2": ("Starcoder2", LLAMA), "starcoder2-untied": ("Starcoder2", LLAMA | {"hidden_act": "gelu", "tie_word_embeddings": False}),
    "starcoder2-plain": ("Starcoder2", LLAMA | {"use_bias": False}),
    "granite": ("Granite", LLAMA | GRANITE), "granite-biases": ("Granite", LLAMA | GRANITE | {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "attention_multiplier": 12**-0.5}),
    "smollm3": ("SmolLM3", FOUR | IDS), "smollm3-mixed": ("SmolLM3", FOUR | IDS | {
        "no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 7, "layer_types": MIXED, "attention_bias": True}),
    "neox": ("GPTNeoX", NEOX), "neox-serial": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    "neox-turned": ("GPTNeoX", NEOX | {"hidden_act": "gelu_new", "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 1.0}}),
    "opt": ("OPT", OPT), "opt-untied": ("OPT", OPT | {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "gemma": ("Gemma", GEMMA), "gemma-biases": ("Gemma", GEMMA | {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", GEMMA | CAPPED), "gemma2-full": ("Gemma2", GEMMA | CAPPED | {
        "query_pre_attn_scalar": 20, "layer_types": ["full_attention"] * 3, "final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 17}),
    "gemma3-scaled": ("Gemma3Text", GEMMA | {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": MIXED, "final_logit_softcapping": 2.0, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}}),
    "olmo2": ("Olmo2", LLAMA | OLMO), "olmo2-biases": ("Olmo2", LLAMA | OLMO | {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", FOUR | OLMO | {"sliding_window": 7}),
    "olmo3-yarn": ("Olmo3", FOUR | OLMO | {"sliding_window": 7, "layer_types": MIXED, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 5000.0, **YARN}, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}}),
}


def random_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, vocab_size: int = 101, **saving: Any) -> Any:
    """A tiny model of transformers with no weight at a special value, saved to `folder`."""
    kind, values = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(values) | {"vocab_size": vocab_size})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    model.to(dtype).eval().save_pretrained(folder, **saving)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
                                        and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@contextmanager
def wide() -> Iterator[None]:
    """Here fp32 is float64. transformers' norms, angles and softmax ask for fp32 by name, whatever the model's dtype is."""
    plain = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64                                                  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double                                                     # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = plain[:3]                               # type: ignore[misc,method-assign]
        torch.set_default_dtype(plain[3])


def in_float64(model: Any) -> Any:
    """The same model, which computes in float64 throughout."""
    with wide():
        twin = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager").double()
        twin.load_state_dict(model.state_dict())
    plain = twin.forward

    def forward(*args: Any, **words: Any) -> Any:
        with wide():
            return plain(*args, **words)
    twin.forward = forward
    return twin.eval()


def assert_equal_logits(model: Any, reader: Reader, length: int = 32) -> None:
    """fp64 to 1e-12 of the largest; fp32, with transformers as it is, to 1e-5: sums of 48 to 100 products in another order."""
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        narrow = copy.deepcopy(model).float().eval()(tokens).logits
        assert (logits(build_from_checkpoint(reader), tokens) - narrow).abs().max() <= 1e-5 * narrow.abs().max()
        exact = in_float64(model)(tokens).logits
        worst = (logits(build_from_checkpoint(reader, "fp64"), tokens) - exact).abs().max().item()
    assert exact.dtype == torch.float64 and worst < 1e-12 * exact.abs().max(), worst
