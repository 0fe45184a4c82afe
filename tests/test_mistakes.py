"""What a user can get wrong: every program says it in one sentence, ends with exit code 2 and writes nothing.

Mistakes in flags of pretrain_gpt.py are in test_command_line.py; here are files, layouts, checkpoints, datasets and tools.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support import byte_dataset, program, train

from megazero.data.indexed import IndexedWriter

MODEL = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1e-3 --train-iters 4 --eval-iters 0"
BYTES = f"{MODEL} --tokenizer-type ByteTokenizer --data-path data"
PRETRAIN, PREPROCESS = "pretrain_gpt.py", "tools/preprocess_data.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good things: data, text, a run with checkpoints of steps 2 and 4, a tokenizer, a Hugging Face model."""
    folder = tmp_path_factory.mktemp("made")
    prefix = byte_dataset(folder)
    for end in ("bin", "idx"):
        os.rename(f"{prefix}.{end}", folder / f"data.{end}")
        assert not Path(f"{prefix}.json").exists()
    with IndexedWriter(str(folder / "tiny"), np.uint16) as writer:
        writer.add_document([np.arange(9, dtype=np.uint16)])
    with IndexedWriter(str(folder / "wide"), np.int32) as writer:
        writer.add_document([np.arange(70_000, dtype=np.int32)])
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "characters.json").write_text('["a", "b"]')
    here = BYTES.replace("--data-path data", f"--data-path {folder / 'data'}")
    train(f"{here} --openai-gelu --save {folder / 'run'} --save-interval 2", folder / "run" / "log")
    train(f"{here} --train-iters 1 --position-embedding-type none --save {folder / 'odd'}")
    return folder


class Wrong(NamedTuple):
    program: str
    words: str
    sentence: str
    spoil: Callable[[], object] = lambda: None


def cut(path: str, size: int) -> Callable[[], None]:
    return lambda: os.truncate(path, size)


def flip(path: str, at: int) -> Callable[[], None]:
    """Other bits at byte `at` (from the end, if negative)."""
    def spoil() -> None:
        raw = bytearray(Path(path).read_bytes())
        raw[at] ^= 0xFF
        Path(path).write_bytes(raw)
    return spoil


def damage(path: str) -> Callable[[], None]:
    """Other bits in the first tensor of a file, a weight."""
    return lambda: flip(path, 8 + int.from_bytes(Path(path).read_bytes()[:8], "little"))()


def write(path: str, text: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(text)


NEW, RANK = "run/step-00000004", "run/step-00000004/rank-00000.safetensors"
LOAD = f"{BYTES} --openai-gelu --train-iters 5 --load run"
HF = "tools/convert_hf.py"
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 257, "n_positions": 16}
MISTAKES = {
    # layouts
    "too few ranks": Wrong(PRETRAIN, f"{BYTES} --num-layers 2 --tp 2 --pp 2", "--tp 2 x --pp 2: 4 ranks are needed, or a multiple, but 1 runs"),
    "more stages than layers": Wrong(PRETRAIN, f"{BYTES} --pp 2 --check", "1 layers are left for 2 stages of --pp 2"),
    "heads that tp does not divide": Wrong(PRETRAIN, f"{BYTES} --tp 4 --ffn-hidden-size 64 --check",
                                           "--tp 4: does not divide --num-attention-heads 2; write one of 1, 2."),
    "a width of nothing": Wrong(PRETRAIN, f"{BYTES} --swiglu --check", "--ffn-hidden-size is missing: --swiglu makes it 8/3 of --hidden-size 16 in"),
    "stages that are none": Wrong(PRETRAIN, f"{BYTES} --pipeline-layout E|tL --check", "--pipeline-layout E|tL: has 2 stages"),
    "shards of nothing": Wrong(PRETRAIN, f"{BYTES} --dp 4 --zero-stage 1 --zero-shard-size 3 --check",
                               "--zero-shard-size 3: must divide the data-parallel size 4; write one of 1, 2, 4."),
    # datasets
    "weights behind": Wrong(PRETRAIN, f"{BYTES} --data-path a 0.3 b 0.7", "--data-path a 0.3 b 0.7: a weight stands before its dataset, as `0.3 A 0.7 B`, and 0.3"),
    "text for a dataset": Wrong(PRETRAIN, f"{BYTES} --data-path a.jsonl", "make a dataset of it first, with tools/preprocess_data.py."),
    "no dataset": Wrong(PRETRAIN, f"{BYTES} --data-path nothing", "--data-path: nothing.idx: cannot be read (No such file or directory)"),
    "a dataset with its ending": Wrong(PRETRAIN, f"{BYTES} --data-path data.bin", "write data, without its suffix."),
    "weights for some": Wrong(PRETRAIN, f"{BYTES} --data-path 0.3 data tiny", "--data-path 0.3 data tiny: give a weight before every dataset"),
    "a weight of nothing": Wrong(PRETRAIN, f"{BYTES} --data-path 0 data 1 tiny", "the weight 0 is not a positive number"),
    "less than one sample": Wrong(PRETRAIN, f"{BYTES} --data-path tiny --split 1", "one sample needs 17"),
    "tokens beyond the vocabulary": Wrong(PRETRAIN, f"{BYTES} --data-path wide --split 1",
                                          "train with the tokenizer the dataset was made with."),
    "an index cut short": Wrong(PRETRAIN, BYTES, "data.idx: ", cut("data.idx", 50)),
    "an index that is none": Wrong(PRETRAIN, BYTES, "this is no indexed dataset.", flip("data.idx", 0)),
    "an index of another version": Wrong(PRETRAIN, BYTES, "data.idx: byte 9 says version", flip("data.idx", 9)),
    "tokens cut short": Wrong(PRETRAIN, BYTES, "data.bin: has 1000 bytes where data.idx describes bytes", cut("data.bin", 1000)),
    "no tokens": Wrong(PRETRAIN, BYTES, "data.bin: ", lambda: os.remove("data.bin")),
    "another tokenizer's data": Wrong(PRETRAIN, BYTES, "data.json: is no sidecar", write("data.json", "{}")),
    "no list of data": Wrong(PRETRAIN, f"{MODEL} --vocab-size 300 --data-args-path list", "--data-args-path list: cannot be read"),
    "a schedule without steps": Wrong(PRETRAIN, f"{MODEL} --vocab-size 300 --data-schedule plan",
                                      "--data-schedule plan: line 1 should be", write("plan", "data\n")),
    "a schedule of nothing": Wrong(PRETRAIN, f"{MODEL} --vocab-size 300 --data-schedule plan",
                                   "--data-schedule plan: holds no stage", write("plan", "# later\n")),
    "a tokenizer that is no file": Wrong(PRETRAIN, f"{MODEL} --data-path data --tokenizer-type SentencePieceTokenizer --tokenizer-model m",
                                         "--tokenizer-model m: no such file"),
    "a tokenizer of another kind": Wrong(PRETRAIN, f"{MODEL} --data-path data --tokenizer-type SentencePieceTokenizer --tokenizer-model text.txt",
                                         "--tokenizer-model text.txt: is not a sentencepiece model; give the .model file."),
    "a vocabulary that is too small": Wrong(PRETRAIN, f"{BYTES} --vocab-size 9", "--vocab-size 9: is less than the 257 ids of the tokenizer"),
    # checkpoints
    "no checkpoint": Wrong(PRETRAIN, f"{BYTES} --load nowhere", "--load nowhere: there is no such folder."),
    "a name that is too long": Wrong(PRETRAIN, f"{BYTES} --load {'x' * 300}", "xxx: there is no such folder."),
    "a name to save by that is too long": Wrong(PRETRAIN, f"{BYTES} --save {'x' * 300}", "xxx: cannot be written to (File name too long)"),
    "a name to write by that is too long": Wrong("tools/checkpoint.py", f"merge --load run --output {'x' * 300}", "xxx: cannot be written (File name too long)"),
    "a link to itself": Wrong(PRETRAIN, f"{BYTES} --load ring", "--load ring: there is no such folder.", lambda: os.symlink("ring", "ring")),
    "a file that is a ring": Wrong(PRETRAIN, LOAD, f"{RANK}: cannot be read (Too many levels of symbolic links)",
                                   lambda: (os.remove(RANK), os.symlink("rank-00000.safetensors", RANK))),
    "an empty folder": Wrong(PRETRAIN, f"{BYTES} --load empty", "--load empty: holds no complete checkpoint.", lambda: os.mkdir("empty")),
    "a step that is not there": Wrong(PRETRAIN, f"{LOAD} --ckpt-step 3", "--ckpt-step 3: run holds steps 2, 4."),
    "another model": Wrong(PRETRAIN, f"{LOAD} --norm-epsilon 1e-3", "with --norm-epsilon 1e-05 (now --norm-epsilon 0.001); write those flags, or --use-checkpoint-args"),
    "a file that is gone": Wrong(PRETRAIN, LOAD, f"{RANK}: is missing; load another with --ckpt-step 2.", lambda: os.remove(RANK)),
    "a file cut short": Wrong(PRETRAIN, LOAD, f"{RANK}: has 500 bytes instead of ", cut(RANK, 500)),
    "a damaged header": Wrong(PRETRAIN, LOAD, f"{RANK}: its header is damaged (checksum differs)", flip(RANK, 40)),
    "damaged weights": Wrong(PRETRAIN, LOAD, "are damaged (checksum differs); load another with --ckpt-step 2.", damage(RANK)),
    "a damaged index": Wrong(PRETRAIN, LOAD, f"{NEW}/index.json: cannot be read", cut(f"{NEW}/index.json", 200)),
    "an index of something else": Wrong(PRETRAIN, LOAD, "index.json: is not a megazero-checkpoint", write(f"{NEW}/index.json", "[]")),
    "an older run over a newer": Wrong(PRETRAIN, f"{BYTES} --save run", "--save run: holds a checkpoint of step 4, beyond step 0"),
    "a folder that is a file": Wrong(PRETRAIN, f"{BYTES} --save text.txt/x", "--save text.txt/x: is not a folder that can be written to"),
    "verify finds it": Wrong("tools/checkpoint.py", "verify --load run", "are damaged (checksum differs)", damage(RANK)),
    "a command that is none": Wrong("tools/checkpoint.py", "verfy --load run", "did you mean verify"),
    "merge over something": Wrong("tools/checkpoint.py", "merge --load run --output odd", "--output odd: is there already and not empty"),
    "merge of a damaged file": Wrong("tools/checkpoint.py", "merge --load run --output whole", "are damaged (checksum differs)", damage(RANK)),
    "compare with nothing": Wrong("tools/compare_runs.py", "run none", "--b none: there is no such folder."),
    "a log of something else": Wrong("tools/compare_runs.py", "text.txt text.txt", "text.txt: line 1 is damaged"),
    "a plot of nothing": Wrong("tools/plot_loss.py", "--log-dir odd", "odd/metrics.jsonl: cannot be read"),
    "no sample without a prompt": Wrong("tools/generate.py", "--load run", "--prompt is missing"),
    # Hugging Face
    "a model that has no family": Wrong(HF, "export --load odd --output hf", "--load: no Hugging Face family known here"),
    "export over something": Wrong(HF, "export --load run --output odd", "--output odd: "),
    "export of a damaged file": Wrong(HF, "export --load run --output hf", "are damaged (checksum differs)", damage(RANK)),
    "import of no model": Wrong(HF, "import --input odd --output in", "--input odd: is a checkpoint of this program already; train on with --load odd."),
    "import of another family": Wrong(HF, "import --input model --output in", "config.json: model_type bert is not known here; there are",
                                      lambda: (os.mkdir("model"), write("model/config.json", json.dumps({"model_type": "bert"}))())),
    "import without weights": Wrong(HF, "import --input model --output in", "--input model: holds no model.safetensors",
                                    lambda: (os.mkdir("model"), write("model/config.json", json.dumps(GPT2))())),
    # text
    "no text": Wrong(PREPROCESS, "--input none.jsonl --output-prefix out --tokenizer-type ByteTokenizer", "--input none.jsonl: no such file"),
    "no tokenizer": Wrong(PREPROCESS, "--input text.txt --output-prefix out", "--tokenizer-type is missing"),
    "a text that is broken": Wrong(PREPROCESS, "--input bad.jsonl --output-prefix out --strict --tokenizer-type ByteTokenizer",
                                   "repair it, or leave out --strict to skip it."),
    "another dataset's place": Wrong(PREPROCESS, "--input text.txt --output-prefix kept --tokenizer-type ByteTokenizer",
                                     "kept_text_document.idx is there already, of other inputs",
                                     lambda: shutil.copy("data.idx", "kept_text_document.idx")),
    "a dataset by half its name": Wrong(PRETRAIN, f"{BYTES} --data-path half", "did you mean half_text_document?",
                                        lambda: shutil.copy("data.idx", "half_text_document.idx")),
    "a tokenizer that others need": Wrong("tools/train_tokenizer.py", "--input text.txt --vocab-size 300 --output characters.json",
                                          "--output characters.json: is there already"),
    "no workers": Wrong(PREPROCESS, "--input text.txt --output-prefix out --workers 0 --tokenizer-type ByteTokenizer",
                        "--workers 0: must be at least 1."),
    "an unknown character": Wrong(PREPROCESS, "--input text.txt --output-prefix out --strict --tokenizer-type CharTokenizer --tokenizer-model characters.json",
                                  "which a text uses"),
    "a document that is not there": Wrong("tools/dataset.py", "show --data-path tiny --document 1", "--document 1: tiny has documents 0 to 0."),
    "two vocabularies": Wrong("tools/dataset.py", "merge --data-path data wide --output-prefix all", "merge datasets of one vocabulary."),
    "a dataset into itself": Wrong("tools/dataset.py", "merge --data-path data tiny --output-prefix data", "is one of the inputs; name another."),
    "steps of an unknown size": Wrong("tools/dataset.py", f"trace --step 2 {BYTES}", "--global-batch-size is missing: it says which samples"),
    "a dataset over another": Wrong("tools/dataset.py", "merge --data-path tiny --output-prefix data", "data.idx is there already; name another"),
    "an apostrophe alone": Wrong(PRETRAIN, f"{MODEL} --vocab-size 300 --data-args-path list", "cannot be cut into words (No closing quotation)",
                                 write("list", "/data/peter's_text\n")),
    "nothing to rotate": Wrong(PRETRAIN, f"{BYTES} --position-embedding-type rope --rotary-percent 0.1", "--rotary-percent 0.1: leaves no channel"),
    "a step beyond the run": Wrong("tools/dataset.py", f"trace --step 9 --dp 1 {BYTES}", "--step 9: the run has steps 1 to 4."),
    "a vocabulary of bytes alone": Wrong("tools/train_tokenizer.py", "--input text.txt --vocab-size 256 --output tok",
                                         "--vocab-size 256: byte-level BPE needs at least 257"),
    "more pieces than text": Wrong("tools/train_tokenizer.py", "--input text.txt --type sentencepiece --vocab-size 9000 --output tok",
                                   "--vocab-size 9000: sentencepiece cannot make that many pieces of this text"),
    "a schedule that is none": Wrong("tools/show_schedule.py", "1f2b --pp 2 --micro-batches 4", "1f2b: write gpipe or breadth-first or 1f1b or"),
}


def contents() -> dict[str, str]:
    """Every file below the working folder, with a digest of its bytes; folders by their names."""
    return {str(p): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in Path().rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_one_sentence_and_nothing_is_written(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    wrong = MISTAKES[name]
    wrong.spoil()
    before = contents()
    code, _, told = program(monkeypatch, capfd, wrong.program, *wrong.words.split())
    sentences = [line for line in told.splitlines() if line.strip()]
    assert code == 2 and len(sentences) == 1 and sentences[0].startswith("error: ") and wrong.sentence in sentences[0], (code, told)
    assert contents() == before
