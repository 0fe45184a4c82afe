"""Every reason why a configuration cannot run on a number of ranks: a condition, and a sentence with flag, value,
what to write. Pure.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import inf

from megazero.pipeline import SCHEDULES, ends_as_layers, from_layout
from megazero.plan.architecture import block, units
from megazero.plan.devices import DEVICES, named
from megazero.plan.homes import OFFLOADED, PAGE
from megazero.plan.rules import RATES, rates_of
from megazero.plan.sizes import ramp_of, sizes
from megazero.plan.words import architecture, ffn_size, pattern, stretches, turns
from megazero.settings import Config, nearest


def checks(config: Config, world: int) -> list[str]:
    """A sentence for every way in which the configuration cannot run on `world` ranks."""
    parts = (_sizes, _model, _layout, _batches, _schedule, _precision, _data, _order, _files, _groups, _bytes, _homes,
             _unused)
    found = [sentence for part in parts for wrong, sentence in part(config, world) if wrong]
    return list(dict.fromkeys(found))


def remarks(config: Config) -> list[str]:
    """What of a configuration has no effect, and is no mistake: Megatron-LM takes it without a word."""
    return [sentence for given, sentence in _idle(config) if given]


Check = tuple[object, str]          # (is it wrong?, what to say then)


def _sizes(c: Config, world: int) -> Iterator[Check]:
    m, t, o, k = c.model, c.training, c.optimizer, c.checkpoint
    for flag, size, what in (("--num-layers", m.num_layers, "transformer blocks"),
                             ("--hidden-size", m.hidden_size, "channels"),
                             ("--num-attention-heads", m.num_attention_heads, "heads"),
                             ("--seq-length", m.seq_length, "tokens")):
        yield size is None, f"{flag} is missing: give the number of {what}, or choose a --model preset."
    for flag, count in {
        "--num-layers": m.num_layers, "--hidden-size": m.hidden_size,
        "--ffn-hidden-size": m.ffn_hidden_size, "--num-attention-heads": m.num_attention_heads,
        "--num-query-groups": m.num_query_groups,
        "--attention-window": m.attention_window, "--kv-channels": m.kv_channels,
        "--seq-length": m.seq_length, "--max-position-embeddings": m.max_position_embeddings,
        "--make-vocab-size-divisible-by": m.make_vocab_size_divisible_by, "--vocab-size": c.data.vocab_size,
        "--micro-batch-size": t.micro_batch_size, "--global-batch-size": t.global_batch_size,
        "--train-samples": t.train_samples, "--eval-interval": t.eval_interval, "--exit-interval": t.exit_interval,
        "--max-skipped-steps": t.max_skipped_steps,
        "--lr-decay-iters": o.lr_decay_iters, "--lr-decay-samples": o.lr_decay_samples,
        "--lr-wsd-decay-iters": o.lr_wsd_decay_iters, "--lr-wsd-decay-samples": o.lr_wsd_decay_samples,
        "--ademamix-beta3-warmup": o.ademamix_beta3_warmup, "--ademamix-alpha-warmup": o.ademamix_alpha_warmup,
        "--save-interval": k.save_interval,
        "--keep-last": k.keep_last, "--log-interval": c.logging.log_interval,
        "--distributed-timeout-minutes": c.parallel.distributed_timeout_minutes,
        "--loss-scale-window": c.precision.loss_scale_window, "--hysteresis": c.precision.hysteresis,
        "--initial-loss-scale": c.precision.initial_loss_scale, "--min-loss-scale": c.precision.min_loss_scale,
        "--loss-scale": c.precision.loss_scale, "--rotary-base": m.rotary_base,
        "--rope-scaling-factor": m.rope_scaling_factor, "--norm-epsilon": m.norm_epsilon, "--adam-eps": o.adam_eps,
        "--adafactor-clip": o.adafactor_clip, "--muon-num-ns-steps": o.muon_num_ns_steps,
        "--rope-low-freq-factor": m.rope_low_freq_factor, "--rope-original-length": m.rope_original_length,
        "--rope-local-base-freq": m.rope_local_base_freq, "--yarn-beta-slow": m.yarn_beta_slow,
        "--embedding-multiplier": m.embedding_multiplier, "--residual-multiplier": m.residual_multiplier,
        "--attention-multiplier": m.attention_multiplier, "--attn-logit-softcapping": m.attn_logit_softcapping,
        "--logits-scaling": m.logits_scaling, "--final-logit-softcapping": m.final_logit_softcapping,
    }.items():
        yield count is not None and not 0 < count < inf, f"{flag} {count}: must be greater than 0, and finite."
    minutes = t.exit_duration_in_mins
    yield minutes is not None and not minutes > 0, f"--exit-duration-in-mins {minutes}: must be greater than 0."
    for flag, amount in {"--train-iters": t.train_iters, "--eval-iters": t.eval_iters, "--seed": t.seed, "--lr": o.lr,
                         "--min-lr": o.min_lr, "--decoupled-lr": o.decoupled_lr,
                         "--decoupled-min-lr": o.decoupled_min_lr, "--lr-warmup-iters": o.lr_warmup_iters,
                         "--lr-warmup-samples": o.lr_warmup_samples, "--lr-warmup-init": o.lr_warmup_init,
                         "--weight-decay": o.weight_decay, "--clip-grad": o.clip_grad,
                         "--ademamix-alpha": o.ademamix_alpha, "--lr-embedding": o.lr_embedding,
                         "--lr-head": o.lr_head, "--lr-vectors": o.lr_vectors, "--adafactor-eps": o.adafactor_eps,
                         "--muon-extra-scale-factor": o.muon_extra_scale_factor,
                         "--init-method-std": m.init_method_std, "--position-offset": m.position_offset,
                         "--yarn-attention-factor": m.yarn_attention_factor, "--yarn-mscale": m.yarn_mscale,
                         "--yarn-mscale-all-dim": m.yarn_mscale_all_dim}.items():
        finite = flag == "--clip-grad" or amount != inf      # without a bound: never clipped
        yield amount is not None and not (amount >= 0 and finite), f"{flag} {amount}: must be 0 or greater, and finite."
    for flag, part in {"--attention-dropout": m.attention_dropout, "--hidden-dropout": m.hidden_dropout,
                       "--adam-beta1": o.adam_beta1, "--adam-beta2": o.adam_beta2,
                       "--sgd-momentum": o.sgd_momentum, "--lion-beta1": o.lion_beta1, "--lion-beta2": o.lion_beta2,
                       "--ademamix-beta3": o.ademamix_beta3, "--muon-momentum": o.muon_momentum}.items():
        yield not 0 <= part < 1, f"{flag} {part:g}: must be at least 0 and less than 1."
    yield (not -inf < o.adafactor_decay < 0,
           f"--adafactor-decay {o.adafactor_decay:g}: must be below 0, and finite; write -0.8.")
    yield not 0 < m.rotary_percent <= 1, f"--rotary-percent {m.rotary_percent:g}: must be above 0 and at most 1."
    yield o.ema is not None and not 0 <= o.ema < 1, f"--ema {o.ema}: must be at least 0 and less than 1."
    fraction = o.lr_warmup_fraction
    yield fraction is not None and not 0 <= fraction <= 1, f"--lr-warmup-fraction {fraction}: must be between 0 and 1."


def _model(c: Config, world: int) -> Iterator[Check]:
    m = c.model
    hidden, heads, groups = m.hidden_size or 0, m.num_attention_heads or 0, m.num_query_groups or 0
    if hidden > 0 and heads > 0:
        low = hidden // heads * heads
        yield (not m.kv_channels and hidden % heads,
               f"--hidden-size {hidden}: cannot be shared by --num-attention-heads {heads}; write {low or heads} or "
               f"{low + heads}, or give --kv-channels.")
        near = [g for g in range(1, heads + 1) if heads % g == 0]
        yield (groups > 0 and heads % groups,
               f"--num-query-groups {groups}: must divide --num-attention-heads {heads}; "
               f"write one of {', '.join(map(str, near))}.")
        head_dim = m.kv_channels or hidden // heads
        yield (m.position_embedding_type == "rope" and head_dim % 2,
               f"--position-embedding-type rope: needs an even head width, not {head_dim}; give an even --kv-channels.")
        yield (m.position_embedding_type == "rope" and 0 < m.rotary_percent <= 1
               and round(head_dim * m.rotary_percent) < 2,
               f"--rotary-percent {m.rotary_percent:g}: leaves no channel of a head of {head_dim} to rotate; "
               f"write at least {2 / max(head_dim, 2):g}.")
    yield (hidden > 0 and ffn_size(m) == 0,
           f"--ffn-hidden-size is missing: {'--geglu' if m.geglu else '--swiglu'} makes it 8/3 of --hidden-size "
           f"{hidden} in whole 64s, which is none; give it.")
    longest = m.max_position_embeddings
    yield (longest and m.seq_length and longest < m.seq_length and m.position_embedding_type == "learned_absolute",
           f"--max-position-embeddings {longest}: is less than --seq-length {m.seq_length}; "
           f"write at least {m.seq_length}.")
    others = [f"--{name.replace('_', '-')}" for name in ("swiglu", "geglu", "squared_relu", "relu")
              if getattr(m, name)]
    yield len(others) > 1, f"{others[-1]}: cannot be combined with {others[0]}; choose one." if others else ""
    yield (m.openai_gelu and others and others != ["--geglu"],
           f"--openai-gelu: cannot be combined with {' or '.join(others)}; choose one.")
    yield (m.qk_layernorm and m.qk_layernorm_over == "width" and m.normalization != "RMSNorm",
           f"--qk-layernorm-over width: needs --normalization RMSNorm, not {m.normalization}.")
    for most, least, higher, lower in (("--rope-high-freq-factor", "--rope-low-freq-factor", m.rope_high_freq_factor,
                                        m.rope_low_freq_factor),
                                       ("--yarn-beta-fast", "--yarn-beta-slow", m.yarn_beta_fast, m.yarn_beta_slow)):
        yield higher <= lower, f"{most} {higher:g}: must be greater than {least} {lower:g}."
    rotary = architecture(c, 0).rotary
    yield (rotary and rotary.base > 0 and rotary.scaling and stretches(rotary.scaling)
           and not turns(rotary, m.seq_length or 1),
           f"--rotary-base {m.rotary_base:g}: cannot be stretched by --rope-scaling-type {m.rope_scaling_type}; "
           "write a larger one.")
    for flag, text in (("--window-attn-skip-freq", m.window_attn_skip_freq), ("--no-rope-freq", m.no_rope_freq)):
        yield (text and m.num_layers and pattern(text, m.num_layers, last=True) is None,
               f"{flag} {text}: must be a number N, for the last of each N layers, or a list of {m.num_layers} times 0 "
               f"or 1, such as [1]*{(m.num_layers or 1) - 1}+[0].")


def _layout(c: Config, world: int) -> Iterator[Check]:
    p = c.parallel
    tp, pp, dp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.data_parallel_size
    for flag, size in (("--tp", tp), ("--pp", pp), ("--dp", dp)):
        yield size is not None and size < 1, f"{flag} {size}: must be at least 1."
    yield not 0 <= p.zero_stage <= 3, f"--zero-stage {p.zero_stage}: must be 0, 1, 2 or 3."
    if tp < 1 or pp < 1:
        return
    need = max(tp * pp * (dp or 1), 1)
    devices = [d.words.lower().replace(" ", "-") for d in DEVICES]
    yield (p.device not in ("auto", "cpu", "cuda") and not (c.check and named(p.device)),
           f"--device {p.device}: must be auto, cpu or cuda" + (", or with --check one of "
           f"{', '.join(devices)}." if not named(p.device) else "; others are planned for with --check."))
    yield (c.world_size is not None and (not c.check or c.world_size < 1),
           f"--world-size {c.world_size}: must be at least 1, and needs --check; torchrun says how many ranks run.")
    yield (world % (tp * pp) if dp is None else world != need,
           f"--tp {tp} x --pp {pp}" + (f" x --dp {dp}" if dp else "")
           + f": {need} ranks are needed{'' if dp else ', or a multiple'}, but {world} run{'s' if world == 1 else ''}; "
           f"start with torchrun --nproc_per_node {need}, or change the sizes.")
    yield from _stages(c)
    yield from _divided(c, tp)
    dp, k = sizes(c, world).dp, p.zero_shard_size
    yield (k is not None and p.zero_stage and world >= tp * pp and (k < 1 or dp % k),
           f"--zero-shard-size {k}: must divide the data-parallel size {dp}; write one of "
           f"{', '.join(str(n) for n in range(1, dp + 1) if dp % n == 0)}.")
    for flag, count in (("--reduce-every", p.reduce_every), ("--keep-weights", p.keep_weights)):
        yield count < 1, f"{flag} {count}: must be at least 1."
    yield p.bucket_size < 0, f"--bucket-size {p.bucket_size}: must be 0 or more."


def _divided(c: Config, tp: int) -> Iterator[Check]:
    """What tensor-parallel ranks share: the cuts of a block's weights, by name. Key-value heads may be copied, where
    they are fewer than the ranks; where nobody gives their number, the heads stand for them."""
    flags = {"heads": "--num-attention-heads", "ffn": "--ffn-hidden-size", "kv_heads": "--num-query-groups"}
    of_block = block(replace(architecture(c, 0), layers=1), 0).parameters
    cuts = {cut.name: cut.parts for p in of_block for cut in p.cuts}
    for name, flag in flags.items():
        size = cuts[name]
        works = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
        if name != "kv_heads":
            yield size > 0 and size % tp, f"--tp {tp}: does not divide {flag} {size}; write one of {', '.join(works)}."
        elif c.model.num_query_groups:
            yield (size > 0 and size % tp and tp % size,
                   f"--tp {tp}: neither divides {flag} {size} nor is a multiple of it; change one of them.")


def _stages(c: Config) -> Iterator[Check]:
    p, layers = c.parallel, c.model.num_layers or 0
    pp, virtual, looped = (p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank,
                           SCHEDULES[p.pipeline_schedule].looped)
    yield virtual < 1, f"--num-virtual-stages-per-pipeline-rank {virtual}: must be at least 1."
    yield (virtual > 1 and not looped,
           f"--num-virtual-stages-per-pipeline-rank {virtual}: needs --pipeline-schedule interleaved or breadth-first, "
           f"not {p.pipeline_schedule}.")
    stages, text = pp * virtual, p.pipeline_layout
    ends = {"--decoder-first-pipeline-num-layers": p.decoder_first_pipeline_num_layers,
            "--decoder-last-pipeline-num-layers": p.decoder_last_pipeline_num_layers}
    given = {flag: n for flag, n in ends.items() if n is not None}
    if virtual < 1 or layers < 1:
        return
    for flag, n in given.items():
        yield text, f"{flag} {n}: cannot be combined with --pipeline-layout; keep one."
        yield n < 0 or stages == 1, f"{flag} {n}: must be 0 or more, and needs several stages (--pp)."
    embedding, loss = p.account_for_embedding_in_pipeline_split, p.account_for_loss_in_pipeline_split
    counted = [f"--account-for-{what}-in-pipeline-split"
               for what, on in (("embedding", embedding), ("loss", loss)) if on]
    other = "--pipeline-layout" if text else next(iter(given), "")
    for flag in counted:
        yield other, f"{flag}: cannot be combined with {other}; keep one."
    rule = ["--pipeline-layout"] * bool(text) + counted
    yield p.pipeline_split == "even" and rule, f"--pipeline-split even: has no effect with {''.join(rule[:1])}."
    if text:
        yield from _layout_text(text, stages, layers)
    elif counted:
        try:
            ends_as_layers(layers, stages, embedding, loss)
        except ValueError as error:
            yield True, f"{' and '.join(counted)}: {error}; leave it out, or change --num-layers or --pp."
    else:
        rest, free = layers - sum(given.values()), stages - len(given)
        yield (rest < free or (free == 0 and rest),
               f"--num-layers {layers}: {rest} layers are left for {free} stages of --pp {pp}"
               + (f" x {virtual} virtual stages" if virtual > 1 else "")
               + (f" after {' and '.join(given)}" if given else "")
               + "; each needs at least one and none may be left over.")


def _layout_text(text: str, stages: int, layers: int) -> Iterator[Check]:
    try:
        counts = from_layout(text)
    except ValueError as error:
        yield True, f"--pipeline-layout {text}: {error}; write something like Et*3|t*4|t*3L."
        return
    yield (len(counts) != stages,
           f"--pipeline-layout {text}: has {len(counts)} stages, --pp and virtual stages make {stages}.")
    yield sum(counts) != layers, f"--pipeline-layout {text}: has {sum(counts)} layers, --num-layers is {layers}."


def _batches(c: Config, world: int) -> Iterator[Check]:
    t, s = c.training, sizes(c, world)
    yield (t.train_iters is None) == (t.train_samples is None), (
        "--train-iters is missing: give the length of the run in steps, or --train-samples." if t.train_iters is None
        else f"--train-samples {t.train_samples}: cannot be combined with --train-iters {t.train_iters}; keep one.")
    batch, slice_ = t.global_batch_size, t.micro_batch_size * s.dp
    growing = next((flag for flag, given in (("--rampup-batch-size", t.rampup_batch_size),
                                             ("--step-batch-size-schedule", t.step_batch_size_schedule)) if given), "")
    yield t.rampup_batch_size and t.step_batch_size_schedule, f"{growing}: cannot be combined with the other; keep one."
    yield growing and c.parallel.pipeline_program, f"{growing}: cannot be combined with --pipeline-program; keep one."
    yield t.rampup_batch_size and not batch, f"{growing}: needs --global-batch-size, what it grows to."
    try:
        ramp_of(c, s.global_batch)
    except ValueError as error:
        yield True, f"{growing} {' '.join(map(str, t.rampup_batch_size or t.step_batch_size_schedule))}: {error}."
    wrong = [size for _, size in (*s.ramp, (0, s.global_batch)) if slice_ > 0 and size % slice_]
    yield (growing and wrong, f"{growing}: has a batch of {wrong[0] if wrong else ''}, which is no multiple of "
           f"--micro-batch-size {t.micro_batch_size} x data-parallel {s.dp}; write multiples of {slice_}.")
    if batch and slice_ > 0 and not growing:
        low = batch // slice_ * slice_
        yield (batch % slice_,
               f"--global-batch-size {batch}: must be a multiple of --micro-batch-size {t.micro_batch_size} x "
               f"data-parallel {s.dp}; write {f'{low} or ' if low else ''}{low + slice_}.")
    for flag, count in (("--train-samples", t.train_samples), ("--lr-decay-samples", c.optimizer.lr_decay_samples)):
        yield (count is not None and 0 < count < s.global_batch,
               f"{flag} {count}: is less than one global batch ({s.global_batch}); "
               f"write at least {s.global_batch}.")


def _schedule(c: Config, world: int) -> Iterator[Check]:
    o, s = c.optimizer, sizes(c, world)
    yield o.lr is None, "--lr is missing: give the highest learning rate, such as 3e-4."
    yield o.lr is not None and o.min_lr > o.lr, f"--min-lr {o.min_lr:g}: is above --lr {o.lr}; write at most {o.lr}."
    top, least = o.decoupled_lr, o.min_lr if o.decoupled_min_lr is None else o.decoupled_min_lr
    yield (top is not None and not least <= top,
           f"--decoupled-lr {top}: is below its lowest, {least:g}; write --decoupled-min-lr, at most that.")
    yield (o.lr is not None and o.lr_warmup_init > o.lr,
           f"--lr-warmup-init {o.lr_warmup_init:g}: is above --lr {o.lr}; write at most {o.lr}.")
    yield (o.lr_decay_iters is not None and o.lr_decay_samples is not None,
           f"--lr-decay-samples {o.lr_decay_samples}: cannot be combined with --lr-decay-iters {o.lr_decay_iters}; "
           "keep one.")
    said = {"--lr-warmup-iters": o.lr_warmup_iters, "--lr-warmup-samples": o.lr_warmup_samples,
            "--lr-warmup-fraction": o.lr_warmup_fraction}
    given = [f"{flag} {value}" for flag, value in said.items() if value]        # Megatron's defaults are 0
    yield len(given) > 1, f"{', '.join(given[1:])}: cannot be combined with {given[0] if given else ''}; keep one."
    length = s.decay_iters
    for flag, count, size in (("--lr-warmup-iters", o.lr_warmup_iters, 1),
                              ("--lr-warmup-samples", o.lr_warmup_samples, s.global_batch)):
        yield (length and count and count > length * size and o.lr_decay_style != "constant",
               f"{flag} {count}: is longer than the whole curve of {length} steps; write less than {length * size}.")
    wsd = o.lr_decay_style == "WSD"
    both = (("--lr-wsd-decay-iters", o.lr_wsd_decay_iters), ("--lr-wsd-decay-samples", o.lr_wsd_decay_samples))
    finals = [(flag, count) for flag, count in both if count is not None]
    yield (wsd and not finals,
           "--lr-wsd-decay-iters is missing: --lr-decay-style WSD needs the length of its final part.")
    yield (len(finals) > 1, f"--lr-wsd-decay-samples {o.lr_wsd_decay_samples}: cannot be combined with "
           f"--lr-wsd-decay-iters {o.lr_wsd_decay_iters}; keep one.")
    for flag, count in finals[:wsd]:
        size = s.global_batch if "samples" in flag else 1
        yield (length and count > length * size,
               f"{flag} {count}: is longer than the whole curve of {length} steps; write at most {length * size}.")


def _groups(c: Config, world: int) -> Iterator[Check]:
    """Weights that are named, or have a rate of their own, and are none of the model's."""
    o = c.optimizer
    if not (o.no_weight_decay_on or len(rates_of(o)) > 1):
        return
    weights = {p.name: p.group for u in units(architecture(c, 1)) for p in u.parameters}
    for flag in rates_of(o)[1:]:
        yield (not any(RATES[flag](name, group) for name, group in weights.items()),
               f"--{flag.replace('_', '-')} {getattr(o, flag)}: this model has no such weights"
               f"{' (its output is its embedding)' if flag == 'lr_head' else ''}; leave it out.")
    for name in o.no_weight_decay_on or ():
        yield (not any(fnmatchcase(weight, name) for weight in weights),
               f"--no-weight-decay-on {name}: is no weight of this model"
               f"{nearest(name, weights) or '; write names such as embedding.weight or *.mlp.*'}.")


Row = tuple[object, str, object, Sequence[str]]           # (do they apply?, with what, the group, its fields)


def _unused(c: Config, world: int) -> Iterator[Check]:
    """Values of this program's own words that nothing would read."""
    p, d = c.parallel, c.data
    rows: list[Row] = [
        (d.fim_rate > 0, "--fim-rate", d, ("fim_spm_rate", "fim_prefix_token", "fim_middle_token", "fim_suffix_token")),
        (p.zero_stage >= 1, "--zero-stage 1, 2 or 3", p, ("zero_shard_size",)),
        (p.zero_stage >= 2, "--zero-stage 2 or 3", p, ("reduce_every",)),
        (p.zero_stage == 3, "--zero-stage 3", p, ("keep_weights",)),
        (d.tokenizer_type is not None, "--tokenizer-type", d, ("eod_token", "special_tokens")),
        (c.offload.offload_optimizer != "none", "--offload-optimizer", c.offload, ("offload_fraction",)),
        (any(getattr(c.offload, name) == "disk" for name in OFFLOADED), "--offload-optimizer disk", c.offload,
         ("offload_dir", "offload_buffer_size", "offload_queue_depth", "offload_block_size")),
    ]
    return _without(rows)


def _idle(c: Config) -> Iterator[Check]:
    """The same of Megatron's."""
    m, o, p, d, k = c.model, c.optimizer, c.precision, c.data, c.checkpoint
    rows: list[Row] = [
        (m.position_embedding_type == "learned_absolute", "--position-embedding-type learned_absolute", m,
         ("max_position_embeddings", "position_offset")),
        (m.qk_layernorm, "--qk-layernorm", m, ("qk_layernorm_over",)),
        (m.position_embedding_type == "rope", "--position-embedding-type rope", m,
         ("rotary_base", "rotary_percent", "use_rope_scaling", "rope_local_base_freq", "no_rope_freq")),
        (m.use_rope_scaling, "--use-rope-scaling", m, ("rope_scaling_type", "rope_scaling_factor")),
        *((m.use_rope_scaling and m.rope_scaling_type in types.split(),
           f"--use-rope-scaling --rope-scaling-type {' or '.join(types.split())}", m, flags.split())
          for types, flags in (("llama3", "rope_low_freq_factor rope_high_freq_factor"),
                               ("llama3 dynamic yarn", "rope_original_length"),
                               ("yarn", "yarn_beta_fast yarn_beta_slow yarn_attention_factor yarn_mscale "
                                        "yarn_mscale_all_dim yarn_untruncated"))),
        (m.attention_window or m.rope_local_base_freq, "--attention-window", m, ("window_attn_skip_freq",)),
        (m.disable_bias_linear, "--disable-bias-linear", m,
         ("add_qkv_bias", "add_o_bias", "add_mlp_bias", "add_norm_bias")),
        (m.normalization == "LayerNorm", "--normalization LayerNorm", m, ("add_norm_bias",)),
        (o.optimizer in ("adam", "lamb", "ademamix", "muon"), "--optimizer adam, lamb, ademamix or muon", o,
         ("adam_beta1", "adam_beta2", "adam_eps")),
        (o.optimizer != "lion", "a rule that keeps squares", o, ("exp_avg_sq_dtype",)),
        (o.optimizer in ("adam", "muon"), "--optimizer adam or muon", o, ("decoupled_weight_decay",)),
        *((o.optimizer == rule, f"--optimizer {rule}", o, names) for rule, names in {
            "sgd": ("sgd_momentum",), "lion": ("lion_beta1", "lion_beta2"),
            "adafactor": ("adafactor_decay", "adafactor_clip", "adafactor_eps"),
            "muon": ("muon_momentum", "muon_nesterov", "muon_num_ns_steps", "muon_coefficient_type", "muon_scale_mode",
                     "muon_extra_scale_factor", "muon_ns_dtype"),
            "ademamix": ("ademamix_beta3", "ademamix_alpha", "ademamix_beta3_warmup", "ademamix_alpha_warmup"),
        }.items()),
        (o.decoupled_lr is not None, "--decoupled-lr", o, ("decoupled_min_lr",)),
        (o.lr_decay_style == "WSD", "--lr-decay-style WSD", o,
         ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")),
        (c.dtype == "fp16", "--fp16", p, ("loss_scale",)),
        (c.dtype == "fp16" and p.loss_scale is None, "--fp16 and a dynamic loss scale", p,
         ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")),
        (c.parallel.zero_stage >= 1, "--zero-stage 1, 2 or 3", c.parallel, ("overlap_param_gather",)),
        (not d.mock_data, "data of its own, for --mock-data is given", d,
         ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path", "data_schedule",
          "sample_order")),
        (not c.training.step_batch_size_schedule, "a batch of its own, for --step-batch-size-schedule says it",
         c.training, ("global_batch_size",)),
        ((d.data_path or d.data_args_path) and not d.mock_data, "--data-path", d, ("split",)),
        (d.tokenizer_type is not None, "--tokenizer-type", d, ("tokenizer_model", "vocab_file", "merge_file")),
        (k.save is not None, "--save", k, ("save_interval", "keep_last", "async_save", "save_optim")),
        (k.load is not None, "--load", k, ("ckpt_step", "finetune", "load_optim", "exit_on_missing_checkpoint")),
    ]
    return _without(rows)


def _without(rows: Sequence[Row]) -> Iterator[Check]:
    """What nothing would read: a value equal to the default is not told from one that was not given."""
    for applies, with_, group, names in rows:
        plain = type(group)()
        for name in names:
            value = getattr(group, name)
            said = "" if isinstance(value, bool) else f" {' '.join(value) if isinstance(value, tuple) else value}"
            yield (not applies and value != getattr(plain, name),
                   f"--{'no-' * (value is False)}{name.replace('_', '-')}{said}: has no effect without {with_}.")


def _bytes(c: Config, world: int) -> Iterator[Check]:
    """Of weights and moments."""
    o, able = c.optimizer, ("adam", "lion", "lamb", "ademamix")
    for flag, dtype in (("--exp-avg-dtype", o.exp_avg_dtype), ("--exp-avg-sq-dtype", o.exp_avg_sq_dtype),
                        ("--main-params-dtype", o.main_params_dtype)):
        yield (dtype != "fp32" and o.optimizer not in able,
               f"{flag} {dtype}: is of --optimizer {', '.join(able[:-1])} and {able[-1]}, not of {o.optimizer}; "
               "write fp32.")
    yield (o.main_params_dtype != "fp32" and c.dtype != "bf16",
           f"--main-params-dtype {o.main_params_dtype}: needs --bf16, whose weights it leaves without masters; this "
           f"run is {c.dtype}.")


def _homes(c: Config, world: int) -> Iterator[Check]:
    """Where state is."""
    o, level = c.offload, c.parallel.zero_stage
    on_disk = [f"--{name.replace('_', '-')} disk" for name in OFFLOADED if getattr(o, name) == "disk"]
    disk = on_disk[0] if on_disk else ""
    yield (o.offload_gradients != "none" and level < 2,
           f"--offload-gradients {o.offload_gradients}: is of slices, which --zero-stage 2 and 3 have; write one.")
    yield (o.offload_weights != "none" and level < 3,
           f"--offload-weights {o.offload_weights}: is of slices, which --zero-stage 3 has; write that.")
    yield (not 0 <= o.offload_fraction <= 1,
           f"--offload-fraction {o.offload_fraction:g}: must be between 0 and 1.")
    yield o.offload_buffer_size < PAGE, f"--offload-buffer-size {o.offload_buffer_size}: must be at least {PAGE} bytes."
    yield o.offload_queue_depth < 1, f"--offload-queue-depth {o.offload_queue_depth}: must be at least 1."
    yield (o.offload_block_size < PAGE or o.offload_block_size % PAGE,
           f"--offload-block-size {o.offload_block_size}: must be a multiple of {PAGE} bytes, as disks have them.")
    yield (disk and o.offload_dir is None,
           f"{disk}: needs --offload-dir, a folder on a disk of this machine.")
    yield (disk and c.checkpoint.async_save,
           f"--async-save: cannot be combined with {disk}: it would copy to memory what is on disk for want of it; "
           "leave it out.")


def _precision(c: Config, world: int) -> Iterator[Check]:
    p = c.precision
    yield p.bf16 and p.fp16, "--fp16: cannot be combined with --bf16; choose one."
    for short in ("bf16", "fp16"):
        yield (getattr(p, short) and p.dtype not in ("fp32", short),
               f"--{short}: cannot be combined with --dtype {p.dtype}; keep one.")
    yield (p.min_loss_scale > p.initial_loss_scale,
           f"--min-loss-scale {p.min_loss_scale:g}: is above --initial-loss-scale {p.initial_loss_scale:g}; "
           "write at most that.")


def _data(c: Config, world: int) -> Iterator[Check]:
    d, t = c.data, c.training
    said = {"--data-path": d.data_path, "--data-args-path": d.data_args_path, "--train-data-path": d.train_data_path,
            "--data-schedule": d.data_schedule}
    sources = ["--mock-data"] if d.mock_data else [flag for flag, given in said.items() if given]
    apart = d.train_data_path or d.data_schedule
    yield not sources, "--data-path is missing: give the prefix of a preprocessed dataset, or --mock-data."
    yield len(sources) > 1, f"{' and '.join(sources)}: choose one."
    yield (d.valid_data_path and not apart,
           f"--valid-data-path {' '.join(d.valid_data_path)}: needs --train-data-path or --data-schedule; "
           "with --data-path the --split decides.")
    yield (apart and not d.valid_data_path and (t.eval_iters or t.full_validation),
           "--valid-data-path is missing: give the data to evaluate on, or --eval-iters 0.")
    yield (d.test_data_path and not t.eval_iters,
           f"--test-data-path {' '.join(d.test_data_path)}: is never read with --eval-iters 0.")
    sets = (*d.valid_data_path, *d.test_data_path)
    yield (d.multiple_validation_sets and not sets,
           "--multiple-validation-sets: has no effect without --valid-data-path or --test-data-path; name the sets.")
    weight = next((word for word in sets if re.fullmatch(r"\d+(\.\d*)?|\.\d+", word)), None)
    yield (d.multiple_validation_sets and weight,
           f"--multiple-validation-sets: each set has a loss of its own, so the weight {weight} has no effect; "
           "name the prefixes alone.")
    numbers = re.split(r"[,/\s]+", d.split.strip())
    good = all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", n) for n in numbers) and len(numbers) <= 3 and float(numbers[0]) > 0
    yield not good, f"--split {d.split!r}: must be one to three numbers, the first above 0, such as 969,30,1."
    yield (d.tokenizer_type is None and d.vocab_size is None,
           "--tokenizer-type is missing: name the tokenizer the data was made with, or give --vocab-size alone.")
    needs = {"GPT2BPETokenizer": ("vocab_file", "merge_file"), "NullTokenizer": ("vocab_size",), "ByteTokenizer": ()}
    for name in needs.get(d.tokenizer_type, ("tokenizer_model",)) if d.tokenizer_type else ():
        yield (getattr(d, name) is None,
               f"--{name.replace('_', '-')} is missing: --tokenizer-type {d.tokenizer_type} needs it.")


def _order(c: Config, world: int) -> Iterator[Check]:
    """How samples are made of the data."""
    d = c.data
    for flag, rate in (("--fim-rate", d.fim_rate), ("--fim-spm-rate", d.fim_spm_rate)):
        yield not 0 <= rate <= 1, f"{flag} {rate:g}: must be between 0 and 1."
    for flag, given in (("--eod-mask-loss", d.eod_mask_loss), ("--reset-position-ids", d.reset_position_ids),
                        ("--reset-attention-mask", d.reset_attention_mask), (f"--fim-rate {d.fim_rate:g}", d.fim_rate)):
        yield given and d.tokenizer_type is None, f"{flag}: needs --tokenizer-type, to know the end-of-document token."
    yield (d.fim_rate and d.mock_data,
           f"--fim-rate {d.fim_rate:g}: needs text, which --mock-data has none of; leave one of them out.")
    yield (d.reset_position_ids and c.model.position_embedding_type == "none",
           "--reset-position-ids: has no effect with --position-embedding-type none; leave it out.")
    megatron = d.sample_order == "megatron"
    yield (megatron and not d.shuffle,
           "--no-shuffle: cannot be combined with --sample-order megatron, which shuffles; choose one.")
    yield (megatron and d.data_schedule,
           f"--data-schedule {d.data_schedule}: cannot be combined with --sample-order megatron, whose samples depend "
           "on the whole run; choose one.")


def _files(c: Config, world: int) -> Iterator[Check]:
    k, t = c.checkpoint, c.training
    yield (k.use_checkpoint_args and k.load is None and k.pretrained_checkpoint is None,
           "--use-checkpoint-args: needs --load, the folder of the checkpoint.")
    yield (t.skip_train and (k.load is None or t.eval_iters == 0),
           "--skip-train: there is nothing to evaluate; give the weights with --load, and leave out --eval-iters 0.")
    yield (t.full_validation and t.eval_iters == 0,
           "--full-validation: cannot be combined with --eval-iters 0, which turns evaluation off.")
