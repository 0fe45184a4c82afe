"""What a plan costs one rank: bytes of memory and bytes on the wire. Pure.

Both follow from the program that the rank will run and from the rows of its operations, so that they are what happens
and not what somebody expects of it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from megazero.base import DTYPES
from megazero.plan.layout import Flat, Shape, cuts, flat, ragged_rows
from megazero.plan.mesh import all_reduce_bytes
from megazero.plan.operations import Micro, Operation, distinct, operations
from megazero.plan.plan import Plan
from megazero.plan.program import Action
from megazero.plan.rules import RULES

# What a pass over a part changes: what it keeps for backward, what lives between the two halves of a split backward,
# and, of the embedding, the activation or gradient that is under way to the next part (between others it only moves).
CHANGES = {"F": {"kept": 1, "edge": 1}, "B": {"kept": -1, "edge": -1},
           "I": {"kept": -1, "edge": -1, "between": 1}, "W": {"between": -1}}
COMPUTED = {*CHANGES, "L", "E"}
MESSAGES = {"expect": 1, "send": -1}            # room is made for one, one leaves
SENT = {"gather", "reduce", "replicate", "tie"}


def flats(p: Plan, rank: int) -> dict[str, Flat]:
    """How the units of a rank are laid out, by name."""
    return {u.name: flat(u, p.mesh.place(rank).tp, p.tp) for u in p.units_of(rank)}


def stored(f: Flat, p: Plan) -> int:
    """Elements of a unit's whole buffer: cut evenly among the data-parallel ranks, padding included."""
    return cuts(f.size, p.dp)[-1]


def memory(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes on one rank by category; exact but for what one operation needs while it runs, of which logits alone are
    counted: their chunk, in the dtypes in which it exists."""
    c, level = p.config, p.zero.level
    units = flats(p, rank)
    whole = sum(stored(f, p) for f in units.values())
    part, width = whole // p.shard, DTYPES[c.dtype].width
    full = max(width, 4)                                        # masters, gradients and moments
    program = p.training(rank)
    rows = ragged_rows(p.architecture.vocab_size, p.tp, p.architecture.pad_rows)
    logits = min(share(p) * p.tp, p.head_chunk) * rows if len(p.stages) - 1 in p.stages_of(rank).own else 0
    return {
        "weights": (part if level == 3 else whole) * width,
        "master weights": part * 4 if width == 2 else 0,
        "gradients": (part if level >= 2 else whole) * full,
        "optimizer": part * full * len(RULES[c.optimizer.optimizer].moments),
        "gathered weights": borrowed(program, units, p, "gather", "release") * width if level == 3 else 0,
        "gradient sums": borrowed(program, units, p, "open", "land") * full if level >= 2 else 0,
        "activations": peak(program, table(p, rank), share(p) * p.architecture.hidden * width),
        "logits": logits * (width + full if width == 2 else width),
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


def table(p: Plan, rank: int) -> list[tuple[Operation, ...]]:
    """The rows of every part as one rank runs it; blocks are alike."""
    a, c = p.architecture, p.config
    m = Micro(p.micro_batch, a.seq_length, p.mesh.place(rank).tp, p.tp, DTYPES[c.dtype].width,
              c.training.recompute_granularity, c.data.reset_attention_mask, c.data.reset_position_ids)
    first, block, head = (operations(a, part, m) for part in (0, 1, a.layers + 1))
    return [first, *[block] * a.layers, head]


def peak(program: Iterable[Action], parts: Sequence[Sequence[Operation]], edge: int) -> int:
    """The most bytes that a program's activations take at a time: what is kept for backward and between its halves,
    and what is under way, `edge` bytes for each micro-batch. Where a part is run again, its graph is counted."""
    sizes = {i: {"kept": distinct(rows, "kept"), "between": distinct(rows, "between"), "edge": 0 if i else edge,
                 "graph": distinct(rows, "kept", "again")} for i, rows in enumerate(parts)}
    now = most = 0
    for action in program:
        if action.kind in CHANGES:
            size, change = sizes[action.part], CHANGES[action.kind]
            most = max(most, now + (size["graph"] - size["kept"] if change.get("kept") == -1 else 0))
            now += sum(sign * size[what] for what, sign in change.items())
        now += MESSAGES.get(action.kind, 0) * edge
        most = max(most, now)
    return most


def traffic(p: Plan, rank: int = 0) -> dict[str, int]:
    """Bytes that one rank sends in a training step, by axis; `comm` counts the same."""
    width = DTYPES[p.config.dtype].width
    wide, ranks, units = max(width, 4), p.mesh.place(rank).dp % p.shard, flats(p, rank)
    sent = Counter(dict.fromkeys(("tp", "kv", "shard", "replicate", "tied", "pp", "world"), 0))
    parts, edge = table(p, rank), share(p) * p.architecture.hidden * width
    for action in p.training(rank):
        part = stored(units[action.unit], p) // p.shard if action.kind in SENT else 0
        sent["shard"] += (p.shard - 1) * part * {"gather": width, "reduce": wide}.get(action.kind, 0)
        sent["replicate"] += all_reduce_bytes(part, wide, p.dp // p.shard) if action.kind == "replicate" else 0
        sent["tied"] += all_reduce_bytes(part, wide, 2) if action.kind == "tie" else 0
        sent["pp"] += edge if action.kind == "send" else 0
        sent["tp"] += computation(action.kind, parts[action.part], p) if action.kind in COMPUTED else 0
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
    """Tokens of one micro-batch on one rank, padded to a multiple of tp."""
    return ceil(p.micro_batch * p.architecture.seq_length / p.tp)


def computation(kind: str, rows: Sequence[Operation], p: Plan) -> int:
    """Bytes over tp of one pass over a part: its tokens as often as its operations move them; the loss adds up what it
    needs of each token, one chunk of logits at a time."""
    width, tokens = DTYPES[p.config.dtype].width, share(p) * p.tp
    moved = sum(row.moves.get(kind, 0) for row in rows) * (p.tp - 1) * share(p) * p.architecture.hidden * width
    chunks = [min(p.head_chunk, tokens - low) for low in range(0, tokens, p.head_chunk)] if kind in ("L", "E") else []
    return moved + sum(all_reduce_bytes(n * c, max(width, 4), p.tp) for c in chunks for row in rows for n in row.sums)
