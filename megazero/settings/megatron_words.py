"""Words of Megatron-LM's kin as tables: what each of them is here. Read by megatron.py; docs/flags.md lists them."""

from collections.abc import Mapping
from typing import Any

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
        disable-bf16-reduced-precision-matmul no-use-tokenizer-model-from-checkpoint-args universal-checkpoint
        muon-split-qkv use-precision-aware-optimizer""",
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
        muon-fp32-matmul-prec attention-backend transformer-impl no-masked-softmax-fusion no-bias-swiglu-fusion
        no-bias-dropout-fusion no-rope-fusion cross-entropy-loss-fusion cross-entropy-fusion-impl bias-gelu-fusion
        masked-softmax-fusion bias-dropout-fusion no-gradient-accumulation-fusion no-persist-layer-norm
        no-async-tensor-model-parallel-allreduce tp-comm-* disable-tp-comm-* use-te-activation-func te-rng-tracker
        inference-rng-tracker enable-cuda-graph external-cuda-graph cuda-graph-* use-nccl-ub use-sharp
        sharp-enabled-group disable-symmetric-registration qknorm-impl mem-efficient-ln onnx-safe
        use-rotary-pos-emb-fusion use-ascend-mc2 symmetric-ar-type
        fused-linear fused-lm-head use-triton-* no-swiglu-fusion overlap-grad-reduce-impl use-mc2
        attn-implementation use-fused-* use-apex-* fused-attention no-fused-* use-liger-* use-cpp-*""",
    "the log has its own figures, in --log-dir": """
        log-throughput log-progress log-memory-to-tensorboard log-energy
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
    "masters and moments at home elsewhere have one kernel": """
        optimizer-offload-policy cpu_torch_adam use-torch-optimizer-for-cpu-offload overlap-cpu-optimizer-d2h-h2d""",
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
    "activations and weights cannot leave the device yet: it takes more of its memory; leave it out, and write "
    "--recompute-granularity full": """
        cpu-offloading cpu-offloading-num-layers cpu-offloading-* remote-device fine-grained-activation-offloading
        offload-modules swap-attention""",
    "sums of gradients are fp32 here: others would round the update; leave it out": """
        main-grads-dtype use-bnb-optimizer reuse-fp32-param""",
    "that optimizer is not here: the update would be another; write --optimizer adam, sgd, lion, lamb, ademamix, "
    "adafactor or muon": "shampoo-* soap-* sophia-*",
    "muon makes whole matrices orthogonal here, q, k and v apart, whatever --tp is; leave it out": """
        muon-no-split-qkv muon-tp-mode muon-qkv-split-mode""",
    "what is no matrix has adam beside muon here; leave it out": "muon-scalar-optimizer",
    "that loss is not here: the loss is the mean of each token's cross entropy; leave it out": """
        goldfish-loss goldfish-* mtp-* use-kl-loss loss-on-targets-only label-smoothing z-loss-* ce-* kd kd-*
        reweight-loss-based-on-position-frequency noise-density mask-prob short-seq-prob""",
    "that activation is not here: the MLP would compute another function; write --swiglu, --geglu, --squared-relu, "
    "--relu, --openai-gelu or nothing for GELU": """
        xielu quick-geglu glu-activation activation-func-clamp-value glu-linear-offset gelu-tanh-*
        activation-func-*""",
    "that attention is not here: its scores would be others; leave it out, and write --position-embedding-type rope "
    "where it was to say positions": """
        softmax-type multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim
        qk-pos-emb-head-dim v-head-dim mscale mscale-all-dim cache-mla-latents qk-l2-norm qk-clip* attention-output-gate
        experimental-attention-variant dsa-* linear-attention-* relative-attention-* use-alibi alibi-*
        use-attn-* no-weight-absorption""",
    "those positions are not here: each token would stand elsewhere; write --position-embedding-type rope, "
    "learned_absolute or none": """
        rotary-interleaved rotary-scaling-factor rope-type mrope-section yarn-* long-rope-*""",
    "that layer is not here: it would compute another function; leave it out for a model without it": """
        embed-layernorm apply-residual-connection-post-layernorm fp32-residual-connection hybrid-* mamba-*
        is-hybrid-model disable-mamba-mem-eff-path heterogeneous-* retro-* post-norm
        output-logits-multiplier embedding-multiplier-* residual-scale-* scale-depth scale-embedding
        parallel-attention parallel-layernorm use-post-layernorm""",
    "the weights would begin otherwise; leave it out, --init-method-std is here": """
        init-method-xavier-uniform embedding-init-method-std embedding-weights-in-fp32 init-method-std-*
        perform-init-*""",
    "weight decay is constant here: it would change with the steps; leave it out":
        "start-weight-decay end-weight-decay weight-decay-incr-style",
    "a test set that is cut by weights is not here; write --test-data-path": "test-weighted-split-paths-path",
    "steps are not left out here: the run would train on other data; cut them from the data":
        "iterations-to-skip skip-train-iteration-range decrease-batch-size-if-needed sample-rate",
    "batches are a number of samples here, each of --seq-length tokens; write --micro-batch-size":
        "use-dynamic-batch-size max-tokens-per-gpu use-packed-sequence packing-* sft sft-* reset-* pack-*",
    "is --lr-head here, which is the rate itself; write --lr x the factor": "head-lr-mult",
    "this program trains decoders on text; leave it out": """
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
    "is said by --global-batch-size here: --micro-batch-size x that x data-parallel ranks; write the product":
        "gradient-accumulation-steps",
    "is --zero-stage 3 here; write that": "fsdp",
    "is --bf16, --fp16 or --dtype here; write one": "precision mixed-precision torch-dtype",
    "ranks are those that torchrun starts; leave it out": "gpus devices num-gpus num-nodes nproc-per-node",
    "rates that follow a width are not here: each weight would have its own; leave it out": "use-mup mup-*",
    "a tokenizer is named by --tokenizer-type and --tokenizer-model here; write those": "patch-tokenizer-type",
    "the vocabulary's size is --vocab-size here; write the sum": "extra-vocab-size",
}

# words that mean, with these values, what is so anyway ("" is every value); otherwise they are in REFUSED
PLAIN: dict[str, tuple[str, ...]] = {
    "context-parallel-size": ("1",), "cp-comm-type": ("",), "expert-model-parallel-size": ("1",),
    "expert-tensor-parallel-size": ("1",), "num-experts": ("1", "0"), "mtp-num-layers": ("0",), "topk": ("1",),
    "main-grads-dtype": ("fp32",), "ds-sequence-parallel-size": ("1",), "rope-type": ("rope",),
    "rotary-scaling-factor": ("1", "1.0"), "softmax-type": ("vanilla",), "cpu-offloading-num-layers": ("0",),
    "expert-interval": ("",), "mlp-type": ("standard",), "moe-layer-freq": ("1",), "sample-rate": ("1", "1.0"),
    "mtp-loss-scaling-factor": ("",), "num-distributed-optimizer-instances": ("1",),
    "weight-decay-incr-style": ("constant",), "muon-tp-mode": ("duplicated", "distributed"),
    "muon-scalar-optimizer": ("adam",), "muon-qkv-split-mode": ("qkv",),
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
    "muon-use-nesterov": ("--muon-nesterov", "is --muon-nesterov"),
    "load-tag": ("--ckpt-step {}", "is --ckpt-step"),
    "optimizer-cpu-offload": ("--offload-optimizer cpu", "is --offload-optimizer cpu"),
    "cpu-optimizer": ("--offload-optimizer cpu", "is --offload-optimizer cpu"),
    "optimizer-offload-fraction": ("--offload-fraction {}", "is --offload-fraction"),
    "per-device-train-batch-size": ("--micro-batch-size {}", "is --micro-batch-size"),
    "max-grad-norm": ("--clip-grad {}", "is --clip-grad"), "output-dir": ("--save {}", "is --save"),
    "lr-scheduler-type": ("--lr-decay-style {}", "is --lr-decay-style"),
    "warmup-ratio": ("--lr-warmup-fraction {}", "is --lr-warmup-fraction"),
    "gradient-checkpointing": ("--recompute-granularity full", "is --recompute-granularity full"),
    "zero-optimization-stage": ("--zero-stage {}", "is --zero-stage"),
    "n-layer": ("--num-layers {}", "is --num-layers"),
    "n-head": ("--num-attention-heads {}", "is --num-attention-heads"),
    "n-embd": ("--hidden-size {}", "is --hidden-size"), "hidden-dim": ("--hidden-size {}", "is --hidden-size"),
    "tensor-parallel": ("--tensor-model-parallel-size {}", "is --tensor-model-parallel-size"),
    "tensor-model-parallel": ("--tensor-model-parallel-size {}", "is --tensor-model-parallel-size"),
    "pipeline-parallel": ("--pipeline-model-parallel-size {}", "is --pipeline-model-parallel-size"),
    "tensor-parallel-size": ("--tensor-model-parallel-size {}", "is --tensor-model-parallel-size"),
    "pipeline-parallel-size": ("--pipeline-model-parallel-size {}", "is --pipeline-model-parallel-size"),
    "learning-rate": ("--lr {}", "is --lr"), "max-steps": ("--train-iters {}", "is --train-iters"),
    "lr-warmup": ("--lr-warmup-iters {}", "is --lr-warmup-iters"),
    "warmup-steps": ("--lr-warmup-iters {}", "is --lr-warmup-iters"),
    "warmup-iters": ("--lr-warmup-iters {}", "is --lr-warmup-iters"),
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
    "optimizer": {"adamw": "adam", "hybridadam": "adam", "fusedadam": "adam", "dist_muon": "muon"},
    "position-embedding-type": {"learnable": "learned_absolute", "absolute": "learned_absolute", "rotary": "rope"},
    "data-parallel-sharding-strategy": {"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"},
}
# word of ours -> values that ask for what is in REFUSED, as this word of it does
ASKS: dict[str, tuple[str, str]] = {
    "position-embedding-type": ("mrope-section", "alibi relative mrope t5"),
    "tokenizer-type": ("bert-", "BertWordPieceLowerCase BertWordPieceCase MultimodalTokenizer NullMultimodalTokenizer "
                                "SFTTokenizer"),
    "optimizer": ("shampoo-", "adaptive_muon sophia shampoo soap ranger adan adagrad"),
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
