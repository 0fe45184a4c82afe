"""Conversion against transformers itself: byte-equal tensors there and back, equal logits, and a clear word for what cannot be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LLAMA, LLAMA3, assert_equal_logits, random_model, same_bytes, tensors, transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support import built, byte_dataset, tool, train

from megazero.base.errors import UserError
from megazero.data.tokenizers import load_tokenizer
from megazero.hf.convert import export_folder, import_folder
from megazero.plan import families
from megazero.plan.family import to_config
from megazero.plan.words import architecture, flags
from megazero.settings.command_line import build
from megazero.settings.config import Config
from megazero.state.checkpoint import Reader


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_shards_and_narrow_dtypes_come_back_byte_equal(dtype: str, tmp_path: Path) -> None:
    random_model("llama", tmp_path / "theirs", getattr(torch, dtype), max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    short = {"bfloat16": "bf16", "float16": "fp16", "float64": None}[dtype]
    export_folder(Reader(tmp_path / "ours"), tmp_path / "back", short, shard=30_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert same_bytes(tensors(tmp_path / "theirs"), tensors(tmp_path / "back"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "back").values())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)


def test_the_bare_model_with_its_masks_and_older_config_forms_is_read(tmp_path: Path) -> None:
    model = random_model("gpt2", tmp_path / "theirs")
    plain = {k.removeprefix("transformer."): v for k, v in tensors(tmp_path / "theirs").items()}
    save_file(plain | {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "lm_head.weight": plain["wte.weight"].clone()},
              tmp_path / "theirs" / "model.safetensors")
    edit(tmp_path / "theirs" / "config.json", drop=("tie_word_embeddings", "activation_function", "n_inner"))
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert_equal_logits(model, Reader(tmp_path / "ours"))
    new = transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3).to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    assert families.from_config(old)[0] == families.from_config(new)[0]
    assert families.from_config(to_config(*families.from_config(old)))[0] == families.from_config(new)[0]


@pytest.mark.parametrize("words", [
    "--openai-gelu --num-query-groups 4", "--disable-bias-linear", "--untie-embeddings-and-output-weights --max-position-embeddings 40",
    "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 --disable-bias-linear --kv-channels 24",
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --add-qkv-bias --use-rope-scaling "
    "--rope-original-length 16 --norm-epsilon 1e-6"])
def test_a_run_of_ours_loads_in_transformers(words: str, tmp_path: Path) -> None:
    """Biases that the family has and the model has not are written as zeros."""
    sizes = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 24 --vocab-size 101 --lr 1e-2 --mock-data "
             f"--eval-iters 0 --init-method-std 0.1 --train-iters 3 --save {tmp_path / 'run'}")
    train(f"{sizes} {words}")
    reader = Reader(tmp_path / "run")
    export_folder(reader, tmp_path / "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_logits(model, reader, 24)
    import_folder(tmp_path / "hf", tmp_path / "again")
    assert_equal_logits(model, Reader(tmp_path / "again"), 24)


def test_training_goes_on_from_an_import_with_the_flags_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("llama-scaled", tmp_path / "theirs")
    a, _ = import_folder(tmp_path / "theirs", tmp_path / "ours")
    c = build(Config, flags(a))
    assert architecture(c, a.vocab_size) == replace(a, pad_rows=c.model.make_vocab_size_divisible_by)
    words = ("import", "--input", tmp_path / "theirs", "--output", tmp_path / "again")
    _, printed, _ = tool(monkeypatch, capsys, "convert_hf.py", *words)
    losses = train(f"{printed.split('train on with: ')[1].strip()} --mock-data --lr 1e-3 --train-iters 2 --eval-iters 0", tmp_path / "log")
    assert len(losses) == 2
    train_tokenizer("GPT2BPETokenizer", tmp_path / "theirs")
    vocabulary = len(json.loads((tmp_path / "theirs" / "vocab.json").read_text()))
    random_model("gpt2", tmp_path / "theirs", vocab_size=vocabulary)
    words = ("import", "--input", tmp_path / "theirs", "--output", tmp_path / "text")
    _, printed, _ = tool(monkeypatch, capsys, "convert_hf.py", *words)
    assert "--vocab-size" not in printed
    train(f"{printed.split('train on with: ')[1].strip()} --mock-data --lr 1e-3 --train-iters 2 --eval-iters 0")


@pytest.mark.parametrize("words, reason", [
    ("--qk-layernorm --swiglu --normalization RMSNorm --position-embedding-type rope", "--qk-layernorm, llama has no --qk-layernorm"),
    ("--position-embedding-type rope --swiglu", "--normalization LayerNorm, llama has --normalization RMSNorm"),
    ("--num-query-groups 2", "--num-query-groups 2, gpt2 has --num-query-groups 4"),
    ("--swiglu", "--swiglu, gpt2 has no --swiglu"),
    ("--position-embedding-type none", "gpt2 needs positions.weight")])
def test_what_no_family_can_express_is_said(words: str, reason: str) -> None:
    a = built(f"--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --vocab-size 9 --lr 1 --mock-data --train-iters 1 "
              f"--eval-iters 0 {words}").plan.architecture
    with pytest.raises(UserError, match=reason):
        families.family_of(a)


def test_a_family_is_remembered_and_told_apart(tmp_path: Path) -> None:
    """A plain Llama never leaves as another family, nor another as Llama, though most could be each other."""
    base = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
    ours = {"": "llama", "--add-qkv-bias": "qwen2", "--qk-layernorm": "qwen3", "--rotary-percent 0.5": "phi3"}
    for words, model_type in ours.items():
        a = built(f"--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --vocab-size 9 --lr 1 --mock-data --train-iters 1 "
                  f"--eval-iters 0 {base} {words}").plan.architecture
        assert families.family_of(a).model_type == model_type
        assert families.family_of(a, "gpt2").model_type == model_type               # what can no longer be is not insisted on
    plain = families.from_config(transformers.LlamaConfig(**LLAMA).to_dict())[0]
    assert families.family_of(plain, "mistral").model_type == "mistral" and families.family_of(plain, None).model_type == "llama"


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_a_window_that_is_active_is_never_dropped(name: str) -> None:
    """Nor is one that is not made active."""
    config = getattr(transformers, f"{name}Config")
    c = config(**LLAMA, sliding_window=16, use_sliding_window=True, max_window_layers=1).to_dict()
    a = families.from_config(c)[0]
    assert (a.window, a.kinds) == (16, ("full", "local")) and families.from_config(c | {"layer_types": None})[0] == a
    assert families.from_config(c | {"use_sliding_window": False})[0].window == 0
    above = families.from_config(config(**LLAMA, sliding_window=16, use_sliding_window=True, max_window_layers=9).to_dict())[0]
    assert (above.window, above.kinds) == (0, ())
    mistral = transformers.MistralConfig(**LLAMA).to_dict()
    assert families.from_config(mistral)[0].window == 4096 and families.from_config(mistral | {"sliding_window": None})[0].window == 0


def edit(path: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k not in drop} | values))


DAMAGES: dict[str, tuple[Any, str]] = {
    "pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickles"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    "cut": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "cannot be read"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: cannot be read"),
    "bad json": (lambda d: (d / "config.json").write_text("{"), "config.json: cannot be read .Expecting"),
    "family": (lambda d: edit(d / "config.json", model_type="mamba"), "model_type mamba is not known here; there are gpt2, llama"),
    "two ropes": (lambda d: edit(d / "config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0}, rope_parameters={"rope_type": "default"}),
                  "rope_parameters: rope_type is 'default', elsewhere 'llama3'; let both say the same"),
    "two kinds of weights": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "readers differ on which counts; remove one"),
    "rope": (lambda d: edit(d / "config.json", rope_parameters={"rope_type": "longrope"}), "rope_type longrope is not known here; there are default, linear, "),
    "half a rope": (lambda d: edit(d / "config.json", rope_parameters={"rope_type": "yarn"}), "rope_parameters has no factor"),
    "a rope that shrinks": (lambda d: edit(d / "config.json", rope_parameters={"rope_type": "linear", "factor": 0}), "the numbers of linear must be above 0"),
    "a dynamic rope of another length": (
        lambda d: edit(d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}),
        "original_max_position_embeddings is 8, but a dynamic rope counts from max_position_embeddings 32"),
    "activation": (lambda d: edit(d / "config.json", hidden_act="gelu"), "hidden_act gelu is not known here; there are silu"),
    "missing key": (lambda d: edit(d / "config.json", drop=("num_hidden_layers",)), "num_hidden_layers is missing"),
    "half a bias": (lambda d: edit(d / "config.json", mlp_bias=True), "mlp.gate_proj.bias, which its config.json asks for"),
    "more layers": (lambda d: edit(d / "config.json", num_hidden_layers=3), r"has no model.layers.2.*which its config.json asks for"),
    "fewer layers": (lambda d: edit(d / "config.json", num_hidden_layers=1), "which its config.json does not mention"),
    "width": (lambda d: edit(d / "config.json", intermediate_size=81), "config.json asks for"),
    "quantized": (lambda d: edit(d / "config.json", quantization_config={"quant_method": "x"}), "quantization_config is {'quant_method': 'x'}, this decoder has none"),
    "tied, but not equal": (lambda d: edit(d / "config.json", tie_word_embeddings=True), "holds lm_head.weight"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    random_model("llama", tmp_path / "theirs")
    damage, sentence = DAMAGES[name]
    damage(tmp_path / "theirs")
    with pytest.raises(UserError, match=sentence):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_failed_export_leaves_nothing_and_a_full_folder_is_kept(tmp_path: Path) -> None:
    random_model("llama", tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    file = tmp_path / "ours" / "step-00000000" / "rank-00000.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="are damaged"):
        export_folder(Reader(tmp_path / "ours"), tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
    file.write_bytes(good)
    with pytest.raises(UserError, match="not empty"):
        export_folder(Reader(tmp_path / "ours"), tmp_path / "theirs")
    with pytest.raises(UserError, match="not empty"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = random_model("gpt2", tmp_path / "theirs")
    model.transformer.wte.weight.data[3, 3] = 1e6
    model.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(UserError, match="transformer.wte.weight holds 1e"):
        export_folder(Reader(tmp_path / "ours"), tmp_path / "back", "fp16")
    assert not (tmp_path / "back").exists()


TEXTS = ["def f(x):\n    return  x + 1\n", "Hello world", "  naïve — 漢字 \n\n\tend", ""]


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_the_exported_tokenizer_gives_the_same_ids_in_transformers(kind: str, tmp_path: Path) -> None:
    flags = train_tokenizer(kind, tmp_path)
    train(f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1 --eval-iters 0 --train-iters 0 --openai-gelu "
          f"--mock-data --tokenizer-type {kind} {flags} --save {tmp_path / 'run'}")
    reader = Reader(tmp_path / "run")
    export_folder(reader, tmp_path / "hf")
    ours = load_tokenizer(reader.index["tokenizer"], tmp_path / "run" / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [theirs(t)["input_ids"] for t in TEXTS] == [ours.encode(t) for t in TEXTS]
    assert theirs.eos_token_id == ours.eod
    assert theirs.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.vocab_size, config.eos_token_id) == (ours.vocab_size, ours.eod)
    import_folder(tmp_path / "hf", tmp_path / "again")
    again = load_tokenizer(Reader(tmp_path / "again").index["tokenizer"], tmp_path / "again" / "tokenizer")
    assert [again.encode(t) for t in TEXTS] == [ours.encode(t) for t in TEXTS]


def train_tokenizer(kind: str, folder: Path) -> str:
    """A small tokenizer of that type, made from text of this machine; its flags."""
    text = Path(json.__file__).read_text()
    if kind == "SentencePieceTokenizer":
        import sentencepiece
        with (folder / "t.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text.split("\n")), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2, num_threads=1)
        return f"--tokenizer-model {folder / 't.model'}"
    import tokenizers
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    if kind == "GPT2BPETokenizer":
        made.save_model(str(folder))
        return f"--vocab-file {folder / 'vocab.json'} --merge-file {folder / 'merges.txt'}"
    made.save(str(folder / "tokenizer.json"))
    return f"--tokenizer-model {folder / 'tokenizer.json'}"


def test_the_tools_say_what_they_did_and_what_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, run = byte_dataset(tmp_path), tmp_path / "run"
    train(f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --lr 1e-3 --eval-iters 0 --train-iters 1 --openai-gelu "
          f"--data-path {prefix} --tokenizer-type ByteTokenizer --save {run}")

    def call(name: str, *words: Any) -> tuple[int, str, str]:
        return tool(monkeypatch, capsys, name, *words)

    code, shown, _ = call("checkpoint.py", "inspect", "--load", run)
    assert code == 0 and "embedding.weight" in shown and "exp_avg_sq F32" in shown
    assert "is whole: " in call("checkpoint.py", "verify", "--load", run)[1]
    assert call("convert_hf.py", "export", "--load", run, "--output", tmp_path / "hf", "--dtype", "bf16")[0] == 0
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("transformer.wte.weight").get_dtype() == "BF16"
    path = run / "step-00000001" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for name, words, sentence in (
        ("checkpoint.py", ("verify", "--load", run), "are damaged"), ("checkpoint.py", ("verifi",), "did you mean verify"),
        ("checkpoint.py", ("verify", "--load", tmp_path / "none"), "no such folder"),
        ("checkpoint.py", ("inspect", "--load", run, "--ckpt-step", 7), "holds steps 1"),
        ("checkpoint.py", ("inspect",), "--load is missing"), ("convert_hf.py", (), "write export or import"),
        ("convert_hf.py", ("export", "--load", run, "--output", tmp_path / "hf"), "not empty"),
        ("convert_hf.py", ("export", "--lod", run), "did you mean --load"),
        ("convert_hf.py", ("import", "--input", tmp_path / "none", "--output", tmp_path / "x"), "there is no such folder"),
    ):
        code, _, said = call(name, *words)
        assert code == 2 and sentence in said and said.startswith("error: "), (words, said)
