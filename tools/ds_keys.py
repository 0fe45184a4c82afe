"""Every key of ds_config.json as a page, from the table that judges them:
python tools/ds_keys.py > docs/deepspeed.md"""

from itertools import groupby

from megazero.engine import HONOURED, MUST, TABLE, Key, form_of

INTRO = """# ds_config.json

Made by `python tools/ds_keys.py > docs/deepspeed.md`; do not edit.

`megazero.initialize(model=model, config=...)` has DeepSpeed's signature and returns its four values: engine,
optimizer, loader, scheduler. `config` is a mapping, the path of a file, or base64 for URLs. A file is JSON; comments
(`//`, `#`, `/* */`) and a comma before a closing bracket may stand in it. Each key is honoured, or has no effect here
(one line at start names those that were given, and says why), or is refused with a sentence. A key that is not in this
table is an error, at any depth, and so are one that stands twice and `"auto"`, which only a trainer fills in. Defaults
are those of DeepSpeed 0.19.8.

Gradients are summed in fp32 at every level and in every dtype. A step that was skipped does not move the scheduler.
"""


def page() -> str:
    """The page in Markdown."""
    blocks = groupby(TABLE, key=lambda key: key.path.split(".")[0] if "." in key.path else "")
    named: dict[str, list[Key]] = {}
    for block, keys in blocks:
        named.setdefault(block, []).extend(keys)
    return "\n".join([INTRO, *(table(block, keys) for block, keys in named.items())])


def table(block: str, keys: list[Key]) -> str:
    title = f"## `{block}`\n" if block else "## At the top\n"
    return "\n".join([title, "| key | value | default | here | |", "|---|---|---|---|---|", *map(row, keys), ""])


def row(key: Key) -> str:
    of = f" ({', '.join(key.of.split('|'))})" if key.of else ""
    kind = key.kind if key.kind == HONOURED else f"*{key.kind}*"
    cells = (f"`{key.path}`{of}", form_of(key), default(key), kind, key.what)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default(key: Key) -> str:
    if key.default is None:
        return ""
    if key.default == MUST or isinstance(key.default, bool):
        return key.default if isinstance(key.default, str) else str(key.default).lower()
    return f"`{key.default:g}`" if isinstance(key.default, float) else f"`{key.default}`"


if __name__ == "__main__":
    print(page(), end="")
