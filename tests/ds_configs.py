"""ds_config.json files of the kinds that public tutorials show, written from their keys; and wrong ones with what is said of them."""

from typing import Any

Config = dict[str, Any]
ADAMW = {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}
WARM = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500}}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
STAGE2 = {"stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True,
          "reduce_bucket_size": 2e8, "contiguous_gradients": True}
STAGE3 = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": 1e6,
          "stage3_prefetch_bucket_size": 0.94e6, "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 1e9,
          "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True}
CPU = {"device": "cpu", "pin_memory": True}
MICRO: Config = {"train_micro_batch_size_per_gpu": 1}

# name: (configuration, None if it runs; else what is said)
TUTORIALS: dict[str, tuple[Config, str | None]] = {
    "introduction": ({"train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
                      "fp16": {"enabled": True}, "zero_optimization": True}, "config zero_optimization: is True, not a mapping"),
    "getting started": ({"train_batch_size": 8, "gradient_accumulation_steps": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
                         "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, None),
    "snippet": ({"train_batch_size": 8, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
                 "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
                 "fp16": {"enabled": True}, "gradient_clipping": 1.0}, None),
    "cifar": ({"train_batch_size": 16, "steps_per_print": 2000, "optimizer": {"type": "Adam", "params": {
        "lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}, "scheduler": {"type": "WarmupLR", "params": {
            "warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}}, "gradient_clipping": 1.0, "prescale_gradients": False,
        "bf16": {"enabled": False}, "fp16": {**FP16, "initial_scale_power": 15}, "wall_clock_breakdown": False, "zero_optimization": {
            "stage": 0, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000, "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False}}, None),
    "bing bert": ({"train_batch_size": 4096, "train_micro_batch_size_per_gpu": 64, "steps_per_print": 1000, "optimizer": {"type": "Lamb", "params": {
        "lr": 2e-3, "weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01}}, "gradient_clipping": 1.0,
        "fp16": {"enabled": True, "loss_scale": 0}}, None),
    "squad": ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12, "steps_per_print": 10, "optimizer": {"type": "Adam", "params": {
        "lr": 3e-5, "weight_decay": 0.0, "bias_correction": False}}, "gradient_clipping": 1.0, "fp16": {"enabled": True}},
        "config optimizer.params.bias_correction: is False: there is no such kernel here; leave it out"),
    "trainer stage 2": ({**MICRO, "fp16": FP16, "optimizer": ADAMW, "scheduler": WARM, "zero_optimization": {**STAGE2, "offload_optimizer": CPU},
                         "steps_per_print": 2000, "wall_clock_breakdown": False}, None),
    "trainer stage 3": ({**MICRO, "bf16": {"enabled": True}, "optimizer": ADAMW, "scheduler": WARM, "zero_optimization": {
        **STAGE3, "offload_optimizer": CPU, "offload_param": CPU}, "gradient_accumulation_steps": 2, "wall_clock_breakdown": False}, None),
    "trainer auto": ({"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "fp16": {"enabled": "auto"}},
                     'config: train_micro_batch_size_per_gpu, optimizer.params.lr, fp16.enabled are "auto", which only a trainer fills in'),
    "infinity": ({**MICRO, "optimizer": ADAMW, "zero_optimization": {"stage": 3, "offload_param": {
        "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 6, "buffer_size": 1e8, "max_in_cpu": 1e9}}},
        "config zero_optimization.offload_param.device: is 'nvme': comes later"),
    "nvme keys and no device": ({**MICRO, "optimizer": ADAMW, "zero_optimization": {"stage": 3, "offload_param": {"device": "none", "nvme_path": "/x"}},
                                 "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True}}, None),
    "stage 1 for t5": ({**MICRO, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": True}},
                        "zero_optimization": {"stage": 1, "round_robin_gradients": True}, "data_types": {"grad_accum_dtype": "fp32"},
                        "bf16": {"enabled": True}, "communication_data_type": "fp32"}, None),
    "gpt-neox": ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4, "optimizer": {"type": "Adam", "params": {
        "lr": 0.0006, "betas": [0.9, 0.95], "eps": 1e-8}}, "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2,
                                                                      "min_loss_scale": 1}, "gradient_clipping": 1.0, "zero_optimization": {
        "stage": 1, "allgather_partitions": True, "allgather_bucket_size": 500000000, "overlap_comm": True, "reduce_scatter": True,
        "reduce_bucket_size": 500000000, "contiguous_gradients": True}, "steps_per_print": 10, "wall_clock_breakdown": True}, None),
    "megatron-deepspeed": ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 100, "zero_optimization": {"stage": 0},
                            "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "optimizer": ADAMW, "curriculum_learning": {
                                "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 64, "max_difficulty": 1024}},
                           "config curriculum_learning: {'enabled': True"),
    "everything off": ({**MICRO, "optimizer": ADAMW, "amp": {"enabled": False, "opt_level": "O1"}, "autotuning": {"enabled": False, "fast": True},
                        "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 3, "detailed": True, "output_file": None},
                        "curriculum_learning": {"enabled": False}, "data_efficiency": {"enabled": False}, "comms_logger": {"enabled": False},
                        "wandb": {"enabled": False}, "tensorboard": {"enabled": False}, "elasticity": {"enabled": False, "micro_batch_sizes": [2, 4]}}, None),
    "elastic": ({"elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6], "min_gpus": 1, "max_gpus": 10000,
                                "min_time": 20, "version": 0.2}, "optimizer": ADAMW, **MICRO},
                "config elasticity.enabled: is True: the batch is train_batch_size whatever the ranks; write false"),
    "activation checkpointing": ({**MICRO, "optimizer": ADAMW, "activation_checkpointing": {
        "partition_activations": True, "cpu_checkpointing": True, "contiguous_memory_optimization": False, "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False, "profile": False}}, None),
    "one bit adam": ({**MICRO, "optimizer": {"type": "OneBitAdam", "params": {"lr": 4e-4, "freeze_step": 23000, "cuda_aware": False}}},
                     "config optimizer.type: is 'OneBitAdam', which is not here"),
    "zero++": ({**MICRO, "optimizer": ADAMW, "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8,
                                                                   "zero_quantized_gradients": True}},
               "config zero_optimization.zero_hpz_partition_size: is 8: weights and gradients travel in full precision"),
    "mics": ({**MICRO, "optimizer": ADAMW, "zero_optimization": {"stage": 3, "mics_shard_size": 1, "mics_hierarchical_params_gather": False}}, None),
    "one cycle": ({**MICRO, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "scheduler": {"type": "OneCycle", "params": {
        "cycle_first_step_size": 1000, "cycle_first_stair_count": 500, "cycle_second_step_size": 1000, "cycle_second_stair_count": 500,
        "decay_step_size": 1000, "cycle_min_lr": 0.0001, "cycle_max_lr": 0.0010, "decay_lr_rate": 0.001, "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.99, "decay_mom_rate": 0.0}}}, None),
    "range test": ({**MICRO, "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}, "scheduler": {"type": "LRRangeTest", "params": {
        "lr_range_test_min_lr": 0.0001, "lr_range_test_step_size": 200, "lr_range_test_step_rate": 5, "lr_range_test_staircase": False}}}, None),
    "warm-up and decay": ({**MICRO, "optimizer": ADAMW, "scheduler": {"type": "WarmupDecayLR", "params": {
        "total_num_steps": 200, "warmup_min_lr": 0, "warmup_max_lr": 1e-4, "warmup_num_steps": 10, "warmup_type": "linear"}}}, None),
    "cosine": ({**MICRO, "bfloat16": {"enabled": True}, "optimizer": ADAMW, "scheduler": {"type": "WarmupCosineLR", "params": {
        "total_num_steps": 200, "warmup_min_ratio": 0.1, "warmup_num_steps": 10, "cos_min_ratio": 0.1}}}, None),
    "chat": ({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10, "zero_optimization": {
        "stage": 2, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}, "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7, "stage3_prefetch_bucket_size": 3e7, "memory_efficient_linear": False}, "fp16": {
            "enabled": True, "loss_scale_window": 100}, "gradient_clipping": 1.0, "prescale_gradients": False, "wall_clock_breakdown": False,
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False, "pin_parameters": True,
                          "tp_gather_partition_size": 8}, "optimizer": ADAMW, "tensorboard": {"enabled": False, "output_path": "x/", "job_name": "y"}}, None),
    "lightning": ({**MICRO, "zero_allow_untested_optimizer": True, "optimizer": ADAMW, "zero_optimization": {**STAGE2, "ignore_unused_parameters": False},
                   "logging_level": 30}, "config logging_level: is not a key"),
    "pipeline": ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "steps_per_print": 10,
                  "wall_clock_breakdown": False, "pipeline": {"seed_layers": True, "activation_checkpoint_interval": 1}}, None),
}

GOOD: Config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def good(**more: Any) -> Config:
    return {**GOOD, **more}


def zero(**more: Any) -> Config:
    return good(zero_optimization=more)


def adam(**more: Any) -> Config:
    return good(optimizer={"type": "Adam", "params": more})


def schedule(type: str, **more: Any) -> Config:
    return good(scheduler={"type": type, "params": more})


WRONG: list[tuple[Config, str]] = [
    (good(gradient_clippping=1.0), r"config gradient_clippping: is not a key \(did you mean gradient_clipping\?\); docs/deepspeed.md lists the keys"),
    (good(zero_optimisation={"stage": 2}), r"zero_optimisation: is not a key \(did you mean zero_optimization\?\)"),
    (good(stage=2), r"config stage: is not a key \(did you mean zero_optimization.stage\?\)"),
    (good(fp61={"enabled": True}), r"fp61: is not a key \(did you mean fp16\?\)"),
    (zero(stge=2), r"zero_optimization.stge: is not a key \(did you mean stage\?\)"),
    (good(**{"zero_optimization.stage": 2}), "config 'zero_optimization.stage': is not a key"),
    (good(optimizer={"type": "Adam", "params.lr": 1e-3}), "config optimizer.'params.lr': is not a key"),
    (zero(stage=4), "zero_optimization.stage: is 4, not 0, 1, 2 or 3"),
    (zero(stage="2"), "zero_optimization.stage: is '2', not 0, 1, 2 or 3"),
    (zero(stage=2, reduce_bucket_size="5e8"), "reduce_bucket_size: is '5e8', not a whole number from 0"),
    (zero(stage=2, reduce_bucket_size=0.5), "reduce_bucket_size: is 0.5, not a whole number from 0"),
    (zero(stage=3, offload_optimizer={"device": "disk"}), "offload_optimizer.device: is 'disk', not none or cpu or nvme"),
    (zero(stage=3, offload_optimizer={"device": "cpu", "pin_memmory": True}), r"offload_optimizer.pin_memmory: is not a key \(did you mean pin_memory\?\)"),
    (zero(stage=3, offload_optimizer="cpu"), "offload_optimizer: is 'cpu', not a mapping"),
    (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio: is 0.5: all of it has one home"),
    (zero(stage=3, zenflow={"topk_ratio": 0.1}), "zenflow: is {'topk_ratio': 0.1}: weights and gradients travel in full precision"),
    (zero(stage=3, mics_shard_size=3), "mics_shard_size: is 3, which does not divide 2 ranks; write -1"),
    (zero(stage=2, cpu_offload=True), "zero_optimization.cpu_offload: True is old for offload_optimizer; write that"),
    (zero(stage=1, legacy_stage1=True), "legacy_stage1: True was ZeRO's first stage|legacy_stage1: is True: was ZeRO's first stage"),
    ({"optimizer": GOOD["optimizer"]}, "train_batch_size: is missing, and train_micro_batch_size_per_gpu too; give one of the two"),
    (good(train_batch_size=7), "train_batch_size 7: on 2 ranks a step is micro-batch x accumulation x ranks"),
    (good(train_micro_batch_size_per_gpu=3), "train_batch_size 8, train_micro_batch_size_per_gpu 3: on 2 ranks"),
    (good(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=4), "gradient_accumulation_steps 4: on 2 ranks a step is"),
    (good(train_batch_size=0), "train_batch_size: is 0, not a whole number from 1"),
    (good(gradient_accumulation_steps=-1), "gradient_accumulation_steps: is -1, not a whole number from 1"),
    (good(train_batch_size="auto", gradient_clipping="auto"), 'train_batch_size, gradient_clipping are "auto", which only a trainer fills in'),
    (good(gradient_clipping=-1), "gradient_clipping: is -1, not a number from 0"),
    (good(gradient_clipping=True), "gradient_clipping: is True, not a number from 0"),
    (good(fp16={"enabled": True}, bf16={"enabled": True}), "bf16.enabled: so is fp16.enabled; keep one"),
    (good(bf16={"enabled": True}, bfloat16={"enabled": True}), "bfloat16: is bf16, which is given too; keep one"),
    (good(fp16={"enabled": "true"}), "fp16.enabled: is 'true', not true or false"),
    (good(fp16={"enabled": True, "loss_scale": -1}), "fp16.loss_scale: is -1, not a number from 0"),
    (good(fp16={"enabled": True, "fp16_master_weights_and_grads": True}), "fp16_master_weights_and_grads: is True: masters and sums are fp32; write false"),
    (good(bf16={"enabled": True}, data_types={"param_dtype": "fp16"}), "data_types.param_dtype: is fp16, but weights are bf16"),
    (good(torch_autocast={"enabled": True, "dtype": "bfloat16"}), "torch_autocast.enabled: True is not here yet; leave it out; write bf16 or fp16"),
    (good(amp={"enabled": True}), "amp.enabled: is True: apex is not used; write bf16 or fp16"),
    (good(optimizer={"type": "OneBitAdam", "params": {"lr": 1e-3}}), "optimizer.type: is 'OneBitAdam', which is not here; write adam or adamw or sgd or lamb or lion or muon"),
    (good(optimizer={"params": {"lr": 1e-3}}), "optimizer.type: is missing; write adam or adamw or sgd or lamb or lion or muon or adafactor"),
    (adam(lr="1e-3"), "optimizer.params.lr: is '1e-3', not a number from 0"),
    (adam(lr=1e-3, betas=[0.9, 1.0]), "optimizer.params.betas: is .0.9, 1.0., not two numbers from 0, less than 1"),
    (adam(lr=1e-3, max_grad_norm=1.0), "optimizer.params.max_grad_norm: 1.0 is gradient_clipping, beside the optimizer"),
    (adam(lr=1e-3, momentum=0.9), "optimizer.params.momentum: is not a key"),
    (good(optimizer={"type": "Muon", "params": {"lr": 1e-3, "momentum": 2}}), "optimizer.params.momentum: is 2, not a number from 0 to 1"),
    (good(optimizer={"type": "Muon", "params": {"per_head_muon": True}}), "optimizer.params.per_head_muon: is True: whole matrices are made orthogonal"),
    (good(optimizer={"type": "Muon", "params": {"nesterov": True}}), "optimizer.params.nesterov: is not a key"),
    (good(optimizer={"type": "Adafactor", "params": {"beta2_decay": 0.8}}), "optimizer.params.beta2_decay: is 0.8, not a number below 0"),
    (good(optimizer={"type": "Adafactor", "params": {"eps": 1e-3}}), "optimizer.params.eps: is 0.001, not two numbers from 0"),
    (schedule("CosineAnnealingLR", T_max=10), "scheduler.type: is 'CosineAnnealingLR', which is not here; write LRRangeTest or OneCycle"),
    (schedule("WarmupDecayLR", warmup_num_steps=10), "scheduler.params.total_num_steps: is missing; write a whole number from 1"),
    (schedule("WarmupLR", total_num_steps=10), "scheduler.params.total_num_steps: is not a key"),
    (schedule("WarmupLR", warmup_type="cubic"), "scheduler.params.warmup_type: is 'cubic', not log or linear"),
    (good(data_parallel_size=4), "data_parallel_size: is 4, but there are 2 ranks"),
    (good(sequence_parallel_size=2), "sequence_parallel_size: is 2: all ranks are data-parallel ranks; write 1"),
    (good(tensor_parallel={"autotp_size": 2}), "tensor_parallel.autotp_size: is 2: all ranks are data-parallel ranks"),
    (good(gradient_allreduce_op="sum"), "gradient_allreduce_op: is 'sum': multiply the loss by the ranks"),
    (good(compression_training={"weight_quantization": {}}), "compression_training: .* is not here yet"),
    (good(wandb={"enabled": True, "project": "x"}), "wandb.enabled: True is not here yet; leave it out"),
    (good(checkpoint={"load_universal": True}), "checkpoint.load_universal: is True: checkpoints are of the project's own format"),
]
