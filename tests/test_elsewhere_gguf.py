"""GGUF files against transformers' own reader of them, which the `gguf` package serves. `pip install gguf` runs it; elsewhere it is skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA3, MODELS, random_model
from support import tool, train

from megazero.hf.convert import import_folder
from megazero.run.generate import build_from_checkpoint, logits
from megazero.state.checkpoint import Reader

gguf = pytest.importorskip("gguf", reason="GGUF is written by the package gguf, which is not installed")
transformers = pytest.importorskip("transformers")
WITHIN = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2, "q8_0": 2e-2}       # of the largest logit: fp32 as sums in another order, then roundings of weights


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: tool(monkeypatch, capsys, "convert_checkpoint.py", *words)


@pytest.mark.parametrize("name, dtype", [
    *((name, "fp32") for name in ("gpt2", "llama", "llama-tied", "qwen2", "qwen3", "phi3", "starcoder2")),
    *((name, dtype) for name in ("gpt2", "llama") for dtype in ("fp16", "bf16", "q8_0"))])
def test_transformers_reads_it_with_the_same_logits(name: str, dtype: str, tmp_path: Path, convert: Any) -> None:
    random_model(name, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours")
    code, out, err = convert("export", "--load", tmp_path / "ours", "--output", tmp_path / "out", "--to", "gguf", "--dtype", dtype)
    assert code == 0 and "left        the run has no tokenizer" in err, err
    file = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {t.tensor_type.name for t in file.tensors}
    assert kinds <= {"F32", {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype], *(["F16"] if dtype == "q8_0" else [])}, kinds
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")               # its reader takes some sizes from a tokenizer, or has defaults
    graph = file.fields["general.architecture"].contents()
    said = {key.removeprefix(f"{graph}."): field.contents() for key, field in file.fields.items() if key.startswith(f"{graph}.")}
    assert (said["block_count"], said["embedding_length"], said["attention.head_count"], said["vocab_size"]) == (2, 48, 4, 101)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", config=config, dtype=torch.float32).eval()
    tokens = torch.randint(101, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(tokens).logits
    ours = logits(build_from_checkpoint(Reader(tmp_path / "ours")), tokens)
    assert (ours - theirs).abs().max() <= WITHIN[dtype] * theirs.abs().max()


def test_a_tokenizer_of_gpt2_goes_along_and_what_cannot_is_said(tmp_path: Path, convert: Any) -> None:
    from test_hf import train_tokenizer
    flags = train_tokenizer("GPT2BPETokenizer", tmp_path)
    train(f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1 --eval-iters 0 --train-iters 0 --openai-gelu "
          f"--mock-data --tokenizer-type GPT2BPETokenizer {flags} --save {tmp_path / 'run'}")
    code, _, err = convert("export", "--load", tmp_path / "run", "--output", tmp_path / "out", "--to", "gguf", "--dtype", "fp16")
    assert code == 0 and not err
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "gpt2" and len(fields["tokenizer.ggml.tokens"].contents()) == 400
    for words, sentence in (("--squared-relu", "its activation is relu2"), ("--openai-gelu --attention-window 4", "")):
        train(f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1 --eval-iters 0 --train-iters 0 --vocab-size 30 "
              f"--mock-data {words} --save {tmp_path / words[2:6]}")
        code, _, err = convert("export", "--load", tmp_path / words[2:6], "--output", tmp_path / "no", "--to", "gguf")
        assert code == 2 and sentence in err and not (tmp_path / "no").exists(), err


def test_llamas_stretch_is_a_tensor(tmp_path: Path, convert: Any) -> None:
    """transformers does not read it: the factors are those of its own table."""
    random_model("llama-scaled", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "ours")
    assert convert("export", "--load", tmp_path / "ours", "--output", tmp_path / "out", "--to", "gguf")[0] == 0
    file = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    config = transformers.LlamaConfig(**{**MODELS["llama-scaled"][1], "rope_parameters": LLAMA3})
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 20, 2).double() / 20)
    torch.testing.assert_close(torch.from_numpy(file["rope_freqs.weight"].copy()), (plain / stretched.double()).float(), rtol=1e-5, atol=0)
