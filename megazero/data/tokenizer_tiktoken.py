"""tiktoken's tokenizers, from a file on this disk: a .tiktoken, lines of a piece in base64 and its rank; or Mistral's
Tekken JSON, which also says how text is cut, and has its special tokens before the pieces."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megazero.base import UserError, checked, loads, read_bytes, said
from megazero.data.files import library
from megazero.data.tokenizer_base import END_OF_TEXT, USUAL_ENDS, LibraryTokenizer, existing, flattened
from megazero.data.tokenizer_words import byte_words

LAST = 2**30                    # ranks up to this: ids, special ones after them, are stored in 32 bits

class Encoding(NamedTuple):
    """How text is cut before merging, the special tokens by name, and whether their names in a text become them."""

    pattern: str
    specials: Mapping[str, int]
    by_name: bool = True


_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
           r"\s++$|\s*[\r\n]|\s+(?!\S)|\s")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
          rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
          r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# As published, by the number of ranks in the file: r50k_base (GPT-2), p50k_base, cl100k_base, o200k_base, Llama 3. Any
# other file is cut as cl100k_base, and its end of document is the id after its last rank.
ENCODINGS: Mapping[int, Encoding] = {
    50_256: Encoding(_GPT2, {END_OF_TEXT: 50_256}),
    50_280: Encoding(_GPT2, {END_OF_TEXT: 50_256}),
    100_256: Encoding(_CL100K, {END_OF_TEXT: 100_257, "<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259,
                                "<|fim_suffix|>": 100_260, "<|endofprompt|>": 100_276}),
    199_998: Encoding(_O200K, {END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018}),
    128_000: Encoding(_CL100K, {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001}
                      | {f"<|reserved_special_token_{i}|>": 128_002 + i for i in range(254)}),
}


# of files that do not list them
TEKKEN = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
          "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
          "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
TEKKEN_FORM = {"config": {"pattern": str, "default_vocab_size": range(1, 2**24),
                          "default_num_special_tokens": range(2**16)},
               "vocab": [{"rank": range(LAST + 1), "token_bytes": str}],
               "special_tokens?": ([{"rank": range(LAST + 1), "token_str": str}], None)}


def ranks_of(path: Path) -> dict[bytes, int]:
    """The pieces of a .tiktoken file. Raises ValueError."""
    rows = [line.split() for line in read_bytes(path).splitlines() if line]
    ranks = {base64.b64decode(piece, validate=True): _rank(rank) for piece, rank in rows}
    if min(len(ranks), len(set(ranks.values()))) < len(rows):
        raise ValueError("a piece or a rank stands twice")
    return ranks


def _rank(word: bytes) -> int:
    if not word.isdigit() or len(word) > 10 or int(word) > LAST:
        raise ValueError(f"a rank is no whole number from 0 to {LAST}")
    return int(word)


def tekken(path: Path) -> tuple[dict[bytes, int], Encoding]:
    """Mistral's JSON: ids are those of the special tokens, then of the pieces by rank, as many as there is room for. A
    name of a special token in a text stays text. Raises ValueError."""
    told = loads(read_bytes(path))
    config = checked(told, TEKKEN_FORM)["config"]
    first = config["default_num_special_tokens"]
    listed = told.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(TEKKEN)]
    named = {s["rank"]: s["token_str"] for s in listed if s["rank"] < first}
    specials = {named.get(i, f"<SPECIAL_{i}>"): i for i in range(first)}
    ranks = {base64.b64decode(p["token_bytes"], validate=True): first + p["rank"] for p in told["vocab"]
             if p["rank"] < config["default_vocab_size"] - first}
    size = config["default_vocab_size"]                         # looked at first: it may be much
    if len(ranks) + len(specials) != size or {*ranks.values(), *specials.values()} != set(range(size)):
        raise ValueError("its ranks and special tokens do not make up its default_vocab_size")
    return ranks, Encoding(config["pattern"], specials, by_name=False)


class TiktokenTokenizer(LibraryTokenizer):
    needs = {"tokenizer_model": "tokenizer.tiktoken"}

    def __init__(self, tokenizer_model: str, special_tokens: tuple[str, ...] = ()) -> None:
        """`special_tokens`: names for the ids after the last rank, in place of those that are known."""
        tiktoken = library("tiktoken", "data", f"--tokenizer-model {tokenizer_model}")
        self._path = existing("--tokenizer-model", tokenizer_model, "a .tiktoken file or Mistral's tekken.json")
        self.special_tokens = special_tokens
        try:
            self._ranks, self._encoding = self._read()
            if not {bytes([b]) for b in range(256)} <= self._ranks.keys():
                raise ValueError("not all 256 bytes are pieces of it")
            if not set(self._encoding.specials.values()).isdisjoint(self._ranks.values()):
                raise ValueError("a rank is the id of a special token")
            self._inner = tiktoken.Encoding(self._path.name, pat_str=self._encoding.pattern,
                                            mergeable_ranks=self._ranks, special_tokens=dict(self._encoding.specials))
        except (ValueError, OSError) as error:
            raise UserError(f"--tokenizer-model {tokenizer_model}: is not a .tiktoken file nor Mistral's Tekken JSON "
                            f"({error}); each line should be a piece in base64 and its rank.") from None
        specials = self._encoding.specials
        self._specials, self._known = set(specials), {*self._ranks.values(), *specials.values()}
        self._by_name = self._specials if self._encoding.by_name else set()
        self.vocab_size = max(self._known) + 1
        # a file's own pattern need not cover a text: bytes of each piece, to see it; ids are without holes there
        self._sizes = None if self._encoding.by_name else np.zeros(self.vocab_size, np.int64)
        if self._sizes is not None:
            self._sizes[[*self._ranks.values()]] = [*map(len, self._ranks)]
        self.eod = next((specials[name] for name in USUAL_ENDS if name in specials), None)

    def _read(self) -> tuple[dict[bytes, int], Encoding]:
        if read_bytes(self._path)[:1] == b"{":
            if self.special_tokens:
                raise UserError(f"--special-tokens {' '.join(self.special_tokens)}: {self._path} names its own; "
                                "leave it out.")
            return tekken(self._path)
        ranks = ranks_of(self._path)
        after = max(ranks.values(), default=0) + 1
        known = ENCODINGS.get(len(ranks), Encoding(_CL100K, {END_OF_TEXT: after}))
        if self.special_tokens:
            known = known._replace(specials={name: after + i for i, name in enumerate(self.special_tokens)})
        return ranks, known

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._cutting():                                   # in one thread: workers are processes
            ids = [self._inner.encode(text, allowed_special=self._by_name, disallowed_special=()) for text in texts]
        self._check_whole(texts, ids)
        return ids

    def encode_flat(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        names = self._by_name
        with self._cutting():
            ids = [self._inner.encode_to_numpy(text, allowed_special=names, disallowed_special=()) for text in texts]
        self._check_whole(texts, ids)
        return flattened(ids, dtype)

    def _check_whole(self, texts: Sequence[str], ids: Sequence[Any]) -> None:
        """Raises UserError where the pieces of a text are not as long as it is: what no match of the pattern covers is
        left out by the library."""
        for text, found in zip(texts, ids if self._sizes is not None else (), strict=False):
            assert self._sizes is not None
            if self._sizes[np.asarray(found, np.int64)].sum() != len(text.encode(errors="replace")):
                raise UserError(f"--tokenizer-model {self._path}: its pattern does not cover all of a text "
                                f"({said(text[:60])}), the rest would be lost; take the file as it was published.")

    def decode(self, ids: Sequence[int]) -> str:
        # ids have holes, and a young model may draw one
        with self._cutting():
            return self._inner.decode([int(i) for i in ids if int(i) in self._known])

    def id_of(self, name: str) -> int | None:
        return self._encoding.specials[name] if name in self._specials else super().id_of(name)

    def words(self) -> dict[str, Any]:
        # Oniguruma's words for the same: {1,3}+ would be repeated there, and $ an end of line
        pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", self._encoding.pattern).replace("$", r"\z")
        return byte_words(self._ranks, self._encoding.specials, pattern, self._encoding.by_name)

    def files(self) -> dict[str, Path]:
        return {"tokenizer.tiktoken": self._path}
