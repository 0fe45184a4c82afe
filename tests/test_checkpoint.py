"""Saving, loading, and everything that can go wrong between."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import TINY, built, header, kept, load, named, train

from megazero.base.errors import UserError
from megazero.plan.layout import Box
from megazero.plan.progress import Progress, loss_scale
from megazero.run.executor import Executor
from megazero.settings.config import Config
from megazero.state import checkpoint, saving, tensor_files
from megazero.state.checkpoint import INDEX, Reader, complete, find, owned
from megazero.state.saving import Writer, write
from megazero.state.tensor_files import Planned, contents, header_of, stream
from megazero.units.rules import Updater


def saved(tmp_path: Path, words: str = "") -> Path:
    """A checkpoint of step 3, with moments."""
    train(f"{TINY} --save {tmp_path} {words}".replace("--train-iters 5", "--train-iters 3"))
    return find(tmp_path, None)


def test_what_is_saved_is_what_was_there(tmp_path: Path) -> None:
    run = built(f"{TINY} --bf16")
    for state in run.updater.state.values():
        for moment in state.values():
            moment.tensor.normal_()
    for unit in run.units.values():                             # what lies between the parameters is zero, and not saved
        between = torch.ones(unit.flat.size, dtype=torch.bool)
        for piece in unit.flat.pieces:
            between[piece.start:piece.stop] = False
        for moment in run.updater.state[unit.flat.name].values():
            moment.tensor[between] = 0
    slices = [s for u in run.units.values() for s in owned(u.flat, u.low, kept(run, u))]
    path = Writer(tmp_path, None, False).save(slices, header(run))
    reader = Reader(tmp_path)
    assert reader.folder == path and reader.kinds == {"weight", "exp_avg", "exp_avg_sq"}
    for name, weight in named(run).items():
        assert torch.equal(reader.read("weight", name), weight) and weight.dtype == torch.float32
    other = built(f"{TINY} --bf16 --seed 99")
    load(other, reader)
    for a, b in zip(run.units.values(), other.units.values(), strict=True):
        assert torch.equal(a.master, b.master) and torch.equal(a.weights, b.weights)
        assert all(torch.equal(kept(run, a)[k], kept(other, b)[k]) for k in kept(run, a))


def test_any_box_can_be_read_and_a_stock_library_reads_the_file(tmp_path: Path) -> None:
    reader = Reader(saved(tmp_path))
    whole, rng = reader.read("weight", "layers.0.attention.q.weight"), random.Random(1)
    for _ in range(20):
        offset = (rng.randrange(64), rng.randrange(64))
        box = Box(offset, (rng.randint(1, 64 - offset[0]), rng.randint(1, 64 - offset[1])))
        assert torch.equal(reader.read("weight", "layers.0.attention.q.weight", box), whole[box.slices])
    with safe_open(reader.folder / "rank-00000.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight/layers.0.attention.q.weight"), whole)


def test_slices_of_several_ranks_make_one_tensor(tmp_path: Path) -> None:
    """A tensor that was written in pieces, as sharded ranks do, is read whole."""
    whole = torch.randn(10, 6)
    pieces = [checkpoint.Slice("weight", "w", (10, 6), Box(o, s), whole[Box(o, s).slices].contiguous())
              for o, s in (((0, 0), (4, 6)), ((4, 0), (1, 2)), ((4, 2), (1, 4)), ((5, 0), (5, 6)))]
    words = header(built(f"{TINY} --num-layers 1".replace("--num-layers 2 ", "")))
    write(tmp_path / "step-00000000", pieces, words)
    reader = Reader(tmp_path)
    assert torch.equal(reader.read("weight", "w"), whole)
    assert torch.equal(reader.read("weight", "w", Box((3, 1), (3, 4))), whole[3:6, 1:5])
    for number, (wrong, said) in enumerate((
            (pieces[:-1], "holds 30 of 60 elements of weight/w"), ([*pieces, moved(pieces[0], (6, 0))], "holds 84 of 60 elements of weight/w"),
            ([moved(pieces[0], (6, 0)), *pieces[1:]], "holds elements of weight/w twice"))):
        write(tmp_path / f"step-00000000.{number + 1}", wrong, words)
        with pytest.raises(UserError, match=f"step-00000000.{number + 1}: {said}; load another with --ckpt-step 0"):
            Reader(tmp_path)


def moved(piece: checkpoint.Slice, offset: tuple[int, ...]) -> checkpoint.Slice:
    return replace(piece, box=Box(offset, piece.box.size))


def at(step: int) -> Progress:
    return Progress(loss_scale(Config()), step, step)


def test_keep_last_and_saving_a_step_again(tmp_path: Path) -> None:
    train(f"{TINY} --save {tmp_path} --save-interval 1 --keep-last 2")
    assert [s for s, _ in complete(tmp_path)] == [4, 5]
    run = built(f"{TINY} --seed 7")
    slices = [s for u in run.units.values() for s in owned(u.flat, u.low, kept(run, u))]
    Writer(tmp_path, None, False).save(slices, header(run, at(5)))
    assert [p.name for _, p in complete(tmp_path)] == ["step-00000004", "step-00000005.1"], "the same step again goes beside, then replaces"
    assert Reader(tmp_path).index["config"]["seed"] == 7
    Writer(tmp_path, None, False).save(slices, header(run, at(5)) | {"third": True})
    assert Reader(tmp_path).index["third"] and [s for s, _ in complete(tmp_path)] == [4, 5], "the last saved counts, however often"
    Writer(tmp_path, 1, False).save(slices, header(run, at(2)))
    assert [step for step, _ in complete(tmp_path)] == [2, 5], "what was just saved stays"


def test_keep_last_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    theirs, folder = saved(tmp_path / "theirs"), tmp_path / "ours"
    folder.mkdir()
    (folder / theirs.name).symlink_to(theirs)
    shutil.copytree(theirs, folder / f"{theirs.name}.1")
    saving.prune(folder, 1)
    assert (theirs / INDEX).exists() and [p.name for p in folder.iterdir()] == [f"{theirs.name}.1"]


def test_a_run_does_not_start_before_checkpoints_that_are_there(tmp_path: Path) -> None:
    """Neither overwriting a branch nor losing one's own work to --keep-last."""
    train(f"{TINY} --save {tmp_path} --save-interval 1")
    for words in (f"--load {find(tmp_path, 3)}", f"--load {tmp_path} --finetune", f"--load {tmp_path} --finetune --ckpt-step 3", ""):
        with pytest.raises(UserError, match="holds a checkpoint of step 5, beyond step [03] where this run begins; go on from it with --load"):
            train(f"{TINY} --save {tmp_path} {words}")
    assert [s for s, _ in complete(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_that_is_set_back_moves_later_checkpoints_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(f"{TINY} --save {tmp_path} --save-interval 1")
    for moved in ("after-00000003", "after-00000003.1"):
        train(f"{TINY} --save {tmp_path} --load {tmp_path} --ckpt-step 3 --exit-interval 4 --seed 7")
        assert [s for s, _ in complete(tmp_path)] == [1, 2, 3, 4] and f"set aside   {tmp_path / moved / 'step-00000004'}" in capsys.readouterr().out
    assert [s for s, _ in complete(tmp_path / "after-00000003")] == [4, 5] and Reader(tmp_path / "after-00000003").verify() > 0
    assert Reader(tmp_path).index["config"]["seed"] == 7
    train(f"{TINY} --save {tmp_path} --load {tmp_path}")
    assert [s for s, _ in complete(tmp_path)] == [1, 2, 3, 4, 5], "and goes on as ever"


def test_background_writing_saves_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(f"{TINY} --save {tmp_path / 'a'} --save-interval 1")
    train(f"{TINY} --save {tmp_path / 'b'} --save-interval 1 --async-save")
    told = capsys.readouterr().out
    assert len(re.findall(r"a/step-\d+ \(\d+\.\d s\)", told)) == len(re.findall(r"b/step-\d+ \(\d+\.\d s, the rest in the background\)", told)) == 5
    for (step, a), (_, b) in zip(complete(tmp_path / "a"), complete(tmp_path / "b"), strict=True):
        one, two = Reader(a), Reader(b)
        assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors), step


def test_a_background_writer_tells_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(saving, "stream", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); the checkpoints before it are untouched"):
        train(f"{TINY} --save {tmp_path} --save-interval 2 --async-save")
    assert complete(tmp_path) == []


def test_its_error_is_told_at_the_next_step_and_not_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = built(TINY)
    slices = [s for u in run.units.values() for s in owned(u.flat, u.low, kept(run, u))]
    monkeypatch.setattr(saving, "stream", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer = Writer(tmp_path, None, background=True)
    writer.save(slices, header(run))
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(UserError, match="No space left on device"):
        writer.look()
    writer.look()


def test_an_update_waits_for_the_copies_of_a_background_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a save and the next update somebody asks for it; gradients come meanwhile."""
    done: list[str] = []

    def noted(kind: type, name: str) -> None:
        before = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *given: (done.append(name), before(*given))[1])
    for kind, name in ((saving.Staging, "copies"), (saving.Copies, "hold"), (Updater, "update"), (Executor, "_backward")):
        noted(kind, name)
    train(f"{TINY} --save {tmp_path} --save-interval 2 --async-save".replace("--train-iters 5", "--train-iters 4"))
    order = [name for i, name in enumerate(done) if name != "_backward" or done[i - 1] != name]
    assert order == ["_backward", "update", "_backward", "update", "copies", "_backward", "hold", "update", "_backward", "hold", "update", "copies"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Of the data, the header or the index: reading everything never passes."""
    folder, rng = saved(tmp_path), random.Random(5)
    for path in (folder / "rank-00000.safetensors", folder / INDEX):
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if path.suffix == ".safetensors" else len(good)
        places = [rng.randrange(header) for _ in range(30)] + [rng.randrange(len(good)) for _ in range(20)]
        for at in places:
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            if path.suffix == ".json" and json_equal(good, bytes(bad)):
                continue                                        # a bit of white space
            path.write_bytes(bad)
            with pytest.raises(UserError) as error:
                Reader(folder).verify()
            assert path.name in str(error.value), at
        path.write_bytes(good)
    assert Reader(folder).verify() > 0


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_a_run_without_bounds_goes_on(tmp_path: Path) -> None:
    """Its configuration holds what JSON cannot say; Python does."""
    words = f"{TINY} --clip-grad inf --exit-duration-in-mins inf --save {tmp_path} --load {tmp_path}"
    train(f"{words} --exit-interval 3")
    train(words)
    assert [s for s, _ in complete(tmp_path)] == [3, 5] and Reader(tmp_path).index["config"]["clip_grad"] == float("inf")


@pytest.mark.parametrize("damage, words", [
    ("missing", "is missing"), ("short", "bytes instead of"), ("long", "bytes instead of"), ("swapped", "bytes instead of|header is damaged"),
])
def test_damaged_files_are_named_and_another_step_is_offered(damage: str, words: str, tmp_path: Path) -> None:
    train(f"{TINY} --save {tmp_path} --save-interval 3")
    path = find(tmp_path, 5) / "rank-00000.safetensors"
    other = find(tmp_path, 3) / "rank-00000.safetensors"
    {"missing": path.unlink, "short": lambda: os.truncate(path, 1000), "long": lambda: path.write_bytes(path.read_bytes() + b"0"),
     "swapped": lambda: path.write_bytes(other.read_bytes())}[damage]()
    with pytest.raises(UserError, match=f"step-00000005/rank-00000.safetensors: .*{words}.*; load another with --ckpt-step 3"):
        train(f"{TINY} --load {tmp_path}")
    train(f"{TINY} --load {tmp_path} --ckpt-step 3")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for words, told in {
        "--hidden-size 96": "--hidden-size 64 .now --hidden-size 96",
        "--num-layers 3": "--num-layers 2 .now --num-layers 3",
        "--ckpt-step 9": "--ckpt-step 9: .* holds steps 3",
        f"--load {folder} --ckpt-step 9": "--ckpt-step 9: .* is the folder of step 3 alone",
        "--vocab-size 102": "--vocab-size 101 .now --vocab-size 102",
    }.items():
        with pytest.raises(UserError, match=told):
            train(f"{TINY} --load {tmp_path} {words}")
    with pytest.raises(UserError, match="there is no such folder"):
        train(f"{TINY} --load {tmp_path / 'nowhere'}")
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        train(f"{TINY} --load {tmp_path}")
    train(f"{TINY} --load {tmp_path} --save {tmp_path}")        # where it saves: starts afresh


def test_finetune_takes_the_weights_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    train(f"{TINY} --load {folder} --finetune --optimizer sgd --save {tmp_path / 'b'}".replace("--train-iters 5", "--train-iters 0"))
    one, two = Reader(folder), Reader(tmp_path / "b")
    assert two.index["step"] == 0 and two.kinds == {"weight", "momentum_buffer"}
    assert all(torch.equal(one.read(*key), two.read(*key)) for key in one.tensors if key[0] == "weight")


def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match="--save .*: is not a folder that can be written to"):
        train(f"{TINY} --save {blocked}")


HEADER = """
import resource, sys
from pathlib import Path
from megazero.state.tensor_files import contents, header_of
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    contents(Path(sys.argv[1]), header_of(Path(sys.argv[1])))
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_header_takes_little_memory_and_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small mappings take most: thirty times their bytes."""
    words = (b'{"a":[' + b'{"a":0},' * (tensor_files.LONGEST // 8 - 2) + b"0]}").ljust(tensor_files.LONGEST)
    assert len(words) == tensor_files.LONGEST
    for name, extra in (("a", b""), ("b", b" ")):
        (tmp_path / name).write_bytes((len(words) + len(extra)).to_bytes(8, "little") + words + extra)
    told, taken = subprocess.run([sys.executable, "-c", HEADER, tmp_path / "a"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told.startswith("a is [{'a': 0}, ") and int(taken) < 700_000
    with pytest.raises(ValueError, match="its header cannot have 16,777,217 bytes"):
        header_of(tmp_path / "b")
    monkeypatch.setattr(tensor_files, "LONGEST", 200)
    plan = [Planned(f"weight {i}", (2,), torch.float32) for i in range(5)]
    stream(tmp_path / "c", plan[:2], lambda _: torch.ones(2), lambda _: {})
    assert list(contents(tmp_path / "c", header_of(tmp_path / "c"))[0]) == ["weight 0", "weight 1"]
    with pytest.raises(UserError, match=r"d: its 5 tensors need a header of [0-9]+ bytes, nobody reads more than 200; save from more ranks"):
        stream(tmp_path / "d", plan, lambda _: torch.ones(2), lambda _: {})
    assert not (tmp_path / "d").exists()
