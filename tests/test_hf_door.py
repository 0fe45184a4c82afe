"""Scripts that name DeepSpeed, under `python -m megazero.deepspeed`: transformers' Trainer and plain accelerate loops train as they do without it.

Two processes of torchrun play all cases, one after another; what each rank saw lies in a JSON file. The same without the engine is transformers' and
accelerate's own DistributedDataParallel.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from megazero import deepspeed
from megazero.base.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
Facts = dict[str, Any]
SCRIPTS = ROOT / "tests" / "scripts"
HERE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TRAINER = ("--per_device_train_batch_size 2 --learning_rate 3e-3 --logging_steps 1 --save_strategy no --report_to none --disable_tqdm true --seed 1 "
           "--dataloader_pin_memory false --max_grad_norm 1.0 --samples 128")
AUTO = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
ZERO = {"overlap_comm": True, "reduce_bucket_size": "auto", "contiguous_gradients": True, "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto"}


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {**AUTO, "zero_optimization": {"stage": stage, **ZERO}, **more}


def finished(command: list[str], code: int = 0, **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**HERE, **env})
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


def torchrun(*words: str, ranks: int = 2, door: bool = True, code: int = 0, **env: str) -> str:
    under = ["-m", "megazero.deepspeed"] if door else []
    return finished([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *under, *words], code, **env)


def under_door(*words: str, code: int = 0, **env: str) -> str:
    return finished([sys.executable, "-m", "megazero.deepspeed", *words], code, **env)


def facts_of(place: Path, name: str, ranks: int = 2) -> list[Facts]:
    return [json.loads((place / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]


# ---- the door itself

PYTHON = ["python"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node"]


@pytest.mark.parametrize("words, command", [
    ("-m my.train --x 1", "python -m my.train --x 1"),
    ("torchrun --nproc_per_node 2 train.py", "python -m torch.distributed.run --nproc_per_node 2 train.py"),
    ("accelerate launch --use_deepspeed train.py", "python -m accelerate.commands.accelerate_cli launch --use_deepspeed train.py"),
    ("--num_gpus 2 train.py --deepspeed x.json", "python -m torch.distributed.run --nproc_per_node 2 --standalone -m megazero.deepspeed --with_local_rank train.py --deepspeed x.json"),
    ("--num_gpus=4 --master_port 29501 --no_local_rank --module my.train",
     "python -m torch.distributed.run --nproc_per_node 4 --master_port 29501 -m megazero.deepspeed -m my.train"),
    ("--with_local_rank -m my.train --x 1", "python -m my.train --local_rank=3 --x 1"),
])
def test_a_command_becomes_another(words: str, command: str) -> None:
    assert deepspeed.commanded(words.split(), PYTHON, {"LOCAL_RANK": "3"}) == command.split()


def test_a_file_is_a_script_and_a_word_a_program() -> None:
    script = str(SCRIPTS / "names.py")
    assert deepspeed.commanded([script, "x"], PYTHON, {}) == ["python", script, "x"]
    assert deepspeed.commanded(["--with_local_rank", script, "x"], PYTHON, {"LOCAL_RANK": "3"}) == ["python", script, "--local_rank=3", "x"]
    assert deepspeed.commanded(["env", "x"], PYTHON, {})[0].endswith("/env")


@pytest.mark.parametrize("words, told", [
    ("nosuch.py", "nosuch.py: is no file and no program; give a script, torchrun"),
    ("--hostfile hosts train.py", "--hostfile: of DeepSpeed's launcher there are --num_gpus, .*, and then a script; on several machines start torchrun on each"),
    ("--num_gpus 2", "2: no script follows; write --num_gpus N script"),
    ("--num_gpus", "--num_gpus: of DeepSpeed's launcher there are"),
])
def test_a_command_that_is_none_is_one_sentence(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        deepspeed.commanded(words.split(), PYTHON, {})


@pytest.mark.parametrize("before, after", [(None, "{door}"), ("", "{door}"), ("/a:/b", "{door}:/a:/b"), ("/a:{door}", "{door}:/a")])
def test_the_door_stands_first_on_the_path(before: str | None, after: str) -> None:
    env: Mapping[str, str] = {"A": "1"} if before is None else {"A": "1", "PYTHONPATH": before.format(door=deepspeed.DOOR)}
    assert deepspeed.entered(env) == {"A": "1", "PYTHONPATH": after.format(door=deepspeed.DOOR)}


def test_deepspeed_itself_may_be_there(tmp_path: Path) -> None:
    """A package of that name on the path, even beside the script, and a sitecustomize that must still run."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.0.1'")
    (tmp_path / "deepspeed-0.0.1.dist-info").mkdir()
    (tmp_path / "deepspeed-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SITE'] = 'ran'")
    script = tmp_path / "script.py"
    script.write_text("import deepspeed, os, sys; print(deepspeed.__version__, os.environ['SITE'], os.environ['RANK'], sys.argv[1:], __name__, __file__ == sys.argv[0])")
    told = under_door(str(script), "-x", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}", SITE="")
    assert told.splitlines() == ["deepspeed 0.0.1 is installed; in this command `import deepspeed` means MegaZero's engine",
                                 "0.19.8 ran 0 ['-x'] __main__ True"]


def test_what_is_found_under_the_name() -> None:
    told = under_door(str(SCRIPTS / "names.py")).splitlines()
    absent = "this is MegaZero's engine under the name of DeepSpeed 0.19.8: leave it out."
    pipeline = "UserError: PipelineModule: is not here; give initialize the whole module: its blocks are shared by level 3; pipelines are those of pretrain_gpt.py."
    assert told[8].startswith("here: at most ") and told[:8] + told[9:] == [
        "0.19.8 0.19.8 True True", "['LRRangeTest', 'OneCycle', 'WarmupLR', 'WarmupDecayLR', 'WarmupCosineLR'] .deepspeed_env True", "cpu cpu gloo True",
        "False 0 1 1 DeepSpeed", "[] False 3", "True False", "True False", "[2.0, 2.0] False",
        f"AttributeError: deepspeed.initialise: is not here (did you mean initialize?); {absent}",
        f"AttributeError: deepspeed.zero.Inti: is not here (did you mean Init?); {absent}",
        f"ImportError: deepspeed.utils.groop: is not here (did you mean groups?); {absent}",
        f"ImportError: deepspeed.inference: is not here (did you mean init_inference?); {absent}", pipeline, pipeline,
        "UserError: MoE: is not here; write experts as plain modules, as those of transformers' Mixtral, which are trained like any other.",
        "UserError: init_inference: is not here; call the module under torch.no_grad(), or give initialize a config with stage 3 and no optimizer.",
        "UserError: tp_model_init: is not here; all ranks are data-parallel ranks; leave tensor_parallel out.",
        "UserError: FusedAdam: bias_correction False, amsgrad False: there is no such kernel here; leave it out."]


OWN = """import sys
from megazero import Trainer
import torch, transformers
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=16, bos_token_id=0, eos_token_id=0))
data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
words = {"output_dir": sys.argv[1], "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.05}
config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
try:
    Trainer(model=model, args=transformers.TrainingArguments(**words), train_dataset=data)
except Exception as error:
    print(type(error).__name__, error)
trainer = Trainer(model=model, args=transformers.TrainingArguments(**words, deepspeed=config), train_dataset=data)
trainer.train()
print("engine:", type(trainer.model_wrapped).__name__, trainer.model_wrapped.global_steps, trainer.model_wrapped.zero_optimization_stage())
again = Trainer(model=model, args=transformers.TrainingArguments(**words, deepspeed=config), train_dataset=data, eval_dataset=data)
seen = [again.evaluate()["eval_loss"], again.train().training_loss, again.train().training_loss]
print("goes down:", seen == sorted(seen, reverse=True), again.model_wrapped.global_steps)
try:
    Trainer(model=model, args=transformers.TrainingArguments(**words, deepspeed=config), optimizers=(torch.optim.SGD(model.parameters()), None))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_trainer_may_be_imported(tmp_path: Path) -> None:
    """Before transformers, by a script that is started as it is; after it, one sentence."""
    import megazero
    (tmp_path / "own.py").write_text(OWN)
    told = finished([sys.executable, str(tmp_path / "own.py"), str(tmp_path / "out")])
    assert "engine: DeepSpeedEngine 2 3\n" in told and "goes down: True 2\n" in told
    assert "UserError megazero.Trainer: optimizers is given, which transformers leaves aside under DeepSpeed; write it into the ds_config.json" in told
    assert 'UserError megazero.Trainer: args.deepspeed is missing; write TrainingArguments(deepspeed="ds_config.json", ...), or use' in told
    with pytest.raises(UserError, match="megazero.Trainer: transformers was imported before, and looked for DeepSpeed then; import megazero.Trainer first"):
        megazero.Trainer  # noqa: B018


# ---- DeepSpeed's introduction and its command

INTRODUCTION = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "gradient_clipping": 1.0}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}


def introduced(place: Path, kind: str, level: int, world: int) -> list[float]:
    """Its losses, over ranks."""
    zero = {"stage": level, **({"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}} if level == 3 else {})}
    half = {} if kind == "fp32" else {kind: {"enabled": True, **({"initial_scale_power": 8} if kind == "fp16" else {})}}
    (place / "ds_config.json").write_text(json.dumps({**INTRODUCTION, **half, "zero_optimization": zero}))
    words = [str(SCRIPTS / "introduction.py"), "--deepspeed", "--deepspeed_config", str(place / "ds_config.json"), *(["--fp16"] if kind == "fp16" else []),
             "--facts", str(place / "facts")]
    under_door(*([] if world == 1 else ["--num_gpus", str(world)]), *words)
    found = facts_of(place, "facts", world)
    assert [(f["steps"], f["skipped"], f["stage"], f["world"]) for f in found] == [(4, 0, level, world)] * world
    assert [f["local_rank"] for f in found] == ([-1] if world == 1 else [0, 1])
    return [sum(step) / world for step in zip(*(f["losses"] for f in found), strict=True)]


def test_the_introduction_runs_by_deepspeeds_own_command(tmp_path: Path) -> None:
    one, two = introduced(tmp_path, "fp16", 3, 1), introduced(tmp_path, "fp16", 2, 2)
    assert one == pytest.approx(two, rel=TOLERANCE["fp16"]) and one[-1] != one[0]


@pytest.mark.full
@pytest.mark.parametrize("kind", TOLERANCE)
def test_the_introduction_is_the_same_at_all_levels(kind: str, tmp_path: Path) -> None:
    plain = introduced(tmp_path, "fp32", 0, 1)
    for level in range(4):
        for world in (1, 2):
            assert introduced(tmp_path, kind, level, world) == pytest.approx(plain, rel=TOLERANCE[kind])


# ---- the Trainer, and accelerate's own loop

TRAIN, LOOP = str(SCRIPTS / "train_hf.py"), str(SCRIPTS / "train_diffusers.py")
LINES = {                                                       # a script and its flags, with and without the engine
    "steps": f"{TRAIN} --max_steps 30",
    "windows": f"{TRAIN} --samples 26 --num_train_epochs 2 --gradient_accumulation_steps 3",     # of 3, 3 and 1 micro-batches
    "t5": f"{TRAIN} --kind t5 --max_steps 3 --predict_with_generate true --eval_strategy steps --eval_steps 2 --generation_max_length 6",
    "lora": f"{TRAIN} --max_steps 4 --lora true",
    "workers": f"{TRAIN} --max_steps 2 --dataloader_num_workers 1 --dataloader_multiprocessing_context spawn",
    "only": f"{TRAIN} --evaluate_only true", "fp16": f"{TRAIN} --max_steps 6 --fp16 true",
    "saves": f"{TRAIN} --max_steps 12 --save_strategy steps --save_steps 4 --eval_strategy steps --eval_steps 4 --load_best_model_at_end true --save true",
    "unet": f"{LOOP} --kind unet", "dit": f"{LOOP} --kind dit",
}
EXTRA = {"unet 2": "--save {place}/state --export {place}/exported", "unet 3 resumed": "--resume {place}/state"}     # and those of one run
STEPS = {"steps": 30, "windows": 6, "t5": 3, "lora": 4, "workers": 2, "only": 0, "saves": 12, "unet": 8, "dit": 8}
QUICK = {"steps 1": config(1), "steps 3": config(3), "windows 2": config(2), "t5 3": config(3, optimizer=ADAMW), "lora 3": config(3),
         "only 3": config(3), "saves 2": config(2, optimizer=ADAMW), "unet 2": {}, "unet 3 resumed": {}, "dit 3": {}}
FP16 = {f"fp16 {stage}": config(stage, fp16={"enabled": "auto", "initial_scale_power": 18, "hysteresis": 1}, optimizer=ADAMW) for stage in (1, 3)}
MORE = {"steps 0": config(0), "steps 2": config(2, optimizer=ADAMW), "windows 1": config(1, optimizer=ADAMW), "windows 3": config(3), "t5 1": config(1), "t5 2": config(2), "lora 1": config(1), "lora 2": config(2),
        "workers 1": config(1), "workers 3": config(3), "saves 1": config(1), "saves 3": config(3), "unet 1": {}, "unet 3": {}, "dit 1": {}, "dit 2": {}}


def words_of(name: str, ds: Mapping[str, Any] | None, place: Path) -> list[str]:
    """Of one run in a folder."""
    line, stage = name.split()[0], name.split()[1:2]
    script, *flags = [*LINES[line].split(), "--facts", str(place / name), *EXTRA.get(name, "").format(place=place).split()]
    if script == LOOP:
        return ["--next", script, *flags, *(["--cpu"] if ds is None else ["--stage", *stage])]
    (place / f"{name}.json").write_text(json.dumps(ds))
    return ["--next", script, *TRAINER.split(), *flags, "--output_dir", str(place / f"out {name}"),
            "--pretrained", str(place / ("t5" if line == "t5" else "llama")), *(["--use_cpu"] if ds is None else ["--deepspeed", str(place / f"{name}.json")])]


def examples(place: Path) -> list[str]:
    """The example, with each of its configurations."""
    flags = "--max_steps 12 --per_device_train_batch_size 4 --learning_rate 3e-3 --logging_steps 1 --report_to none --disable_tqdm true --dataloader_pin_memory false"
    return [word for stage in (1, 2, 3) for word in ("--next", str(ROOT / "examples" / "finetune_hf.py"), *flags.split(), "--output_dir", str(place / f"example {stage}"),
                                                     "--deepspeed", str(ROOT / "examples" / f"ds_zero{stage}.json"), "--text", str(ROOT / "tests" / "golden" / "corpus.txt"))]


def played(cases: Mapping[str, Mapping[str, Any]], place: Path, more: Sequence[str] = ()) -> Path:
    sys.path.insert(0, str(SCRIPTS))
    from train_hf import Own, built
    for kind in ("llama", "t5"):
        built(Own(kind=kind)).save_pretrained(place / kind)
    several, lines = str(SCRIPTS / "several.py"), dict.fromkeys(name.split()[0] for name in cases if name not in FP16)
    torchrun(several, *(w for name in lines for w in words_of(name, None, place)), door=False)
    torchrun(several, *(w for name, ds in cases.items() for w in words_of(name, ds, place)), *more)
    return place


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quick")
    return played({**QUICK, **FP16}, place, examples(place))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return played(MORE, tmp_path_factory.mktemp("more"))


def of(facts: Facts, key: str) -> Any:
    """A figure of each step."""
    return facts[key] if key in facts else [line[key] for line in facts.get("history", ()) if key in line]


def compare(name: str, place: Path) -> None:
    """With the run that had no engine: an engine there was, on two ranks that saw what those of the other saw."""
    line = name.split()[0]
    wanted, found = facts_of(place, line), facts_of(place, name)
    for mine, theirs in zip(found, wanted, strict=True):
        half = len(theirs["seen"]) // 2 if "resumed" in name else 0                              # what came after the checkpoint
        assert (mine["type"], mine["processes"], mine["steps"]) == ("DistributedType.DEEPSPEED", 2, STEPS[line])
        assert (theirs["type"], theirs["steps"]) == ("DistributedType.MULTI_CPU", None) and mine["seen"] == theirs["seen"][half:]
    assert line == "only" or not set(found[0]["seen"][:12]) & set(found[1]["seen"][:12]), "ranks saw different samples"
    mine, theirs = found[0], wanted[0]
    if half:
        theirs |= {key: theirs[key][len(theirs[key]) // 2:] for key in ("losses", "norms", "rates")} | {"average": mine["average"]}
    assert len(of(mine, "loss") or of(mine, "losses")) >= STEPS[line] // (2 if half else 1)
    assert Path(mine.get("best") or "").name == Path(theirs.get("best") or "").name and bool(mine.get("best")) == (line == "saves")
    for key, tolerance in (("loss", 1e-5), ("losses", 1e-5), ("eval_loss", 1e-5), ("eval_said", 1e-5), ("grad_norm", 1e-4), ("norms", 1e-4), ("rates", 1e-12),
                           ("average", 1e-3), ("evaluated", 1e-5)):
        assert of(mine, key) == pytest.approx(of(theirs, key), rel=tolerance), key
    assert mine["weights"].keys() == theirs["weights"].keys()
    for key, figures in theirs["weights"].items():
        assert mine["weights"][key] == pytest.approx(figures, rel=1e-4, abs=1e-3), key


@pytest.mark.parametrize("name", QUICK)
def test_it_trains_as_without_the_engine(name: str, quick: Path) -> None:
    compare(name, quick)


def exported(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert (found[key] - t).abs().max() < 1e-4, key


def test_an_export_is_that_of_the_run_without_the_engine(quick: Path) -> None:
    """The best checkpoint, which was loaded at the end; and the pipeline of another library reads its own."""
    equal(exported(quick / "out saves 2"), exported(quick / "out saves"))
    from diffusers import UNet2DModel
    read = UNet2DModel.from_pretrained(quick / "exported").state_dict()
    assert {name: pytest.approx(float(t.double().norm()), rel=1e-5) for name, t in read.items()} == facts_of(quick, "unet 2")[0]["weights"]


def test_the_example_learns_text(quick: Path) -> None:
    """A model of bytes, which begins at ln 256; stage 3 draws its weights in another order."""
    curves = [[line["loss"] for line in json.loads((quick / f"example {stage}" / "trainer_state.json").read_text())["log_history"] if "loss" in line] for stage in (1, 2, 3)]
    assert all(len(curve) == 12 and 5.4 < curve[0] < 5.7 and curve[-1] < 4.5 for curve in curves) and curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert exported(quick / "example 3").keys() == exported(quick / "example 1").keys()


def test_the_trainer_resumes_at_another_level_on_another_number_of_ranks(quick: Path) -> None:
    """From a checkpoint of two ranks at stage 2, on one rank at stage 3; the rest of the curve, and the last weights."""
    (quick / "stage 3.json").write_text(json.dumps(config(3, optimizer=ADAMW)))
    flags = words_of("saves", None, quick)[2:-1]
    under_door(TRAIN, *flags, "--gradient_accumulation_steps", "2", "--load_best_model_at_end", "false", "--facts", str(quick / "resumed"), "--output_dir",
               str(quick / "out resumed"), "--deepspeed", str(quick / "stage 3.json"), "--resume", str(quick / "out saves 2" / "checkpoint-4"))
    wanted, (found,) = facts_of(quick, "saves")[0], facts_of(quick, "resumed", ranks=1)
    assert (found["type"], found["processes"], found["steps"]) == ("DistributedType.DEEPSPEED", 1, 12)
    assert of(found, "loss") == pytest.approx(of(wanted, "loss"), rel=1e-5)
    equal(exported(quick / "out resumed"), exported(quick / "out saves" / "checkpoint-12"))


def test_a_step_that_is_skipped_moves_no_learning_rate(quick: Path) -> None:
    """In fp16 the first steps overflow; the Trainer counts them, its scheduler does not."""
    one, three = (facts_of(quick, name)[0] for name in FP16)
    assert one["skipped"] == three["skipped"] > 0 and one["steps"] == three["steps"] == 6
    skipped = [i for i, norm in enumerate(of(one, "grad_norm")) if norm == float("inf")]
    assert len(skipped) == one["skipped"] and [6 * (1 - rate / 3e-3) for rate in one["moved"]] == pytest.approx(
        [i + 1 - len([s for s in skipped if s <= i]) for i in range(6)])
    assert of(one, "loss") == pytest.approx(of(three, "loss"), rel=3e-3) and one["moved"] == three["moved"]


FALL_BACK = "accelerate would not use the engine; leave it out: without CUDA ranks compute on CPUs anyway."


@pytest.mark.full
@pytest.mark.parametrize("words, env, told", [(f"{LOOP} --facts x --cpu --stage 2", {}, "cpu=True"), (f"{LOOP} --facts x --stage 2", {"ACCELERATE_USE_CPU": "1"}, "ACCELERATE_USE_CPU")])
def test_accelerate_does_not_fall_back(words: str, env: dict[str, str], told: str) -> None:
    assert f"{told}: {FALL_BACK}" in torchrun(*words.split(), code=1, **env)


@pytest.mark.full
@pytest.mark.parametrize("name", MORE)
def test_it_trains_as_without_the_engine_in_all_ways(name: str, more: Path) -> None:
    compare(name, more)
