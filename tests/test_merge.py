"""Checkpoints made one, compared and exported: the same bytes whatever layout they come from, and nothing half done."""

import json
import os
import re
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import byte_dataset, resolved, tool, train
from test_layouts import plan_of, rank_of, save, save_runs, slices, state

from megazero.base.errors import UserError
from megazero.hf.convert import export_folder
from megazero.plan.progress import Progress, loss_scale
from megazero.run.ahead import place
from megazero.run.generate import build_from_checkpoint, logits
from megazero.state import compare
from megazero.state.checkpoint import Reader, find
from megazero.state.compare import runs
from megazero.state.merge import merge
from megazero.state.record import restore
from megazero.state.tensor_files import Stored

SHARDED = ["tp2-pp2-dp2-zero1", "pp2-dp2-zero3", "tp2-dp2-zero3-joined"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One state by several layouts."""
    root = tmp_path_factory.mktemp("saved")
    for name in ("one", *SHARDED):
        save(root / name, plan_of(name, "tied"), "tied")
    return {name: root / name for name in ("one", *SHARDED)}


def data_of(folder: Path) -> bytes:
    return (find(folder, None) / "rank-00000.safetensors").read_bytes()


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_merged_checkpoint_is_one_file_whatever_it_was(optimizer: bool, saved: dict[str, Path], tmp_path: Path) -> None:
    """Equal to the byte for every layout, whole to a stock library, and it loads like any other."""
    for name, folder in saved.items():
        merge(Reader(folder), tmp_path / name, optimizer)
        assert data_of(tmp_path / name) == data_of(tmp_path / "one"), name
    stock, wanted = load_file(find(tmp_path / "one", None) / "rank-00000.safetensors"), state("tied")
    assert stock.keys() == {f"{kind}/{name}" for kind, name in wanted if optimizer or kind == "weight"}
    assert all(torch.equal(tensor, wanted[tuple(key.split("/"))]) for key, tensor in stock.items())
    assert Reader(tmp_path / "one").verify() == sum(t.nbytes for t in stock.values())
    run, reader = rank_of(plan_of("tp4", "tied", "" if optimizer else f"--load {tmp_path} --finetune"), 3), Reader(tmp_path / "one")
    restore(reader, run.units.values(), run.updater.state if optimizer else {})
    assert place(run.config, reader).step == (3 if optimizer else 0)
    assert all(torch.equal(s.tensor, wanted[s.kind, s.name][s.box.slices]) for s in slices(run) if optimizer or s.kind == "weight")


def test_one_tensor_at_a_time(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a merged file is written, no two logical tensors are alive."""
    alive: list[Any] = []
    plain = Reader.read

    def read(reader: Reader, *key: Any) -> torch.Tensor:
        assert not [r for r in alive if r() is not None], "the tensor before is still held"
        tensor = plain(reader, *key)
        alive[:] = [weakref.ref(tensor)]
        return tensor

    monkeypatch.setattr(Reader, "read", read)
    merge(Reader(saved["pp2-dp2-zero3"]), tmp_path / "out", True)
    export_folder(initial(f"{SIZES} {EXPORTED['llama']} --pp 2", 2, tmp_path / "llama"), tmp_path / "hf")


EXPORTED = {"gpt2": "--openai-gelu", "llama": "--swiglu --normalization RMSNorm --position-embedding-type rope --num-query-groups 2 "
            "--disable-bias-linear --untie-embeddings-and-output-weights"}
SIZES = ("--num-layers 4 --hidden-size 48 --num-attention-heads 4 --seq-length 24 --vocab-size 101 --lr 1e-3 --mock-data --train-iters 1 --eval-iters 0 "
         "--global-batch-size 4 --init-method-std 0.1")


@pytest.mark.parametrize("shape", EXPORTED)
def test_an_export_is_the_same_from_every_layout(shape: str, tmp_path: Path) -> None:
    """Every file, byte for byte, from tp 2 x pp 2 x dp 2 with ZeRO-3 and from others, as from one rank; transformers has its logits."""
    transformers = pytest.importorskip("transformers")
    words = f"{SIZES} {EXPORTED[shape]}"
    for name, (world, layout) in {"one": (1, ""), "zero3": (8, "--tp 2 --pp 2 --zero-stage 3"), "pp": (4, "--pp 4")}.items():
        initial(f"{words} {layout}", world, tmp_path / name)
        export_folder(Reader(tmp_path / name), tmp_path / f"hf-{name}")
        assert contents(tmp_path / f"hf-{name}") == contents(tmp_path / "hf-one"), name
    merge(Reader(tmp_path / "pp"), tmp_path / "merged")
    export_folder(Reader(tmp_path / "merged"), tmp_path / "hf-merged")
    assert contents(tmp_path / "hf-merged") == contents(tmp_path / "hf-one")
    model, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf-zero3"), torch.arange(48).view(2, 24)
    with torch.no_grad():
        theirs = model(tokens, labels=tokens)
    ours = logits(build_from_checkpoint(Reader(tmp_path / "zero3")), tokens)
    assert (ours - theirs.logits).abs().max() <= 1e-5 * theirs.logits.abs().max()
    loss = torch.nn.functional.cross_entropy(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(theirs.loss), rel=1e-5)


def initial(words: str, world: int, folder: Path) -> Reader:
    """A checkpoint of the first weights."""
    runs = [rank_of(resolved(words, world), rank) for rank in range(world)]
    for run in runs:
        run.initialise()
    save_runs(folder, runs, Progress(loss_scale(runs[0].config)))
    return Reader(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(phase: str) -> None:
    """From now on this process kills itself there."""
    if phase == "read":
        plain, count = Stored.rows, [0]

        def rows(*arguments: Any) -> torch.Tensor:
            count[0] += 1
            return plain(*arguments) if count[0] < 9 else die()  # type: ignore[return-value, func-returns-value]
        Stored.rows = rows  # type: ignore[method-assign]
    elif phase == "fsync":
        os.fsync = die
    else:
        Path.rename = die  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("phase", ["read", "fsync", "rename"])
@pytest.mark.parametrize("what", [merge, export_folder])
def test_killed_at_any_moment_nothing_has_its_name(what: Any, phase: str, tmp_path: Path) -> None:
    reader, out = initial(f"{SIZES} {EXPORTED['llama']}", 1, tmp_path / "in" / "one"), tmp_path / "out"
    child = os.fork()
    if child == 0:
        try:
            dies_in(phase)
            what(reader, out)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not out.exists() and re.fullmatch("in out.draft-[0-9a-f]{8}", " ".join(sorted(p.name for p in tmp_path.iterdir())))
    what(reader, out)
    assert out.is_dir()


def test_damage_ends_a_merge_with_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    save(tmp_path / "in", plan_of("tp2", "tied"), "tied")
    path = find(tmp_path / "in", None) / "rank-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(UserError, match="rank-00001.safetensors: the bytes of .* are damaged"):
        merge(Reader(tmp_path / "in"), tmp_path / "out", True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


# ---- comparing

def changed(reader: Reader, output: Path, kind: str, name: str, values: dict[tuple[int, ...], float]) -> Path:
    """A merged copy with some elements changed."""
    plain = Reader.read

    def read(self: Reader, *key: Any) -> torch.Tensor:
        tensor = plain(self, *key)
        for at, value in values.items() if key == (kind, name) else ():
            tensor[at] = value
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", read)
        merge(reader, output, True)
    return output


def test_the_first_and_the_largest_difference_of_checkpoints_are_named(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, name = Reader(saved["one"]), "layers.2.attention.o.weight"
    for other in SHARDED:
        assert not list(compare.checkpoints(one, Reader(saved[other]))), other
    weight = one.read("weight", name)
    largest = float(weight.abs().max())
    bent = changed(one, tmp_path / "bent", "weight", name, {(3, 5): float(weight[3, 5]) + 1e-6 * largest, (7, 1): float(weight[7, 1]) - 2e-6 * largest})
    (found,) = compare.checkpoints(Reader(saved["pp2-dp2-zero3"]), Reader(bent))
    assert found.where == f"weight/{name} [3, 5]" and found.a == float(weight[3, 5]) and found.far == pytest.approx(2e-6, rel=1e-6)
    assert "2 of 1,536 elements" in str(found)
    assert not list(compare.checkpoints(one, Reader(bent), tolerance=3e-6))
    nan = Reader(changed(one, tmp_path / "nan", "exp_avg", name, {(0, 0): float("nan")}))
    assert not list(compare.checkpoints(nan, nan)) and [d.far for d in compare.checkpoints(one, nan)] == [float("inf")]

    def call(tool_name: str, *words: Any) -> tuple[int, str, str]:
        return tool(monkeypatch, capsys, tool_name, *words)

    for words in (("checkpoint.py", "diff"), ("compare_runs.py",)):
        code, told, _ = call(*words, saved["one"], bent)
        assert code == 1 and told.startswith(f"first difference   weight/{name} [3, 5]: "), told
        code, told, _ = call(*words, saved["one"], bent, "--tolerance", "1e-5")
        assert code == 0 and len(told.splitlines()) == 1
    merge(one, tmp_path / "weights")
    code, told, _ = call("checkpoint.py", "diff", saved["one"], tmp_path / "weights")
    assert code == 0 and "hold the same" in told, "the weights of both; one has no optimizer to compare"
    merge(Reader(bent), tmp_path / "bent-weights")
    assert call("checkpoint.py", "diff", tmp_path / "bent-weights", saved["one"])[0] == 1


def test_rounding_of_a_bias_on_k_is_not_the_largest_difference(tmp_path: Path) -> None:
    """Two orders of the same sums. Next to itself that bias is all wrong, beside q and v it is nothing; bent for real, it is the largest."""
    words = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 24 --vocab-size 101 --lr 1e-2 --mock-data --train-iters 4 "
             "--eval-iters 0 --dtype fp64 --global-batch-size 8")
    for size in (8, 2):
        train(f"{words} --micro-batch-size {size} --save {tmp_path / str(size)}")
    one, two = (Reader(tmp_path / str(size)) for size in (8, 2))
    found = list(compare.checkpoints(one, two))
    noise = [d for d in found if ".k.bias" in d.where]
    assert len(noise) == 6 and all(d.rounding and "which rounding explains" in str(d) for d in noise)
    assert all(d.far < 1e-9 for d in found) and not any(".k.bias" in line for line in compare.summary(found))
    assert not list(compare.checkpoints(one, two, tolerance=1e-9))
    name = "layers.1.attention.k.bias"
    q = float(one.read("weight", "layers.1.attention.q.bias").abs().max())
    bent = Reader(changed(two, tmp_path / "bent", "weight", name, {(3,): q / 10}))
    worst = max(compare.checkpoints(one, bent), key=lambda d: (not d.rounding, d.far))
    assert worst.where.startswith(f"weight/{name}") and not worst.rounding and 0.001 < worst.far <= 0.1
    assert [d.where for d in compare.checkpoints(one, bent, tolerance=1e-9)] == [f"weight/{name} [3]"]


def test_the_first_difference_of_logs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{SIZES} --data-path {byte_dataset(tmp_path)} --tokenizer-type ByteTokenizer --split 50,50,0 --eval-interval 2 --eval-iters 1".replace(
        "--mock-data --train-iters 1 --eval-iters 0", "--train-iters 5").replace("--vocab-size 101", "")
    for name, more in (("a", ""), ("b", "--micro-batch-size 4 --dtype fp32"), ("c", "--seed 9")):
        train(f"{words} {more}", tmp_path / name)

    def call(*more: Any) -> tuple[int, str, str]:
        return tool(monkeypatch, capsys, "compare_runs.py", *more)

    assert call(tmp_path / "a", tmp_path / "a" / "metrics.jsonl")[0] == 0
    assert call(tmp_path / "a", tmp_path / "b", "--tolerance", "1e-4")[0] == 0, "another order of sums"
    code, told, _ = call(tmp_path / "a", tmp_path / "c", "--tolerance", "1e-4")
    assert code == 1 and told.startswith("first difference   step 1 train loss: ") and told.endswith(" differences\n")
    log = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join([*log[:-1], log[-1][:20]]))
    code, told, _ = call(tmp_path / "short.jsonl", tmp_path / "a")
    assert code == 1 and "first difference   step 5 valid: not there against there" in told and "1 difference" in told


def test_what_the_tools_cannot_do_is_said(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, here = saved["one"], tmp_path / "here"
    here.mkdir()
    (here / "kept").write_text("")
    (tmp_path / "step.jsonl").write_text('{"step": "x"}\n{"step": 1}\n')
    (tmp_path / "twice.jsonl").write_text('{"step": 1, "loss": 1, "loss": 2}\n{"step": 2}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + '\n{"step": 2}\n')
    (tmp_path / "odd.jsonl").write_text('{"step": 1, "\\u001b[2J": NaN, "b": "\\u001b[2J"}\n')
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    (tmp_path / "empty.jsonl").write_text("")
    merge(Reader(one), tmp_path / "weights")
    for words, sentence in {
        ("checkpoint.py", "merge", "--load", one): "--output is missing: new folder to write.",
        ("checkpoint.py", "merge", "--load", one, "--output", here): f"--output {here}: is there already and not empty; name a new folder.",
        ("checkpoint.py", "merge", "--load", one, "--output", "/proc/x"): "--output /proc/x: cannot be written (No such file or directory).",
        ("checkpoint.py", "merge", "--load", one, "--output", here / "kept" / "x"): "cannot be written (Not a directory)",
        ("checkpoint.py", "merge", "--load", here, "--output", tmp_path / "x"): f"--load {here}: holds no complete checkpoint.",
        ("checkpoint.py", "merge", "--load", one, "--ckpt-step", 4, "--output", tmp_path / "x"): "--ckpt-step 4: ",
        ("checkpoint.py", "merge", "--load", tmp_path / "weights", "--output", tmp_path / "x", "--optimizer"): "holds weights alone; leave it out.",
        ("checkpoint.py", "diff", one): "--b is missing: the other.",
        ("checkpoint.py", "diff", one, tmp_path / "no"): f"--b {tmp_path / 'no'}: there is no such folder.",
        ("checkpoint.py", "diff", one, one, one): "belongs to no flag; see --help.",
        ("checkpoint.py", "diff", one, one, "--tolerance", "-1"): "--tolerance -1: must be 0 or greater.",
        ("checkpoint.py", "merg"): "did you mean merge",
        ("compare_runs.py", one): "--b is missing: the other, of the same kind.",
        ("compare_runs.py", one, tmp_path / "log.jsonl"): "one is a log, the other is not; give two logs or two checkpoints.",
        ("compare_runs.py", tmp_path / "log.jsonl", tmp_path / "log.jsonl"): "log.jsonl: line 2 is damaged; each should be one step or one evaluation.",
        ("compare_runs.py", tmp_path / "step.jsonl", tmp_path / "log.jsonl"): "step.jsonl: line 1 is damaged",
        ("compare_runs.py", tmp_path / "twice.jsonl", tmp_path / "log.jsonl"): "twice.jsonl: line 1 is damaged",
        ("compare_runs.py", tmp_path / "deep.jsonl", tmp_path / "log.jsonl"): "deep.jsonl: line 1 is damaged",
        ("compare_runs.py", tmp_path / "empty.jsonl", tmp_path / "log.jsonl"): "empty.jsonl: holds no step; give the metrics.jsonl of a run.",
        ("compare_runs.py", here, one): f"--a {here}: holds no complete checkpoint.",
        ("compare_runs.py", tmp_path / "none", one): f"--a {tmp_path / 'none'}: there is no such folder.",
        ("compare_runs.py", one, one, "--tolerance", "nan"): "--tolerance nan: must be 0 or greater.",
    }.items():
        code, _, told = tool(monkeypatch, capsys, *words)
        assert code == 2 and len(told.splitlines()) == 1 and told.startswith("error: ") and sentence in told, (words, told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep.jsonl", "empty.jsonl", "here", "log.jsonl", "odd.jsonl", "step.jsonl", "twice.jsonl", "weights"]
    (tmp_path / "plain.jsonl").write_text('{"step": 1, "\\u001b[2J": 1, "b": "text"}\n')
    code, told, _ = tool(monkeypatch, capsys, "compare_runs.py", tmp_path / "odd.jsonl", tmp_path / "plain.jsonl")
    assert code == 1 and all(line.isprintable() for line in told.splitlines()) and r"\x1b[2J: nan against 1" in told


def test_a_log_of_numbers_that_none_could_be_is_damaged(tmp_path: Path) -> None:
    for name, loss in (("a", "1.5"), ("b", "1" + "0" * 400)):
        (tmp_path / name).write_text(f'{{"step": 1, "loss": {loss}, "why": "\u2028"}}\n{{"step": 2, "loss": 1.0}}\n')
    assert [*runs(tmp_path / "a", tmp_path / "a")] == []
    with pytest.raises(UserError, match="b: line 1 is damaged"):
        list(runs(tmp_path / "a", tmp_path / "b"))


def test_a_plot_of_losses_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--log-dir", tmp_path, "--width", 2, "--height", 2)
    for losses, said in (
            (("NaN", "3.0", "Infinity", "1e308", "1.0"), "3.000 |o\n  1.000 | o\n        +--\n         step 2 to 5\nlosses left out, no finite numbers or beyond 1e+100: 3\n"),
            (("2.0", "1.0"), "2.000 |o\n  1.000 | o\n        +--\n         step 1 to 2\n\n"),
            (('"x"',), "metrics.jsonl: the loss of step 1 (train) is 'x', not a number; repair or remove that line."),
            (("null",), "is None, not a number"), (("[1]",), "is [1], not a number"), (("true",), "is True, not a number"),
            (("1" + "0" * 400, "1.0"), "metrics.jsonl: line 1 is damaged"), (("NaN",), "holds no training step with a finite loss")):
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {loss}}}\n' for i, loss in enumerate(losses, 1)))
        code, out, err = tool(monkeypatch, capsys, "plot_loss.py", *words)
        assert said in out + err and (code in (0, None)) == (said in out), (losses, code, out, err)


def test_a_run_that_went_on_is_compared_where_both_have_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a", {1: 5.0, 2: 4.0, 3: float("nan"), 4: 2.0}), ("b", {3: 3.0, 4: 2.5, 5: 1.0})):
        (tmp_path / name).write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in steps.items()))
    code, told, _ = tool(monkeypatch, capsys, "compare_runs.py", tmp_path / "a", tmp_path / "b")
    assert code == 1 and [line.strip() for line in told.splitlines()] == [
        "first difference   step 3 train loss: nan against 3.0", "then, the largest  step 4 train loss: 2.0 against 2.5, 0.2 of the larger",
        "step 1 train: there against not there", "step 2 train: there against not there", "step 5 train: not there against there", "5 differences"]


def test_importers_say_whose_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train("--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --mock-data --vocab-size 16 --lr 1e-3 --eval-iters 0 "
          f"--train-iters 1 --save {tmp_path / 'ours'}")
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "ckpt.pt").write_bytes(b"")
    for name, folder, words in (
        ("convert_hf.py", "ours", "is a checkpoint of this program already; train on with --load"),
        ("convert_checkpoint.py", "ours", "is a checkpoint of this program already; train on with --load"),
        ("convert_checkpoint.py", "ours/step-00000001", "is a checkpoint of this program already; train on with --load"),
        ("convert_hf.py", "nano", "is a checkpoint of nanoGPT; import it first: python tools/convert_checkpoint.py import")):
        code, _, error = tool(monkeypatch, capsys, name, "import", "--input", tmp_path / folder, "--output", tmp_path / "out")
        assert code == 2 and words in error and len(error.splitlines()) == 1, (name, folder, error)
