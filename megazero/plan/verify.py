"""What is wrong with programs, before they run."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from megazero.pipeline import KINDS
from megazero.plan.action import Action, around
from megazero.plan.program import Stages

Value = tuple[str, int] | None              # what flows of a micro-batch: the output (F) or the gradient (B) of a part


def verify(programs: Sequence[Sequence[Action]], stages: Sequence[Stages], level: int, micro_batches: int) -> list[str]:
    """What is wrong with the programs of the pp ranks of one pipeline, which run side by side, a sentence each.

    Right is, on each rank: each part runs F and B, or F, I and W, or L, once for each micro-batch, on what the part
    before it left or a message brought; what goes out of a stage is sent; weights that are read are gathered, gradients
    that are written have a sum open; every sum is reduced and lands once, in order, then is summed over replicas and
    holders; every unit is updated once after the judge and then published. And between the ranks: no messages that
    cross or have no taker, nobody waits for ever.
    """
    if len(programs) != len(stages):
        return [f"there are {len(programs)} programs for {len(stages)} pipeline ranks"]
    found = {a.micro for program in programs for a in program if a.kind in KINDS}
    if found != set(range(micro_batches)):
        return [f"its micro-batches are {len(found)}, this step has {micro_batches} on each rank"]
    each = list(enumerate(zip(programs, stages, strict=True)))
    wrong = [f"rank {rank}: {a} is not of this rank" for rank, (program, own) in each for a in program
             if not _known(a, own)]
    if wrong:
        return wrong
    for rank, (program, own) in each:
        for faults in (_passes(program, own, micro_batches), _flow(program, own), _spans(program, own, level),
                       _end(program, own)):
            wrong += [f"rank {rank}: {sentence}" for sentence in faults]
    return [*wrong, *undelivered(programs, [own.tied for own in stages])]


def _known(a: Action, stages: Stages) -> bool:
    """Are its part, stage and units this rank's?"""
    if a.kind in KINDS:
        return any(a.part in parts for parts in stages.own.values())
    return (not a.way or a.kind == "finish" or a.part in stages.own) and set(a.units) <= _units(stages)


def _units(stages: Stages) -> set[str]:
    return {u for parts in stages.own.values() for i in parts for u in stages.parts[i].forward}


def _passes(program: Sequence[Action], stages: Stages, micro_batches: int) -> Iterator[str]:
    """Each computation once, behind the kind of pass that it needs."""
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
    yield from (f"{a} has no place in a step" for a in ran)


def _flow(program: Sequence[Action], stages: Stages) -> Iterator[str]:
    """Each computation and each send finds what it takes: the activation (F) behind a part, or the gradient (B) behind
    one, as a part or a message left it."""
    flow: dict[int, Value] = {}
    for i, a in enumerate(program):
        way = KINDS[a.kind].way if a.kind in KINDS else a.way
        if not way or a.kind in ("expect", "finish"):
            continue
        if a.kind in KINDS:
            wants: Value = ("F", a.part - 1) if way == "F" or a.kind == "L" else ("B", a.part + 1)
            wants = None if wants == ("F", -1) else wants
            leaves: Value = None if (way, a.part) == ("B", 0) else (way, a.part)
        else:
            own = stages.own[a.part]
            edge = (own[-1] if a.kind == "send" else own[0] - 1) if way == "F" else (
                own[0] if a.kind == "send" else own[-1] + 1)
            wants, leaves = ((way, edge), None) if a.kind == "send" else (None, (way, edge))
        if flow.get(a.micro) != wants:
            yield f"{a} takes {_said(wants)} and finds {_said(flow.get(a.micro))}: {around(program, i)}"
        flow[a.micro] = leaves
    yield from (f"{_said(left)} of micro-batch {micro} is left over" for micro, left in flow.items() if left)


def _said(value: Value) -> str:
    if value is None:
        return "nothing"
    return f"the {'output' if value[0] == 'F' else 'gradient'} of part {value[1]}"


def _spans(program: Sequence[Action], stages: Stages, level: int) -> Iterator[str]:
    """Weights are there when they are read, sums are open when they are written, and what begins ends."""
    whole, grows, travels, expected = set[str](), set[str](), set[str](), set[Action]()
    count = Counter[tuple[str, str]]()
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
                    a.kind == "open" and a.unit in travels) or (a.kind == "release" and level < 3) or (
                    a.micro not in (-1, count[a.kind, a.unit])):
                wrong = "is out of turn"
            count[a.kind, a.unit] += 1
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
    own, done = _units(stages), defaultdict[str, list[str]](list)
    told = {"land", "replicate", "tie", "settle", "update", "publish", "finish", "judge"}
    for a in program:
        for unit in a.units or (own if a.kind in ("finish", "judge") else ()):
            if a.kind in told and (a.kind != "land" or done[unit][-1:] != ["land"]):
                done[unit].append(f"{a.kind} {a.way}".strip())
    for unit in sorted(own):
        way = ["land", "replicate", "settle", *["tie", "settle"] * (unit in stages.tied), "finish tp", "finish kv",
               "judge", "update", "publish"]
        if done[unit] != way:
            yield f"the sum of {unit} goes {', '.join(done[unit])}, not {', '.join(way)}"


def undelivered(programs: Sequence[Sequence[Action]], tied: Sequence[Sequence[str]] = ()) -> list[str]:
    """Sends do not wait. A receive waits for its send, the settling of a tie for all holders of the unit, the judge for
    everyone. `tied`: the units that each rank holds with others."""
    pp, at = len(programs), [0] * len(programs)
    lines: dict[tuple[str, int, int], list[Action]] = defaultdict(list)         # (way, from, to) -> messages under way
    met: dict[tuple[str, ...], set[int]] = defaultdict(set)                     # who came to a tie, or to the judge
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
                elif action.kind in ("tie", "judge"):
                    met[action.units].add(rank)
                there = met[action.units]
                if action.kind == "judge" and len(there) < pp:
                    break
                if action.kind == "settle" and rank in there and len(there) < sum(action.unit in own for own in tied):
                    break
                at[rank] += 1
                moved = True
    stuck = [f"rank {r} waits for ever: {around(p, at[r])}" for r, p in enumerate(programs) if at[r] < len(p)]
    return stuck + [f"nobody takes {a} of rank {line[1]}" for line, sent in lines.items() for a in sent]
