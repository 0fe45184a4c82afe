"""Tokenizers from strangers: damaged bytes of every kind of file, forged and spoiled JSON. What comes of it may cut otherwise: a file says what it says."""

import base64
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fuzz.support import accident, cases, forged, hunt, spoiled
from megazero.data.tokenizers import build_tokenizer

TEXTS = ["the cat  sat\n on the mat", "", " é😀\t<|endoftext|>", "x" * 300]
KINDS = {"HuggingFaceTokenizer": ["tokenizer.json", "tokenizer_config.json"], "GPT2BPETokenizer": ["vocab.json", "merges.txt"], "SentencePieceTokenizer": ["m.model"],
         "Llama2Tokenizer": ["m.model"], "CharTokenizer": ["characters.json"], "TiktokenTokenizer": ["t.tiktoken"], "tekken": ["tekken.json"]}


def made(kind: str, folder: Path) -> None:
    folder.mkdir()
    words = ["the", "cat", "sat", "on", "mat"] * 9
    if kind in ("HuggingFaceTokenizer", "GPT2BPETokenizer"):
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
                                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if kind == "GPT2BPETokenizer":
            bpe.model.save(str(folder))
            return
        bpe.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    elif kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        from sentencepiece import SentencePieceTrainer
        model = io.BytesIO()
        SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=model, vocab_size=280, model_type="bpe", byte_fallback=True, minloglevel=2,
                                   hard_vocab_limit=False)
        (folder / "m.model").write_bytes(model.getvalue())
    elif kind == "CharTokenizer":
        (folder / "characters.json").write_text(json.dumps(sorted(set("the cat sat on mat\nx"))))
    else:
        pieces = [bytes([b]) for b in range(256)] + [b"th", b"the", b"at"]
        if kind == "TiktokenTokenizer":
            (folder / "t.tiktoken").write_text("".join(f"{base64.b64encode(p).decode()} {i}\n" for i, p in enumerate(pieces)))
        else:
            rows = [{"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None} for i, p in enumerate(pieces)]
            (folder / "tekken.json").write_text(json.dumps({"config": {"pattern": r"\w+|\W", "num_vocab_tokens": len(pieces), "default_vocab_size": len(pieces) + 4,
                                                                       "default_num_special_tokens": 4, "version": "v3"}, "vocab": rows}))


def use(kind: str, folder: Path) -> list[list[int]]:
    """Built, and asked for all that training and generation ask for."""
    first = folder / KINDS[kind][0]
    name = "TiktokenTokenizer" if kind == "tekken" else kind
    flags = {"vocab_file": str(first), "merge_file": str(folder / "merges.txt")} if name == "GPT2BPETokenizer" else {
        "tokenizer_model": str(folder if kind == "HuggingFaceTokenizer" else first)}
    tokenizer = build_tokenizer(name, **flags)
    texts = [text for text in TEXTS if name != "CharTokenizer" or not set(text) - set("the cat sat on mat\nx")]
    ids = tokenizer.encode_batch(texts)
    flat, lengths = tokenizer.encode_flat(texts, np.dtype("i4"))
    assert flat.tolist() == sum(ids, []) and lengths.tolist() == [len(i) for i in ids]
    assert all(0 <= i < tokenizer.vocab_size for own in ids for i in own) and (tokenizer.eod is None or 0 <= tokenizer.eod < tokenizer.vocab_size)
    for own in ids:
        tokenizer.decode(own)
    assert json.loads(json.dumps(tokenizer.identity()))["vocab_size"] == tokenizer.vocab_size
    return ids


def damage(rng: Random, folder: Path) -> str:
    jsons = sorted(folder.glob("*.json"))
    if not jsons or rng.random() < 0.4:
        return accident(rng, folder)
    path = rng.choice(jsons)
    value: Any = json.loads(path.read_text())
    found, what = forged(rng, value) if rng.random() < 0.7 else spoiled(rng, value)
    path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    return f"{path.name}: {what}"


@pytest.mark.parametrize("kind", KINDS)
@cases(150, 1500)
def test_tokenizers(count: int, kind: str, tmp_path: Path) -> None:
    if kind in ("TiktokenTokenizer", "tekken"):
        pytest.importorskip("tiktoken")
    good = tmp_path / "good"
    made(kind, good)
    assert [p.name for p in sorted(good.iterdir())] == sorted(KINDS[kind])
    (tmp_path / "work").mkdir()
    use(kind, good)
    hunt(f"tokenizer {kind}", count, good, tmp_path / "work", damage, lambda folder: use(kind, folder), lambda _: True)
