"""Rules of optimizers: each against a plain reading of its paper or torch's own, in float64, over the gradients of a run; and in any layout."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from plain_rules import PLAIN, Change
from pool import Pool
from support import TINY, built, named, stepping
from test_parity import Row, compare

from megazero.units.formulas import FORMULAS, Formulas

Tensor = torch.Tensor
LR, DECAY = 1e-2, 0.3


def by(make: Callable[..., torch.optim.Optimizer]) -> Change:
    """torch's own, a kernel for each tensor."""
    def change(w: Tensor, g: Tensor, kept: dict[str, Any], t: int, o: Mapping[str, Any]) -> None:
        if not kept:
            kept["p"] = torch.nn.Parameter(w.clone())
            kept["kernel"] = make([kept["p"]], **o)
        kept["p"].grad = g.clone()
        kept["kernel"].step()
        w.copy_(kept["p"].detach())
    return change


# words of the command line -> what they mean
RULES: dict[str, Change] = {
    "--optimizer adam": by(torch.optim.AdamW), "--optimizer adamw": by(torch.optim.AdamW),
    "--optimizer adam --no-decoupled-weight-decay": by(torch.optim.Adam),
    "--optimizer sgd --sgd-momentum 0.8": by(lambda ps, **o: torch.optim.SGD(ps, momentum=0.8, **o)),
    "--optimizer lion --lion-beta1 0.8 --lion-beta2 0.7": PLAIN["lion"],
    "--optimizer lamb --adam-beta2 0.99 --adam-eps 1e-5": PLAIN["lamb"],
    "--optimizer ademamix --adam-beta2 0.99 --adam-eps 1e-5 --ademamix-alpha 5 --ademamix-beta3 0.999 --ademamix-alpha-warmup 4 --ademamix-beta3-warmup 3": PLAIN["ademamix"],
}


@pytest.mark.parametrize("words", RULES)
def test_a_rule_is_what_its_paper_says(words: str) -> None:
    run = built(f"{TINY} --dtype fp64 {words} --weight-decay {DECAY} --clip-grad 0 --lr {LR} --lr-decay-style constant --train-iters 6")
    step, weights = stepping(run), {n: t.clone() for n, t in named(run).items()}
    kept: dict[str, dict[str, Any]] = {n: {} for n in weights}
    for t in range(1, 7):
        step.start()
        for name, g in named(run, "grad_slice").items():
            RULES[words](weights[name], g, kept[name], t, {"lr": LR, "weight_decay": DECAY if g.dim() == 2 else 0.0})
        for name, w in named(run).items():
            assert (w - weights[name]).abs().max() <= 1e-12 * weights[name].abs().max(), (t, name)


@pytest.mark.parametrize("rule", FORMULAS)
def test_a_step_that_is_skipped_leaves_every_bit(rule: str) -> None:
    run = built(f"{TINY} --optimizer {rule}")
    step = stepping(run)
    step.start()
    unit = run.units["layers.0"]
    before = {"weight": unit.master.clone(), **{m: t.clone() for m, t in run.updater.state["layers.0"].items()}}
    unit.grad_slice.fill_(torch.nan)
    for kernel in run.updater.kernels.values():
        assert isinstance(kernel, Formulas)
        kernel.found_inf = torch.ones(())
        kernel.step()
    for what, now in {"weight": unit.master, **run.updater.state["layers.0"]}.items():
        assert now.view(torch.int32).equal(before[what].view(torch.int32)), what
    assert all(float(s) == 1 for s in run.updater.steps)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


# no biases on k: their gradient is rounding, whose sign is lion's whole update
LAYOUTS = [Row(tp=2, dp=2, level=1, late=True, shape="gpt2-plain"), Row(dp=3, level=3, shape="llama"), Row(tp=2, dp=3, shape="mistral"),
           Row(pp=2, dp=2, level=2, late=True, schedule="zb-h1", shape="llama-tied-scaled")]


@pytest.mark.parametrize("i", range(len(LAYOUTS)))
@pytest.mark.parametrize("rule", FORMULAS)
def test_any_layout_makes_the_same_steps(rule: str, i: int, pool: Pool) -> None:
    row = LAYOUTS[i]
    compare(Row(**{**vars(row), "optimizer": rule}), pool)
