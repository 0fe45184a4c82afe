"""megazero.initialize: DeepSpeed's introductory snippet on one and two ranks, at all levels and in all dtypes, equals plain torch; and what else
of DeepSpeed's words scripts use."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ds_configs import CPU, TUTORIALS
from plain_rules import PLAIN, Plain, muon
from pool import Pool, RankError
from torch import nn

import megazero
from megazero.base.errors import UserError
from megazero.engine import full
from megazero.engine.full import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from megazero.engine.optimizers import FusedLamb, FusedLion

transformers = pytest.importorskip("transformers", reason="the model is transformers' OPT, which is not installed")
Tensor = torch.Tensor
WORDS, LENGTH, BATCH, GAS, STEPS, LR = 61, 12, 8, 2, 4, 1e-2


def opt() -> nn.Module:
    torch.manual_seed(int(os.environ.get("RANK", 0)))           # rank 0's weights count
    config = transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4, vocab_size=WORDS, dropout=0.0,
                                    max_position_embeddings=32, word_embed_proj_dim=32)
    return transformers.OPTForCausalLM(config).train()                                           # type: ignore[no-any-return]


def data(step: int) -> Tensor:
    return torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def loss(model: Any, ids: Tensor) -> Tensor:
    """In the wider of fp32 and the model's dtype. (transformers' own is taken in fp32.)"""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def introduction(level: int, kind: str, **more: Any) -> dict[str, Any]:
    config = {"train_batch_size": BATCH, "gradient_accumulation_steps": GAS, "gradient_clipping": 0.5,
              "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1, "eps": 1e-5}},
              "zero_optimization": {"stage": level, "offload_optimizer": CPU, "offload_param": CPU}}
    return config | ({kind: {"enabled": True}} if kind in ("fp16", "bf16") else {}) | ({"fp16": {"enabled": True, "initial_scale_power": 8}}
                                                                                       if kind == "fp16" else {}) | more


def mine(e: Any, step: int) -> list[Tensor]:
    """This rank's micro-batches."""
    n = e.gradient_accumulation_steps()
    return list(data(step).chunk(n * e.world_size)[e.global_rank * n:(e.global_rank + 1) * n])


Curve = list[tuple[float, float]]


def train(e: Any, steps: range = range(STEPS)) -> Curve:
    """(this rank's mean loss, norm of all) of each step."""
    found = []
    for step in steps:
        losses = []
        for ids in mine(e, step):
            mean = loss(e, ids)
            e.backward(mean)
            e.step()
            losses.append(mean.item())
        found.append((sum(losses) / len(losses), e.get_global_grad_norm()))
    return found


def snippet(level: int, kind: str) -> Curve:
    """DeepSpeed's introduction."""
    model = opt().double() if kind == "fp64" else opt()
    model_engine, optimizer, _, _ = megazero.initialize(model=model, config=introduction(level, kind))
    return train(model_engine)


@cache
def plain(kind: str) -> Curve:
    model = opt().to(torch.float64 if kind == "fp64" else torch.float32)
    return plainly(model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, eps=1e-5))


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None, clip: float = 0.5) -> Curve:
    found = []
    for step in range(STEPS):
        mean = loss(model, data(step))
        mean.backward()                                                                          # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        found.append((mean.item(), norm.item()))
    return found


def together(curves: list[Curve]) -> Curve:
    """Ranks' losses as one, whose norms are the same."""
    return [(sum(loss for loss, _ in step) / len(step), step[0][1]) for step in zip(*curves, strict=True)]


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-3}


def every_level(kind: str) -> list[Curve]:
    return [snippet(level, kind) for level in range(4)]


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("world", [1, 2])
def test_the_introduction_equals_plain_torch(world: int, kind: str, pool: Pool) -> None:
    """On any level; and all levels equal each other, in half precision too."""
    results = pool.run(world, every_level, kind) if world > 1 else [every_level(kind)]
    levels = [together(list(ranks)) for ranks in zip(*results, strict=True)]
    want = plain(kind)
    assert want[0][1] > 0.5, "clipping should act"
    for curve in levels:
        for got, wanted, first in zip(curve, want, levels[0], strict=True):
            assert got == pytest.approx(wanted, rel=TOLERANCE[kind])
            assert got == pytest.approx(first, rel=1e-5 if kind != "fp64" else 1e-12)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As fine-tuning scripts make them: no decay on vectors, another rate for the embedding."""
    named = list(model.named_parameters())
    table = [p for n, p in named if "embed_tokens" in n]
    return [{"params": [p for n, p in named if p.dim() > 1 and "embed_tokens" not in n], "weight_decay": 0.1},
            {"params": [p for n, p in named if p.dim() < 2], "weight_decay": 0.0}, {"params": table, "lr": LR / 10, "betas": (0.8, 0.9)}]


WARM = {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear", "warmup_min_lr": LR / 5}}


def grouped(level: int) -> tuple[Curve, list[list[float]]]:
    """Groups with a scheduler of the configuration; a rate that is set by hand; and rates that were used."""
    model = opt().double()
    e, optimizer, _, scheduler = megazero.initialize(model=model, model_parameters=groups_of(model), config=introduction(level, "fp64", scheduler=WARM))
    assert len(optimizer.param_groups) == 3 and scheduler is e.lr_scheduler
    curve, rates = [], []
    for step in range(STEPS):
        optimizer.param_groups[1]["lr"] *= 2
        rates.append(e.get_lr())
        curve += train(e, range(step, step + 1))
    return curve, rates


def each_level_grouped() -> list[tuple[Curve, list[list[float]]]]:
    return [grouped(level) for level in range(4)]


def test_groups_and_a_schedule_equal_plain_torch(pool: Pool) -> None:
    model = opt().double()
    optimizer = torch.optim.AdamW(groups_of(model), lr=LR, weight_decay=0.1, eps=1e-5)
    part = [0, 0, 1 / 3, 2 / 3]                                 # of the warm-up, before each step
    rates = [[LR / 5 + (lr - LR / 5) * p for lr in (LR, LR, LR / 10)] for p in part]
    rates = [[a, 2 * b, c] for a, b, c in rates]
    want = []
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, rates[step], strict=True):
            group["lr"] = lr
        mean = loss(model, data(step))
        mean.backward()                                                                          # type: ignore[no-untyped-call]
        want.append((mean.item(), nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()))
        optimizer.step()
        optimizer.zero_grad()
    for found in zip(*pool.run(2, each_level_grouped), strict=True):
        assert all(used == [pytest.approx(r, rel=1e-12) for r in rates] for _, used in found)
        for got, wanted in zip(together([curve for curve, _ in found]), want, strict=True):
            assert got == pytest.approx(wanted, rel=1e-12)


def clients(kind: str, how: str) -> tuple[Curve, bool]:
    """A torch optimizer of the user's own and a torch scheduler on it; are its groups the engine's?"""
    model, config = opt().double(), introduction(2, "fp64")
    del config["optimizer"]
    made: Any = {"adamw": lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.1, eps=1e-5),
                 "adam": lambda ps: torch.optim.Adam(ps, lr=LR, weight_decay=0.1, eps=1e-5),
                 "lamb": lambda ps: FusedLamb(ps, lr=LR, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-5, min_coeff=0.0, max_coeff=1e9),
                 "lion": lambda ps: FusedLion(ps, lr=LR, weight_decay=0.1, betas=(0.8, 0.7)),
                 "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=LR, weight_decay=0.1, beta2_decay=-0.6, eps=(None, 0.02)),
                 "sgd": lambda ps: torch.optim.SGD(ps, lr=10 * LR, momentum=0.9, nesterov=True)}[kind]
    optimizer = made if how == "callable" else made(groups_of(model))
    falling: Any = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)                      # noqa: E731
    e, shown, _, _ = megazero.initialize(model=model, optimizer=optimizer, config=config, model_parameters=groups_of(model),
                                         lr_scheduler=falling if how == "callable" else falling(optimizer))
    same = how == "callable" or all(a is b for a, b in zip(shown.param_groups, optimizer.param_groups, strict=True))
    return train(e), same


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "lamb", "lion", "adafactor"])
def test_an_optimizer_and_a_scheduler_of_the_users_own(kind: str, pool: Pool) -> None:
    for how in ("callable", "object"):
        found = pool.run(2, clients, kind, how)
        model = opt().double()
        optimizer = {"adamw": lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.1, eps=1e-5),
                     "adam": lambda ps: torch.optim.Adam(ps, lr=LR, weight_decay=0.1, eps=1e-5),
                     "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=LR, weight_decay=0.1, beta2_decay=-0.6, eps=(None, 0.02)),
                     "lamb": lambda ps: Plain(ps, PLAIN["lamb"], LR, 0.1), "lion": lambda ps: Plain(ps, PLAIN["lion"], LR, 0.1),
                     "sgd": lambda ps: torch.optim.SGD(ps, lr=10 * LR, momentum=0.9, nesterov=True)}[kind](groups_of(model))
        want = plainly(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        assert all(same for _, same in found)
        for got, wanted in zip(together([curve for curve, _ in found]), want, strict=True):
            assert got == pytest.approx(wanted, rel=1e-12)


MUON = {"type": "Muon", "params": {"muon_lr": 2 * LR, "adam_lr": LR, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-5}}


def with_muon() -> list[Curve]:
    return [train(megazero.initialize(model=opt().double(), config=introduction(level, "fp64", optimizer=MUON))[0]) for level in range(4)]


def test_muon_of_a_configuration_is_of_matrices_and_adam_of_the_rest(pool: Pool) -> None:
    """DeepSpeed's: look-ahead, its oldest coefficients, updates as the root of out / in where that is above 1; embeddings and head have Adam."""
    model = opt().double()
    named = {p: n for n, p in model.named_parameters()}
    matrices = [p for p, n in named.items() if p.dim() > 1 and "embed" not in n]
    assert len(matrices) == 2 * 6
    both = [Plain(matrices, muon(0.9, True, "simple", "shape_scaling"), 2 * LR, 0.1),
            torch.optim.AdamW([p for p in named if p not in set(matrices)], lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)]
    optimizer: Any = SimpleNamespace(step=lambda: [o.step() for o in both], zero_grad=lambda: [o.zero_grad() for o in both])
    want = plainly(model, optimizer)
    for found in zip(*pool.run(2, with_muon), strict=True):
        for got, wanted in zip(together(list(found)), want, strict=True):
            assert got == pytest.approx(wanted, rel=1e-12)


# ---- one process

SMALL: dict[str, Any] = {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": LR}}}


def small(config: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    return megazero.initialize(model=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), config=SMALL if config is None else config, **more)


def move(e: Any, spoil: float = 1.0) -> None:
    e.backward(e(torch.ones(4, 3)).square().mean() * spoil)
    e.step()


@pytest.mark.parametrize("name", [name for name, (_, wrong) in TUTORIALS.items() if wrong is None])
def test_a_tutorials_configuration_runs(name: str) -> None:
    e = small(TUTORIALS[name][0])[0]
    for _ in range(e.gradient_accumulation_steps()):
        e.backward(e(torch.ones(4, 3)).square().mean())
        e.step()
    assert e.global_steps == 1 and e.get_global_grad_norm() is not None


def test_a_skipped_step_moves_no_schedule() -> None:
    e, optimizer, _, scheduler = small({**SMALL, "scheduler": WARM})
    move(e)
    assert (e.was_step_applied(), scheduler.last_batch_iteration, optimizer.overflow) == (True, 0, False)
    before, weights = e.get_lr(), [p.clone() for p in e.parameters()]
    move(e, spoil=torch.inf)
    assert (e.was_step_applied(), scheduler.last_batch_iteration, optimizer.overflow, e.skipped_steps, e.global_steps) == (False, 0, True, 1, 2)
    assert e.get_lr() == before and all(torch.equal(a, b) for a, b in zip(weights, e.parameters(), strict=True))
    move(e)
    assert e.was_step_applied() and scheduler.last_batch_iteration == 1 and e.skipped_steps == 1 and e.get_lr() != before
    resumed = small({**SMALL, "scheduler": WARM})[3]
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr() == e.get_lr()


def test_one_cycle_moves_the_first_beta_of_adam() -> None:
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3, "cycle_first_step_size": 2}}
    e = small({**SMALL, "scheduler": cycle})[0]
    seen = []
    for _ in range(3):
        seen.append((e.get_lr()[0], *e.get_mom()[0], *(g["betas"][0] for ks in e.core.updater.kernels.values() for k in ks[None] for g in k.param_groups)))
        move(e)
    assert [s[:3] for s in seen] == [pytest.approx((0.1, 0.8, 0.99)), pytest.approx((0.2, 0.85, 0.99)), pytest.approx((0.3, 0.8, 0.99))]
    assert next(iter(e.core.updater.kernels.values()))[None][0].param_groups[0]["betas"] == pytest.approx((0.8, 0.99))
    e = small({**SMALL, "scheduler": cycle, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}})[0]
    move(e)
    assert e.get_mom() == [0.5] and e.get_lr() == pytest.approx([0.2])


def test_where_a_step_ends() -> None:
    e = small({**SMALL, "gradient_accumulation_steps": 2})[0]
    seen = []
    for micro in range(4):
        seen.append(e.is_gradient_accumulation_boundary())
        mean = e(torch.ones(2, 3)).mean()
        e.backward(mean) if micro < 2 else mean.backward()
        seen.append(e.is_gradient_accumulation_boundary())
        if micro == 0:
            assert not e.was_step_applied() and not e.optimizer.overflow
        e.step()
    assert seen == [False, False, True, True] * 2 and (e.global_steps, e.micro_steps, e.global_samples) == (2, 4, 8)
    e.zero_grad()
    assert e.was_step_applied() and not e.optimizer.overflow and e.get_batch_info() == (4, 2, 2)
    e.set_train_batch_size(6)
    assert e.get_batch_info() == (6, 2, 3)
    for _ in range(3):
        assert e.global_steps == 2
        e.backward(e(torch.ones(2, 3)).mean())
        e.step()
    assert e.global_steps == 3
    with pytest.raises(UserError, match="set_train_batch_size: 5 is no multiple of 2"):
        e.set_train_batch_size(5)
    e.backward(e(torch.ones(2, 3)).mean())
    with pytest.raises(UserError, match="set_train_batch_size: a step is under way"):
        e.set_train_batch_size(4)
    e.step(partial=True)
    assert e.was_step_applied() and (e.global_steps, e.global_samples) == (4, 16)


def test_a_step_ends_where_the_script_says() -> None:
    """As accelerate does it, where a short step is divided as a full one; within no_sync too, and gradients that are dropped do not count."""
    norms = []
    for how in range(3):
        e = small({**SMALL, "train_batch_size": 12, "gradient_accumulation_steps": 3})[0]
        if how == 2:
            e.backward(e(torch.ones(4, 3)).sum())
            e.optimizer.zero_grad()
        for last in (False, True):
            if how == 0:
                e.set_gradient_accumulation_boundary(is_boundary=last)
                assert e.is_gradient_accumulation_boundary() == last
            with e.no_sync() if how == 1 and not last else nullcontext():
                e.backward(e(torch.full((4, 3), 1.0 + last)).square().mean())
            e.step(partial=last and how > 0)
            assert e.was_step_applied() == last
        norms.append(e.get_global_grad_norm())
    assert norms[0] * 3 / 2 == pytest.approx(norms[1], rel=1e-6) == pytest.approx(norms[2], rel=1e-6)         # two micro-batches of three


def test_a_loss_that_is_divided_already() -> None:
    norms = []
    for divided in (False, True):
        e = small({**SMALL, "gradient_accumulation_steps": 2})[0]
        for _ in range(2):
            mean = e(torch.ones(2, 3)).square().mean()
            back = e.backward(mean / 2 if divided else mean, scale_wrt_gas=not divided)
            assert back.item() == pytest.approx(mean.item() / 2) and not back.requires_grad
            e.step()
        norms.append(e.get_global_grad_norm())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_lines_that_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    e = small({**SMALL, "steps_per_print": 2, "wall_clock_breakdown": True, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}})[0]
    for _ in range(3):
        move(e)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "config: gradient_clipping is 1.0, the default, as in DeepSpeed 0.19.8; 0 turns it off"
    assert told[1] == "config: without effect here: wall_clock_breakdown (nothing is timed or listed)"
    assert len(told) == 3 and told[2].startswith("step 2: loss 0.") and told[2].endswith(", lr 0.5, skipped 0")


def test_curves_are_drawn_and_written(tmp_path: Path) -> None:
    """As DeepSpeed's monitors name them, over samples; the loss scale in fp16 alone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    place = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    e = small({**SMALL, "tensorboard": place, "csv_monitor": place, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}})[0]
    losses = []
    for _ in range(2):
        move(e)
        losses.append(e.core.verdict.loss.item())
    tables = {p.name: p.read_text() for p in (tmp_path / "job").glob("*.csv")}
    assert tables == {"Train_Samples_train_loss.csv": f"step,train_loss\n4,{losses[0]}\n8,{losses[1]}\n", "Train_Samples_lr.csv": "step,lr\n4,0.5\n8,0.5\n"}
    board = EventAccumulator(str(tmp_path / "job" / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("Train/Samples/train_loss")] == [(4, pytest.approx(losses[0])), (8, pytest.approx(losses[1]))]
    e = small({**SMALL, "fp16": {"enabled": True, "loss_scale": 8}, "csv_monitor": {**place, "job_name": "half"}})[0]
    move(e)
    assert (tmp_path / "half" / "Train_Samples_loss_scale.csv").read_text() == "step,loss_scale\n4,8.0\n"


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_inputs_are_cast_as_weights_are(kind: str) -> None:
    assert small({**SMALL, kind: {"enabled": True}})[0](torch.ones(4, 3)).dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]


def test_other_names_are_the_modules_or_told() -> None:
    e = small()[0]
    e.module.colour = "red"
    assert e.colour == "red" and e.train_micro_batch_size_per_gpu() == 4 and e.config == SMALL and not e.eval().module.training
    with pytest.raises(AttributeError, match="engine.train_batch: is not here yet"):
        e.train_batch()
    assert not hasattr(e, "nothing")
    with pytest.raises(UserError, match=r"optimizer.step\(\): the engine changes the weights; write engine.step"):
        e.optimizer.step()
    given = e.optimizer.state_dict()
    with pytest.raises(UserError, match=r"has groups of \[1, 1\] parameters, there are"):
        e.optimizer.load_state_dict({**given, "param_groups": [{"params": [0]}, {"params": [1]}]})
    whole = [list(small({**SMALL, "zero_optimization": {"stage": level}})[0].state_dict().values()) for level in (0, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))
    for call, words in ((lambda: e.step(lr_kwargs={"x": 1}), "step: lr_kwargs is given"), (lambda: e.backward(torch.ones(2)), "backward: a loss of shape")):
        with pytest.raises(UserError, match=words):
            call()


def test_arguments_as_deepspeeds_scripts_give_them(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(SMALL) + " // of a script")
    parser = megazero.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    assert args.deepspeed
    model = nn.Linear(2, 2)
    for named in ({"args": args}, {"config": str(path)}, {"config_params": SMALL}):
        assert megazero.initialize(model=model, model_parameters=model.parameters(), **named)[0].train_batch_size() == 4
    with pytest.raises(UserError, match="config: is given more than once"):
        megazero.initialize(args=args, model=model, config=SMALL)
    megazero.init_distributed()                                 # one process by itself: nothing to do


@pytest.mark.parametrize("level", [0, 3])
def test_without_an_optimizer_weights_are_frozen_and_shared(level: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.ones(3, 2, requires_grad=True)
    wanted = model(x)
    e, optimizer, _, scheduler = megazero.initialize(model=model, config={**BARE, "zero_optimization": {"stage": level}})
    assert optimizer is None and scheduler is None and e.get_lr() == []
    assert torch.equal(e(x), wanted) and not any(p.requires_grad for p in model.parameters())
    e(x).sum().backward()                                       # a part of another model's loss
    assert x.grad is not None
    with pytest.raises(UserError, match=r"backward: this engine has no optimizer; write config optimizer, or give initialize one"):
        e.backward(e(x).sum())
    e.destroy()
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(model(x), wanted)


def looked(level: int) -> list[list[Tensor]]:
    """Gradients, masters and moments of all parameters in the second step; the third is made with other ones."""
    model = opt().double()
    e = megazero.initialize(model=model, config=introduction(level, "fp64"))[0]
    found = []
    for step in range(3):
        assert safe_get_full_grad(next(model.parameters())) is None
        for ids in mine(e, step):
            e.backward(loss(e, ids))
        gradients = [safe_get_full_grad(p) for p in model.parameters()]
        if step == 2:
            for p, grad in zip(model.parameters(), gradients, strict=True):
                safe_set_full_grad(p, torch.zeros_like(grad))
                safe_set_full_fp32_param(p, torch.full_like(grad, 0.5))
                for key in ("exp_avg", "exp_avg_sq"):
                    safe_set_full_optimizer_state(p, torch.zeros_like(grad), key)
        before = [safe_get_full_fp32_param(p) for p in model.parameters()]
        moments = [safe_get_full_optimizer_state(p, "exp_avg") for p in model.parameters()]
        e.step()
        found.append([*gradients, *before, *moments])
    found.append(list(e.module.state_dict().values()))
    with pytest.raises(UserError, match="optimizer state exp: is not there; write one of exp_avg, exp_avg_sq"):
        safe_get_full_optimizer_state(next(model.parameters()), "exp")
    assert safe_get_full_grad(nn.Parameter(torch.ones(1))) is None
    return found


def test_a_parameter_is_seen_and_set_whole(pool: Pool) -> None:
    """Against plain torch's p.grad, p and state; zero gradients and moments leave decay alone."""
    model = opt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1, eps=1e-5)
    wanted = []
    for step in range(2):
        optimizer.zero_grad()
        loss(model, data(step)).backward()                                                       # type: ignore[no-untyped-call]
        ps = list(model.parameters())
        wanted.append([p.grad.clone() for p in ps] + [p.detach().clone() for p in ps]            # type: ignore[union-attr]
                      + [optimizer.state[p]["exp_avg"].clone() if step else torch.zeros_like(p) for p in ps])
        nn.utils.clip_grad_norm_(ps, 0.5)
        optimizer.step()
    for level in range(4):
        for found in pool.run(2, looked, level):
            for step in range(2):
                for a, b in zip(found[step], wanted[step], strict=True):
                    assert a.shape == b.shape and (a - b).abs().max() < 1e-12
            assert all((t - 0.5 * (1 - LR * 0.1)).abs().max() < 1e-12 for t in found[3])


class Own(torch.optim.AdamW):
    """Somebody's."""


def begun(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()                                          # type: ignore[union-attr]
    optimizer.step()
    return optimizer


BARE = {"train_batch_size": 4}


@pytest.mark.parametrize("make, words", [
    (lambda m: {"config": None}, "config: is missing; give initialize"),
    (lambda m: {"model": None}, "model: is a NoneType; give a torch.nn.Module"),
    (lambda m: {"model": [m]}, "model: is a list"),
    (lambda m: {"model": type("PipelineModule", (nn.Linear,), {})(2, 2)}, "model: has a PipelineModule of DeepSpeed, which is not here yet"),
    (lambda m: {"mpu": object()}, "mpu: is given, but all ranks are data-parallel ranks"),
    (lambda m: {"mesh_param": (1, 2)}, r"mesh_param: is \(1, 2\)"),
    (lambda m: {"config": BARE, "model_parameters": m.parameters()}, "optimizer: is missing; write config optimizer, or give one"),
    (lambda m: {"optimizer": torch.optim.SGD(m.parameters())}, "optimizer: is given, and config has one too; keep one"),
    (lambda m: {"config": BARE, "optimizer": torch.optim.Adagrad(m.parameters())}, "Adagrad: is not known to run over slices; give one of torch.optim.Adam"),
    (lambda m: {"config": BARE, "optimizer": Own(m.parameters())}, "Own: is not known to run over slices"),
    (lambda m: {"config": BARE, "optimizer": torch.optim.Adam(m.parameters(), amsgrad=True)}, "model_parameters: group 0: its amsgrad is True, which is not here"),
    (lambda m: {"config": BARE, "optimizer": torch.optim.SGD(m.parameters(), momentum=0.9, dampening=0.5)}, "model_parameters: group 0: its dampening is 0.5"),
    (lambda m: {"config": BARE, "optimizer": begun(m)}, "optimizer AdamW: has made steps, whose moments would be lost"),
    (lambda m: {"config": {**SMALL, "scheduler": WARM}, "lr_scheduler": lambda o: o}, "lr_scheduler: is given, and config has a scheduler too"),
    (lambda m: {"config": {**SMALL, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-3, 1e-4]}}}}, "warmup_max_lr: has 2 values for 1 groups"),
    (lambda m: {"model_parameters": [m.weight]}, "model_parameters: bias requires a gradient and is in no group"),
    (lambda m: {"model_parameters": ["weight"]}, "model_parameters: .* give parameters, or mappings with params"),
    (lambda m: {"model_parameters": [{"params": [m.weight]}, {"params": [m.weight, m.bias]}]}, "model_parameters: .*more than one parameter group"),
    (lambda m: {"model": m.half()}, "bf16.enabled: is false, and so is fp16.enabled, but parameters of the model are float16; set one of the two"),
    (lambda m: {"config": {**SMALL, "stage": 3}}, r"did you mean zero_optimization.stage"),
])
def test_a_mistake_is_one_sentence(make: Any, words: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=words) as told:
        megazero.initialize(**{"model": model, "config": SMALL, **make(model)})
    assert len(told.value.sentences) == 1


def test_ranks_that_have_not_joined_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="dist_init_required: is False, but the 2 ranks have not joined; leave it out"):
        small(dist_init_required=False)
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match=r"MASTER_ADDR \(none\), MASTER_PORT 29500: ranks cannot meet there"):
        small()


def test_a_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node: NCCL needs a CUDA device for each rank and this machine has 2; start 2 here, or set DS_ACCELERATOR=cpu"):
        small()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert small()[0].device.type == "cpu"


def test_import_megazero_imports_no_torch() -> None:
    code = "import sys, megazero; assert 'torch' not in sys.modules; print(megazero.__version__, hasattr(megazero, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    assert done.stdout.split() == [megazero.__version__, "False"]


# ---- data over ranks

class Squares(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, i: int) -> Tensor:
        if i >= 21:
            raise IndexError
        return torch.tensor(float(i))


class Endless(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def loaded(drop: bool, by_hand: bool) -> tuple[list[list[float]], list[int], int]:
    """What a rank reads; by another route; ranks that the engine knows."""
    import torch.distributed as dist
    if by_hand:                                                 # as a program does that was not started by torchrun
        rank, world = (int(os.environ.pop(name)) for name in ("RANK", "WORLD_SIZE"))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    else:
        megazero.init_distributed(dist_backend="gloo")
        assert dist.is_initialized()
    e, _, loader, _ = megazero.initialize(model=nn.Linear(2, 2), training_data=Squares(), collate_fn=lambda xs: torch.stack(xs) * 10,
                                          config={**SMALL, "train_batch_size": 6, "dataloader_drop_last": drop})
    assert loader is e.training_dataloader
    with pytest.raises(UserError, match="training_data: Endless has no length, and each of 2 ranks would read all of it"):
        e.deepspeed_io(Endless())
    return [batch.tolist() for batch in loader], [len(b) for b in e.deepspeed_io(Squares(), batch_size=10, route="eval")], e.world_size


@pytest.mark.parametrize("drop, by_hand", [(False, False), (True, True)])
def test_training_data_is_shared_by_ranks(drop: bool, by_hand: bool, pool: Pool) -> None:
    found = pool.run(2, loaded, drop, by_hand)
    lengths = [[len(b) for b in batches] for batches, _, _ in found]
    assert lengths == [[3, 3, 3] if drop else [3, 3, 3, 2]] * 2
    read = [x for batches, _, _ in found for b in batches for x in b]
    assert drop or sorted(set(read)) == [10.0 * i for i in range(21)]
    assert len(read) - len(set(read)) <= 1, "ranks read other samples"
    assert all(by_route == ([10, 10] if drop else [10, 10, 1]) and world == 2 for _, by_route, world in found)


def test_one_rank_reads_a_stream() -> None:
    assert [b.tolist() for b in small(training_data=Endless())[2]] == [[0, 1, 2]]


def must_agree() -> None:
    """Each rank with a configuration of its own."""
    small({**SMALL, "train_batch_size": 4 + 2 * int(os.environ["RANK"])})


def test_ranks_have_one_configuration(pool: Pool) -> None:
    with pytest.raises(RankError, match="ranks were started with different flags, files or data"):
        pool.run(2, must_agree)


# ---- what cannot be meant

def step_twice(e: Any) -> None:
    for _ in range(2):
        move(e)


MISUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a loss that is a number": (lambda e: e.backward(1.0), "backward: a loss of kind float; give a tensor of one number"),
    "a loss that is none": (lambda e: e.backward(None), "backward: a loss of kind NoneType; give a tensor"),
    "a mapping": (lambda e: e.backward({"loss": 1}), "backward: a loss of kind dict"),
    "tokens of two": (lambda e: e.backward(e(torch.ones(4, 3)).mean(), tokens=torch.ones(2)), "backward: tokens is .*; give the number of those"),
    "negative tokens": (lambda e: e.backward(e(torch.ones(4, 3)).mean(), tokens=-1), "backward: tokens is -1; give the number"),
    "tokens in words": (lambda e: e.backward(e(torch.ones(4, 3)).mean(), tokens="a"), "backward: tokens is a; give the number"),
    "a value that is none": (lambda e: full.safe_set_full_fp32_param(e.module[0].weight, None), "safe_set_full: a value of kind NoneType; give a tensor"),
    "a value turned round": (lambda e: full.safe_set_full_fp32_param(e.module[0].weight, torch.ones(3, 5)), r"a value of shape \[3, 5\]; .* shape \[5, 3\]"),
    "a moment too long": (lambda e: full.safe_set_full_optimizer_state(e.module[0].weight, torch.ones(99), "exp_avg"), r"a value of shape \[99\]; .* shape \[5, 3\]"),
    "no state": (lambda e: e.optimizer.load_state_dict({}), "optimizer.load_state_dict: has no state and param_groups"),
    "a state without a moment": (lambda e: without_a_moment(e), r"optimizer state: has no exp_avg of 0.weight of shape \[5, 3\]; give what state_dict\(\) gave"),
    "another group": (lambda e: e.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), "optimizer.add_param_group: the engine holds its parameters already"),
    "a batch in words": (lambda e: e.set_train_batch_size("8"), "set_train_batch_size: 8 is no multiple of 4"),
    "a batch that is no whole number": (lambda e: e.set_train_batch_size(8.0), "set_train_batch_size: 8.0 is no multiple of 4"),
    "no folder to save to": (lambda e: e.save_checkpoint(None), "save_checkpoint: the folder is a NoneType; give its path"),
    "no folder to load": (lambda e: e.load_checkpoint(None), "load_checkpoint: the folder is a NoneType; give its path"),
    "a list that a client keeps": (lambda e: e.save_checkpoint("nowhere", client_state=[1]), "save_checkpoint: client_state is a list; give a mapping"),
}


def without_a_moment(e: Any) -> None:
    state = e.optimizer.state_dict()
    del state["state"][0]["exp_avg"]
    e.optimizer.load_state_dict(state)


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("case", MISUSED)
def test_what_cannot_be_meant_is_one_sentence_and_training_goes_on(case: str, level: int) -> None:
    act, said = MISUSED[case]
    e, plain = (small({**SMALL, "zero_optimization": {"stage": level}})[0] for _ in range(2))
    step_twice(plain)
    move(e)
    with pytest.raises(UserError, match=said):
        act(e)
    e.zero_grad()
    move(e)
    for a, b in zip(e.module_state_dict().values(), plain.module_state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("group", "said"), [
    ({"lr": -1}, "group 1: its lr is -1; write numbers from 0"), ({"lr": "x"}, "group 1: its lr is x; write numbers"), ({"betas": (2, 3)}, r"group 1: its betas is \(2, 3\); write numbers from 0, below 1"),
    ({"weight_decay": None}, "group 1: its weight_decay is None"), ({"amsgrad": True}, "group 1: its amsgrad is True, which is not here; leave it out"),
    ({"params": None}, "group 1 has no params; give it a list of parameters")])
def test_options_of_groups_that_cannot_be_are_told(group: dict[str, Any], said: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    second = {"params": list(model[1].parameters()), **group}
    given = [{"params": list(model[0].parameters())}, {k: v for k, v in second.items() if k != "params" or v is not None}]
    with pytest.raises(UserError, match=f"model_parameters: {said}"):
        megazero.initialize(model=model, model_parameters=given, config=SMALL)


def test_parameters_of_no_group_and_of_another_module_are_told_before_anything_changes() -> None:
    model, other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), nn.Parameter(torch.ones(7))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for given, said in ((list(model[0].parameters()), "2.weight requires a gradient and is in no group"),
                        ([*model.parameters(), other], r"a parameter of shape \[7\] is in a group and not in the model; make it a part")):
        with pytest.raises(UserError, match=said):
            megazero.initialize(model=model, model_parameters=given, config={**SMALL, "zero_optimization": {"stage": 3}})
        assert all(torch.equal(t, before[n]) and type(t) is Tensor for n, t in model.state_dict().items())
    move(megazero.initialize(model=model, config=SMALL)[0])
    with pytest.raises(UserError, match="lr_scheduler: is given, and there is no optimizer"):
        megazero.initialize(model=model, lr_scheduler=lambda o: o, config={"train_batch_size": 4})


HALF = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW"}, "gradient_clipping": 0.0,
        "fp16": {"enabled": True, "initial_scale_power": 9, "hysteresis": 1, "loss_scale_window": 3}}


def test_the_loss_scale_is_that_after_the_last_step(tmp_path: Path) -> None:
    """When it is saved, and when it is asked: not that of the verdict that was read last."""
    e = small(HALF)[0]
    for spoil in (1.0, torch.inf):
        for _ in range(2):
            move(e, spoil)
    e.save_checkpoint(tmp_path)
    other = small(HALF)[0]
    other.load_checkpoint(tmp_path)
    assert other.core.scale == e.core.scale and other.optimizer.loss_scale == e.optimizer.loss_scale == 256


def test_the_loss_scale_stays_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain backward passes of a step after one that overflowed, with somebody who asks in between."""
    norms = []
    for asks in (False, True):
        e = small(HALF)[0]
        for step in range(2):
            for i in range(2):
                (e(torch.ones(4, 3).half()).float().square().mean() * (torch.inf if step == 0 else 1)).backward()
                if i == 0 and asks:
                    assert e.skipped_steps == step
                e.step()
        norms.append(e.get_global_grad_norm())
        assert e.skipped_steps == 1
    assert norms[0] == norms[1]
