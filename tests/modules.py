"""Modules for the engine's tests: a tied GPT-2 of transformers, and one with every oddity that a block can have."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor
VOCABULARY, LENGTH = 31, 16


def gpt2(recompute: str) -> nn.Module:
    """transformers' GPT-2, head and embedding tied, random, with its own gradient checkpointing."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(n_layer=3, n_embd=24, n_head=2, n_positions=LENGTH, vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0,
                                     attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double().train()
    if recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
    return model


class Odd(nn.Module):
    """Takes and returns what it likes: a frozen, an unused and a scalar parameter, a buffer, a tie within and one between blocks."""

    def __init__(self, tied: nn.Parameter, inner: str) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.LayerNorm(12)
        self.between, self.down.weight, self.inner = tied, self.up.weight, inner
        self.gain, self.unused = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(5, 3))
        self.frozen = nn.Parameter(torch.rand(12, 12) / 4, requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, *, more: dict[str, Tensor | None]) -> dict[str, Any]:
        self.seen += 1                                                                           # type: ignore[operator]
        if self.inner == "none":
            return {"y": (self.run(x, more["x"]), None), "n": 1}
        return {"y": (checkpoint(self.run, x, more["x"], use_reentrant=self.inner == "reentrant"), None), "n": 1}

    def run(self, x: Tensor, more: Tensor | None) -> Tensor:
        y = self.down(torch.tanh(self.up(self.norm(x)) @ self.between)) @ self.frozen
        return x + self.gain * y + (0 if more is None else more.cos())


class Oddities(nn.Module):
    """Blocks of Odd: the first is called twice, the last never. Recompute of a block from outside or, `... inside`, within it."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.kind, _, inside = recompute.partition(" ")
        tied = nn.Parameter(torch.rand(12, 12) / 4)
        self.words = nn.Embedding(VOCABULARY, 12)
        self.blocks = nn.ModuleList(Odd(tied, self.kind if inside else "none") for _ in range(3))
        self.kind = "none" if inside else self.kind
        self.head = nn.Linear(12, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor) -> Any:
        x = first = self.words(input_ids)
        for block, more in ((self.blocks[0], None), (self.blocks[1], first), (self.blocks[0], first)):
            x = self.call(block, x, more)
        return Output(self.head(x))

    def call(self, block: nn.Module, x: Tensor, more: Tensor | None) -> Tensor:
        def run(x: Tensor, more: Tensor | None) -> Tensor:
            return block(x, more={"x": more})["y"][0]                                            # type: ignore[no-any-return]
        if self.kind == "none" or not self.training:
            return run(x, more)
        return checkpoint(run, x, more, use_reentrant=self.kind == "reentrant")                        # type: ignore[no-any-return]


class Output(NamedTuple):
    logits: Tensor


def loss(model: Any, ids: Tensor) -> Tensor:
    """Mean over the next tokens. (transformers' own loss is taken in fp32.)"""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Critic(nn.Module):
    """Scores what it is given; with `within` it adds a penalty on the gradient of its own score."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8, sparse=sparse)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.double()

    def forward(self, ids: Tensor, x: Tensor | None = None, within: bool = False) -> Tensor:
        x = self.words(ids) if x is None else x
        score = self.run(x)
        return score + penalty(score, x) if within else score

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()[None]


def penalty(score: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(score, x, create_graph=True)[0].square().sum()                    # type: ignore[no-any-return]


def t5() -> nn.Module:
    """transformers' T5, whose generate calls the encoder by itself."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
                                   dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config).double()                              # type: ignore[no-any-return]


MODELS = {"gpt2": gpt2, "odd": Oddities}


class Choosing(nn.Module):
    """Calls the blocks and the head that it is told to call; heads are a list longer than the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(5))
        self.double()

    def forward(self, x: Tensor, call: list[int], head: int) -> Tensor:
        for i in call:
            x = x + self.blocks[i](x)
        return self.heads[head](x).square().mean()                                               # type: ignore[no-any-return]


CALLS = {                                                       # (blocks, head) of rank and step
    "each drops another layer": lambda rank, step: ([i for i in range(4) if i != (rank + step) % 4], 0),
    "each uses another head": lambda rank, step: ([0, 1, 2, 3], (rank + 2 * step) % 5),
    "each has another order": lambda rank, step: ([[0, 1, 2, 3], [3, 1, 0, 2]][(rank + step) % 2], 0),
    "one stops earlier": lambda rank, step: ([0, 1, 2, 3][:4 - 2 * rank], 1),
}


def chosen(model: Any, call: str, rank: int, step: int) -> Tensor:
    blocks, head = CALLS[call](rank, step)
    x = torch.rand(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x, blocks, head)                                                                # type: ignore[no-any-return]
