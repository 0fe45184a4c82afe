"""The update of each rule alone, on one rank, against torch's own optimizers over parameters of the same shapes.

    python benchmarks/rules.py [--device cpu|cuda] [--dtype fp32|bf16] [--steps 10] [--json FILE]

A GPT-2 shape. What is timed is what a step does when its gradients are there: masters and moments change, weights are
published. torch's change fp32 parameters. Each in turn, round by round; the ratio is to torch's fused AdamW in the same
round, and of muon and adafactor also to torch's own. Beside it bytes of moments for each parameter.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import planned, words

from megazero.base import say
from megazero.comm import connect
from megazero.plan import Action
from megazero.run import Run, seconds_of
from megazero.settings import option, parse, run
from megazero.units import Ruling

RULES = {
    "adam": "", "sgd": "--optimizer sgd", "lion": "--optimizer lion", "lamb": "--optimizer lamb",
    "ademamix": "--optimizer ademamix", "adafactor": "--optimizer adafactor", "muon": "--optimizer muon",
    "muon simple bf16": "--optimizer muon --muon-nesterov --muon-coefficient-type simple --muon-ns-dtype bf16",
    "adam, bf16 moments": "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "adam, 8-bit moments": "--exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit",
}
OWN = {"torch adafactor": "adafactor", "torch muon": "muon simple bf16"}         # whose ratio is to these


@dataclass(frozen=True)
class Settings:
    """Times the update of each rule against torch's optimizers."""

    device: str = option("cpu", "where", choices=("cpu", "cuda"))
    dtype: str = option("fp32", "of weights", choices=("fp32", "bf16"))
    layers: int = option(6, "blocks")
    hidden: int = option(384, "channels")
    heads: int = option(6, "heads")
    seq: int = option(256, "tokens of a sample")
    batch: int = option(1, "samples")
    vocab: int = option(2048, "ids")
    steps: int = option(10, "timed updates of each")
    bf16_iterations: bool = option(False, "also Muon in bf16, ours and torch's: minutes on a CPU without such products")
    json: str | None = option(None, "file for the figures")


def ours(c: Settings, more: str) -> tuple[Callable[[], object], float]:
    """One update, and the bytes of moments for each parameter."""
    plan, device = planned(words(c, c.batch, more)), torch.device(c.device)
    made = Run(plan, device, connect(plan.mesh, 0, "gloo", 60))
    made.initialise()
    for unit in made.units.values():
        unit.grad_slice.normal_(std=1e-3)
    one = torch.ones((), dtype=torch.float64, device=device)
    verdict = made.gate.judge(Ruling(one, told={"loss": one, "tokens": one}))
    ruling = Ruling(one, lr=torch.full((1,), 1e-3, device=device), verdict=verdict)
    ending = [a for a in made.training if a.kind in ("update", "publish")]

    def update() -> None:
        action: Action
        for action in ending:
            made.actions.do[action.kind](action, ruling)

    kept = sum(own.nbytes for state in made.updater.state.values() for own in state.values())
    return update, kept / sum(unit.flat.size for unit in made.units.values())


def torchs(c: Settings, kind: str) -> tuple[Callable[[], object], float]:
    plan = planned(words(c, c.batch, ""))
    shapes = [(p.shape, p.group) for u in plan.units for p in u.parameters]
    matrices, rest = ([torch.nn.Parameter(torch.randn(s, device=c.device)) for s, group in shapes
                       if (group == "matrix") == matrix] for matrix in (True, False))
    for p in (*matrices, *rest):
        p.grad = torch.randn_like(p) * 1e-3
    made: list[torch.optim.Optimizer] = {
        "torch adamw": lambda: [torch.optim.AdamW([*matrices, *rest], fused=True)],
        "torch adafactor": lambda: [torch.optim.Adafactor([*matrices, *rest])],
        "torch muon": lambda: [torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)]}[kind]()

    def update() -> None:
        for optimizer in made:
            optimizer.step()

    update()
    kept = sum(t.nbytes for o in made for state in o.state.values() for t in state.values() if torch.is_tensor(t))
    return update, kept / sum(p.numel() for p in (*matrices, *rest))


def main() -> None:
    c = parse(Settings)
    slow = ("torch muon", "muon simple bf16")
    made = {**{kind: partial(torchs, c, kind) for kind in ("torch adamw", *OWN)},
            **{kind: partial(ours, c, more) for kind, more in RULES.items()}}
    kinds = {kind: make() for kind, make in made.items() if c.bf16_iterations or kind not in slow}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(c.steps + 2):
        for kind, (update, _) in kinds.items():
            seconds = seconds_of(update, torch.device(c.device))
            times[kind] += [seconds] if turn > 1 else []
    own = {ours_: theirs for theirs, ours_ in OWN.items()}
    rows = {}
    for kind, found in times.items():
        ratios = {peer: median(a / b for a, b in zip(found, times[peer], strict=True))
                  for peer in ("torch adamw", own.get(kind)) if peer in times}
        rows[kind] = {"ms": 1e3 * median(found), "bytes": kinds[kind][1], **ratios}
        say(f"{kind:20} {rows[kind]['ms']:9.2f} ms | {kinds[kind][1]:5.2f} bytes of moments a parameter | "
            + ", ".join(f"{ratio:.2f} of {peer}" for peer, ratio in ratios.items()))
    if c.json:
        Path(c.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
