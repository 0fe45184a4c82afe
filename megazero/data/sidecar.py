"""PREFIX.json beside a dataset: what its two binary files cannot say of themselves.

    tokenizer         identity: type, vocab_size, eod, sha256 of its files
    vocab_size        ids are below it
    append_eod        does every document end with the tokenizer's end of document?
    documents, sequences, tokens, skipped
    sums              CRC-32 of each block of `block` bytes: {"block": 67108864, "bin": [...], "idx": [...]}
    sources           [path, bytes] of each file, or what --input said when there are more than MANY
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megazero.base import Form, UserError, checked, loads
from megazero.data.files import content
from megazero.data.indexed import COUNT, CRC, SUMMED, IndexedDataset, Sums
from megazero.data.tokenizer_base import IDENTITY
from megazero.data.tokenizers import same_tokenizer

SIDECAR: Form = {"tokenizer?": (None, IDENTITY), "vocab_size": range(1, 2**31), "append_eod?": (None, bool),
                 "input_format?": str, "documents?": COUNT, "sequences?": COUNT, "tokens?": COUNT, "skipped?": COUNT,
                 "sums?": {"block": COUNT, "bin": [CRC], "idx": [CRC]}, "sources?": [(str, [(str, COUNT)])]}
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
        return checked(loads(content(path)), SIDECAR)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no sidecar ({getattr(error, 'strerror', None) or error}); "
                        "make the dataset again or remove this file.") from None


def check_sidecar(prefix: str, vocab_size: int | None, tokenizer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The sidecar. Raises UserError when it tells of ids the model does not know, or of another tokenizer."""
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return None
    told, made_with, name = sidecar["vocab_size"], sidecar.get("tokenizer"), Path(prefix).name + ".json"
    if vocab_size is not None and told > vocab_size:
        raise UserError(f"{prefix}: was made with a vocabulary of {told} ids (see {name}), the model has {vocab_size}; "
                        "train with the tokenizer the dataset was made with.")
    if tokenizer is not None and made_with is not None and not same_tokenizer(made_with, tokenizer):
        raise UserError(f"{prefix}: was made with a {made_with['type']} that is not this {tokenizer['type']} "
                        f"(see {name}: other files or another type); "
                        "train with the tokenizer the dataset was made with.")
    return sidecar


def miscounts(dataset: IndexedDataset, sidecar: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each count in which a dataset's sidecar is not its own."""
    there = {"documents": dataset.document_count, "sequences": dataset.sequence_count, "tokens": dataset.token_count}
    for name, count in there.items():
        if sidecar.get(name, count) != count:
            yield (f"{dataset.prefix}.json: tells of {sidecar[name]} {name}, {dataset.prefix}.idx of {count}; "
                   "they belong to different datasets, make them again.")
