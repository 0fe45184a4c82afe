"""zero.Init: no rank holds the module whole, and its weights are those of a plain one; GatheredParameters; from_pretrained."""

import gc
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import LENGTH, VOCABULARY, Oddities, gpt2
from pool import Pool
from test_engine_checkpoints import CONFIG, run, state, train
from torch import nn

import megazero
from megazero.base.errors import UserError
from megazero.engine import names, zero
from megazero.engine.blocks import repeated

Tensor = torch.Tensor
THREE = {**CONFIG, "zero_optimization": {"stage": 3}}
SEED = 7


@pytest.fixture(scope="module")
def pool() -> Any:
    made = Pool()
    yield made
    made.close()


class Drawn(nn.Module):
    """Draws its weights while it is made, again when all are there, and looks at some."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 12, padding_idx=0)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(3, 5))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(12, VOCABULARY))
        self.tied = nn.Linear(12, VOCABULARY, bias=False)
        self.tied.weight = self.words.weight
        self.apply(self.begin)
        with torch.no_grad():
            self.scale.mul_(2)
            self.blocks[1].linear1.weight[:, 0] += 1                                             # type: ignore[index,operator]
        self.register_buffer("total", self.blocks[0].linear1.weight.detach().sum())              # type: ignore[operator,union-attr]
        assert self.scale.shape == (3, 5)

    @staticmethod
    def begin(m: nn.Module) -> None:
        if isinstance(m, nn.LayerNorm):
            nn.init.normal_(m.weight)
        if isinstance(m, nn.Linear) and m.bias is not None:
            m.bias.data.uniform_(-1, 1)


def whole(module: nn.Module) -> dict[str, Tensor]:
    with zero.GatheredParameters(module.parameters()):
        return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


KINDS: dict[str, Callable[[], nn.Module]] = {"drawn": Drawn, "gpt2": lambda: gpt2("none"), "oddities": lambda: Oddities("none")}


def drawn(kind: str) -> tuple[dict[str, Tensor], int]:
    """(the weights, what this rank held of them) of a module made within Init, where rank 0's seed counts."""
    torch.manual_seed(SEED + names.get_rank())
    with zero.Init():
        module = KINDS[kind]()
    return whole(module), sum(home.slice.numel() for home in zero.sliced(module.parameters()) if home.slice is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_weights_are_those_of_a_plain_module(world: int, kind: str, pool: Pool) -> None:
    torch.manual_seed(SEED)
    plain = {n: t.detach().clone() for m in [KINDS[kind]()] for n, t in [*m.named_parameters(), *m.named_buffers()]}
    for got, held in run(pool, world, drawn, kind):
        assert got.keys() == plain.keys() and held <= sum(-(-t.numel() // world) for t in plain.values())
        for n in plain:
            assert torch.equal(got[n], plain[n]) or n == "total", n


def trained(inits: bool, level: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    with zero.Init(config_dict_or_path=THREE, enabled=inits):
        module = Oddities("none")
    e = megazero.initialize(model=module, config={**CONFIG, "zero_optimization": {"stage": level}})[0]
    train(e, range(3))
    return state(e)


@pytest.mark.parametrize(("world", "level"), [(1, 3), (2, 3), (3, 3), (2, 1)])
def test_training_goes_on_from_slices(world: int, level: int, pool: Pool) -> None:
    want = trained(False, 0)
    for got in run(pool, world, trained, True, level):
        assert got.keys() == want.keys()
        for name in want:
            assert torch.allclose(got[name], want[name], rtol=1e-12, atol=1e-12), name


def gathered() -> list[str]:
    """What is written within GatheredParameters, before and after initialize, by one rank or by all."""
    with zero.Init():
        module = Oddities("none")
    rank, said = names.get_rank(), []
    p, q = module.head.weight, module.blocks[1].up.weight                                        # type: ignore[union-attr]
    for use in (lambda: p + 1, lambda: p.sum(), lambda: p.data, lambda: p.tolist()):
        with pytest.raises(UserError) as told:
            use()
        said.append(str(told.value))
    for i in range(2):
        with zero.GatheredParameters([p, q], modifier_rank=1), torch.no_grad():
            p.fill_(rank + 10 * i)
            q.fill_(rank + 20 * i)
        with zero.GatheredParameters(p):
            assert p.shape == (VOCABULARY, 12) and bool((p == 1 + 10 * i).all())
            p.data[0] = 5                                       # the same on all
        with zero.GatheredParameters(module.parameters()), torch.no_grad():
            assert bool((q == 1 + 20 * i).all()) and p[:2, 0].tolist() == [5, 1 + 10 * i]
        if i == 0:
            e = megazero.initialize(model=module, config=THREE)[0]
    with zero.GatheredParameters([p, module.blocks[0].seen], enabled=False), pytest.raises(UserError):   # type: ignore[union-attr,list-item]
        p.tolist()
    assert e.module is module
    return said


def test_gathered_parameters_are_read_and_written(pool: Pool) -> None:
    for said in pool.run(2, gathered):
        assert set(said) == {"Linear.weight: its weights are not whole here now; read or write it within zero.GatheredParameters, on all ranks"}


def anonymous() -> int:
    """Resident bytes of this process that no file stands for."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024


@contextmanager
def peak(found: dict[str, int]) -> Any:
    gc.collect()
    before, over = anonymous(), threading.Event()
    found["peak"] = 0

    def watch() -> None:
        while not over.wait(0.001):
            found["peak"] = max(found["peak"], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    time.sleep(0.01)
    over.set()
    thread.join()


WIDE, DEEP = 700, 48                                            # 94 MB in fp32


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()) for _ in range(DEEP))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def held_while_made() -> tuple[int, int]:
    found: dict[str, int] = {}
    warm = nn.Linear(WIDE, WIDE)                                # libraries have their own rooms by now
    with zero.Init():
        nn.Linear(8, 8)
    with peak(found), zero.Init():
        module = Large()
    made = found["peak"]
    with peak(found):
        megazero.initialize(model=module, config={**THREE, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    del warm
    return made, found["peak"]


def test_no_rank_ever_holds_it_whole(pool: Pool) -> None:
    """Slices, two blocks, and 8 MB for what messages and the allocator keep; initialize adds gradients and momentum of a rank, and again two blocks."""
    block = 4 * (WIDE * WIDE + WIDE)
    for made, begun in pool.run(3, held_while_made):
        assert made <= block * DEEP // 3 + 2 * block + 2**23 < block * DEEP
        assert begun <= 2 * (block * DEEP // 3) + 2 * block + 2**23


def streamed(folder: Path) -> tuple[dict[str, Tensor], int]:
    import transformers
    model = megazero.from_pretrained(transformers.AutoModelForCausalLM, folder, THREE)
    held = sum(home.slice.numel() for home in zero.sliced(model.parameters()) if home.slice is not None)
    return whole(model), held


@pytest.mark.parametrize("world", [1, 3])
def test_pretrained_weights_are_read_slice_by_slice(tmp_path: Path, world: int, pool: Pool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=LENGTH, vocab_size=VOCABULARY)
    plain = transformers.GPT2LMHeadModel(config)
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    want = dict([*plain.named_parameters(), *plain.named_buffers()])
    for got, held in run(pool, world, streamed, tmp_path):
        assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
        assert held == sum(-(-p.numel() // world) for p in plain.parameters())
    transformers.GPT2Model(transformers.GPT2Config(n_layer=3, n_embd=24, n_head=2, n_positions=LENGTH, vocab_size=VOCABULARY)).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no transformer.h.2.ln_1.weight of shape \[24\]"):
        megazero.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, THREE)


def test_words_of_init(capsys: pytest.CaptureFixture[str]) -> None:
    for named, said in (({"remote_device": "nvme"}, "remote_device=nvme is not here yet"), ({"mpu": object()}, "zero.Init: mpu="), ({"x": 1}, "zero.Init: x=1 is not"),
                        ({"zero_quantized_weights": True}, "zero_quantized_weights=True is not here")):
        with pytest.raises(UserError, match=said):
            zero.Init(**named)                                                                   # type: ignore[arg-type]
    with zero.Init(config_dict_or_path=CONFIG, mem_efficient_linear=True, remote_device="cpu", pin_memory=True):
        assert type(nn.Linear(2, 2).weight) is nn.Parameter
    assert "zero.Init: at level 0 every rank holds the whole weights; nothing is sliced" in capsys.readouterr().out
    plain = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), zero.Init(dtype=torch.bfloat16):
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
        raise ZeroDivisionError
    assert nn.Module.register_parameter is plain
    module = nn.Linear(3, 3)
    before = module.weight.detach().clone()
    zero.Init(module=module)
    assert torch.equal(whole(module)["weight"], before) and len(zero.sliced(module.parameters())) == 2
    with pytest.raises(UserError, match="is a int; give a parameter"):
        zero.register_external_parameter(module, 3)                                              # type: ignore[arg-type]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layer(8, 2, 8) for _ in range(2)), "heads": nn.ModuleList(nn.Linear(8, 8) for _ in range(9))})
        self.decoder = nn.Sequential(nn.Linear(8, 8), layer(8, 2, 8), layer(8, 2, 8))
        self.experts = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})])


def test_layers_are_found_by_structure() -> None:
    both = Both()
    called = {m: n for n, m in both.named_modules()}
    assert [called[m] for m in repeated(both)] == ["encoder.layers.0", "encoder.layers.1", "decoder.0", "decoder.1", "decoder.2", "experts.0"]
    simple = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]), "one": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    assert repeated(simple) == [simple["stack"][0], simple["stack"][2]]                          # type: ignore[index]
    assert repeated(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) == []


def test_a_module_without_layers_says_so_at_level_3(capsys: pytest.CaptureFixture[str]) -> None:
    for level in (2, 3):
        megazero.initialize(model=nn.Linear(2, 2), config={**CONFIG, "zero_optimization": {"stage": level}})
        assert ("model: has no repeated layers" in capsys.readouterr().out) == (level == 3)
