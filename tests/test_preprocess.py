"""Text to datasets: bytes equal to Megatron's and to a writer made from the format, bad input, order, workers, the tool itself."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_indexed import contents, plain_bytes
from test_tokenizers import PIECES, tiktoken_file

from megazero.base.errors import UserError
from megazero.corpus.preprocess import PreprocessSettings, batches, preprocess, with_ends
from megazero.corpus.sources import Place, find_sources, read_chunks
from megazero.data.indexed import IndexedDataset
from megazero.data.tokenizer_tiktoken import ENCODINGS

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
GOLDEN = DATA / "golden" / "tiny_gpt2_text_document"
needs_golden = pytest.mark.skipif(not GOLDEN.with_suffix(".idx").exists(), reason=f"no golden files at {GOLDEN.parent}")


def settings(folder: Path, *inputs: Path, **more: object) -> PreprocessSettings:
    plain = PreprocessSettings(input=tuple(map(str, inputs)), output_prefix=str(folder / "out"), tokenizer_type="ByteTokenizer")
    return replace(plain, **more)


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [bytes(t for t in dataset.document(i).tolist() if t < 256).decode() for i in range(dataset.document_count)]


@needs_golden
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_are_megatrons(tmp_path: Path, workers: int) -> None:
    files = DATA / "tokenizers" / "gpt2"
    (report,) = preprocess(settings(
        tmp_path, DATA / "tinyshakespeare.jsonl", tokenizer_type="GPT2BPETokenizer", vocab_file=str(files / "vocab.json"),
        merge_file=str(files / "merges.txt"), append_eod=True, workers=workers))
    assert contents(tmp_path / "out_text_document") == contents(GOLDEN)
    assert (report.documents, report.tokens, report.skipped) == (7222, 330_807, 0)
    sidecar = json.loads((tmp_path / "out_text_document.json").read_text())
    assert sidecar["tokenizer"]["type"] == "GPT2BPETokenizer" and set(sidecar["tokenizer"]["files"]) == {"vocab.json", "merges.txt"}
    assert (sidecar["vocab_size"], sidecar["documents"], sidecar["tokens"]) == (50_257, 7222, 330_807)
    assert sidecar["sources"] == [[str(DATA / "tinyshakespeare.jsonl"), 1_220_396]]


EDGE = ["", "a", "", "emoji 😀", "nul \0 nul", "cr\r\nlf", "line\u2028separator", " ", "x" * 300_000, ""]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_are_those_of_the_format(tmp_path: Path, append_eod: bool, workers: int) -> None:
    source = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in EDGE), *({"text": str(i)} for i in range(500)))
    preprocess(settings(tmp_path, source, append_eod=append_eod, workers=workers))
    every = [*EDGE, *map(str, range(500))]
    documents = [[[*text.encode(), *([256] if append_eod else [])]] if text else [] for text in every]
    assert contents(tmp_path / "out_text_document") == plain_bytes(documents, 8, "H")


@needs_golden
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "GPT2BPETokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TiktokenTokenizer",
                                  "CharTokenizer", "NullTokenizer"])
def test_bytes_of_each_tokenizer_are_those_of_its_own_library(tmp_path: Path, kind: str) -> None:
    """Ids from the library itself, files from the format alone."""
    files, texts = DATA / "tokenizers", [*EDGE, "日本語 <|endoftext|> e\u0301", *(f"Words and more words, {i} of them." for i in range(300))]
    more: dict[str, object] = {}
    if kind in ("HuggingFaceTokenizer", "GPT2BPETokenizer"):
        import tokenizers
        library = tokenizers.Tokenizer.from_file(str(files / "gpt2_hf" / "tokenizer.json"))
        ids, eod, size = [library.encode(t, add_special_tokens=False).ids for t in texts], 50_256, 50_257
        more = {"vocab_file": str(files / "gpt2" / "vocab.json"), "merge_file": str(files / "gpt2" / "merges.txt")}
        more = more if kind == "GPT2BPETokenizer" else {"tokenizer_model": str(files / "gpt2_hf")}
    elif kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        import sentencepiece
        model = sentencepiece.SentencePieceProcessor(model_file=str(files / "sentencepiece" / "test_model.model"))
        ids = [([model.bos_id()] if kind == "Llama2Tokenizer" else []) + model.encode(t) for t in texts]
        eod, size, more = model.eos_id(), 1000, {"tokenizer_model": str(files / "sentencepiece" / "test_model.model")}
    elif kind == "TiktokenTokenizer":
        tiktoken = pytest.importorskip("tiktoken")
        more, size, eod = {"tokenizer_model": tiktoken_file(tmp_path / "t.tiktoken")}, 265, 264
        ranks = {piece: i for i, piece in enumerate(PIECES)}
        library = tiktoken.Encoding("plain", pat_str=ENCODINGS[100_256].pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 264})
        ids = [library.encode(t, allowed_special="all") for t in texts]
    elif kind == "CharTokenizer":
        letters = sorted(set("".join(texts)))
        (tmp_path / "c.json").write_text(json.dumps(letters))
        ids, eod, size, more = [[letters.index(c) for c in t] for t in texts], None, len(letters), {"tokenizer_model": str(tmp_path / "c.json")}
    else:
        texts = ["", "1 2 3", " ", "0"]
        ids, eod, size, more = [[], [1, 2, 3], [], [0]], 99, 100, {"vocab_size": 99}
    source = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    preprocess(settings(tmp_path, source, tokenizer_type=kind, append_eod=eod is not None, **more))
    documents = [[[*i, *([eod] if eod is not None else [])]] if i else [] for i in ids]
    assert size < 65_500 and contents(tmp_path / "out_text_document") == plain_bytes(documents, 8, "H")


@pytest.mark.parametrize("size", [3_000_000, pytest.param(60_000_000, marks=pytest.mark.full)])
def test_one_huge_document(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n{"text": "' + b"xyz " * (size // 4) + b'"}\n{"text": "after"}\n')
    preprocess(settings(tmp_path, tmp_path / "a.jsonl", append_eod=True))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert dataset.lengths[:].tolist() == [7, size + 1, 6]
    assert dataset.tokens[7:].reshape(-1)[:size].reshape(-1, 4).astype(np.uint8).tobytes() == b"xyz " * (size // 4)


PEAK = """
import atexit, runpy, sys
sys.argv = sys.argv[1:]
# ru_maxrss would be what the process had that began this one
atexit.register(lambda: print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_longest_document_fits_a_gigabyte_and_a_longer_one_is_named(tmp_path: Path) -> None:
    """Text of four bytes a character, as one emoji makes it; no reader is asked to hold what is longer."""
    good = b'{"n": 0, "text": "' + b"abcd" * (2**24 - 12) + "😀".encode() + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "next"}\n' + good[:-3] + b"a few bytes more than what fits" + good[-3:])
    run = subprocess.run([sys.executable, "-c", PEAK, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", str(tmp_path / "a.jsonl"),
                          "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "ByteTokenizer"],
                         capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert run.returncode == 0 and IndexedDataset(tmp_path / "out_text_document").lengths[:].tolist() == [2**26 - 44, 4], run.stderr
    assert f"skipped {tmp_path}/a.jsonl:3: is longer than 67,108,864 bytes; cut it in pieces" in run.stderr
    assert int(run.stdout.split("peak")[1]) < 2**20


@needs_golden
def test_a_document_of_a_library_is_as_long_as_it_has_memory_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a", 6 * 2**20), ("b", 6 * 2**20 + 1)):
        (tmp_path / f"{name}.txt").write_bytes(b"\n" * size)
    report, = preprocess(settings(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tokenizer_type="HuggingFaceTokenizer",
                                  tokenizer_model=str(DATA / "tokenizers" / "gpt2_hf")))
    assert (report.documents, report.skipped) == (1, 1) and "b.txt: is longer than 6,291,456 bytes; cut it in pieces" in capsys.readouterr().err


def test_what_waits_for_workers_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", *({"text": str(i) * 99} for i in range(3000)))
    monkeypatch.setattr(sys.modules["megazero.corpus.preprocess"], "AHEAD", 1)
    preprocess(settings(tmp_path, source, workers=2))
    assert texts(tmp_path / "out_text_document") == [str(i) * 99 for i in range(3000)]


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_tiny_documents_in_bounded_memory(tmp_path: Path, count: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(count)))
    tracemalloc.start()
    (report,) = preprocess(settings(tmp_path, tmp_path / "a.jsonl", append_eod=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert report.documents == dataset.document_count == count and peak < 40_000_000
    assert dataset.document(count - 1).tolist() == [*str(count - 1).encode(), 256]


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "1 2 65498"})
    for size, code, letter in ((65_498, 8, "H"), (65_499, 4, "i"), (65_535, 4, "i")):        # one id more, the end of document
        preprocess(settings(tmp_path / str(size), source, tokenizer_type="NullTokenizer", vocab_size=size))
        assert contents(tmp_path / str(size) / "out_text_document") == plain_bytes([[[1, 2, 65498]]], code, letter)


def test_lists_of_sentences_are_sequences(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": ["a", "", "bc"]}, {"text": []}, {"text": ["", ""]})
    preprocess(settings(tmp_path, source, append_eod=True))
    assert contents(tmp_path / "out_text_document") == plain_bytes([[[97], [98, 99, 256]], [], []], 8, "H")
    tokens, lengths, sequences = with_ends(np.array([1, 2, 3]), np.array([0, 1, 0, 2, 0]), [3, 0, 1, 1], 9)
    assert (tokens.tolist(), lengths.tolist(), sequences.tolist()) == ([1, 9, 2, 3, 9], [2, 3], [1, 0, 1, 0])


def test_keys_make_a_dataset_each(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.json", {"q": "one?", "a": "1"}, {"q": "two?", "a": ""})
    reports = preprocess(settings(tmp_path, source, json_keys=("q", "a")))
    assert texts(tmp_path / "out_q_document") == ["one?", "two?"] and texts(tmp_path / "out_a_document") == ["1", ""]
    assert [report.documents for report in reports] == [2, 2]


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    (source / ".git").mkdir()
    for name, data in {"z.py": b"print()\n", "b/a.md": b"# title", "a.txt": "é\r\n".encode(), ".git/config": b"no", "c.json": b"[1]",
                       "b/picture.bin": b"\x89PNG\0\0", "latin.txt": "é".encode("latin-1"), "d.jsonl": b'{"text": "line"}\n'}.items():
        (source / name).write_bytes(data)
    (report,) = preprocess(settings(tmp_path, source))
    assert texts(tmp_path / "out_text_document") == ["é\r\n", "# title", "[1]", "line", "print()\n"]
    assert report.skipped == 2


BAD = [b'{"text": "first"}', b'{"text": "broken', b'{"other": 1}', b'{"text": 5}', b'{"text": "\xff"}', b'["text"]',
       b'{"text": "\\ud800"}', b"", b"   ", b"[" * 100_000, b'{"text": ["a", 1]}', b'{"text": "last"}']


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_counted_named_and_left_out(tmp_path: Path, capfd: pytest.CaptureFixture, workers: int) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b"\n".join(BAD))
    (report,) = preprocess(settings(tmp_path, source, workers=workers))
    assert texts(tmp_path / "out_text_document") == ["first", "last"] and report.skipped == 8
    said = capfd.readouterr().err
    for line, reason in {2: "is not JSON", 3: "has no key 'text'", 4: "has a int under 'text'", 5: "is not UTF-8 at byte 10",
                         6: "is a JSON list, expected an object", 7: "lone surrogate under 'text' at character 0", 10: "is not JSON",
                         11: "has a int under 'text', expected a text"}.items():
        assert f"skipped {source}:{line}: " in said and reason in said.split(f"{source}:{line}: ")[1].splitlines()[0]


def test_strict_stops_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b"\n".join(BAD))
    with pytest.raises(UserError, match=r"bad.jsonl:2: is not JSON .*; repair it, or leave out --strict"):
        preprocess(settings(tmp_path, source, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_file_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (report,) = preprocess(settings(tmp_path, tmp_path / "empty.jsonl"))
    assert contents(tmp_path / "out_text_document") == plain_bytes([], 8, "H") and report.documents == 0


def test_reading_keeps_only_a_batch_in_hand(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "' + b"x" * 1000 + b'"}\n' * 1 + b'{"text": "y"}\n' * 20_000)
    groups = batches(read_chunks(find_sources([str(source)]), ["text"], Place()))
    held = [sum(len(chunk.raw) for chunk in group) for group in groups]
    assert sum(held) == source.stat().st_size and max(held) < 300_000 and len(held) > 1


def test_mistakes(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abc")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "chars.json").write_text('["a", "b"]')
    chars = {"tokenizer_type": "CharTokenizer", "tokenizer_model": str(tmp_path / "chars.json")}
    for wrong, said in [
        (settings(tmp_path, tmp_path / "none.txt"), "--input .*none.txt: no such file or folder"),
        (settings(tmp_path, tmp_path / "nothing"), "--input .*nothing: holds no file"),
        (settings(tmp_path, text, json_keys=("q",)), "--json-keys q: .*a.txt has no keys but text"),
        (settings(tmp_path, text, workers=0), "--workers 0: must be at least 1"),
        (settings(tmp_path, text, tokenizer_type="NullTokenizer"), "--vocab-size is missing"),
        (settings(tmp_path, text, append_eod=True, **chars), "--append-eod: this CharTokenizer has no end-of-document token"),
        (settings(tmp_path, text, **chars), "has no character 'c'"),
        (settings(tmp_path, text, workers=2, **chars), "has no character 'c'"),
        (settings(tmp_path, text, output_prefix=str(text / "x")), "cannot be written"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            preprocess(wrong)
        assert len(caught.value.sentences) == 1
    assert not list(tmp_path.glob("out*"))


def test_the_tool(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")

    def tool(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "tools/preprocess_data.py", *words], cwd=REPOSITORY, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(REPOSITORY)})

    ran = tool("--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "deep" / "p"), "--tokenizer-type", "ByteTokenizer")
    assert ran.returncode == 0, ran.stderr
    assert "1 documents, 5 tokens, 0 inputs skipped" in ran.stdout
    assert texts(tmp_path / "deep" / "p_text_document") == ["hello"]
    ran = tool("--input", str(tmp_path / "a.txt"), "--output-prefix", "p", "--tokenizer-typ", "ByteTokenizer")
    assert ran.returncode == 2 and "error: --tokenizer-typ: no such flag" in ran.stderr


def test_of_many_bad_lines_the_first_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text("bad\n" * 500 + '{"text": "good"}\n')
    report = preprocess(PreprocessSettings(input=(str(tmp_path / "bad.jsonl"),), output_prefix=str(tmp_path / "d"), tokenizer_type="ByteTokenizer"))[0]
    told = capsys.readouterr().err
    assert report.skipped == 500 and told.count("skipped ") == 101 and told.count("skipped more, which are counted") == 1
