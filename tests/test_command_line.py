"""The words a user types: flags, files, presets, and one clear sentence for everything that is wrong."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from support import ROOT, TINY, program, train

from megazero.base.errors import UserError
from megazero.settings import config
from megazero.settings.command_line import build, flatten, leaves, option, parse
from megazero.settings.config import PRESETS, Config, from_command_line


def test_flags_override_files_override_presets(tmp_path: Path) -> None:
    keys = {"model": "gpt2-124m", "num_layers": 3, "hidden-size": 256, "data": {"data_path": ["a", "b"], "shuffle": False}, "bf16": True}
    files = {
        "c.json": json.dumps(keys),
        "c.yaml": "model: gpt2-124m\nnum_layers: 3\nhidden-size: 256\ndata:\n  data_path: [a, b]\n  shuffle: false\nbf16: true\n",
        "c.toml": 'model = "gpt2-124m"\nnum_layers = 3\nhidden-size = 256\nbf16 = true\n[data]\ndata_path = ["a", "b"]\nshuffle = false\n',
    }
    seen = set()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        c = from_command_line(["--config", str(tmp_path / name), "--hidden-size", "512", "--no-bf16"])
        assert (c.model.num_layers, c.model.hidden_size, c.model.num_attention_heads) == (3, 512, 12)
        assert c.data.data_path == ("a", "b") and not c.data.shuffle and c.dtype == "fp32" and c.model.openai_gelu
        seen.add(json.dumps({k: v for k, v in flatten(c).items() if k != "config"}))
    assert len(seen) == 1, "the three forms of a file mean the same"


def test_a_configuration_survives_json() -> None:
    c = from_command_line(f"{TINY} --data-path a b --bf16 --lr 1e-3 --tp 1".split())
    assert build(Config, {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(flatten(c))).items()}) == c


def test_numbers_may_be_written_as_people_write_them() -> None:
    c = from_command_line("--train-iters 1e5 --global-batch-size 1_024 --lr 3e-4".split())
    assert (c.training.train_iters, c.training.global_batch_size, c.optimizer.lr) == (100_000, 1024, 3e-4)


def test_aliases_and_shorthands() -> None:
    c = from_command_line("--tp 4 --pp 2 --dp 3 --zero-stage 1 --fp16".split())
    p = c.parallel
    assert (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.data_parallel_size, p.zero_stage) == (4, 2, 3, 1)
    assert c.dtype == "fp16"


def test_names_are_unique_and_every_flag_has_a_help_text() -> None:
    options = [o for group in leaves(Config).values() for o in group]
    assert len({o.name for o in options}) == len(options)
    assert all(o.field.metadata["help"] for o in options)


def test_presets_name_fields_of_the_model() -> None:
    names = {f.name for f in fields(config.Model)}
    assert all(set(row) <= names for row in PRESETS.values())


def test_a_required_option_must_be_given() -> None:
    @dataclass(frozen=True)
    class Settings:
        """A tool."""
        input: tuple[str, ...] = option(help="files to read")
        level: int = option(3, "how much")
    assert parse(Settings, ["--input", "a", "b"]) == Settings(("a", "b"), 3)
    with pytest.raises(UserError, match="--input is missing: files to read."):
        parse(Settings, [])


def test_a_wrong_choice_is_not_missing_too_and_quoted_pairs_are_told() -> None:
    @dataclass(frozen=True)
    class Settings:
        """A tool."""
        to: str = option(help="whose format", choices=("a", "b"))
    with pytest.raises(UserError) as error:
        parse(Settings, ["--to", "c", "--to 3"])
    assert error.value.sentences == ("'--to 3': is one word; leave out the quotation marks around a flag and its value.",
                                     "--to c: must be one of a, b.")


# Each wrong command line (appended to one that works), and what is said.
WRONG = {
    "--num-layer 3": "--num-layer: no such flag (did you mean --num-layers?).",
    "--zero-stge 1": "--zero-stge: no such flag (did you mean --zero-stage?).",
    "--num-layers two": "--num-layers two: must be a whole number.",
    "--num-layers 2.5": "--num-layers 2.5: must be a whole number.",
    "--num-layers 0": "--num-layers 0: must be greater than 0, and finite.",
    "--lr fast": "--lr fast: must be a number.",
    "--lr -1": "--lr -1.0: must be 0 or greater, and finite.",
    "--dtype bf61": "--dtype bf61: must be one of fp64, fp32, bf16, fp16 (did you mean bf16?).",
    "--model gpt2-125m": "--model gpt2-125m: no such preset (did you mean gpt2-124m?); there are gpt2-124m",
    "--bf16 --fp16": "--fp16: cannot be combined with --bf16; choose one.",
    "--hidden-size 65": "--hidden-size 65: cannot be shared by --num-attention-heads 4; write 64 or 68, or give --kv-channels.",
    "--num-query-groups 3": "--num-query-groups 3: must divide --num-attention-heads 4; write one of 1, 2, 4.",
    "--micro-batch-size 3 --global-batch-size 4": "--global-batch-size 4: must be a multiple of --micro-batch-size 3 x data-parallel 1; write 3 or 6.",
    "--tp 4": "--tp 4 x --pp 1: 4 ranks are needed, or a multiple, but 1 runs; start with torchrun --nproc_per_node 4, or change the sizes.",
    "--zero-stage 4": "--zero-stage 4: must be 0, 1, 2 or 3.",
    "--max-position-embeddings 8": "--max-position-embeddings 8: is less than --seq-length 24; write at least 24.",
    "--swiglu --squared-relu": "--squared-relu: cannot be combined with --swiglu; choose one.",
    "--geglu --relu": "--relu: cannot be combined with --geglu; choose one.",
    "--relu --openai-gelu": "--openai-gelu: cannot be combined with --relu; choose one.",
    "--qk-layernorm --qk-layernorm-over width": "--qk-layernorm-over width: needs --normalization RMSNorm, not LayerNorm.",
    "--attn-logit-softcapping 0": "--attn-logit-softcapping 0.0: must be greater than 0, and finite.",
    "--logits-scaling -1": "--logits-scaling -1.0: must be greater than 0, and finite.",
    "--position-offset -2": "--position-offset -2: must be 0 or greater, and finite.",
    "--yarn-beta-slow 64": "--yarn-beta-fast 32: must be greater than --yarn-beta-slow 64.",
    "--window-attn-skip-freq x": "--window-attn-skip-freq x: must be a number N, for the last of each N layers, or a list of 2 times 0 or 1, such as [1]*1+[0].",
    "--hidden-dropout 1.5": "--hidden-dropout 1.5: must be at least 0 and less than 1.",
    "--optimizer lion --lion-beta2 1": "--lion-beta2 1: must be at least 0 and less than 1.",
    "--optimizer ademamix --ademamix-beta3 -0.1": "--ademamix-beta3 -0.1: must be at least 0 and less than 1.",
    "--optimizer ademamix --ademamix-alpha -1": "--ademamix-alpha -1.0: must be 0 or greater, and finite.",
    "--optimizer ademamix --ademamix-beta3-warmup 0": "--ademamix-beta3-warmup 0: must be greater than 0, and finite.",
    "--ema 1": "--ema 1.0: must be at least 0 and less than 1.",
    "--optimizer muon --muon-momentum 1": "--muon-momentum 1: must be at least 0 and less than 1.",
    "--optimizer muon --muon-num-ns-steps 0": "--muon-num-ns-steps 0: must be greater than 0, and finite.",
    "--optimizer muon --muon-extra-scale-factor -1": "--muon-extra-scale-factor -1.0: must be 0 or greater, and finite.",
    "--optimizer muon --muon-scale-mode spectra": "--muon-scale-mode spectra: must be one of spectral, unit_rms_norm, shape_scaling (did you mean spectral?).",
    "--optimizer muon --muon-coefficient-type polar_express": "--muon-coefficient-type polar_express: must be one of simple, quintic.",
    "--optimizer muon --muon-ns-dtype fp16": "--muon-ns-dtype fp16: must be one of bf16, fp32, fp64",
    "--optimizer muon --muon-tp-mode blockwise": "--muon-tp-mode blockwise: muon makes whole matrices orthogonal here, q, k and v apart, whatever --tp is; leave it out.",
    "--optimizer muon --muon-no-split-qkv": "--muon-no-split-qkv: muon makes whole matrices orthogonal here, q, k and v apart, whatever --tp is; leave it out.",
    "--optimizer muon --muon-scalar-optimizer lion": "--muon-scalar-optimizer lion: what is no matrix has adam beside muon here; leave it out.",
    "--optimizer adafactor --adafactor-decay 0.8": "--adafactor-decay 0.8: must be below 0, and finite; write -0.8.",
    "--optimizer adafactor --adafactor-clip 0": "--adafactor-clip 0.0: must be greater than 0, and finite.",
    "--optimizer adafactor --adafactor-eps -1": "--adafactor-eps -1.0: must be 0 or greater, and finite.",
    "--lr-embedding -1": "--lr-embedding -1.0: must be 0 or greater, and finite.",
    "--lr-head 1e-3": "--lr-head 0.001: this model has no such weights (its output is its embedding); leave it out.",
    "--lr-vectors inf": "--lr-vectors inf: must be 0 or greater, and finite.",
    "--no-weight-decay-on embedding.wieght": "--no-weight-decay-on embedding.wieght: is no weight of this model (did you mean embedding.weight?).",
    "--no-weight-decay-on zzzz*": "--no-weight-decay-on zzzz*: is no weight of this model; write names such as embedding.weight or *.mlp.*.",
    "--exp-avg-dtype fp8": "--exp-avg-dtype fp8: must be one of fp32, bf16, 8bit",
    "--exp-avg-dtype bf16 --optimizer muon": "--exp-avg-dtype bf16: is of --optimizer adam, lion, lamb and ademamix, not of muon; write fp32.",
    "--exp-avg-sq-dtype 8bit --optimizer sgd": "--exp-avg-sq-dtype 8bit: is of --optimizer adam, lion, lamb and ademamix, not of sgd; write fp32.",
    "--main-params-dtype bf16": "--main-params-dtype bf16: needs --bf16, whose weights it leaves without masters; this run is fp32.",
    "--main-params-dtype fp16": "--main-params-dtype fp16: must be one of fp32, bf16",
    "--main-grads-dtype bf16": "--main-grads-dtype bf16: sums of gradients are fp32 here: others would round the update; leave it out.",
    "--optimizer lionn": "--optimizer lionn: ",
    "--train-samples 100": "--train-samples 100: cannot be combined with --train-iters 5; keep one.",
    "--min-lr 1": "--min-lr 1: is above --lr 0.01; write at most 0.01.",
    "--lr-warmup-iters 9": "--lr-warmup-iters 9: is longer than the whole curve of 5 steps; write less than 5.",
    "--lr-warmup-iters 1 --lr-warmup-fraction 0.1": "--lr-warmup-fraction 0.1: cannot be combined with --lr-warmup-iters 1; keep one.",
    "--lr-decay-style WSD": "--lr-wsd-decay-iters is missing: --lr-decay-style WSD needs the length of its final part.",
    "--lr-decay-style cosin": "--lr-decay-style cosin: must be one of constant, linear, cosine, inverse-square-root, WSD (did you mean cosine?).",
    "--no-mock-data --data-path x --data-args-path y": "--data-path and --data-args-path: choose one.",
    "--no-mock-data": "--data-path is missing: give the prefix of a preprocessed dataset, or --mock-data.",
    "--split 9,x": "--split '9,x': must be one to three numbers, the first above 0, such as 969,30,1.",
    "--tokenizer-type GPT2BPETokenizer": "--merge-file is missing: --tokenizer-type GPT2BPETokenizer needs it.",
    "--no-mock-data --data-path x --tokenizer-type CharTokenizer --tokenizer-model no.json": "--tokenizer-model no.json: no such file",
    "--load nowhere": "--load nowhere: there is no such folder.",
    "--hidden-size 16 --num-attention-heads 2 --swiglu": "--ffn-hidden-size is missing: --swiglu makes it 8/3 of --hidden-size 16 in whole 64s, "
                                                         "which is none; give it.",
    "--skip-train": "--skip-train: there is nothing to evaluate; give the weights with --load, and leave out --eval-iters 0.",
    "--multiple-validation-sets": "--multiple-validation-sets: has no effect without --valid-data-path or --test-data-path; name the sets.",
    "--train-data-path a --valid-data-path 0.3 b 0.7 c --multiple-validation-sets":
        "--multiple-validation-sets: each set has a loss of its own, so the weight 0.3 has no effect; name the prefixes alone.",
    "--config no.toml": "--config no.toml: cannot be read (No such file or directory); name a .toml, .yaml or .json file.",
    "--config setup.py": "--config setup.py: is not valid PY (its name must end in .toml, .yaml or .json).",
    "--eod-mask-loss": "--eod-mask-loss: needs --tokenizer-type, to know the end-of-document token.",
    "--no-mock-data --data-path missing/data": "missing/data",
    "--train-iters 1e400": "--train-iters 1e400: must be a whole number.",
    "--hidden-size 10000000 --num-attention-heads 10": "for 1 rank, this cpu has",
    "--save /proc/x": "--save /proc/x: cannot be written to (No such file or directory); name another folder.",
    "--log-dir setup.py": "--log-dir setup.py: is not a folder that can be written to; name another.",
    "--pp 2 --num-virtual-stages-per-pipeline-rank 2 --pipeline-schedule gpipe":
        "--num-virtual-stages-per-pipeline-rank 2: needs --pipeline-schedule interleaved or breadth-first, not gpipe.",
    "--device h100": "--device h100: must be auto, cpu or cuda; others are planned for with --check.",
    "--device h101": "--device h101: must be auto, cpu or cuda, or with --check one of gb200, b200,",
    "--world-size 2": "--world-size 2: must be at least 1, and needs --check; torchrun says how many ranks run.",
    "--pp 3": "--num-layers 2: 2 layers are left for 3 stages of --pp 3; each needs at least one and none may be left over.",
    "--pipeline-schedule interleave": "--pipeline-schedule interleave: must be one of gpipe, breadth-first, 1f1b, interleaved, zb-h1 (did you mean interleaved?).",
    "--pp 2 --pipeline-layout Et|tX": "--pipeline-layout Et|tX: holds something else than E, t, L, |, * and brackets; write something like Et*3|t*4|t*3L.",
    "--pp 2 --pipeline-layout Et|t": "--pipeline-layout Et|t: must begin with the one E and end with the one L; write something like Et*3|t*4|t*3L.",
    "--pp 2 --pipeline-layout Ett|tL": "--pipeline-layout Ett|tL: has 3 layers, --num-layers is 2.",
    "--pp 2 --pipeline-layout E|t|tL": "--pipeline-layout E|t|tL: has 3 stages, --pp and virtual stages make 2.",
    "--decoder-first-pipeline-num-layers 1": "--decoder-first-pipeline-num-layers 1: must be 0 or more, and needs several stages (--pp).",
    "--zero-stage 1 --zero-shard-size 2": "--zero-shard-size 2: must divide the data-parallel size 1; write one of 1.",
    "--zero-shard-size 2": "--zero-shard-size 2: has no effect without --zero-stage 1, 2 or 3.",
    "--reduce-every 2 --zero-stage 1": "--reduce-every 2: has no effect without --zero-stage 2 or 3.",
    "--keep-weights 2 --zero-stage 2": "--keep-weights 2: has no effect without --zero-stage 3.",
    "--zero-stage 3 --keep-weights 0": "--keep-weights 0: must be at least 1.",
    "--bucket-size -1": "--bucket-size -1: must be 0 or more.",
    "stray": "stray: belongs to no flag; see --help.",
}


@pytest.mark.parametrize("words", WRONG)
def test_each_mistake_gets_its_sentence(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "setup.py").write_text("")
    monkeypatch.chdir(tmp_path)
    code, _, told = program(monkeypatch, capsys, "pretrain_gpt.py", *f"{TINY} {words}".split())
    sentences = told.splitlines()
    assert code == 2 and all(s.startswith("error: ") for s in sentences) and any(WRONG[words] in s for s in sentences), told
    assert len(set(sentences)) == len(sentences) and [p.name for p in tmp_path.iterdir()] == ["setup.py"]


@pytest.mark.parametrize("key, sentence", {
    "num_layer = 3": "no such key 'num_layer' (did you mean num_layers?)",
    "num_layers = true": "num_layers = True: must be a whole number, not true or false",
    "swiglu = 1": "swiglu = 1: must be true or false",
    "num_layers = 3\nnum-layers = 4": "'num-layers' is given twice; keep one",
    "num_layers = ": "is not valid TOML",
    'save = ["a", "b"]': "must be a word, not a list",
    'save = "a\\u0000b"': "save = 'a\\x00b': must not hold characters that control a terminal or end a name",
    'load = "\\u001b[31mX"': "must not hold characters that control a terminal",
    'config = "other.toml"': "a file cannot name another",
    "use_flash_attn = true": "use_flash_attn has no effect here (always so here); leave it out",
    "tensorboard-dir = 'x'": "tensorboard-dir logs go to --log-dir",
}.items())
def test_mistakes_in_a_file(key: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(key)
    with pytest.raises(UserError) as error:
        from_command_line(["--config", str(tmp_path / "c.toml")])
    assert sentence in str(error.value) and str(tmp_path / "c.toml") in str(error.value)


def test_mistakes_of_the_file_and_of_the_flags_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("num_layer: 3\nsave: null\n")
    with pytest.raises(UserError) as error:
        from_command_line(["--config", str(tmp_path / "c.yaml"), "--nosuch", "--lr", "x", "--num-experts", "8"])
    assert len(error.value.sentences) == 4
    (tmp_path / "c.yaml").write_text("save: null\n")
    assert from_command_line(["--config", str(tmp_path / "c.yaml")]).checkpoint.save is None


def test_check_looks_at_data_and_checkpoints_that_are_here_and_lists_those_that_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no"):
        train(f"{TINY} --check --load {tmp_path / 'empty'}")
    train(f"{TINY} --check --no-mock-data --data-path 0.3 nowhere/a 0.7 nowhere/b --load nowhere")
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == ["not here    --data-path nowhere/a nowhere/b", "not here    --load nowhere"]
    gpt2 = TINY.replace("--vocab-size 101 ", "")
    train(f"{gpt2} --check --vocab-file no.json --merge-file no.txt")
    told = capsys.readouterr().out.splitlines()
    assert "vocabulary 50,257" in told[0] and told[-2:] == ["not here    --vocab-file no.json", "not here    --merge-file no.txt"]
    with pytest.raises(UserError, match="--vocab-size is missing: the file of --tokenizer-type SentencePieceTokenizer is not on this machine"):
        train(f"{gpt2} --check --tokenizer-type SentencePieceTokenizer --tokenizer-model no.model")


def test_check_plans_for_ranks_and_devices_that_are_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    train(f"{TINY} --check --tp 2 --zero-stage 1")
    assert "2 ranks are the fewest it runs on; --world-size N plans for more" in capsys.readouterr().out
    train(f"{TINY} --check --tp 2 --zero-stage 1 --world-size 8 --global-batch-size 8")
    told = capsys.readouterr().out
    assert "ranks       8 = tp 2 x pp 1 x dp 4, ZeRO 1 over 4 ranks" in told and "fewest" not in told
    huge = "--model gpt3-6.7b --lr 1e-4 --mock-data --vocab-size 50257 --train-iters 5 --check --bf16"
    train(huge)                                                 # far beyond this machine: told, and no mistake
    told = capsys.readouterr().out
    assert "device      too small: --hidden-size 4096, --num-layers 32: weights" in told
    train(f"{huge} --device h200")
    assert "device      H200, 131.32 GiB of memory: 119.90 GiB are taken" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"take 119.90 GiB for 1 rank, a100 has 37.25 GiB; choose a smaller model or"):
        train(f"{huge} --device a100")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "pretrain_gpt.py"), *words], capture_output=True, text=True)


def test_the_process_says_each_mistake_once_and_exits_with_2() -> None:
    done = run(*f"{TINY} --hidden-size 65 --min-lr 1 --micro-batch-size 3 --global-batch-size 4".split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: --hidden-size 65: cannot be shared by --num-attention-heads 4; write 64 or 68, or give --kv-channels.",
        "error: --global-batch-size 4: must be a multiple of --micro-batch-size 3 x data-parallel 1; write 3 or 6.",
        "error: --min-lr 1: is above --lr 0.01; write at most 0.01."]


def test_check_prints_the_plan_and_trains_nothing(tmp_path: Path) -> None:
    done = run(*f"{TINY} --check --save {tmp_path / 'ck'} --log-dir {tmp_path / 'log'}".split())
    assert done.returncode == 0 and "108,096 parameters" in done.stdout and not list(tmp_path.iterdir())


def test_help_is_grouped_with_defaults() -> None:
    text = run("--help").stdout
    assert all(f"{group}:" in text for group in ("Parallelism", "Model", "Training", "Optimizer and learning rate", "Precision", "Checkpoints"))
    assert "(default: 0.999)" in text and "--tp RANKS" in text


def test_flat_values_make_the_same_settings_again() -> None:
    c = from_command_line("--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --lr 1 --data-path 0.3 a 0.7 b --train-iters 1".split())
    assert build(Config, flatten(c)) == c
