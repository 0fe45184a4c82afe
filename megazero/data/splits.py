"""What the configuration says of its data, opened: one source of samples for each split."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from megazero.base import UserError, read_bytes
from megazero.data.dataset import MockSamples, Reading, SampleSource, open_stages
from megazero.data.fim import FillInTheMiddle
from megazero.data.tokenizers import Tokenizer, build_tokenizer
from megazero.plan import Plan, Sizes
from megazero.settings import Config, Data

Stages = list[tuple[int, Sequence[str]]]        # (first sample, words of --data-path)
SIGN = r"""\\.|"(?:\\.|[^"\\])*"|'[^']*'|[^\s"'\\#]"""       # a letter of a word, as a shell sees it
WORDS = re.compile(rf"(?:\s*(?:{SIGN})(?:{SIGN}|#)*)*\s*")      # up to a comment


def samples(plan: Plan, which: str, tokenizer: Tokenizer | None) -> SampleSource:
    """The samples of a split ("train", "valid", "test"), as the configuration says. Raises UserError."""
    d, a = plan.config.data, plan.architecture
    if d.mock_data:
        return MockSamples(a.vocab_size, a.seq_length, plan.config.training.seed, which)
    return _opened(plan, which, stages_of(d, which, plan), tokenizer)


def evaluated(plan: Plan, which: str, tokenizer: Tokenizer | None) -> dict[str, SampleSource]:
    """What an evaluation takes of a split, under the name of its loss: all of it, or each set for itself. Raises
    UserError."""
    d = plan.config.data
    own = {"valid": d.valid_data_path, "test": d.test_data_path}[which]
    if not (own and d.multiple_validation_sets):
        return {which: samples(plan, which, tokenizer)}
    names = [Path(prefix).name for prefix in own]
    names = names if len(set(names)) == len(names) else [*own]
    return {f"{which}/{name}": _opened(plan, which, (f"--{which}-data-path", [(0, [prefix])], False), tokenizer)
            for name, prefix in zip(names, own, strict=True)}


def _opened(plan: Plan, which: str, said: tuple[str, Stages, bool], tokenizer: Tokenizer | None) -> SampleSource:
    d, a, seed = plan.config.data, plan.architecture, plan.config.training.seed
    flag, stages, is_cut = said
    reading = Reading(a.seq_length, seed, d.shuffle, d.sample_order == "megatron", asked_for(plan, which))
    identity = tokenizer.identity() if tokenizer else None
    opened = open_stages(stages, d.split if is_cut else None, which, reading, a.vocab_size, flag, identity)
    if which != "train" or not d.fim_rate:
        return opened
    assert tokenizer is not None, "the checks ask for one"
    names = (d.fim_prefix_token, d.fim_middle_token, d.fim_suffix_token)
    return FillInTheMiddle(opened, tokenizer, seed, d.fim_rate, d.fim_spm_rate, names)


def stages_of(d: Data, which: str, sizes: Sizes) -> tuple[str, Stages, bool]:
    """(flag, its stages, is it cut by --split?) of the data of a split. Raises UserError."""
    own = {"train": d.train_data_path, "valid": d.valid_data_path, "test": d.test_data_path}[which]
    if own:
        return f"--{which}-data-path", [(0, own)], False
    if d.data_schedule is not None:
        return f"--data-schedule {d.data_schedule}", read_schedule(d.data_schedule, sizes), False
    if d.data_args_path is not None:
        return f"--data-args-path {d.data_args_path}", [(0, _words("--data-args-path", d.data_args_path))], True
    return "--data-path", [(0, d.data_path)], True


def read_schedule(path: str, sizes: Sizes) -> Stages:
    """The stages of a --data-schedule file: lines of `STEP WEIGHT PREFIX WEIGHT PREFIX ...`, the first of step 0.
    Raises UserError."""
    stages: Stages = []
    for number, line in enumerate(_text("--data-schedule", path).splitlines(), start=1):
        step, *words = _cut("--data-schedule", path, line) or [""]
        if not step:
            continue
        after = sizes.step_of(stages[-1][0]) if stages else -1
        if not step.isdecimal() or len(step) > 18 or int(step) <= after or (not stages and int(step)) or not words:
            expected = f"a step after {after}" if stages else "step 0"
            raise UserError(f"--data-schedule {path}: line {number} should be {expected} and the words of --data-path "
                            "from that step on, such as `0 0.7 web 0.3 code`.")
        stages.append((sizes.samples_of(int(step)).start, words))
    if not stages:
        raise UserError(f"--data-schedule {path}: holds no stage; write lines such as `0 0.7 web 0.3 code`.")
    return stages


def _words(flag: str, path: str) -> list[str]:
    """The words of a file, as a shell would cut them; # begins a comment."""
    return [word for line in _text(flag, path).splitlines() for word in _cut(flag, path, line)]


def _cut(flag: str, path: str, line: str) -> list[str]:
    """The words of a line; a word that begins with # begins a comment. Raises UserError."""
    words = WORDS.match(line)
    assert words is not None, "none are enough"
    try:
        return shlex.split(words[0] if line[words.end():].startswith("#") else line)
    except ValueError as error:
        raise UserError(f"{flag} {path}: cannot be cut into words ({error}) at {line.strip()!r}; "
                        "quote a path with such a sign.") from None


def _text(flag: str, path: str) -> str:
    try:
        return read_bytes(Path(path)).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: cannot be read (is not UTF-8).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def asked_for(plan: Plan, which: str) -> int:
    """Samples that Megatron asks of a split; see megatron_order.py."""
    if which == "train":
        return plan.samples_of(plan.train_iters).start
    t = plan.config.training
    evaluations = plan.train_iters // t.eval_interval + 1 if which == "valid" else 1
    return evaluations * t.eval_iters * plan.global_batch


def configured_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that a configuration names; None where nothing needs it. Raises UserError."""
    d = config.data
    of_documents = [name for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
                    if getattr(d, name)]
    if d.tokenizer_type is None or (d.mock_data and d.vocab_size is not None and not of_documents):
        return None
    # for the others --vocab-size is the model's, which may be larger
    null = d.tokenizer_type == "NullTokenizer"
    tokenizer = build_tokenizer(d.tokenizer_type, d.tokenizer_model, d.vocab_file, d.merge_file,
                                d.vocab_size if null else None, d.eod_token, d.special_tokens)
    if d.vocab_size is not None and d.vocab_size < tokenizer.vocab_size and not null:
        raise UserError(f"--vocab-size {d.vocab_size}: is less than the {tokenizer.vocab_size} ids of the tokenizer; "
                        "leave it out, or write at least that.")
    for name in of_documents:
        if tokenizer.eod is None:
            raise UserError(f"--{name.replace('_', '-')}: {d.tokenizer_type} has no end-of-document token; "
                            "name one with --eod-token, or leave it out.")
    return tokenizer
