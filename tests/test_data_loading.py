"""From the configuration to batches: schedules, files of words, fill in the middle, resets at ends of documents, reading ahead."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support import built, byte_dataset, fed, named, resolved, train

from megazero.base.errors import UserError
from megazero.comm.group import Alone
from megazero.comm.wires import connect
from megazero.data.dataset import MockSamples, Reading, Samples, open_split, open_stages
from megazero.data.fim import FillInTheMiddle
from megazero.data.indexed import IndexedWriter
from megazero.data.order import ChunkOrder
from megazero.data.splits import read_schedule, samples, stages_of
from megazero.data.tokenizers import ByteTokenizer, build_tokenizer
from megazero.model.attention import attention, hiding
from megazero.model.decoder import Batch
from megazero.plan.mesh import Mesh
from megazero.plan.plan import resolve
from megazero.plan.sizes import sizes
from megazero.run.feed import Feed, Loader, bounds_of, documents_of, numbers, open_splits, positions_of
from megazero.run.run import Run
from megazero.settings import config

SMALL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 24 --lr 1e-3 --train-iters 3 --eval-iters 0 --dtype fp64"


def make(prefix: Path, tokens: int, first: int) -> str:
    with IndexedWriter(prefix, np.dtype("i4")) as writer:
        writer.add_document([np.arange(first, first + tokens)])
    return str(prefix)


def opened(stages: list, shuffle: bool = True) -> Samples:
    return open_stages(stages, None, "train", Reading(8, 1, shuffle))


def test_a_schedule_changes_nothing_before_its_step_and_repeats_nothing(tmp_path: Path) -> None:
    a, b, c = (make(tmp_path / name, 4000, first) for name, first in (("a", 0), ("b", 10_000), ("c", 20_000)))
    stages = [(0, ["3", a, "1", b]), (100, ["1", b, "1", c]), (163, ["1", a])]
    once = [opened(stages[:1]).sample(k).tolist() for k in range(300)]
    twice = [opened(stages[:2]).sample(k).tolist() for k in range(300)]
    thrice = opened(stages)
    found = [thrice.sample(k).tolist() for k in range(300)]
    assert found[:100] == once[:100] == twice[:100] and found[:163] == twice[:163] and found[100:] != once[100:]
    names = ["abc"[tokens[0] // 10_000] for tokens in found]
    assert [names[:100].count(n) for n in "abc"] == [75, 25, 0]
    assert abs(names[100:163].count("b") - 31.5) < 1 and set(names[100:163]) == {"b", "c"} and set(names[163:]) == {"a"}
    for name, path in zip("abc", (a, b, c), strict=True):                    # each goes on with its own samples where it was
        own = open_split([path], None, "train", 8, 1, shuffle=True)
        mine = [tokens for tokens, n in zip(found, names, strict=True) if n == name]
        assert mine == [own.sample(j).tolist() for j in range(len(mine))]
    assert "from sample 100 on 2 datasets, blended in shares of 1/2" in thrice.describe()


def test_files_of_words(tmp_path: Path) -> None:
    path = tmp_path / "schedule"
    path.write_text("# web first\n0 0.7 'a b' 0.3 c   # seven to three\n\n100 1 c\n")
    eight = sizes(config.from_command_line(["--global-batch-size", "8"]), 1)
    assert read_schedule(str(path), eight) == [(0, ["0.7", "a b", "0.3", "c"]), (800, ["1", "c"])]
    for text, said in (("", "holds no stage"), ("5 a\n", "line 1 should be step 0"), ("0 a\n9 b\n9 c", "line 3 should be a step after 9"),
                       ("0 a\nx b", "line 2 should be a step after 0"), ("0\n", "line 1 should be step 0"),
                       ("0 a\n" + "9" * 5000 + " b", "line 2 should be a step after 0")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"--data-schedule {path}: {said}"):
            read_schedule(str(path), eight)
    for line, words in (('0 "my #1 data/web"', ["my #1 data/web"]), ("0 my\\ #1\\ data a#b '#'  # none", ["my #1 data", "a#b", "#"]),
                        ('\ufeff0 1 "a \\"# b" #"', ["1", 'a "# b'])):
        path.write_text(line, encoding="utf-8")
        assert read_schedule(str(path), eight) == [(0, words)]
    path.write_text('0 "a # b\n')
    with pytest.raises(UserError, match=r"cannot be cut into words \(No closing quotation\)"):
        read_schedule(str(path), eight)
    (tmp_path / "words").write_text("0.7 a\n0.3 'b c'\n")
    data = config.from_command_line(["--data-args-path", str(tmp_path / "words")]).data
    assert stages_of(data, "train", eight) == (f"--data-args-path {tmp_path / 'words'}", [(0, ["0.7", "a", "0.3", "b c"])], True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--data-args-path .*pipe: cannot be read \(is not a regular file\)"):
        stages_of(config.from_command_line(["--data-args-path", str(tmp_path / "pipe")]).data, "train", eight)
    with pytest.raises(UserError, match="--data-args-path nowhere: cannot be read"):
        stages_of(config.from_command_line(["--data-args-path", "nowhere"]).data, "train", eight)


def test_configuration_to_samples(tmp_path: Path) -> None:
    data = byte_dataset(tmp_path)
    (tmp_path / "words").write_text(data)
    (tmp_path / "schedule").write_text(f"0 {data}\n2 {data}\n")
    one = samples(resolved(f"{SMALL} --vocab-size 257 --data-path {data}"), "train", None)
    for words in (f"--data-args-path {tmp_path / 'words'}", f"--train-data-path {data}", f"--data-schedule {tmp_path / 'schedule'}"):
        other = samples(resolved(f"{SMALL} --vocab-size 257 {words}"), "train", None)
        whole = open_split([data], None if "args" not in words else "969,30,1", "train", 24, 1234, shuffle=True)
        assert all(np.array_equal(other.sample(k), whole.sample(k)) for k in range(50))
    assert np.array_equal(one.sample(7), open_split([data], "969,30,1", "train", 24, 1234, shuffle=True).sample(7))
    order = samples(resolved(f"{SMALL} --vocab-size 257 --train-data-path {data} --sample-order megatron --global-batch-size 4"), "train", None)
    expected = open_stages([(0, [data])], None, "train", Reading(24, 1234, True, True, 12))
    assert all(np.array_equal(order.sample(k), expected.sample(k)) for k in range(12)) and "Megatron's order" in order.describe()


@pytest.mark.parametrize(("words", "said"), [
    ("--train-data-path y --data-args-path x", "--data-args-path and --train-data-path: choose one."),
    ("--data-schedule x --eval-iters 1", "--valid-data-path is missing"),
    ("--mock-data --test-data-path x", "--test-data-path x: is never read with --eval-iters 0."),
    ("--mock-data --valid-data-path x", "--valid-data-path x: needs --train-data-path or --data-schedule"),
    ("--mock-data --fim-rate 2", "--fim-rate 2: must be between 0 and 1."),
    ("--mock-data --fim-rate 0.5", "--fim-rate 0.5: needs text"),
    ("--data-path x --fim-rate 0.5", "--fim-rate 0.5: needs --tokenizer-type"),
    ("--data-path x --reset-attention-mask", "--reset-attention-mask: needs --tokenizer-type"),
    ("--data-path x --fim-spm-rate 0.2", "--fim-spm-rate 0.2: has no effect without --fim-rate."),
    ("--mock-data --position-embedding-type none --reset-position-ids", "--reset-position-ids: has no effect with"),
    ("--data-path x --sample-order megatron --no-shuffle", "--no-shuffle: cannot be combined with --sample-order megatron"),
    ("--data-schedule x --sample-order megatron", "--data-schedule x: cannot be combined with --sample-order megatron"),
])
def test_mistakes(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(f"{SMALL} --vocab-size 257 {words}")
    assert any(sentence.startswith(said) for sentence in caught.value.sentences), caught.value.sentences


# ---- fill in the middle


class Marked(ByteTokenizer):
    """Bytes with three special tokens beyond them."""

    names = {"<fim_prefix>": 257, "<fim_middle>": 258, "<fim_suffix>": 259}

    def id_of(self, name: str) -> int | None:
        return self.names.get(name)


class Spaced(Marked):
    """One that puts a space before every text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[32, *ids] for ids in super().encode_batch(texts)]


class Fixed:
    """The same sample under every number."""

    sequence_length = 59

    def __init__(self, text: str) -> None:
        self.tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def sample(self, k: int) -> np.ndarray:
        return np.where(self.tokens == ord("|"), 256, self.tokens)

    def full_pass(self) -> int:
        return 1

    def in_order(self, i: int) -> np.ndarray:
        return self.sample(i)

    def describe(self) -> str:
        return "fixed"


def test_fill_in_the_middle() -> None:
    source = Fixed("abcdefghijklmnopqrst|ab|ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    names = tuple(Marked.names)
    fim = FillInTheMiddle(source, Marked(), 1, 0.5, 0.5, names)
    seen = {"plain": 0, "psm": 0, "spm": 0}
    for k in range(400):
        tokens = fim.sample(k)
        assert len(tokens) == 60 and np.flatnonzero(tokens == 256).tolist() == [20, 23] and tokens[21:23].tolist() == [97, 98]
        for low, high, letters in ((0, 20, "abcdefghijklmnopqrst"), (24, 60, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")):
            seen[kind_of(tokens[low:high].tolist(), letters)] += 1
        assert np.array_equal(tokens, FillInTheMiddle(source, Marked(), 1, 0.5, 0.5, names).sample(k))
    assert 0.3 < seen["plain"] / 800 < 0.7 and 0.7 < seen["psm"] / seen["spm"] < 1.4
    assert FillInTheMiddle(source, Marked(), 2, 0.5, 0.5, names).sample(0).tolist() != fim.sample(0).tolist() or \
        FillInTheMiddle(source, Marked(), 2, 0.5, 0.5, names).sample(1).tolist() != fim.sample(1).tolist()
    assert np.array_equal(fim.in_order(0), source.sample(0)) and "50% of the documents with a gap to fill" in fim.describe()
    cut = Fixed("\x80" + "x" * 59)
    cut.tokens = np.array([0xA9, *[120] * 59])                          # begins within a character: left as it is
    assert np.array_equal(FillInTheMiddle(cut, Marked(), 1, 1.0, 0.5, names).sample(0), cut.sample(0))
    with pytest.raises(UserError, match="--fim-rate 0.5: this tokenizer puts something before every text"):
        FillInTheMiddle(source, Spaced(), 1, 0.5, 0.5, names)
    with pytest.raises(UserError, match=r"--fim-prefix-token '\\udcff': is no token of this tokenizer"):
        FillInTheMiddle(MockSamples(9, 8, 1), ByteTokenizer(), 1, 0.5, 0.5, ("\udcff", "<gap>", "<x>"))
    with pytest.raises(UserError, match="--fim-middle-token '<gap>': is no token of this tokenizer"):
        FillInTheMiddle(source, Marked(), 1, 0.5, 0.5, ("<fim_prefix>", "<gap>", "<fim_suffix>"))


def kind_of(tokens: list[int], letters: str) -> str:
    """What became of a document; asserts that its pieces are the document's, less the end of the suffix."""
    if tokens[0] != 257:
        assert bytes(tokens).decode() == letters
        return "plain"
    suffix_first = tokens[1] == 259
    at, middle = tokens.index(259), tokens.index(258)
    if suffix_first:
        suffix, rest = tokens[2:middle], tokens[middle + 1:]
        whole = bytes(rest + suffix).decode()
    else:
        whole = bytes(tokens[1:at] + tokens[middle + 1:] + tokens[at + 1:middle]).decode()
    assert whole == letters[:-3]
    return "spm" if suffix_first else "psm"


# ---- resets


def test_documents_and_positions() -> None:
    tokens = torch.tensor([[5, 9, 9, 1, 2, 9, 3], [1, 2, 3, 4, 5, 6, 7], [9, 1, 9, 1, 9, 1, 9]])
    assert documents_of(tokens, 9).tolist() == [[0, 0, 1, 2, 2, 2, 3], [0] * 7, [0, 1, 1, 2, 2, 3, 3]]
    assert bounds_of(tokens, 9).tolist() == [0, 2, 3, 6, 7, 14, 15, 17, 19, 21]
    assert positions_of(tokens, 9).tolist() == [[0, 1, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 0, 1]]


def fed_by(words: str) -> tuple[Run, Feed]:
    c = config.from_command_line(f"{SMALL} --tokenizer-type ByteTokenizer --mock-data {words}".split())
    run, tokenizer = Run(resolve(c, 1, 257), torch.device("cpu"), connect(Mesh.of(), 0, "gloo", 60)), build_tokenizer("ByteTokenizer")
    run.initialise()
    return run, Feed(run, open_splits(run.plan, tokenizer), tokenizer)


def losses(run: Run, feed: Feed, tokens: torch.Tensor) -> float:
    return float(run.executor.evaluate(run.evaluation, feed.batch(tokens, range(len(tokens)), None)).told["loss"])


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_documents_of_a_sample_are_trained_as_if_alone(positions: str) -> None:
    """Loss of one packed sample = sum of the losses of its documents by themselves, in float64."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.cat((torch.randint(256, (n,), generator=generator), torch.tensor([256]))) for n in (7, 1, 12)]
    packed = torch.cat([*documents, torch.randint(256, (3,), generator=generator)])[None]              # [1, 26]
    run, feed = fed_by(f"--position-embedding-type {positions} --reset-position-ids --reset-attention-mask --seq-length 25")
    together = losses(run, feed, packed)
    bounds = [0, 8, 10, 23, 26]
    alone = 0.0
    for low, high in zip(bounds, bounds[1:], strict=False):
        own = packed[:, low:min(high + 1, 26)]                                # a last token also predicts the next document's first
        alone += losses(run, feed, own)
    assert together == pytest.approx(alone, rel=1e-12)


def test_dropout_of_attention_weights_honours_documents() -> None:
    q, k, v = (torch.randn(1, 10, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    documents = torch.tensor([[0] * 4 + [1] * 6])
    keep = torch.ones(1, 2, 10, 10, dtype=torch.float64)
    mask = hiding(torch.arange(10)[None], documents, q.dtype)
    assert (attention(q, k, v, mask, Alone(), keep) - attention(q, k, v, mask, Alone())).abs().max() < 1e-14


def test_each_reset_does_its_own_part() -> None:
    """Positions alone: later tokens still see earlier documents and never what comes after them."""
    tokens = torch.randint(256, (1, 25), generator=torch.Generator().manual_seed(1))
    tokens[0, 9] = 256
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 256
    later = tokens.clone()
    later[0, 20] = (later[0, 20] + 1) % 256

    def per_token(parts: tuple[Run, Feed], t: torch.Tensor) -> torch.Tensor:
        run, feed = parts
        batch = feed.batch(t, range(1), None)
        return torch.stack([run.executor.evaluate(run.evaluation, Batch(batch.tokens, batch.targets, torch.eye(24)[None, i].double(), batch.samples,
                                                                        None, batch.positions, batch.documents)).told["loss"] for i in range(24)])

    for words, sees in (("", True), ("--reset-position-ids", True), ("--reset-attention-mask", False)):
        parts = fed_by(f"--position-embedding-type rope {words}")
        base = per_token(parts, tokens)
        assert torch.equal(base[:19], per_token(parts, later)[:19]), "the future is not seen"
        assert torch.equal(base[10:], per_token(parts, changed)[10:]) is not sees
    both, none = per_token(fed_by("--position-embedding-type rope --reset-position-ids"), tokens), per_token(fed_by("--position-embedding-type rope"), tokens)
    assert torch.equal(both[:10], none[:10]) and not torch.equal(both[10:], none[10:])


def test_end_of_document_is_needed() -> None:
    from megazero.run.train import main
    path = Path(__file__).with_name("letters.json")
    for flag in ("--eod-mask-loss", "--reset-position-ids", "--reset-attention-mask"):
        path.write_text('["a", "b"]')
        try:
            with pytest.raises(UserError, match=f"{flag}: CharTokenizer has no end-of-document token; name one with --eod-token, or leave it out."):
                main(config.from_command_line(f"{SMALL} --mock-data --tokenizer-type CharTokenizer --tokenizer-model {path} {flag}".split()))
        finally:
            path.unlink()


# ---- reading ahead


def test_the_loader_reads_the_next_step_in_the_background() -> None:
    mock, read, threads = MockSamples(50, 8, 1), [], set()

    def sample(k: int) -> np.ndarray:
        read.append(k)
        threads.add(threading.current_thread().name)
        if k >= 100:
            raise UserError("sample 100 is damaged.")
        return mock.sample(k)

    loader = Loader(sample, pin=False)
    for first in (0, 4, 8, 2, 6):                                            # a jump back, as after an evaluation that failed
        tokens = loader.take([range(first, first + 2), range(first + 2, first + 4)], [range(first + 4, first + 6), range(first + 6, first + 8)])
        assert [t.tolist() for t in tokens] == [[mock.sample(k).tolist() for k in range(low, low + 2)] for low in (first, first + 2)]
    loader.take([range(6, 8)], [range(99, 101)])
    with pytest.raises(UserError, match="sample 100 is damaged"):
        loader.take([range(99, 101)], [])
    loader.close()
    assert threads == {"loader_0"} and read[:8] == list(range(8)) and read.count(4) == 2


@pytest.mark.gpu
def test_what_is_read_for_a_gpu_is_pinned() -> None:
    loader = Loader(MockSamples(50, 8, 1).sample, pin=True)
    (tokens,) = loader.take([range(0, 2)], [range(2, 4)])
    assert tokens.is_pinned() and torch.equal(tokens.cuda(non_blocking=True).cpu(), torch.from_numpy(np.stack([MockSamples(50, 8, 1).sample(k) for k in (0, 1)])))
    loader.close()


def test_reading_ahead_changes_no_step_and_a_test_set_is_evaluated_at_the_end(tmp_path: Path) -> None:
    data = byte_dataset(tmp_path)
    words = (f"{SMALL} --vocab-size 257 --train-data-path {data} --micro-batch-size 2 --global-batch-size 4").replace("--eval-iters 0", "--eval-iters 2")
    lines = train(f"{words} --valid-data-path {data} --test-data-path {data} --eval-interval 2", tmp_path / "log")
    told = [(r["step"], r["split"]) for r in lines if "split" in r]
    assert told == [(2, "valid"), (3, "valid"), (3, "test")]
    assert lines[-1]["loss"] == [r for r in lines if r.get("split") == "valid"][-1]["loss"]
    run = built(f"{SMALL} --vocab-size 257 --train-data-path {data} --micro-batch-size 2 --global-batch-size 4")
    feed = fed(run)
    for first in (0, 4, 40):
        found = torch.cat([b.tokens for b in feed.batches(0, first)])
        assert torch.equal(found, torch.from_numpy(np.stack([feed.splits.train.sample(k)[:-1] for k in range(first, first + 4)])))
    assert named(run)


def test_the_same_samples_for_any_number_of_ranks_and_after_a_resume_at_another() -> None:
    """Each epoch of a small dataset serves every sample once; steps of 12 at dp 1, 2, 3, 4, then 24, then again another dp."""
    order, first = ChunkOrder(24 * 8 + 3, 8, 5, shuffle=True), 0
    served: list[int] = []
    for dp, micro, count in ((1, 3, 4), (2, 3, 2), (3, 2, 2), (4, 1, 3), (4, 3, 2), (3, 4, 1), (1, 12, 1)):
        step = sorted(k for rank in range(dp) for own in numbers(first, micro, count, dp, rank) for k in own)
        assert step == list(range(first, first + dp * micro * count))
        served += step
        first += dp * micro * count
    assert served == list(range(first)) and first == 96
    at = 0
    for epoch in range(4):
        size = order.chunks(epoch)
        assert sorted(order.start(k) for k in served[at:at + size]) == [order.shift(epoch) + 8 * i for i in range(len(served[at:at + size]))]
        at += size
    assert at >= 92
