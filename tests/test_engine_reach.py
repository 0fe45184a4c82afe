"""Weights that are read, kept and written beside their block's turn: any level equals plain torch on one rank, or is one sentence."""

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import VOCABULARY
from pool import Pool
from test_engine_parity import EPS, LR, SETTINGS, Row, Weights, made, micro, near, plainly, whole, wires
from torch import nn

import megazero
from megazero.base.errors import UserError
from megazero.comm.group import Stuck
from megazero.engine import checkpoints, full, names, zero
from megazero.engine.engine import Engine

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.cached: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.cached = self.a.weight.t()
        return x + self.b(torch.tanh(self.a(x)))                                                 # type: ignore[no-any-return]


class Reaching(nn.Module):
    """Reads and writes its layers' weights from outside of them, `how` says in which way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 1)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        one, *_ = layers = [layer.a.weight for layer in self.layers]
        x = self.words(ids)
        y = getattr(self, self.how)(x, one, layers)
        return (self.head(y) ** 2).mean()                                                        # type: ignore[no-any-return]

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def view_before(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        turned, rows = one.t(), one.view(36)[:6]
        return self.run(x) @ turned + rows

    def read_ahead(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        for layer in self.layers:                               # while they are on their way for its call
            x = x * layer.a.weight.detach().mean() + layer(x)
        return x

    def used_first(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        return self.run(x @ one) @ layers[1]

    def data_before(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        turned = one.data.t()
        return self.run(x) @ turned

    def detached(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        still = one.detach()
        return self.run(x) @ still + layers[2].detach().sum()

    def kept_by_the_layer(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        return self.run(x) @ self.layers[0].cached @ self.layers[2].cached                       # type: ignore[no-any-return]

    def never_called(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        for layer in self.layers:
            x = x + F.linear(F.linear(x, layer.a.weight, layer.a.bias).tanh(), layer.b.weight)
        return x

    def of_no_gradient(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        for layer in self.layers:
            x = F.linear(x.detach(), layer.a.weight) + x
        return x

    def stacked(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        return torch.einsum("bsh,lhk->bsk", x, torch.stack(layers))

    def summed(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        return self.layers[2](self.layers[0](x)) + layers[1].sum() + self.layers[1].b.bias.square().sum()   # type: ignore[no-any-return, union-attr, operator]

    def clamped(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        with torch.no_grad():
            layers[0].clamp_(-0.2, 0.2)
            x = self.run(x)
            layers[2].mul_(0.9)
        return x + self.run(x)

    def exchanged(self, x: Tensor, one: Tensor, layers: list[Tensor]) -> Tensor:
        layers[1].data = layers[1].data * 0.9
        return self.run(x)


def reach(level: int, how: str, late: bool) -> Weights:
    e = made(partial(Reaching, how), Row(dp=2, level=level, late=late, accumulation=2), overlap=late and level in (1, 2))
    for step in range(3):
        for i in range(2):
            e.backward(e(micro(step, i, e.wires.rank)))
        e.step()
    return whole(e)


WAYS = [name for name in vars(Reaching) if name not in ("forward", "run") and not name.startswith("_")]


def plain(how: str) -> Weights:
    """Every one of four forward passes of a step writes, in any order: here one after another."""
    def losses(model: Any, step: int) -> list[Tensor]:
        return [model(micro(step, i, rank)) for i in (0, 1) for rank in (0, 1)]
    return plainly(partial(Reaching, how), losses, 3)


@pytest.mark.parametrize("how", [way for way in WAYS if way not in ("clamped", "exchanged")])
def test_weights_may_be_read_beside_their_turn(how: str, pool: Pool) -> None:
    wanted = plain(how)
    for level, late in ((0, True), (1, True), (2, False), (3, True)):
        for weights in pool.run(2, reach, level, how, late):
            near(weights, wanted)


def write(level: int, how: str) -> Weights:
    """One micro-batch that all ranks share: what a forward pass writes counts once."""
    e = made(partial(Reaching, how), Row(dp=2, level=level, late=True))
    for step in range(3):
        e.backward(e(micro(step, 0, 0)))
        e.step()
    return whole(e)


@pytest.mark.parametrize("how", ["clamped", "exchanged"])
def test_what_a_forward_pass_writes_stays(how: str, pool: Pool) -> None:
    wanted = plainly(partial(Reaching, how), lambda model, step: [model(micro(step, 0, 0))], 3)
    for level in range(4):
        for weights in pool.run(2, write, level, how):
            near(weights, wanted)


# ---- modules that are made within zero.Init

def plain_weights(make: Any, seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {n: t.clone() for n, t in make().state_dict().items()}


def gathered(module: nn.Module) -> Weights:
    with zero.GatheredParameters(module.parameters()):
        return {n: t.detach().clone() for n, t in module.state_dict().items()}


class Written(nn.Module):
    """Replaces, reads and copies its parts' weights while it is made, after they were sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.first.weight.data = torch.full((5, 4), 2.0) * self.first.bias.detach()[:, None]     # both are sliced
        self.layers[0].weight.data = self.layers[0].weight.data[:, :3].clone()                   # type: ignore[union-attr, index, operator, assignment]
        self.third = nn.Parameter(self.layers[1].weight.detach() + 1)                            # type: ignore[operator]
        self.same = nn.Parameter(self.layers[1].bias, requires_grad=False)                       # type: ignore[arg-type]
        self.twin = copy.deepcopy(self.layers[1])
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 3)
        with zero.GatheredParameters([self.first.bias, self.third], modifier_rank=names.get_world_size() - 1), torch.no_grad():
            self.third.fill_(float(names.get_rank()))
            self.first.bias.fill_(float(names.get_rank()))


class Copied(nn.Module):
    """A network and another that follows it, as in MoCo: written parameter by parameter, and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
        self.norm = nn.LayerNorm(2)
        for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
            b.data.copy_(a.data)
        with torch.no_grad():
            self.k[1].weight.copy_(self.q[1].weight * 2)
            self.k[0].bias.copy_(self.q[0].bias)
            for mine, theirs in ((list(self.q.parameters()), list(self.k.parameters())),):
                theirs[0].lerp_(mine[0], 0.25)
                given = [p.data for p in theirs]                # views of all, written when others were touched
                for view in given:
                    view.add_(1)
        self.same = bool(torch.equal(self.k[0].bias, self.q[0].bias + 1))


def copies() -> tuple[Weights, bool]:
    torch.manual_seed(names.get_rank())
    with zero.Init():
        module = Copied()
    assert all(home.slice is not None for home in zero.sliced(module.parameters()))
    return gathered(module), module.same


def test_one_module_is_written_into_another_within_init(pool: Pool) -> None:
    wanted = plain_weights(Copied)
    for found, same in pool.run(2, copies):
        assert same
        for name, t in wanted.items():
            assert torch.equal(found[name], t), name


def written() -> tuple[Weights, bool, int]:
    torch.manual_seed(names.get_rank())
    with zero.Init():
        module = Written()
    tied = module.third is module.layers[1].weight or module.same is module.layers[1].bias
    return gathered(module), tied, sum(home.slice is None for home in zero.sliced(module.parameters())) + sum(
        not zero.sliced([p]) for p in module.parameters())


def test_what_is_replaced_read_and_copied_within_init(pool: Pool) -> None:
    wanted = plain_weights(Written)
    wanted["third"].fill_(1)
    wanted["first.bias"].fill_(1)
    for found, tied, whole_ones in pool.run(2, written):
        assert found.keys() == wanted.keys() and not tied and whole_ones == 0
        for name, t in wanted.items():
            assert torch.equal(found[name], t), name


def nested() -> tuple[Tensor, Tensor, Weights, list[str]]:
    """GatheredParameters within GatheredParameters; data and a state that are given while nothing is whole; what state_dict lists."""
    rank, said = names.get_rank(), []
    with zero.Init():
        module = nn.Linear(3, 5)
    with zero.GatheredParameters(module.parameters()), torch.no_grad():
        with zero.GatheredParameters(module.weight, modifier_rank=1):
            module.weight.fill_(float(10 + rank))
        inner = module.weight.clone()
        module.bias.fill_(3.0)
    both = gathered(module)
    assert (both["weight"] == 11).all() and (both["bias"] == 3).all()
    module.weight.data = torch.arange(15.0).view(5, 3)
    listed = module.state_dict()
    for use in (lambda: listed["weight"] + 1, lambda: setattr(module.weight, "data", torch.zeros(2, 2))):
        with pytest.raises(UserError) as told:
            use()
        said.append(str(told.value))
    assert listed["weight"].shape == (5, 3) and not isinstance(listed["weight"], nn.Parameter)
    given = gathered(module)["weight"]
    module.load_state_dict({"weight": torch.full((5, 3), 7.0), "bias": torch.arange(5.0)})
    return inner, given, gathered(module), said


def test_writers_of_a_sliced_module_need_not_gather(pool: Pool) -> None:
    for inner, given, loaded, said in pool.run(2, nested):
        assert (inner == 11).all() and torch.equal(given, torch.arange(15.0).view(5, 3))
        assert (loaded["weight"] == 7).all() and torch.equal(loaded["bias"], torch.arange(5.0))
        assert all("its weights are not whole here now; read or write it within zero.GatheredParameters" in text for text in said)


def fails_within() -> Weights:
    with zero.Init():
        module = nn.Linear(3, 5)
    with pytest.raises(ZeroDivisionError), zero.GatheredParameters(module.parameters()), torch.no_grad():
        module.weight.fill_(2.0)
        1 / 0                                                                                    # noqa: B018
    assert all(home.slice is not None for home in zero.sliced(module.parameters()))
    return gathered(module)


def test_who_fails_while_weights_are_whole_leaves_them_sliced(pool: Pool) -> None:
    for found in pool.run(2, fails_within):
        assert (found["weight"] == 2).all()


def frozen(level: int) -> tuple[Tensor, Tensor, list[str]]:
    """GatheredParameters of frozen weights reads, and writes on all ranks; a writer must be a rank."""
    torch.manual_seed(names.get_rank())
    module, said = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).double(), []
    module[1].requires_grad_(False)
    still = module[1][0].weight                                                                  # type: ignore[index]
    e = megazero.initialize(model=module, config={"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": level}})[0]
    with zero.GatheredParameters([still], modifier_rank=0):
        if names.get_rank() == 0:
            still.data.fill_(3.0)
    with zero.GatheredParameters(module.parameters()):
        seen = still.detach().clone()
    for wrong in (2, -1):
        with pytest.raises(UserError) as told, zero.GatheredParameters(module.parameters(), modifier_rank=wrong):
            pass
        said.append(str(told.value))
    with pytest.raises(UserError, match="whole: writer 2 is no rank; write one from 0 to 1"), e.whole(writer=2):
        pass
    return seen, e(torch.ones(1, 4, dtype=torch.float64)).detach(), said


def test_frozen_weights_are_gathered_and_a_writer_is_a_rank(pool: Pool) -> None:
    for level in (0, 1, 3):
        (seen, one, said), (also, two, _) = pool.run(2, frozen, level)
        assert (seen == 3).all() and (also == 3).all() and torch.equal(one, two)
        assert said == [f"GatheredParameters: modifier_rank {wrong} is no rank; they are counted from 0 to 1." for wrong in (2, -1)]


# ---- what is written between forward and backward

WRITE = {"whole": lambda e, p: writes(e, p), "safe": lambda e, p: full.safe_set_full_fp32_param(p, torch.ones(6, 6, dtype=torch.float64)),
         "load": lambda e, p: checkpoints.load_state(e, None, e.folder, None)}


def writes(e: Engine, p: nn.Parameter) -> None:
    with e.whole(p), torch.no_grad():
        p.mul_(2)


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("how", WRITE)
def test_weights_that_are_written_between_forward_and_backward_are_told(how: str, level: int, tmp_path: Path) -> None:
    """torch tells it too; and reading there is no fault."""
    e = Engine(Reaching("used_first"), wires(Row()), SETTINGS, replace(Row().zero, level=level), "fp64")
    checkpoints.save_state(e, None, tmp_path, None, {"scheduler": None, "samples": 0, "micro": 0}, {})
    e.folder = tmp_path
    p = e.module.layers[0].a.weight                                                              # type: ignore[union-attr, index]
    loss = e(micro(0, 0, 0))
    with e.whole(p):
        assert p.sum().isfinite()
    e.backward(loss)
    assert e.step() is not None
    loss = e(micro(0, 0, 0))
    WRITE[how](e, p)
    told = ("reads weights of root as of step 1, but they are those of step 0 now; run" if how == "load" else
            "reads weights of layers.0 that were written since its forward pass; write them before")
    with pytest.raises(UserError if level == 3 else RuntimeError, match=f"backward: {told}" if level == 3 else "modified by an inplace operation"):
        e.backward(loss)


# ---- engines through which gradients pass, and models that call themselves

class Twice(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        x = self(x, False) if again else x
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def passed() -> tuple[Weights, list[int], int]:
    """A frozen engine behind one that is trained, both at level 3: what it holds after each step."""
    def make(seed: int, trained: bool) -> Any:
        torch.manual_seed(seed)
        optimizer = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}} if trained else {}
        return megazero.initialize(model=Twice().double(), config={"train_batch_size": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}, **optimizer})[0]

    trained, teacher, held = make(0, True), make(1, False), []
    for step in range(3):
        trained.backward(teacher(trained(given_to(step, names.get_rank()))).square().mean())
        trained.step()
        held.append(sum(u.weights is not None for b in teacher.core.all for u in b.units) + len(teacher.core.left))
    return {n: t.clone() for n, t in trained.module_state_dict().items()}, held, len(saved_hooks())


def given_to(step: int, rank: int) -> Tensor:
    return torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * step + rank))


def saved_hooks() -> list[Any]:
    """Of a graph that is made now."""
    seen: list[Any] = []
    x = torch.ones(2, requires_grad=True)
    y = x * x
    if y.grad_fn._saved_self is not x:                          # type: ignore[union-attr]
        seen.append(y)
    return seen


def test_gradients_pass_through_a_frozen_engine_and_a_model_calls_itself(pool: Pool) -> None:
    torch.manual_seed(0)
    student = Twice().double()
    torch.manual_seed(1)
    teacher = Twice().double()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.stack([teacher(student(given_to(step, rank))).square().mean() for rank in (0, 1)]).mean().backward()   # type: ignore[no-untyped-call]
        optimizer.step()
    for weights, held, hooks in pool.run(2, passed):
        near(weights, {n: t.detach() for n, t in student.state_dict().items()})
        assert held == [0, 0, 0] and hooks == 0


# ---- engines that follow each other, and memory that is shared

def follow(first: int, then: int) -> Weights:
    config = {"train_batch_size": 2, "gradient_clipping": 0.0, "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.0}}}
    torch.manual_seed(0)
    module = Reaching("view_before")
    for step, level in enumerate((first, then)):
        e = megazero.initialize(model=module, config={**config, "zero_optimization": {"stage": level}})[0]
        e.backward(e(micro(step, 0, names.get_rank())))
        e.step()
    return {n: t.clone() for n, t in e.module_state_dict().items()}


def test_an_engine_may_follow_another_at_any_level(pool: Pool) -> None:
    torch.manual_seed(0)
    module = Reaching("view_before")
    for step in range(2):
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR, eps=EPS, weight_decay=0.0)
        torch.stack([module(micro(step, 0, rank)) for rank in (0, 1)]).mean().backward()         # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    for first, then in ((3, 3), (3, 1), (1, 3)):
        for found in pool.run(2, follow, first, then):
            near(found, {n: t.detach() for n, t in module.state_dict().items()})


class Views(nn.Module):
    """Keeps a view of a weight, and two parameters in one memory."""

    def __init__(self, double: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.views = {"of": [self.layers[1].weight.data[1:]]}                                    # type: ignore[index, union-attr]
        if double:
            self.other = nn.Parameter(self.layers[0].weight.data)                                # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("inits", [False, True])
def test_views_of_weights_are_told(inits: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with zero.Init(enabled=inits):
        module = Views(False)
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    megazero.initialize(model=module, config=config)
    assert "model: views is a view of layers.1.weight, whose weights move: it keeps what it holds now" in "".join(capsys.readouterr())
    if not inits:
        with pytest.raises(UserError, match=r"model: (other and layers.0.weight|layers.0.weight and other) are two parameters in the same memory; make them one"):
            Engine(Views(True), wires(Row()), SETTINGS, Row().zero)


# ---- ranks that have unlike numbers of micro-batches

def unlike(level: int) -> str:
    """Rank 1 ends its step after one micro-batch, rank 0 goes on."""
    e = made(partial(Reaching, "view_before"), Row(dp=2, level=level, accumulation=3))
    e.wires.line.seconds = 3
    with pytest.raises(Stuck) as told:
        for i in range(2 - e.wires.rank):
            e.backward(e(micro(0, i, e.wires.rank)))
        e.step(partial=True)
    return str(told.value)


def test_ranks_that_end_a_step_after_unlike_micro_batches_say_so(pool: Pool) -> None:
    """At level 2 when time is up, at level 3, where they meet in calls about different blocks, at once."""
    first, second = pool.run(2, unlike, 2)
    assert re.match(r"rank 0 gave up in step 1, micro-batches done 2: .* rank 1 did not answer within 3 s, and gave up in step 1, micro-batches done 1: judge", first), first
    assert re.match(r"rank 1 gave up in step 1, micro-batches done 1: judge.* rank 0 did not answer within 3 s, and gave up in step 1, micro-batches done 2: ", second), second
    assert all("all ranks must call the same blocks in the same order, in as many micro-batches" in told for told in pool.run(2, unlike, 3))


def epoch(level: int) -> tuple[int, Weights]:
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": level},
              "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": EPS, "weight_decay": 0.0}}}
    torch.manual_seed(0)
    e = megazero.initialize(model=Reaching("view_before"), config=config)[0]
    rank, seen = names.get_rank(), 0
    for _ in range(2):
        for ids in e.together([micro(seen, i, rank) for i in range(5 - 2 * rank)]):              # rank 0 has five, rank 1 three
            e.backward(e(ids))
            e.step()
            seen += 1
        e.step(partial=True)
    return seen, {n: t.clone() for n, t in e.module_state_dict().items()}


def test_ranks_with_unlike_numbers_of_batches_end_an_epoch_together(pool: Pool) -> None:
    (seen, first), (also, second) = pool.run(2, epoch, 3)
    assert seen == also == 6
    near(second, first)
