"""Tokenizers of other kinds in the words of a tokenizer.json, so that the `tokenizers` library cuts text as they do.

    of sentencepiece      here
    charsmap, prefix      normalizer: what characters become, spaces, what stands before (or behind) every text
    user-defined pieces   pre_tokenizer: each is a word of its own before anything is merged
    BPE, characters       model BPE: merges in the order of the scores of what they make
    unigram               model Unigram: the same scores

Where the library does something otherwise, what makes up for it says so. Whether all of it does is tried before
anything is written (hf/tokenizer.py).
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from megazero.base import UserError

Words = dict[str, Any]
SPACE = "\u2581"                        # how sentencepiece writes a space
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)              # types of pieces
UNIGRAM, BPE, WORD, CHAR = range(1, 5)                                  # types of models
MARKS = "\\p{M}\u200C\u200D\u0E33\u0EB3\uFF9E\uFF9F\U0001F3FB-\U0001F3FF\U000E0020-\U000E007F"     # join what is before
SYLLABLES = "\uAC00-\uD7A3"             # of Korean
CUT, KEPT = "\uFDD0\uFDD1", "\uFDD0\uFDD2"          # Unicode keeps these for use inside a program: they are in no text
NEVER = -1e9                            # the score of a piece that no text becomes


def tokenizer_words(model: Words, *, decoder: Words, pre_tokenizer: Words | None, normalizer: Words | None = None,
                    post_processor: Words | None = None, added_tokens: Sequence[Words] = ()) -> Words:
    """The content of a tokenizer.json."""
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added_tokens),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": decoder, "model": model}


def bpe_words(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **others: Any) -> Words:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(vocab), "merges": [list(pair) for pair in merges], **others}


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the highest score first. Among equal ones the longest goes first: then
    a run of one character grows from its left, as where the leftmost of them goes first."""
    pairs = ((piece[:at], piece[at:]) for piece in scores for at in range(1, len(piece)))
    return sorted(((a, b) for a, b in pairs if a in scores and b in scores),
                  key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0] + pair[1]), -len(pair[0])))


def replace(pattern: Mapping[str, str], content: str) -> Words:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(alternatives: Iterable[str], behavior: str) -> Words | None:
    """A pre_tokenizer that cuts at these regular expressions; None if there are none."""
    regex = "|".join(alternatives)
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False} if regex else None


def byte_words(ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str, by_name: bool = True) -> Words:
    """tiktoken's kind: bytes are merged in the order of the ranks of what they make, in words that `pattern` finds (a
    word that is a piece, at once). `by_name`: the names of special tokens are those tokens."""
    letter = letters()
    vocab = {"".join(letter[b] for b in piece): rank for piece, rank in ranks.items()}
    cut = split([pattern], "Isolated") if pattern else None
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return tokenizer_words(
        bpe_words({**vocab, **specials}, merges_of({piece: -rank for piece, rank in vocab.items()}),
                  ignore_merges=bool(pattern)),
        added_tokens=[{"id": i, "content": name, **flags} for name, i in specials.items() if by_name],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*([cut] if cut else []), level]}, decoder=level)


def letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones are themselves, the rest follow from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def sentencepiece_words(file: bytes, bos: int | None) -> Words:
    """A .model file. `bos`: the id that every text begins with.
    Raises UserError for a model that the library has no words for."""
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(file)
    if model.trainer_spec.model_type == WORD or any(p.type == UNUSED for p in model.pieces):
        raise UserError("a tokenizer.json cannot say what a model of whole words, or one with unused pieces, does")
    symbols = sorted((p.piece for p in model.pieces if p.type == USER), key=len, reverse=True)
    splits = (split(map(re.escape, symbols), "Isolated"), split(_cuts(model, bool(symbols)), "MergedWithPrevious"))
    return tokenizer_words(
        _unigram(model) if model.trainer_spec.model_type == UNIGRAM else _bpe(model, bool(symbols)),
        normalizer={"type": "Sequence", "normalizers": list(_normalizers(model))},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [s for s in splits if s]} if any(splits) else None,
        post_processor=None if bos is None else _begin(bos, model.pieces[bos].piece),
        decoder={"type": "Sequence", "decoders": list(_decoders(model))})


def _normalizers(model: Any) -> Iterator[Words]:
    spec, suffix = model.normalizer_spec, model.trainer_spec.treat_whitespace_as_suffix
    prefix = [{"type": "Prepend", "prepend": " "}] if spec.add_dummy_prefix and not suffix else []
    if not spec.remove_extra_whitespaces:
        yield from prefix
    if spec.precompiled_charsmap:
        charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        yield from _one_by_one(charsmap, spec.name) if "nfkc" in spec.name else [charsmap]
    if spec.remove_extra_whitespaces:
        yield replace({"Regex": r"\A +"}, "")
        yield replace({"Regex": " {2,}"}, " ")
        yield from prefix
    if spec.escape_whitespaces:
        yield replace({"String": " "}, SPACE)
    if spec.remove_extra_whitespaces:                           # what is a space by now counts
        yield replace({"Regex": f"{_space(spec)}+\\z"}, "")
    if spec.add_dummy_prefix and suffix:
        yield replace({"Regex": r"(?<=[\s\S])\z"}, _space(spec))


def _space(spec: Any) -> str:
    return SPACE if spec.escape_whitespaces else " "


def _one_by_one(charsmap: Words, name: str) -> Iterator[Words]:
    """The library looks up a character with its marks by their beginning, and loses the rest; sentencepiece looks up
    the longest entry, and those of several characters are what composes to one. So that is composed, marks are cut off
    while single characters are looked up, and what they became is composed. What is a composition already, or became
    several characters, takes no mark."""
    pairs = [chr(c) + mark for c in range(0xFF66, 0xFF9E) for mark in "\uFF9E\uFF9F"]           # halfwidth katakana
    yield from (replace({"String": p}, one) for p in pairs if len(one := normalize("NFKC", p)) == 1)
    for before, after in ((_several(), MARKS), (SYLLABLES, f"\u11A8-\u11C2{_finals()}")):
        yield replace({"Regex": f"(?<=[{before}])(?=[{after}])"}, KEPT)
    yield {"type": "NFC"}
    if name.startswith("nmt"):
        yield replace({"String": "\r\n"}, "\n\n")                                               # both become spaces
    yield replace({"Regex": rf"(?<=[\s\S])(?=[{MARKS}])"}, CUT)
    yield charsmap
    yield replace({"String": CUT}, "")
    yield {"type": "NFC"}
    yield replace({"String": KEPT}, "")


def _several() -> str:
    """Characters that stand for several, syllables of Korean apart, for a regular expression."""
    return "".join(c for c in map(chr, range(0xA0, 0x30000))
                   if not "\uAC00" <= c <= "\uD7A3" and len(normalize("NFKD", c).casefold()) > 1)


def _finals() -> str:
    """Korean letters that would become the end of a syllable."""
    return "".join(c for c in map(chr, [*range(0x3131, 0x318F), *range(0xFFA1, 0xFFDD)])
                   if "\u11A8" <= normalize("NFKC", c) <= "\u11C2")


def _bpe(model: Any, whole: bool) -> Words:
    """`whole`: a word that is a piece becomes that piece, unmerged: so user-defined ones do."""
    scores = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    return bpe_words({p.piece: i for i, p in enumerate(model.pieces)},
                     merges_of(scores) if model.trainer_spec.model_type == BPE else [],
                     unk_token=model.pieces[_unknown(model)].piece, fuse_unk=True, ignore_merges=whole,
                     byte_fallback=model.trainer_spec.byte_fallback)


def _unknown(model: Any) -> int:
    found = next((i for i, p in enumerate(model.pieces) if p.type == UNKNOWN), None)
    if found is None:
        raise UserError("a tokenizer.json cannot say what a model without an unknown piece does")
    return found


def _unigram(model: Any) -> Words:
    scores = [p.score if p.type == NORMAL else 0.0 if p.type == USER else NEVER for p in model.pieces]
    return {"type": "Unigram", "unk_id": _unknown(model), "byte_fallback": model.trainer_spec.byte_fallback,
            "vocab": [[p.piece, score] for p, score in zip(model.pieces, scores, strict=True)]}


def _cuts(model: Any, symbols: bool) -> Iterator[str]:
    """Where a text looks like a piece that sentencepiece would not make of it (`<s>`, `<0x0A>`), the library could take
    it for that piece: merging, where a whole word is one; unigram, where some of its characters are not known. So such
    a text is cut, where sentencepiece ends a piece in any case."""
    if model.trainer_spec.model_type == UNIGRAM:
        known = {c for p in model.pieces if p.type == NORMAL for c in p.piece}
        for text in (p.piece for p in model.pieces if p.type not in (NORMAL, USER)):
            strange = [c not in known for c in text]
            if at := next((i for i in range(1, len(text)) if strange[i - 1] != strange[i]), 0):
                yield f"{re.escape(text[:at])}(?={re.escape(text[at:])})"
    elif symbols:
        for text, head in _made_of_others(model):
            yield rf"\A{re.escape(head)}(?={re.escape(text[len(head):])}\z)"


def _made_of_others(model: Any) -> Iterator[tuple[str, str]]:
    """Pieces whose own text becomes several others, and what the first of those says."""
    from sentencepiece import SentencePieceProcessor
    bare = type(model).FromString(model.SerializeToString())
    bare.normalizer_spec.CopyFrom(type(model.normalizer_spec)(
        name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False))
    processor = SentencePieceProcessor(model_proto=bare.SerializeToString())
    texts = [p.piece for p in model.pieces if p.type != USER]
    for text, parts in zip(texts, processor.encode(texts, out_type=str), strict=True):
        if len(parts) > 1:
            first = model.pieces[processor.piece_to_id(parts[0])]
            yield text, text[0] if first.type == BYTE else parts[0]


def _begin(i: int, name: str) -> Words:
    bos, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}}}


def _decoders(model: Any) -> Iterator[Words]:
    spec, suffix = model.normalizer_spec, model.trainer_spec.treat_whitespace_as_suffix
    if spec.escape_whitespaces:
        yield replace({"String": SPACE}, " ")
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if spec.add_dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": int(not suffix), "stop": int(suffix)}
