"""Command lines of Megatron-LM and of what grew from it (Megatron-DeepSpeed, BigScience, BigCode, Pai, MindSpeed), in
this program's words.

Each of their words is one of

    the same            a flag of this program: not in these tables
    renamed             RENAMED, VALUES and the functions below: said in our words, and told
    without effect      WITHOUT: nothing of it changes what is trained, told in one line with the reason
    missing             REFUSED: it would change what is trained, or what fits; refused by the name of the capability

`ours` takes a command line through them. Pure but for the files of others' words that it may name.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megazero.base import printable, read_bytes

Words = list[str]

# reason -> words; one that ends in * stands for all that begin so
WITHOUT: dict[str, str] = {
    "always so here": """
        use-flash-attn use-flash-attn-v1 use-flash-attn-v2 use-flash-attn-triton use-flash-attn-builder use-mcore-models
        sequence-parallel accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 calculate-per-token-loss
        no-create-attention-mask-in-dataloader create-attention-mask-in-dataloader override-opt_param-scheduler
        override-opt-param-scheduler no-check-for-nan-in-loss-and-grad check-for-nan-in-loss-and-grad
        ckpt-fully-parallel-save ckpt-fully-parallel-load dist-ckpt-optim-fully-reshardable use-dist-ckpt
        auto-detect-ckpt-format ckpt-assume-constant-structure use-persistent-ckpt-worker no-strict-fsdp-dtensor-load
        load-main-params-from-ckpt overlap-p2p-communication use-ring-exchange-p2p deterministic-mode fp32-allreduce
        ddp-reduce-scatter-with-fp32-accumulation use-cpu-initialization no-initialization disable-msc fim-data
        use-distributed-data-parallel no-overlap-p2p-communication variable-seq-lengths use-tp-pp-dp-mapping
        disable-bf16-reduced-precision-matmul no-use-tokenizer-model-from-checkpoint-args universal-checkpoint""",
    "dropout and order of samples follow from --seed": "no-load-rng no-save-rng data-parallel-random-init",
    "sums and losses keep fp32 here": "grad-reduce-in-bf16 fp16-lm-cross-entropy no-fp32-allreduce",
    "the same function, said otherwise": """
        apply-query-key-layer-scaling no-query-key-layer-scaling no-gradient-reduce-div-fusion
        ddp-average-in-collective""",
    "nothing to configure here": """
        num-workers valid-num-workers data-cache-path num-dataset-builder-threads no-mmap-bin-files mmap-warmup
        data-impl dataloader-type mid-level-dataset-surplus object-storage-cache-path ckpt-format dist-ckpt-format
        dist-ckpt-strictness dist-ckpt-save-pre-mcore-014 distrib-optim-fully-reshardable-mem-efficient
        no-ckpt-fully-parallel-save distributed-backend pipeline-model-parallel-comm-backend DDP-impl local-rank
        local_rank lazy-mpu-init manual-gc manual-gc-interval no-manual-gc-eval empty-unused-memory-level
        high-priority-stream-groups nccl-communicator-config-path disable-gloo-process-groups ddp-num-buckets
        ddp-pad-buckets-for-high-nccl-busbw no-align-grad-reduce no-align-param-gather train-sync-interval
        overlap-param-gather-with-optimizer-step no-scatter-gather-tensors-in-pipeline
        scatter-gather-tensors-in-pipeline distributed-timeout-seconds-after-init use-contiguous-buffers-in-local-ddp
        no-contiguous-buffers-in-local-ddp microbatch-group-size-per-virtual-pipeline-stage
        overlap-p2p-communication-warmup-flush defer-embedding-wgrad-compute wgrad-deferral-limit
        no-clone-scatter-output-in-embedding pp-partition-method sync-tp-duplicated-parameters
        abort-on-unmet-fused-kernel-constraints fsdp-double-buffer use-megatron-fsdp suggested-communication-unit-size
        init-model-with-meta-device allow-ambiguous-pad-tokens trust-remote-code legacy-tokenizer tokenizer-metadata
        tiktoken-pattern tiktoken-num-special-tokens vocab-extra-ids no-data-sharding no-pin-cpu-grads no-pin-cpu-params
        torch-fsdp2-no-reshard-after-forward zero-reduce-scatter zero-contigious-gradients zero-contiguous-gradients
        zero-reduce-bucket-size zero-allgather-bucket-size use-pin-memory deepspeed-mpi deepscale deepscale_config
        create-moe-param-group enable-experimental spec use-legacy-models num-distributed-optimizer-instances-order
        no-shared-storage use-dataset-only keep-fp8-transpose-cache reuse-grad-buf-for-mxfp8-param-ag
        non-persistent-ckpt-type non-persistent-save-interval non-persistent-global-ckpt-dir
        non-persistent-local-ckpt-dir non-persistent-local-ckpt-algo replication replication-jump replication-factor
        enable-ft-package calc-ft-timeouts adlr-autoresume adlr-autoresume-interval inprocess-* seed-data
        dynamic-checkpointing no-log-learnig-rate-to-tensorboard dump-param-to-param-group-map no-pipeline-parallel
        enable-full-sharding-in-hsdp use-mp-args-from-checkpoint-args tokenizer-not-use-fast jit-compile
        optimize-send-recv-comm repeated-dataloader layernorm-tp-auto-sync dataset max-padding-length npu-deterministic
        prompt-type ai-framework launcher no-fast-tokenizer use-distributed-data-loader tokenizer-kwargs
        num-zeros-in-grad-interval disable-mem-efficient-path enable-torch-compile trust-repo""",
    "a choice of kernels, which are torch's here": """
        attention-backend transformer-impl no-masked-softmax-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
        no-rope-fusion cross-entropy-loss-fusion cross-entropy-fusion-impl bias-gelu-fusion masked-softmax-fusion
        bias-dropout-fusion no-gradient-accumulation-fusion no-persist-layer-norm
        no-async-tensor-model-parallel-allreduce tp-comm-* disable-tp-comm-* use-te-activation-func te-rng-tracker
        inference-rng-tracker enable-cuda-graph external-cuda-graph cuda-graph-* use-nccl-ub use-sharp
        sharp-enabled-group disable-symmetric-registration qknorm-impl mem-efficient-ln onnx-safe
        use-rotary-pos-emb-fusion use-ascend-mc2 symmetric-ar-type
        fused-linear fused-lm-head use-triton-* no-swiglu-fusion overlap-grad-reduce-impl use-mc2
        use-fused-* use-apex-* fused-attention no-fused-* use-liger-* use-cpp-*""",
    "the log has its own figures, in --log-dir": """
        log-throughput log-progress log-params-norm log-num-zeros-in-grad log-memory-to-tensorboard log-energy
        log-timers-to-tensorboard log-batch-size-to-tensorboard log-validation-ppl-to-tensorboard log-straggler
        log-world-size-to-tensorboard no-log-loss-scale-to-tensorboard log-loss-scale-to-tensorboard
        log-learning-rate-to-tensorboard no-log-learning-rate-to-tensorboard log-optimizer-states-to-tensorboard
        timing-log-level timing-log-option tensorboard-log-interval tensorboard-queue-size
        no-barrier-with-level-1-timing wandb-* wandb_* logging-level config-logger-dir structured-logs
        structured-logs-dir transformer-timers codecarbon-dir no-one-logger one-logger-* app-tag-* straggler-*
        disable-straggler-on-startup log-path result-rejected-tracker-filename profile-backward aim-* mlflow-* swanlab-*
        comet-* report-to""",
    "measuring tools that are not here; use those of the machine": """
        profile profile-step-start profile-step-end profile-ranks use-pytorch-profiler record-memory-history
        memory-snapshot-path run-workload-inspector-server rerun-mode error-injection-rate error-injection-type
        check-for-spiky-loss check-for-large-grads test-mode enable-msprobe profile-*
        check-weight-hash-across-dp-replicas-interval""",
    "said by --deepspeed_config": "deepspeed",
    "every layer is computed again by itself": "recompute-method recompute-num-layers",
    "a signal stops a run: SIGTERM with --exit-signal-handler": "kill-switch-path",
    "memory alone: --recompute-granularity says what is computed again": """
        recompute-modules distribute-saved-activations checkpoint-num-layers activations-checkpoint-num-layers
        partition-activations contigious-checkpointing synchronize-each-layer deepspeed-activation-checkpointing
        checkpoint-in-cpu split-transformers recompute-in-advance recompute-in-bubble""",
}

# what is not here, and what to do instead -> words
REFUSED: dict[str, str] = {
    "mixture of experts is not here yet: a router would choose among several MLPs; leave it out for a dense model": """
        num-experts moe-* mlp-type topk expert-* overlap-moe-expert-parallel-comm delay-wgrad-compute router-*
        n-shared-experts use-tutel enable-expert-tensor-parallelism eval-capacity-factor""",
    "context parallelism is not here yet: one data-parallel rank has all of a sample; share long ones with --tp": """
        context-parallel-* cp-* hierarchical-context-parallel-sizes ds-sequence-parallel-size ulysses-*
        force-ds-sequence-parallel hybrid-context-parallel""",
    "8-bit products are not here yet: they round what bf16 keeps; write --bf16 alone": """
        fp8-* no-fp8-* fp4-* first-last-layers-bf16 num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 fp8
        te-precision-config-file kitchen-* transformer-engine-*""",
    "optimizer state and activations cannot leave the device yet: it takes more of its memory; leave it out, and share "
    "with --zero-stage": """
        optimizer-cpu-offload optimizer-offload-fraction optimizer-offload-policy cpu-offloading cpu-optimizer
        cpu-offloading-num-layers cpu-offloading-* cpu_torch_adam use-torch-optimizer-for-cpu-offload remote-device
        overlap-cpu-optimizer-d2h-h2d optimizer-offload-* fine-grained-activation-offloading offload-modules
        swap-attention""",
    "masters and moments are fp32 here yet: others would round the update; leave it out": """
        use-precision-aware-optimizer exp-avg-dtype exp-avg-sq-dtype main-params-dtype main-grads-dtype
        use-bnb-optimizer reuse-fp32-param""",
    "that optimizer is not here yet: the update would be another; write --optimizer adam, sgd, lion, lamb or ademamix":
        "muon-* shampoo-* soap-* sophia-* mup-* use-mup",
    "that loss is not here: the loss is the mean of each token's cross entropy": """
        goldfish-loss goldfish-* mtp-* use-kl-loss loss-on-targets-only label-smoothing z-loss-* ce-* kd kd-*
        reweight-loss-based-on-position-frequency noise-density mask-prob short-seq-prob""",
    "that activation is not here: the MLP would compute another function; write --swiglu, --geglu, --squared-relu, "
    "--relu, --openai-gelu or nothing for GELU": """
        xielu quick-geglu glu-activation activation-func-clamp-value glu-linear-offset gelu-tanh-*
        activation-func-*""",
    "that attention is not here: its scores would be others": """
        softmax-type multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim
        qk-pos-emb-head-dim v-head-dim mscale mscale-all-dim cache-mla-latents qk-l2-norm qk-clip* attention-output-gate
        experimental-attention-variant dsa-* linear-attention-* relative-attention-* use-alibi alibi-*
        use-attn-* no-weight-absorption""",
    "those positions are not here: each token would stand elsewhere": """
        rotary-interleaved rotary-scaling-factor rope-type mrope-section yarn-* long-rope-*""",
    "that layer is not here: it would compute another function": """
        embed-layernorm apply-residual-connection-post-layernorm fp32-residual-connection hybrid-* mamba-*
        is-hybrid-model disable-mamba-mem-eff-path heterogeneous-* retro-* post-norm
        output-logits-multiplier embedding-multiplier-* residual-scale-* scale-depth scale-embedding
        parallel-attention parallel-layernorm use-post-layernorm""",
    "the weights would begin otherwise": """
        init-method-xavier-uniform embedding-init-method-std embedding-weights-in-fp32 init-method-std-*
        perform-init-*""",
    "weight decay is constant here: it would change with the steps; leave it out":
        "start-weight-decay end-weight-decay weight-decay-incr-style",
    "a test set that is cut by weights is not here; write --test-data-path": "test-weighted-split-paths-path",
    "steps are not left out here: the run would train on other data; cut them from the data":
        "iterations-to-skip skip-train-iteration-range decrease-batch-size-if-needed sample-rate",
    "batches are a number of samples here, each of --seq-length tokens; write --micro-batch-size":
        "use-dynamic-batch-size max-tokens-per-gpu use-packed-sequence packing-* sft sft-* reset-* pack-*",
    "all weights but those of --decoupled-lr follow one --lr here": "head-lr-mult",
    "this program trains decoders on text": """
        bert-* ict-* biencoder-* vision-* dino-* swin-* img-h img-w patch-dim num-channels num-classes mask-type
        mask-factor iter-per-epoch classes-fraction data-per-class-fraction titles-data-path evidence-data-path
        query-in-block-prob use-one-sent-docs retriever-* block-data-path embedding-path indexer-* encoder-num-layers
        decoder-num-layers encoder-seq-length decoder-seq-length inference-* rl-* grpo-* langrl-* perform-rl-step
        max-tokens-to-oom output-bert-embeddings flash-decode ds-inference train-mode use-legacy-static-engine
        decode-only-cuda-graphs nccl-all-reduce-for-prefill mlp-chunks-for-prefill disable-chunked-prefill inference""",
    "data that change with the steps by DeepSpeed's words are not here; write --data-schedule": """
        curriculum-learning-legacy curriculum-learning data-efficiency-curriculum-learning train-idx-path
        train-doc-idx-path train-sample-idx-path train-shuffle-idx-path random-ltd compression-training""",
    "the schedule is what the flags say; leave it out": """
        use-checkpoint-opt_param-scheduler use-checkpoint-opt-param-scheduler no-load-lr-state""",
    "there is one format of checkpoints here, which tools/checkpoint.py converts; leave it out": "ckpt-convert-*",
    "is --config here, whose keys are the flags": "yaml-cfg",
    "a tokenizer is named by --tokenizer-type and --tokenizer-model here; write those": "patch-tokenizer-type",
    "the vocabulary's size is --vocab-size here; write the sum": "extra-vocab-size",
}

# words that mean, with these values, what is so anyway ("" is every value); otherwise they are in REFUSED
PLAIN: dict[str, tuple[str, ...]] = {
    "context-parallel-size": ("1",), "cp-comm-type": ("",), "expert-model-parallel-size": ("1",),
    "expert-tensor-parallel-size": ("1",), "num-experts": ("1", "0"), "mtp-num-layers": ("0",), "topk": ("1",),
    "main-grads-dtype": ("fp32",), "main-params-dtype": ("fp32",), "exp-avg-dtype": ("fp32",),
    "exp-avg-sq-dtype": ("fp32",), "ds-sequence-parallel-size": ("1",), "rope-type": ("rope",),
    "rotary-scaling-factor": ("1", "1.0"), "softmax-type": ("vanilla",), "cpu-offloading-num-layers": ("0",),
    "expert-interval": ("",), "mlp-type": ("standard",), "moe-layer-freq": ("1",), "sample-rate": ("1", "1.0"),
    "mtp-loss-scaling-factor": ("",), "num-distributed-optimizer-instances": ("1",),
    "weight-decay-incr-style": ("constant",),
    "rotary-seq-len-interpolation-factor": ("1",), "attention-head-type": ("multihead",), "train-mode": ("pretrain",),
}

# word -> (this program's words, what is told); {} is what was given with it
RENAMED: dict[str, tuple[str, str]] = {
    "tensorboard-dir": ("--log-dir {}", "logs go to --log-dir"),
    "model-parallel-size": ("--tensor-model-parallel-size {}", "is --tensor-model-parallel-size"),
    "batch-size": ("--micro-batch-size {}", "is --micro-batch-size"),
    "warmup": ("--lr-warmup-fraction {}", "is --lr-warmup-fraction"),
    "use-rotary-position-embeddings": ("--position-embedding-type rope", "is --position-embedding-type rope"),
    "use-rotary-embeddings": ("--position-embedding-type rope", "is --position-embedding-type rope"),
    "checkpoint-activations": ("--recompute-granularity full", "is --recompute-granularity full"),
    "recompute-activations": ("--recompute-granularity selective", "is --recompute-granularity selective"),
    "activations-checkpoint-method": ("--recompute-granularity full", "is --recompute-granularity full"),
    "pipeline-model-parallel-layout": ("--pipeline-layout {}", "is --pipeline-layout"),
    "ddp-bucket-size": ("--bucket-size {}", "is --bucket-size"),
    "num-key-value-heads": ("--num-query-groups {}", "is --num-query-groups"),
    "tokenizer-name-or-path": ("--tokenizer-model {}", "is --tokenizer-model"),
    "tokenizer-file": ("--tokenizer-model {}", "is --tokenizer-model"),
    "save-retain-interval": ("", "all checkpoints are kept; --keep-last N keeps the newest N"),
    "finetune-from": ("--pretrained-checkpoint {}", "is --pretrained-checkpoint"),
    "persistent-save-interval": ("--save-interval {}", "is --save-interval"),
    "rope-theta": ("--rotary-base {}", "is --rotary-base"),
    "layernorm-epsilon": ("--norm-epsilon {}", "is --norm-epsilon"),
    "use-relu": ("--relu", "is --relu"), "sandwich-norm": ("--norm-placement both", "is --norm-placement both"),
    "input-embeddings-multiplier": ("--embedding-multiplier {}", "is --embedding-multiplier"),
    "scale-emb": ("--embedding-multiplier {}", "is --embedding-multiplier"),
    "logits-soft-cap": ("--final-logit-softcapping {}", "is --final-logit-softcapping"),
    "rotary-seq-len-interpolation-factor": (
        "--use-rope-scaling --rope-scaling-type linear --rope-scaling-factor {}", "is a linear --rope-scaling-type"),
    "yarn-rotary-scaling-factor": ("--rope-scaling-factor {}", "is --rope-scaling-factor"),
    "yarn-original-max-position-embeddings": ("--rope-original-length {}", "is --rope-original-length"),
    "no-yarn-correction-range-round-to-int": ("--yarn-untruncated", "is --yarn-untruncated"),
    "load-tag": ("--ckpt-step {}", "is --ckpt-step"),
    "tiktoken-special-tokens": ("--special-tokens {}", "is --special-tokens"),
}

# word of ours -> value -> ours
VALUES: dict[str, dict[str, str]] = {
    "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"},
    "tokenizer-type": {"PretrainedFromHF": "HuggingFaceTokenizer", "TokenizerFromFile": "HuggingFaceTokenizer",
                       "GPTSentencePieceTokenizer": "SentencePieceTokenizer", "TikTokenizer": "TiktokenTokenizer",
                       "HFTokenizer": "HuggingFaceTokenizer", "Llama3Tokenizer": "HuggingFaceTokenizer",
                       "TokenizerFromFileWithFIM": "HuggingFaceTokenizer"},
    "lr-wsd-decay-style": {"1-sqrt": "minus_sqrt"},
    "optimizer": {"adamw": "adam", "hybridadam": "adam", "fusedadam": "adam"},
    "position-embedding-type": {"learnable": "learned_absolute", "absolute": "learned_absolute", "rotary": "rope"},
    "data-parallel-sharding-strategy": {"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"},
}
# word of ours -> values that ask for what is in REFUSED, as this word of it does
ASKS: dict[str, tuple[str, str]] = {
    "position-embedding-type": ("mrope-section", "alibi relative mrope t5"),
    "tokenizer-type": ("bert-", "BertWordPieceLowerCase BertWordPieceCase MultimodalTokenizer NullMultimodalTokenizer "
                                "SFTTokenizer"),
    "optimizer": ("muon-", "muon dist_muon adafactor sophia shampoo soap ranger adan adagrad"),
}


def megatron_defaults(said: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's defaults that differ from this program's and change what is trained, in our words, for a run of which
    so much is said. (Its softmax counts padding of the vocabulary too, and its loss is the mean of micro-batches' means
    unless --calculate-per-token-loss: those are no flags here.)"""
    half = said.get("fp16") or said.get("dtype") == "fp16"
    gelu = not any(said.get(word) for word in ("swiglu", "squared_relu", "relu", "geglu", "disable_bias_linear"))
    layer_norm = said.get("normalization", "LayerNorm") == "LayerNorm"
    warm = any(said.get(f"lr_warmup_{unit}") for unit in ("iters", "samples", "fraction"))
    ordered = not (said.get("mock_data") or said.get("data_schedule") or said.get("shuffle") is False)
    return {"attention_dropout": 0.1, "hidden_dropout": 0.1, **({"openai_gelu": True} if gelu else {}),
            **({"add_norm_bias": True} if said.get("disable_bias_linear") and layer_norm else {}),
            **({"lr_warmup_from_init": True} if warm else {}), **({"sample_order": "megatron"} if ordered else {}),
            **({"initial_loss_scale": 2.0**32} if half and not said.get("loss_scale") else {})}


@dataclass
class Told:
    """What became of a command line.

    argv        it in this program's words
    renamed     what is said otherwise now, a sentence each
    without     reason -> words that have no effect here
    missing     what is not here -> words that ask for it
    """

    argv: Words = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    without: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """To be told at start."""
        said = [f"renamed     {sentence}" for sentence in self.renamed]
        if self.without:
            each = "; ".join(f"{reason}: {' '.join(words)}" for reason, words in self.without.items())
            said.append(f"no effect   {each}")
        return said

    def errors(self) -> list[str]:
        return [f"{' '.join(dict.fromkeys(words))}: {what}." for what, words in self.missing.items()]


def _listed(table: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """word -> its row, and (beginning, row)."""
    exact = {w: row for row, words in table.items() for w in words.split() if not w.endswith("*")}
    begins = [(w[:-1], row) for row, words in table.items() for w in words.split() if w.endswith("*")]
    return exact, begins


EFFECTLESS, ABSENT = _listed(WITHOUT), _listed(REFUSED)


def _row(word: str, table: tuple[dict[str, str], list[tuple[str, str]]]) -> str | None:
    exact, begins = table
    return exact.get(word) or next((row for start, row in begins if word.startswith(start)), None)


def ours(argv: Sequence[str], known: set[str]) -> Told:
    """A command line in this program's words. `known`: its flags, without dashes; what neither it nor the tables know
    stays as it is, for the parser to complain of."""
    told, given = Told(), list(grouped_words(argv))
    values = dict(given)
    for word, args in given:
        word = word if word in known or _row(word, ABSENT) or "_" not in word else word.replace("_", "-")
        if word in PLAIN and (PLAIN[word] == ("",) or " ".join(args) in PLAIN[word]):
            _tell(told.without, "is so here", word, args)
        elif word in SPECIAL:
            told.argv += SPECIAL[word](args, values, told)
        elif word in known:
            told.argv += _same(word, args, told)
        elif word in RENAMED:
            new, what = RENAMED[word]
            told.argv += [word for part in new.split() for word in (args if part == "{}" else [part])]
            told.renamed.append(f"--{_shown(word, args)}: {what}")
        elif (reason := _row(word, EFFECTLESS)) is not None:
            _tell(told.without, reason, word, args)
        elif (missing := _row(word, ABSENT)) is not None:
            _tell(told.missing, missing, word, args)
        else:
            told.argv += [f"--{word}" if word else "", *args][not word:]
    told.argv += list(_implied(values, told))
    return told


def grouped_words(argv: Sequence[str]) -> Iterator[tuple[str, Words]]:
    """(word, what stands behind it) of each flag; ("", ...) for what stands before the first."""
    word, args = "", Words()
    for part in argv:
        if re.match(r"--[A-Za-z]", part):
            if word or args:
                yield word, args
            word, equals, value = part[2:].partition("=")
            args = [value] if equals else []
        else:
            args.append(part)
    if word or args:
        yield word, args


def hint(word: str) -> str | None:
    """Of a word in a file, where nothing is renamed: what to write instead."""
    if word in RENAMED:
        return RENAMED[word][1]
    reason = _row(word, EFFECTLESS)
    return f"has no effect here ({reason}); leave it out" if reason else _row(word, ABSENT)


def _tell(where: dict[str, list[str]], what: str, word: str, args: Sequence[str]) -> None:
    where.setdefault(what, []).append(f"--{_shown(word, args)}")


def _shown(word: str, args: Sequence[str]) -> str:
    return printable(" ".join((word, *args)), 60)


def _same(word: str, args: Words, told: Told) -> Words:
    """A flag of ours: perhaps with a value that is called otherwise here."""
    value = args[0] if len(args) == 1 else ""
    as_if, values = ASKS.get(word, ("", ""))
    if value in values.split() and (what := _row(as_if, ABSENT)):
        _tell(told.missing, what, word, args)
        return []
    if value in VALUES.get(word, {}):
        now = VALUES[word][value]
        told.renamed.append(f"--{word} {value}: is {now}")
        return [f"--{word}", now]
    return [f"--{word}", *args]


# ---- words that other words decide

Given = Mapping[str, Words]


def _number(given: Given, *words: str) -> int | None:
    """The whole number that one of these words was given."""
    for word in words:
        if re.fullmatch(r"[\d_]+", " ".join(given.get(word, []))):
            return int(given[word][0])
    return None


def _zero(args: Words, given: Given, told: Told) -> Words:
    told.renamed.append("--use-distributed-optimizer: is --zero-stage 1")
    return [] if "zero-stage" in given or "data-parallel-sharding-strategy" in given else ["--zero-stage", "1"]


def _torch_fsdp(args: Words, given: Given, told: Told) -> Words:
    told.renamed.append("--use-torch-fsdp2: is --zero-stage 3")
    return [] if "zero-stage" in given else ["--zero-stage", "3"]


def _sharding(args: Words, given: Given, told: Told) -> Words:
    level = VALUES["data-parallel-sharding-strategy"].get(" ".join(args), " ".join(args))
    told.renamed.append(f"--data-parallel-sharding-strategy {' '.join(args)}: is --zero-stage {level}")
    return [] if "zero-stage" in given else ["--zero-stage", level]


def _instances(args: Words, given: Given, told: Told) -> Words:
    """Copies of the ZeRO state, where ours counts the ranks of one."""
    what = "is said by --zero-shard-size here, the data-parallel ranks of one copy; write that"
    _tell(told.missing, what, "num-distributed-optimizer-instances", args)
    return []


def _groups(args: Words, given: Given, told: Told) -> Words:
    """Megatron's query groups are one where nobody says how many."""
    if "num-query-groups" in given:
        _tell(told.without, "said by --num-query-groups", "group-query-attention", args)
        return []
    told.renamed.append("--group-query-attention: is --num-query-groups 1, for no number is given")
    return ["--num-query-groups", "1"]


def _heads(args: Words, given: Given, told: Told) -> Words:
    """BigCode's."""
    if args == ["multiquery"]:
        told.renamed.append("--attention-head-type multiquery: is --num-query-groups 1")
        return ["--num-query-groups", "1"]
    _tell(told.missing, "is said by --num-query-groups here", "attention-head-type", args)
    return []


def _virtual(args: Words, given: Given, told: Told) -> Words:
    """Layers of a virtual stage, where ours counts the virtual stages of a rank. Megatron interleaves wherever there
    are several."""
    layers, each = _number(given, "num-layers"), _number({"n": args}, "n")
    stages = _number(given, "pipeline-model-parallel-size", "pp") or 1
    if not layers or not each or layers % (stages * each):
        what = (f"must divide the layers of a stage (--num-layers {layers or 'is missing'} over --pp {stages}); "
                "write --num-virtual-stages-per-pipeline-rank")
        _tell(told.missing, what, "num-layers-per-virtual-pipeline-stage", args)
        return []
    virtual = layers // stages // each
    schedule = ["--pipeline-schedule", "interleaved"] if virtual > 1 and "pipeline-schedule" not in given else []
    flags = ["--num-virtual-stages-per-pipeline-rank", str(virtual), *schedule]
    told.renamed.append(f"--num-layers-per-virtual-pipeline-stage {each}: is {' '.join(flags)}")
    return flags


def _virtual_stages(args: Words, given: Given, told: Told) -> Words:
    """Megatron interleaves wherever there are several virtual stages."""
    flags = ["--num-virtual-stages-per-pipeline-rank", *args]
    if args and args != ["1"] and "pipeline-schedule" not in given and "pipeline-program" not in given:
        told.renamed.append(f"{' '.join(flags)}: the schedule is --pipeline-schedule interleaved")
        flags += ["--pipeline-schedule", "interleaved"]
    return flags


def _no_positions(args: Words, given: Given, told: Told) -> Words:
    """Megatron's old word for no learned ones."""
    if "position-embedding-type" in given or "use-rotary-position-embeddings" in given:
        _tell(told.without, "said by --position-embedding-type", "no-position-embedding", args)
        return []
    told.renamed.append("--no-position-embedding: is --position-embedding-type none")
    return ["--position-embedding-type", "none"]


def _window(args: Words, given: Given, told: Told) -> Words:
    """Megatron's counts the tokens before one and those after it, which a decoder never sees."""
    found = re.fullmatch(r"\(?(\d+),?\s*(-?\d+)\)?", " ".join(args))
    if not found or found[2] != "0":
        _tell(told.missing, "must be BEFORE,0 in a decoder; write --attention-window", "window-size", args)
        return []
    size = str(int(found[1]) + 1)
    told.renamed.append(f"--window-size {' '.join(args)}: is --attention-window {size}, the token itself counted")
    return ["--attention-window", size]


def _exact_gelu(args: Words, given: Given, told: Told) -> Words:
    """Megatron's fused kernel has the tanh formula, the plain one the exact."""
    if "megatron-defaults" in given:
        told.renamed.append("--no-bias-gelu-fusion: is the exact GELU")
        return ["--no-openai-gelu"]
    _tell(told.without, "the exact GELU is the default here", "no-bias-gelu-fusion", args)
    return []


def _of_tokens(now: str) -> Callable[[Words, Given, Told], Words]:
    """A length in tokens, where ours is in samples."""
    def samples(args: Words, given: Given, told: Told) -> Words:
        word = now.replace("samples", "tokens")
        tokens, length = _number({"n": [a.replace(",", "") for a in args]}, "n"), _number(given, "seq-length")
        if now in given or now.replace("samples", "iters") in given:
            _tell(told.without, f"said by --{now} or its steps", word, args)
            return []
        if not tokens or not length:
            _tell(told.missing, f"needs --seq-length, to be a number of samples; write --{now}", word, args)
            return []
        told.renamed.append(f"--{word} {tokens}: is --{now} {tokens // length}")
        return [f"--{now}", str(tokens // length)]

    return samples


def _padded(args: Words, given: Given, told: Told) -> Words:
    """The size of the stored vocabulary, padding included, which Megatron's softmax sees too."""
    told.renamed.append(f"--pad-vocab-size-to {' '.join(args)}: is --vocab-size {' '.join(args)}")
    return [] if "vocab-size" in given else ["--vocab-size", *args]


def _deepspeed_config(args: Words, given: Given, told: Told) -> Words:
    """What a configuration of DeepSpeed says that a flag can say too, and no flag says."""
    path, text = " ".join(args), _read("deepspeed_config", args, given, told)
    if text is None:
        return []
    try:
        flags = flags_of_deepspeed(json.loads(text), given)
    except (ValueError, AttributeError):
        _tell(told.missing, "is not JSON of names and values", "deepspeed_config", args)
        return []
    told.renamed.append(f"--deepspeed_config {path}: says {' '.join(flags) or 'what the flags say'}")
    return flags


def flags_of_deepspeed(said: Mapping[str, Any], given: Given) -> Words:
    """The flags that a ds_config.json stands for, beside those that were given. Raises AttributeError."""
    blocks = {block: said.get(block) or {} for block in ("zero_optimization", "fp16", "bf16")} | {"": said}
    flags = Words()
    for (block, key), (word, form) in FROM_DEEPSPEED.items():
        value = blocks[block].get(key)
        if value is True:
            flags += [] if word in given or "bf16" in given or "fp16" in given else [f"--{word}"]
        elif isinstance(value, int | float) and not isinstance(value, bool) and word not in given and form(value):
            flags += [f"--{word}", f"{value:g}" if isinstance(value, float) else str(value)]
    return flags


def _split_file(args: Words, given: Given, told: Told) -> Words:
    """A JSON of Megatron's with the words of each split's flag."""
    text = _read("per-split-data-args-path", args, given, told)
    if text is None:
        return ["--data-path", *args]
    try:
        said = {name: [str(word) for word in words] for name, words in json.loads(text).items() if words}
    except (ValueError, AttributeError, TypeError):
        _tell(told.missing, "is not JSON of lists named train, valid, test", "per-split-data-args-path", args)
        return []
    told.renamed.append(f"--per-split-data-args-path {' '.join(args)}: says --train-, --valid- and --test-data-path")
    return [word for name in ("train", "valid", "test") for word in (f"--{name}-data-path", *said.get(name, []))
            if name in said]


Range = tuple[str, float, float, str]                      # weight, from, to, prefix


def _ranges(text: str) -> list[Range]:
    """BigScience's `NAME: WEIGHT FROM:TO PREFIX, ...`, a line for each name. Raises ValueError."""
    parts = [part.split() for line in text.replace('"', " ").splitlines() if line.strip()
             for part in re.sub(r"^\s*[\w-]+:\s", "", line).split(",") if part.strip()]
    cut = [(weight, *bounds.split(":"), prefix) for weight, bounds, prefix in parts]
    return [(weight, float(low), float(high), prefix) for weight, low, high, prefix in cut]


def _weighted(args: Words, given: Given, told: Told) -> Words:
    """Parts of datasets with their weights: datasets of their own, or all of them cut alike, which --split does."""
    flags = [f"{name}-weighted-split-paths-path" for name in ("train", "valid")]
    text, other = (_read(flag, given.get(flag, []), given, told) if flag in given else "" for flag in flags)
    if text is None or other is None:
        return ["--data-path", *args]
    try:
        train, valid = _ranges(text), _ranges(other)
    except ValueError:
        _tell(told.missing, "is not lines such as `TRAIN: 0.3 0:0.95 PREFIX, ...`", flags[0], args)
        return []
    whole = {(low, high) for _, low, high, _ in (*train, *valid)} <= {(0.0, 1.0)}
    cuts = [{(low, high) for _, low, high, _ in rows} for rows in (train, valid)]
    first, second = (rows.copy().pop() if len(rows) == 1 else (0.0, 1.0) for rows in cuts)
    words = [[word for weight, _, _, prefix in rows for word in (weight, prefix)] for rows in (train, valid)]
    if whole:
        made = ["--train-data-path", *words[0], *(["--valid-data-path", *words[1]] if valid else [])]
    elif (max(map(len, cuts)) == 1 and first[0] == 0 and (not valid or second[0] == first[1])
          and (not valid or words[0] == words[1])):
        parts = (first[1], (second[1] - first[1]) if valid else 0.0, 1 - (second[1] if valid else first[1]))
        made = ["--data-path", *words[0], "--split", ",".join(f"{1000 * part:g}" for part in parts)]
    else:
        what = "each dataset is cut elsewhere, where --split cuts all alike; cut them before"
        _tell(told.missing, what, flags[0], args)
        return []
    told.renamed.append(f"--{flags[0]} {' '.join(args)}: says {printable(' '.join(made), 200)}")
    return made


def _told_by_train(args: Words, given: Given, told: Told) -> Words:
    if "train-weighted-split-paths-path" not in given:
        what = "needs --train-weighted-split-paths-path"
        _tell(told.missing, what, "valid-weighted-split-paths-path", args)
    return []


def _read(word: str, args: Words, given: Given, told: Told) -> str | None:
    """The text of a file that a word names; None, and told, where there is none: no mistake under --check."""
    path = " ".join(args)
    try:
        return read_bytes(Path(path)).decode()
    except (OSError, ValueError):
        if "check" in given:
            told.renamed.append(f"--{word} {path}: is not on this machine; what it says does not count here")
        else:
            _tell(told.missing, "cannot be read; name a file, or leave it out", word, args)
        return None


FROM_DEEPSPEED: dict[tuple[str, str], tuple[str, Callable[[float], bool]]] = {
    ("", "train_batch_size"): ("global-batch-size", lambda v: v > 0),
    ("", "train_micro_batch_size_per_gpu"): ("micro-batch-size", lambda v: v > 0),
    ("", "gradient_clipping"): ("clip-grad", lambda v: v >= 0),
    ("zero_optimization", "stage"): ("zero-stage", lambda v: v in range(4)),
    ("fp16", "enabled"): ("fp16", bool), ("bf16", "enabled"): ("bf16", bool),
    ("fp16", "loss_scale"): ("loss-scale", lambda v: v > 0),
    ("fp16", "loss_scale_window"): ("loss-scale-window", lambda v: v > 0),
    ("fp16", "hysteresis"): ("hysteresis", lambda v: v > 0),
    ("fp16", "min_loss_scale"): ("min-loss-scale", lambda v: v > 0),
}

def _positions(args: Words, given: Given, told: Told) -> Words:
    """Megatron's yarn is a kind of positions."""
    if args != ["yarn"]:
        return _same("position-embedding-type", args, told)
    told.renamed.append("--position-embedding-type yarn: is rope with a yarn --rope-scaling-type")
    return ["--position-embedding-type", "rope", "--use-rope-scaling", "--rope-scaling-type", "yarn"]


SPECIAL: dict[str, Callable[[Words, Given, Told], Words]] = {
    "use-distributed-optimizer": _zero, "use-torch-fsdp2": _torch_fsdp, "data-parallel-sharding-strategy": _sharding,
    "num-distributed-optimizer-instances": _instances, "group-query-attention": _groups, "attention-head-type": _heads,
    "num-layers-per-virtual-pipeline-stage": _virtual, "num-virtual-stages-per-pipeline-rank": _virtual_stages,
    "no-position-embedding": _no_positions, "train-tokens": _of_tokens("train-samples"),
    "lr-decay-tokens": _of_tokens("lr-decay-samples"), "lr-warmup-tokens": _of_tokens("lr-warmup-samples"),
    "pad-vocab-size-to": _padded, "padded-vocab-size": _padded,
    "deepspeed_config": _deepspeed_config,
    "window-size": _window, "position-embedding-type": _positions, "no-bias-gelu-fusion": _exact_gelu,
    "deepspeed-config": _deepspeed_config, "per-split-data-args-path": _split_file,
    "train-weighted-split-paths-path": _weighted, "valid-weighted-split-paths-path": _told_by_train,
}


def _implied(given: Given, told: Told) -> Iterator[str]:
    """What Megatron means where nothing is said."""
    if "tokenizer-type" not in given and "vocab-file" in given and "merge-file" in given:
        told.renamed.append("--vocab-file --merge-file: are files of --tokenizer-type GPT2BPETokenizer")
        yield from ("--tokenizer-type", "GPT2BPETokenizer")
