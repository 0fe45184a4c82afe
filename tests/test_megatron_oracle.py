"""Megatron-core's own GPTModel on a CPU gives our curve: the same data in Megatron's order, its defaults, first weights from our step 0 by its documented
names. `pip install megatron-core` runs it; elsewhere it is skipped."""

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import built, byte_dataset, fed, train

warnings.filterwarnings("ignore", module="megatron")
core = pytest.importorskip("megatron.core", reason="the oracle is Megatron-core, which is not installed")
S, HEADS, HIDDEN, MICRO, ACCUMULATE, STEPS = 32, 4, 64, 2, 2, 30
LR, MIN_LR, WARMUP, DECAY, CLIP = 3e-3, 3e-4, 5, 0.1, 1.0
RUN = (f"--num-layers 2 --hidden-size {HIDDEN} --num-attention-heads {HEADS} --seq-length {S} --max-position-embeddings {S} --micro-batch-size {MICRO} "
       f"--global-batch-size {MICRO * ACCUMULATE} --lr {LR} --min-lr {MIN_LR} --lr-warmup-iters {WARMUP} --lr-decay-style cosine --weight-decay {DECAY} "
       f"--clip-grad {CLIP} --init-method-std 0.05 --tokenizer-type ByteTokenizer --vocab-size 384 --split 9,1,0 --eval-iters 0 --train-iters {STEPS} "
       "--megatron-defaults --attention-dropout 0 --hidden-dropout 0 --log-interval 1")
MODELS = {
    "gpt": "",
    "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --group-query-attention --disable-bias-linear "
             "--untie-embeddings-and-output-weights --qk-layernorm",
}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Megatron's process groups of one rank; its random states are CUDA's, and nothing draws here."""
    from megatron.core import parallel_state, tensor_parallel
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    patched = pytest.MonkeyPatch()
    tracker = SimpleNamespace(fork=lambda *_: nullcontext(), is_initialized=lambda: True)
    for module in (tensor_parallel, tensor_parallel.random, tensor_parallel.layers):
        patched.setattr(module, "get_cuda_rng_tracker", lambda *_, **__: tracker, raising=False)
    patched.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    yield
    patched.undo()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def megatrons(name: str) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    llama = name == "llama"
    config = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=2 if llama else HEADS, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-5, gated_linear_unit=llama, activation_func=F.silu if llama else F.gelu,
        ffn_hidden_size=HIDDEN * 8 // 3 // 64 * 64 if llama else 4 * HIDDEN, add_bias_linear=not llama, bias_activation_fusion=not llama,
        normalization="RMSNorm" if llama else "LayerNorm", qk_layernorm=llama, masked_softmax_fusion=False)
    return GPTModel(config, get_gpt_layer_local_spec(qk_layernorm=llama, normalization=config.normalization), 384, S,
                    share_embeddings_and_output_weights=not llama, position_embedding_type="rope" if llama else "learned_absolute")


def given(model: Any, ours: dict[str, torch.Tensor], llama: bool) -> None:
    """Our weights by Megatron's names: q, k, v of each group of heads lie together in one matrix, gate and up in another."""
    groups = 2 if llama else HEADS
    theirs = {"embedding.word_embeddings.weight": ours["embedding.weight"], "decoder.final_layernorm.weight": ours["head.norm.weight"]}
    if llama:
        theirs["output_layer.weight"] = ours["head.output.weight"]
    else:
        theirs |= {"embedding.position_embeddings.weight": ours["positions.weight"], "decoder.final_layernorm.bias": ours["head.norm.bias"]}
    for i in range(2):
        at, mlp, layer = f"layers.{i}.attention", f"layers.{i}.mlp", f"decoder.layers.{i}"
        for kind in ["weight"] + ["bias"] * (not llama):
            q, k, v = (ours[f"{at}.{n}.{kind}"].view(groups, -1, *ours[f"{at}.{n}.{kind}"].shape[1:]) for n in "qkv")
            theirs[f"{layer}.self_attention.linear_qkv.{kind}"] = torch.cat((q, k, v), 1).flatten(0, 1)
            theirs |= {f"{layer}.self_attention.linear_proj.{kind}": ours[f"{at}.o.{kind}"], f"{layer}.mlp.linear_fc2.{kind}": ours[f"{mlp}.down.{kind}"],
                       f"{layer}.input_layernorm.{kind}": ours[f"{at}.norm.{kind}"], f"{layer}.pre_mlp_layernorm.{kind}": ours[f"{mlp}.norm.{kind}"],
                       f"{layer}.mlp.linear_fc1.{kind}": torch.cat([ours[f"{mlp}.{n}.{kind}"] for n in (["gate", "up"] if llama else ["up"])])}
        if llama:
            theirs |= {f"{layer}.self_attention.{n}_layernorm.weight": ours[f"{at}.{n}_norm.weight"] for n in "qk"}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == theirs.keys(), parameters.keys() ^ theirs.keys()
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(theirs[key])


def rate(step: int) -> float:
    """Megatron's, of steps counted from 0: from 0 up to LR, then half a cosine down to MIN_LR."""
    if step <= WARMUP:
        return LR * step / WARMUP
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


@pytest.mark.parametrize("name", MODELS)
def test_thirty_steps_equal_megatron_core(name: str, one_rank: None, tmp_path: Path) -> None:
    words = f"{RUN} {MODELS[name]} --data-path {byte_dataset(tmp_path)}"
    ours = [line["loss"] for line in train(words, tmp_path / "log")]
    run = built(words)
    run.initialise()
    start = {p.shard.parameter.name: u.master[p.start:p.stop].view(p.shard.parameter.shape).clone() for u in run.units.values() for p in u.flat.pieces}
    feed, model = fed(run), megatrons(name)
    given(model, start, name == "llama")
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.999), eps=1e-8)
    theirs = []
    hidden = torch.triu(torch.ones(S, S, dtype=torch.bool), 1)[None, None]
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch in feed.batches(step, step * MICRO * ACCUMULATE):
            places = torch.arange(S).expand_as(batch.tokens)
            loss = model(batch.tokens, places, hidden, labels=batch.targets).mean() / ACCUMULATE
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        theirs.append(total)
    assert theirs[0] > 5 and theirs[-1] < theirs[0] - 0.5
    assert ours == pytest.approx(theirs, abs=2e-4)
