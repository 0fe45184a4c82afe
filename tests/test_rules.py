"""Rules of optimizers: each against a plain reading of its paper or torch's own, in float64, over the gradients of a run; and in any layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_rules import PLAIN, Change, by, muon
from pool import Pool
from support import SHAPES, TINY, built, kept, named, stepping, train
from test_parity import Row, compare

from megazero.state import Reader
from megazero.state.compare import checkpoints
from megazero.state.merge import merge
from megazero.units.formulas import FORMULAS
from megazero.units.muon import SCALES, orthogonal

Tensor = torch.Tensor
LR, DECAY = 1e-2, 0.3
OURS = [*(rule for rule in FORMULAS if rule != "adam"), "adafactor", "muon"]


# words of the command line -> what they mean
RULES: dict[str, Change] = {
    "--optimizer adam": by(torch.optim.AdamW), "--optimizer adamw": by(torch.optim.AdamW),
    "--optimizer adam --no-decoupled-weight-decay": by(torch.optim.Adam),
    "--optimizer sgd --sgd-momentum 0.8": by(lambda ps, **o: torch.optim.SGD(ps, momentum=0.8, **o)),
    "--optimizer adafactor": by(torch.optim.Adafactor),
    "--optimizer adafactor --adafactor-decay -0.7 --adafactor-clip 1.1 --adafactor-eps 0.05":
        by(lambda ps, **o: torch.optim.Adafactor(ps, beta2_decay=-0.7, d=1.1, eps=(None, 0.05), **o)),
    "--optimizer muon --muon-momentum 0.9": muon(0.9, False, "quintic", "spectral"),
    "--optimizer muon --muon-nesterov --muon-coefficient-type simple --muon-num-ns-steps 3 --muon-scale-mode shape_scaling --muon-extra-scale-factor 0.5":
        muon(0.95, True, "simple", "shape_scaling", 3, 0.5),
    "--optimizer muon --muon-scale-mode unit_rms_norm": muon(0.95, False, "quintic", "unit_rms_norm"),
    "--optimizer lion --lion-beta1 0.8 --lion-beta2 0.7": PLAIN["lion"],
    "--optimizer lamb --adam-beta2 0.99 --adam-eps 1e-5": PLAIN["lamb"],
    "--optimizer ademamix --adam-beta2 0.99 --adam-eps 1e-5 --ademamix-alpha 5 --ademamix-beta3 0.999 --ademamix-alpha-warmup 4 --ademamix-beta3-warmup 3": PLAIN["ademamix"],
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


# no biases on k: their gradient is rounding, whose sign is lion's whole update
LAYOUTS = [Row(tp=2, dp=2, level=1, late=True, shape="gpt2-plain"), Row(dp=3, level=3, shape="llama"), Row(tp=2, dp=3, shape="mistral"),
           Row(pp=2, dp=2, level=2, late=True, schedule="zb-h1", shape="llama-tied-scaled"),
           Row(tp=2, pp=2, level=1, schedule="interleaved", virtual=2, layers=4, recompute="full", shape="llama"),
           Row(dp=4, level=2, shard=2, schedule="gpipe", recompute="selective", late=True, every=2, shape="mistral"),
           Row(pp=2, dp=2, level=3, schedule="breadth-first", virtual=2, layers=4, micro=3, dropout=0.1, keep=2, shape="llama-tied-scaled")]


def in_turn(rules: list[str], some: int) -> list[Any]:
    """Every rule with every layout; each with so many of them, not the same, where not all is asked for."""
    return [pytest.param(rule, i, marks=() if (i - n) % len(LAYOUTS) < some else pytest.mark.full)
            for n, rule in enumerate(rules) for i in range(len(LAYOUTS))]


CODED = ["adam --adam-eps 1e-5 --exp-avg-dtype 8bit --exp-avg-sq-dtype bf16", "lamb --adam-eps 1e-5 --exp-avg-dtype bf16 --exp-avg-sq-dtype 8bit",
         "ademamix --adam-eps 1e-5 --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit"]


@pytest.mark.parametrize("words, i", in_turn(CODED, 1))
def test_any_layout_rounds_alike(words: str, i: int, pool: Pool) -> None:
    """Chance and blocks know logical elements alone: float64 gradients, so what is rounded is the same to the last bit but one."""
    compare(Row(**{**vars(LAYOUTS[i]), "optimizer": words}), pool)


def is_matrix(name: str, g: Tensor) -> bool:
    return g.dim() == 2 and name.startswith("layers.")


@pytest.mark.parametrize("words", RULES)
def test_a_rule_is_what_its_paper_says(words: str) -> None:
    run = built(f"{TINY} --dtype fp64 {words} --weight-decay {DECAY} --clip-grad 0 --lr {LR} --lr-decay-style constant --train-iters 6")
    step, weights = stepping(run), {n: t.clone() for n, t in named(run).items()}
    kept: dict[str, dict[str, Any]] = {n: {} for n in weights}
    for t in range(1, 7):
        step.start()
        for name, g in named(run, "grad_slice").items():
            change = by(torch.optim.AdamW) if "muon" in words and not is_matrix(name, g) else RULES[words]
            change(weights[name], g, kept[name], t, {"lr": LR, "weight_decay": DECAY if g.dim() == 2 else 0.0})
        for name, w in named(run).items():
            assert (w - weights[name]).abs().max() <= 1e-12 * weights[name].abs().max(), (t, name)


@pytest.mark.parametrize("rule", OURS)
def test_a_step_that_is_skipped_leaves_every_bit(rule: str) -> None:
    run = built(f"{TINY} --optimizer {rule}")
    step = stepping(run)
    step.start()
    unit = run.units["layers.0"]
    before = {what: own.clone() for what, own in kept(run, unit).items()}
    unit.grad_slice.fill_(torch.nan)
    for kernel in (kernel for spans in run.updater.kernels.values() for kernels in spans.values() for kernel in kernels):
        kernel.found_inf = torch.ones(())                                                                   # type: ignore[attr-defined]
        kernel.step()
    for what, now in kept(run, unit).items():
        assert now.view(torch.int32).equal(before[what].view(torch.int32)), what
    assert all(float(s) == 1 for s in run.updater.steps)


@pytest.mark.parametrize("rule, i", in_turn(OURS, 2))
def test_any_layout_makes_the_same_steps(rule: str, i: int, pool: Pool) -> None:
    row = LAYOUTS[i]
    compare(Row(**{**vars(row), "optimizer": rule}), pool)


SQUARE = {"--tp 1": 1, "--tp 2": 2, "--dp 3 --zero-stage 1": 3, "--tp 2 --pp 2 --zero-stage 3": 4, "--pp 2 --dp 2 --zero-stage 2": 4}


@pytest.mark.parametrize("rule", ["adafactor", "muon"])
@pytest.mark.parametrize("ways", [1, pytest.param(len(SQUARE), marks=pytest.mark.full)])
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(rule: str, ways: int, pool: Pool, tmp_path: Path) -> None:
    """Each is held against a run that was never stopped, to the end of float64; a merged one too. From each layout go `ways`: to the next, or to
    all of the square."""
    words = f"{TINY} {SHAPES['llama']} --dtype fp64 --global-batch-size 6 --optimizer {rule} --weight-decay 0.1 --num-layers 2 --lr 1e-2 --eval-iters 0"
    train(f"{words} --save {tmp_path / 'whole'}")
    whole = Reader(tmp_path / "whole")
    assert whole.kinds == {"weight", *({"row_var", "col_var", "variance"} if rule == "adafactor" else {"momentum_buffer", "exp_avg", "exp_avg_sq"})}
    ring = list(SQUARE)
    for i, (a, ranks) in enumerate(SQUARE.items()):
        half = tmp_path / a.replace(" ", "")
        pool.run(ranks, train, f"{words} {a} --exit-interval 2 --save {half}")
        for b in (ring[i - 1 - way] for way in range(ways)):
            end = tmp_path / (a + b).replace(" ", "")
            pool.run(SQUARE[b], train, f"{words} {b} --load {half} --save {end}")
            assert Reader(end).shapes == whole.shapes and not list(checkpoints(whole, Reader(end), 1e-10)), (a, b)
        merge(Reader(end), tmp_path / "merged" / half.name, optimizer=True)
        merged = Reader(tmp_path / "merged" / half.name)
        assert merged.kinds == whole.kinds and not list(checkpoints(whole, merged, 1e-10))


def test_rates_and_decay_go_by_name() -> None:
    """One step of plain SGD moves a weight by rate x gradient; of a gradient that is not there, by rate x decay."""
    words = (f"{TINY} --dtype fp64 --untie-embeddings-and-output-weights --optimizer sgd --sgd-momentum 0 --clip-grad 0 --lr 1e-3 --lr-decay-style constant "
             "--weight-decay 0.5 --position-embedding-type learned_absolute")
    own = {"embedding.weight": 5e-3, "positions.weight": 5e-3, "head.output.weight": 2e-3, "norm": 7e-3, "bias": 7e-3}
    spared = ("embedding.weight", "layers.0.mlp.up.weight", "layers.1.mlp.up.weight")
    run = built(f"{words} --lr-embedding 5e-3 --lr-head 2e-3 --lr-vectors 7e-3 --no-weight-decay-on embedding.* *.mlp.up.weight")
    before = {name: w.clone() for name, w in named(run).items()}
    stepping(run).start()
    for name, g in named(run, "grad_slice").items():
        rate = next((r for part, r in own.items() if part in name), 1e-3)
        decay = 0.0 if name in spared or g.dim() == 1 else 0.5
        assert torch.allclose(named(run)[name], before[name] - rate * (g + decay * before[name]), rtol=1e-15, atol=1e-17), name


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 100)])
def test_an_iteration_is_torchs_as_far_as_bf16_goes(shape: tuple[int, int]) -> None:
    """Eight bits, and singular values of a hundredth of the largest are stretched a hundred times over: a few per cent of an update. In float64 it
    is what both come near."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = g.clone()
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    scale = SCALES["shape_scaling"](*shape)
    exact, ours = (-scale * orthogonal(g.to(dtype), 5, "simple").double() for dtype in (torch.float64, torch.bfloat16))
    assert (p.double() - exact).norm() <= 0.04 * exact.norm() and (ours - exact).norm() <= 0.04 * exact.norm()
