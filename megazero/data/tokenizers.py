"""Text to token ids and back, by Megatron's names of tokenizer types.

    type                     its files                                      end of document
    SentencePieceTokenizer   --tokenizer-model X.model                      the model's eos
    Llama2Tokenizer          --tokenizer-model X.model                      the model's eos;
                                                                            every text begins with its bos
    GPT2BPETokenizer         --vocab-file vocab.json --merge-file merges    <|endoftext|>
    HuggingFaceTokenizer     --tokenizer-model tokenizer.json or its folder tokenizer_config.json's eos_token,
                                                                            or a usual name
    TiktokenTokenizer        --tokenizer-model X.tiktoken or tekken.json    see tokenizer_tiktoken.py
    ByteTokenizer            none: the 256 bytes of UTF-8                   256
    CharTokenizer            --tokenizer-model characters.json              none
    NullTokenizer            none: the text is ids, --vocab-size of them    the id after the last, as in Megatron

--eod-token names another end of document.
No tokenizer but Megatron's Llama2Tokenizer adds anything of its own to a text: no begin of text, no end of document.
A library is imported by the type that needs it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megazero.base import UserError, checked, faults, inside, loads, read_bytes, said
from megazero.data.tokenizer_base import (
    END_OF_TEXT,
    IDENTITY,
    USUAL_ENDS,
    LibraryTokenizer,
    Tokenizer,
    existing,
    flags_for,
    flattened,
    tokenizer_json,
    told,
)
from megazero.data.tokenizer_tiktoken import TiktokenTokenizer
from megazero.data.tokenizer_words import byte_words, letters, sentencepiece_words

if TYPE_CHECKING:
    import tokenizers

UTF8 = {*range(0xC0), *range(0xC2, 0xF5)}        # the bytes that texts are made of
MOST_GROWTH = 1 << 14                             # characters that a tokenizer.json's Replace steps may make of one


class SentencePieceTokenizer(LibraryTokenizer):
    needs = {"tokenizer_model": "tokenizer.model"}
    longest = 2**23
    _begins = False                              # does every text begin with the model's begin of text?

    def __init__(self, tokenizer_model: str) -> None:
        from sentencepiece import SentencePieceProcessor
        self._path = existing("--tokenizer-model", tokenizer_model, "a sentencepiece .model file")
        try:
            self._model = SentencePieceProcessor(model_file=str(self._path))
            self._model.id_to_piece(list(range(self._model.get_piece_size())))          # each is text
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise UserError(f"--tokenizer-model {tokenizer_model}: is not a sentencepiece model; "
                            "give the .model file.") from None
        self.vocab_size = self._model.get_piece_size()
        self.eod = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.bos = self._model.bos_id() if self._begins else None
        if self.bos == -1:
            raise UserError(f"--tokenizer-model {tokenizer_model}: has no begin of text, which a Llama2Tokenizer puts "
                            "before every text; write --tokenizer-type SentencePieceTokenizer.")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._cutting():
            return self._model.encode(list(texts), num_threads=1, add_bos=self._begins)        # workers are processes

    def encode_flat(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        with self._cutting():
            ids = self._model.encode(list(texts), num_threads=1, add_bos=self._begins, return_type="numpy")
        return flattened(ids, dtype)

    def decode(self, ids: Sequence[int]) -> str:
        with self._cutting():
            return self._model.decode([int(i) for i in ids])

    def id_of(self, name: str) -> int | None:
        found = self._model.piece_to_id(name)                   # encoding the name might put a prefix before it
        return found if found != self._model.unk_id() else None

    def words(self) -> dict[str, Any]:
        return sentencepiece_words(self._path.read_bytes(), self.bos)

    def files(self) -> dict[str, Path]:
        return {"tokenizer.model": self._path}


class Llama2Tokenizer(SentencePieceTokenizer):
    """Megatron's: every text begins with the model's begin of text, an empty one, too."""

    _begins = True


class _JsonTokenizer(LibraryTokenizer):
    """What the `tokenizers` library does for us; it takes 130 bytes for one of usual text, 260 at worst."""

    longest = 6 * 2**20
    _inner: "tokenizers.Tokenizer"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._cutting():
            return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        with self._cutting():
            return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def id_of(self, name: str) -> int | None:
        return self._inner.token_to_id(name)

    def words(self) -> dict[str, Any]:
        return self._bare(json.loads(self._inner.to_str()))

    def _bare(self, said: dict[str, Any]) -> dict[str, Any]:
        """Without what is not done here: cutting, padding, tokens around a text."""
        around = ("post_processor",) if self._inner.num_special_tokens_to_add(False) else ()
        return {k: None if k in ("truncation", "padding", *around) else v for k, v in said.items()}

    def _adopt(self, inner: "tokenizers.Tokenizer", steps: Sequence[Any]) -> None:
        """`steps`: what is done to a text before the model sees it. Raises ValueError for ids that mean nothing."""
        inner.no_truncation()
        inner.no_padding()
        ids = inner.get_vocab(with_added_tokens=True)
        if not ids or len(set(ids.values())) < len(ids):
            raise ValueError("two pieces have one id" if ids else "it has no pieces")
        wrong = _unsafe(inner.model, steps)
        if wrong:
            raise ValueError(wrong)
        self._inner = inner
        self.vocab_size = max(ids.values()) + 1                         # ids may have holes


def _unsafe(model: Any, steps: Sequence[Any]) -> str | None:
    """Why ids would not be those of the text: by chance, with bytes left out, or of a text that grew without end."""
    growth = 1
    for step in steps:
        growth *= _growth(step) if step.get("type") == "Replace" else 1
    if growth > MOST_GROWTH:
        return f"its Replace steps make a text up to {growth:,} times as long"
    if getattr(model, "dropout", None):
        return f"it merges by chance, with dropout {model.dropout}; write null there"
    if any(step.get("type") == "ByteLevel" for step in steps) and getattr(model, "unk_token", "") is None:
        missing = next((b for b, letter in letters().items() if b in UTF8 and model.token_to_id(letter) is None), None)
        return None if missing is None else f"it has no piece for the byte {missing}, which would be left out of texts"
    return None


def _growth(step: Mapping[str, Any]) -> int:
    """How many times as long a text may become by a Replace; a regular expression may find nothing, at each place."""
    pattern, content = step["pattern"], len(step["content"])
    return -(-content // max(1, len(pattern["String"]))) or 1 if "String" in pattern else 1 + content


def _steps(said: Any) -> Iterator[Any]:
    """The steps of a normalizer or pre_tokenizer, also those within a Sequence."""
    if isinstance(said, dict):
        yield said
        for inner in (*said.get("normalizers", ()), *said.get("pretokenizers", ())):
            yield from _steps(inner)


class GPT2BPETokenizer(_JsonTokenizer):
    needs = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    _flag = "--vocab-file"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        library = _tokenizers_library()
        self._path = existing("--vocab-file", vocab_file, "GPT-2's vocab.json")
        self._merges = existing("--merge-file", merge_file, "GPT-2's merges.txt")
        with told(f"--vocab-file {vocab_file} --merge-file {merge_file}: are not a byte-level BPE",
                  "give GPT-2's vocab.json and merges.txt"):
            checked(loads(read_bytes(self._path)), {str: range(2**30)})
            inner = library.Tokenizer(library.models.BPE.from_file(str(self._path), str(self._merges)))
            inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = library.decoders.ByteLevel()
            inner.add_special_tokens([END_OF_TEXT])                     # so that its literal text becomes its id
            self._adopt(inner, [{"type": "ByteLevel"}])
        self.eod = inner.token_to_id(END_OF_TEXT)

    def files(self) -> dict[str, Path]:
        return {"vocab.json": self._path, "merges.txt": self._merges}


class HuggingFaceTokenizer(_JsonTokenizer):
    needs = {"tokenizer_model": "tokenizer.json"}

    def __init__(self, tokenizer_model: str) -> None:
        library = _tokenizers_library()
        given = existing("--tokenizer-model", tokenizer_model, "a tokenizer.json or its folder", folder=True)
        other = flags_for(given)
        if other is not None and type(self).__name__ not in other:
            raise UserError(f"--tokenizer-model {tokenizer_model}: has no tokenizer.json; write {other}.")
        self._path = given / "tokenizer.json" if given.is_dir() else given
        with told(f"--tokenizer-model {tokenizer_model}: {self._path.name} is not a Hugging Face tokenizer",
                  "give a tokenizer.json or its folder"):
            words = loads(read_bytes(self._path))                       # the library takes a key that stands twice
            inner = library.Tokenizer.from_file(str(self._path))
            self._adopt(inner, [*_steps(words.get("normalizer")), *_steps(words.get("pre_tokenizer"))])
        self._beside = {name: _beside(path) for name, path in self.files().items() if path != self._path}
        known = (self._inner.token_to_id(name) for name in self._names_of_the_end())
        self.eod = next((i for i in known if i is not None), None)

    def words(self) -> dict[str, Any]:
        return self._bare(tokenizer_json("--tokenizer-model", self._path))

    def _names_of_the_end(self) -> Iterable[str]:
        said = self._beside.get("tokenizer_config.json", {})
        end = said.get("eos_token") if isinstance(said, dict) else said
        end = end.get("content", end) if isinstance(end, dict) else end
        if end is not None and not isinstance(end, str):
            raise UserError(f"--tokenizer-model {self._path.with_name('tokenizer_config.json')}: its eos_token should "
                            f"be a text, not {end!r}; repair or remove it.")
        return (end,) if end else USUAL_ENDS

    def files(self) -> dict[str, Path]:
        beside = {name: self._path.with_name(name) for name in ("tokenizer_config.json", "special_tokens_map.json")}
        return {"tokenizer.json": self._path} | {name: path for name, path in beside.items() if path.exists()}


def _beside(path: Path) -> Any:
    """What a file beside a tokenizer.json says. It is copied with it though nobody named it, so it must lie there."""
    try:
        return tokenizer_json("--tokenizer-model", inside(path))
    except ValueError as error:
        raise UserError(f"--tokenizer-model {path}: {error}; put the file itself there, or remove it.") from None


class ByteTokenizer(Tokenizer):
    longest = 2**26

    def __init__(self) -> None:
        self.vocab_size, self.eod = 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def encode_flat(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        raw = [text.encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8).astype(dtype), np.array([len(r) for r in raw], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def words(self) -> dict[str, Any]:
        said = byte_words({bytes([b]): b for b in range(256)}, {}, "")
        said["model"]["vocab"][END_OF_TEXT] = 256                       # which no text becomes
        return said


class CharTokenizer(Tokenizer):
    needs = {"tokenizer_model": "characters.json"}

    def __init__(self, tokenizer_model: str) -> None:
        self._path = existing("--tokenizer-model", tokenizer_model, "a JSON list of characters")
        data = tokenizer_json("--tokenizer-model", self._path)
        listed = not next(faults(data, [str]), "")
        self._ids: dict[str, int] = {c: i for i, c in enumerate(data)} if listed else data
        every = range(len(data) if isinstance(data, (dict, list)) else 0)
        wrong = next(faults(self._ids, {str: every}), "")
        if wrong or not every or {*self._ids.values()} != {*every} or any(len(c) != 1 for c in self._ids):
            raise UserError(f"--tokenizer-model {tokenizer_model}: must hold a JSON list of different characters, "
                            "or a dictionary from each to its id 0, 1, 2 ...")
        self._chars = {i: c for c, i in self._ids.items()}
        self.vocab_size, self.eod = len(self._ids), None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [list(map(self._ids.__getitem__, text)) for text in texts]
        except KeyError as missing:
            raise UserError(f"--tokenizer-model {self._path}: has no character {missing.args[0]!r}, which a text uses; "
                            "make the list from all of the text.") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._chars[int(i)] for i in ids)

    def files(self) -> dict[str, Path]:
        return {"characters.json": self._path}


class NullTokenizer(Tokenizer):
    needs = {"vocab_size": ""}                   # a number, no file

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eod = vocab_size + 1, vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._checked(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def _checked(self, word: str) -> int:
        if word.isdecimal() and len(word) <= 20 and int(word) < self.vocab_size:
            return int(word)
        raise UserError(f"--tokenizer-type NullTokenizer: a text holds {said(word)}, "
                        f"expected ids 0 to {self.vocab_size - 1} with spaces between them.")


TYPES: Mapping[str, type[Tokenizer]] = {cls.__name__: cls for cls in (
    SentencePieceTokenizer, Llama2Tokenizer, GPT2BPETokenizer, HuggingFaceTokenizer, TiktokenTokenizer, ByteTokenizer,
    CharTokenizer, NullTokenizer)}


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, vocab_file: str | None = None,
    merge_file: str | None = None, vocab_size: int | None = None, eod_token: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer these flags describe.
    Raises UserError for a flag that is missing, and for one that would not be used."""
    if tokenizer_type not in TYPES:
        raise UserError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TYPES)}.")
    cls = TYPES[tokenizer_type]
    flags = {"tokenizer_model": tokenizer_model, "vocab_file": vocab_file, "merge_file": merge_file,
             "vocab_size": vocab_size}
    missing = [f"{_flag(name)} is missing: {tokenizer_type} needs it." for name in cls.needs if flags[name] is None]
    unused = [f"{_flag(name)} {value}: {tokenizer_type} does not read it; leave it out."
              for name, value in flags.items() if value is not None and name not in (*cls.needs, "vocab_size")]
    named = {"special_tokens": tuple(special_tokens)} if special_tokens else {}
    twice = [name for name in dict.fromkeys(special_tokens) if list(special_tokens).count(name) > 1]
    if twice:
        unused.append(f"--special-tokens {' '.join(special_tokens)}: names {twice[0]} twice; name it once.")
    elif named and cls is not TiktokenTokenizer:
        unused.append(f"--special-tokens {' '.join(special_tokens)}: {tokenizer_type} has its own; leave it out.")
    if missing or unused:
        raise UserError(*missing, *unused)
    tokenizer = cls(**{name: flags[name] for name in cls.needs}, **named)
    if tokenizer.vocab_size not in IDENTITY["vocab_size"]:
        given = " ".join(f"{_flag(name)} {flags[name]}" for name in cls.needs)
        raise UserError(f"{given}: has ids up to {tokenizer.vocab_size - 1:,}, and they must be below 2,147,483,647.")
    if vocab_size is not None and "vocab_size" not in cls.needs and vocab_size != tokenizer.vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: this {tokenizer_type} has {tokenizer.vocab_size} ids; "
                        "leave the flag out.")
    if eod_token is not None:
        tokenizer.eod = _id_of(tokenizer, eod_token)
    return tokenizer


def _id_of(tokenizer: Tokenizer, eod_token: str) -> int:
    try:
        found = tokenizer.id_of(eod_token)
    except UserError:                                           # a text that its vocabulary cannot say
        found = None
    if found is None:
        raise UserError(f"--eod-token {eod_token}: is no token of this {type(tokenizer).__name__}; "
                        "name one that it has.")
    return found


def tokenizer_in(folder: Path, tokenizer_type: str, special_tokens: Sequence[str] = ()) -> Tokenizer | None:
    """The tokenizer of a type from the files in a folder, under the names that a checkpoint keeps them by; None where
    one is not there, or there is no such type."""
    needs = TYPES[tokenizer_type].needs if tokenizer_type in TYPES else {"": ""}
    if not all(name and (folder / name).is_file() for name in needs.values()):
        return None
    flags: dict[str, Any] = {flag: str(folder / name) for flag, name in needs.items()}
    return build_tokenizer(tokenizer_type, **flags, special_tokens=special_tokens)


def load_tokenizer(identity: Mapping[str, Any], folder: str | Path) -> Tokenizer:
    """The tokenizer whose `identity()` and `files()` were kept, the files in `folder`.
    Raises UserError if they have changed."""
    cls, at = TYPES.get(identity["type"]), Path(folder)
    if cls is None:
        raise UserError(f"{at}: is of type {identity['type']}, which is not known here; "
                        "load it with the version that wrote it.")
    kept = kept_files(identity, at)
    flags: dict[str, Any] = {flag: str(at / name) for flag, name in cls.needs.items()}
    if "vocab_size" in flags:
        flags["vocab_size"] = identity["vocab_size"] - 1      # NullTokenizer's own end of document comes after them
    tokenizer = build_tokenizer(identity["type"], **flags, special_tokens=identity.get("special_tokens", ()))
    more = [name for name in tokenizer.files() if name not in kept]
    if more:
        raise UserError(f"{at / more[0]}: is no file of the tokenizer that was kept here; remove it.")
    tokenizer.eod = identity["eod"]                           # --eod-token may have named another
    if tokenizer.vocab_size != identity["vocab_size"] or (tokenizer.eod or 0) >= tokenizer.vocab_size:
        raise UserError(f"{at}: is not the tokenizer that was kept here (other ids); restore it.")
    return tokenizer


def kept_files(identity: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The files of a tokenizer that were kept in a folder, each as it was. Raises UserError."""
    for name, digest in identity["files"].items():
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UserError(f"{folder}: cannot hold a tokenizer's file {said(name)}; load another checkpoint.")
        try:
            found = hashlib.sha256(read_bytes(folder / name)).hexdigest()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); restore it.") from None
        if found != digest:
            raise UserError(f"{folder / name}: is not the tokenizer file that was kept here (another sha256); "
                            "restore it.")
    return {name: folder / name for name in identity["files"]}


def same_tokenizer(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Do two identities give the same ids? The files a type cannot do without count, what lies beside them does not."""
    told = ("type", "vocab_size", "eod", "special_tokens")
    if any(a.get(key) != b.get(key) for key in told) or a.get("type") not in TYPES:
        return False
    names = [name for name in TYPES[a["type"]].needs.values() if name]
    return all(a["files"].get(name) == b["files"].get(name) for name in names)


def named_by(tokenizer: Tokenizer, folder: str | Path) -> dict[str, Any]:
    """The fields of a configuration that make the same tokenizer of the files in this folder."""
    files: dict[str, Any] = {field: f"{folder}/{name}" for field, name in tokenizer.needs.items()}
    kind, specials = type(tokenizer).__name__, tokenizer.special_tokens
    plain = build_tokenizer(kind, **files, special_tokens=specials)
    end = None if tokenizer.eod in (None, plain.eod) else tokenizer.decode([tokenizer.eod or 0])
    return {"tokenizer_type": kind, **files, "special_tokens": tuple(specials), "eod_token": end}


def characters_of(texts: Iterable[str]) -> list[str]:
    """The characters that occur, sorted: what a CharTokenizer's JSON file holds."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    return sorted(found)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _tokenizers_library() -> Any:
    """The library, told not to start threads: our workers are processes, and it would warn in each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers
    return tokenizers
