"""Shows a pipeline schedule, its bubble and what it holds:
python tools/show_schedule.py gpipe|breadth-first|1f1b|interleaved|zb-h1 --help

Or prints the program of each pipeline rank of a run, as --pipeline-program reads them:
python tools/show_schedule.py program THE FLAGS OF pretrain_gpt.py > FILE"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megazero.base import UserError
from megazero.data import configured_tokenizer
from megazero.pipeline import SCHEDULES, Costs, Timeline, draw, most_held, passes, simulate, svg
from megazero.plan import ranks_asked, resolve, written
from megazero.settings import commands, from_command_line, option, run

MOST = 1_000_000            # passes, and places for them in the drawing, that still fit in memory and patience


@dataclass(frozen=True)
class Settings:
    """Plays a schedule on a clock, prints its figures beside the formulas for them, and draws it."""

    pp: int = option(help="ranks of the pipeline", alias=("pipeline-model-parallel-size",), unit="ranks")
    micro_batches: int = option(help="micro-batches in a step", unit="count")
    virtual: int = option(1, "stages on each rank", alias=("num-virtual-stages-per-pipeline-rank",), unit="stages")
    forward: float = option(1.0, "time of a micro-batch's forward through all layers of a rank", unit="time")
    backward: float = option(2.0, "time of its backward", unit="time")
    communication: float = option(0.0, "time of a message between ranks", unit="time")
    svg: str | None = option(None, "picture to write", unit="file")


def show(name: str, s: Settings) -> None:
    check(name, s)
    costs = Costs(s.forward, s.backward, s.communication).shared(s.virtual)
    timeline = simulate(passes(name, s.pp, s.micro_batches, s.virtual), costs)
    if s.pp * timeline.makespan > MOST * min(costs.forward, costs.backward):
        raise UserError(
            f"--pp {s.pp}, --forward {s.forward:g}, --backward {s.backward:g}, --communication {s.communication:g}: "
            "make too large a drawing; choose fewer ranks, or times nearer to each other.")
    report(name, s, costs, timeline)
    print(draw(timeline))
    if s.svg:
        write(Path(s.svg), svg(timeline))


def report(name: str, s: Settings, costs: Costs, timeline: Timeline) -> None:
    row, sizes = SCHEDULES[name], (s.pp, s.micro_batches, s.virtual)
    bubble, limit = row.bubble(*sizes, costs), most_held(name, *sizes)
    rate = bubble / (bubble + s.micro_batches * (s.forward + s.backward))
    print(f"{name}: pp {s.pp}, {s.micro_batches} micro-batches, {s.pp * s.virtual} stages")
    print(f"makespan     {timeline.makespan:g}")
    print(f"bubble       {max(timeline.idle):g}, rate {timeline.bubble_rate:.4f}; "
          f"formula, without messages: {bubble:g}, {rate:.4f}")
    print(f"held         {in_layers(timeline.held, s.virtual)}; formula: {in_layers(limit, s.virtual)}")
    print("             activations of one micro-batch in all layers of a rank, at most, by rank\n")


def check(name: str, s: Settings) -> None:
    """Raises UserError."""
    counts = {"--pp": s.pp, "--micro-batches": s.micro_batches, "--virtual": s.virtual}
    wrong = [f"{flag} {count}: must be at least 1." for flag, count in counts.items() if count < 1]
    if 2 * s.pp * s.micro_batches * s.virtual > MOST:
        wrong.append(f"--pp {s.pp} x --micro-batches {s.micro_batches} x --virtual {s.virtual}: "
                     f"more than {MOST:,} passes; choose less.")
    if s.virtual > 1 and not SCHEDULES[name].looped:
        looped = " or ".join(n for n, row in SCHEDULES.items() if row.looped)
        wrong.append(f"--virtual {s.virtual}: {name} has one stage on each rank; write 1, or take {looped}.")
    for flag, time in (("--forward", s.forward), ("--backward", s.backward)):
        if not 0 < time < math.inf:
            wrong.append(f"{flag} {time:g}: must be finite and greater than 0.")
    if not 0 <= s.communication < math.inf:
        wrong.append(f"--communication {s.communication:g}: must be finite, 0 or greater.")
    if wrong:
        raise UserError(*wrong)


def in_layers(held: tuple[int, ...], virtual: int) -> str:
    return " ".join(f"{count / virtual:g}" for count in held)


def programs() -> None:
    """One line for each rank of the first pipeline of the run that the flags ask for."""
    config = from_command_line(sys.argv[2:])
    tokenizer = configured_tokenizer(config)
    vocabulary = max(tokenizer.vocab_size if tokenizer else 0, config.data.vocab_size or 0)
    plan = resolve(config, ranks_asked(config), vocabulary)
    print(written([plan.training(rank) for rank in range(0, plan.world, plan.world // plan.pp)]), end="")


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--svg {path}: cannot be written ({error.strerror}); "
                        "name a file in a folder that is there.") from None


def main() -> None:
    if sys.argv[1:2] == ["program"]:
        programs()
    else:
        commands("show_schedule.py", __doc__ or "", {name: (Settings, partial(show, name)) for name in SCHEDULES})


if __name__ == "__main__":
    run(main)
