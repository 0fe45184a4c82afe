"""The loop's own arithmetic: masks, validation, momentum, tokenizers; each against a few lines of plain torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TINY, built, byte_dataset, gradients, load, named, python_source, resolved, stepping, train
from test_step import close, expected

from megazero.base.errors import UserError
from megazero.data.dataset import open_split
from megazero.data.indexed import IndexedWriter
from megazero.model.decoder import Batch
from megazero.plan.cost import memory
from megazero.plan.progress import LossScale
from megazero.run import ahead as program
from megazero.state.checkpoint import Reader

BYTES = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 24 --lr 1e-2 --tokenizer-type ByteTokenizer --dtype fp64"


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_gradient_is_that_of_the_mean_over_valid_tokens(accumulation: int) -> None:
    """Micro-batches with very different numbers of valid tokens: an average of averages would be wrong."""
    run = built(f"{TINY} --dtype fp64 --optimizer sgd --clip-grad 0 --micro-batch-size {4 // accumulation} --global-batch-size 4")
    tokens = torch.randint(101, (4, 25), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(4, 24, dtype=torch.float64)
    mask[0, 3:], mask[2, 1:] = 0, 0
    size = 4 // accumulation
    data = [Batch(tokens[i:i + size, :-1].contiguous(), tokens[i:i + size, 1:].contiguous(), mask[i:i + size], torch.arange(i, i + size), 0)
            for i in range(0, 4, size)]
    loss, want = expected(run, data)
    step = stepping(run, lambda step, first: data)
    step.start()
    assert step.pending
    verdict = step.pending.verdict
    assert float(verdict.loss) == pytest.approx(loss, rel=1e-12)
    assert float(verdict.norm) == pytest.approx(float(torch.stack([g.norm() for g in want.values()]).norm()), rel=1e-12)
    close(named(run, "grad_slice"), want, 1e-12)                     # in float64 the factor is applied to the gradients themselves
    assert gradients(run, data) < loss, "and the step moved the weights downhill"


def test_sgd_is_torchs_sgd_with_momentum_and_no_decay_on_vectors() -> None:
    run = built(f"{TINY} --dtype fp64 --optimizer sgd --sgd-momentum 0.8 --weight-decay 0.3 --clip-grad 0 --lr-decay-style constant")
    step = stepping(run)
    leaves = {n: t.clone().requires_grad_() for n, t in named(run).items()}
    decayed = [t for n, t in leaves.items() if t.dim() == 2]
    sgd = torch.optim.SGD([{"params": decayed, "weight_decay": 0.3}, {"params": [t for t in leaves.values() if t.dim() < 2], "weight_decay": 0.0}],
                          lr=0.01, momentum=0.8)
    for _ in range(3):
        step.start()
        for name, t in leaves.items():
            t.grad = named(run, "grad_slice")[name].clone()
        sgd.step()
        close(named(run), {n: t.detach() for n, t in leaves.items()}, 1e-14)


def test_eod_mask_takes_the_loss_of_what_follows_an_end_of_document(tmp_path: Path) -> None:
    """Where the input is the end of a document, the target is the next document's first token: nothing could know it."""
    prefix, eod = str(tmp_path / "d"), 256
    with IndexedWriter(prefix, np.uint16) as writer:
        for i in range(60):
            writer.add_document([np.array([*range(i, i + 7), eod], np.uint16)])
    words = f"{BYTES} --data-path {prefix} --split 100,0,0 --eval-iters 0 --train-iters 1 --no-shuffle --init-method-std 0"
    (plain,), (masked,) = train(words, tmp_path / "a"), train(f"{words} --eod-mask-loss", tmp_path / "b")
    assert plain["loss"] == pytest.approx(np.log(257)) and masked["loss"] == pytest.approx(np.log(257)), "a mean, not a sum"
    from megazero.comm.wires import connect
    from megazero.data.tokenizers import build_tokenizer
    from megazero.plan.mesh import Mesh
    from megazero.plan.plan import resolve
    from megazero.run.feed import Feed, open_splits
    from megazero.run.run import Run
    from megazero.settings import config
    c = config.from_command_line(f"{words} --eod-mask-loss".split())
    run, tokenizer = Run(resolve(c, 1, 257), torch.device("cpu"), connect(Mesh.of(), 0, "gloo", 60)), build_tokenizer("ByteTokenizer")
    (batch,) = Feed(run, open_splits(run.plan, tokenizer), tokenizer).batches(0, 0)
    assert (batch.tokens == eod).sum() == 3 and torch.equal(batch.mask == 0, batch.tokens == eod)


def test_full_validation_is_every_sample_once_whatever_the_seed(tmp_path: Path) -> None:
    """11 samples in micro-batches of 4: the mean over all tokens, not of batches; against the same tokens by hand."""
    prefix = str(tmp_path / "v")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([np.frombuffer(python_source().encode()[:11 * 24 + 5], np.uint8).astype(np.uint16)])
    words = (f"{BYTES} --train-data-path {byte_dataset(tmp_path)} --valid-data-path {prefix} --full-validation --micro-batch-size 4 "
             f"--global-batch-size 4 --train-iters 1 --save {tmp_path / 'ck'}")
    told = [r for r in train(words, tmp_path / "log") if "split" in r]
    source = open_split([prefix], None, "valid", 24, 1, shuffle=False)
    assert source.full_pass() == 11
    run = built(f"{BYTES.replace('--tokenizer-type ByteTokenizer', '--vocab-size 257 --mock-data')} --train-iters 1 --eval-iters 0")
    load(run, Reader(tmp_path / "ck"))
    tokens = torch.from_numpy(np.stack([source.in_order(i) for i in range(11)]))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(11, 24, dtype=torch.float64), torch.arange(11))
    assert told[0]["loss"] == pytest.approx(float(run.executor.evaluate(run.evaluation, batch).told["loss"]) / (11 * 24), rel=1e-12)
    other = open_split([prefix], None, "valid", 24, 9, shuffle=True)
    assert all(np.array_equal(source.in_order(i), other.in_order(i)) for i in range(11)), "neither seed nor shuffle matters to a full pass"


def test_a_dataset_made_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prefix = byte_dataset(tmp_path)
    sidecar = {"vocab_size": 200, "tokenizer": {"type": "CharTokenizer", "vocab_size": 200, "eod": None, "files": {"characters.json": "0" * 64}}}
    Path(prefix + ".json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match="was made with a CharTokenizer that is not this ByteTokenizer"):
        train(f"{BYTES} --data-path {prefix} --split 90,10,0 --train-iters 1 --eval-iters 0")


def test_another_tokenizer_on_resume_is_refused(tmp_path: Path) -> None:
    for name, characters in (("a", "abc\n"), ("b", "cba\n")):
        (tmp_path / f"{name}.json").write_text(json.dumps(list(characters)))
    words = TINY.replace("--vocab-size 101 ", "") + f" --tokenizer-type CharTokenizer --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
    train(f"{words} --tokenizer-model {tmp_path / 'a.json'} --exit-interval 2")
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        train(f"{words} --tokenizer-model {tmp_path / 'b.json'}")
    train(f"{words} --tokenizer-model {tmp_path / 'a.json'}")


def test_a_resumed_loss_scale_follows_the_rule_it_is_given_now(tmp_path: Path) -> None:
    words = f"{TINY} --fp16 --save {tmp_path} --load {tmp_path}"
    train(f"{words} --exit-interval 3")
    assert LossScale(**Reader(tmp_path).index["progress"]["loss_scale"]).good == 3
    records = train(f"{words} --loss-scale-window 2", tmp_path / "log")
    assert [r["loss_scale"] for r in records] == [65536, 131072], "three good steps are enough for a window of two"


@pytest.mark.parametrize("words", ["--train-iters 0", "--train-iters 3", "--train-iters 3 --finetune --skip-train", "--train-iters 9 --skip-train"])
def test_weights_that_are_not_trained_are_evaluated(words: str, tmp_path: Path) -> None:
    """On every set that is named: with nothing to train, a run that is over, weights alone, and as it is asked for."""
    data = byte_dataset(tmp_path)
    plain = TINY.replace("--train-iters 5 --eval-iters 0", "").replace("--mock-data", "").replace("--vocab-size 101", "--tokenizer-type ByteTokenizer")
    sets = f"--train-data-path {data} --valid-data-path {data} --test-data-path {data} --eval-iters 2 --save {tmp_path / 'run'}"
    wanted = [r["loss"] for r in train(f"{plain} {sets} --train-iters 3", tmp_path / "log") if "split" in r]
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file())
    got = train(f"{plain} {sets.replace('--save', '--load')} {words}", tmp_path / "log2")
    assert [(r["split"], r["loss"]) for r in got] == [("valid", wanted[0]), ("test", wanted[1])]
    assert sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()) == before


def test_each_validation_set_has_a_loss_of_its_own(tmp_path: Path) -> None:
    data = [byte_dataset(tmp_path / name) for name in "ab" if (tmp_path / name).mkdir() is None]
    other = str(tmp_path / "other_text_document")
    with IndexedWriter(other, np.uint16) as writer:
        writer.add_document([np.arange(4000, dtype=np.uint16) % 200])
    plain = TINY.replace("--train-iters 5 --eval-iters 0", "--train-iters 2 --eval-iters 2").replace("--mock-data", "").replace(
        "--vocab-size 101", "--tokenizer-type ByteTokenizer") + f" --train-data-path {data[0]}"
    alone = [train(f"{plain} --valid-data-path {p}", tmp_path / f"log{i}")[-1]["loss"] for i, p in enumerate((data[0], other))]
    got = [r for r in train(f"{plain} --valid-data-path {data[0]} {other} --multiple-validation-sets", tmp_path / "log") if "split" in r]
    assert [(r["split"], r["loss"]) for r in got] == [(f"valid/{Path(data[0]).name}", alone[0]), ("valid/other_text_document", alone[1])]


def test_a_learning_rate_that_jumps_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{TINY.replace('--train-iters 5', '')} --lr-decay-style cosine --save {tmp_path} --load {tmp_path}"
    train(f"{words} --train-iters 4 --exit-interval 2")
    train(f"{words} --train-iters 4")
    assert "learning rate" not in capsys.readouterr().out
    rate = train(f"{words} --train-iters 8", tmp_path / "log")[0]["lr"]
    told = capsys.readouterr().out
    assert f"changed     the learning rate of step 5 would have been 0.000e+00, is {rate:.3e}\n" in told and rate > 0, told


@pytest.mark.parametrize("words, world, talks", [("", 1, 0), ("--tp 2", 2, 2), ("--dp 2 --zero-stage 1", 2, 3), ("--pp 2", 2, 3)])
def test_there_is_room_for_all_that_lives_and_for_what_nccl_takes(words: str, world: int, talks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: activations too, and on a device the buffers of each group: `world` and its axes, those of weights twice, channels."""
    plan = resolved(f"{TINY} --bf16 --untie-embeddings-and-output-weights {words}", world)
    for kind, more in (("cuda", talks * program.NCCL), ("cpu", 0)):
        needed = sum(memory(plan, 0).values()) + more
        monkeypatch.setattr(program, "memory_of", lambda device, needed=needed: needed)
        program.room(plan, 0, torch.device(kind))
        monkeypatch.setattr(program, "memory_of", lambda device, needed=needed: needed - 1)
        with pytest.raises(UserError, match="weights, gradients, optimizer and activations take"):
            program.room(plan, 0, torch.device(kind))
