"""Generation: the index alone builds the decoder, greedy text is transformers' greedy text, and what cannot be is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import built, byte_dataset, named, tool, train

from megazero.base.errors import UserError
from megazero.data.tokenizers import build_tokenizer
from megazero.run.generate import build_from_checkpoint, choose, generate, stream_text
from megazero.state.checkpoint import Reader

TINY = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 8 --lr 3e-3 --eval-iters 0 "
        "--openai-gelu --tokenizer-type ByteTokenizer --split 1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learnt a little Python."""
    folder = tmp_path_factory.mktemp("trained")
    train(f"{TINY} --data-path {byte_dataset(folder)} --train-iters 60 --save {folder / 'run'}")
    return folder / "run"


def test_the_decoder_is_that_of_the_run(tmp_path: Path) -> None:
    """All shapes of a decoder, also those without a family."""
    for words in ("--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --qk-layernorm --kv-channels 24 "
                  "--use-rope-scaling --untie-embeddings-and-output-weights", "--squared-relu --position-embedding-type none"):
        base = (f"--num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 24 --vocab-size 101 --lr 1 --mock-data "
                f"--eval-iters 0 {words}")
        folder = tmp_path / str(len(words))
        train(f"{base} --train-iters 0 --save {folder}")
        decoder, run = build_from_checkpoint(Reader(folder)), built(f"{base} --train-iters 1")
        assert decoder.a == replace(run.plan.architecture, pad_rows=1)
        for name, tensor in named(run).items():
            assert torch.equal(tensor, next(u.master[p.start:p.stop].view(tensor.shape) for u in decoder.units.values()
                                            for p in u.flat.pieces if p.shard.parameter.name == name))


def test_greedy_is_transformers_greedy(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="greedy generation is compared with transformers, which is not installed")
    from megazero.hf.convert import export_folder
    export_folder(Reader(trained), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompt = list(b"def __init__")
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
    assert list(generate(build_from_checkpoint(Reader(trained)), prompt, 16)) == theirs


def test_it_goes_on_beyond_the_sequence_length_and_stops_at_the_end(trained: Path) -> None:
    decoder = build_from_checkpoint(Reader(trained))
    tokens = list(generate(decoder, list(b"import"), 50))
    assert len(tokens) == 50
    cropped = list(generate(decoder, [*b"import", *tokens[:40]][-32:], 10))
    assert cropped == tokens[40:]
    first = tokens.index(tokens[7])
    assert list(generate(decoder, list(b"import"), 50, stop=tokens[7])) == tokens[:first]


def test_draws_depend_on_the_seed_alone_and_keep_to_the_likeliest(trained: Path) -> None:
    decoder = build_from_checkpoint(Reader(trained))
    def drawn(**more: Any) -> list[int]:
        return list(generate(decoder, list(b"def "), 20, temperature=1.0, **more))
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(top_k=1) == list(generate(decoder, list(b"def "), 20))
    assert all(t < 5 for t in drawn(vocab_size=5))
    source, scores = torch.Generator().manual_seed(0), torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    counts = torch.bincount(torch.tensor([choose(scores, 0.5, 3, source) for _ in range(4000)]), minlength=4) / 4000
    wanted = torch.softmax(torch.tensor([-torch.inf, 2.0, 4.0, 6.0]), 0)
    assert counts[0] == 0 and (counts - wanted).abs().max() < 0.03, counts


def test_a_character_waits_for_its_bytes() -> None:
    tokenizer = build_tokenizer("ByteTokenizer")
    ids = tokenizer.encode("é漢!")
    assert [p for p in stream_text(tokenizer, tokenizer.encode("a"), ids) if p] == ["é", "漢", "!"]
    assert "".join(stream_text(tokenizer, [], ids[:-2])) == "é\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_write_no_text(temperature: float, trained: Path) -> None:
    decoder = build_from_checkpoint(Reader(trained))
    next(iter(decoder.units.values())).weight_slice.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^--load: its model's scores are not finite; load another step with --ckpt-step\.$"):
        next(generate(decoder, [1], 1, temperature))


def test_the_tool(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = tool(monkeypatch, capsys, "generate.py", "--load", trained, "--prompt", "def ", "--max-new-tokens", 12)
    expected = bytes(generate(build_from_checkpoint(Reader(trained)), list(b"def "), 12)).decode()
    assert (code, out) == (0, f"def {expected}\n")
    words = ("--prompt", "", "--temperature", "0.8", "--top-k", 5, "--max-new-tokens", 3)
    assert tool(monkeypatch, capsys, "generate.py", "--load", trained, *words)[0] == 0
    mock = TINY.replace("--tokenizer-type ByteTokenizer --split 1", "--vocab-size 9 --mock-data")
    train(f"{mock} --train-iters 0 --save {tmp_path / 'mock'}")
    for wrong, sentence in (
        (("--load", tmp_path / "mock", "--prompt", "a"), "was trained without a tokenizer"), (("--load", trained), "--prompt is missing"),
        (("--load", trained, "--prompt", "a\udcffb"), "--prompt 'a\\udcffb': is not UTF-8 text"),
        (("--load", trained, "--prompt", "a", "--temperature", -1), "--temperature -1: must be 0 or greater"),
        (("--load", trained, "--prompt", "a", "--top-k", 0, "--temperature", 1), "--top-k 0: must be at least 1"),
        (("--load", trained, "--prompt", "a", "--top-k", 3), "has no effect at temperature 0"),
        (("--load", trained, "--prompt", "a", "--max-new-tokens", -1), "--max-new-tokens -1: must be 0"),
        (("--load", tmp_path / "none", "--prompt", "a"), "there is no such folder"),
        (("--load", trained, "--prompt", "a", "--temprature", 1), "did you mean --temperature"),
    ):
        code, _, said = tool(monkeypatch, capsys, "generate.py", *wrong)
        assert code == 2 and sentence in said and said.count("\n") == 1, (wrong, said)
