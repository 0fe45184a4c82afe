"""tiktoken's tokenizers, from a .tiktoken file on this disk: lines of a piece in base64 and its rank."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megazero.base import UserError
from megazero.data.files import library
from megazero.data.tokenizer_base import END_OF_TEXT, USUAL_ENDS, Tokenizer, existing, flattened
from megazero.data.tokenizer_words import byte_words


class Encoding(NamedTuple):
    """What a .tiktoken file does not say: how text is cut before merging, and the special tokens by name."""

    pattern: str
    specials: Mapping[str, int]


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


class TiktokenTokenizer(Tokenizer):
    needs = {"tokenizer_model": "tokenizer.tiktoken"}

    def __init__(self, tokenizer_model: str) -> None:
        tiktoken = library("tiktoken", "data", f"--tokenizer-model {tokenizer_model}")
        self._path = existing("--tokenizer-model", tokenizer_model, "a .tiktoken file")
        try:
            rows = [line.split() for line in self._path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in rows}
        except ValueError:
            rows, ranks = [], {}
        if (not {bytes([b]) for b in range(256)} <= ranks.keys()
                or min(len(ranks), len(set(ranks.values()))) < len(rows)):
            raise UserError(f"--tokenizer-model {tokenizer_model}: is not a .tiktoken file: "
                            "each line should be a piece in base64 and its rank, all 256 bytes among them.")
        known = ENCODINGS.get(len(ranks), Encoding(_CL100K, {END_OF_TEXT: max(ranks.values()) + 1}))
        self._inner = tiktoken.Encoding(self._path.name, pat_str=known.pattern, mergeable_ranks=ranks,
                                        special_tokens=dict(known.specials))
        self._ranks, self._encoding = ranks, known
        self._specials, self._known = set(known.specials), {*ranks.values(), *known.specials.values()}
        self.vocab_size = max(*known.specials.values(), *ranks.values()) + 1
        self.eod = next(known.specials[name] for name in USUAL_ENDS if name in known.specials)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # one thread: workers are processes
        return [self._inner.encode(text, allowed_special=self._specials) for text in texts]

    def encode_flat(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        return flattened([self._inner.encode_to_numpy(text, allowed_special=self._specials) for text in texts], dtype)

    def decode(self, ids: Sequence[int]) -> str:
        # ids have holes, and a young model may draw one
        return self._inner.decode([int(i) for i in ids if int(i) in self._known])

    def words(self) -> dict[str, Any]:
        pattern = self._encoding.pattern.replace("}+", "}").replace("$", r"\z")         # Oniguruma's words for the same
        return byte_words(self._ranks, self._encoding.specials, pattern)

    def files(self) -> dict[str, Path]:
        return {"tokenizer.tiktoken": self._path}
