"""Says what a launch of Megatron-LM (or Megatron-DeepSpeed, BigCode, Pai ...) is here, and writes it as a run.toml:

    python tools/from_megatron.py pretrain_gpt3_175b.sh [--output run.toml] [-- what the script is called with]
    python tools/from_megatron.py [--output run.toml] -- --num-layers 24 --hidden-size 1024 ...

A script is read, not run: the words of the last command that starts a training program, with the variables that the
script sets and the conditions on them. What nobody says has Megatron's defaults (--megatron-defaults)."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, read_bytes, whole
from megazero.settings import Launch, as_file, launch_of, option, parse, run

OTHERS = re.compile(r"bert|t5|ict|vision|retro|mamba|hybrid|vlm|multimodal|dino|llava|clip|sft|rlhf|dpo")


@dataclass(frozen=True)
class Settings:
    """Says what a launch of Megatron-LM is here: kept, renamed, without effect, missing. After `--`: its words, or what
    the script is called with."""

    script: str | None = option(None, "launch script of bash", unit="file", word=True)
    output: str = option("run.toml", "file to write, for --config", unit="file")


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    s = parse(Settings, sys.argv[1:at], prog="from_megatron.py")
    launch = Launch(sys.argv[at + 1:], [], {}, "pretrain_gpt.py", 1)
    if s.script is None and not launch.words:
        raise UserError("from_megatron.py: name a script, or write the words after --.")
    if s.script is not None:
        try:
            launch = launch_of(read_bytes(Path(s.script)).decode(), launch.words)
        except (OSError, ValueError) as error:
            raise UserError(f"{s.script}: {getattr(error, 'strerror', None) or error}; name a launch script, or write "
                            "its words after --.") from None
    try:
        text, lines = as_file(launch.words, ranks_of(launch.launcher), files=launch.files)
    except UserError as error:
        where = f"{s.script}: " if s.script else ""
        raise UserError(*(f"{where}{sentence}" for sentence in error.sentences)) from None
    with whole(Path(s.output)) as file:
        file.write(text.encode())
    print("\n".join(lines))
    if s.script is not None and len(sys.argv) == at and re.search(r"\$\{?\d", " ".join(launch.words)):
        print(f"fill in     what {s.script} is called with, behind --: from_megatron.py {s.script} -- ARGUMENT ...")
    for name, value in launch.doubts.items():
        if name.startswith("$"):
            print(f"in doubt    {name} is taken as {value}")
    for asked in dict.fromkeys(why for name, why in launch.doubts.items() if not name.startswith("$")):
        names = [name for name, why in launch.doubts.items() if why == asked and not name.startswith("$")]
        print(f"in doubt    {asked}, which only your machine knows, is taken as so: it sets {', '.join(names)}")
    if other := OTHERS.search(Path(launch.program).name):
        print(f"in doubt    {s.script} starts {launch.program}: this program trains decoders on text, and no "
              f"{other[0]}; what its words say of one is planned")
    if launch.programs > 1:
        print(f"in doubt    {s.script} starts {launch.programs} programs; the last one is taken")
    print(f"wrote       {s.output}; look at the plan: python pretrain_gpt.py --config {s.output} --check")


def ranks_of(launcher: list[str]) -> int | None:
    """Of the words of torchrun or deepspeed, where they are numbers; one node where none are counted."""
    words = [part for word in launcher for part in word.replace("_", "-").split("=", 1)]
    said = dict(zip(words, words[1:], strict=False))
    each, nodes = (next((said[flag] for flag in flags if flag in said), None)
                   for flags in (("--nproc-per-node", "--num-gpus", "--ntasks", "-np"), ("--nnodes", "--num-nodes")))
    return int(each) * int(nodes or 1) if each and each.isdecimal() and (nodes or "1").isdecimal() else None


if __name__ == "__main__":
    run(main)
