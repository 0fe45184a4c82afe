"""What a plan costs one rank: bytes of memory, bytes on the wire, and the plan as printed at the start. Pure.

Both follow from the program that the rank will run, so that they are what happens and not what somebody expects of it.
"""

from collections import Counter
from collections.abc import Mapping
from math import ceil

from megazero.base import DTYPES, gib
from megazero.pipeline import Costs, bubble_time
from megazero.plan.architecture import Architecture, flops_per_token, parameter_count
from megazero.plan.layout import Flat, Shape, cuts, flat, ragged_rows
from megazero.plan.mesh import all_reduce_bytes
from megazero.plan.plan import Plan
from megazero.plan.program import Action

LOGITS = 1 << 24                    # elements of logits that exist at a time in head and loss


def flats(p: Plan, rank: int) -> dict[str, Flat]:
    """How the units of a rank are laid out, by name."""
    return {u.name: flat(u, p.mesh.place(rank)) for u in p.units_of(rank)}


def stored(f: Flat, p: Plan) -> int:
    """Elements of a unit's whole buffer: cut evenly among the data-parallel ranks, padding included."""
    return cuts(f.size, p.dp)[-1]


def memory(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes on one rank by category; exact but for activations and logits, which are estimated."""
    c, level = p.config, p.zero.level
    units = flats(p, rank)
    whole = sum(stored(f, p) for f in units.values())
    part, width = whole // p.shard, DTYPES[c.dtype].width
    full = max(width, 4)                                        # masters, gradients and moments
    return {
        "weights": (part if level == 3 else whole) * width,
        "master weights": part * 4 if width == 2 else 0,
        "gradients": (part if level >= 2 else whole) * full,
        "optimizer": part * full * (2 if c.optimizer.optimizer == "adam" else 1),
        "gathered weights": borrowed(p.training(rank), units, p, "gather", "release") * width if level == 3 else 0,
        "gradient sums": borrowed(p.training(rank), units, p, "open", "land") * full if level >= 2 else 0,
        **working(p, rank, width, full),
    }


def borrowed(program: list[Action], units: Mapping[str, Flat], p: Plan, take: str, give: str) -> int:
    """Elements of the whole buffers that exist at most at a time, each kind for itself (unit.Buffers)."""
    now, most, size = Counter[tuple[tuple[int, Shape], ...]](), Counter[tuple[tuple[int, Shape], ...]](), {}
    for action in program:
        if action.kind in (take, give):
            f = units[action.unit]
            now[f.kind] += 1 if action.kind == take else -1
            most[f.kind], size[f.kind] = max(most[f.kind], now[f.kind]), stored(f, p)
    return sum(n * size[kind] for kind, n in most.items())


def working(p: Plan, rank: int, width: int, full: int) -> dict[str, int]:
    """Estimates of what a step needs besides."""
    a, t, own = p.architecture, p.config.training, p.stages_of(rank).own
    tokens = t.micro_batch_size * a.seq_length // p.tp
    blocks = {stage: sum(0 < i <= a.layers for i in parts) for stage, parts in own.items()}
    most, now = 0, 0
    for step in p.passes[p.mesh.place(rank).pp]:
        now += blocks[step.stage] * (1 if step.kind == "F" else -1)
        most = max(most, now)
    masks = a.seq_length * ((p.tp if p.config.data.reset_attention_mask else 0)
                            + (3 * a.heads if a.attention_dropout else 0))
    again = kept_per_token(a, "none") + masks if t.recompute_granularity == "full" else 0
    rows = ragged_rows(a.vocab_size, p.tp, a.pad_rows)
    chunk = min(tokens * p.tp, max(LOGITS // rows, 1)) * rows if len(p.stages) - 1 in own else 0
    kept = most * (kept_per_token(a, t.recompute_granularity) + (0 if again else masks)) + again
    return {"activations": tokens * kept * width, "logits": chunk * (2 * width + full if width == 2 else width)}


def kept_per_token(a: Architecture, recompute: str) -> int:
    """Elements per token that one block keeps for its backward pass. The three modes as lists of results kept."""
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    rotated = q + kv if a.rotary or a.qk_norm else 0
    selective = {"input": a.hidden, "q, k, v": q + 2 * kv, "rotated q, k": rotated, "attention": q, "middle": a.hidden,
                 "up": a.ffn * (2 if a.gated else 1)}
    none = selective | {"norms": 2 * a.hidden, "activation": a.ffn * (2 if a.gated else 1)}
    return sum({"none": none, "selective": selective, "full": {"input": a.hidden}}[recompute].values())


def traffic(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes that one rank sends in a training step, by axis; `comm` counts the same."""
    width = DTYPES[p.config.dtype].width
    wide, ranks, units = max(width, 4), p.mesh.place(rank).dp % p.shard, flats(p, rank)
    sent = Counter(dict.fromkeys(("tp", "kv", "shard", "replicate", "tied", "pp", "world"), 0))
    for action in p.training(rank):
        part = stored(units[action.unit], p) // p.shard if action.unit else 0
        sent["shard"] += (p.shard - 1) * part * {"gather": width, "reduce": wide}.get(action.kind, 0)
        sent["replicate"] += all_reduce_bytes(part, wide, p.dp // p.shard) if action.kind == "replicate" else 0
        sent["tied"] += all_reduce_bytes(part, wide, len(p.holders[action.unit])) if action.kind == "tie" else 0
        sent["pp"] += share(p) * width if action.kind == "send" else 0
        sent["tp"] += computation(action, p, width, wide)
    for axis, cut, size in (("tp", False, p.tp), ("kv", True, p.mesh.kv)):
        n = sum(_partial(f, stored(f, p) // p.shard, ranks, cut) for f in units.values())
        sent[axis] += all_reduce_bytes(n, wide, size)
    return {**sent, "world": all_reduce_bytes(4, 8, p.world)}


def _partial(f: Flat, part: int, rank: int, cut: bool) -> int:
    """Elements of a rank's slice whose gradients tensor-parallel ranks must add."""
    common = ((max(q.start, rank * part), min(q.stop, (rank + 1) * part))
              for q in f.pieces if q.shard.partial and q.shard.cut == cut)
    return sum(max(stop - start, 0) for start, stop in common)


def share(p: Plan) -> int:
    """Elements of one micro-batch's activations on one rank: its share of the tokens, padded to a multiple of tp."""
    return ceil(p.micro_batch * p.architecture.seq_length / p.tp) * p.architecture.hidden


def computation(action: Action, p: Plan, width: int, wide: int) -> int:
    """Bytes over tp of one computation.

    A block moves its tokens 4 times forward (gather and scatter for attention and MLP) and 6 times backward (the gather
    of a column operation is repeated), embedding and head twice each; the loss adds a maximum and two sums per token.
    """
    a, t = p.architecture, p.config.training
    move, tokens = (p.tp - 1) * share(p) * width, share(p) // a.hidden * p.tp
    again = 4 if t.recompute_granularity == "full" else 0
    if action.kind == "L":
        chunk = max(LOGITS // ragged_rows(a.vocab_size, p.tp, a.pad_rows), 1)
        chunks = [min(chunk, tokens - low) for low in range(0, tokens, chunk)]
        return 2 * move + sum(all_reduce_bytes(c, wide, p.tp) + all_reduce_bytes(2 * c, wide, p.tp) for c in chunks)
    blocks = {"F": 4, "B": 6 + again}
    return move * (1 if action.part == 0 else blocks[action.kind]) if action.kind in blocks else 0


def describe(p: Plan) -> str:
    """The plan as printed at the start."""
    a, c = p.architecture, p.config
    positions = "learned" if a.learned_positions else "rotary" if a.rotary else "no"
    sent, needs = traffic(p), {rank: memory(p, rank) for rank in range(0, p.world, p.world // p.pp)}
    fullest = max(needs, key=lambda rank: sum(needs[rank].values()))
    need, which = needs[fullest], f" on rank {fullest}, no more on others" if p.pp > 1 else " per rank"
    layers = [sum(0 < i <= a.layers for i in stage) for stage in p.stages]
    each = f"{layers[0]}" if len(set(layers)) == 1 else " ".join(map(str, layers))
    idle = bubble_time(p.pp, p.micro_batches, p.virtual, Costs(1, 2)) / (p.micro_batches * p.virtual * 3)
    shared = f"over {p.shard} ranks" + (f", repeated {p.dp // p.shard} times" if p.shard < p.dp else "")
    return "\n".join([
        f"model       {parameter_count(a):,} parameters: {a.layers} layers x {a.hidden}, {a.heads} heads x {a.head_dim}"
        + (f" over {a.kv_heads} kv heads" if a.kv_heads != a.heads else "") + f", ffn {a.ffn} {a.activation}, "
        f"{a.norm}, {positions} positions, vocabulary {a.vocab_size:,}, {'tied' if a.tied else 'untied'}",
        f"ranks       {p.world} = tp {p.tp} x pp {p.pp} x dp {p.dp}, ZeRO {c.parallel.zero_stage}"
        + (f" {shared}" if c.parallel.zero_stage else "") + f", schedule {c.parallel.pipeline_schedule}",
        *([f"stages      {len(p.stages)} of {each} layers, {p.virtual} per rank; "
           f"bubble {idle:.0%} of the computing time if all are alike"] if len(p.stages) > 1 else []),
        f"step        {p.global_batch} samples x {a.seq_length} = {p.tokens_per_step:,} tokens: "
        f"dp {p.dp} x {p.micro_batches} micro-batches of {p.micro_batch}; "
        f"{p.train_iters:,} steps, {p.train_iters * p.tokens_per_step:,} tokens",
        f"precision   {c.dtype}, recompute {c.training.recompute_granularity}",
        f"compute     {flops_per_token(a):.4g} FLOPs per token (6 N + 6 L h S: causal attention, "
        f"no recompute counted), {flops_per_token(a) * p.tokens_per_step * p.train_iters:.3g} in all",
        f"memory      {gib(sum(need.values()))}{which}: " + ", ".join(f"{k} {gib(v)}" for k, v in need.items() if v),
        *([f"groups      {'; '.join(p.mesh.describe())}"] if p.world > 1 else []),
        *([f"wire        {gib(sum(sent.values()))} sent per rank and step: "
           + ", ".join(f"{axis} {gib(n)}" for axis, n in sent.items() if n)] if p.world > 1 else []),
    ])
