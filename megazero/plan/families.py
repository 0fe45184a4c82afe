"""The model families of Hugging Face that the decoder can be; a new one is one more entry of FAMILIES. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megazero.base import UserError
from megazero.plan.architecture import Architecture
from megazero.plan.facets import MULTIPLIER, SAME_WIDTH, SCALAR, STILL, UPPER, Rope, alternating
from megazero.plan.family import Family, Field, Row, beyond, expressed, follows, obstacles, possible, word

# ---- fields that many have, where nothing is said otherwise

SIZES = (Field("num_hidden_layers", "layers"), Field("hidden_size", "hidden"), Field("num_attention_heads", "heads"),
         Field("vocab_size", "vocab_size"), Field("intermediate_size", "ffn"),
         Field("attention_dropout", "attention_dropout", 0.0))
GROUPS = Field("num_key_value_heads", "kv_heads", lambda v: v["heads"])
SHARED = follows("head_dim", lambda v: v["hidden"] // v["heads"])               # heads share the width
OWN = Field("head_dim", "head_dim", lambda v: v["hidden"] // v["heads"])
SILU = Field("hidden_act", "activation", "silu", {"silu": "swiglu"})
ATTENTION_BIASES = (Field("attention_bias", "qkv_bias", False), Field("attention_bias", "o_bias", False))
MLP_BIAS = Field("mlp_bias", "bias", False)
NO_BIAS = {"bias": False, "qkv_bias": False, "o_bias": False}
RMS = {"norm": "RMSNorm", "norm_bias": False}


def usual(length: int, epsilon: float = 1e-6, tied: bool = False) -> tuple[Field, ...]:
    return (Field("max_position_embeddings", "seq_length", length), Field("rms_norm_eps", "epsilon", epsilon),
            Field("tie_word_embeddings", "tied", tied), Field("initializer_range", "init_std", 0.02))


def all_within(default: int) -> Field:
    """That of all layers."""
    return Field("sliding_window", "window", default, null=0)


# ---- rows that many have

AT, MLP, LAYER = "layers.{}.attention", "layers.{}.mlp", "model.layers.{}"


def linear(theirs: str, *ours: str, bias: str = "") -> tuple[Row, ...]:
    """A matrix, and the bias that is there if Architecture has what `bias` names."""
    return (Row(f"{theirs}.weight", tuple(f"{n}.weight" for n in ours)),
            *([Row(f"{theirs}.bias", tuple(f"{n}.bias" for n in ours), when=bias)] if bias else []))


def conv(theirs: str, *ours: str) -> tuple[Row, ...]:
    """A Conv1D of GPT-2: a linear layer whose matrix is stored [in, out]."""
    return (Row(f"{theirs}.weight", tuple(f"{n}.weight" for n in ours), transpose=True),
            Row(f"{theirs}.bias", tuple(f"{n}.bias" for n in ours)))


def norm_pair(theirs: str, ours: str) -> tuple[Row, ...]:
    """A LayerNorm."""
    return (Row(f"{theirs}.weight", (f"{ours}.weight",)), Row(f"{theirs}.bias", (f"{ours}.bias",)))


ENDS = (Row("model.embed_tokens.weight", ("embedding.weight",)),
        Row("lm_head.weight", ("head.output.weight",), when="untied"))
NORMS = (Row(f"{LAYER}.input_layernorm.weight", (f"{AT}.norm.weight",)),
         Row(f"{LAYER}.post_attention_layernorm.weight", (f"{MLP}.norm.weight",)))
LAST_NORM = Row("model.norm.weight", ("head.norm.weight",))
ATTENTION = (*(row for n in "qkv" for row in linear(f"{LAYER}.self_attn.{n}_proj", f"{AT}.{n}", bias="qkv_bias")),
             *linear(f"{LAYER}.self_attn.o_proj", f"{AT}.o", bias="o_bias"))
GATED_MLP = tuple(row for n in ("gate", "up", "down")
                  for row in linear(f"{LAYER}.mlp.{n}_proj", f"{MLP}.{n}", bias="bias"))
HEAD_NORMS = tuple(Row(f"{LAYER}.self_attn.{n}_norm.weight", (f"{AT}.{n}_norm.weight",)) for n in "qk")

# ---- families

H = "transformer.h.{}"
GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "transformer.",
    fields=(
        Field("n_layer", "layers"), Field("n_embd", "hidden"), Field("n_head", "heads"),
        Field("vocab_size", "vocab_size"), Field("n_inner", "ffn", lambda v: 4 * v["hidden"]),
        Field("n_positions", "learned_positions"), Field("layer_norm_epsilon", "epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", True), Field("initializer_range", "init_std", 0.02),
        Field("activation_function", "activation", "gelu_new",
              {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}),
        Field("attn_pdrop", "attention_dropout", 0.1), Field("resid_pdrop", "hidden_dropout", 0.1),
        Field("embd_pdrop", "hidden_dropout", 0.1), SHARED,
        follows("kv_heads", lambda v: v["heads"]), follows("seq_length", lambda v: v["learned_positions"]),
    ),
    fixed={},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
          "quantization_config": None},
    rows=(
        Row("transformer.wte.weight", ("embedding.weight",)), Row("transformer.wpe.weight", ("positions.weight",)),
        *norm_pair(f"{H}.ln_1", f"{AT}.norm"), *conv(f"{H}.attn.c_attn", f"{AT}.q", f"{AT}.k", f"{AT}.v"),
        *conv(f"{H}.attn.c_proj", f"{AT}.o"), *norm_pair(f"{H}.ln_2", f"{MLP}.norm"),
        *conv(f"{H}.mlp.c_fc", f"{MLP}.up"), *conv(f"{H}.mlp.c_proj", f"{MLP}.down"),
        *norm_pair("transformer.ln_f", "head.norm"), Row("lm_head.weight", ("head.output.weight",), when="untied"),
    ),
    buffers=r".*\.attn\.(masked_)?bias", always={})

LLAMA = Family(
    "llama", "LlamaForCausalLM", "model.",
    fields=(*SIZES, GROUPS, OWN, SILU, *usual(2048), *ATTENTION_BIASES, MLP_BIAS, Rope().facet),
    fixed=RMS, only={"quantization_config": None}, rows=(*ENDS, *NORMS, *ATTENTION, *GATED_MLP, LAST_NORM),
    buffers=r".*rotary_emb\.inv_freq", always={})

MISTRAL = replace(
    LLAMA, model_type="mistral", class_name="MistralForCausalLM",
    fields=(*SIZES, GROUPS, OWN, SILU, *usual(4096 * 32), all_within(4096), Rope().facet), fixed={**RMS, **NO_BIAS})

# biases on q, k and v alone
QWEN2 = replace(
    LLAMA, model_type="qwen2", class_name="Qwen2ForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, SILU, *usual(32768), Rope().facet, UPPER),
    fixed={**RMS, **NO_BIAS, "qkv_bias": True})

# norms over each head of q and k
QWEN3 = replace(
    LLAMA, model_type="qwen3", class_name="Qwen3ForCausalLM",
    fields=(*SIZES, GROUPS, Field("head_dim", "head_dim", 128), SILU, *usual(32768), *ATTENTION_BIASES, Rope().facet,
            UPPER),
    fixed={**RMS, "bias": False, "qk_norm": "head"}, rows=(*LLAMA.rows, *HEAD_NORMS))

# q, k, v in one matrix, gate and up in another
PHI3 = replace(
    LLAMA, model_type="phi3", class_name="Phi3ForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, SILU, *usual(4096, 1e-5), Field("resid_pdrop", "hidden_dropout", 0.0),
            Field("embd_pdrop", "hidden_dropout", 0.0), all_within(0),
            Rope(part="partial_rotary_factor", scalings=()).facet),
    fixed={**RMS, **NO_BIAS},
    rows=(*ENDS, *NORMS, *linear(f"{LAYER}.self_attn.qkv_proj", f"{AT}.q", f"{AT}.k", f"{AT}.v"),
          *linear(f"{LAYER}.self_attn.o_proj", f"{AT}.o"),
          *linear(f"{LAYER}.mlp.gate_up_proj", f"{MLP}.gate", f"{MLP}.up"),
          *linear(f"{LAYER}.mlp.down_proj", f"{MLP}.down"), LAST_NORM))

# LayerNorm, biases everywhere or in the norms alone, an MLP of two matrices
STARCODER2 = replace(
    LLAMA, model_type="starcoder2", class_name="Starcoder2ForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, Field("norm_epsilon", "epsilon", 1e-5),
            *(Field("use_bias", ours, True) for ours in NO_BIAS),
            Field("hidden_act", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}),
            Field("tie_word_embeddings", "tied", True), Field("initializer_range", "init_std", 0.018042),
            Field("residual_dropout", "hidden_dropout", 0.0), Field("embedding_dropout", "hidden_dropout", 0.0),
            Field("max_position_embeddings", "seq_length", 4096), all_within(0), Rope().facet),
    fixed={},
    rows=(*ENDS, *norm_pair(f"{LAYER}.input_layernorm", f"{AT}.norm"), *ATTENTION,
          *norm_pair(f"{LAYER}.post_attention_layernorm", f"{MLP}.norm"),
          *linear(f"{LAYER}.mlp.c_fc", f"{MLP}.up", bias="bias"),
          *linear(f"{LAYER}.mlp.c_proj", f"{MLP}.down", bias="bias"), *norm_pair("model.norm", "head.norm")))

# Llama whose parts are multiplied
GRANITE = replace(
    LLAMA, model_type="granite", class_name="GraniteForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, SILU, *usual(2048), *ATTENTION_BIASES, MLP_BIAS, Rope().facet,
            Field("embedding_multiplier", "embedding_multiplier", 1.0),
            Field("residual_multiplier", "residual_multiplier", 1.0), Field("logits_scaling", "logits_scaling", 1.0),
            MULTIPLIER))

# Llama some of whose layers turn nothing
SMOLLM3 = replace(
    LLAMA, model_type="smollm3", class_name="SmolLM3ForCausalLM",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads", 4, null=lambda v: v["heads"]), SHARED, SILU,
            *usual(32768, tied=True), *ATTENTION_BIASES, MLP_BIAS, Rope(base=2e6).facet, STILL))

# attention and MLP side by side, q, k, v head by head in one matrix
NEOX = "gpt_neox.layers.{}"
GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.",
    fields=(*SIZES, follows("kv_heads", lambda v: v["heads"]), SHARED, Field("layer_norm_eps", "epsilon", 1e-5),
            Field("hidden_act", "activation", "gelu",
                  {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
                   "relu": "relu", "relu2": "relu2"}),
            Field("hidden_dropout", "hidden_dropout", 0.0), Field("max_position_embeddings", "seq_length", 2048),
            Field("initializer_range", "init_std", 0.02), Field("tie_word_embeddings", "tied", False),
            Field("use_parallel_residual", "parallel_residual", True), Field("attention_bias", "qkv_bias", True),
            Field("attention_bias", "o_bias", True), Rope("rotary_emb_base", part="rotary_pct", turns=0.25).facet),
    fixed={}, only={"quantization_config": None, "is_decoder": False},
    rows=(Row("gpt_neox.embed_in.weight", ("embedding.weight",)),
          *norm_pair(f"{NEOX}.input_layernorm", f"{AT}.norm"),
          *(row._replace(dealt="heads") for row in linear(f"{NEOX}.attention.query_key_value", f"{AT}.q", f"{AT}.k",
                                                          f"{AT}.v", bias="qkv_bias")),
          *linear(f"{NEOX}.attention.dense", f"{AT}.o", bias="o_bias"),
          *norm_pair(f"{NEOX}.post_attention_layernorm", f"{MLP}.norm"),
          *linear(f"{NEOX}.mlp.dense_h_to_4h", f"{MLP}.up", bias="bias"),
          *linear(f"{NEOX}.mlp.dense_4h_to_h", f"{MLP}.down", bias="bias"),
          *norm_pair("gpt_neox.final_layer_norm", "head.norm"),
          Row("embed_out.weight", ("head.output.weight",), when="untied")),
    buffers=r".*\.attention\.(masked_)?bias|.*rotary_emb\.inv_freq", always={})

# learned positions that begin at row 2. Its dropout leaves out the embeddings
DECODER = "model.decoder.layers.{}"
OPT = Family(
    "opt", "OPTForCausalLM", "model.",
    fields=(Field("num_hidden_layers", "layers"), Field("hidden_size", "hidden"),
            Field("num_attention_heads", "heads"), Field("vocab_size", "vocab_size"), Field("ffn_dim", "ffn"),
            follows("kv_heads", lambda v: v["heads"]), SHARED,
            Field("max_position_embeddings", "learned_positions", 2048),
            follows("seq_length", lambda v: v["learned_positions"]),
            Field("activation_function", "activation", "relu",
                  {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                   "relu2": "relu2"}),
            Field("dropout", "hidden_dropout", 0.1), Field("attention_dropout", "attention_dropout", 0.0),
            Field("init_std", "init_std", 0.02), Field("tie_word_embeddings", "tied", True),
            *(Field("enable_bias", ours, True) for ours in NO_BIAS), SAME_WIDTH),
    fixed={"position_offset": 2, "epsilon": 1e-5},
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
          "layerdrop": 0.0, "quantization_config": None},
    rows=(Row("model.decoder.embed_tokens.weight", ("embedding.weight",)),
          Row("model.decoder.embed_positions.weight", ("positions.weight",)),
          *norm_pair(f"{DECODER}.self_attn_layer_norm", f"{AT}.norm"),
          *(row for n in "qkv" for row in linear(f"{DECODER}.self_attn.{n}_proj", f"{AT}.{n}", bias="qkv_bias")),
          *linear(f"{DECODER}.self_attn.out_proj", f"{AT}.o", bias="o_bias"),
          *norm_pair(f"{DECODER}.final_layer_norm", f"{MLP}.norm"),
          *linear(f"{DECODER}.fc1", f"{MLP}.up", bias="bias"), *linear(f"{DECODER}.fc2", f"{MLP}.down", bias="bias"),
          *norm_pair("model.decoder.final_layer_norm", "head.norm"),
          Row("lm_head.weight", ("head.output.weight",), when="untied")),
    buffers="", always={"do_layer_norm_before": True, "_remove_final_layer_norm": False,
                        "layer_norm_elementwise_affine": True})

# 1 + weight in norms, embeddings times the root of their width
GEGLU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu_tanh"}           # of Gemma `gelu` always meant that
TIMES_ROOT = follows("embedding_multiplier", lambda v: v["hidden"] ** 0.5)
GEMMA = replace(
    LLAMA, model_type="gemma", class_name="GemmaForCausalLM",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads", 16), Field("head_dim", "head_dim", 256),
            Field("hidden_act", "activation", "gelu_pytorch_tanh", GEGLU), *usual(8192, tied=True), *ATTENTION_BIASES,
            Rope().facet, TIMES_ROOT),
    fixed={**RMS, "bias": False, "norm_plus_one": True},
    only={"quantization_config": None, "use_bidirectional_attention": False,
          "hidden_activation": "gelu_pytorch_tanh"})

# norms on both sides, and every second layer sees a window
SANDWICH = (
    Row(f"{LAYER}.input_layernorm.weight", (f"{AT}.norm.weight",)),
    Row(f"{LAYER}.post_attention_layernorm.weight", (f"{AT}.post_norm.weight",)),
    Row(f"{LAYER}.pre_feedforward_layernorm.weight", (f"{MLP}.norm.weight",)),
    Row(f"{LAYER}.post_feedforward_layernorm.weight", (f"{MLP}.post_norm.weight",)))
GEMMA2 = replace(
    GEMMA, model_type="gemma2", class_name="Gemma2ForCausalLM",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads", 4), Field("head_dim", "head_dim", 256),
            Field("hidden_activation", "activation", "gelu_pytorch_tanh", GEGLU), *usual(8192, tied=True),
            *ATTENTION_BIASES, Rope().facet, TIMES_ROOT, SCALAR, alternating(2, 4096),
            Field("attn_logit_softcapping", "attention_softcap", 50.0, null=0.0),
            Field("final_logit_softcapping", "logits_softcap", 30.0, null=0.0)),
    fixed={**GEMMA.fixed, "post_norm": True},
    only={"quantization_config": None, "use_bidirectional_attention": False},
    rows=(*ENDS, *SANDWICH, *ATTENTION, *GATED_MLP, LAST_NORM))

# norms of q and k instead of caps, five layers of six with a window and a base of their own
GEMMA3 = replace(
    GEMMA2, model_type="gemma3_text", class_name="Gemma3ForCausalLM",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads", 4), Field("head_dim", "head_dim", 256),
            Field("hidden_activation", "activation", "gelu_pytorch_tanh", GEGLU), *usual(131072, tied=True),
            *ATTENTION_BIASES, Rope(base=1e6, local="rope_local_base_freq", local_base=1e4, nested=True).facet,
            TIMES_ROOT, SCALAR, alternating(6, 4096),
            Field("final_logit_softcapping", "logits_softcap", 0.0, null=0.0)),
    fixed={**GEMMA2.fixed, "qk_norm": "head"}, rows=(*GEMMA2.rows, *HEAD_NORMS))

# norms of what comes out alone, and of q and k over all heads
OLMO2 = replace(
    LLAMA, model_type="olmo2", class_name="Olmo2ForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, SILU, *usual(2048, 1e-5), *ATTENTION_BIASES, Rope().facet),
    fixed={**RMS, "bias": False, "pre_norm": False, "post_norm": True, "qk_norm": "width"},
    rows=(*ENDS, *(row for row in SANDWICH if "post_" in row.theirs), *ATTENTION, *GATED_MLP, LAST_NORM, *HEAD_NORMS))

# three layers of four see a window, and are not stretched
OLMO3 = replace(
    OLMO2, model_type="olmo3", class_name="Olmo3ForCausalLM",
    fields=(*SIZES, GROUPS, SHARED, SILU, *usual(2048, 1e-5), *ATTENTION_BIASES,
            Rope(base=5e5, nested=True).facet, alternating(4, 4096)))

FAMILIES = {f.model_type: f for f in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, STARCODER2, GRANITE, SMOLLM3, GPT_NEOX,
                                      OPT, GEMMA, GEMMA2, GEMMA3, OLMO2, OLMO3)}


def from_config(config: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """The architecture that a config.json describes. Raises UserError for what this decoder cannot be."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(f"config.json: model_type {word(config.get('model_type'))} is not known here; "
                        f"there are {', '.join(FAMILIES)}.")
    return possible(expressed(config, family)), family


def nearest_family(a: Architecture, before: str | None = None) -> tuple[Family, list[str]]:
    """The family that the weights were imported from, if it still expresses this architecture; else the first that does
    with the fewest biases beyond the model's; else the one with the fewest obstacles. And those."""
    found = [(family, obstacles(a, family)) for family in FAMILIES.values()]

    def rank(each: tuple[Family, list[str]]) -> tuple[int, bool, int]:
        family, reasons = each
        return len(reasons), not reasons and family.model_type != before, 0 if reasons else beyond(a, family)

    return min(found, key=rank)


def family_of(a: Architecture, before: str | None = None) -> Family:
    """The family that expresses this architecture; `before` is the model_type that its weights had. Raises UserError
    saying what is in the way of the nearest."""
    family, reasons = nearest_family(a, before)
    if reasons:
        raise UserError(f"--load: no Hugging Face family known here ({', '.join(FAMILIES)}) can express this model: "
                        f"{'; '.join(reasons)}.")
    return family
