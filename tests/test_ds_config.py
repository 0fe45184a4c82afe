"""The words of ds_config.json: each known key is honoured, said to have no effect, or refused; nothing else passes."""

import base64
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from ds_configs import GOOD, TUTORIALS, WRONG, good, zero

from megazero.base.errors import UserError
from megazero.engine.keys import IDLE, MUST, REFUSED, TABLE, fits, taken
from megazero.engine.rates import SCHEDULES, one_cycle_momentum
from megazero.engine.words import meaning, parsed

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_configuration_is_taken_or_told(name: str) -> None:
    config, words = TUTORIALS[name]
    if words is None:
        assert meaning(config, 1, cuda=False).batch >= 1
    else:
        with pytest.raises(UserError) as told:
            meaning(config, 1, cuda=False)
        assert words in str(told.value)


@pytest.mark.parametrize("config, words", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_configuration_is_one_sentence(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        meaning(config, 2, cuda=False)
    assert len(told.value.sentences) == 1


def test_many_tutorials_and_many_mistakes() -> None:
    assert len(TUTORIALS) >= 25 and len(WRONG) >= 40


def test_each_mistake_has_its_sentence() -> None:
    with pytest.raises(UserError) as told:
        meaning({"train_batch_siz": 3, "zero_optimization": {"stage": 7, "overlap": True}, "fp16": {"enabled": 1}}, 1, cuda=False)
    assert [s.split(":")[0] for s in told.value.sentences] == ["config train_batch_siz", "config zero_optimization.stage",
                                                              "config zero_optimization.overlap", "config fp16.enabled"]


def test_keys_from_strangers_are_printed_plainly_and_not_without_end() -> None:
    with pytest.raises(UserError) as told:
        meaning({**GOOD, **{f"{i}\x1b[2J" + "x" * 999: i for i in range(30)}}, 1, cuda=False)
    assert len(told.value.sentences) == 11 and told.value.sentences[-1].startswith("config: 20 keys more are wrong")
    assert all(s.isprintable() and len(s) < 300 for s in told.value.sentences)


def test_offload_is_where_things_are_on_a_cpu_and_refused_on_cuda() -> None:
    config = zero(stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert "offload_param, offload_optimizer on cpu: things are there already" in meaning(config, 1, cuda=False).told
    with pytest.raises(UserError, match="offload_param.device: is cpu, and this rank computes on CUDA: that comes later") as told:
        meaning(config, 1, cuda=True)
    assert len(told.value.sentences) == 2


def test_what_has_no_effect_and_what_is_a_default_is_told() -> None:
    config = good(zero_optimization={"stage": 2, "reduce_bucket_size": 5e8, "sub_group_size": 1}, wall_clock_breakdown=True)
    told = meaning(config, 1, cuda=False).told
    assert told[0].startswith("gradient_clipping is 1.0, the default")
    assert told[-1].startswith("without effect here: zero_optimization.reduce_bucket_size, zero_optimization.sub_group_size (blocks travel whole")
    assert told[-1].endswith("; wall_clock_breakdown (nothing is timed or listed)") and len(told) == 2
    assert meaning(good(gradient_clipping=0), 1, cuda=False).told == ()
    assert meaning(good(optimizer={"type": "Adam"}, gradient_clipping=0), 1, cuda=False).told == ("optimizer.params.lr is 0.001, the default",)


@pytest.mark.parametrize("given, world, want", [
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3}, 2, (24, 3, 4)),
    ({"train_batch_size": 24, "gradient_accumulation_steps": 4}, 2, (24, 3, 4)),
    ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}, 2, (24, 3, 4)),
    ({"train_batch_size": 24}, 3, (24, 8, 1)), ({"train_micro_batch_size_per_gpu": 5}, 3, (15, 5, 1)),
    ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, 4, (24, 3, 2))])
def test_two_of_three_give_the_third(given: Any, world: int, want: Any) -> None:
    found = meaning({**given, "optimizer": GOOD["optimizer"]}, world, cuda=False)
    assert (found.batch, found.micro_batch, found.accumulation) == want


def test_words_become_settings() -> None:
    found = meaning(good(optimizer={"type": "ADAM", "params": {"betas": [0.8, 0.9], "adam_w_mode": False}}, bfloat16={"enabled": True},
                         zero_optimization={"stage": 3, "overlap_comm": False, "mics_shard_size": 2}, steps_per_print=5), 4, cuda=False)
    assert (found.level, found.shard, found.overlap, found.dtype, found.clip, found.print_every) == (3, 2, False, "bf16", 1.0, 5)
    assert found.optimizer == ("adam", {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-8, "decoupled_weight_decay": False, "weight_decay": 0.0})
    assert found.scale.constant and found.scale.value == 1
    for params, decay, decoupled in (({}, 0.0, True), ({"torch_adam": True}, 0.01, True), ({"torch_adam": True, "adam_w_mode": False}, 0.0, False),
                                     ({"weight_decay": 0.3, "torch_adam": True}, 0.3, True)):
        optimizer = meaning(good(optimizer={"type": "Adam", "params": params}), 1, cuda=False).optimizer
        assert optimizer and (optimizer[1]["weight_decay"], optimizer[1]["decoupled_weight_decay"]) == (decay, decoupled)
    moving, fixed = (meaning(good(fp16={"enabled": True, "initial_scale_power": 4, "loss_scale": s}), 1, cuda=False).scale for s in (0, 128))
    assert (moving.value, moving.constant, moving.hysteresis, fixed.value, fixed.constant) == (16, False, 2, 128, True)


# ---- how it is given

TEXT = '{"train_batch_size": 8, // samples\n "optimizer": {"type": "AdamW", # "x"\n "params": {"lr": 1e-3,},}, /* not\n yet */ }'


def test_a_file_a_mapping_and_base64_are_one(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(TEXT)
    plain = meaning(GOOD, 1, cuda=False)
    coded = base64.urlsafe_b64encode(json.dumps(GOOD).encode()).decode()
    for given in (path, str(path), coded):
        found = meaning(given, 1, cuda=False)
        assert (found.batch, found.optimizer) == (plain.batch, plain.optimizer)
    assert meaning(path, 1, cuda=False).where == str(path)


def test_comments_are_not_looked_for_in_words() -> None:
    assert parsed(b'\xef\xbb\xbf{"a": "//x # /* \\" ,}", "b": [1, 2,\n], }') == {"a": '//x # /* " ,}', "b": [1, 2]}


@pytest.mark.parametrize("text, words", [
    ('{"train_batch_size": 8, "train_batch_size": 8}', "key 'train_batch_size' stands twice"), ('{"fp16": {"enabled": true, "enabled": true}}', "stands twice"),
    ("[1]", "not a mapping"), ('{"a": 1', "is not JSON"), ('{"a": NaN}', "NaN is not a number in JSON"), ("\xff", "is not JSON"), ("", "is not JSON"),
    ('{"a": /* never ends', "is not JSON"), ("[" * 5000, "nested too deeply")])
def test_a_bad_file_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words) as told:
        meaning(path, 1, cuda=False)
    assert str(path) in str(told.value) and len(told.value.sentences) == 1


def test_what_is_no_configuration_is_told(tmp_path: Path) -> None:
    for given, words in ((str(tmp_path / "none.json"), "cannot be read .No such file"), (tmp_path, "is not a regular file"), (7, "is a int; give a mapping")):
        with pytest.raises(UserError, match=words):
            meaning(given, 1, cuda=False)


# ---- the table

def test_every_row_of_the_table_does_what_it_says() -> None:
    """Given alone: a key without effect is told, a refused one is refused unless it has a value that it may have."""
    some = {"switch": True, "count": 7, "size": 7, "whole": 7, "number": 3.0, "amount": 0.25, "fraction": 0.25, "word": "x", "words": ["x"], "counts": [3],
            "block": {"enabled": True}, "any": "x"}
    for key in TABLE:
        if key.of or key.kind not in (IDLE, REFUSED):
            continue
        value = False if key.default is True else some.get(key.form, key.form.split("|")[-1])
        assert fits(key, value) and not taken(key, value), key
        config: Any = json.loads(json.dumps(GOOD))
        inner, *parts = config, *key.path.split(".")
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = value
        if key.kind == IDLE:
            assert f"{key.path} (" in meaning(config, 1, cuda=False).told[-1], key
        else:
            with pytest.raises(UserError, match=f"config {key.path}: "):
                meaning(config, 1, cuda=False)


def test_defaults_have_the_form_of_their_key() -> None:
    assert all(fits(key, key.default) for key in TABLE if key.default not in (None, MUST))


def test_the_page_of_keys_is_that_of_the_code() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "ds_keys.py"))["page"]()
    assert (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8") == page, "python tools/ds_keys.py > docs/deepspeed.md"


# ---- rates over steps

def curve(kind: str, steps: range, base: float = 0.5, **params: Any) -> list[float]:
    found = meaning(good(scheduler={"type": kind, "params": params}), 1, cuda=False).schedule
    assert found
    return [SCHEDULES[kind](i, base, found[1]) for i in steps]


def test_rates_follow_their_formulas() -> None:
    """i is -1 before the first step. (Compared once with the classes of DeepSpeed 0.19.8: to the last digits.)"""
    log = [math.log(i + 1) / math.log(4) for i in range(4)]
    assert curve("WarmupLR", range(-1, 7), warmup_num_steps=4) == pytest.approx([0, *(0.5 * x for x in log), 0.5, 0.5, 0.5])
    assert curve("WarmupLR", range(-1, 5), warmup_num_steps=1, warmup_max_lr=3.0, warmup_min_lr=1.0) == pytest.approx([1, 1, 3, 3, 3, 3])
    assert curve("WarmupLR", range(-1, 6), warmup_num_steps=4, warmup_type="linear", warmup_max_lr=8, warmup_min_lr=4) == pytest.approx([4, 4, 5, 6, 7, 8, 8])
    assert curve("WarmupDecayLR", range(-1, 11), warmup_num_steps=4, warmup_type="linear", warmup_max_lr=1.0, total_num_steps=8) == pytest.approx(
        [0, 0, .25, .5, .75, 1, .75, .5, .25, 0, 0, 0])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * min(1, (i - 1) / 4))) / 2 for i in range(2, 9)]
    assert curve("WarmupCosineLR", range(-1, 9), base=2.0, warmup_num_steps=2, warmup_type="linear", warmup_min_ratio=0.2, cos_min_ratio=0.1,
                 total_num_steps=6) == pytest.approx([0, 0.4, 1.2, *(2 * x for x in cosine)])
    assert curve("LRRangeTest", range(-1, 4), lr_range_test_min_lr=2.0, lr_range_test_step_size=2, lr_range_test_step_rate=3.0) == pytest.approx(
        [2, 5, 8, 11, 14])
    assert curve("LRRangeTest", range(-1, 4), lr_range_test_min_lr=2.0, lr_range_test_step_size=2, lr_range_test_staircase=True) == pytest.approx(
        [2, 2, 4, 4, 6])
    cycle = {"cycle_min_lr": 1.0, "cycle_max_lr": 3.0, "cycle_first_step_size": 2, "cycle_second_step_size": 4, "decay_step_size": 2, "decay_lr_rate": 1.0}
    assert curve("OneCycle", range(-1, 9), **cycle) == pytest.approx([1, 2, 3, 2.5, 2, 1.5, 1, 1 / 1.5, 1 / 2, 1 / 2.5])
    assert curve("OneCycle", range(-1, 6), **cycle, cycle_first_stair_count=1, cycle_second_stair_count=2) == pytest.approx([1, 1, 3, 2, 2, 1, 1])
    found = meaning(good(scheduler={"type": "OneCycle", "params": {**cycle, "decay_mom_rate": 0.1}}), 1, cuda=False).schedule
    assert found and [one_cycle_momentum(i, found[1]) for i in range(-1, 8)] == pytest.approx(
        [0.8, 0.85, 0.8, 0.825, 0.85, 0.875, 0.9, 0.9 * 1.05, 0.9 * 1.1])
