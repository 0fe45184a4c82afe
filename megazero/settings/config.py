"""What the user says: frozen dataclasses that are the command line, the configuration file, the help and the record
in a checkpoint.

The words are Megatron-LM's. What follows from them (sizes, counts, memory) is in plan/; nothing here is derived
or read.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megazero.base import DTYPES
from megazero.pipeline import SCHEDULES
from megazero.settings.command_line import leaves, option, parse
from megazero.settings.megatron import Told, hint, ours
from megazero.settings.megatron_words import megatron_defaults

ROPE_SCALINGS = ("llama3", "linear", "dynamic", "yarn")
DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
TOKENIZERS = ("SentencePieceTokenizer", "Llama2Tokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer",
              "TiktokenTokenizer", "ByteTokenizer", "CharTokenizer", "NullTokenizer")


T = TypeVar("T")

@dataclass(frozen=True)
class Parallel:
    """Parallelism."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer", alias=["tp"], unit="ranks")
    pipeline_model_parallel_size: int = option(1, "stages the layers are split into", alias=["pp"], unit="ranks")
    data_parallel_size: int | None = option(None, "copies of the model; default: what is left of the ranks",
                                            alias=["dp"], unit="ranks")
    zero_stage: int = option(0, "what data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 weights too",
                             unit="0-3")
    zero_shard_size: int | None = option(None, "data-parallel ranks that share one copy of the ZeRO state, which the "
                                         "others repeat; default all", unit="ranks")
    reduce_every: int = option(1, "micro-batches whose gradients are summed before they travel, with --zero-stage "
                               "2 or 3", unit="micro-batches")
    keep_weights: int = option(1, "forward and backward passes for which weights stay once gathered, with "
                               "--zero-stage 3", unit="passes")
    bucket_size: int = option(0, "parameters up to which neighbouring blocks travel as one; 0 is block by block",
                              unit="parameters")
    overlap_grad_reduce: bool = option(True, "gradients travel while the backward pass goes on")
    overlap_param_gather: bool = option(True, "weights travel while the passes before them go on")
    pipeline_schedule: str = option("1f1b", "order of the forward and backward passes of the micro-batches",
                                    choices=tuple(SCHEDULES))
    num_virtual_stages_per_pipeline_rank: int = option(1, "stages on each rank, with --pipeline-schedule interleaved "
                                                       "or breadth-first", unit="stages")
    pipeline_program: str | None = option(None, "what each pipeline rank does in a step, a line of actions for each, "
                                          "instead of what a schedule makes; tools/show_schedule.py program prints one",
                                          unit="file")
    pipeline_split: str = option("flops", "layers of each stage: flops makes the step shortest, head and loss counted; "
                                 "even counts layers alone", choices=("flops", "even"))
    account_for_embedding_in_pipeline_split: bool = option(False, "the embedding counts as a layer, and every stage "
                                                           "has as many")
    account_for_loss_in_pipeline_split: bool = option(False, "the loss counts as a layer, and every stage has as many")
    decoder_first_pipeline_num_layers: int | None = option(None, "layers of the first stage; the others share the rest",
                                                           unit="layers")
    decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last stage; the others share the rest",
                                                          unit="layers")
    pipeline_layout: str | None = option(None, "what each stage has: E embedding, t layer, L loss, | between stages, "
                                         "as in Ett|(ttt|)*2ttL", unit="layout")
    distributed_timeout_minutes: float = option(10.0, "how long a rank waits for another before it gives up",
                                                unit="minutes")
    device: str = option("auto", "where to compute: auto takes CUDA where there is one, else cpu; with --check also "
                         "the name of a device to plan for, such as h100", unit="auto, cpu, cuda")


@dataclass(frozen=True)
class Model:
    """Model."""

    model: str | None = option(None, "a preset: sizes and fields below, each of which a flag can override",
                               unit="preset")
    num_layers: int | None = option(None, "transformer blocks", unit="layers")
    hidden_size: int | None = option(None, "width of the residual stream", unit="channels")
    ffn_hidden_size: int | None = option(None, "width inside the MLP; default 4 x hidden, or 8/3 x hidden to a "
                                         "multiple of 64 with --swiglu", unit="channels")
    num_attention_heads: int | None = option(None, "query heads", unit="heads")
    num_query_groups: int | None = option(None, "key and value heads; default: as many as query heads", unit="heads")
    kv_channels: int | None = option(None, "width of a head; default hidden / heads", unit="channels")
    seq_length: int | None = option(None, "tokens of a sample", unit="tokens")
    max_position_embeddings: int | None = option(None, "longest sequence with learned positions; default --seq-length",
                                                 unit="tokens")
    position_offset: int = option(0, "rows of learned positions before that of the first token (2 in OPT)", unit="rows")
    position_embedding_type: str = option("learned_absolute", "how positions enter",
                                          choices=("learned_absolute", "rope", "none"))
    rotary_base: float = option(10000.0, "base of the rotary frequencies")
    rotary_percent: float = option(1.0, "part of a head that is rotated", unit="fraction")
    use_rope_scaling: bool = option(False, "stretch the rotary frequencies, by default as Llama 3.1 does")
    rope_scaling_type: str = option("llama3", "how, with --use-rope-scaling", choices=ROPE_SCALINGS)
    rope_scaling_factor: float = option(8.0, "how far low frequencies are stretched, with --use-rope-scaling")
    rope_low_freq_factor: float = option(1.0, "wavelengths above original length / this are stretched fully")
    rope_high_freq_factor: float = option(4.0, "wavelengths below original length / this stay as they are")
    rope_original_length: int = option(8192, "sequence length before the stretch", unit="tokens")
    yarn_beta_fast: float = option(32.0, "channels that turn more often within the original length stay as they are")
    yarn_beta_slow: float = option(1.0, "channels that turn less often within it are stretched fully")
    yarn_attention_factor: float = option(0.0, "what cosines and sines are multiplied by; 0: by YaRN's formula")
    yarn_mscale: float = option(0.0, "with --yarn-mscale-all-dim: the quotient of that formula's two values instead")
    yarn_mscale_all_dim: float = option(0.0, "its divisor")
    yarn_untruncated: bool = option(False, "what is stretched may begin and end between two channels")
    attention_window: int | None = option(None, "tokens that each token sees, itself and those before it; default: all",
                                          unit="tokens")
    window_attn_skip_freq: str | None = option(None, "layers that see all the same: of each N the last, or those of a "
                                               "list such as [1,1,0] that have 0", unit="N or list")
    rope_local_base_freq: float | None = option(None, "rotary base of the layers that see a window; default: that of "
                                                "the others, scaled as theirs")
    no_rope_freq: str | None = option(None, "layers that rotate nothing: of each N the last, or those of a list such "
                                      "as [0,0,1] that have 1", unit="N or list")
    normalization: str = option("LayerNorm", "the norm before attention, MLP and head",
                                choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "added to the variance in norms")
    apply_layernorm_1p: bool = option(False, "norms multiply by 1 + weight, and weights begin at 0")
    norm_placement: str = option("before", "norms of what goes into attention and MLP, of what comes out, or both",
                                 choices=("before", "after", "both"))
    parallel_residual: bool = option(False, "attention and MLP of a layer read the same: x + attention(x) + mlp(x)")
    embedding_multiplier: float = option(1.0, "what embeddings are multiplied by")
    residual_multiplier: float = option(1.0, "what a layer adds is multiplied by")
    attention_multiplier: float | None = option(None, "what scores are multiplied by; default 1 / sqrt(kv channels)")
    attn_logit_softcapping: float | None = option(None, "c: scores become c tanh(scores / c), which is written out: no "
                                                  "kernel of torch's knows it")
    logits_scaling: float = option(1.0, "what logits are divided by")
    final_logit_softcapping: float | None = option(None, "c: logits become c tanh(logits / c)")
    swiglu: bool = option(False, "gated MLP: silu(gate) x up")
    geglu: bool = option(False, "gated MLP: gelu(gate) x up; with --openai-gelu by the tanh formula")
    relu: bool = option(False, "relu(x) in the MLP instead of GELU")
    squared_relu: bool = option(False, "relu(x)^2 in the MLP instead of GELU")
    openai_gelu: bool = option(False, "GELU by the tanh formula of GPT-2 instead of the exact one")
    disable_bias_linear: bool = option(False, "no biases in linear layers and norms but for those below")
    add_qkv_bias: bool = option(False, "biases on q, k, v, with --disable-bias-linear")
    add_o_bias: bool = option(False, "a bias on attention's output, with --disable-bias-linear")
    add_mlp_bias: bool = option(False, "biases in the MLP, with --disable-bias-linear")
    add_norm_bias: bool = option(False, "biases in LayerNorms, with --disable-bias-linear")
    qk_layernorm: bool = option(False, "norms of q and k")
    qk_layernorm_over: str = option("head", "each head by itself, or the width: all heads together",
                                    choices=("head", "width"))
    untie_embeddings_and_output_weights: bool = option(False, "an output matrix of its own instead of the embedding's")
    make_vocab_size_divisible_by: int = option(128, "rows the stored vocabulary is padded to per tensor-parallel rank; "
                                               "padding is never predicted", unit="rows")
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    attention_dropout: float = option(0.0, "probability on attention weights", unit="fraction")
    hidden_dropout: float = option(0.0, "probability on embeddings and block outputs", unit="fraction")


@dataclass(frozen=True)
class Training:
    """Training."""

    micro_batch_size: int = option(1, "samples in one forward pass", unit="samples")
    global_batch_size: int | None = option(None, "samples in one step; default micro-batch size x data-parallel size",
                                           unit="samples")
    rampup_batch_size: tuple[int, ...] = option((), "START INCREMENT SAMPLES: the global batch grows from START in "
                                                "equal steps, over so many samples", unit="samples")
    step_batch_size_schedule: tuple[str, ...] = option((), "TOKENS:SAMPLES ...: the global batch from so many tokens "
                                                       "on, as in 0:16 2.4B:320", unit="tokens:samples")
    train_iters: int | None = option(None, "length of the run (this or --train-samples)", unit="steps")
    train_samples: int | None = option(None, "length of the run", unit="samples")
    eval_interval: int = option(1000, "steps between evaluations", unit="steps")
    eval_iters: int = option(100, "global batches of one evaluation; 0 turns it off", unit="batches")
    full_validation: bool = option(False, "evaluate over the whole validation set, each sample once, in order")
    skip_train: bool = option(False, "evaluate the weights of --load on every set that is named, and train nothing")
    exit_interval: int | None = option(None, "save and stop when the step is a multiple of this", unit="steps")
    exit_duration_in_mins: float | None = option(None, "save and stop after this long", unit="minutes")
    exit_signal_handler: bool = option(False, "save and stop at SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2, all "
                                       "ranks after the same step; the same seconds later ends a rank at once. To "
                                       "torchrun send SIGTERM, SIGINT or SIGHUP: the others end it")
    seed: int = option(1234, "of weights, sample order and dropout")
    recompute_granularity: str = option("none", "activations computed again in backward: selective (norms and MLP "
                                        "activations) or full (whole blocks)", choices=("none", "selective", "full"))
    max_skipped_steps: int = option(20, "non-finite steps in a row after which the run ends", unit="steps")


@dataclass(frozen=True)
class Optimization:
    """Optimizer and learning rate."""

    optimizer: str = option("adam", "adam has decoupled decay (AdamW); sgd has momentum; muon is of matrices, with "
                            "adam for the rest; adafactor's --lr is relative to the size of each weight",
                            choices=("adam", "sgd", "lion", "lamb", "ademamix", "adafactor", "muon"))
    lr: float | None = option(None, "highest learning rate")
    lr_embedding: float | None = option(None, "that of embedding and learned positions, on the same curve")
    lr_head: float | None = option(None, "that of an untied output, on the same curve")
    lr_vectors: float | None = option(None, "that of norms and biases, on the same curve")
    min_lr: float = option(0.0, "lowest learning rate after decay")
    decoupled_lr: float | None = option(None, "highest learning rate of embedding and output, on a curve of their own")
    decoupled_min_lr: float | None = option(None, "its lowest; default --min-lr")
    lr_decay_style: str = option("linear", "curve from --lr to --min-lr", choices=DECAY_STYLES)
    lr_decay_iters: int | None = option(None, "length of the curve, warm-up included; default: the run", unit="steps")
    lr_decay_samples: int | None = option(None, "the same in samples", unit="samples")
    lr_warmup_iters: int | None = option(None, "steps of linear rise from --lr-warmup-init", unit="steps")
    lr_warmup_samples: int | None = option(None, "the same in samples", unit="samples")
    lr_warmup_fraction: float | None = option(None, "the same as a part of the curve", unit="fraction")
    lr_warmup_init: float = option(0.0, "learning rate before the first step")
    lr_warmup_from_init: bool = option(False, "the first step has --lr-warmup-init, as in Megatron-LM; otherwise "
                                       "warm-up counts the step itself, and none is lost")
    lr_wsd_decay_style: str = option("exponential", "curve of the final part of WSD", choices=WSD_STYLES)
    lr_wsd_decay_iters: int | None = option(None, "length of the final part of WSD", unit="steps")
    lr_wsd_decay_samples: int | None = option(None, "the same in samples", unit="samples")
    weight_decay: float = option(0.01, "on matrices; norms and biases have none")
    no_weight_decay_on: tuple[str, ...] | None = option(None, "weights without decay, by name; * stands for anything",
                                                        unit="names")
    adam_beta1: float = option(0.9, "decay of the mean of gradients")
    adam_beta2: float = option(0.999, "decay of the mean of squared gradients")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    decoupled_weight_decay: bool = option(True, "--no-decoupled-weight-decay adds it to adam's gradient instead")
    sgd_momentum: float = option(0.9, "of sgd")
    lion_beta1: float = option(0.95, "part of the mean of gradients in an update of lion")
    lion_beta2: float = option(0.98, "decay of that mean")
    ademamix_beta3: float = option(0.9999, "decay of the slow mean of gradients of ademamix")
    ademamix_alpha: float = option(8.0, "part of the slow mean in an update")
    ademamix_beta3_warmup: int | None = option(None, "steps over which its decay rises from --adam-beta1",
                                               unit="steps")
    ademamix_alpha_warmup: int | None = option(None, "steps over which its part rises from 0", unit="steps")
    adafactor_decay: float = option(-0.8, "decay of adafactor's second moment after t steps: 1 - t to this power")
    adafactor_clip: float = option(1.0, "largest root mean square of an update")
    adafactor_eps: float = option(1e-3, "least root mean square of a weight, which scales its updates")
    muon_momentum: float = option(0.95, "decay of the mean of gradients of muon")
    muon_nesterov: bool = option(False, "an update looks ahead: gradient and momentum are mixed once more")
    muon_num_ns_steps: int = option(5, "Newton-Schulz iterations that make an update orthogonal")
    muon_coefficient_type: str = option("quintic", "their coefficients", choices=("simple", "quintic"))
    muon_scale_mode: str = option("spectral", "an update of [out, in] is multiplied by the root of: the larger one; "
                                  "out / in; out / in where above 1",
                                  choices=("spectral", "unit_rms_norm", "shape_scaling"))
    muon_extra_scale_factor: float = option(1.0, "and by this; 0.2 with spectral is as large as adam's updates")
    muon_ns_dtype: str | None = option(None, "dtype of the iterations; default bf16 on CUDA, fp32 on CPU, fp64 with "
                                       "--dtype fp64", choices=("bf16", "fp32", "fp64"))
    exp_avg_dtype: str = option("fp32", "dtype of means of gradients of adam, lion, lamb, ademamix; bf16 is rounded by "
                                "chance, 8bit has a scale for each 256 elements", choices=("fp32", "bf16", "8bit"))
    exp_avg_sq_dtype: str = option("fp32", "the same of means of squares", choices=("fp32", "bf16", "8bit"))
    main_params_dtype: str = option("fp32", "dtype of master weights; bf16: none beside those of --bf16, which are "
                                    "rounded by chance", choices=("fp32", "bf16"))
    ema: float | None = option(None, "decay of a mean of the weights, which evaluations take; saved beside them")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 turns clipping off")


@dataclass(frozen=True)
class Offload:
    """Where state is at home between updates."""

    offload_optimizer: str = option("none", "masters and moments: none, on the device; cpu, in the host's memory (on a "
                                    "CPU that is where they are); disk, in files of --offload-dir",
                                    choices=("none", "cpu", "disk"))
    offload_gradients: str = option("none", "the sums of a step's gradients, slices of them (--zero-stage 2 or 3)",
                                    choices=("none", "cpu", "disk"))
    offload_weights: str = option("none", "the slices of the weights (--zero-stage 3), masters of fp32 among them",
                                  choices=("none", "cpu", "disk"))
    offload_fraction: float = option(1.0, "how much of them: the first units of the forward pass stay, since nothing "
                                     "would hide their update", unit="fraction")
    offload_dir: str | None = option(None, "folder for what is at home on disk, on a disk of this machine; files there "
                                     "have no names and end with the run", unit="dir")
    offload_buffer_size: int = option(2**28, "most bytes of a piece that is read, changed and written at once; three "
                                      "are under way", unit="bytes")
    offload_queue_depth: int = option(4, "reads and writes of a disk under way at a time")
    offload_block_size: int = option(2**23, "bytes of each", unit="bytes")


@dataclass(frozen=True)
class Precision:
    """Precision."""

    dtype: str = option("fp32", "of weights and matmuls; masters, moments and gradients are fp32 (fp64 with fp64)",
                        choices=tuple(DTYPES))
    bf16: bool = option(False, "short for --dtype bf16")
    fp16: bool = option(False, "short for --dtype fp16")
    loss_scale: float | None = option(None, "constant loss scale for fp16 instead of a dynamic one")
    initial_loss_scale: float = option(2.0**16, "dynamic loss scale at the start (fp16)")
    min_loss_scale: float = option(1.0, "lowest dynamic loss scale")
    loss_scale_window: int = option(1000, "good steps after which the loss scale doubles", unit="steps")
    hysteresis: int = option(2, "bad steps before the loss scale halves", unit="steps")


@dataclass(frozen=True)
class Data:
    """Data and tokenizer."""

    data_path: tuple[str, ...] = option((), "dataset prefix, or weight prefix pairs, cut by --split", unit="path")
    data_args_path: str | None = option(None, "a file that holds the words of --data-path", unit="file")
    train_data_path: tuple[str, ...] = option((), "the same for training alone", unit="path")
    valid_data_path: tuple[str, ...] = option((), "the same for evaluation alone", unit="path")
    test_data_path: tuple[str, ...] = option((), "the same for one more evaluation, at the end of the run", unit="path")
    multiple_validation_sets: bool = option(False, "a loss of its own for each prefix of --valid-data-path and "
                                            "--test-data-path")
    data_schedule: str | None = option(None, "training data that changes: lines of `STEP WEIGHT PREFIX ...`, the blend "
                                       "from that step on", unit="file")
    split: str = option("969,30,1", "parts of --data-path for training, validation and test")
    mock_data: bool = option(False, "made-up tokens in place of what is named: to measure, or to try a layout; with "
                             "--vocab-size no tokenizer is read")
    shuffle: bool = option(True, "--no-shuffle serves the samples in file order")
    sample_order: str = option("keyed", "keyed: a sample depends on its number and the seed alone; megatron: the order "
                               "of Megatron-LM", choices=("keyed", "megatron"))
    eod_mask_loss: bool = option(False, "no loss where the input is the end-of-document token")
    reset_position_ids: bool = option(False, "positions start again after each end of document")
    reset_attention_mask: bool = option(False, "documents of a sample do not see each other")
    fim_rate: float = option(0.0, "part of the training documents that get a gap to fill in", unit="fraction")
    fim_spm_rate: float = option(0.5, "part of those whose suffix comes first", unit="fraction")
    fim_prefix_token: str = option("<fim_prefix>", "special token before the prefix", unit="token")
    fim_middle_token: str = option("<fim_middle>", "special token before the middle", unit="token")
    fim_suffix_token: str = option("<fim_suffix>", "special token before the suffix", unit="token")
    tokenizer_type: str | None = option(None, "how text becomes tokens", choices=TOKENIZERS)
    tokenizer_model: str | None = option(None, "its file: .model, .tiktoken, tekken.json, tokenizer.json or its "
                                         "folder, or a JSON of characters", unit="path")
    vocab_file: str | None = option(None, "vocab.json of GPT2BPETokenizer", unit="path")
    merge_file: str | None = option(None, "merges.txt of GPT2BPETokenizer", unit="path")
    eod_token: str | None = option(None, "token that ends a document; default: the one that its files name, or a usual "
                                   "name", unit="token")
    special_tokens: tuple[str, ...] = option((), "names for the ids after the last rank of a .tiktoken file; default: "
                                             "those published for files of its size", unit="token")
    vocab_size: int | None = option(None, "vocabulary of the model, where no tokenizer is given or the tokenizer's "
                                    "is smaller", unit="tokens")


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints."""

    save: str | None = option(None, "folder to save to", unit="dir")
    load: str | None = option(None, "folder to load from; if it is --save's and still empty, the run starts afresh",
                              unit="dir")
    save_interval: int | None = option(None, "steps between checkpoints; one is always saved at the end", unit="steps")
    keep_last: int | None = option(None, "checkpoints to keep; default: all", unit="checkpoints")
    ckpt_step: int | None = option(None, "step to load; default: the newest", unit="step")
    finetune: bool = option(False, "load the weights alone: step, data and optimizer start afresh")
    load_optim: bool = option(True, "--no-load-optim goes on from the step of --load with an optimizer that starts "
                              "afresh")
    save_optim: bool = option(True, "--no-save-optim saves the weights alone: a third of the bytes, to go on from with "
                              "--no-load-optim")
    pretrained_checkpoint: str | None = option(None, "folder of weights to begin with, as with --finetune, as long as "
                                               "--load holds no checkpoint", unit="dir")
    use_checkpoint_args: bool = option(False, "the model is as the checkpoint of --load says, whatever the flags say")
    exit_on_missing_checkpoint: bool = option(False, "no run starts afresh where --load holds no checkpoint")
    async_save: bool = option(False, "copy, then write in the background while training goes on")


@dataclass(frozen=True)
class Logging:
    """Logging."""

    log_interval: int = option(10, "steps between lines on the screen", unit="steps")
    log_dir: str | None = option(None, "folder for metrics.jsonl and TensorBoard", unit="dir")
    log_params_norm: bool = option(False, "the norm of all weights too, after each step")
    log_num_zeros_in_grad: bool = option(False, "how many elements of each step's gradient are zero")
    log_update_ratio: bool = option(False, "norm of each layer's update by that of its weights; a step holds masters "
                                    "twice")


@dataclass(frozen=True)
class Config:
    """Trains a GPT-style language model. The same command runs on a CPU, on one GPU, and under torchrun on many."""

    config: str | None = option(None, "file with these keys (.toml, .yaml, .json); flags override it", unit="file")
    check: bool = option(False, "check everything, print the plan, train nothing; what is not on this machine is "
                         "listed")
    world_size: int | None = option(None, "with --check: plan for so many ranks; default: as many as run, or as --tp x "
                                    "--pp x --dp ask for", unit="ranks")
    megatron_defaults: bool = option(False, "what nobody says is as in Megatron-LM: dropout 0.1, GELU by the tanh "
                                     "formula, the first step at --lr-warmup-init, its order of samples")
    parallel: Parallel = Parallel()
    model: Model = Model()
    training: Training = Training()
    optimizer: Optimization = Optimization()
    precision: Precision = Precision()
    offload: Offload = Offload()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @property
    def dtype(self) -> str:
        return next((short for short in ("bf16", "fp16") if getattr(self.precision, short)), self.precision.dtype)


_GPT2 = {"position_embedding_type": "learned_absolute", "openai_gelu": True, "seq_length": 1024}
_GPT3 = _GPT2 | {"seq_length": 2048}
_GEMMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "norm_epsilon": 1e-6, "kv_channels": 256,
          "apply_layernorm_1p": True, "norm_placement": "both", "geglu": True, "openai_gelu": True,
          "disable_bias_linear": True}
_LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True,
          "untie_embeddings_and_output_weights": True}


def _row(base: dict[str, Any], layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return base | {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads} | more


# Sizes as published: GPT-2 (Radford 2019), GPT-3 (Brown 2020, table 2.1), Llama (Touvron 2023), Llama 3.x (Dubey 2024),
# OPT (Zhang 2022), Pythia (Biderman 2023), Gemma 2 and 3 (Gemma Team 2024, 2025), OLMo 2 (OLMo Team 2025), SmolLM3.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _row(_GPT2, 12, 768, 12),
    "gpt2-medium": _row(_GPT2, 24, 1024, 16),
    "gpt2-large": _row(_GPT2, 36, 1280, 20),
    "gpt2-xl": _row(_GPT2, 48, 1600, 25),
    "gpt3-1.3b": _row(_GPT3, 24, 2048, 16),
    "gpt3-6.7b": _row(_GPT3, 32, 4096, 32),
    "gpt3-13b": _row(_GPT3, 40, 5120, 40),
    "gpt3-175b": _row(_GPT3, 96, 12288, 96),
    "llama-1b": _row(_LLAMA, 16, 2048, 32, num_query_groups=8, ffn_hidden_size=8192, seq_length=4096,
                     rotary_base=500000.0, untie_embeddings_and_output_weights=False),
    "llama-7b": _row(_LLAMA, 32, 4096, 32, ffn_hidden_size=11008, seq_length=4096),
    "llama-8b": _row(_LLAMA, 32, 4096, 32, num_query_groups=8, ffn_hidden_size=14336, seq_length=8192,
                     rotary_base=500000.0),
    "llama-13b": _row(_LLAMA, 40, 5120, 40, ffn_hidden_size=13824, seq_length=4096),
    "llama-70b": _row(_LLAMA, 80, 8192, 64, num_query_groups=8, ffn_hidden_size=28672, seq_length=4096),
    "opt-1.3b": _row({}, 24, 2048, 32, relu=True, position_offset=2, seq_length=2048),
    "pythia-1.4b": _row({}, 24, 2048, 16, position_embedding_type="rope", rotary_percent=0.25, parallel_residual=True,
                        untie_embeddings_and_output_weights=True, seq_length=2048),
    "gemma2-2b": _row(_GEMMA, 26, 2304, 8, num_query_groups=4, ffn_hidden_size=9216, embedding_multiplier=48.0,
                      attn_logit_softcapping=50.0, final_logit_softcapping=30.0, attention_window=4096,
                      window_attn_skip_freq="2", seq_length=8192),
    "gemma3-1b": _row(_GEMMA, 26, 1152, 4, num_query_groups=1, ffn_hidden_size=6912, embedding_multiplier=1152**0.5,
                      qk_layernorm=True, attention_window=512, window_attn_skip_freq="6", rotary_base=1e6,
                      rope_local_base_freq=1e4, seq_length=32768),
    "olmo2-7b": _row(_LLAMA, 32, 4096, 32, ffn_hidden_size=11008, norm_epsilon=1e-6, norm_placement="after",
                     qk_layernorm=True, qk_layernorm_over="width", rotary_base=500000.0, seq_length=4096),
    "smollm3-3b": _row(_LLAMA, 36, 2048, 16, num_query_groups=4, ffn_hidden_size=11008, norm_epsilon=1e-6,
                       no_rope_freq="4", rotary_base=5e6, untie_embeddings_and_output_weights=False, seq_length=65536),
}

def in_our_words(argv: Sequence[str] | None = None, files: Mapping[str, str] | None = None) -> Told:
    """A command line of this program, or of Megatron-LM, in this program's words (default: the process's). `files`:
    texts by path, beside those of the disk."""
    known = {"help"}
    for o in (o for group in leaves(Config).values() for o in group):
        known |= {o.flag[2:], *o.field.metadata["alias"], *(["no-" + o.flag[2:]] if o.kind is bool else [])}
    return ours(sys.argv[1:] if argv is None else argv, known, files)


def from_command_line(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line (default: the process's) asks for. Raises UserError."""
    return with_flags_of_a_run(Config, argv, "pretrain_gpt.py")


def with_flags_of_a_run(settings: type[T], argv: Sequence[str] | None, prog: str) -> T:
    """Settings among which are those of a run, as a run takes them: Megatron's words and defaults too. Raises
    UserError."""
    told = in_our_words(argv)
    return parse(settings, told.argv, prog=prog, presets=PRESETS, elsewhere=hint, errors=told.errors(),
                 implied=lambda said: megatron_defaults(said) if said.get("megatron_defaults") else {})
