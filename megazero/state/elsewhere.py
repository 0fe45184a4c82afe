"""What somebody else's checkpoint is, told by the names of its files alone: none is opened but the note of a step."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megazero.base import UserError, read_bytes

LEGACY = "mp_rank_[0-9][0-9]*/model"


class Format(NamedTuple):
    """`signs` are patterns of files that only this one has. `above` is the pattern of its folders in one that holds
    several, which names the newest in the file `note`."""

    name: str
    what: str
    signs: tuple[str, ...]
    above: str = ""
    note: str = ""


# the first that fits counts
FORMATS = (
    Format("torch_dist", "a checkpoint of Megatron-core (torch_dist)", ("common.pt",), "iter_*",
           "latest_checkpointed_iteration.txt"),
    Format("megatron", "a checkpoint of Megatron-LM (legacy, mp_rank_*)",
           (f"{LEGACY}_optim_rng.pt", f"{LEGACY}_rng.pt"), "*", "latest_checkpointed_iteration.txt"),
    Format("universal", "a universal checkpoint of DeepSpeed", ("zero/*/fp32.pt",), "*", "latest_universal"),
    Format("deepspeed", "a checkpoint of DeepSpeed", ("*mp_rank_*_states.pt",), "*", "latest"),
    Format("dcp", "a distributed checkpoint of torch (DCP, as torchtitan's)", (".metadata",), "step-*"),
    Format("bin", "a Hugging Face folder of pickled weights", ("pytorch_model*.bin",)),
    Format("nanogpt", "a checkpoint of nanoGPT", ("ckpt.pt",)),
    Format("hf", "a Hugging Face folder", ("model*.safetensors",)),
)
FILES = {f.name: f for f in FORMATS}["nanogpt"]         # the one that is a file


def recognised(path: Path) -> tuple[Format, Path] | None:
    """Whose checkpoint this is, and the folder or file that holds it: `path`, or the newest below it."""
    if os.path.isfile(path):
        return (FILES, path) if path.suffix in (".pt", ".pth") else None
    if not os.path.isdir(path):
        return None
    for kind in FORMATS:
        for folder in (path, *_below(path, kind)):
            for sign in kind.signs:
                if (found := next(folder.glob(sign), None)) is not None:
                    return kind, found if kind == FILES else folder
    return None


def _below(path: Path, kind: Format) -> Iterator[Path]:
    """The folder that its note names, or all of them, the newest first."""
    try:
        noted = read_bytes(path / kind.note, 200).decode().strip() if kind.note else ""
    except (OSError, ValueError):
        noted = ""
    named = [path / name for name in (noted, f"iter_{noted:0>7}") if noted and "/" not in noted]
    if not noted and kind.above:
        named = sorted(path.glob(kind.above), key=lambda p: (len(p.name), p.name), reverse=True)
    yield from (p for p in named if p.is_dir())


def foreign(path: Path, flag: str) -> UserError | None:
    """That a folder holds somebody else's checkpoint, and the command that imports it; None if it does not."""
    found = recognised(path)
    if found is None:
        return None
    tool = "convert_hf.py" if found[0].name == "hf" else "convert_checkpoint.py"
    return UserError(f"{flag} {path}: is {found[0].what}; import it first: python tools/{tool} "
                     f"import --input {path} --output NEW_FOLDER.")
