"""Every key of DeepSpeed's ds_config.json (0.19.8), and what it does here: docs/deepspeed.md is made of this table.
Pure."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

HONOURED, IDLE, REFUSED = "honoured", "no effect", "refused"
MUST = "must be given"      # a default


class Key(NamedTuple):
    """
    path        as it is written, with dots
    form        of FORMS, or words with | between
    what        HONOURED: what it does; IDLE: why it has no effect here; REFUSED: what to write instead
    only        REFUSED: the values that are taken all the same; its default is one
    of          types of optimizer or scheduler that have it, with | between; "": it stands in no such block
    """

    path: str
    form: str
    default: Any
    kind: str
    what: str
    only: tuple[Any, ...] = ()
    of: str = ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: Any) -> bool:
    """1e9 is whole too."""
    return _number(value) and value == int(value)


def _each(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(test, value))


def _amount(value: Any) -> bool:
    return _number(value) and value >= 0


# what a value must be, in words and as a test
FORMS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "switch": ("true or false", lambda v: isinstance(v, bool)),
    "count": ("a whole number from 1", lambda v: _whole(v) and v >= 1),
    "never": ("a whole number from 1, or Infinity for never", lambda v: v == float("inf") or _whole(v) and v >= 1),
    "size": ("a whole number from 0", lambda v: _whole(v) and v >= 0),
    "stage": ("0, 1, 2 or 3", lambda v: _whole(v) and 0 <= v <= 3),
    "power": ("a whole number from 0 to 127", lambda v: _whole(v) and 0 <= v <= 127),
    "whole": ("a whole number", _whole),
    "number": ("a number", _number),
    "amount": ("a number from 0", _amount),
    "fraction": ("a number from 0 to 1", lambda v: _amount(v) and v <= 1),
    "amounts": ("a number from 0, or a list of one for each group", lambda v: _amount(v) or _each(_amount)(v)),
    "betas": ("two numbers from 0, less than 1", lambda v: _each(lambda b: _amount(b) and b < 1)(v) and len(v) == 2),
    "negative": ("a number below 0", lambda v: _number(v) and v < 0),
    "epsilons": ("two numbers from 0, the first null for the dtype's own",
                 lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and (v[0] is None or _amount(v[0]))
                 and _amount(v[1])),
    "path": ("a path", lambda v: isinstance(v, str) and "\0" not in v),
    "word": ("a word", lambda v: isinstance(v, str)),
    "words": ("a list of words", _each(lambda w: isinstance(w, str))),
    "counts": ("a list of whole numbers", _each(_whole)),
    "block": ("a mapping", lambda v: isinstance(v, Mapping)),
    "any": ("anything", lambda v: True),
}


def fits(key: Key, value: Any) -> bool:
    """Has the value the key's form?"""
    if key.form in FORMS:
        return FORMS[key.form][1](value)
    return isinstance(value, str) and value.lower() in key.form.lower().split("|")


def form_of(key: Key) -> str:
    """In words."""
    return FORMS[key.form][0] if key.form in FORMS else " or ".join(key.form.split("|"))


def taken(key: Key, value: Any) -> bool:
    """Is this a value that a refused key may have?"""
    off = isinstance(value, Mapping) and key.form == "block" and not value.get("enabled", len(value) > 0)
    return off or any(type(value) is type(one) and value == one for one in (*key.only, key.default))


def _in(block: str, *keys: Key) -> Iterator[Key]:
    for key in keys:
        yield key._replace(path=f"{block}.{key.path}")


def _of(kinds: str, block: str, keys: Iterable[Key]) -> Iterator[Key]:
    """Keys of some types of a block."""
    for key in _in(block, *keys):
        yield key._replace(of=kinds)


def _all(kind: str, what: str, text: str) -> Iterator[Key]:
    """Keys of one meaning: `name form default; ...`."""
    for name, form, *default in (part.split() for part in text.split(";")):
        yield Key(name, form, _value(" ".join(default)), kind, what)


def _value(text: str) -> Any:
    plain: dict[str, Any] = {"": None, "T": True, "F": False, "[]": [], '""': ""}
    if text in plain or not re.fullmatch(r"-?[\d.]+(e-?\d+)?", text):
        return plain.get(text, text)
    return float(text) if "." in text else int(float(text))


def _block(name: str, what: str, rest: str = "") -> Iterator[Key]:
    """One that must stay off; its other keys may stand there."""
    yield Key(f"{name}.enabled", "switch", False, REFUSED, what)
    if rest:
        yield from _in(name, *_all(IDLE, f"{name} is off", rest))


LATER = "is not here yet; leave it out"
SUMS = "gradients are summed in fp32 (fp64 with fp64), and the mean is taken once"
UNITS = "blocks travel whole, the next one while this one computes: nothing is cut by size"
OFFLOAD = "nothing is moved: on a CPU masters, moments and weights are in its memory already"
MODULE = "the module's own torch.utils.checkpoint decides; this block is for deepspeed.checkpointing"
CHECKPOINTS = "checkpoints are of the project's own format, which knows no layout"
ADAM, SGD, LAMB, LION, MUON, FACTOR = "adam|adamw", "sgd", "lamb", "lion", "muon", "adafactor"
WARM = "WarmupLR|WarmupDecayLR"

TABLE: tuple[Key, ...] = (
    # ---- batch
    Key("train_batch_size", "count", None, HONOURED, "samples of a step on all ranks: micro-batch x accumulation x "
        "ranks; two of the three give the third, and accumulation is 1 where one is given"),
    Key("train_micro_batch_size_per_gpu", "count", None, HONOURED, "samples of one forward pass of a rank"),
    Key("gradient_accumulation_steps", "count", None, HONOURED, "micro-batches of a step"),
    Key("managed_gradient_accumulation", "switch", True, REFUSED, "a step ends when its micro-batches are counted, or "
        "where set_gradient_accumulation_boundary and step(partial=True) say; leave it true"),
    Key("dataloader_drop_last", "switch", False, HONOURED, "the loader of training_data leaves out a last batch that "
        "is not full"),
    # ---- gradients
    Key("gradient_clipping", "amount", 1.0, HONOURED, "largest norm of the whole gradient; 0 turns it off"),
    Key("gradient_allreduce_op", "mean|sum", "mean", REFUSED, 'multiply the loss by the ranks and write "mean"'),
    *_all(IDLE, SUMS, "prescale_gradients switch F; gradient_predivide_factor amount 1.0; communication_data_type "
          "fp32|fp16|bf16|float32|float16|bfloat16"),
    *_in("data_types", *_all(IDLE, SUMS, "grad_accum_dtype fp32|fp16|bf16|float32|float16|bfloat16"),
         Key("param_dtype", "fp32|fp16|bf16|float32|float16|bfloat16", None, HONOURED, "must agree with fp16 and bf16"),
         *_all(REFUSED, "buffers stay as the module made them; leave it out", "buffer_dtype word"),
         Key("keep_in_fp32_modules", "any", "auto", REFUSED, 'every parameter has the dtype of the run; leave it out',
             (None, []))),
    *_all(REFUSED, "gradients of embeddings are whole; write false", "sparse_gradients switch F"),
    # ---- what is printed
    Key("steps_per_print", "never", None, HONOURED, "steps between lines with loss, norm and learning rate"),
    *_all(IDLE, "nothing is timed or listed", "wall_clock_breakdown switch F; memory_breakdown switch F; dump_state "
          "switch F; log_level word"),
    *_in("tensorboard",
         Key("enabled", "switch", False, HONOURED, "curves of loss, learning rate and loss scale over samples"),
         Key("output_path", "path", "", HONOURED, "folder of folders"),
         Key("job_name", "path", "DeepSpeedJobName", HONOURED, "folder in it")),
    *_in("csv_monitor",
         Key("enabled", "switch", False, HONOURED, "the same curves, a table for each"),
         Key("output_path", "path", "", HONOURED, "folder of folders"),
         Key("job_name", "path", "DeepSpeedJobName", HONOURED, "folder in it")),
    *_block("wandb", LATER, "group word; team word; project word deepspeed"),
    *_block("comet", LATER, "samples_log_interval count 100; project word; workspace word; api_key word; "
            "experiment_name word; experiment_key word; online switch; mode word"),
    *_block("flops_profiler", LATER, "recompute_fwd_factor amount 0.0; profile_step count 1; module_depth whole -1; "
            "top_modules count 1; detailed switch T; output_file word"),
    *_block("comms_logger", LATER, "prof_all switch T; prof_ops words []; verbose switch F; debug switch F"),
    # ---- precision
    *_in("fp16",
         Key("enabled", "switch", False, HONOURED, "weights and products in fp16, masters and moments in fp32"),
         *_all(IDLE, "inputs are always cast as weights are", "auto_cast switch F"),
         Key("loss_scale", "amount", 0.0, HONOURED, "a constant loss scale; 0 is a dynamic one"),
         Key("initial_scale_power", "power", 16, HONOURED, "the dynamic scale begins with 2 to this power"),
         Key("loss_scale_window", "count", 1000, HONOURED, "good steps after which it doubles"),
         Key("hysteresis", "count", 2, HONOURED, "bad steps before it halves"),
         Key("min_loss_scale", "amount", 1, HONOURED, "it stays there, where DeepSpeed ends the run"),
         *_all(REFUSED, "the hysteresis begins again when the scale grows; write false", "consecutive_hysteresis "
               "switch F"),
         *_all(REFUSED, "masters and sums are fp32; write false", "fp16_master_weights_and_grads switch F")),
    *_in("bf16",
         Key("enabled", "switch", False, HONOURED, "weights and products in bf16, masters and moments in fp32; "
             "`bfloat16` is the same block"),
         *_all(IDLE, "a gradient goes into the step's sum as soon as it is there", "immediate_grad_update switch F"),
         *_all(IDLE, "every step is looked at, at every level: one that is not finite changes nothing",
               "check_grad_overflow switch T"),
         *_all(REFUSED, "masters, sums and moments are fp32; write false", "bf16_master_weights_and_grads switch F; "
               "bf16_optimizer_states switch F")),
    *_block("torch_autocast", f"{LATER}; write bf16 or fp16", "dtype word; lower_precision_safe_modules words"),
    *_block("amp", "apex is not used; write bf16 or fp16", "opt_level word"),
    # ---- optimizer
    Key("optimizer.type", "adam|adamw|sgd|lamb|lion|muon|adafactor", MUST, HONOURED, "Adam is AdamW unless "
        "adam_w_mode is false; Lamb measures each tensor whole; Muon is of matrices whose name has neither embed nor "
        "lm_head in it, and Adam of the rest, unless parameters say use_muon themselves. Adagrad, the 1-bit and the mu "
        "kinds are not here"),
    *_all(IDLE, "the kernels are torch's fused ones", "optimizer.legacy_fusion switch F"),
    *_of(f"{ADAM}|{SGD}|{LAMB}|{LION}", "optimizer.params", (
        Key("lr", "amount", 1e-3, HONOURED, "learning rate of groups that say none"),)),
    *_of(MUON, "optimizer.params", (
        Key("lr", "amount", None, HONOURED, "learning rate of groups that say none; default 0.02, of the rest 3e-4"),
        Key("muon_lr", "amount", None, HONOURED, "of matrices alone"),
        Key("adam_lr", "amount", None, HONOURED, "of the rest alone"),
        Key("momentum", "fraction", 0.95, HONOURED, "decay of the mean of gradients of matrices"),
        Key("betas", "betas", (0.9, 0.95), HONOURED, "Adam's, of the rest"),
        Key("eps", "amount", 1e-10, HONOURED, "Adam's, of the rest"),
        Key("weight_decay", "amount", 0.0, HONOURED, "of groups that say none, vectors too"),
        *_all(IDLE, "the two are one polynomial; iterations are in fp32 on a CPU, bf16 on CUDA", "ns_method word"),
        *_all(REFUSED, "whole matrices are made orthogonal; leave it out", "per_head_muon switch F"))),
    *_of(FACTOR, "optimizer.params", (
        Key("lr", "amount", 1e-2, HONOURED, "the most that a weight may change of its root mean square"),
        Key("beta2_decay", "negative", -0.8, HONOURED, "the second moment's decay after t steps: 1 - t to this power"),
        Key("eps", "epsilons", (None, 1e-3), HONOURED, "least second moment, least root mean square of a weight"),
        Key("d", "amount", 1.0, HONOURED, "largest root mean square of an update"),
        Key("weight_decay", "amount", 0.0, HONOURED, "of groups that say none, vectors too"))),
    *_of(f"{ADAM}|{SGD}|{LAMB}|{LION}|{MUON}|{FACTOR}", "optimizer.params", (
        Key("max_grad_norm", "amount", None, REFUSED, "is gradient_clipping, beside the optimizer"),
        *_all(IDLE, "the kernels are torch's fused ones", "foreach switch; fused switch"),
        *_all(REFUSED, "write false, and the negative of the loss", "maximize switch F"))),
    *_of(ADAM, "optimizer.params", (
        Key("betas", "betas", (0.9, 0.999), HONOURED, "decay of the mean of gradients and of their squares"),
        Key("eps", "amount", 1e-8, HONOURED, "added to the root of the second moment"),
        Key("weight_decay", "amount", None, HONOURED, "of groups that say none, vectors too; default 0, and 0.01 for "
            "AdamW with torch_adam"),
        Key("adam_w_mode", "switch", True, HONOURED, "Adam with false: decay is part of the gradient"),
        Key("torch_adam", "switch", False, HONOURED, "changes the default of weight_decay, as there"),
        *_all(REFUSED, "there is no such kernel here; leave it out", "amsgrad switch F; bias_correction switch T"),
        *_all(IDLE, "moments are fp32, gradients are kept in the flat buffers of the blocks", "fp32_optimizer_states "
              "switch T; set_grad_none switch T"))),
    *_of(SGD, "optimizer.params", (
        Key("momentum", "fraction", 0.0, HONOURED, "decay of the sum of gradients"),
        Key("weight_decay", "amount", 0.0, HONOURED, "of groups that say none, vectors too"),
        Key("nesterov", "switch", False, HONOURED, "the gradient is added once more, ahead"),
        *_all(REFUSED, "there is no such kernel here; write 0", "dampening amount 0.0"))),
    *_of(LAMB, "optimizer.params", (
        Key("betas", "betas", (0.9, 0.999), HONOURED, "decay of the mean of gradients and of their squares"),
        Key("eps", "amount", 1e-8, HONOURED, "added to the root of the second moment"),
        Key("weight_decay", "amount", 0.0, HONOURED, "of groups that say none, vectors too"),
        Key("bias_correction", "switch", True, HONOURED, "of both moments, within the direction that is measured"),
        Key("max_coeff", "amount", 10.0, HONOURED, "the most that a tensor's norm over its direction's may be"),
        Key("min_coeff", "amount", 0.01, HONOURED, "the least"),
        *_all(REFUSED, "there is no such kernel here; leave it out", "amsgrad switch F; eps_inside_sqrt switch F"))),
    *_of(LION, "optimizer.params", (
        Key("betas", "betas", (0.9, 0.99), HONOURED, "part of the mean of gradients in an update, and its decay"),
        Key("weight_decay", "amount", 0.0, HONOURED, "of groups that say none, vectors too"))),
    *_of(f"{LAMB}|{LION}", "optimizer.params", _all(
        IDLE, "gradients are kept in the flat buffers of the blocks", "set_grad_none switch T")),
    *_all(IDLE, "optimizers that can run over slices are known, others are refused by name",
          "zero_allow_untested_optimizer switch F; zero_force_ds_cpu_optimizer switch T"),
    # ---- scheduler
    Key("scheduler.type", "LRRangeTest|OneCycle|WarmupLR|WarmupDecayLR|WarmupCosineLR", MUST, HONOURED, "steps with "
        "the engine, not for a step that was skipped. Those of torch are given as lr_scheduler=lambda optimizer: ..."),
    *_of(f"{WARM}|WarmupCosineLR", "scheduler.params", (
        Key("warmup_num_steps", "count", 1000, HONOURED, "steps of the rise, at least 2"),
        Key("warmup_type", "log|linear", "log", HONOURED, "its form"))),
    *_of(WARM, "scheduler.params", (
        Key("warmup_min_lr", "amounts", 0.0, HONOURED, "rate before the rise"),)),
    *_of("WarmupLR", "scheduler.params", (
        Key("warmup_max_lr", "amounts", None, HONOURED, "rate after it; default: the group's own"),)),
    *_of("WarmupDecayLR", "scheduler.params", (
        Key("warmup_max_lr", "amounts", 1e-3, HONOURED, "rate after it"),)),
    *_of("WarmupDecayLR|WarmupCosineLR", "scheduler.params", (
        Key("total_num_steps", "count", MUST, HONOURED, "length of rise and fall"),)),
    *_of("WarmupCosineLR", "scheduler.params", (
        Key("warmup_min_ratio", "fraction", 0.0, HONOURED, "part of the group's own rate before the rise"),
        Key("cos_min_ratio", "fraction", 1e-4, HONOURED, "part of it at the end"))),
    *_of("LRRangeTest", "scheduler.params", (
        Key("lr_range_test_min_lr", "amounts", 1e-3, HONOURED, "rate at the begin"),
        Key("lr_range_test_step_size", "count", 2000, HONOURED, "steps of an interval"),
        Key("lr_range_test_step_rate", "amount", 1.0, HONOURED, "parts of the first rate that an interval adds"),
        Key("lr_range_test_staircase", "switch", False, HONOURED, "it rises at the end of an interval alone"))),
    *_of("OneCycle", "scheduler.params", (
        Key("cycle_min_lr", "amounts", MUST, HONOURED, "lowest rate"),
        Key("cycle_max_lr", "amounts", MUST, HONOURED, "highest rate"),
        Key("decay_lr_rate", "amount", 0.0, HONOURED, "how fast it decays after the cycle"),
        Key("cycle_first_step_size", "count", 2000, HONOURED, "steps of the rise"),
        Key("cycle_second_step_size", "size", None, HONOURED, "steps of the fall; default: as many"),
        Key("cycle_first_stair_count", "size", 0, HONOURED, "stairs of the rise; 0: none"),
        Key("cycle_second_stair_count", "size", None, HONOURED, "stairs of the fall; default: as many"),
        Key("decay_step_size", "size", 0, HONOURED, "steps of an interval of decay; 0: none"),
        Key("cycle_momentum", "switch", True, HONOURED, "Adam's first beta goes the other way, its second is 0.99"),
        Key("cycle_min_mom", "fraction", 0.8, HONOURED, "lowest"),
        Key("cycle_max_mom", "fraction", 0.9, HONOURED, "highest"),
        Key("decay_mom_rate", "amount", 0.0, HONOURED, "how fast it grows after the cycle"))),
    *_of(f"{WARM}|WarmupCosineLR|LRRangeTest|OneCycle", "scheduler.params", (
        Key("last_batch_iteration", "whole", -1, REFUSED, "a run that goes on takes it from its checkpoint; leave it "
            "out"),)),
    # ---- ZeRO
    *_in("zero_optimization",
         Key("stage", "stage", 0, HONOURED, "what ranks share: 1 optimizer state, 2 gradients too, 3 weights too"),
         Key("overlap_comm", "switch", None, HONOURED, "false: weights and gradients do not travel while passes go on; "
             "default true, at every level"),
         Key("mics_shard_size", "whole", -1, HONOURED, "ranks that share one copy, which the others repeat; -1: all"),
         *_all(IDLE, UNITS, "contiguous_gradients switch T; reduce_scatter switch T; reduce_bucket_size size 5e8; "
               "use_multi_rank_bucket_allreduce switch T; allgather_partitions switch T; allgather_bucket_size size "
               "5e8; round_robin_gradients switch F; parameter_alignment switch F; sub_group_size size 1e9; "
               "stage3_prefetch_bucket_size size 5e7; stage3_param_persistence_threshold size 1e5; "
               "stage3_model_persistence_threshold size; stage3_max_live_parameters size 1e9; "
               "stage3_max_reuse_distance size 1e9; stage3_module_granularity_threshold size 0; "
               "stage3_use_all_reduce_for_fetch_params switch F; stage3_allgather_sequential switch F; "
               "memory_efficient_linear switch T; mics_hierarchical_params_gather switch F; log_trace_cache_warnings "
               "switch F"),
         *_in("leaf_module", *_all(IDLE, UNITS, "classes words []; names words []; name_suffixes words []")),
         *_all(IDLE, "the norm is always taken, a parameter without a gradient has gradient zero, and hooks name what "
               "is wrong", "compute_grad_norm switch T; ignore_unused_parameters switch T; enable_sanity_checks switch "
               "F; override_module_apply switch T"),
         *_all(IDLE, CHECKPOINTS, "load_from_fp32_weights switch T; elastic_checkpoint switch F; "
               "pipeline_loading_checkpoint switch F; save_muon_momentum_buffer_in_memory switch F"),
         *_all(IDLE, "weights may always be gathered to be saved: block by block it takes no memory to speak of",
               "stage3_gather_16bit_weights_on_model_save switch F; stage3_gather_fp16_weights_on_model_save switch F"),
         *_all(REFUSED, "was ZeRO's first stage before 2021; leave it out", "legacy_stage1 switch F"),
         *_all(REFUSED, "weights and gradients travel in full precision; leave it out (mics_shard_size keeps traffic "
               "near)", "zero_hpz_partition_size count 1; zero_quantized_weights switch F; "
               "zero_quantized_nontrainable_weights switch F; zero_quantized_gradients switch F; zeropp_loco_param "
               "block; zenflow block"),
         *_in("offload_param",
              Key("device", "none|cpu|nvme", "none", REFUSED, "comes later: leave it out (cpu is taken on a CPU)",
                  ("cpu",)),
              *_all(IDLE, OFFLOAD, "nvme_path word; buffer_count count 5; buffer_size size 1e8; max_in_cpu size 1e9; "
                    "pin_memory switch T")),
         *_in("offload_optimizer",
              Key("device", "none|cpu|nvme", "none", REFUSED, "comes later: leave it out (cpu is taken on a CPU)",
                  ("cpu",)),
              *_all(IDLE, OFFLOAD, "nvme_path word; buffer_count count 4; pin_memory switch T; pipeline_read switch F; "
                    "pipeline_write switch F; fast_init switch F; cpuadam_cores_perc fraction 0.8"),
              *_all(REFUSED, "all of it has one home; leave it out", "ratio fraction 1.0; super_offload switch F")),
         Key("cpu_offload", "switch", False, REFUSED, "is old for offload_optimizer; write that"),
         Key("cpu_offload_param", "switch", False, REFUSED, "is old for offload_param; write that"),
         *_all(IDLE, OFFLOAD, "cpu_offload_use_pin_memory switch")),
    *_in("aio", *_all(IDLE, "nothing is moved to a disk", "block_size size 1048576; queue_depth count 8; "
                      "intra_op_parallelism count 1; thread_count count 1; single_submit switch F; overlap_events "
                      "switch T; use_gds switch F")),
    *_all(IDLE, UNITS, "disable_allgather switch F"),
    # ---- other ranks
    Key("data_parallel_size", "count", None, HONOURED, "must be the number of ranks"),
    Key("sequence_parallel_size", "count", 1, REFUSED, "all ranks are data-parallel ranks; write 1"),
    *_all(IDLE, "all ranks are data-parallel ranks", "seq_parallel_communication_data_type word fp32; "
          "use_data_before_expert_parallelism switch F; vocabulary_size size"),
    *_in("tensor_parallel", *_all(REFUSED, f"all ranks are data-parallel ranks: tensor_parallel {LATER}",
         "autotp_size size 0; preset_model word; partition_config block; tp_overlap_comm switch F; tp_size count 1; tp "
         "block")),
    *_block("expert_parallel", LATER, "autoep_size count 1; preset_model word"),
    *_block("hybrid_engine", LATER, "max_out_tokens count 512; inference_tp_size count 1; release_inference_cache "
            "switch F; pin_parameters switch T; tp_gather_partition_size count 8; enable_cuda_graph switch F"),
    *_in("pipeline", *_all(IDLE, "it is for a PipelineModule, which is refused by name", "stages any auto; partition "
                           "word best; seed_layers switch F; activation_checkpoint_interval size 0; pipe_partitioned "
                           "switch T; grad_partitioned switch T; use_reentrant switch T")),
    *_block("elasticity", "the batch is train_batch_size whatever the ranks; write false",
            "max_train_batch_size count; micro_batch_sizes counts; min_gpus count 1; max_gpus count; min_time size; "
            "version number; prefer_larger_batch switch T; ignore_non_elastic_batch_info switch F; num_gpus_per_node "
            "count; model_parallel_size count 1"),
    # ---- activations, checkpoints, compilers
    *_in("activation_checkpointing", *_all(IDLE, MODULE, "partition_activations switch F; cpu_checkpointing switch F; "
         "contiguous_memory_optimization switch F; number_checkpoints count; synchronize_checkpoint_boundary switch F; "
         "profile switch F")),
    *_in("checkpoint", *_all(IDLE, CHECKPOINTS, "tag_validation Warn|Ignore|Fail Warn; checkpoint_serialization switch "
                             "T"),
         *_all(REFUSED, f"{CHECKPOINTS}; leave it out", "load_universal switch F; use_node_local_storage switch F; "
               "writer block"),
         *_in("parallel_write", *_all(IDLE, CHECKPOINTS, "pipeline_stage switch F"))),
    *_in("compile", *_all(REFUSED, f"compile the module with torch.compile; deepcompile {LATER}", "deepcompile switch "
                          "F; offload_activation switch F; offload_opt_states switch F; offload_parameters switch F; "
                          "passes words"),
         *_all(IDLE, "deepcompile is off", "autoep_non_moe switch F; free_activation switch F; "
               "free_activation_threshold size 10485760; offload_activation_pin_memory switch T; double_buffer switch "
               "T; symmetric_memory switch F; debug_log switch F; sync_before_reduce switch F; sync_after_reduce "
               "switch F; sync_before_allgather switch F; sync_after_allgather switch F; keep_int_input_tensors "
               "switch T; keep_all_input_tensors switch F")),
    *_all(REFUSED, "there are no graphs to harvest; write false", "graph_harvesting switch F"),
    *_all(IDLE, "Python collects its garbage itself", "disable_python_gc switch F"),
    # ---- what is not about training a module
    *_block("autotuning", LATER, "fast switch T; metric word throughput; start_profile_step count 3; end_profile_step "
            "count 5; tuner_type word gridsearch; tuner_num_trials count 50; tuner_early_stopping count 5; "
            "early_stopping count 5; overwrite switch T; results_dir word autotuning_results; exps_dir word "
            "autotuning_exps; metric_path word; arg_mappings block; max_train_batch_size count; min_train_batch_size "
            "count 1; max_train_micro_batch_size_per_gpu count 1024; min_train_micro_batch_size_per_gpu count 1; "
            "num_tuning_micro_batch_sizes count 3; mp_size count 1; model_info_path word; model_info block"),
    *_all(REFUSED, LATER, "curriculum_learning block; data_efficiency block; progressive_layer_drop block; eigenvalue "
          "block; compression_training block; sparse_attention block; nebula block; datastates_ckpt block; "
          "weight_quantization block; quantize_training block"),
)
