"""Command lines of Megatron-LM and of what grew from it (Megatron-DeepSpeed, BigScience, BigCode, Pai, MindSpeed), in
this program's words.

Each of their words is one of

    the same            a flag of this program: not in the tables (megatron_words.py)
    renamed             RENAMED, VALUES and the functions below: said in our words, and told
    without effect      WITHOUT: nothing of it changes what is trained, told in one line with the reason
    missing             REFUSED: it would change what is trained, or what fits; refused by the name of the capability

`ours` takes a command line through them. Pure but for the files of others' words that it may name.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megazero.base import printable, read_bytes
from megazero.settings.megatron_words import ASKS, PLAIN, REFUSED, RENAMED, VALUES, WITHOUT

Words = list[str]

@dataclass
class Told:
    """What became of a command line.

    argv        it in this program's words
    renamed     what is said otherwise now, a sentence each
    without     reason -> words that have no effect here
    missing     what is not here -> words that ask for it
    files       texts by path, of files that need not be on the disk
    """

    argv: Words = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    without: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """To be told at start."""
        said = [f"renamed     {sentence}" for sentence in self.renamed]
        if self.without:
            each = "; ".join(f"{reason}: {' '.join(words)}" for reason, words in self.without.items())
            said.append(f"no effect   {each}")
        return said

    def errors(self) -> list[str]:
        return [f"{' '.join(dict.fromkeys(words))}: {what}." for what, words in self.missing.items()]


def _listed(table: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """word -> its row, and (beginning, row)."""
    exact = {w: row for row, words in table.items() for w in words.split() if not w.endswith("*")}
    begins = [(w[:-1], row) for row, words in table.items() for w in words.split() if w.endswith("*")]
    return exact, begins


ALWAYS = "always so here"
EFFECTLESS, ABSENT = _listed(WITHOUT), _listed(REFUSED)


def _row(word: str, table: tuple[dict[str, str], list[tuple[str, str]]]) -> str | None:
    exact, begins = table
    return exact.get(word) or next((row for start, row in begins if word.startswith(start)), None)


def ours(argv: Sequence[str], known: set[str], files: Mapping[str, str] | None = None) -> Told:
    """A command line in this program's words. `known`: its flags, without dashes; what neither it nor the tables know
    stays as it is, for the parser to complain of. `files`: texts by path, beside those of the disk."""
    told, given = Told(files=files or {}), list(grouped_words(argv))
    values = dict(given)
    for word, args in given:
        word = word if word in known or _row(word, ABSENT) or "_" not in word else word.replace("_", "-")
        if word in PLAIN and (PLAIN[word] == ("",) or " ".join(args) in PLAIN[word]):
            _tell(told.without, "is so here", word, args)
        elif word in SPECIAL:
            told.argv += SPECIAL[word](args, values, told)
        elif word in known:
            told.argv += _same(word, args, told)
        elif word in RENAMED:
            new, what = RENAMED[word]
            told.argv += [word for part in new.split() for word in (args if part == "{}" else [part])]
            told.renamed.append(f"--{_shown(word, args)}: {what}")
        elif (reason := _row(word, EFFECTLESS)) is not None:
            lost = [arg for arg in args if "$" in arg and reason == ALWAYS]     # it takes no value: they are others'
            _tell(told.without, reason, word, [arg for arg in args if arg not in lost])
            told.argv += lost
        elif (missing := _row(word, ABSENT)) is not None:
            _tell(told.missing, missing, word, args)
        else:
            told.argv += [f"--{word}" if word else "", *args][not word:]
    told.argv += list(_implied(values, told))
    return told


def grouped_words(argv: Sequence[str]) -> Iterator[tuple[str, Words]]:
    """(word, what stands behind it) of each flag; ("", ...) for what stands before the first."""
    word, args = "", Words()
    for part in argv:
        if re.match(r"--[A-Za-z$]", part):
            if word or args:
                yield word, args
            word, equals, value = part[2:].partition("=")
            args = [value] if equals else []
        else:
            args.append(part)
    if word or args:
        yield word, args


def hint(word: str) -> str | None:
    """Of a word in a file, where nothing is renamed: what to write instead."""
    if word in RENAMED:
        return RENAMED[word][1]
    reason = _row(word, EFFECTLESS)
    return f"has no effect here ({reason}); leave it out" if reason else _row(word, ABSENT)


def _tell(where: dict[str, list[str]], what: str, word: str, args: Sequence[str]) -> None:
    where.setdefault(what, []).append(f"--{_shown(word, args)}")


def _shown(word: str, args: Sequence[str]) -> str:
    return printable(" ".join((word, *args)), 60)


def _same(word: str, args: Words, told: Told) -> Words:
    """A flag of ours: perhaps with a value that is called otherwise here."""
    value = args[0] if len(args) == 1 else ""
    as_if, values = ASKS.get(word, ("", ""))
    if value in values.split() and (what := _row(as_if, ABSENT)):
        _tell(told.missing, what, word, args)
        return []
    if value in VALUES.get(word, {}):
        now = VALUES[word][value]
        told.renamed.append(f"--{word} {value}: is {now}")
        return [f"--{word}", now]
    return [f"--{word}", *args]


# ---- words that other words decide

Given = Mapping[str, Words]
Special = Callable[[Words, Given, Told], Words]


def _number(given: Given, *words: str) -> int | None:
    """The whole number that one of these words was given."""
    for word in words:
        if re.fullmatch(r"[\d_]+", " ".join(given.get(word, []))):
            return int(given[word][0])
    return None


def _zero(args: Words, given: Given, told: Told) -> Words:
    told.renamed.append("--use-distributed-optimizer: is --zero-stage 1")
    return [] if "zero-stage" in given or "data-parallel-sharding-strategy" in given else ["--zero-stage", "1"]


def _torch_fsdp(args: Words, given: Given, told: Told) -> Words:
    told.renamed.append("--use-torch-fsdp2: is --zero-stage 3")
    return [] if "zero-stage" in given else ["--zero-stage", "3"]


def _sharding(args: Words, given: Given, told: Told) -> Words:
    level = VALUES["data-parallel-sharding-strategy"].get(" ".join(args), " ".join(args))
    told.renamed.append(f"--data-parallel-sharding-strategy {' '.join(args)}: is --zero-stage {level}")
    return [] if "zero-stage" in given else ["--zero-stage", level]


def _instances(args: Words, given: Given, told: Told) -> Words:
    """Copies of the ZeRO state, where ours counts the ranks of one."""
    what = "is said by --zero-shard-size here, the data-parallel ranks of one copy; write that"
    _tell(told.missing, what, "num-distributed-optimizer-instances", args)
    return []


def _groups(args: Words, given: Given, told: Told) -> Words:
    """Megatron's query groups are one where nobody says how many."""
    if "num-query-groups" in given:
        _tell(told.without, "said by --num-query-groups", "group-query-attention", args)
        return []
    told.renamed.append("--group-query-attention: is --num-query-groups 1, for no number is given")
    return ["--num-query-groups", "1"]


def _heads(args: Words, given: Given, told: Told) -> Words:
    """BigCode's."""
    if args == ["multiquery"]:
        told.renamed.append("--attention-head-type multiquery: is --num-query-groups 1")
        return ["--num-query-groups", "1"]
    _tell(told.missing, "is said by --num-query-groups here", "attention-head-type", args)
    return []


def _virtual(args: Words, given: Given, told: Told) -> Words:
    """Layers of a virtual stage, where ours counts the virtual stages of a rank. Megatron interleaves wherever there
    are several."""
    layers, each = _number(given, "num-layers"), _number({"n": args}, "n")
    stages = _number(given, "pipeline-model-parallel-size", "pp") or 1
    if not layers or not each or layers % (stages * each):
        what = (f"must divide the layers of a stage (--num-layers {layers or 'is missing'} over --pp {stages}); "
                "write --num-virtual-stages-per-pipeline-rank")
        _tell(told.missing, what, "num-layers-per-virtual-pipeline-stage", args)
        return []
    virtual = layers // stages // each
    schedule = ["--pipeline-schedule", "interleaved"] if virtual > 1 and "pipeline-schedule" not in given else []
    flags = ["--num-virtual-stages-per-pipeline-rank", str(virtual), *schedule]
    told.renamed.append(f"--num-layers-per-virtual-pipeline-stage {each}: is {' '.join(flags)}")
    return flags


def _virtual_stages(args: Words, given: Given, told: Told) -> Words:
    """Megatron interleaves wherever there are several virtual stages."""
    flags = ["--num-virtual-stages-per-pipeline-rank", *args]
    if args and args != ["1"] and "pipeline-schedule" not in given and "pipeline-program" not in given:
        told.renamed.append(f"{' '.join(flags)}: the schedule is --pipeline-schedule interleaved")
        flags += ["--pipeline-schedule", "interleaved"]
    return flags


def _no_positions(args: Words, given: Given, told: Told) -> Words:
    """Megatron's old word for no learned ones."""
    if "position-embedding-type" in given or "use-rotary-position-embeddings" in given:
        _tell(told.without, "said by --position-embedding-type", "no-position-embedding", args)
        return []
    told.renamed.append("--no-position-embedding: is --position-embedding-type none")
    return ["--position-embedding-type", "none"]


def _window(args: Words, given: Given, told: Told) -> Words:
    """Megatron's counts the tokens before one and those after it, which a decoder never sees."""
    found = re.fullmatch(r"\(?(\d+),?\s*(-?\d+)\)?", " ".join(args))
    if not found or found[2] != "0":
        _tell(told.missing, "must be BEFORE,0 in a decoder; write --attention-window", "window-size", args)
        return []
    size = str(int(found[1]) + 1)
    told.renamed.append(f"--window-size {' '.join(args)}: is --attention-window {size}, the token itself counted")
    return ["--attention-window", size]


def _exact_gelu(args: Words, given: Given, told: Told) -> Words:
    """Megatron's fused kernel has the tanh formula, the plain one the exact."""
    if "megatron-defaults" in given:
        told.renamed.append("--no-bias-gelu-fusion: is the exact GELU")
        return ["--no-openai-gelu"]
    _tell(told.without, "the exact GELU is the default here", "no-bias-gelu-fusion", args)
    return []


def _of_tokens(now: str) -> Special:
    """A length in tokens, where ours is in samples."""
    def samples(args: Words, given: Given, told: Told) -> Words:
        word = now.replace("samples", "tokens")
        tokens, length = _number({"n": [a.replace(",", "") for a in args]}, "n"), _number(given, "seq-length")
        if now in given and word == "train-tokens" and tokens and length:   # both end a run: the first that is reached
            return []
        if now in given or now.replace("samples", "iters") in given:
            _tell(told.without, f"said by --{now} or its steps", word, args)
            return []
        if not tokens or not length:
            _tell(told.missing, f"needs --seq-length, to be a number of samples; write --{now}", word, args)
            return []
        told.renamed.append(f"--{word} {tokens}: is --{now} {tokens // length}")
        return [f"--{now}", str(tokens // length)]

    return samples


def _padded(word: str) -> Special:
    """The size of the stored vocabulary, padding included, which Megatron's softmax sees too."""
    def rows(args: Words, given: Given, told: Told) -> Words:
        if "vocab-size" in given:
            _tell(told.without, "said by --vocab-size", word, args)
            return []
        told.renamed.append(f"--{word} {' '.join(args)}: is --vocab-size {' '.join(args)}")
        return ["--vocab-size", *args]

    return rows


def _deepspeed_config(args: Words, given: Given, told: Told) -> Words:
    """What a configuration of DeepSpeed says that a flag can say too, and no flag says."""
    path, text = " ".join(args), _read("deepspeed_config", args, given, told)
    if text is None:
        return []
    try:
        flags, every = (flags_of_deepspeed(json.loads(text), beside) for beside in (given, {}))
    except (ValueError, AttributeError):
        _tell(told.missing, "is not JSON of names and values", "deepspeed_config", args)
        return []
    told.renamed.append(f"--deepspeed_config {path}: says {' '.join(flags) or 'what the flags say'}")
    for word, there in grouped_words(every):
        if word in given and _value(given[word]) != _value(there):
            told.renamed.append(f"--deepspeed_config {path}: --{word} {' '.join(given[word])} counts, not its "
                                f"{' '.join(there)}")
    return flags


def _deepspeed(args: Words, given: Given, told: Told) -> Words:
    """A flag of Megatron-DeepSpeed; with a file, that of transformers' Trainer."""
    if args:
        return _deepspeed_config(args, given, told)
    _tell(told.without, "said by --deepspeed_config", "deepspeed", args)
    return []


def _value(args: Words) -> float | str:
    try:
        return float(" ".join(args))
    except ValueError:
        return " ".join(args)


def flags_of_deepspeed(said: Mapping[str, Any], given: Given) -> Words:
    """The flags that a ds_config.json stands for, beside those that were given. Raises AttributeError."""
    blocks = {block: said.get(block) or {} for block in ("zero_optimization", "fp16", "bf16")} | {"": said}
    flags = Words()
    for (block, key), (word, form) in FROM_DEEPSPEED.items():
        value = blocks[block].get(key)
        if value is True:
            flags += [] if word in given or "bf16" in given or "fp16" in given else [f"--{word}"]
        elif isinstance(value, int | float) and not isinstance(value, bool) and word not in given and form(value):
            flags += [f"--{word}", exactly(value)]
    power = blocks["fp16"].get("initial_scale_power")
    if isinstance(power, int) and not blocks["fp16"].get("loss_scale") and "initial-loss-scale" not in given:
        flags += ["--initial-loss-scale", exactly(2.0**power)]
    return flags


def exactly(number: float) -> str:
    """As people write it, where that is the same number."""
    return f"{number:g}" if isinstance(number, float) and float(f"{number:g}") == number else repr(number)


def _split_file(args: Words, given: Given, told: Told) -> Words:
    """A JSON of Megatron's with the words of each split's flag."""
    text = _read("per-split-data-args-path", args, given, told)
    if text is None:
        return ["--data-path", *args]
    try:
        said = {name: [str(word) for word in words] for name, words in json.loads(text).items() if words}
    except (ValueError, AttributeError, TypeError):
        _tell(told.missing, "is not JSON of lists named train, valid, test", "per-split-data-args-path", args)
        return []
    told.renamed.append(f"--per-split-data-args-path {' '.join(args)}: says --train-, --valid- and --test-data-path")
    return [word for name in ("train", "valid", "test") for word in (f"--{name}-data-path", *said.get(name, []))
            if name in said]


Range = tuple[str, float, float, str]                      # weight, from, to, prefix


def _ranges(text: str) -> list[Range]:
    """BigScience's `NAME: WEIGHT FROM:TO PREFIX, ...`, a line for each name. Raises ValueError."""
    parts = [part.split() for line in text.replace('"', " ").splitlines() if line.strip()
             for part in re.sub(r"^\s*[\w-]+:\s", "", line).split(",") if part.strip()]
    cut = [(weight, *bounds.split(":"), prefix) for weight, bounds, prefix in parts]
    return [(weight, float(low), float(high), prefix) for weight, low, high, prefix in cut]


def _weighted(args: Words, given: Given, told: Told) -> Words:
    """Parts of datasets with their weights: datasets of their own, or all of them cut alike, which --split does."""
    flags = [f"{name}-weighted-split-paths-path" for name in ("train", "valid")]
    text, other = (_read(flag, given.get(flag, []), given, told) if flag in given else "" for flag in flags)
    if text is None or other is None:
        return ["--data-args-path", *args]                      # a file, of which nothing more is known
    try:
        train, valid = _ranges(text), _ranges(other)
    except ValueError:
        _tell(told.missing, "is not lines such as `TRAIN: 0.3 0:0.95 PREFIX, ...`", flags[0], args)
        return []
    whole = {(low, high) for _, low, high, _ in (*train, *valid)} <= {(0.0, 1.0)}
    cuts = [{(low, high) for _, low, high, _ in rows} for rows in (train, valid)]
    first, second = (rows.copy().pop() if len(rows) == 1 else (0.0, 1.0) for rows in cuts)
    words = [[word for weight, _, _, prefix in rows for word in (weight, prefix)] for rows in (train, valid)]
    if whole:
        made = ["--train-data-path", *words[0], *(["--valid-data-path", *words[1]] if valid else [])]
    elif (max(map(len, cuts)) == 1 and first[0] == 0 and (not valid or second[0] == first[1])
          and (not valid or words[0] == words[1])):
        parts = (first[1], (second[1] - first[1]) if valid else 0.0, 1 - (second[1] if valid else first[1]))
        made = ["--data-path", *words[0], "--split", ",".join(f"{1000 * part:g}" for part in parts)]
    else:
        what = "each dataset is cut elsewhere, where --split cuts all alike; cut them before"
        _tell(told.missing, what, flags[0], args)
        return []
    told.renamed.append(f"--{flags[0]} {' '.join(args)}: says {printable(' '.join(made), 200)}")
    return made


def _told_by_train(args: Words, given: Given, told: Told) -> Words:
    if "train-weighted-split-paths-path" not in given:
        what = "needs --train-weighted-split-paths-path"
        _tell(told.missing, what, "valid-weighted-split-paths-path", args)
    return []


def _read(word: str, args: Words, given: Given, told: Told) -> str | None:
    """The text of a file that a word names; None, and told, where there is none: no mistake under --check."""
    path = " ".join(args)
    if path in told.files:
        return told.files[path]
    try:
        return read_bytes(Path(path)).decode()
    except (OSError, ValueError):
        if "check" in given:
            told.renamed.append(f"--{word} {path}: is not on this machine; what it says does not count here")
        else:
            _tell(told.missing, "cannot be read; name a file, or leave it out", word, args)
        return None


FROM_DEEPSPEED: dict[tuple[str, str], tuple[str, Callable[[float], bool]]] = {
    ("", "train_batch_size"): ("global-batch-size", lambda v: v > 0),
    ("", "train_micro_batch_size_per_gpu"): ("micro-batch-size", lambda v: v > 0),
    ("", "gradient_clipping"): ("clip-grad", lambda v: v >= 0),
    ("zero_optimization", "stage"): ("zero-stage", lambda v: v in range(4)),
    ("fp16", "enabled"): ("fp16", bool), ("bf16", "enabled"): ("bf16", bool),
    ("fp16", "loss_scale"): ("loss-scale", lambda v: v > 0),
    ("fp16", "loss_scale_window"): ("loss-scale-window", lambda v: v > 0),
    ("fp16", "hysteresis"): ("hysteresis", lambda v: v > 0),
    ("fp16", "min_loss_scale"): ("min-loss-scale", lambda v: v > 0),
}

def _positions(args: Words, given: Given, told: Told) -> Words:
    """Megatron's yarn is a kind of positions."""
    if args != ["yarn"]:
        return _same("position-embedding-type", args, told)
    told.renamed.append("--position-embedding-type yarn: is rope with a yarn --rope-scaling-type")
    return ["--position-embedding-type", "rope", "--use-rope-scaling", "--rope-scaling-type", "yarn"]


SPECIAL: dict[str, Special] = {
    "use-distributed-optimizer": _zero, "use-torch-fsdp2": _torch_fsdp, "data-parallel-sharding-strategy": _sharding,
    "num-distributed-optimizer-instances": _instances, "group-query-attention": _groups, "attention-head-type": _heads,
    "num-layers-per-virtual-pipeline-stage": _virtual, "num-virtual-stages-per-pipeline-rank": _virtual_stages,
    "no-position-embedding": _no_positions, "train-tokens": _of_tokens("train-samples"),
    "max-tokens": _of_tokens("train-samples"),
    "lr-decay-tokens": _of_tokens("lr-decay-samples"), "lr-warmup-tokens": _of_tokens("lr-warmup-samples"),
    **{word: _padded(word) for word in ("pad-vocab-size-to", "padded-vocab-size")},
    "deepspeed_config": _deepspeed_config, "deepspeed": _deepspeed,
    "window-size": _window, "position-embedding-type": _positions, "no-bias-gelu-fusion": _exact_gelu,
    "deepspeed-config": _deepspeed_config, "per-split-data-args-path": _split_file,
    "train-weighted-split-paths-path": _weighted, "valid-weighted-split-paths-path": _told_by_train,
}


def _implied(given: Given, told: Told) -> Iterator[str]:
    """What Megatron means where nothing is said, or two words say it."""
    tokens, length, samples = (_number(given, word) for word in ("train-tokens", "seq-length", "train-samples"))
    if tokens and length and samples:
        told.renamed.append(f"--train-tokens {tokens}, --train-samples {samples}: the first that is reached ends the "
                            "run")
        yield from ("--train-samples", str(min(tokens // length, samples)))
    if "tokenizer-type" not in given and "vocab-file" in given and "merge-file" in given:
        told.renamed.append("--vocab-file --merge-file: are files of --tokenizer-type GPT2BPETokenizer")
        yield from ("--tokenizer-type", "GPT2BPETokenizer")
