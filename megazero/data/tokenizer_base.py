"""What every tokenizer can do, and what their files have in common."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megazero.base import Form, UserError, loads, printable, read_bytes

# what `identity` says of a tokenizer
IDENTITY: Form = {"type": re.compile(r"\w{1,60}"), "vocab_size": range(1, 2**31), "eod": (None, range(2**31)),
                  "files": {str: re.compile("[0-9a-f]{64}")}, "special_tokens?": [str]}
END_OF_TEXT = "<|endoftext|>"
USUAL_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


class Tokenizer(ABC):
    """What every type can do."""

    # the constructor's parameters (flags) -> the name a checkpoint keeps the file by
    needs: ClassVar[Mapping[str, str]] = {}
    vocab_size: int                              # ids are 0 .. vocab_size - 1
    eod: int | None                              # the id that ends a document, if there is one: --eod-token, or known
    bos: int | None = None                       # the id that begins every text, if there is one
    special_tokens: tuple[str, ...] = ()         # names that a flag gave, where the file has none
    longest: ClassVar[int] = 2**24               # bytes of a text that it encodes in a gigabyte

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Raises UserError for a text this vocabulary cannot say."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    def encode_flat(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts back to back [ids], how many each text has [texts]); preprocessing calls nothing else."""
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum())), lengths

    def id_of(self, name: str) -> int | None:
        """The id that a special token's name becomes, if it becomes one id."""
        ids = self.encode_batch([name])[0]
        return ids[0] if len(ids) == 1 else None

    def words(self) -> dict[str, Any]:
        """The content of a tokenizer.json that gives the same ids, as far as we know: try it.
        Raises UserError where there is none."""
        raise UserError(f"a tokenizer.json cannot say what a {type(self).__name__} does")

    def files(self) -> dict[str, Path]:
        """The files it was made from, under the names a checkpoint keeps them by; see `load_tokenizer`."""
        return {}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {name: _digest(path) for name, path in self.files().items()}

    def identity(self) -> dict[str, Any]:
        """What tells it from others, ready for JSON: type, vocab_size, eod, sha256 of each file; special_tokens where a
        flag gave some."""
        return {"type": type(self).__name__, "vocab_size": self.vocab_size, "eod": self.eod, "files": self._hashes,
                **({"special_tokens": list(self.special_tokens)} if self.special_tokens else {})}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no file of a tokenizer ({error}); repair or remove it.") from None


@contextmanager
def told(what: str, instead: str) -> Iterator[None]:
    """Whatever a library raises, a bare Exception or a panic, which is none, as a sentence: what, what the library
    says, and what to do instead."""
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, (UserError, MemoryError))
        if ours or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise UserError(f"{what} ({printable(str(error))}); {instead}.") from None


class LibraryTokenizer(Tokenizer):
    """One that rides on a library, which may find only while it cuts a text that a file makes no sense."""

    _flag: ClassVar[str] = "--tokenizer-model"
    _path: Path

    def _cutting(self) -> AbstractContextManager[None]:
        return told(f"{self._flag} {self._path}: cannot cut a text", "take the file as it was published")


def flattened(ids: Sequence[np.ndarray], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What `encode_flat` gives, from the ids of each text."""
    return (np.concatenate([np.empty(0, dtype), *ids], dtype=dtype, casting="unsafe"),
            np.fromiter(map(len, ids), np.int64, len(ids)))


def is_text(word: str) -> bool:
    """Has it an UTF-8? Half a character has none, nor has a byte of the command line that is no text."""
    return word.encode(errors="ignore").decode() == word


def existing(flag: str, path: str, what: str, folder: bool = False) -> Path:
    """The file that a flag names. Raises UserError when it is not there."""
    if os.path.isfile(path) or (folder and os.path.isdir(path)):
        return Path(path)
    other = flags_for(Path(path)) if os.path.isdir(path) else None
    if other is not None:
        raise UserError(f"{flag} {path}: is a folder; write {other}, or give {what}.")
    raise UserError(f"{flag} {path}: no such file; give {what}.")


def flags_for(path: Path) -> str | None:
    """The flags for a tokenizer that a folder holds, or that a file is by its name; None if we see none."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    for pattern, kind in (("tokenizer.json", "HuggingFaceTokenizer"), ("*.model", "SentencePieceTokenizer"),
                          ("*.tiktoken", "TiktokenTokenizer"), ("tekken*.json", "TiktokenTokenizer")):
        for file in found:
            if file.match(pattern):
                return f"--tokenizer-type {kind} --tokenizer-model {file}"
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab in found and merges in found:
        return f"--tokenizer-type GPT2BPETokenizer --vocab-file {vocab} --merge-file {merges}"
    return None


def tokenizer_json(flag: str, path: Path) -> Any:
    """What a JSON file holds. Raises UserError."""
    try:
        return loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: is not valid JSON ({error}).") from None
