"""Launches of other programs, as a file of this program's words: what tools/from_megatron.py, from_deepspeed.py and
from_torchtitan.py have in common, and how a launch script is read without running it. Pure.
"""

import ast
import json
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megazero.settings.command_line import flatten, leaves, parse
from megazero.settings.config import PRESETS, Config, in_our_words
from megazero.settings.megatron import FROM_DEEPSPEED, Told, exactly, flags_of_deepspeed, hint
from megazero.settings.megatron_words import VALUES, megatron_defaults

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
ASSIGNMENT = re.compile(rf"(?:(?:export|local|declare(?: -\w+)?|readonly)\s+)?({NAME})(\+?)=(.*)", re.DOTALL)
REFERENCE = re.compile(rf"\$(?:\{{({NAME}|\d)(?:\[[@*]\])?(?::?[-=]([^}}]*))?\}}|({NAME}|[\d@*]))")
SUM = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
KEYWORDS = re.compile(r"^(?:(?:then|do|else|[^\s()$\"'=]+\))\s+)+")
OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: operator.floordiv}
LONGEST = 2**16             # letters of a variable or word: who doubles one often enough would fill the memory
PROGRAM = re.compile(r"(?:.*/)?(?:pretrain|train|run_pretrain)\w*\.py")


# ---- a script of bash

def words_of_script(text: str) -> tuple[list[str], list[str]]:
    """(the words of the last command that starts a training program, those of its launcher). Variables that the script
    sets are put in, both branches of a condition are read; nothing is run. Raises ValueError where there is none."""
    variables: dict[str, list[str]] = {}
    found: tuple[list[str], list[str]] | None = None
    text = re.sub(r"`\s*#[^`\n]*`", "", text)                  # a remark within a line that goes on
    for statement in (_calculated(part, variables) for whole in _statements(text) for part in _parts(whole)):
        if match := ASSIGNMENT.fullmatch(statement):
            name, more, value = match.groups()
            words = shlex.split(value[1:-1] if value.startswith("(") else value, comments=True)
            given = [part for word in words for part in _expanded(word, variables)]
            if not value.startswith("("):
                given = [" ".join(given)] if given else [""]
            variables[name] = [*variables.get(name, []), *given] if more else given
            _bounded(variables[name], f"the variable {name}")
            continue
        words = [part for word in _words(statement) for part in _expanded(word, variables)]
        words = [part for word in words for part in (_words(word) if re.search(r"\.py\s", word) else [word])]
        at = next((i for i, word in enumerate(words) if PROGRAM.fullmatch(word)), None)
        if at is not None:
            found = list(_until_pipe(words[at + 1:])), words[:at]
    if found is None:
        raise ValueError("starts no program such as pretrain_gpt.py")
    return found


def doubtful(text: str) -> list[str]:
    """Variables that a script sets within a condition, where the last assignment counts and the condition does not."""
    depth, found = 0, list[str]()
    for line in text.splitlines():
        words = re.split(r"[;\s]+", line.strip())
        depth += sum(word in ("if", "case") for word in words[:1]) - sum(word in ("fi", "esac") for word in words)
        inside = depth > 0 or words[0] in ("if", "case")
        found += re.findall(rf"(?:^|[;\s])({NAME})\+?=", line) if inside else []
    return list(dict.fromkeys(found))


def _statements(text: str) -> Iterator[str]:
    """Lines that belong together: to the end of a quotation, of an array, of what a backslash continues."""
    waiting = ""
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("#") or not bare and not waiting:
            continue
        waiting += bare[:-1] + " " if bare.endswith("\\") else bare + "\n"
        if bare.endswith("\\") or _open(waiting):
            continue
        yield waiting.strip().rstrip(";")
        waiting = ""
    if waiting.strip():
        yield waiting.strip()


def _outside(text: str) -> Iterator[tuple[int, str, int]]:
    """(place, letter, brackets open behind it) of what is in no quotation and no comment."""
    quote, depth, at = "", 0, 0
    while at < len(text):
        c = text[at]
        if c == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == "#" and (at == 0 or text[at - 1].isspace()):
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        else:
            depth += (c in "({[") - (c in ")}]")
            yield at, c, depth
        at += 1


def _parts(text: str) -> Iterator[str]:
    """The commands of a line, which ; && || part, without keywords before them."""
    start = 0
    for at, c, depth in _outside(text):
        if depth <= 0 and at >= start and (c == ";" or text[at:at + 2] in ("&&", "||")):
            yield KEYWORDS.sub("", text[start:at].strip())
            start = at + (1 if c == ";" else 2)
    yield KEYWORDS.sub("", text[start:].strip())


def _calculated(text: str, variables: Mapping[str, Sequence[str]]) -> str:
    """With the values of $((...)), where all that it names is known."""
    def value(match: re.Match[str]) -> str:
        known = re.sub(rf"\$?\{{?({NAME})\}}?", lambda m: " ".join(variables.get(m[1], [m[0]])), match[1])
        return str(number) if (number := _number(known)) is not None else match[0]

    return SUM.sub(value, text)


def _number(text: str) -> int | None:
    """Of sums and products of whole numbers as the shell has them; None for anything else."""
    def of(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            found = OPERATIONS[type(node.op)](of(node.left), of(node.right))
            if abs(found) < 2**63:
                return found
        raise ValueError(text)

    try:
        return of(ast.parse(text.strip(), mode="eval").body) if len(text) < 200 else None
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError):
        return None


def _open(text: str) -> bool:
    """Is a quotation or an array not closed yet?"""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    array = re.match(rf"\s*(?:\w+\s+)?{NAME}\+?=\(", text)
    return bool(array) and next((depth for _, _, depth in reversed([*_outside(text)])), 0) > 0


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return text.split()


def _expanded(word: str, variables: Mapping[str, Sequence[str]]) -> list[str]:
    """The words that a word becomes; what nobody set stays as $NAME."""
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        if name in variables:
            return " ".join(variables[name])
        return match[2] if match[2] is not None else ("" if name in "@*" else f"${name}")

    whole = REFERENCE.fullmatch(word)
    for _ in range(8):                                          # of variables that name variables
        now = REFERENCE.sub(value, word)
        if now == word:
            break
        word = now
        _bounded([word], "a word")
    return _words(word) if whole or re.search(r"\s--\w", word) else [word]


def _bounded(words: Sequence[str], what: str) -> None:
    if sum(map(len, words)) > LONGEST:
        raise ValueError(f"gives {what} more than {LONGEST:,} letters")


def _until_pipe(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if re.match(r"[|;&]|\d?>", word):
            return
        yield word


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

def as_file(argv: Sequence[str], ranks: int | None = None, defaults: bool = True) -> tuple[str, list[str]]:
    """(the text of a run.toml, lines of a report) of a command line of Megatron's words, with its `defaults`. Raises
    UserError for values that cannot be."""
    told = in_our_words(argv)
    kept, open_ = _without_variables(told.argv)
    config = parse(Config, kept, presets=PRESETS, elsewhere=hint,
                   implied=megatron_defaults if defaults else lambda said: {})
    lines = [*_report(argv, told), *[f"fill in     {word}" for word in open_], *_needs(config, ranks)]
    return toml(config, told.missing, open_), lines


def _without_variables(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags whose values are known, and those that are not."""
    flags: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(word)
    unknown = [flag for flag in flags if any("$" in word for word in flag)]
    return [word for flag in flags if flag not in unknown for word in flag], [" ".join(flag) for flag in unknown]


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
    flags += ["--optimizer", "adam" if kind.startswith("adam") else kind] if kind else []
    flags += BESIDE_RULE.get(kind, "").split()
    curve = CURVES.get(str(keys.get(("scheduler", "type"))))
    flags += ["--lr-decay-style", curve] if curve else []
    read |= {*MORE_OF_DEEPSPEED, *own, ("optimizer", "type"), ("optimizer", "params", "betas"),
             *([("scheduler", "type")] if curve else [])}
    return flags, [".".join(path) for path, value in keys.items()
                   if path not in read or value == "auto" or (path[-1] == "loss_scale" and not value)]


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
    told = [f"{ranks or least} ranks" + ("" if ranks else f", or a multiple: --tp {p.tensor_model_parallel_size} x "
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
