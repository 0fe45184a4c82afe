"""The engine in one process: what it catches, what it refuses, evaluation in between, half precision."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import MODELS, VOCABULARY, Critic, loss
from test_engine_parity import HOW, LR, STEPS, Row, alive, data, engine, held, made, wires
from torch import nn

from megazero.base.errors import UserError
from megazero.comm.wires import connect
from megazero.engine import engine as source
from megazero.engine.blocks import Submodule
from megazero.engine.engine import CONSTANT, Engine
from megazero.engine.hidden import Hidden
from megazero.plan.mesh import Mesh
from megazero.plan.program import Zero
from megazero.plan.progress import LossScale
from megazero.settings.config import Optimization as Settings

pytest.importorskip("transformers", reason="the module is transformers' GPT-2, which is not installed")
Tensor = torch.Tensor


# torch's own words where weights stay, ours where they come and go
IN_PLACE, STALE = "modified by an inplace operation", "weights of .* as of step 0, but they are those of step 1 now; run the forward pass again"


def test_a_stale_handle_is_caught() -> None:
    for level in range(4):
        e = engine(Row(level=level))
        late = loss(e, data(0))
        e.backward(loss(e, data(0)))
        e.step()
        with pytest.raises(UserError if level == 3 else RuntimeError, match=STALE if level == 3 else IN_PLACE):
            e.backward(late)
        verdict = e.step()                                      # what it had of gradients is dropped, and training goes on
        assert verdict is not None and verdict.found_inf and e.skipped_steps == 1 and not e.was_step_applied()
        e.backward(loss(e, data(0)))
        assert (e.step() or verdict).found_inf == 0 and e.was_step_applied()


@pytest.mark.parametrize(("level", "told"), [(0, IN_PLACE), (3, r"a tensor of shape \(192, 12\) that backward needs was changed in place")])
def test_a_change_in_place_is_caught(level: int, told: str) -> None:
    e = engine(Row("odd", level=level))
    hidden = []
    e.module.head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))         # type: ignore[operator, union-attr]
    mean = loss(e, data(0))
    with torch.no_grad():
        hidden[0].add_(1)
    with pytest.raises(RuntimeError, match=told):
        e.backward(mean)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_changes_nothing(model: str, mode: Any) -> None:
    """Before, between and after forward and backward; at level 3 nothing stays gathered. Nor does a forward pass that is dropped."""
    plain, watched = (engine(Row(model, level=3, accumulation=2)) for _ in range(2))

    def evaluate() -> float:
        watched.module.eval()
        with mode():
            found = loss(watched, data(9)).item()
        watched.module.train()
        return found

    first = evaluate()
    assert not watched.addresses and all(type(p) is Hidden for p in watched.module.parameters())
    for ids in data(0).chunk(2):
        for e in (plain, watched):
            mean = loss(e, ids)
            if e is watched:
                assert evaluate() == first
            e.backward(mean)
            e.step()
    assert evaluate() != first and not watched.left
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(held(plain, "master"), held(watched, "master"), strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recompute", HOW)
def test_forward_passes_may_all_come_first(model: str, recompute: str) -> None:
    """Two, then both backward, or backward of their sum: as one after the other."""
    found = []
    for together, summed in ((False, False), (True, False), (True, True)):
        e = engine(Row(model, level=3, recompute=recompute, accumulation=1 if summed else 2))
        passes = [partial(loss, e, ids) for ids in data(0).chunk(2)]
        means = [run() for run in passes] if together else []
        for i, run in enumerate([] if summed else passes):
            e.backward(means[i] if together else run())
            e.step()
        if summed:
            e.backward(sum(means, torch.zeros(())) / 2)
            e.step()
        found.append(held(e, "master"))
    for other in found[1:]:
        assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for (_, _, a), (_, _, b) in zip(other, found[0], strict=True))


def test_a_forward_pass_that_is_dropped_leaves_nothing() -> None:
    e = engine(Row("odd", level=3))
    found = []
    for _ in range(3):
        loss(e, data(0))
        found.append(alive())
    assert found[1] == found[2]


class Skipping(nn.Module):
    """Calls the blocks that it is told to call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor, call: list[int]) -> Tensor:
        for i in call:
            x = self.blocks[i](x)
        return x.sum()


def test_a_block_that_is_gathered_ahead_and_not_called_is_released() -> None:
    """And calls in another order than last time gather nothing ahead, so that no more than two blocks are ever whole."""
    e = Engine(Skipping(), wires(Row()), Settings(lr=LR), Zero(3))
    for call in ([0, 1, 2, 3, 4, 5], [0, 1], [2, 0, 3, 1, 4, 5], [5, 2, 0, 3, 1, 4]):
        mean = e(torch.rand(3, 4, requires_grad=True), call)
        assert not e.addresses
        e.backward(mean)
        assert not e.addresses
        e.step()
    unit = e.blocks[0].units[0]
    assert len(unit.sharing.buffers.free[unit.flat.kind, "weights"]) == 2


@pytest.mark.parametrize("overlap, wanted", [(True, "+0 +1 0 +2 1 2 +2 +1 2 +0 1 0"), (False, "+0 0 +1 1 +2 2 +2 2 +1 1 +0 0")])
def test_weights_are_gathered_one_block_ahead(overlap: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """+ begins to gather a block; then it is needed. Forward, then backward."""
    e = engine(Row(level=3, overlap=overlap, accumulation=2))
    happened: list[str] = []

    def gather(block: Submodule, real: Any = Submodule.gather) -> None:
        happened.extend(["+" + block.name[-1]] * (block.units[0].weights is None))
        real(block)

    def arrive(block: Submodule, real: Any = Submodule.arrive) -> None:
        happened.extend([block.name[-1]] * (happened[-1:] != [block.name[-1]]))
        real(block)

    e.backward(loss(e, data(0)))                                # the order is learnt
    monkeypatch.setattr(Submodule, "gather", gather)
    monkeypatch.setattr(Submodule, "arrive", arrive)
    e.backward(loss(e, data(0)))
    assert " ".join(x for x in happened if "t" not in x) == wanted                               # without the root


@pytest.mark.parametrize("kind, options", [
    (torch.optim.AdamW, [{"weight_decay": 0.3}, {"lr": 3e-3, "betas": (0.8, 0.9)}, {"eps": 1e-3}]),
    (torch.optim.Adam, [{"weight_decay": 0.3}, {"decoupled_weight_decay": True, "weight_decay": 0.2}, {"lr": 0.0}]),
    (torch.optim.SGD, [{"weight_decay": 0.3}, {"momentum": 0.9, "nesterov": True, "dampening": 0.0}, {"momentum": 0.5}])])
def test_groups_have_rates_and_options_of_their_own(kind: Any, options: list[dict[str, Any]]) -> None:
    """Three, dealt parameter by parameter; their rates and decay move between steps. As torch's own optimizer, to the last digits."""
    ours, theirs = (MODELS["gpt2"]("none") for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    plain, shown = (kind([{**o, "params": list(m.parameters())[i::3]} for i, o in enumerate(options)], lr=LR) for m in (theirs, ours))
    e = Engine(ours, wires(Row()), Settings("sgd" if kind is torch.optim.SGD else "adam", lr=LR, clip_grad=0.0), Zero(2), "fp64",
               groups=shown.param_groups)
    for step in range(3):
        for optimizer in (plain, shown):
            optimizer.param_groups[0].update(lr=LR / (step + 1), weight_decay=0.1 * step)
        loss(theirs, data(step)).backward()                                                      # type: ignore[no-untyped-call]
        plain.step()
        plain.zero_grad()
        e.backward(loss(e, data(step)))
        e.step()
    e.module.eval()
    loss(e, data(9))                                            # gathers what is old
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12 * q.abs().max(), name


def test_a_parameter_in_no_group_is_told() -> None:
    model = MODELS["odd"]("none")
    first = [{"params": [next(model.parameters())], "lr": 0.1}]
    with pytest.raises(UserError, match="model_parameters: .* requires a gradient and is in no group; put it into one, or freeze it"):
        Engine(model, wires(Row()), Settings(lr=LR), Zero(), groups=first)


def in_dtype(dtype: str, scale: float = 0.0) -> tuple[list[float], float]:
    """Losses of the steps that were not skipped, and the loss scale before the last one. 0: a constant one."""
    torch.manual_seed(0)
    e = Engine(MODELS["gpt2"]("none"), wires(Row()), Settings(lr=LR), Zero(3), dtype, scale=LossScale(scale, 1.0, 1000, 1, False) if scale else CONSTANT)
    losses = []
    for _ in range(STEPS):
        logits = e(input_ids=data(0)).logits.float()
        e.backward(F.cross_entropy(logits[:, :-1].flatten(0, 1), data(0)[:, 1:].flatten()))
        verdict = e.step()
        assert verdict is not None
        losses += [] if verdict.found_inf else [verdict.loss.item()]
    return losses, e.scale.value


def test_half_precision() -> None:
    """Adam's first steps move each weight by about lr whatever its gradient, so where that is near zero its rounding moves it too:
    the losses, which fall by 0.3, may part by a thirtieth of that. A loss scale that overflows is halved, and nothing else happens."""
    exact, _ = in_dtype("fp32")
    assert exact[0] - exact[-1] > 0.29
    assert in_dtype("bf16")[0] == pytest.approx(exact, abs=0.01)
    assert in_dtype("fp16", 2.0**10)[0] == pytest.approx(exact, abs=0.01)
    assert in_dtype("fp16", 2.0**40) == ([], 2.0 ** (40 - STEPS + 1))


def test_a_verdict_is_read_when_the_next_step_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for a step's verdict only when the device has all of the next one to do; where the loss scale moves, its forward
    pass."""
    for scale, want in ((CONSTANT, "forward judge forward judge read forward judge read"),
                        (LossScale(2.0, 1.0, 1000, 1, False), "forward judge forward read judge forward read judge")):
        e, done = engine(Row()), []
        e.scale, judge = scale, e.gate.judge
        monkeypatch.setattr(e.gate, "judge", lambda ruling, done=done, judge=judge: (done.append("judge"), judge(ruling))[1])
        monkeypatch.setattr(source, "later", lambda figures, done=done: lambda: (done.append("read"), figures.tolist())[1])
        for step in range(3):
            mean = loss(e, data(step))
            done.append("forward")
            e.backward(mean)
            e.step()
        assert " ".join(done) == want


def test_mistakes_are_told() -> None:
    w, settings, zero = wires(Row()), Settings(lr=LR), Zero()
    odd, linear = MODELS["odd"]("none"), nn.Linear(2, 2)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    inside = next(odd.blocks[0].children())                                                      # type: ignore[union-attr, operator]
    for words, make in (
        ("not a submodule of the model", lambda: Engine(odd, w, settings, zero, blocks=[linear])),
        ("is inside the block blocks.0", lambda: Engine(odd, w, settings, zero, blocks=[odd.blocks[0], inside])),     # type: ignore[index, list-item]
        ("no parameter requires a gradient", lambda: Engine(frozen, w, settings, zero)),
        ("meta", lambda: Engine(nn.Linear(2, 2, device="meta"), w, settings, zero)),
        ("lr: is missing", lambda: Engine(linear, w, Settings(), zero)),
        ("dtype fp8: is not known", lambda: Engine(linear, w, settings, zero, "fp8")),
        ("accumulation 0", lambda: Engine(linear, w, settings, zero, accumulation=0)),
        ("level 7 is not known; write 0, 1, 2 or 3", lambda: Engine(linear, w, settings, Zero(7))),
        ("tp 2", lambda: Engine(linear, connect(Mesh.of(tp=2), 0, "fake", 60), settings, zero)),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_wrong_calls_are_told() -> None:
    e = engine(Row("odd", level=3))
    with pytest.raises(UserError, match=r"blocks.1: was called outside of the model's own forward pass; .* under torch.no_grad"):
        e.module.blocks[1](torch.rand(2, 12), more={"x": None})                                  # type: ignore[index, operator]
    e = engine(Row("odd"))
    e.backward(loss(e, data(0)))
    with pytest.raises(UserError, match=r"a loss of shape \(2,\); give a tensor of one number, such as loss.mean\(\)"):
        e.backward(torch.zeros(2, requires_grad=True))
    with pytest.raises(UserError, match="has had its 1 micro-batches; call step"):
        e.backward(loss(e, data(0)))


@pytest.mark.parametrize("level", range(4))
def test_what_a_module_cannot_become_is_told_at_the_next_forward_pass(level: int) -> None:
    def half(m: Any) -> None:
        m.head.bfloat16()

    def added(m: Any) -> None:
        m.head.gain = nn.Parameter(torch.ones(()))

    def replaced(m: Any) -> None:
        m.head.weight = nn.Parameter(torch.ones(VOCABULARY, 12, dtype=torch.float64))

    for change, words in ((half, "head.weight was made torch.bfloat16 of shape"), (added, "head.gain was added, replaced or taken"),
                          (replaced, "head.weight was added, replaced"), (lambda m: delattr(m, "head"), "head.weight was added, replaced or taken"),
                          (lambda m: m.requires_grad_(), r"blocks.0.frozen was frozen when the engine was made")):
        e = engine(Row("odd", level=level))
        with pytest.raises(UserError, match=words if level < 3 or change is not half else "head.weight: its weights are not whole here"):
            change(e.module)
            loss(e, data(0))


@pytest.mark.parametrize("level", range(4))
def test_a_gradient_that_the_engine_took_says_so(level: int) -> None:
    e = engine(Row(level=level, accumulation=2))
    ps = list(e.module.parameters())
    for _ in range(2):
        e.backward(loss(e, data(0)))
        for read in (lambda: torch.nn.utils.clip_grad_norm_(ps, 1.0), lambda: torch.nn.utils.clip_grad_value_(ps, 1.0), lambda: ps[0].grad.norm(),
                     lambda: torch.optim.SGD(ps, lr=1.0).step(), lambda: ps[0].grad + 1, lambda: float(ps[-1].grad.sum())):      # type: ignore[union-attr]
            with pytest.raises(UserError, match=r"its gradient is in the engine, .* let the engine clip it \(clip_grad\)|its weights are not whole here now"):
                read()
    e.step()
    e.zero_grad()
    assert all(p.grad is None for p in ps)


class Mixed(nn.Module):
    """Takes inputs of another precision, into the model and into a block, and has floating buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))
        self.register_buffer("shift", torch.rand(8))
        self.register_buffer("exact", torch.rand(8), persistent=False)
        self.kept: list[Any] = []

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
        x = self.first(x) + self.shift + more["x"]                                               # type: ignore[operator]
        self.kept.append((x.dtype, more["n"].dtype, self.exact.dtype))
        for block in self.blocks:
            x = block((x + self.exact).float())
        return x.square().mean()


@pytest.mark.parametrize("level", (0, 3))
def test_half_precision_casts_inputs_and_buffers(level: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.rand(5, 8)
    plain = copy.deepcopy(model)
    for p in (*plain.parameters(), *plain.buffers()):
        p.data = p.data.bfloat16() if p.is_floating_point() and p is not plain.exact else p.data
    y = plain.first(x.bfloat16()) + plain.shift + x.bfloat16()
    for block in plain.blocks:
        y = block((y + plain.exact).bfloat16())
    e = Engine(model, wires(Row()), Settings(lr=LR), Zero(level), "bf16")
    mean = e(x, more={"x": x, "n": torch.ones(1, dtype=torch.int64)})
    assert model.kept[0] == (torch.bfloat16, torch.int64, torch.float32) and torch.equal(mean, y.square().mean())
    e.backward(mean)
    assert (e.step() or e.verdict).found_inf == 0


@pytest.mark.parametrize("level", (1, 3))
def test_a_module_is_compiled_after_the_engine_was_made(level: int) -> None:
    """The whole of it: hooks break its graph, and nothing of the engine is traced."""
    found = []
    for compiled in (False, True):
        e = made(Critic, Row(level=level))
        run: Any = torch.compile(e.module, backend="aot_eager") if compiled else e
        for step in range(2):
            e.backward(run(data(step)))
            e.step()
        with torch.no_grad():
            run(data(0))
        found.append(held(e, "master"))
    assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for (_, _, a), (_, _, b) in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_weight_that_is_used_outside_of_a_block_that_is_recomputed(reentrant: bool) -> None:
    """Two backward passes, one within the other, hand over a gradient each: the second one comes after the sum has left."""
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.blocks[0].weight                                                       # type: ignore[operator]
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)        # type: ignore[assignment]
            return x.sum()

    x = torch.rand(3, 4, requires_grad=True)
    e = Engine(Reuse(), wires(Row()), Settings(lr=LR), Zero())
    if reentrant:
        with pytest.raises(UserError, match=r"blocks.0.weight: its gradient came after the backward pass of blocks.0, .* use_reentrant=False"):
            e.backward(e(x))
    e = Engine(model := Reuse(), wires(Row()), Settings(lr=LR), Zero(), blocks=[model.blocks[1]] if reentrant else None)
    e.backward(e(x))
