"""What is wrong with programs, before they run."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from megazero.pipeline import KINDS
from megazero.plan.action import Action, around
from megazero.plan.program import Stages


def verify(programs: Sequence[Sequence[Action]], stages: Sequence[Stages], level: int, micro_batches: int) -> list[str]:
    """What is wrong with the programs of the pp ranks of one pipeline, which run side by side, a sentence each.

    Right is, on each rank: each part runs F and B, or F, I and W, or L, once for each micro-batch, in that order;
    weights that are read are gathered, gradients that are written have a sum open; every sum is reduced and lands once,
    then is summed over replicas and holders; room is made for every message; every unit is updated once after the judge
    and then published. And between the ranks: no messages that cross or have no taker, nobody waits for ever.
    """
    if len(programs) != len(stages):
        return [f"there are {len(programs)} programs for {len(stages)} pipeline ranks"]
    wrong = [f"rank {rank}: {sentence}" for rank, (program, own) in enumerate(zip(programs, stages, strict=True))
             for sentence in (*_passes(program, own, micro_batches), *_spans(program, own, level), *_end(program, own))]
    return [*wrong, *undelivered(programs)]


def _passes(program: Sequence[Action], stages: Stages, micro_batches: int) -> Iterator[str]:
    """Each computation once, behind what it needs."""
    ran: Counter[Action] = Counter()
    for i, a in enumerate(program):
        if a.kind in KINDS:
            after = KINDS[a.kind].after
            if after and not ran[a._replace(kind=after)]:
                yield f"{a} runs before {a._replace(kind=after)}: {around(program, i)}"
            ran[a] += 1
    both, head = "FIW" if any(a.kind == "W" for a in ran) else "FB", len(stages.parts) - 1
    for part in (i for own in stages.own.values() for i in own):
        for kind in "L" if part == head else both:
            for micro in range(micro_batches):
                if (times := ran.pop(Action(kind, part, micro), 0)) != 1:
                    yield f"{kind}{part},{micro} runs {times} times"
    yield from (f"{a} is not of this rank's" for a in ran)


def _spans(program: Sequence[Action], stages: Stages, level: int) -> Iterator[str]:
    """Weights are there when they are read, sums are open when they are written, and what begins ends."""
    whole, grows, travels, expected = set[str](), set[str](), set[str](), set[Action]()
    sets = {"gather": (None, whole), "release": (whole, None), "open": (None, grows), "reduce": (grows, travels),
            "land": (travels, None)}
    for i, a in enumerate(program):
        wrong = ""
        if a.kind in KINDS:
            part, kind = stages.parts[a.part], KINDS[a.kind]
            wrong = " and ".join([f"reads {u}, which is not gathered" for u in part.read(kind.reads) if u not in whole]
                                 + [f"writes {u}, which has no sum open" for u in part.forward
                                    if kind.writes and u not in grows])
        elif a.kind in sets:
            out_of, into = sets[a.kind]
            if (out_of is not None and a.unit not in out_of) or (into is not None and a.unit in into) or (
                    a.kind == "open" and a.unit in travels):
                wrong = "is out of turn"
            (out_of if out_of is not None else set()).discard(a.unit)
            (into if into is not None else set()).add(a.unit)
        elif a.kind == "expect":
            expected.add(a)
        elif a.kind == "recv" and (room := a._replace(kind="expect")) not in expected:
            wrong = "has no room made for it"
        elif a.kind == "recv":
            expected.remove(room)
        if wrong:
            yield f"{a} {wrong}: {around(program, i)}"
    yield from (f"the sum of {u} is left over" for u in sorted(grows | travels))
    yield from (f"{a} is never received" for a in sorted(expected))
    if level == 3:
        yield from (f"{u} is never released" for u in sorted(whole))


def _end(program: Sequence[Action], stages: Stages) -> Iterator[str]:
    """From a unit's last landing to its publishing, in order: each step of it once."""
    own = {u for parts in stages.own.values() for i in parts for u in stages.parts[i].forward}
    done: dict[str, list[str]] = defaultdict(list)
    for a in program:
        for unit in a.units or (sorted(own) if a.kind in ("finish", "judge") else ()):
            if a.kind in ("land", "replicate", "tie", "settle", "update", "publish", "finish", "judge"):
                done[unit] += [a.kind] if a.kind != "land" or done[unit][-1:] != ["land"] else []
    last = ["finish", "finish", "judge", "update", "publish"]
    for unit in sorted(own | set(done)):
        ways = [["land", "replicate", "settle", *last]]
        if unit in stages.tied:
            ways = [["land", "replicate", "settle", "tie", "settle", *last]]
        if unit not in own:
            yield f"{unit} is not of this rank's units"
        elif done[unit] not in ways:
            yield f"the sum of {unit} goes {' '.join(done[unit])}, not {' '.join(ways[0])}"


def undelivered(programs: Sequence[Sequence[Action]]) -> list[str]:
    """Sends do not wait; a receive waits for its send."""
    pp, at = len(programs), [0] * len(programs)
    lines: dict[tuple[str, int, int], list[Action]] = defaultdict(list)         # (way, from, to) -> messages under way
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                action = program[at[rank]]
                step = 1 if action.way == "F" else -1
                if action.kind == "send":
                    lines[action.way, rank, (rank + step) % pp].append(action)
                elif action.kind == "recv":
                    line = lines[action.way, (rank - step) % pp, rank]
                    if not line:
                        break
                    sent = line.pop(0)
                    if (sent.part + step, sent.micro) != (action.part, action.micro):
                        return [f"rank {rank} takes {sent} for {action}: {around(program, at[rank])}"]
                at[rank] += 1
                moved = True
    stuck = [f"rank {r} waits for ever: {around(p, at[r])}" for r, p in enumerate(programs) if at[r] < len(p)]
    return stuck + [f"nobody takes {a} of rank {line[1]}" for line, sent in lines.items() for a in sent]
