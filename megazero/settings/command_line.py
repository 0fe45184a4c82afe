"""Frozen dataclasses as command lines and as files: the same fields, the same words, the same errors.

A field becomes `--its-name`; a field that is a dataclass becomes a group of the help whose fields are flags of their
own (names are flat and unique). A file (TOML, YAML or JSON) holds the same keys, flat or in tables; flags override
the file.

    bool field, default False      --flag, and --no-flag to override a file
    bool field, default True       --no-flag
    tuple field                    --flag A B C
    X | None                       as X; None means "not said"
    option(..., word=True)         also without its flag, as one of the first words
"""

import argparse
import difflib
import itertools
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megazero.base import UserError, load, said

T = TypeVar("T")
Elsewhere = Callable[[str], str | None]
LONGEST = 2**16             # bytes of a configuration file; its parsers are slow beyond


def option(
    default: Any = MISSING, help: str = "", *, choices: Sequence[str] | None = None, alias: Sequence[str] = (),
    unit: str = "", word: bool = False,
) -> Any:
    """A dataclass field with what the command line needs to know of it. Without a default it must be given."""
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "alias": tuple(alias), "unit": unit,
                "word": word}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One leaf field of a settings dataclass, as the command line sees it."""

    name: str
    kind: type
    many: bool
    field: Field[Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def leaves(cls: type) -> dict[str, list[Option]]:
    """The options of a settings dataclass by group title; the class's own fields come first."""
    hints, own, groups = typing.get_type_hints(cls), [], {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            title = (hints[f.name].__doc__ or f.name).strip().splitlines()[0].rstrip(".")
            groups[title] = [o for part in leaves(hints[f.name]).values() for o in part]
        else:
            kind, many = _kind(hints[f.name])
            own.append(Option(f.name, kind, many, f))
    return ({"general": own} if own else {}) | groups


def parse(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None, elsewhere: Elsewhere = lambda _: None,
    errors: Sequence[str] = (), implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda said: {},
) -> T:
    """The settings that `argv` (default: the process's) asks for.

    Later wins: defaults, then what is `implied` by what was said, the row of `presets` named by `--model`, the file
    named by `--config`, flags.
    `elsewhere` says of words that are no flags here what to write instead; `errors` is what is known to be wrong.
    Raises UserError with one sentence per mistake.
    """
    options = {o.name: o for group in leaves(cls).values() for o in group}
    given, wrong = _read_flags(cls, options, _flagged(options, sys.argv[1:] if argv is None else argv),
                               prog, elsewhere)
    errors = [*errors, *wrong]
    from_file: dict[str, Any] = {}
    if "config" in given:
        try:
            from_file = read_file(Path(given["config"]), options, elsewhere)
        except UserError as error:
            errors += error.sentences
    model = given.get("model", from_file.get("model"))
    preset: Mapping[str, Any] = {}
    if presets is not None and model is not None:
        if model in presets:
            preset = presets[model]
        else:
            errors.append(f"--model {model}: no such preset{nearest(model, presets)}; there are {', '.join(presets)}.")
    values = {**preset, **from_file, **given}
    values = {**implied(values), **values}
    missing = [o.flag for o in options.values() if o.name not in values and o.field.default is MISSING
               and not any(sentence.startswith(f"{o.flag} ") for sentence in errors)]
    errors += [f"{flag} is missing: {_help_of(options, flag)}" for flag in missing]
    if errors:
        raise UserError(*errors)
    return build(cls, values)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from flat values; what is not named keeps its default. Raises UserError for what is no name of it.
    """
    unknown = sorted(values.keys() - {o.name for group in leaves(cls).values() for o in group})
    if unknown:
        raise UserError(f"--{', --'.join(unknown).replace('_', '-')}: is not known here; leave it out, "
                        "or take the version that wrote it.")
    return _nested(cls, values)


def _nested(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    chosen = {f.name: _nested(hints[f.name], values) if is_dataclass(hints[f.name]) else _frozen(values[f.name])
              for f in fields(cls)  # type: ignore[arg-type]
              if is_dataclass(hints[f.name]) or f.name in values}
    return cls(**chosen)


def _frozen(value: Any) -> Any:
    """Lists of a file are tuples of settings."""
    return tuple(value) if isinstance(value, list) else value


def flatten(settings: Any) -> dict[str, Any]:
    """The flat values of a settings dataclass: what `build` takes, tuples as lists, ready for JSON."""
    out: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        out |= flatten(value) if is_dataclass(value) else {f.name: list(value) if isinstance(value, tuple) else value}
    return out


def read_file(path: Path, options: Mapping[str, Option], elsewhere: Elsewhere = lambda _: None) -> dict[str, Any]:
    """The values a TOML, YAML or JSON file gives, flat, checked against the options. Raises UserError."""
    try:
        data = load(path, most=LONGEST)
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}); name a .toml, .yaml or .json file.") from None
    except ValueError as error:
        raise UserError(
            f"--config {path}: is not valid {path.suffix[1:].upper()} ({' '.join(str(error).split())}).") from None
    names = {alias.replace("-", "_"): o.name
             for o in options.values() for alias in (o.name, *o.field.metadata.get("alias", ()))}
    values: dict[str, Any] = {}
    errors: list[str] = []
    for key, value in _flat_items(data):
        name = names.get(key.replace("-", "_"))
        if name is None:
            hint = elsewhere(key.replace("_", "-"))
            errors.append(f"--config {path}: {key} {hint}." if hint else
                          f"--config {path}: no such key {said(key)}{nearest(key.replace('-', '_'), names)}.")
        elif name in values:
            errors.append(f"--config {path}: {key!r} is given twice; keep one.")
        elif name == "config":
            errors.append(f"--config {path}: a file cannot name another with {key!r}; put its keys here.")
        elif value is None:
            continue                                            # YAML's null and JSON's: not said
        else:
            try:
                values[name] = _typed(options[name], value)
            except ValueError as error:
                errors.append(f"--config {path}: {key} = {said(value)}: {error}.")
    if errors:
        raise UserError(*errors)
    return values


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """' (did you mean X?)' for the word that a mistyped one must mean, or nothing: a flag that differs in a number or
    in a whole part means something else."""
    words, bare = list(words), word.strip("-")
    flags = word.startswith("--")
    close = [w for w in difflib.get_close_matches(word, words, n=3, cutoff=0.8 if flags else 0.7)
             if not flags or _alike(word, w)]
    within = [w for w in sorted(words, key=len) if len(bare) > 3 and re.search(rf"(^|[-_ .]){re.escape(bare)}$", w)]
    found = close[:1] or within[:1 if len(within) == 1 or not flags else 0]
    return f" (did you mean {found[0]}?)" if found else ""


def _alike(word: str, other: str) -> bool:
    """Are they the same numbers, and as many parts, each of which could be a slip of the other's?"""
    parts, others = (re.split(r"[-_ ]", w.strip("-").lower()) for w in (word, other))
    slips = [difflib.SequenceMatcher(None, a, b).ratio() > 0.7 for a, b in zip(parts, others, strict=False)]
    return (re.findall(r"\d+", word) == re.findall(r"\d+", other)
            and ("".join(parts) == "".join(others) or len(parts) == len(others) and all(slips)))


def flagged(name: str, value: Any) -> str:
    """A field's value as a command line says it."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {flag}"
    words = value if isinstance(value, (list, tuple)) else [value]
    return flag if value is True else " ".join([flag, *(shlex.quote(str(word)) for word in words)])


def commands(prog: str, doc: str, table: Mapping[str, tuple[type[Any], Callable[[Any], None]]]) -> None:
    """A tool of several commands: the first word chooses (settings, what to do with them). Raises UserError."""
    word, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if word in ("-h", "--help"):
        print(doc)
    elif word in table:
        settings, do = table[word]
        do(parse(settings, argv, prog=f"{prog} {word}"))
    else:
        raise UserError(f"{prog} {word}".rstrip() + f": write {' or '.join(table)}{nearest(word, table)}.")


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program's main: a user's mistakes are printed once each, without a traceback, and exit with code 2."""
    try:
        main()
    except UserError as error:
        for sentence in error.sentences:
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                       # `... | head` closed our output: not worth a traceback
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:
        print(f"error: out of memory ({error})".replace(" ()", ""), file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _kind(hint: Any) -> tuple[type, bool]:
    """(element type, is a tuple) of a field's annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _flagged(options: Mapping[str, Option], argv: Sequence[str]) -> list[str]:
    """The first words with the flags they are short for."""
    first = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    named = list(zip([o.flag for o in options.values() if o.field.metadata.get("word")], first, strict=False))
    return [*(part for pair in named for part in pair), *argv[len(named):]]


class _Parser(argparse.ArgumentParser):
    """argparse that raises its complaint instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        flag = re.match(r"argument (\S+?)(?:/\S+)*: (.*)", message)
        raise UserError(f"{flag[1]}: {flag[2]}." if flag else message[0].upper() + message[1:] + ".")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)


def _read_flags(
    cls: type, options: Mapping[str, Option], argv: list[str], prog: str | None, elsewhere: Elsewhere
) -> tuple[dict[str, Any], list[str]]:
    parser = _Parser(prog=prog, usage="%(prog)s [flags]", description=(cls.__doc__ or "").strip(),
                     formatter_class=_Help, allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    for title, members in leaves(cls).items():
        group = parser.add_argument_group(title)
        if len(parser._action_groups) == 3:                     # argparse's own two groups, and our first
            group.add_argument("-h", "--help", action="help", help="show this and exit")
        for o in members:
            _add(group, o)
    given, unknown = parser.parse_known_args(argv)
    flags = [s for a in parser._actions for s in a.option_strings]
    switches = {s for a in parser._actions if a.nargs == 0 for s in a.option_strings}
    errors = [_unknown(word.split("=")[0], flags, elsewhere, argv[argv.index(word) - 1], switches)
              for word in unknown if word.startswith("--") or not _after_unknown(word, unknown)]
    values: dict[str, Any] = {}
    for name, value in vars(given).items():
        try:
            values[name] = _typed(options[name], value)
        except ValueError as error:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            errors.append(f"{options[name].flag} {shown}: {error}.")
    return values, errors


def _unknown(word: str, flags: list[str], elsewhere: Elsewhere, before: str, switches: Collection[str]) -> str:
    """What to say of a word that no flag takes; `before` it stands a word that may be one of `switches`."""
    if not word.startswith("-") and before in switches:
        plain = before.removeprefix("--no-").removeprefix("--")
        return f"{before} {word}: takes no value; write --{plain}, or --no-{plain}."
    if word.startswith("--") and re.search(r"\s", word):
        return f"{word!r}: is one word; leave out the quotation marks around a flag and its value."
    if word.startswith("--") and (hint := elsewhere(word[2:])):
        return f"{word} {hint}."
    return (f"{word}: no such flag{nearest(word, flags)}." if word.startswith("-")
            else f"{word}: belongs to no flag; see --help.")


def _after_unknown(word: str, unknown: list[str]) -> bool:
    """Is this word the value of an unknown flag, which has its sentence already?"""
    at = unknown.index(word)
    return any(w.startswith("--") for w in unknown[:at])


def _add(group: Any, o: Option) -> None:
    flags = [o.flag, *("--" + a for a in o.field.metadata.get("alias", ()))]
    meta = o.field.metadata
    if o.kind is bool:
        group.add_argument(*flags, dest=o.name, action=argparse.BooleanOptionalAction, help=_help(o))
        return
    shape = {"nargs": "+"} if o.many else {}
    metavar = ("{" + ",".join(meta["choices"]) + "}" if meta.get("choices")
               else (meta.get("unit") or o.kind.__name__).upper())
    group.add_argument(*flags, dest=o.name, metavar=metavar, help=_help(o), **shape)


def _help(o: Option) -> str:
    text = (o.field.metadata.get("help", "").replace("%", "%%")
            + ("; its flag may be left out" if o.field.metadata.get("word") else ""))
    default = o.field.default
    if default is MISSING:
        return f"{text} (required)"
    if default is None or default == () or (o.kind is bool and default is False):
        return text
    return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _help_of(options: Mapping[str, Option], flag: str) -> str:
    text = options[flag[2:].replace("-", "_")].field.metadata.get("help", "")
    return text.rstrip(".") + "."


def _typed(o: Option, value: Any) -> Any:
    """The value as the field's type. Raises ValueError saying what was expected."""
    if o.many:
        return tuple(_one(o, v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    return _one(o, value)


def _one(o: Option, value: Any) -> Any:
    choices = o.field.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    if o.kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if isinstance(value, bool):
        raise ValueError(f"must be {_article(o.kind)}, not true or false")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"must be {_article(o.kind)}, not a {type(value).__name__}")
    token = o.field.metadata.get("unit") == "token"             # those may be anything
    if isinstance(value, str) and not token and re.search(r"[\0-\x1f\x7f-\x9f]", value):
        raise ValueError("must not hold characters that control a terminal or end a name")
    try:
        if o.kind is int:
            return _integer(value)
        return o.kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {_article(o.kind)}") from None


def _integer(value: Any) -> int:
    """An int, also from 1e6 or 1_000_000; never from 1.5."""
    number = float(value) if isinstance(value, float) or "e" in str(value).lower() else int(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a word"}.get(kind, kind.__name__)


def _flat_items(data: Mapping[str, Any]) -> typing.Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat_items(value)
        else:
            yield str(key), value
