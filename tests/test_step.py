"""One step against the same formulas written with plain torch and autograd, in float64, for every model shape."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
import torch.nn.functional as F
from support import SHAPES, TINY, batches, built, drawn_architecture, gradients, named, resolved, stepping, words_of

from megazero.comm.group import Alone
from megazero.model import decoder
from megazero.model.attention import attention, hiding, knows_documents, rotary_table
from megazero.model.decoder import Batch
from megazero.plan import architecture
from megazero.plan.cost import memory
from megazero.plan.rope import Llama3, Rotary
from megazero.plan.rules import RULES
from megazero.run.executor import Turn
from megazero.run.feed import bounds_of, documents_of
from megazero.run.run import Run
from megazero.run.step import Step

Tensor = torch.Tensor


def reference(run: Run, w: dict[str, Tensor], batch: Batch) -> Tensor:
    """Sum of the masked losses of a micro-batch: the textbook, nothing shared with the code under test but the table of angles."""
    a, (b, s) = run.plan.architecture, batch.tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        if name + ".weight" not in w:
            return x
        gain = w[name + ".weight"] + (1 if a.norm_plus_one else 0)
        if a.norm == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + a.epsilon).sqrt() * gain
        return F.layer_norm(x, x.shape[-1:], gain, w.get(name + ".bias"), a.epsilon)

    def capped(x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap) if cap else x

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def turned(x: Tensor, rotary: Rotary) -> Tensor:
        cos, sin = rotary_table(rotary, s, torch.float64, x.device)
        half = rotary.channels // 2
        z = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:2 * half]), -1)) * torch.complex(cos, sin)[None, :, None]
        return torch.cat((z.real, z.imag, x[..., 2 * half:]), -1)

    x = w["embedding.weight"][batch.tokens] * a.embedding_multiplier
    if a.learned_positions:
        x = x + w["positions.weight"][a.position_offset:][:s]
    for i in range(a.layers):
        at, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        y = norm(x, f"{at}.norm")
        q, k, v = (linear(y, f"{at}.{n}") for n in "qkv")
        if a.qk_norm == "width":
            q, k = norm(q, f"{at}.q_norm"), norm(k, f"{at}.k_norm")
        q, k, v = (t.view(b, s, -1, a.head_dim) for t in (q, k, v))
        if a.qk_norm == "head":
            q, k = norm(q, f"{at}.q_norm"), norm(k, f"{at}.k_norm")
        window, rotary = a.kind(i)
        if rotary:
            q, k = turned(q, rotary), turned(k, rotary)
        k, v = (t.repeat_interleave(a.heads // a.kv_heads, 2) for t in (k, v))
        scores = capped(torch.einsum("bqnd,bknd->bnqk", q, k) * (a.attention_multiplier or 1 / a.head_dim**0.5), a.attention_softcap)
        hidden = torch.ones(s, s).triu(1).bool() | torch.ones(s, s).tril(-(window or s)).bool()
        seen = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        before = x
        x = x + a.residual_multiplier * norm(linear(torch.einsum("bnqk,bknd->bqnd", seen, v).reshape(b, s, -1), f"{at}.o"), f"{at}.post_norm")
        y = norm(before if a.parallel_residual else x, f"{mlp}.norm")
        up = linear(y, f"{mlp}.up")
        gate = linear(y, f"{mlp}.gate") if f"{mlp}.gate.weight" in w else up
        inner = {"swiglu": F.silu(gate) * up, "geglu": F.gelu(gate) * up, "geglu_tanh": F.gelu(gate, approximate="tanh") * up, "gelu": F.gelu(up),
                 "gelu_tanh": F.gelu(up, approximate="tanh"), "relu": F.relu(up), "relu2": F.relu(up) ** 2}[a.activation]
        x = x + a.residual_multiplier * norm(linear(inner, f"{mlp}.down"), f"{mlp}.post_norm")
    logits = capped(norm(x, "head.norm") @ w["embedding.weight" if a.tied else "head.output.weight"].T / a.logits_scaling, a.logits_softcap)
    return (F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none") * batch.mask.flatten()).sum()


def expected(run: Run, data: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd."""
    w = {name: t.clone().requires_grad_() for name, t in named(run).items()}
    loss = torch.stack([reference(run, w, b) for b in data]).sum() / sum(b.mask.sum() for b in data)
    loss.backward()
    return float(loss.detach()), {name: t.grad for name, t in w.items() if t.grad is not None}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor relative to its largest element. What is zero in exact arithmetic (softmax does not feel a bias on k) is
    rounding alone: it is measured against the largest element of all."""
    assert got.keys() == want.keys()
    largest = max(float(t.abs().max()) for t in want.values())
    for name, g in got.items():
        own = float(want[name].abs().max())
        assert (g - want[name]).abs().max() <= tolerance * (own if own > 1e-14 * largest else largest), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_plain_autograd(shape: str, recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architecture.LOGITS, "cpu", 128 * 7)             # several chunks of logits, the last one short
    compare(f"{SHAPES[shape]} --recompute-granularity {recompute}")


@pytest.mark.parametrize("seed", range(8))
def test_any_decoder_equals_plain_autograd(seed: int) -> None:
    """Fields that no shape has together."""
    a = replace(drawn_architecture(Random(seed)), attention_dropout=0.0, hidden_dropout=0.0)
    compare(f"{words_of(a)} --recompute-granularity {('none', 'selective', 'full')[seed % 3]}")


def compare(words: str) -> None:
    run = built(f"{TINY} {words} --dtype fp64 --micro-batch-size 2 --global-batch-size 6")
    torch.manual_seed(2)
    for weight in named(run).values():                          # no weight at a special value: a gradient without its factor 1 shows
        weight.add_(torch.randn_like(weight) * 0.1)
    for unit in run.units.values():
        unit.publish()
    data = batches(run, masked=True)
    loss, want = expected(run, data)
    assert abs(gradients(run, data) - loss) < 1e-13
    close(named(run, "grad_slice"), want, 1e-12)
    assert abs(gradients(run, data) - loss) < 1e-13             # a second step overwrites the first one's gradients
    close(named(run, "grad_slice"), want, 1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_logits_that_are_widened_in_pieces_give_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of 7 tokens of a micro-batch of 48 at a time, or of all."""
    words, seen = f"{TINY} --dtype {dtype} --micro-batch-size 2", []
    for wide in (1 << 24, 128 * 7):
        monkeypatch.setattr(architecture, "WIDE_LOGITS", wide)
        run = built(words)
        seen.append((gradients(run, batches(run, masked=True)), named(run, "grad_slice")))
    assert seen[0][0] == seen[1][0] and all(torch.equal(g, seen[1][1][name]) for name, g in seen[0][1].items())


def test_the_kind_of_device_says_how_many_logits_exist() -> None:
    """On CUDA the 4,096 tokens of an 8B model are one product; on the CPU a number that is kind to its cache, as it always was."""
    words = f"{TINY} --hidden-size 64".replace("--vocab-size 101", "--vocab-size 128256")
    assert [resolved(words, 1, device).head_chunk for device in ("cpu", "cuda")] == [(1 << 24) // 128256, (1 << 29) // 128256]
    assert resolved(words, 1, "cuda").head_chunk >= 4096
    small, large = (memory(resolved(f"{words} --bf16 --micro-batch-size 200", 1, device))["logits"] for device in ("cpu", "cuda"))
    assert small == 128256 * 130 * (2 + 4) and large == 128256 * (4185 * 2 + 130 * 4)


@pytest.mark.parametrize("how", ["--pipeline-schedule gpipe", "--recompute-granularity selective", "--recompute-granularity full",
                                 "--micro-batch-size 1", "--micro-batch-size 4"])
@pytest.mark.parametrize("optimizer", RULES)
def test_five_steps_do_not_depend_on_how_a_step_is_run(how: str, optimizer: str) -> None:
    words = (f"{TINY} {SHAPES['qwen']} --dtype fp64 --micro-batch-size 2 --global-batch-size 4 --hidden-dropout 0.1 --attention-dropout 0.1 "
             f"--optimizer {optimizer} --clip-grad 0.5 --weight-decay 0.1")
    want, got = five_steps(words), five_steps(f"{words} {how}")
    assert want[0] != five_steps(f"{words} --seed 5")[0], "another seed must give other figures"
    assert all(abs(a - b) < 1e-12 for x, y in zip(want[0], got[0], strict=True) for a, b in zip(x, y, strict=True))
    close(got[1], want[1], 1e-12)


def five_steps(words: str) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, norm) of five steps of mock data, and the weights after them."""
    run = built(words)
    step = stepping(run)
    figures = [one_step(step) for _ in range(5)]
    return figures, {k: v.clone() for k, v in named(run).items()}


def one_step(step: Step) -> tuple[float, float]:
    step.start()
    assert step.pending
    loss, norm = float(step.pending.verdict.loss), float(step.pending.verdict.norm)
    step.settle()
    return loss, norm


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma", "olmo", "neox"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_lower_precisions_stay_near_float64(shape: str, dtype: str) -> None:
    """The same weights and batch. Rounding of one operation is 2^-24, 2^-8, 2^-11; a gradient passes some thirty of them in two
    layers, whose errors are independent: within sqrt(30) of one rounding of the whole gradient's norm, and twice that for luck."""
    words = f"{TINY} {SHAPES[shape]} --micro-batch-size 2"
    exact, run = built(f"{words} --dtype fp64"), built(f"{words} --dtype {dtype}")
    for name, t in named(run).items():
        named(exact)[name].copy_(t)
    for unit in exact.units.values():
        unit.publish()
    for unit in run.units.values():
        unit.publish()
    loss, want = gradients(exact, batches(exact)), named(exact, "grad_slice")
    assert abs(gradients(run, batches(run)) - loss) < {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[dtype]
    rounding = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11}[dtype]
    error = torch.stack([(g.double() - want[name]).norm() for name, g in named(run, "grad_slice").items()]).norm()
    assert error < 2 * 30**0.5 * rounding * torch.stack([g.norm() for g in want.values()]).norm()


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_norms_add_up_their_gradients_in_fp32(shape: str, dtype: str) -> None:
    """Of 500 tokens: torch's LayerNorm rounds that sum to the dtype of the weight, and on the CPU after each token."""
    run = built(f"{TINY} {SHAPES[shape]} --dtype {dtype}")
    gain = run.decoder.weight("layers.0.mlp.norm.weight")
    gain.unit.open()
    x, dy = (torch.randn(500, 64, generator=torch.Generator().manual_seed(seed)).to(run.decoder.dtype) for seed in (1, 2))
    run.decoder.norm("layers.0.mlp.norm")(x.requires_grad_()).backward(dy)
    centred = x.detach().double() - (x.detach().double().mean(-1, keepdim=True) if shape == "gpt2" else 0)
    want = dy.double() * centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    bias = run.decoder.maybe("layers.0.mlp.norm.bias")
    for got, exact in ((gain.grad, want.sum(0)), *([(bias.grad, dy.double().sum(0))] if bias else [])):
        assert (got - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("scaling", [None, Llama3(8.0, 1.0, 4.0, 8192)])
def test_the_rotary_table_is_rounded_once(scaling: Llama3 | None) -> None:
    """From angles in fp64 in every precision: in fp32 the angle of position 20,000 would be off by up to 1e-3."""
    rotary = Rotary(5e5, 128, scaling)
    exact = rotary_table(rotary, 20_001, torch.float64, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        found = rotary_table(rotary, 20_001, dtype, torch.device("cpu"))
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, exact, strict=True))


def test_embeddings_are_multiplied_by_a_number_of_their_dtype() -> None:
    """As Gemma's are, by the root of 3072."""
    for dtype, number in (("fp64", 3072**0.5), ("bf16", 55.5)):
        part = built(f"{TINY} --embedding-multiplier {3072**0.5} --dtype {dtype}").decoder.parts[0]
        assert isinstance(part, decoder.Embedding) and part.multiplier == number


def test_padded_rows_of_the_vocabulary_stay_zero() -> None:
    run = built(f"{TINY} --dtype fp64 --micro-batch-size 2")
    step = stepping(run)
    for _ in range(3):
        one_step(step)
    weight = run.decoder.weight("embedding.weight")
    assert weight.value.shape[0] == 128 and weight.box.size[0] == 101
    assert weight.value[101:].count_nonzero() == 0 and weight.grad[101:].count_nonzero() == 0


def test_a_fully_masked_batch_changes_nothing_but_decay() -> None:
    run = built(f"{TINY} --dtype fp64")
    data = [Batch(b.tokens, b.targets, b.mask * 0, b.samples, 0) for b in batches(run)]
    turn = run.executor.train(run.training, Turn(torch.ones((), dtype=torch.float64), 24, torch.zeros((), dtype=torch.float64), batches=data))
    verdict = turn.verdict
    assert verdict and turn.told["loss"] == 0 and all(g.count_nonzero() == 0 for g in named(run, "grad_slice").values())
    assert verdict.norm == 0 and verdict.loss == 0 and verdict.found_inf == 0


def test_documents_do_not_see_each_other() -> None:
    """Two documents in one sample, with positions that start again, equal the two served alone."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 10, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    documents, order = torch.tensor([[0] * 4 + [1] * 6]), torch.arange(10)
    together = attention(q, k, v, hiding(order[None], documents, q.dtype), Alone())
    alone = torch.cat([attention(q[:, p], k[:, p], v[:, p], None, Alone()) for p in (slice(0, 4), slice(4, 10))], 1)
    assert (together - alone).abs().max() < 1e-14
    shuffled = torch.randperm(10)
    by_position = attention(q[:, shuffled], k[:, shuffled], v[:, shuffled], hiding(shuffled[None], None, q.dtype), Alone())
    assert (by_position - attention(q, k, v, None, Alone())[:, shuffled]).abs().max() < 1e-14


def test_attention_by_document_is_asked_what_a_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernel, written out: documents in a row, each causal and alone. Of two samples with grouped heads."""
    q, k, v = (torch.randn(2, 12, n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 1))
    v = v.expand(2, 12, 2, 8)
    tokens = torch.tensor([[1, 1, 9, 1, 1, 1, 9, 1, 1, 1, 1, 1], [1, 9, 9, 1, 1, 1, 1, 1, 1, 1, 1, 9]])
    bounds = bounds_of(tokens, 9)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: object, scale: float | None, window_size: tuple[int, int]) -> Tensor:
        assert scale is None and window_size == (-1, 0) and q.shape == k.shape == v.shape == (24, 4, 8) and _[2:] == (12, 12)
        return torch.cat([attention(q[None, a:b], k[None, a:b], v[None, a:b], None, Alone())[0] for a, b in pairwise(bounds.tolist())])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    assert [knows_documents(torch.device(at), dtype, channels) for at, dtype, channels in (
        ("cuda", torch.bfloat16, 128), ("cpu", torch.bfloat16, 128), ("cuda", torch.float32, 128), ("cuda", torch.float16, 20))] == [True, False, False, False]
    mask = hiding(torch.arange(12)[None], documents_of(tokens, 9), q.dtype)
    assert (attention(q, k, v, None, Alone(), None, bounds) - attention(q, k, v, mask, Alone())).abs().max() < 1e-14


@pytest.mark.parametrize("words, documents, made", [("", False, 0), ("", True, 3), ("--attention-dropout 0.1", False, 3), ("--recompute-granularity full", True, 3),
                                                    ("--attention-window 9 --window-attn-skip-freq 2", False, 3), ("--attention-window 9 --window-attn-skip-freq 2", True, 6)])
def test_a_mask_is_made_once_for_all_layers_of_a_pass(words: str, documents: bool, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = built(f"{TINY} --num-layers 5 --micro-batch-size 2 --global-batch-size 6 {words}")
    calls = []
    monkeypatch.setattr(decoder, "hiding", lambda *x: (calls.append(x), hiding(*x))[1])
    data = [replace(b, documents=b.tokens.cumsum(-1) // 500 if documents else None) for b in batches(run)]
    gradients(run, data)
    assert len(calls) == made


def test_dropout_drops_the_stated_share_and_keeps_the_mean() -> None:
    run = built(f"{TINY} --dtype fp64 --hidden-dropout 0.25 --micro-batch-size 4")
    (batch,) = batches(run)
    x = torch.ones(4 * 24, 64, dtype=torch.float64)
    y = run.decoder.dropped(x, batch, "embedding")
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.02
    assert not torch.equal(y, run.decoder.dropped(x, batch, "layers.0.mlp"))
    assert torch.equal(x, run.decoder.dropped(x, Batch(batch.tokens, batch.targets, batch.mask, batch.samples), "embedding"))
