"""What a plan costs one rank: bytes of memory and bytes on the wire. Pure.

Both follow from the program that the rank will run and from the rows of its operations, so that they are what happens
and not what somebody expects of it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from megazero.base import DTYPES
from megazero.pipeline import KINDS
from megazero.plan.action import Action
from megazero.plan.architecture import wide_tokens
from megazero.plan.dealing import Ranks, bytes_sent, deal
from megazero.plan.homes import GRADIENTS, MASTER, STATE, UNDER_WAY, WEIGHTS, rule_of, state_of, under_way
from megazero.plan.layout import Flat, Shape, cuts, flat, ragged_rows
from megazero.plan.mesh import all_reduce_bytes
from megazero.plan.operations import Micro, Operation, distinct, table
from megazero.plan.plan import Plan
from megazero.plan.rules import RULES, dtype_of, iterating, watched
from megazero.plan.tiles import blocks_here, blocks_of
from megazero.settings import Optimization

# What a pass over a part changes: what it keeps for backward, what lives between the two halves of a split backward,
# and, of the embedding, the activation or gradient that is under way to the next part (between others it only moves).
CHANGES = {name: {"kept": (n := (kind.leaves == "activations") - (kind.after == "F")), "edge": n,
                  "between": (kind.leaves == "operands") - (kind.after == "I")} for name, kind in KINDS.items()}
MESSAGES = {"expect": 1, "send": -1}            # room is made for one, one leaves
SENT = {"gather", "reduce", "replicate", "tie"}


def flats(p: Plan, rank: int) -> dict[str, Flat]:
    """How the units of a rank are laid out, by name."""
    return {u.name: flat(u, p.mesh.place(rank)) for u in p.units_of(rank)}


def stored(f: Flat, p: Plan) -> int:
    """Elements of a unit's whole buffer: cut evenly among the data-parallel ranks, padding included."""
    return cuts(f.size, p.dp)[-1]


def memory(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes on one rank by category, as they are between actions. Of what an operation needs while it runs only logits
    are counted: a chunk, and what of it exists in fp32 too."""
    level, a, m, units, program = p.zero.level, p.architecture, micro(p, rank), flats(p, rank), p.training(rank)
    homes = p.homes(rank)
    gone = Counter({what: sum(home.bytes for (_, kind), home in homes.items() if kind == what) for what in UNDER_WAY})
    masters = sum(home.kinds[MASTER].bytes for (_, what), home in homes.items()
                  if what == STATE and MASTER in home.kinds)
    whole, beside = sum(stored(f, p) for f in units.values()), sum(_kept(f, p, rank, m.wide) for f in units.values())
    part, width, full = whole // p.shard, m.width, m.wide       # full: masters, gradients and moments
    chunk = min(m.tokens, p.head_chunk) if len(p.stages) - 1 in p.stages_of(rank).own else 0
    rows = ragged_rows(a.vocab_size, p.tp, a.pad_rows)
    return {
        "weights": (part if level == 3 else whole) * width - gone[WEIGHTS],
        "master weights": (part * 4 - masters if width == 2 and p.config.optimizer.main_params_dtype == "fp32" else 0),
        "gradients": (part if level >= 2 else whole) * full - gone[GRADIENTS],
        "optimizer": beside - gone[STATE] + masters,
        **({"pieces under way": under_way(homes)} if homes else {}),
        "gathered weights": borrowed(program, units, p, "gather", "release") * width if level == 3 else 0,
        "gradient sums": borrowed(program, units, p, "open", "land") * full if level >= 2 else 0,
        "activations": peak(program, table(a, m), m.share * a.hidden * width),
        # with their slopes where they are capped
        "logits": rows * (chunk * width * (2 if a.logits_softcap else 1)
                          + (min(chunk, wide_tokens(rows)) * full if width == 2 else 0)),
    }


def _kept(f: Flat, p: Plan, rank: int, wide: int) -> int:
    """Bytes that the optimizer keeps beside a unit on one rank."""
    found = state_of(f, stored(f, p), p.mesh.place(rank), p.shard, wide, p.config.optimizer)
    blocks = sum(blocks_here(f, k.start, k.stop) for kind, k in found.items()
                 if dtype_of(kind, p.config.optimizer) == "8bit")
    return sum(k.bytes for k in found.values()) + blocks * wide


def on_disk(p: Plan, rank: int = 0) -> int:
    """Bytes that one rank keeps on disk, in whole pages."""
    return sum(home.file_bytes for home in p.homes(rank).values())


def disk_traffic(p: Plan, rank: int = 0) -> tuple[int, int]:
    """Bytes that one rank reads from its disk, and writes there, in a training step."""
    homes, units, read, written = p.homes(rank), flats(p, rank), 0, 0
    size = {key: home.file_bytes for key, home in homes.items()}
    for a in p.training(rank):
        for unit in a.units or (units if a.kind in ("judge", "finish") else ()):
            state, sums, weights = (size.get((unit, what), 0) for what in (STATE, GRADIENTS, WEIGHTS))
            if a.kind == "land":
                read, written = read + sums * (a.micro > 0), written + sums
            elif a.kind in ("replicate", "tie") or a.kind == "finish" and _finishes(p, rank, units[unit], a.way):
                many = 2 if a.kind == "finish" else 1
                read, written = read + sums * many, written + sums
            elif a.kind == "judge":
                read += sums
            elif a.kind == "gather":
                read += weights
            elif a.kind == "update":
                changed = sums * (p.config.dtype == "fp64")     # where they are clipped in place
                read, written = read + state + sums + weights, written + state + weights + changed
    return read, written


def _finishes(p: Plan, rank: int, f: Flat, way: str) -> bool:
    """Must tensor-parallel ranks add something of a unit's gradient?"""
    slice_ = p.mesh.place(rank).dp % p.shard
    several = (p.mesh.kv if way == "kv" else p.tp) > 1
    return several and _partial(f, stored(f, p) // p.shard, slice_, way == "kv") > 0


def borrowed(program: list[Action], units: Mapping[str, Flat], p: Plan, take: str, give: str) -> int:
    """Elements of the whole buffers that exist at most at a time, each kind for itself (unit.Buffers)."""
    now, most, size = Counter[tuple[tuple[int, Shape], ...]](), Counter[tuple[tuple[int, Shape], ...]](), {}
    for action in program:
        if action.kind in (take, give):
            f = units[action.unit]
            now[f.kind] += 1 if action.kind == take else -1
            most[f.kind], size[f.kind] = max(most[f.kind], now[f.kind]), stored(f, p)
    return sum(n * size[kind] for kind, n in most.items())


def micro(p: Plan, rank: int) -> Micro:
    """One micro-batch on one rank."""
    c = p.config
    return Micro(p.micro_batch, p.architecture.seq_length, p.mesh.place(rank).tp, p.tp, DTYPES[c.dtype].width,
                 c.training.recompute_granularity, c.data.reset_attention_mask, c.data.reset_position_ids)


def peak(program: Iterable[Action], parts: Sequence[Sequence[Operation]], edge: int) -> int:
    """The most bytes that a program's activations take at a time: what is kept for backward and between its halves,
    and what is under way, `edge` bytes for each micro-batch. Where a part is run again, its graph is counted."""
    sizes = {i: {"kept": distinct(rows, "kept"), "between": distinct(rows, "between"), "edge": 0 if i else edge,
                 "graph": distinct(rows, "kept", "again")} for i, rows in enumerate(parts)}
    now = most = 0
    for action in program:
        if action.kind in CHANGES:
            size, change = sizes[action.part], CHANGES[action.kind]
            most = max(most, now + (size["graph"] - size["kept"] if change["kept"] == -1 else 0))
            now += sum(sign * size[what] for what, sign in change.items())
        now += MESSAGES.get(action.kind, 0) * edge
        most = max(most, now)
    return most


def traffic(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes that one rank sends in a training step, by axis; `comm` counts the same."""
    a, m, units, slice_ = p.architecture, micro(p, rank), flats(p, rank), p.mesh.place(rank).dp % p.shard
    width, wide, parts = m.width, m.wide, table(a, m)
    sent = Counter(dict.fromkeys(("tp", "kv", "shard", "replicate", "tied", "pp", "stage", "world"), 0))
    for action in p.training(rank):
        part = stored(units[action.unit], p) // p.shard if action.kind in SENT else 0
        sent["shard"] += (p.shard - 1) * part * {"gather": width, "reduce": wide}.get(action.kind, 0)
        sent["replicate"] += all_reduce_bytes(part, wide, p.dp // p.shard) if action.kind == "replicate" else 0
        sent["tied"] += all_reduce_bytes(part, wide, len(p.holders[action.unit])) if action.kind == "tie" else 0
        sent["pp"] += m.share * a.hidden * width if action.kind == "send" else 0
        sent["tp"] += moved(action.kind, parts[action.part], p, m) if action.kind in KINDS else 0
    for axis, cut, size in (("tp", False, p.tp), ("kv", True, p.mesh.kv)):
        n = sum(_partial(f, stored(f, p) // p.shard, slice_, cut) for f in units.values())
        sent[axis] += all_reduce_bytes(n, wide, size)
    together = [{name: units[name] for name in a.units} for a in p.training(rank) if a.kind == "update"]
    for axis, size in (("shard", p.shard), ("tp", p.tp)):
        sent[axis] += sum(all_reduce_bytes(n, 8, size) for own in together for n in measures(p.config.optimizer, own))
    kinds = sum(dtype_of(kind, p.config.optimizer) == "8bit" for kind in RULES[p.config.optimizer.optimizer].moments)
    for f in units.values() if kinds else ():                           # the largest of each block
        blocks = sum(prod(blocks_of(piece.shard.parameter.shape)) for piece in f.pieces)
        for axis, size in (("shard", p.shard), ("tp", p.tp)):
            sent[axis] += all_reduce_bytes(kinds * blocks, wide, size)
    if p.mesh.stage:
        sent["stage"] = sum(_dealt(p, rank, own) for own in together)
    seen = all_reduce_bytes(2 + 2 * len(p.units), 8, p.world) if watched(p.config) else 0
    return {**sent, "world": all_reduce_bytes(4, 8, p.world) + seen}


def measures(o: Optimization, units: Mapping[str, Flat]) -> list[int]:
    """Numbers, float64, of each sum over the ranks of a tensor that a rule of statistics makes in an update."""
    pieces = [piece for f in units.values() for piece in f.pieces]
    if RULES[o.optimizer].scope != "statistics":
        return []
    if not RULES[o.optimizer].factors:
        return [2 * len(pieces)]                                # the norms of the tensor and of its direction
    shapes = [piece.shard.parameter.shape for piece in pieces]
    sums = sum(prod(s) // s[-1] + prod(s) // s[-2] for s in shapes if len(s) > 1)
    return [len(pieces) + sums, len(pieces)]                    # of its squares and their rows, columns; of its update


def _dealt(p: Plan, rank: int, units: Mapping[str, Flat]) -> int:
    o, place = p.config.optimizer, p.mesh.place(rank)
    ranks = Ranks(p.dp // p.shard, p.shard, p.tp)
    waves = deal([(f, stored(f, p)) for f in units.values()], ranks,
                 lambda piece: RULES[rule_of(piece, o)].scope == "matrix")
    number = (place.replicate * ranks.shard + place.shard) * ranks.tp + place.tp
    return bytes_sent(waves, ranks, number, DTYPES[iterating(o.muon_ns_dtype, p.config.dtype, p.device)].width)


def _partial(f: Flat, part: int, rank: int, cut: bool) -> int:
    """Elements of a rank's slice whose gradients tensor-parallel ranks must add."""
    common = ((max(q.start, rank * part), min(q.stop, (rank + 1) * part))
              for q in f.pieces if q.shard.partial and q.shard.cut == cut)
    return sum(max(stop - start, 0) for start, stop in common)


def moved(kind: str, rows: Sequence[Operation], p: Plan, m: Micro) -> int:
    """Bytes over tp of one pass over a part: its tokens as often as its operations move them, and what is added up of
    each token; by the loss, of one chunk of logits at a time."""
    times, chunk = sum(row.moves.get(kind, 0) for row in rows), p.head_chunk
    chunks = [min(chunk, m.tokens - low) for low in range(0, m.tokens, chunk)] if kind in ("L", "E") else [m.real]
    return times * (m.ranks - 1) * m.share * p.architecture.hidden * m.width + sum(
        all_reduce_bytes(n * c, m.wide, m.ranks) for c in chunks for row in rows for n in row.sums.get(kind, ()))
