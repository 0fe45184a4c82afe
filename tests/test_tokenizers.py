"""Every tokenizer type: known ids, text back again, what a checkpoint keeps, and the sentence for each mistake."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megazero.base.errors import UserError
from megazero.corpus.preprocess import PreprocessSettings, preprocess
from megazero.data.indexed import IndexedDataset
from megazero.data.sidecar import check_sidecar
from megazero.data.splits import configured_tokenizer
from megazero.data.tokenizers import (
    TYPES,
    ByteTokenizer,
    Tokenizer,
    build_tokenizer,
    characters_of,
    load_tokenizer,
    same_tokenizer,
)
from megazero.plan.checks import checks
from megazero.settings.config import from_command_line

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
FILES = DATA / "tokenizers"
needs_files = pytest.mark.skipif(not FILES.exists(), reason=f"the tokenizers to compare with are not at {FILES}")
ODD = ["", " ", "\n\n", "Hello world", "a\u2028b\r\n\0c", "日本語 😀 e\u0301", "<|endoftext|>x<|endoftext|>",
       "  two  spaces\t\ttabs ", "x" * 5000]


def gpt2() -> Tokenizer:
    vocab, merges = FILES / "gpt2" / "vocab.json", FILES / "gpt2" / "merges.txt"
    return build_tokenizer("GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merges))


@needs_files
def test_gpt2_ids() -> None:
    tokenizer = gpt2()
    assert (tokenizer.vocab_size, tokenizer.eod) == (50_257, 50_256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(ODD)] == ODD


@needs_files
def test_gpt2_equals_megatrons_dataset() -> None:
    golden = IndexedDataset(DATA / "golden" / "tiny_gpt2_text_document")
    with open(DATA / "tinyshakespeare.jsonl", encoding="utf-8") as lines:
        ids = gpt2().encode_batch([json.loads(line)["text"] for line in lines])
    assert all([*found, 50_256] == golden.document(i).tolist() for i, found in enumerate(ids))


@needs_files
def test_hugging_face_equals_gpt2_from_file_or_folder() -> None:
    ours = gpt2().encode_batch(ODD)
    for model in (FILES / "gpt2_hf", FILES / "gpt2_hf" / "tokenizer.json"):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", str(model))
        assert (tokenizer.vocab_size, tokenizer.eod) == (50_257, 50_256)
        assert tokenizer.encode_batch(ODD) == ours


@needs_files
def test_sentencepiece_equals_its_library() -> None:
    import sentencepiece
    model = FILES / "sentencepiece" / "test_model.model"
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (tokenizer.vocab_size, tokenizer.eod) == (1000, plain.eos_id())
    assert tokenizer.encode_batch(ODD) == [plain.encode(text) for text in ODD]
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@needs_files
def test_llama2_begins_every_text() -> None:
    import sentencepiece
    model = FILES / "sentencepiece" / "test_model.model"
    tokenizer, plain = build_tokenizer("Llama2Tokenizer", str(model)), sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.encode_batch(ODD) == [[plain.bos_id(), *plain.encode(text)] for text in ODD]
    assert (tokenizer.vocab_size, tokenizer.eod) == (1000, plain.eos_id()) and tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_a_model_without_a_begin_of_text_is_no_llama2(tmp_path: Path) -> None:
    import sentencepiece
    with (tmp_path / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["hello world"] * 9), model_writer=file, vocab_size=20, model_type="bpe",
                                                 hard_vocab_limit=False, bos_id=-1, minloglevel=2)
    assert build_tokenizer("SentencePieceTokenizer", str(tmp_path / "t.model")).bos is None
    with pytest.raises(UserError, match="t.model: has no begin of text, .* write --tokenizer-type SentencePieceTokenizer"):
        build_tokenizer("Llama2Tokenizer", str(tmp_path / "t.model"))


PIECES = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b" wo", b"rl", b"rld"]


def tiktoken_file(path: Path, pieces: list[bytes] = PIECES) -> str:
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    return str(path)


def test_tiktoken(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path / "t.tiktoken"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (265, 264)
    assert tokenizer.encode("hello world<|endoftext|>") == [259, 261, 263, 264]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(ODD)] == ODD
    assert tokenizer.decode([259, 10_000, 261]) == tokenizer.decode([259, 261]), "ids that a table leaves out say nothing"
    for bad in (PIECES[1:], [*PIECES[:256], b"a"]):
        with pytest.raises(UserError, match="t.tiktoken: is not a .tiktoken file"):
            build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path / "t.tiktoken", bad))
    good = Path(tiktoken_file(tmp_path / "t.tiktoken")).read_bytes()
    for rank in (b"-1", b"4294967296", b"18446744073709551616", b"1_0", b"255", b"9" * 5000, b"2.0"):
        (tmp_path / "t.tiktoken").write_bytes(good.replace(b" 263\n", b" %s\n" % rank))
        with pytest.raises(UserError, match="t.tiktoken: is not a .tiktoken file nor Mistral's Tekken JSON .*; each line should be a piece in base64 and its rank"):
            build_tokenizer("TiktokenTokenizer", str(tmp_path / "t.tiktoken"))
    (tmp_path / "t.tiktoken").write_text("!!! 0\n")
    with pytest.raises(UserError, match="t.tiktoken: is not a .tiktoken file"):
        build_tokenizer("TiktokenTokenizer", str(tmp_path / "t.tiktoken"))


@needs_files
def test_tiktoken_of_gpt2_equals_gpt2(tmp_path: Path) -> None:
    """The same pieces in the other format: 50,256 of them make it r50k_base."""
    pytest.importorskip("tiktoken")
    letters = {v: k for k, v in byte_letters().items()}
    vocab = json.loads((FILES / "gpt2" / "vocab.json").read_text())
    pieces = [bytes(letters[c] for c in piece) for piece, _ in sorted(vocab.items(), key=lambda item: item[1])[:50_256]]
    tokenizer, other = build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path / "r50k_base.tiktoken", pieces)), gpt2()
    assert (tokenizer.vocab_size, tokenizer.eod) == (50_257, 50_256)
    texts = [*ODD, *(json.loads(line)["text"] for line in (DATA / "zh_yuan_qu_simplified.jsonl").read_text().splitlines()[:300])]
    assert tokenizer.encode_batch(texts) == other.encode_batch(texts)


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones are themselves, the rest follow from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_special_tokens_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = build_tokenizer("TiktokenTokenizer", tiktoken_file(tmp_path / "t.tiktoken"))
    assert tokenizer.id_of("<|endoftext|>") == 264 and tokenizer.id_of("<fim_prefix>") is None


def tekken_file(path: Path, specials: list[str] | None = None, **config: object) -> str:
    """Mistral's format: 264 pieces, two more that there is no room for, and 4 special tokens before them."""
    vocab = [{"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": None} for i, piece in enumerate([*PIECES, b"xy", b"yz"])]
    said = {"config": {"pattern": r"\p{L}+|\s+|.", "num_vocab_tokens": 266, "default_vocab_size": 268, "default_num_special_tokens": 4,
                       "version": "v3", **config}, "vocab": vocab}
    if specials:
        said["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(specials)]
    path.write_text(json.dumps(said))
    return str(path)


def test_tekken(tmp_path: Path) -> None:
    """Pieces come after the special tokens; what there is no room for is no piece; a special token's name is text."""
    pytest.importorskip("tiktoken")
    tokenizer = build_tokenizer("TiktokenTokenizer", tekken_file(tmp_path / "tekken.json"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (268, 2)                    # <unk> <s> </s> [INST]
    assert tokenizer.encode("hello xy</s>") == [4 + 259, *(4 + b for b in b" xy</s>")]
    assert [tokenizer.id_of(name) for name in ("<unk>", "[INST]", "[PREFIX]")] == [0, 3, None]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(ODD)] == ODD
    named = build_tokenizer("TiktokenTokenizer", tekken_file(tmp_path / "tekken.json", ["<a>", "<end>"]), eod_token="<end>")
    assert (named.eod, named.id_of("<SPECIAL_3>"), named.encode("<end>")) == (1, 3, [4 + b for b in b"<end>"])
    for said, wrong in (({"default_vocab_size": 267}, None), ({"pattern": 3}, "config.pattern is 3"), ({"default_vocab_size": 900}, "do not make up"),
                        ({"pattern": "("}, "nor Mistral's"), ({"default_vocab_size": 2**60}, "config.default_vocab_size is")):
        path = tekken_file(tmp_path / "tekken.json", None, **said)
        if wrong is None:
            assert build_tokenizer("TiktokenTokenizer", path).vocab_size == 267
            continue
        with pytest.raises(UserError, match=f"tekken.json: is not a .tiktoken file nor Mistral's Tekken JSON .*{wrong}" if "nor" not in wrong else wrong):
            build_tokenizer("TiktokenTokenizer", path)


def test_a_tekken_pattern_that_leaves_some_of_a_text_out_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = build_tokenizer("TiktokenTokenizer", tekken_file(tmp_path / "tekken.json", pattern=r"[a-zé]+"))
    assert tokenizer.encode("aé") == [4 + b for b in "aé".encode()] and tokenizer.encode("") == []
    for text in ("ab 12 cd", " "):
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_flat(["ab", text], np.dtype("u2"))):
            with pytest.raises(UserError, match="tekken.json: its pattern does not cover all of a text .*the rest would be lost"):
                encode(text)


needs_mistral = pytest.mark.skipif(find_spec("mistral_common") is None, reason="mistral-common, which holds real models, is not installed")


@needs_mistral
def test_mistrals_own_tekken() -> None:
    """The ids that tiktoken gives, told what Mistral's library tells it."""
    tiktoken = pytest.importorskip("tiktoken")
    path = Path(str(find_spec("mistral_common").submodule_search_locations[0])) / "data" / "tekken_240911.json"      # type: ignore[union-attr,index]
    said = json.loads(path.read_text())
    plain = tiktoken.Encoding("t", pat_str=said["config"]["pattern"], special_tokens={}, mergeable_ranks={
        base64.b64decode(v["token_bytes"]): v["rank"] for v in said["vocab"][:130_072]})
    tokenizer = build_tokenizer("TiktokenTokenizer", str(path))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.id_of("<s>")) == (131_072, 2, 1)
    assert tokenizer.encode_batch(ODD) == [[i + 1000 for i in plain.encode(text, disallowed_special=())] for text in ODD]


def test_the_end_of_document_and_special_tokens_can_be_named(tmp_path: Path) -> None:
    """By flag, for every type; what was kept beside a checkpoint makes the same tokenizer, and datasets of another are refused."""
    pytest.importorskip("tiktoken")
    import tokenizers
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["hello world"], vocab_size=300, special_tokens=["<stop>", "<|endoftext|>"], show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    made.save_model(str(tmp_path))
    (tmp_path / "letters.json").write_text('["a", "\\n"]')
    model = tiktoken_file(tmp_path / "t.tiktoken")
    names = ["<one>", "<two>", "</s>"]
    for kind, flags, default, name, end in [
        ("HuggingFaceTokenizer", {"tokenizer_model": str(tmp_path)}, 1, "<stop>", 0),
        ("GPT2BPETokenizer", {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}, 1, "<stop>", 0),
        ("CharTokenizer", {"tokenizer_model": str(tmp_path / "letters.json")}, None, "\n", 1), ("ByteTokenizer", {}, 256, "\n", 10),
        ("NullTokenizer", {"vocab_size": 9}, 9, "4", 4), ("TiktokenTokenizer", {"tokenizer_model": model}, 264, "hello", 259),
        ("TiktokenTokenizer", {"tokenizer_model": model, "special_tokens": names}, 266, "<one>", 264),
    ]:
        plain, named = build_tokenizer(kind, **flags), build_tokenizer(kind, **flags, eod_token=name)
        assert (plain.eod, named.eod, named.vocab_size) == (default, end, plain.vocab_size), kind
        folder = tmp_path / f"{kind}-{len(flags)}"
        folder.mkdir()
        for file, path in named.files().items():
            shutil.copy(path, folder / file)
        kept = load_tokenizer(json.loads(json.dumps(named.identity())), folder)
        assert kept.identity() == named.identity() and not same_tokenizer(plain.identity(), kept.identity()), kind
        with pytest.raises(UserError, match=f"--eod-token <none>: is no token of this {kind}; name one"):
            build_tokenizer(kind, **flags, eod_token="<none>")
    tokenizer = build_tokenizer("TiktokenTokenizer", model, special_tokens=names)
    assert tokenizer.encode("x<two>hello</s>") == [120, 265, 259, 266] and tokenizer.vocab_size == 267 and tokenizer.id_of("<|endoftext|>") is None
    assert build_tokenizer("TiktokenTokenizer", model).identity().get("special_tokens") is None
    for kind, given, said in (("ByteTokenizer", {}, "--special-tokens <one>: ByteTokenizer has its own"),
                              ("TiktokenTokenizer", {"tokenizer_model": tekken_file(tmp_path / "k.json")}, "--special-tokens <one>: .*k.json names its own")):
        with pytest.raises(UserError, match=said):
            build_tokenizer(kind, special_tokens=["<one>"], **given)
    with pytest.raises(UserError, match="--special-tokens <a> <a>: names <a> twice"):
        build_tokenizer("TiktokenTokenizer", model, special_tokens=["<a>", "<a>"])


def test_a_named_end_of_document_ends_documents_and_belongs_to_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab")
    prefix = str(tmp_path / "t")
    preprocess(PreprocessSettings((str(tmp_path / "t.txt"),), prefix, "ByteTokenizer", eod_token="\x01", append_eod=True, input_format="text"))
    assert IndexedDataset(f"{prefix}_text_document").document(0).tolist() == [97, 98, 1]
    flags = f"--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --lr 1 --train-iters 1 --data-path {prefix}_text_document".split()
    for words, eod in (([], 256), (["--eod-token", "\x01"], 1)):
        tokenizer = configured_tokenizer(from_command_line([*flags, "--tokenizer-type", "ByteTokenizer", *words]))
        assert tokenizer is not None and tokenizer.eod == eod
        if eod == 1:
            assert check_sidecar(f"{prefix}_text_document", None, tokenizer.identity())
        else:
            with pytest.raises(UserError, match="was made with a ByteTokenizer that is not this"):
                check_sidecar(f"{prefix}_text_document", None, tokenizer.identity())
    alone = from_command_line([*flags, "--vocab-size", "9", "--eod-token", "x", "--special-tokens", "a", "b"])
    assert {s for s in checks(alone, 1) if "token" in s} == {"--eod-token x: has no effect without --tokenizer-type.",
                                                             "--special-tokens a b: has no effect without --tokenizer-type."}


def test_a_folder_of_another_type_says_which_flags_to_write(tmp_path: Path) -> None:
    for folder, files, wanted in [
        ("gpt2", ("vocab.json", "merges.txt"), "--tokenizer-type GPT2BPETokenizer --vocab-file {0}/vocab.json --merge-file {0}/merges.txt"),
        ("sp", ("tokenizer.model", "config.json"), "--tokenizer-type SentencePieceTokenizer --tokenizer-model {0}/tokenizer.model"),
        ("tekken", ("tekken.json",), "--tokenizer-type TiktokenTokenizer --tokenizer-model {0}/tekken.json"),
        ("hf", ("tokenizer.json", "tokenizer.model"), "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {0}/tokenizer.json"),
    ]:
        at = tmp_path / folder
        at.mkdir()
        for name in files:
            (at / name).write_text("{}")
        others = {"SentencePieceTokenizer", "TiktokenTokenizer", "CharTokenizer", *({"HuggingFaceTokenizer"} if folder != "hf" else ())}
        for kind in others:
            with pytest.raises(UserError) as caught:
                build_tokenizer(kind, str(at))
            assert f"write {wanted.format(at)}" in str(caught.value), (kind, str(caught.value))
    with pytest.raises(UserError, match="has no tokenizer.json; write --tokenizer-type TiktokenTokenizer"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tekken" / "tekken.json"))


def test_bytes() -> None:
    tokenizer = build_tokenizer("ByteTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert [tokenizer.decode([*ids, 256]) for ids in tokenizer.encode_batch(ODD)] == ODD
    assert tokenizer.decode([195]) == "\ufffd"


def test_characters(tmp_path: Path) -> None:
    assert characters_of(["hello", "wörld\n"]) == sorted(set("hello wörld\n") - {" "})
    path = tmp_path / "characters.json"
    for data in (["a", "b", "é"], {"a": 0, "b": 1, "é": 2}):
        path.write_text(json.dumps(data))
        tokenizer = build_tokenizer("CharTokenizer", str(path))
        assert (tokenizer.vocab_size, tokenizer.eod) == (3, None)
        assert tokenizer.encode("béa") == [1, 2, 0] and tokenizer.decode([1, 2, 0]) == "béa"
    with pytest.raises(UserError, match="has no character 'x', which a text uses"):
        tokenizer.encode("abx")
    for bad in ("[]", '["ab"]', '["a", "a"]', '{"a": 1}', "3", '"ab"', "[1]", '{"a": "x"}', '{"a": null}', '{"a": 1.0, "b": 0.0}',
                '{"a": true, "b": 0}', '{"": 0}'):
        path.write_text(bad)
        with pytest.raises(UserError, match="must hold a JSON list of different characters"):
            build_tokenizer("CharTokenizer", str(path))
    path.write_text("[")
    with pytest.raises(UserError, match="is not valid JSON"):
        build_tokenizer("CharTokenizer", str(path))


def test_null_is_megatrons() -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.encode(" 5  99\n100 ") == [5, 99, 100] and tokenizer.decode([5, 99]) == "5 99"
    for word, shown in [*((w, w) for w in ("101", "-1", "x", "1.5")), ("9" * 5000, f"{'9' * 56}\\.\\.\\.")]:
        with pytest.raises(UserError, match=f"a text holds '{shown}'?, expected ids 0 to 100"):
            tokenizer.encode(f"1 {word}")
    with pytest.raises(UserError, match="--vocab-size 4294967295: has ids up to 4,294,967,295, and they must be below 2,147,483,647"):
        build_tokenizer("NullTokenizer", vocab_size=2**32 - 1)


def every_kind(folder: Path) -> list[Tokenizer]:
    (folder / "letters.json").write_text(json.dumps(["a", "b"]))
    model_of = {"HuggingFaceTokenizer": FILES / "gpt2_hf", "SentencePieceTokenizer": FILES / "sentencepiece" / "test_model.model",
                "CharTokenizer": folder / "letters.json", "Llama2Tokenizer": FILES / "sentencepiece" / "test_model.model",
                "TiktokenTokenizer": tiktoken_file(folder / "t.tiktoken")}
    return [gpt2(), *(build_tokenizer(kind, str(model)) for kind, model in model_of.items()),
            build_tokenizer("ByteTokenizer"), build_tokenizer("NullTokenizer", vocab_size=7)]


@needs_files
def test_flat_ids_are_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    for tokenizer in every_kind(tmp_path):
        texts = {"CharTokenizer": ["ab", "", "b"], "NullTokenizer": ["1 2", "", "3"]}.get(type(tokenizer).__name__, ODD)
        for batch in (texts, []):
            ids, lengths = tokenizer.encode_flat(batch, np.dtype("i4"))
            expected = tokenizer.encode_batch(batch)
            assert ids.dtype == np.int32 and ids.tolist() == sum(expected, []) and lengths.tolist() == [len(e) for e in expected]


@needs_files
def test_kept_files_make_the_same_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    kinds = every_kind(tmp_path)
    assert {type(t).__name__ for t in kinds} == set(TYPES)
    for tokenizer in kinds:
        folder = tmp_path / type(tokenizer).__name__
        folder.mkdir()
        for name, path in tokenizer.files().items():
            shutil.copy(path, folder / name)
            assert tokenizer.identity()["files"][name] == hashlib.sha256(path.read_bytes()).hexdigest()
        identity = json.loads(json.dumps(tokenizer.identity()))
        again = load_tokenizer(identity, folder)
        assert again.identity() == identity and (again.vocab_size, again.eod) == (tokenizer.vocab_size, tokenizer.eod)
    (tmp_path / "CharTokenizer" / "characters.json").write_text('["a", "c"]')
    with pytest.raises(UserError, match="characters.json: is not the tokenizer file that was kept here"):
        load_tokenizer(kinds[3].identity(), tmp_path / "CharTokenizer")
    for tokenizer, change, sentence in (
            (kinds[3], {"type": "Gpt9"}, "is of type Gpt9, which is not known here; load it with the version that wrote it"),
            (kinds[3], {"files": {}}, "characters.json: is no file of the tokenizer that was kept here; remove it"),
            (kinds[3], {"files": {"../x": "0" * 64}}, "cannot hold a tokenizer's file '../x'"),
            (kinds[3], {"files": {"gone.json": "0" * 64}}, "gone.json: cannot be read .*; restore it"),
            (ByteTokenizer(), {"eod": 10**6}, "is not the tokenizer that was kept here .other ids.; restore it")):
        (tmp_path / "CharTokenizer" / "characters.json").write_text('["a", "b"]')
        with pytest.raises(UserError, match=sentence):
            load_tokenizer({**tokenizer.identity(), **change}, tmp_path / "CharTokenizer")


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("no tokenizer")
    bad, missing = str(tmp_path / "bad"), str(tmp_path / "missing")
    for kind, flags, sentences in [
        ("Gpt2", {}, ["--tokenizer-type Gpt2: must be one of SentencePieceTokenizer,"]),
        ("GPT2BPETokenizer", {}, ["--vocab-file is missing", "--merge-file is missing"]),
        ("GPT2BPETokenizer", {"vocab_file": bad, "merge_file": missing}, [f"--merge-file {missing}: no such file"]),
        ("GPT2BPETokenizer", {"vocab_file": bad, "merge_file": bad}, [f"--vocab-file {bad} --merge-file {bad}: are not"]),
        ("SentencePieceTokenizer", {"tokenizer_model": bad}, [f"--tokenizer-model {bad}: is not a sentencepiece model"]),
        ("HuggingFaceTokenizer", {"tokenizer_model": bad}, [f"--tokenizer-model {bad}: bad is not a Hugging Face"]),
        ("HuggingFaceTokenizer", {"tokenizer_model": str(tmp_path)}, ["tokenizer.json is not a Hugging Face tokenizer"]),
        ("CharTokenizer", {"tokenizer_model": missing}, [f"--tokenizer-model {missing}: no such file"]),
        ("SentencePieceTokenizer", {"tokenizer_model": f"{missing}.model"}, [f"--tokenizer-model {missing}.model: no such file"]),
        ("NullTokenizer", {}, ["--vocab-size is missing: NullTokenizer needs it."]),
        ("ByteTokenizer", {"merge_file": bad}, [f"--merge-file {bad}: ByteTokenizer does not read it"]),
        ("ByteTokenizer", {"vocab_size": 256}, ["--vocab-size 256: this ByteTokenizer has 257 ids"]),
    ]:
        with pytest.raises(UserError) as caught:
            build_tokenizer(kind, **flags)
        assert len(caught.value.sentences) == len(sentences)
        assert all(part in said for part, said in zip(sentences, caught.value.sentences, strict=True)), caught.value.sentences


def train(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/train_tokenizer.py", *map(str, arguments)], cwd=REPOSITORY, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_training_a_tokenizer_of_each_type(tmp_path: Path) -> None:
    source = tmp_path / "code"
    source.mkdir()
    text = "def f(x):\n\treturn  'é' + x\n\n" * 20
    (source / "a.py").write_text(text)
    shutil.copy(json.__file__, source / "b.py")
    for kind, tokenizer_type, output, size in [
        ("bpe", "HuggingFaceTokenizer", "bpe", 300), ("char", "CharTokenizer", "c.json", None),
        ("sentencepiece", "SentencePieceTokenizer", "sp.model", 400),
    ]:
        ran = train("--input", source, "--type", kind, "--output", tmp_path / output, *(["--vocab-size", size] if size else []))
        assert ran.returncode == 0, ran.stderr
        assert len(ran.stdout.splitlines()) == 1 and ran.stderr == ""
        tokenizer = build_tokenizer(tokenizer_type, str(tmp_path / output))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert size is None or tokenizer.vocab_size == size
        assert (tokenizer.eod is None) == (kind == "char")


def test_sentencepiece_learns_from_long_lines_and_special_tokens_are_whole(tmp_path: Path) -> None:
    """Its library leaves out lines of more than 4,192 bytes, without a word."""
    (tmp_path / "t.txt").write_text("short words only here\n" * 50 + ("unusual zebra quartz " * 9000 + "\n"))
    ran = train("--input", tmp_path / "t.txt", "--type", "sentencepiece", "--vocab-size", 340, "--output", tmp_path / "m.model",
                "--special-tokens", "<fim_prefix>", "<fim_middle>")
    assert ran.returncode == 0, ran.stderr
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m.model"))
    assert len(tokenizer.encode("unusual zebra quartz")) <= 6
    assert tokenizer.encode("a<fim_prefix>b")[1] == tokenizer.id_of("<fim_prefix>") and tokenizer.id_of("<gap>") is None
    ran = train("--input", tmp_path / "t.txt", "--vocab-size", 300, "--output", tmp_path / "bpe", "--special-tokens", "<fim_suffix>")
    assert ran.returncode == 0 and build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "bpe")).id_of("<fim_suffix>") is not None


def test_mistakes_in_training(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc " * 100)
    for arguments, said in [
        (["--type", "bpe"], "--vocab-size is missing"),
        (["--vocab-size", "100"], "--vocab-size 100: byte-level BPE"),
        (["--type", "char", "--vocab-size", "9"], "--vocab-size 9: --type char takes every character"),
        (["--type", "sentencepiece", "--vocab-size", "99999"], "--vocab-size 99999: sentencepiece cannot"),
        (["--vocab-size", "9" * 20], f"--vocab-size {'9' * 20}: is more than 16,777,216"),
        (["--vocab-size", "300", "--special-tokens", "<\udcff>"], "--special-tokens '<\\udcff>': is no text"),
    ]:
        ran = train("--input", tmp_path / "t.txt", "--output", tmp_path / "out", *arguments)
        assert ran.returncode == 2 and ran.stderr.startswith(f"error: {said}") and "Traceback" not in ran.stderr


@pytest.mark.parametrize("flags", ["bpe --vocab-size 300", "sentencepiece --vocab-size 300", "char"])
def test_no_text_makes_no_tokenizer(tmp_path: Path, flags: str) -> None:
    (tmp_path / "t.jsonl").write_text("{bad\n")
    ran = train("--input", tmp_path / "t.jsonl", "--output", tmp_path / "out", "--type", *flags.split())
    assert (ran.returncode, ran.stderr) == (2, f"error: --input {tmp_path / 't.jsonl'}: holds no text that can be read (1 inputs skipped); name files that do.\n")
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def byte_level(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes; what is changed in it, and in its model."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
             "byte_fallback": False, "vocab": {letter: b for b, letter in byte_letters().items()}, "merges": []}
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "post_processor": None,
            "decoder": level, "model": model}
    return {key: changes.get(key, value) if key != "model" else {k: changes.get(k, v) for k, v in model.items()} for key, value in made.items()}


BYTES = {letter: b for b, letter in byte_letters().items()}
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(("changes", "said"), [
    ({}, None),
    ({"vocab": {c: b for c, b in BYTES.items() if b not in (0xC0, 0xFF)}}, None),                   # no text has these bytes
    ({"vocab": {c: b for c, b in BYTES.items() if b != 0xE4}}, "it has no piece for the byte 228, which would be left out of texts"),
    ({"dropout": 0.5}, "it merges by chance, with dropout 0.5; write null there"),
    ({"vocab": {**BYTES, "aa": 5}}, "two pieces have one id"),
    ({"vocab": {}}, "it has no pieces"),
    ({"vocab": {**BYTES, "aa": 2**32 - 1}}, "--tokenizer-model .*t.json: has ids up to 4,294,967,295, and they must be below 2,147,483,647"),
    ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 14}}, None),
    ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLED, {"type": "Sequence", "normalizers": [DOUBLED] * 14}]}}, "make a text up to 32,768 times as long"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 2**14}}, "make a text up to 16,385 times as long"),
])
def test_a_tokenizer_json_that_would_lie_is_refused(tmp_path: Path, changes: dict[str, Any], said: str | None) -> None:
    (tmp_path / "t.json").write_text(json.dumps(byte_level(**changes)))
    if said is None:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "t.json"))
        assert tokenizer.decode(tokenizer.encode("é 日本")) == "é 日本"
        return
    with pytest.raises(UserError, match=said):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "t.json"))


@pytest.mark.parametrize(("vocab", "said"), [
    (BYTES, None), ({c: b + 1 for c, b in BYTES.items()}, "are not a byte-level BPE .two pieces have one id"),              # the id of an end of text is taken
    ({**BYTES, "aa": 5}, "two pieces have one id"), ({"a": 0, "<|endoftext|>": 1}, "it has no piece for the byte 33, which")])
def test_ids_of_gpt2_are_each_of_one_piece_and_say_every_byte(tmp_path: Path, vocab: dict[str, int], said: str | None) -> None:
    (tmp_path / "v.json").write_text(json.dumps(vocab))
    (tmp_path / "m.txt").write_text("")
    flags = {"vocab_file": str(tmp_path / "v.json"), "merge_file": str(tmp_path / "m.txt")}
    if said is None:
        assert build_tokenizer("GPT2BPETokenizer", **flags).encode("a<|endoftext|>") == [97, 256]
        return
    with pytest.raises(UserError, match=said):
        build_tokenizer("GPT2BPETokenizer", **flags)


@pytest.mark.parametrize("changes", [
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, "pre_tokenizer": None},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}, "pre_tokenizer": None},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}}])                                       # panics
def test_what_a_library_raises_while_it_cuts_is_a_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**byte_level(), **changes}))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "t.json"))
    for cut in (tokenizer.encode, lambda text: tokenizer.encode_flat([text], np.dtype("i4"))):
        with pytest.raises(UserError, match="--tokenizer-model .*t.json: cannot cut a text .*; take the file as it was published"):
            cut("xyz")


def test_a_pattern_that_cuts_nothing_and_a_size_without_pieces_are_sentences(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    path = tekken_file(tmp_path / "k.json")
    said = json.loads(Path(path).read_text())
    (tmp_path / "k.json").write_text(json.dumps({**said, "config": {**said["config"], "pattern": ""}}))
    with pytest.raises(UserError, match="k.json: cannot cut a text .*; take the file as it was published"):
        build_tokenizer("TiktokenTokenizer", path).encode("abc")
    (tmp_path / "k.json").write_text(json.dumps({**said, "config": {**said["config"], "default_vocab_size": 2**24 - 1}}))
    tracemalloc.start()
    with pytest.raises(UserError, match="do not make up its default_vocab_size"):
        build_tokenizer("TiktokenTokenizer", path)
    assert tracemalloc.get_traced_memory()[1] < 2**28 + 2**25                # a reader's buffer, and not a set of that size
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "folder", "text", "endless", "elsewhere"])
def test_what_lies_beside_a_tokenizer_json_is_read_with_care(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    beside = tmp_path / "special_tokens_map.json"
    {"fifo": lambda: os.mkfifo(beside), "folder": beside.mkdir, "text": lambda: beside.write_text("a host"),
     "endless": lambda: beside.symlink_to("/dev/zero"), "elsewhere": lambda: beside.symlink_to(f"../{tmp_path.name}.json")}[kind]()
    tmp_path.with_name(f"{tmp_path.name}.json").write_text("{}")
    wrong = "is a link that leads out of its folder; put" if kind in ("endless", "elsewhere") else "is not valid JSON"
    with pytest.raises(UserError, match=f"special_tokens_map.json: {wrong}"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


@pytest.mark.parametrize(("words", "text", "said"), [
    ("GPT2BPETokenizer vocab_file", '{"a": 0, "a": 1}', "--vocab-file .*: are not a byte-level BPE \\(key 'a' stands twice\\)"),
    ("GPT2BPETokenizer vocab_file", '{"a": -1}', "are not a byte-level BPE \\(a is -1, not a whole number from 0"),
    ("GPT2BPETokenizer vocab_file", '{"a": 99999999999}', "are not a byte-level BPE \\(a is 99999999999, not a whole number from 0"),
    ("HuggingFaceTokenizer tokenizer_model", '{"model": {}, "model": {}}', "t.json is not a Hugging Face tokenizer \\(key 'model' stands twice"),
    ("HuggingFaceTokenizer tokenizer_model", "[" * 9999, "t.json is not a Hugging Face tokenizer \\(is nested too deeply"),
    ("CharTokenizer tokenizer_model", '["\\ud800"]', "--tokenizer-model .*: is not valid JSON \\(is not UTF-8"),
    ("CharTokenizer tokenizer_model", '{"a": 0, "a": 0}', "--tokenizer-model .*: is not valid JSON \\(key 'a' stands twice"),
])
def test_files_of_tokenizers_have_one_meaning(tmp_path: Path, words: str, text: str, said: str) -> None:
    kind, flag = words.split()
    (tmp_path / "t.json").write_text(text)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=said):
        build_tokenizer(kind, **{flag: str(tmp_path / "t.json")}, **({"merge_file": str(tmp_path / "merges.txt")} if kind.startswith("GPT2") else {}))
