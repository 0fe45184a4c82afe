"""Stopped and resumed equals never stopped, to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import _free_port
from support import ROOT, byte_dataset, lines, tool, train

from megazero.base.errors import UserError
from megazero.run import loop
from megazero.run.launch import launch
from megazero.run.loop import Wish
from megazero.settings.config import Training, from_command_line
from megazero.state import saving
from megazero.state.checkpoint import Reader, complete

WORDS = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 5e-3 "
         "--lr-warmup-iters 3 --lr-decay-style cosine --train-iters 12 --tokenizer-type ByteTokenizer --eval-interval 4 --eval-iters 2 "
         "--hidden-dropout 0.1 --log-interval 4 --split 80,20,0")
EXACT = ("step", "loss", "grad_norm", "lr", "loss_scale", "skipped", "samples", "tokens", "split")


def exact(log: Path) -> list[dict[str, object]]:
    """What must be equal: all but times and memory."""
    return [{k: v for k, v in line.items() if k in EXACT} for line in lines(log)]


def same(a: Path, b: Path) -> None:
    one, two = Reader(a), Reader(b)
    assert one.index["progress"] == two.index["progress"]
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_five_interruptions(dtype: str, tmp_path: Path) -> None:
    words = f"{WORDS} --dtype {dtype} --data-path {byte_dataset(tmp_path)}"
    train(f"{words} --save {tmp_path / 'whole'}", tmp_path / "log")
    parts = f"{words} --save {tmp_path / 'parts'} --load {tmp_path / 'parts'}"
    for stop in (1, 3, 4, 7, 11):
        train(f"{parts} --exit-interval {stop}", tmp_path / "log2")
        assert complete(tmp_path / "parts")[-1][0] == stop
    train(parts, tmp_path / "log2")
    same(tmp_path / "whole", tmp_path / "parts")
    assert exact(tmp_path / "log") == exact(tmp_path / "log2")


def test_a_killed_run_forgets_what_it_had_not_saved(tmp_path: Path) -> None:
    """Its log goes on from the checkpoint, as if the lost steps had never been."""
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
    train(words + " --save-interval 5 --exit-interval 8", tmp_path / "log")
    newest = complete(tmp_path / "ck")[-1][1]
    (newest / "index.json").unlink()                            # as if killed before step 8 was saved
    with (tmp_path / "log" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e999}\n{"step": [1]}\n' + "[" * 100_000 + '\n{"step": 9, "loss": 1.2')      # the last torn by the kill
    train(words, tmp_path / "log")
    train(words.replace("ck", "whole"), tmp_path / "log2")
    same(tmp_path / "whole", tmp_path / "ck")
    assert exact(tmp_path / "log") == exact(tmp_path / "log2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_ends_at_a_step(number: signal.Signals, tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'} --log-dir {tmp_path / 'log'} --exit-signal-handler"
    endless = words.replace("--train-iters 12", "--train-iters 100000 --lr-decay-iters 12").split()
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *endless], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(60) == 0 and f"signal {number.name}" in rest
    (step, _), = complete(tmp_path / "ck")
    assert step >= 4 and f"done at step {step}" in rest
    assert [r["step"] for r in lines(tmp_path / "log") if "split" not in r] == list(range(1, step + 1))


def test_an_interrupted_run_says_what_is_lost_in_one_line(tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'}".replace("--train-iters 12", "--train-iters 100000").split()
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout and process.stderr
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told.count("\n") == 1 and told.startswith("interrupted: what came after the last checkpoint is lost")


def test_exit_duration(tmp_path: Path) -> None:
    start = time.time()
    words = WORDS.replace("--train-iters 12", "--train-iters 1000000 --lr-decay-iters 12")
    train(f"{words} --data-path {byte_dataset(tmp_path)} --exit-duration-in-mins 0.03 --save {tmp_path / 'ck'}", tmp_path / "log")
    assert 1.5 < time.time() - start < 30 and len(complete(tmp_path / "ck")) == 1


def test_a_fresh_run_keeps_an_older_log_aside(tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}"
    train(words + " --exit-interval 4", tmp_path)
    train(words + " --exit-interval 3", tmp_path)
    assert len(lines(tmp_path)) == 3 and (tmp_path / "metrics-1.jsonl").exists()


def test_sigterm_alone_says_a_line(tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}".replace("--train-iters 12", "--train-iters 100000 --lr-decay-iters 12").split()
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout and process.stderr
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert process.stderr.read() == ("terminated (SIGTERM): what came after the last checkpoint is lost; --exit-signal-handler saves before it stops\n")
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_before_training_a_signal_that_asks_says_a_line_too(tmp_path: Path, number: signal.Signals) -> None:
    """A rank that waits for its peer; nobody would hear the wish."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain_gpt.py"), *f"{WORDS} --data-path {byte_dataset(tmp_path)} --exit-signal-handler".split()],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ranks | {"OMP_NUM_THREADS": "1"})
    assert process.stdout
    for line in process.stdout:
        if line.startswith("waiting for 1 of 2 ranks"):
            break
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"terminated ({number.name}): what came after the last checkpoint, if anything did, is lost\n" in told and "Traceback" not in told


def test_who_runs_the_program_in_a_process_of_his_own_keeps_his_signals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(SystemExit):
            launch(lambda: from_command_line(["--num-layers", "0"]))
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and "--num-layers 0: must be greater than 0" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_that_ask_are_heard_while_a_wish_lasts() -> None:
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        wish, before = Wish(Training(exit_signal_handler=True)), signal.getsignal(getattr(signal, name))
        with wish:
            assert not wish.reason()
            for _ in range(3):                                  # torchrun hands on what its ranks were sent too
                signal.raise_signal(getattr(signal, name))
            assert wish.reason() == f"signal {name}"
        assert signal.getsignal(getattr(signal, name)) == before


def test_the_same_signal_later_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(loop, "GRACE", 0.0)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with Wish(Training(exit_signal_handler=True)):
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_a_screen_that_cannot_be_written_does_not_end_a_run(tmp_path: Path) -> None:
    """A terminal that was closed, a full disk under a log, `| head`."""
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'}".split()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "pretrain_gpt.py"), *words], stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and len(complete(tmp_path / "ck")) == 1, done.stderr
    assert done.stderr == "warning: the screen cannot be written (No space left on device); nothing more is shown there\n"


def test_evaluating_an_older_step_leaves_log_and_checkpoints_as_they_are(tmp_path: Path) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
    train(f"{words} --save-interval 4", tmp_path / "log")
    before, log = sorted((tmp_path / "ck").rglob("*")), lines(tmp_path / "log")
    told = train(f"{words} --save-interval 4 --skip-train --ckpt-step 4", tmp_path / "log")
    assert sorted((tmp_path / "ck").rglob("*")) == before and told[:-1] == log
    assert (told[-1]["step"], told[-1]["split"], told[-1]["loss"]) == (4, "valid", next(r["loss"] for r in log if r["step"] == 4 and "split" in r))


def test_what_is_being_saved_when_data_fail_is_saved_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saving.write_file

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        plain(*arguments)

    def fails(*_: object) -> float:
        raise UserError("t.bin: was cut")

    monkeypatch.setattr(saving, "write_file", slow)
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --save {tmp_path / 'ck'} --save-interval 7 --async-save"
    monkeypatch.setattr(loop.Loop, "evaluate", lambda self, split: 0.0 if self.step.progress.step < 8 else fails())
    with pytest.raises(UserError, match="t.bin: was cut"):
        train(words)
    assert [step for step, _ in complete(tmp_path / "ck")] == [7]


def test_weights_alone_are_saved_and_gone_on_from_with_a_fresh_optimizer(tmp_path: Path) -> None:
    """Adam's first step moves each element by the rate, whatever its gradient: moments and their count of steps began afresh at step 6."""
    words = (f"{WORDS} --data-path {byte_dataset(tmp_path)} --lr-decay-style constant --lr-warmup-iters 0 --weight-decay 0 --adam-eps 1e-30 "
             f"--clip-grad 0 --hidden-dropout 0 --save {tmp_path / 'ck'}")
    train(f"{words} --train-iters 6 --no-save-optim")
    before = Reader(tmp_path / "ck")
    assert before.kinds == {"weight"} and before.index["optimizer"] is None
    with pytest.raises(UserError, match=r"has no exp_avg and no exp_avg_sq \(it was saved without an optimizer\); add --no-load-optim to go on"):
        train(f"{words} --load {tmp_path / 'ck'}")
    steps = train(f"{words} --load {tmp_path / 'ck'} --no-load-optim --exit-interval 7", tmp_path / "log")
    after = Reader(tmp_path / "ck")
    assert steps[0]["step"] == 7 and steps[0]["samples"] == 28 and after.index["progress"]["unseen"] == 6
    name = "layers.0.mlp.up.weight"
    moved = (after.read("weight", name) - before.read("weight", name)).abs()
    assert torch.allclose(moved, torch.full_like(moved, 5e-3), rtol=1e-3)
    train(f"{words} --load {tmp_path / 'ck'} --exit-interval 9")                # and goes on with what it saved then
    train(f"{words} --load {tmp_path / 'ck'} --ckpt-step 7 --save {tmp_path / 'once'} --exit-interval 9")
    same(tmp_path / "ck", tmp_path / "once")


def test_another_optimizer_keeps_the_weights_and_says_that_its_moments_begin_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lion's first step moves each element by the rate too; the run's place on its curve and in its data stays."""
    words = (f"{WORDS} --data-path {byte_dataset(tmp_path)} --lr-decay-style constant --lr-warmup-iters 0 --weight-decay 0 --clip-grad 0 "
             f"--hidden-dropout 0 --save {tmp_path / 'ck'}")
    train(f"{words} --train-iters 6")
    before = Reader(tmp_path / "ck")
    steps = train(f"{words} --load {tmp_path / 'ck'} --optimizer lion --exit-interval 7", tmp_path / "log")
    after = Reader(tmp_path / "ck")
    assert "moments begin afresh: it was saved with --optimizer adam, this is lion" in capsys.readouterr().out
    assert steps[0]["step"] == 7 and steps[0]["samples"] == 28 and after.index["progress"]["unseen"] == 6 and after.kinds == {"weight", "exp_avg"}
    name = "layers.0.mlp.up.weight"
    moved = (after.read("weight", name) - before.read("weight", name)).abs()
    assert torch.allclose(moved, torch.full_like(moved, 5e-3), rtol=1e-3)


def test_a_run_begins_with_pretrained_weights_until_it_has_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)}"
    train(f"{words} --train-iters 3 --save {tmp_path / 'base'}")
    own = f"{words} --pretrained-checkpoint {tmp_path / 'base'} --save {tmp_path / 'ck'} --load {tmp_path / 'ck'}"
    with pytest.raises(UserError, match="--exit-on-missing-checkpoint: --load .*ck holds no checkpoint; name the folder of one."):
        train(f"{own} --exit-on-missing-checkpoint")
    first = train(f"{own} --exit-interval 2", tmp_path / "log")
    capsys.readouterr()
    tuned = train(f"{words} --load {tmp_path / 'base'} --finetune --save {tmp_path / 'tuned'} --exit-interval 2", tmp_path / "log2")
    assert [line["loss"] for line in first] == [line["loss"] for line in tuned] and first[0]["step"] == 1
    second = train(f"{own} --exit-on-missing-checkpoint --exit-interval 3", tmp_path / "log3")
    assert [line["step"] for line in second] == [3]


def test_the_model_may_be_as_the_checkpoint_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{WORDS} --data-path {byte_dataset(tmp_path)} --lr-warmup-iters 0"
    train(f"{words} --swiglu --num-query-groups 2 --train-iters 1 --save {tmp_path / 'ck'}")
    other = words.replace("--hidden-size 64", "--hidden-size 128").replace("--num-layers 2", "--num-layers 3")
    with pytest.raises(UserError, match="--hidden-size 64 .now --hidden-size 128"):
        train(f"{other} --load {tmp_path / 'ck'} --train-iters 2")
    capsys.readouterr()
    train(f"{other} --load {tmp_path / 'ck'} --use-checkpoint-args --train-iters 2")
    assert "2 layers x 64, 4 heads x 16 over 2 kv heads, ffn 128 SwiGLU" in capsys.readouterr().out
    with pytest.raises(UserError, match="--use-checkpoint-args: needs --load, the folder of the checkpoint."):
        train(f"{other} --use-checkpoint-args")


def test_the_checkpoint_brings_its_tokenizer_and_flags_keep_what_changes_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.json").write_text(json.dumps([*"abcdef "]))
    (tmp_path / "a.jsonl").write_text('{"text": "abc def"}\n' * 60)
    data = f"--data-path {tmp_path / 'd_text_document'} --seq-length 16 --micro-batch-size 1 --eval-iters 0 --lr 1e-3"
    kept = f"--tokenizer-type CharTokenizer --tokenizer-model {tmp_path / 'letters.json'}"
    words = f"--input {tmp_path / 'a.jsonl'} --output-prefix {tmp_path / 'd'} {kept} --no-append-eod"
    assert tool(monkeypatch, capsys, "preprocess_data.py", *words.split())[0] == 0
    train(f"{data} {kept} --num-layers 1 --hidden-size 16 --num-attention-heads 2 --position-embedding-type rope --train-iters 1 --save {tmp_path / 'ck'}")
    capsys.readouterr()
    (tmp_path / "letters.json").unlink()
    train(f"{data.replace('16', '8', 1)} --load {tmp_path / 'ck'} --use-checkpoint-args --hidden-dropout 0.1 --train-iters 2")
    told = capsys.readouterr().out
    assert "vocabulary 7" in told and "1 samples x 8 = 8 tokens" in told and "dropout     0.1 on embeddings" in told
