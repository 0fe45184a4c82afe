"""A run's tokenizer in transformers: the same ids for every text, or a sentence and no file."""

import base64
import io
import json
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from support import tool, train

from megazero.base.errors import UserError
from megazero.data.splits import configured_tokenizer
from megazero.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer, same_tokenizer
from megazero.hf.convert import export_folder, import_folder
from megazero.hf.tokenizer import HARD, outlook
from megazero.settings.config import from_command_line
from megazero.state.checkpoint import Reader

transformers = pytest.importorskip("transformers", reason="exports are tested against transformers, which is not installed")
ROOT = Path(__file__).parents[1]
CORPUS = (ROOT / "tests" / "golden" / "corpus.txt").read_text()
DOCS = [line for name in ("README.md", "docs/data.md", "docs/design.md") for line in (ROOT / name).read_text().split("\n")]
SYMBOLS = ["<fim_prefix>", "<fim>", "<fim><gap>"]
TEXTS = [*HARD, *CORPUS.split("\n"), CORPUS, *(a + s + b for s in SYMBOLS for a in ("", "x", " ", "a ", "  ", "<fim>", "</s>")
                                               for b in ("", "x", " ", " a", "<s>", "<0x0A>", "☃", "<fim_prefix>"))]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def run_with(kind: str, flags: str, folder: Path) -> Reader:
    """A checkpoint at step 0 of a tiny model with that tokenizer."""
    train(f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1 --eval-iters 0 --train-iters 0 --openai-gelu "
          f"--mock-data --tokenizer-type {kind} {flags} --save {folder / 'run'}")
    return Reader(folder / "run")


def exported(kind: str, flags: str, folder: Path) -> tuple[Tokenizer, Any, str | None]:
    """(ours, what transformers loads from the export, the sentence if there is no tokenizer in it)."""
    reader = run_with(kind, flags, folder)
    _, without = export_folder(reader, folder / "hf")
    ours = load_tokenizer(reader.index["tokenizer"], folder / "run" / "tokenizer")
    return ours, None if without else transformers.AutoTokenizer.from_pretrained(folder / "hf"), without


def sentencepiece_model(path: Path, run: int = 0, **settings: Any) -> str:
    """A small model; of runs of up to `run` spaces, with one score for all of them."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS.split("\n"), "a  b c     d"]), model_writer=made, minloglevel=2, num_threads=1, **{"vocab_size": 600, **settings})
    model = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())
    for pieces in range(1, run + 1) if run else ():
        name = "\u2581" * pieces
        piece = next((p for p in model.pieces if p.piece == name), None) or model.pieces.add(piece=name)
        piece.score = -1e9
    path.write_bytes(model.SerializeToString())
    return f"--tokenizer-model {path}"


MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, **PLAIN},
    "bpe, spaces with one score": {"model_type": "bpe", "byte_fallback": True, "run": 9, **PLAIN},
    "bpe, no prefix, user-defined": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS,
                                     **PLAIN},
    "bpe, user-defined, unknown": {"model_type": "bpe", "user_defined_symbols": SYMBOLS, "character_coverage": 0.98, **PLAIN},
    "bpe, normalised": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "bpe, normalised, spaces kept": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": False},
    "bpe, a suffix": {"model_type": "bpe", "byte_fallback": True, "treat_whitespace_as_suffix": True, **PLAIN},
    "unigram": {"model_type": "unigram", "byte_fallback": True, **PLAIN},
    "unigram, as it comes": {"model_type": "unigram", "character_coverage": 0.98},
    "unigram, user-defined": {"model_type": "unigram", "user_defined_symbols": SYMBOLS, "normalization_rule_name": "nfkc"},
    "characters": {"model_type": "char", "byte_fallback": True, "user_defined_symbols": SYMBOLS, "hard_vocab_limit": False, **PLAIN},
}


@pytest.mark.parametrize("kind, name", [*(("SentencePieceTokenizer", name) for name in MODELS),
                                        *(("Llama2Tokenizer", name) for name in ("bpe", "unigram, as it comes", "bpe, user-defined, unknown"))])
def test_a_sentencepiece_model_gives_the_same_ids_in_transformers(kind: str, name: str, tmp_path: Path) -> None:
    ours, theirs, without = exported(kind, sentencepiece_model(tmp_path / "t.model", **MODELS[name]), tmp_path)
    assert without is None
    assert_same(ours, theirs, [*TEXTS, *([] if "unigram" in name else DOCS)], tmp_path)


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str], folder: Path) -> None:
    """transformers, `tokenizers` alone, and what is imported again give our ids; the files agree on special tokens."""
    expected = dict(zip(texts, ours.encode_batch(texts), strict=True))
    alone = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    for given in (theirs(texts)["input_ids"], [e.ids for e in alone.encode_batch(texts)]):
        wrong = [(text, ids, expected[text]) for text, ids in zip(texts, given, strict=True) if ids != expected[text]]
        assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[0]}"
    config = transformers.AutoConfig.from_pretrained(folder / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert config.eos_token_id == ours.eod and config.bos_token_id == (ours.eod if ours.bos is None else ours.bos)
    import_folder(folder / "hf", folder / "again")
    again = Reader(folder / "again").index["tokenizer"]
    assert same_tokenizer(again, ours.identity()), again


needs_mistral = pytest.mark.skipif(find_spec("mistral_common") is None, reason="mistral-common, which holds real models, is not installed")


def mistral(name: str) -> Path:
    """A file of the package."""
    return Path(str(find_spec("mistral_common").submodule_search_locations[0])) / "data" / name      # type: ignore[union-attr,index]


@needs_mistral
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
def test_mistrals_own_model_gives_the_same_ids_in_transformers(kind: str, tmp_path: Path) -> None:
    ours, theirs, without = exported(kind, f"--tokenizer-model {mistral('tokenizer.model.v1')}", tmp_path)
    assert without is None
    begin = [1] if kind == "Llama2Tokenizer" else []
    for text, ids in {"a  b": [264, 28705, 287], " Hello": [28705, 22557], " ": [259], "   ": [260], "\u2581x": [28705, 1318],
                      "a\n  b": [264, 13, 28705, 287]}.items():
        assert theirs(text)["input_ids"] == [*begin, *ids] == ours.encode(text), text
    assert_same(ours, theirs, [*TEXTS, *DOCS, *(" " * n for n in range(99))], tmp_path)


def patched(path: Path, change: Callable[[Any], None]) -> None:
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())


def test_what_cannot_be_said_is_a_sentence_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces of one score that no order of merges can tell apart, a model of words, characters: the weights are exported all the same."""
    pytest.importorskip("tiktoken")
    flags = sentencepiece_model(tmp_path / "t.model", **MODELS["bpe"])

    def one_score(model: Any) -> None:
        for piece in model.pieces:
            piece.score = -1.0

    patched(tmp_path / "t.model", one_score)
    (tmp_path / "letters.json").write_text(json.dumps([" ", "a"]))
    (tmp_path / "tekken.json").write_text(json.dumps({                   # (?P<n>) is a name to tiktoken alone
        "config": {"pattern": r"(?P<n>\p{L})|[\s\S]", "default_vocab_size": 259, "default_num_special_tokens": 3},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]}))
    words = sentencepiece_model(tmp_path / "w.model", model_type="word", hard_vocab_limit=False)
    for i, (kind, given, said) in enumerate([
        ("SentencePieceTokenizer", flags, r"SentencePieceTokenizer: '.{1,20}' is \[.*\] here and would be \[.*\] in transformers; no tokenizer was written"),
        ("SentencePieceTokenizer", words, "a tokenizer.json cannot say what a model of whole words"),
        ("TiktokenTokenizer", f"--tokenizer-model {tmp_path / 'tekken.json'}", r"the library behind transformers does not take it \(.*\); train with another; no tokenizer was written"),
        ("CharTokenizer", f"--tokenizer-model {tmp_path / 'letters.json'}", "a tokenizer.json cannot say what a CharTokenizer does"),
    ]):
        folder = tmp_path / str(i)
        folder.mkdir()
        run_with(kind, given, folder)
        code, told, warned = tool(monkeypatch, capsys, "convert_hf.py", "export", "--load", folder / "run", "--output", folder / "hf")
        assert code == 0 and "no tokenizer" in told and re.fullmatch(f"warning: .*{said}.*\n", warned), warned
        assert sorted(p.name for p in (folder / "hf").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
        with pytest.raises(ValueError, match="Couldn't instantiate"):
            transformers.AutoTokenizer.from_pretrained(folder / "hf")


def test_a_model_without_an_unknown_piece_cannot_be_said(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "t.model", **MODELS["bpe"])
    patched(tmp_path / "t.model", lambda model: setattr(model.pieces[0], "type", 1))
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "t.model"))
    assert outlook(tokenizer).endswith("cannot be exported: a tokenizer.json cannot say what a model without an unknown piece does")


def test_an_export_looks_at_the_ids_that_are_there(tmp_path: Path) -> None:
    """The last rank of a file may be 2^30; and what the other library cannot cut is a sentence."""
    pytest.importorskip("tiktoken")
    pieces = [*((bytes([b]), b) for b in range(256)), (b"aa", 2**30)]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in pieces))
    tokenizer = build_tokenizer("TiktokenTokenizer", str(tmp_path / "t.tiktoken"))
    assert tokenizer.encode("aaa") == [2**30, 97] and outlook(tokenizer) == "TiktokenTokenizer, which can be exported"
    said = {**tokenizer.words(), "pre_tokenizer": {"type": "FixedLength", "length": 0}}
    tokenizer.words = lambda: said                                                                  # type: ignore[method-assign]
    assert "the library behind transformers does not take it (chunk size must be non-zero)" in outlook(tokenizer)


def test_a_check_says_before_training_whether_the_tokenizer_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letters.json").write_text(json.dumps([" ", "a"]))
    for flags, said in (("ByteTokenizer", "ByteTokenizer, which can be exported"),
                        (f"CharTokenizer --tokenizer-model {tmp_path / 'letters.json'}",
                         "CharTokenizer, which cannot be exported: a tokenizer.json cannot say what a CharTokenizer does")):
        train("--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1 --eval-iters 0 --train-iters 1 --check --mock-data "
              f"--tokenizer-type {flags}")
        assert f"tokenizer   {said}\n" in capsys.readouterr().out


def test_bytes_and_tiktokens_ids_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what an import prints to go on with makes the same tokenizer again."""
    pytest.importorskip("tiktoken")
    pieces = [*(bytes([b]) for b in range(256)), b"he", b"ll", b"hell", b"hello", b" w", b" wo", b"rl", b"rld", b"  ", b"    ", b"\n\n"]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    said = {"config": {"pattern": r"\p{L}+| ?[^\s\p{L}]+|\s+", "default_vocab_size": 270, "default_num_special_tokens": 3},
            "vocab": [{"rank": i, "token_bytes": base64.b64encode(piece).decode()} for i, piece in enumerate(pieces)]}
    (tmp_path / "tekken.json").write_text(json.dumps(said))
    file = f"--tokenizer-model {tmp_path / 't.tiktoken'}"
    for i, (kind, flags) in enumerate([
        ("ByteTokenizer", ""), ("ByteTokenizer", "--eod-token \x01"), ("TiktokenTokenizer", file),
        ("TiktokenTokenizer", f"{file} --special-tokens <one> <fim_prefix> </s> --eod-token <one>"),
        ("TiktokenTokenizer", f"--tokenizer-model {tmp_path / 'tekken.json'}")]):
        folder = tmp_path / str(i)
        folder.mkdir()
        ours, theirs, without = exported(kind, flags, folder)
        assert without is None
        assert_same(ours, theirs, [*TEXTS, *DOCS], folder)
        told = tool(monkeypatch, capsys, "convert_hf.py", "import", "--input", folder / "hf", "--output", folder / "tool")[1]
        config = from_command_line(shlex.split(told.split("train on with: ")[1]) + ["--mock-data", "--lr", "1", "--train-iters", "1"])
        assert same_tokenizer(configured_tokenizer(config).identity(), ours.identity())                 # type: ignore[union-attr]


def test_a_begin_that_training_never_saw_is_not_put_before_texts(tmp_path: Path) -> None:
    """A tokenizer.json may put tokens around a text; training leaves them out, so the export does, and names what config.json does."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([CORPUS], vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "kept",
         "auto_map": {"AutoTokenizer": ["theirs--code.Tokenizer", None]}}))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    ours, theirs, without = exported("HuggingFaceTokenizer", f"--tokenizer-model {tmp_path}", tmp_path)
    assert without is None and theirs.bos_token == theirs.eos_token == "</s>" and theirs.chat_template == "kept"
    texts = [*TEXTS, *DOCS]
    assert theirs(texts)["input_ids"] == ours.encode_batch(texts)
    assert "auto_map" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())


def test_a_tokenizer_json_that_adds_nothing_is_exported_byte_for_byte_and_found_again(tmp_path: Path) -> None:
    """So datasets made with it are still those of an import; a wrong description of ours is a sentence."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([CORPUS], vocab_size=400, special_tokens=["<stop>", "<|endoftext|>"], show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    ours, theirs, without = exported("HuggingFaceTokenizer", f"--tokenizer-model {tmp_path} --eod-token <stop>", tmp_path)
    assert without is None and ours.eod == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert_same(ours, theirs, TEXTS, tmp_path)
    path = tmp_path / "hf" / "tokenizer_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    assert same_tokenizer(import_folder(tmp_path / "hf", tmp_path / "kept")[1].identity(), ours.identity())
    assert json.loads((tmp_path / "kept" / "tokenizer" / path.name).read_text()) == said, "all but the names of code"
    load_tokenizer(Reader(tmp_path / "kept").index["tokenizer"], tmp_path / "kept" / "tokenizer")
    for wrong, sentence in ((3, "it is 3, not a mapping"), ({"type": "ByteTokenizer", "eod": 257}, "it is 257, not a whole number"),
                            ({"type": "ByteTokenizer"}, "it has no eod")):
        path.write_text(json.dumps({**said, "megazero_tokenizer": wrong}))
        with pytest.raises(UserError, match=f"megazero_tokenizer: {sentence}.*; remove it"):
            import_folder(tmp_path / "hf", tmp_path / "wrong")


@pytest.mark.parametrize("shape", ["--openai-gelu", "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 "
                                   "--disable-bias-linear --untie-embeddings-and-output-weights"])
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_a_stranger_generates_what_transformers_does(shape: str, kind: str, tmp_path: Path) -> None:
    """CTranslate2 reads the export by itself: weights, configuration, special tokens and the names of all ids."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="the stranger that reads an export, CTranslate2, is not installed")
    from ctranslate2.converters import TransformersConverter
    if kind == "HuggingFaceTokenizer":                  # as tools/train_tokenizer.py writes it: eos alone is named
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator([CORPUS], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
        flags = f"--tokenizer-model {tmp_path}"
    else:
        flags = sentencepiece_model(tmp_path / "t.model", **MODELS["bpe"])
    train(f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 48 --lr 1e-2 --eval-iters 0 --train-iters 2 {shape} "
          f"--init-method-std 0.2 --mock-data --tokenizer-type {kind} {flags} --save {tmp_path / 'run'}")
    export_folder(Reader(tmp_path / "run"), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), intra_threads=1)
    for text in ("Tensors are logical", "a  b"):
        ids = theirs(text)["input_ids"]
        want = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0].tolist()
        got = generator.generate_batch([theirs.convert_ids_to_tokens(ids)], max_length=20, beam_size=1, include_prompt_in_result=False)
        assert got[0].sequences_ids[0] == [i for i in want[len(ids):] if i != theirs.eos_token_id] != []
