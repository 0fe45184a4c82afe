"""Families of transformers, tiny and random, at every level and with both kinds of its gradient checkpointing: two ranks equal one of plain torch, in
float64. All of them under `full`; a few, drawn by a seed, always."""

import random
from typing import Any

import pytest
import torch
from pool import Pool
from torch import nn

import megazero

transformers = pytest.importorskip("transformers")
Tensor = torch.Tensor
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 29, "max_position_embeddings": 32,
         "pad_token_id": 0}
GQA = {"num_key_value_heads": 1}
HALVES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
          "decoder_ffn_dim": 24, "vocab_size": 29, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "decoder_start_token_id": 1}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DRY = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
       "attn_pdrop": 0.0, "dropout": 0.0, "dropout_rate": 0.0, "embedding_dropout": 0.0, "activation_dropout": 0.0}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 29}
# the Auto class's task, and what makes it small
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("CausalLM", {**SIZES, **GQA}) for name in ("llama", "mistral", "qwen2", "gemma", "phi3", "cohere", "olmo", "olmo2", "granite", "stablelm", "starcoder2")},
    **{name: ("CausalLM", {**SIZES, **GQA, "head_dim": 8}) for name in ("qwen3", "gemma2", "glm")},
    **dict.fromkeys(("gpt_neox", "phi"), ("CausalLM", SIZES)),
    "gpt2": ("CausalLM", GPT), "gptj": ("CausalLM", {**GPT, "rotary_dim": 4}), "codegen": ("CausalLM", {**GPT, "n_head": 4, "rotary_dim": 4}),
    "gpt_bigcode": ("CausalLM", GPT), "gpt_neo": ("CausalLM", {**SIZES, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    "opt": ("CausalLM", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}), "bloom": ("CausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 29}),
    "falcon": ("CausalLM", SIZES), "mpt": ("CausalLM", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "vocab_size": 29}),
    "mixtral": ("CausalLM", {**SIZES, **GQA, "num_local_experts": 3}), "qwen3_moe": ("CausalLM", {**SIZES, **GQA, **EXPERTS, "head_dim": 8}),
    "olmoe": ("CausalLM", {**SIZES, **EXPERTS}), "mamba": ("CausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 29, "state_size": 4}),
    **dict.fromkeys(("bert", "roberta", "deberta-v2", "electra"), ("MaskedLM", SIZES)), "albert": ("MaskedLM", {**SIZES, "embedding_size": 8}),
    "distilbert": ("MaskedLM", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 29, "max_position_embeddings": 32}),
    "t5": ("Seq2SeqLM", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 29, "decoder_start_token_id": 0}),
    "bart": ("Seq2SeqLM", HALVES), "marian": ("Seq2SeqLM", HALVES),
    "whisper": ("SpeechSeq2Seq", {**HALVES, "max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 6}),
    "vit": ("ImageClassification", {**SIZES, "image_size": 8, "patch_size": 4})}
# these compute norms or states in fp32 whatever their dtype, and round twice as often where two ranks have half a batch each: 2**-24, twenty times
IN_FP32 = dict.fromkeys(("gemma", "gemma2", "cohere", "mamba"), 1e-6)
LEVELS = ((0, None), (1, False), (2, True), (3, False), (3, True), (3, None))      # and use_reentrant of checkpointing, or none


def built(family: str, reentrant: bool | None) -> nn.Module:
    transformers.logging.set_verbosity_error()
    task, words = FAMILIES[family]
    known = transformers.AutoConfig.for_model(family).to_dict()
    config = transformers.AutoConfig.for_model(family, **{key: value for key, value in DRY.items() if key in known}, **words)
    config._attn_implementation = config._experts_implementation = "eager"             # others have no kernel in float64
    torch.manual_seed(3)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).double().train()
    if reentrant is not None and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model                                                                                 # type: ignore[no-any-return]


def data(family: str, step: int) -> dict[str, Tensor]:
    """Of all ranks."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 29, (4, 8), generator=draw)
    task = FAMILIES[family][0]
    if task == "ImageClassification":
        return {"pixel_values": torch.rand(4, 3, 8, 8, generator=draw, dtype=torch.float64)}
    if task == "SpeechSeq2Seq":
        return {"input_features": torch.rand(4, 6, 16, generator=draw, dtype=torch.float64), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if task == "Seq2SeqLM" else {"input_ids": ids}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of logits in their own dtype; transformers' own is taken in fp32."""
    logits = model(**batch).logits
    return (torch.log_softmax(logits, -1)[..., :2] * torch.arange(1, 3, dtype=logits.dtype)).mean()


def plainly(family: str) -> list[float]:
    model = built(family, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    return [taken(model, optimizer, family, step) for step in range(2)] + [norm(model)]


def taken(model: nn.Module, optimizer: Any, family: str, step: int) -> float:
    value = loss(model, data(family, step))
    optimizer.zero_grad()
    value.backward()                                                                             # type: ignore[no-untyped-call]
    for p in model.parameters():                                # an engine's are zero where torch has none
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    return value.item()


def norm(model: nn.Module) -> float:
    return sum(float((p.detach() * torch.linspace(1, 2, p.numel()).view(p.shape)).sum()) for p in model.parameters())


def engines(family: str, level: int, reentrant: bool | None) -> list[float]:
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}},
              "zero_optimization": {"stage": level}, "gradient_clipping": 0.0}
    engine = megazero.initialize(model=built(family, reentrant), config=config)[0]
    values = []
    for step in range(2):
        rank, world = engine.global_rank, engine.world_size
        value = loss(engine, {name: t.chunk(world)[rank] for name, t in data(family, step).items()})
        engine.backward(value)
        engine.step()
        values.append(value.item())
    with engine.whole():
        values.append(norm(engine.module))
    engine.destroy()
    return values


def compared(family: str, level: int, reentrant: bool | None, pool: Pool) -> None:
    want, ranks = plainly(family), pool.run(2, engines, family, level, reentrant)
    got = [*(sum(pair) / 2 for pair in zip(*(r[:2] for r in ranks), strict=True)), ranks[0][2]]
    assert got == pytest.approx(want, rel=IN_FP32.get(family, 1e-12), abs=1e-12), (family, level, reentrant)
    assert ranks[0][2] == ranks[1][2]


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


CASES = [(family, *level) for family in FAMILIES for level in LEVELS]


@pytest.mark.parametrize(("family", "level", "reentrant"), random.Random(13).sample(CASES, 8))
def test_a_few_families(family: str, level: int, reentrant: bool | None, pool: Pool) -> None:
    compared(family, level, reentrant, pool)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, pool: Pool) -> None:
    for level, reentrant in LEVELS:
        compared(family, level, reentrant, pool)
