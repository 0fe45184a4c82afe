"""A plan as printed at the start. Pure."""

from megazero.base import gib
from megazero.pipeline import SCHEDULES, Costs
from megazero.plan.architecture import Architecture, parameter_count
from megazero.plan.checks import remarks
from megazero.plan.cost import disk_traffic, memory, on_disk, traffic
from megazero.plan.families import FAMILIES, nearest_family
from megazero.plan.layout import ragged_rows
from megazero.plan.operations import flops_per_token
from megazero.plan.plan import Plan
from megazero.settings import Config, flatten, megatron_defaults

MLPS = {"gelu": "exact GELU", "gelu_tanh": "GELU by tanh", "relu": "ReLU", "relu2": "squared ReLU", "swiglu": "SwiGLU",
        "geglu": "exact GEGLU", "geglu_tanh": "GEGLU by tanh"}


def describe(p: Plan) -> str:
    """One line for each thing that a plan decides; those of several ranks or stages only where there are several."""
    c = p.config
    lines = {
        "model": _model(p.architecture),
        "also": _also(p.architecture),
        "export": _export(p.architecture),
        "ranks": _ranks(p),
        "stages": _stages(p) if len(p.stages) > 1 else "",
        "step": _step(p),
        "precision": f"{c.dtype}, recompute {c.training.recompute_granularity}",
        "compute": _compute(p),
        "memory": _memory(p),
        "disk": _disk(p),
        "groups": "; ".join(p.mesh.describe()) if p.world > 1 else "",
        "wire": _wire(p) if p.world > 1 else "",
        "dropout": f"{c.model.hidden_dropout:g} on embeddings and blocks, {c.model.attention_dropout:g} on attention",
        "no effect": " ".join(remarks(c)),
        "Megatron-LM": _unlike(p),
    }
    return "\n".join(f"{what:<12}{text}" for what, text in lines.items() if text)


def _model(a: Architecture) -> str:
    positions = next((word for word, said in (("learned", a.learned_positions), ("rotary", a.rotary)) if said), "no")
    groups = f" over {a.kv_heads} kv heads" if a.kv_heads != a.heads else ""
    positions += f" by {a.rotary.scaling.rope_type}" if a.rotary and a.rotary.scaling else ""
    positions += f" within {a.window}" if a.window else ""
    return (f"{parameter_count(a):,} parameters: {a.layers} layers x {a.hidden}, {a.heads} heads x {a.head_dim}"
            f"{groups}, ffn {a.ffn} {MLPS[a.activation]}, {a.norm}, {positions} positions, "
            f"vocabulary {a.vocab_size:,}, {'tied' if a.tied else 'untied'}")


def _also(a: Architecture) -> str:
    """What most models have not."""
    kinds = [f"{a.kinds.count(word)} {word.replace('-nope', ' without rotation')}" for word in dict.fromkeys(a.kinds)]
    told = (
        (kinds, f"layers: {', '.join(kinds)}"), (a.local_base, f"local layers on base {a.local_base:g}"),
        (a.post_norm, f"norms {'before and ' * a.pre_norm}after attention and MLP"),
        (a.norm_plus_one, "norms times 1 + weight"), (a.qk_norm != "none", f"norm of q and k over each {a.qk_norm}"),
        (a.parallel_residual, "parallel residual"), (a.position_offset, f"positions from row {a.position_offset}"),
        (a.embedding_multiplier != 1, f"embeddings x {a.embedding_multiplier:g}"),
        (a.residual_multiplier != 1, f"residuals x {a.residual_multiplier:g}"),
        (a.attention_multiplier, f"scores x {a.attention_multiplier:g}"),
        (a.logits_scaling != 1, f"logits / {a.logits_scaling:g}"),
        (a.logits_softcap, f"logits capped at {a.logits_softcap:g}"),
        (a.attention_softcap,
         f"scores capped at {a.attention_softcap:g}: attention is written out, for no kernel knows that"))
    return "; ".join(text for has, text in told if has)


def _export(a: Architecture) -> str:
    """Told before training: afterwards it is too late to choose otherwise."""
    family, reasons = nearest_family(a)
    if reasons:
        return f"to no Hugging Face family known here ({', '.join(FAMILIES)}): {'; '.join(reasons)}"
    return f"to Hugging Face as {family.model_type}"


def _ranks(p: Plan) -> str:
    parallel = p.config.parallel
    repeated = f", repeated {p.dp // p.shard} times" if p.shard < p.dp else ""
    shared = f" over {p.shard} ranks{repeated}" if parallel.zero_stage else ""
    return (f"{p.world} = tp {p.tp} x pp {p.pp} x dp {p.dp}, ZeRO {parallel.zero_stage}{shared}, "
            f"{f'program {parallel.pipeline_program}' if p.programs else f'schedule {parallel.pipeline_schedule}'}")


def _stages(p: Plan) -> str:
    layers = [sum(0 < i <= p.architecture.layers for i in stage) for stage in p.stages]
    each = f"{layers[0]}" if len(set(layers)) == 1 else " ".join(map(str, layers))
    by_cost = p.config.parallel.pipeline_split == "flops" and len(set(layers)) > 1
    told = f"{len(p.stages)} of {each} layers{' by cost' if by_cost else ''}, {p.virtual} per rank"
    if p.programs:
        return told
    row = SCHEDULES[p.config.parallel.pipeline_schedule]
    idle = row.bubble(p.pp, p.micro_batches, p.virtual, Costs(1, 2)) / (p.micro_batches * p.virtual * 3)
    return f"{told}; bubble {idle:.0%} of the computing time if all are alike"


def _step(p: Plan) -> str:
    grows = f"; smaller at first, from {p.ramp[0][1]} over {p.ramp[-1][0]:,} samples" if p.ramp else ""
    return (f"{p.global_batch} samples x {p.architecture.seq_length} = {p.tokens_per_step:,} tokens: "
            f"dp {p.dp} x {p.micro_batches} micro-batches of {p.micro_batch}{grows}; "
            f"{p.train_iters:,} steps, {p.samples_after(p.train_iters) * p.architecture.seq_length:,} tokens")


def _compute(p: Plan) -> str:
    each = flops_per_token(p.architecture)
    return (f"{each:.4g} FLOPs per token (6 N + 6 L h S: causal attention, no recompute counted), "
            f"{each * p.samples_after(p.train_iters) * p.architecture.seq_length:.3g} in all")


def _memory(p: Plan) -> str:
    """Of the fullest rank."""
    needs = {rank: memory(p, rank) for rank in range(0, p.world, p.world // p.pp)}
    fullest = max(needs, key=lambda rank: sum(needs[rank].values()))
    which = f" on rank {fullest}, no more on others" if p.pp > 1 else " per rank"
    return f"{gib(sum(needs[fullest].values()))}{which}: {_listed(needs[fullest])}"


def _disk(p: Plan) -> str:
    """Of the rank that keeps most there."""
    fullest = max(range(0, p.world, p.world // p.pp), key=lambda rank: on_disk(p, rank))
    if not (most := on_disk(p, fullest)):
        return ""
    read, written = disk_traffic(p, fullest)
    return (f"{gib(most)} per rank in {p.config.offload.offload_dir}; a step reads {gib(read)} and writes "
            f"{gib(written)}: {(read + written) / 1e9:.2g} s of a disk that moves 1 GB/s")


def _wire(p: Plan) -> str:
    sent = traffic(p)
    return f"{gib(sum(sent.values()))} sent per rank and step: {_listed(sent)}"


def _unlike(p: Plan) -> str:
    """Which of its defaults nobody said and are others here; and what else makes another curve."""
    now, plain = flatten(p.config), flatten(Config())
    others = {k: v for k, v in megatron_defaults(now).items() if now[k] == plain[k]}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v:g}" if isinstance(v, float) else f" {v}")
             for k, v in others.items()]
    padding = ragged_rows(p.architecture.vocab_size, p.tp, p.architecture.pad_rows) * p.tp - p.architecture.vocab_size
    told = [f"by default has {' '.join(flags)} (--megatron-defaults takes what is not said)"] if flags else []
    told += [f"would count {padding} ids of padding in the softmax"] if padding else []
    if p.config.data.eod_mask_loss:
        told.append("would average micro-batches, not tokens, without --calculate-per-token-loss")
    return "; ".join(told)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{what} {gib(size)}" for what, size in sizes.items() if size)
