"""Writes what a ds_config.json says as a run.toml for pretrain_gpt.py:

    python tools/from_deepspeed.py ds_config.json [--output run.toml]

A module of your own needs no such file: megazero.initialize(model=..., config="ds_config.json") reads it as it is."""

import json
from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, read_bytes, whole
from megazero.settings import as_file, from_configuration, option, parse, run


@dataclass(frozen=True)
class Settings:
    """Says what a ds_config.json is here: keys that became flags, and those that are for megazero.initialize alone."""

    file: str = option(help="a ds_config.json", unit="file", word=True)
    output: str = option("run.toml", "file to write, for --config", unit="file")


def main() -> None:
    s = parse(Settings, prog="from_deepspeed.py")
    try:
        said = json.loads(read_bytes(Path(s.file)))
        words, others = from_configuration(said)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{s.file}: {getattr(error, 'strerror', None) or error}; name a ds_config.json.") from None
    text, lines = as_file(words, defaults=False)
    with whole(Path(s.output)) as file:
        file.write(text.encode())
    print("\n".join(lines))
    if others:
        print(f"not in it   {', '.join(others)}: for megazero.initialize (docs/deepspeed.md says what each does there)")
    print(f"wrote       {s.output}; it lacks the model and its data: see python pretrain_gpt.py --help")


if __name__ == "__main__":
    run(main)
