"""PREFIX.json beside a dataset: what its two binary files cannot say of themselves.

    tokenizer         identity: type, vocab_size, eod, sha256 of its files
    vocab_size        ids are below it
    append_eod        does every document end with the tokenizer's end of document?
    documents, sequences, tokens, skipped
    sums              CRC-32 of each block of `block` bytes: {"block": 67108864, "bin": [...], "idx": [...]}
    sources           [path, bytes] of each file, or what --input said when there are more than MANY
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megazero.base import UserError
from megazero.data.files import is_remote, system
from megazero.data.indexed import SUMMED, Sums
from megazero.data.tokenizers import same_tokenizer

MANY = 1000                     # files: beyond, their list would be longer than many a dataset's index


def sums_of(path: str) -> list[int]:
    """CRC-32 of each block of a file."""
    sums = Sums()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            sums.update(data)
    return sums.sums


def sums(prefix: str, of_bin: Sequence[int]) -> dict[str, Any]:
    """The sidecar's `sums` of a finished dataset."""
    return {"block": SUMMED, "bin": list(of_bin), "idx": sums_of(f"{prefix}.idx")}


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """What PREFIX.json says; None where there is none. Raises UserError when it is no sidecar."""
    path = f"{prefix}.json"
    try:
        if is_remote(path):
            fs, there = system(path)
            text = fs.cat_file(there).decode() if fs.exists(there) else None
        else:
            text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else None
        sidecar = None if text is None else json.loads(text)
        if sidecar is not None:
            int(sidecar["vocab_size"])
        return sidecar
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: is no sidecar with a vocab_size; "
                        "make the dataset again or remove this file.") from None


def check_sidecar(prefix: str, vocab_size: int | None, tokenizer: Mapping[str, Any] | None) -> bool:
    """Is there one? Raises UserError when it tells of ids the model does not know, or of another tokenizer."""
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return False
    told, made_with, name = int(sidecar["vocab_size"]), sidecar.get("tokenizer"), Path(prefix).name + ".json"
    if vocab_size is not None and told > vocab_size:
        raise UserError(f"{prefix}: was made with a vocabulary of {told} ids (see {name}), the model has {vocab_size}; "
                        "train with the tokenizer the dataset was made with.")
    if tokenizer is not None and isinstance(made_with, dict) and not same_tokenizer(made_with, tokenizer):
        raise UserError(f"{prefix}: was made with a {made_with.get('type')} that is not this {tokenizer['type']} "
                        f"(see {name}: other files or another type); "
                        "train with the tokenizer the dataset was made with.")
    return True


