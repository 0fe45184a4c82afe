"""Launches of other programs, as a file of this program's words: what tools/from_megatron.py, from_deepspeed.py and
from_torchtitan.py have in common. Pure.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megazero.settings.command_line import flatten, leaves, parse
from megazero.settings.config import PRESETS, Config, in_our_words
from megazero.settings.megatron import FROM_DEEPSPEED, Told, exactly, flags_of_deepspeed, grouped_words, hint
from megazero.settings.megatron_words import VALUES, megatron_defaults

# ---- Megatron's preprocess_data.py

IDLE = {"--dataset-impl": 1, "--log-interval": 1, "--partitions": 1, "--keep-sequential-samples": 0,
        "--keep-newlines": 0}


def of_preprocessing(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(its words as ours, those without effect here)."""
    ours, idle, types = list[str](), list[str](), VALUES["tokenizer-type"]
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    at = 0
    while at < len(words):
        word = words[at].replace("_", "-") if words[at].startswith("--") else words[at]
        if word in IDLE:
            idle += words[at:at + 1 + IDLE[word]]
            at += 1 + IDLE[word]
            continue
        before = ours[-1] if ours else ""
        word = types.get(word, word) if before == "--tokenizer-type" else word
        ours.append("--vocab-file" if word == "--vocab" else word)
        at += 1
    return ours, idle


# ---- the file and the report

def as_file(argv: Sequence[str], ranks: int | None = None, defaults: bool = True,
            files: Mapping[str, str] | None = None) -> tuple[str, list[str]]:
    """(the text of a run.toml, lines of a report) of a command line of Megatron's words, with its `defaults`; `files`:
    texts by path, which need not be on the disk. Raises UserError for values that cannot be."""
    told = in_our_words([*argv, "--check"], files)              # files that are not on this machine are no mistake
    kept, open_ = _without_variables(told.argv)
    config = parse(Config, kept, presets=PRESETS, elsewhere=hint,
                   implied=megatron_defaults if defaults else lambda said: {})
    lines = [*_report(argv, told), *[f"fill in     {word}" for word in open_], *_needs(config, ranks)]
    return toml(config, told.missing, open_), lines


def _without_variables(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags whose values are known, and those that are not: a flag with its value, or what stands by itself."""
    takes = {o.flag: None if o.many else 0 if o.kind is bool else 1 for group in leaves(Config).values() for o in group}
    kept, unknown = list[str](), list[str]()
    for word, args in grouped_words(argv):
        count = takes.get(f"--{word}")
        own = args if count is None else args[:count]
        flag = [f"--{word}"] if word else []
        if any("$" in arg or "`" in arg for arg in [word, *own]):
            unknown.append(" ".join(flag + own))
        else:
            kept += [*flag, *own]
        for arg in args[len(own):]:
            (unknown if "$" in arg or "`" in arg else kept).append(arg)
    return kept, unknown


def _report(argv: Sequence[str], told: Told) -> list[str]:
    """What became of each flag."""
    flags = [word for word in argv if word.startswith("--")]
    lines = [f"kept        {sum(flag in told.argv for flag in flags)} of {len(flags)} flags"]
    lines += [f"renamed     {sentence}" for sentence in told.renamed]
    lines += [f"no effect   {reason}: {' '.join(words)}" for reason, words in told.without.items()]
    return lines + [f"missing     {' '.join(words)}: {what}" for what, words in told.missing.items()]


# keys of ds_config.json beside those that Megatron-DeepSpeed leaves to it
MORE_OF_DEEPSPEED: dict[tuple[str, ...], str] = {
    ("optimizer", "params", "lr"): "lr", ("optimizer", "params", "eps"): "adam-eps",
    ("optimizer", "params", "weight_decay"): "weight-decay", ("optimizer", "params", "momentum"): "sgd-momentum",
    ("scheduler", "params", "warmup_num_steps"): "lr-warmup-iters", ("scheduler", "params", "warmup_max_lr"): "lr",
    ("scheduler", "params", "warmup_min_lr"): "lr-warmup-init",
    ("scheduler", "params", "total_num_steps"): "train-iters", ("steps_per_print",): "log-interval"}
# words of a rule's params that mean another flag than those of others, and what its kind means besides
OF_RULE: dict[str, dict[str, str]] = {
    "lion": {"betas": "lion-beta1 lion-beta2"},
    "muon": {"momentum": "muon-momentum", "muon_lr": "lr", "adam_lr": "lr-embedding lr-vectors"},
    "adafactor": {"beta2_decay": "adafactor-decay", "d": "adafactor-clip"}}
BESIDE_RULE = {"muon": "--muon-nesterov --muon-coefficient-type simple --muon-scale-mode shape_scaling"}
CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def from_configuration(said: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(flags, other keys) of a ds_config.json. Raises AttributeError where it is no such thing."""
    keys = dict(_paths(said))
    flags = flags_of_deepspeed(said, {})
    read = {tuple(word for word in path if word) for path in FROM_DEEPSPEED}
    kind = str(keys.get(("optimizer", "type"), "")).lower()
    own = {("optimizer", "params", word): flag for word, flag in OF_RULE.get(kind, {}).items()}
    for path, flag in ({("optimizer", "params", "betas"): "adam-beta1 adam-beta2"} | own | {
            path: flag for path, flag in MORE_OF_DEEPSPEED.items() if path not in own}).items():
        values = value if isinstance(value := keys.get(path), list) else [value] * len(flag.split())
        for name, number in zip(flag.split(), values, strict=False):
            if isinstance(number, int | float) and f"--{name}" not in flags:
                flags += [f"--{name}", exactly(number)]
    every = (option for group in leaves(Config).values() for option in group)
    rules = next(option.field.metadata["choices"] for option in every if option.name == "optimizer")
    rule = "adam" if kind == "adamw" else kind
    flags += ["--optimizer", rule] if rule in rules else []
    flags += BESIDE_RULE.get(kind, "").split()
    schedule = str(keys.get(("scheduler", "type")))
    curve = CURVES.get(schedule)
    flags += ["--lr-decay-style", curve] if curve else []
    warm = ("scheduler", "params", "warmup_type")
    logarithmic = schedule in ("WarmupLR", "WarmupDecayLR") and keys.get(warm, "log") != "linear"
    read |= {*MORE_OF_DEEPSPEED, *own, ("optimizer", "params", "betas"), ("fp16", "initial_scale_power"),
             *([("optimizer", "type")] if rule in rules else []),
             *([("scheduler", "type")] if curve else []), *([] if logarithmic else [warm])}
    rest = [".".join(path) for path, value in keys.items()
            if path not in read or value == "auto" or (path[-1] == "loss_scale" and not value)]
    rest += [f"{'.'.join(warm)} = log (warm-up is linear here)"] if logarithmic and warm not in keys else []
    micro, more = keys.get(("train_micro_batch_size_per_gpu",)), keys.get(("gradient_accumulation_steps",))
    if isinstance(micro, int) and isinstance(more, int) and more > 1 and "--global-batch-size" not in flags:
        rest.append(f"train_batch_size (write --global-batch-size: {micro * more} x data-parallel ranks)")
    return flags, rest


def _paths(said: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in said.items():
        if isinstance(value, dict):
            yield from (((key, *path), inner) for path, inner in _paths(value))
        else:
            yield (key,), value


def _needs(config: Config, ranks: int | None) -> list[str]:
    """What a launch takes: ranks, data, files."""
    p, d, k = config.parallel, config.data, config.checkpoint
    least = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    batch = config.training.global_batch_size
    count = ranks or least
    told = [f"{count} rank{'s' if count > 1 else ''}"
            + ("" if ranks else f", or a multiple: --tp {p.tensor_model_parallel_size} x "
                                f"--pp {p.pipeline_model_parallel_size}")
            + (f", for {batch} samples a step" if batch else "")]
    data = (*d.data_path, *d.train_data_path, *d.valid_data_path, *d.test_data_path)
    prefixes = without_weights(data)
    told += [f"data: {' '.join(prefixes)} (Megatron's .bin and .idx are read as they are)"] if prefixes else []
    files = [path for path in (d.tokenizer_model, d.vocab_file, d.merge_file, d.data_args_path) if path]
    told += [f"files: {' '.join(files)}"] if files else []
    told += [f"weights: {k.load}"] if k.load and k.load != k.save else []
    return [f"needs       {sentence}" for sentence in told]


def without_weights(data: Sequence[str]) -> list[str]:
    """The prefixes among the words of --data-path."""
    return [word for word in data if not re.fullmatch(r"[\d.]+(e-?\d+)?", word)]


def toml(config: Config, missing: Mapping[str, Sequence[str]], unknown: Sequence[str] = ()) -> str:
    """A file that --config takes: what a configuration says otherwise than the defaults, in tables by group."""
    plain, now = flatten(Config()), flatten(config)
    lines = [f"# missing: {' '.join(words)}: {what}" for what, words in missing.items()]
    lines += [f"# fill in: {word}" for word in unknown]
    for title, options in leaves(Config).items():
        rows = [f"{o.name} = {_value(now[o.name])}" for o in options
                if now[o.name] != plain[o.name] and o.name not in ("check", "config", "model")]
        if rows:
            table = re.sub(r"[^a-z]+", "_", title.lower()).strip("_")
            lines += ["", f"[{table}]", *rows] if title != "general" else rows
    return "\n".join(lines).lstrip("\n") + "\n"


def _value(value: Any) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
