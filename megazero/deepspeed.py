"""python -m megazero.deepspeed COMMAND ...: in COMMAND and all that it starts `import deepspeed` means this engine.

COMMAND is a script, `-m MODULE`, `torchrun ...`, `accelerate launch ...` or any other program; or it begins as that of
DeepSpeed's own launcher: `--num_gpus N script ...`. Under torchrun it stands before the script:
`torchrun --nproc_per_node 2 -m megazero.deepspeed train.py --deepspeed ds_config.json`.
"""

import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from megazero.base import UserError, say
from megazero.settings import run

DOOR = Path(__file__).parent / "door"               # what is put first on PYTHONPATH
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
SAME = {"--num_gpus": "--nproc_per_node", "--num_accelerators": "--nproc_per_node",
        "--master_port": "--master_port", "--master_addr": "--master_addr"}     # of its launcher, as torchrun says it
SWITCHES = ("--module", "--no_local_rank")
RANKED = "--with_local_rank"    # between this door and itself: the script gets --local_rank=N, as of their launcher


def become(words: Sequence[str]) -> None:
    """Becomes the command; does not return. Raises UserError."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, env = commanded(words, _python(), os.environ), entered(os.environ)
    if (beside := installed()) and env.get("RANK", "0") == "0":
        say(f"deepspeed {beside} is installed; in this command `import deepspeed` means MegaZero's engine")
    if _alone(words) and "RANK" not in env:
        env |= one_rank()
    os.execve(command[0], command, env)


def entered(env: Mapping[str, str]) -> dict[str, str]:
    """With the door first on PYTHONPATH."""
    before = env.get("PYTHONPATH")
    rest = [p for p in before.split(os.pathsep) if p != str(DOOR)] if before else []
    return {**env, "PYTHONPATH": os.pathsep.join([str(DOOR), *rest])}


def installed() -> str:
    """The version of DeepSpeed itself, if it is there too."""
    elsewhere = [str(p) for p in sys.path if Path(p) != DOOR]
    return next((d.version for d in distributions(name="deepspeed", path=elsewhere)), "")


def one_rank() -> dict[str, str]:
    """What torchrun would tell one process: libraries ask for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port}


def commanded(words: Sequence[str], python: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The program and its words. Raises UserError."""
    first, *rest = words
    if first == RANKED:
        at = 2 if rest[0] == "-m" else 1
        return commanded([*rest[:at], f"--local_rank={env.get('LOCAL_RANK', '0')}", *rest[at:]], python, env)
    if first == "-m":
        return [*python, *words]
    if first.startswith("-"):
        return [*python, *launched(words)]
    if first in LAUNCHERS:
        return [*python, "-m", LAUNCHERS[first], *rest]
    if _alone(words):
        return [*python, *words]
    program = shutil.which(first)
    if program is None:
        raise UserError(f"{first}: is no file and no program; give a script, torchrun ..., accelerate launch ..., or "
                        "--num_gpus N script.")
    return [program, *rest]


def launched(words: Sequence[str]) -> list[str]:
    """What torchrun is told by the words of DeepSpeed's launcher. Raises UserError."""
    rest, given = list(words), {"--nproc_per_node": "gpu"}
    while rest and rest[0].startswith("-"):
        flag, equal, value = rest.pop(0).partition("=")
        if flag in SWITCHES:
            given[flag] = ""
        elif flag in SAME and (equal or rest):
            given[SAME[flag]] = value if equal else rest.pop(0)
        else:
            raise UserError(f"{flag}: of DeepSpeed's launcher there are {', '.join((*SAME, *SWITCHES))}, and then a "
                            "script; on several machines start torchrun on each.")
    if not rest:
        raise UserError(f"{words[-1]}: no script follows; write --num_gpus N script.")
    module, unranked = ("--module" in given), ("--no_local_rank" in given)
    told = [word for flag, value in given.items() if flag not in SWITCHES for word in (flag, value)]
    return ["-m", LAUNCHERS["torchrun"], *told, *(["--standalone"] if "--master_port" not in given else []),
            "-m", "megazero.deepspeed", *([] if unranked else [RANKED]), *(["-m"] if module else []), *rest]


def _alone(words: Sequence[str]) -> bool:
    """Is it a script of Python's, one process?"""
    path = Path(words[0])
    return words[0] == "-m" or path.is_file() and (path.suffix == ".py" or not os.access(path, os.X_OK))


def _python() -> list[str]:
    """As this one was started, up to its own name."""
    words = sys.orig_argv
    at = words.index("megazero.deepspeed") if "megazero.deepspeed" in words else 2
    return [sys.executable, *words[1:at - 1]]


if __name__ == "__main__":
    run(lambda: become(sys.argv[1:]))
