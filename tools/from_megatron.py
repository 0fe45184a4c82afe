"""Says what a launch of Megatron-LM (or Megatron-DeepSpeed, BigCode, Pai ...) is here, and writes it as a run.toml:

    python tools/from_megatron.py pretrain_gpt3_175b.sh [--output run.toml]
    python tools/from_megatron.py [--output run.toml] -- --num-layers 24 --hidden-size 1024 ...

A script is read, not run: the words of the last command that starts a training program, with the variables that the
script sets. What nobody says has Megatron's defaults (--megatron-defaults)."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, read_bytes, whole
from megazero.settings import as_file, doubtful, option, parse, run, words_of_script


@dataclass(frozen=True)
class Settings:
    """Says what a launch of Megatron-LM is here: kept, renamed, without effect, missing. After `--`: its words."""

    script: str | None = option(None, "launch script of bash", unit="file", word=True)
    output: str = option("run.toml", "file to write, for --config", unit="file")


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    s = parse(Settings, sys.argv[1:at], prog="from_megatron.py")
    words, launcher, unsure = sys.argv[at + 1:], list[str](), list[str]()
    if s.script is None and not words:
        raise UserError("from_megatron.py: name a script, or write the words after --.")
    if s.script is not None and words:
        raise UserError(f"from_megatron.py {s.script}: give a script or words after --, not both.")
    if s.script is not None:
        try:
            script = read_bytes(Path(s.script)).decode()
            (words, launcher), unsure = words_of_script(script), doubtful(script)
        except (OSError, ValueError) as error:
            raise UserError(f"{s.script}: {getattr(error, 'strerror', None) or error}; name a launch script, or write "
                            "its words after --.") from None
    text, lines = as_file(words, ranks_of(launcher))
    with whole(Path(s.output)) as file:
        file.write(text.encode())
    print("\n".join(lines))
    if unsure:
        print(f"look at     {', '.join(unsure)}: set within a condition, which is not asked; all branches are read, "
              "and the last one counts")
    print(f"wrote       {s.output}; look at the plan: python pretrain_gpt.py --config {s.output} --check")


def ranks_of(launcher: list[str]) -> int | None:
    """Of torchrun's words, where they are numbers."""
    words = [part for word in launcher for part in word.replace("_", "-").split("=", 1)]
    counts = [words[i + 1] for flag in ("--nproc-per-node", "--nnodes") for i, w in enumerate(words[:-1]) if w == flag]
    return int(counts[0]) * int(counts[1]) if len(counts) == 2 and all(map(str.isdecimal, counts)) else None


if __name__ == "__main__":
    run(main)
