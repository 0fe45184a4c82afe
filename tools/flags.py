"""Every flag of pretrain_gpt.py as a page, from the dataclasses that are the flags:
python tools/flags.py > docs/flags.md"""

from dataclasses import MISSING

from megazero.settings import PRESETS, REFUSED, RENAMED, WITHOUT, Config, Option, leaves

INTRO = """# Flags

Made by `python tools/flags.py > docs/flags.md`; do not edit. `python pretrain_gpt.py --help` says the same.

A file given with `--config` (`.toml`, `.yaml`, `.json`) holds the same names, with `_` or `-`, \
flat or in tables of any name. Later wins:
defaults, the preset of `--model`, the file, flags. A flag without a value has a `--no-` form, \
which overrides a file. Numbers may be
written `1e6` or `1_000_000`.
"""


def page() -> str:
    """The page in Markdown."""
    groups = [table(title[0].upper() + title[1:], options) for title, options in leaves(Config).items()]
    return "\n".join([INTRO, *groups, presets(), elsewhere()])


def table(title: str, options: list[Option]) -> str:
    rows = [f"| {names(o)} | {value(o)} | {default(o)} | {cell(o.field.metadata['help'])} |" for o in options]
    return "\n".join([f"## {title}\n", "| flag | value | default | what it does |", "|---|---|---|---|", *rows, ""])


def names(o: Option) -> str:
    return " ".join(f"`{flag}`" for flag in (o.flag, *("--" + alias for alias in o.field.metadata["alias"])))


def value(o: Option) -> str:
    if o.kind is bool:
        return ""
    choices, unit = o.field.metadata["choices"], o.field.metadata["unit"]
    one = (", ".join(f"`{c}`" for c in choices) if choices
           else unit or {int: "whole number", float: "number"}.get(o.kind, "word"))
    return cell(one + (" ..." if o.many else ""))


def default(o: Option) -> str:
    given = o.field.default
    if o.kind is bool:
        return "on" if given else ""
    return "" if given in (None, (), MISSING) else f"`{given:g}`" if isinstance(given, float) else f"`{given}`"


def presets() -> str:
    """The rows of --model; what a row does not say keeps its default."""
    rows = [f"| `{name}` | " + " ".join(f"`{said(key, v)}`" for key, v in row.items()) + " |"
            for name, row in PRESETS.items()]
    return "\n".join(["## Presets of `--model`\n", "| preset | stands for |", "|---|---|", *rows, ""])


def said(key: str, v: object) -> str:
    word = key.replace("_", "-")
    return ((f"--{word}" if v else f"--no-{word}") if isinstance(v, bool)
            else f"--{word} {v:g}" if isinstance(v, float) else f"--{word} {v}")


def elsewhere() -> str:
    """The words of Megatron-LM and its kin that are no flags here."""
    def words(row: str) -> str:
        return " ".join(f"`--{word}`" for word in row.split())

    renamed = [f"| `--{word}` | {cell(f'`{new.strip()}`' if new else what)} |" for word, (new, what) in RENAMED.items()]
    without = [f"| {cell(reason)} | {words(row)} |" for reason, row in WITHOUT.items()]
    missing = [f"| {cell(what)} | {words(row)} |" for what, row in REFUSED.items()]
    return "\n".join([
        "## Words of Megatron-LM and its kin\n", "Those that are the same stand above. `*` is any ending.\n",
        "### Said otherwise\n", "| there | here |", "|---|---|", *renamed, "",
        "### Accepted, without effect\n", "| why | words |", "|---|---|", *without, "",
        "### Refused\n", "| what it would change, and what to write | words |", "|---|---|", *missing, ""])


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
