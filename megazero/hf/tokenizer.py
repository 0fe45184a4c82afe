"""A checkpoint's tokenizer as Hugging Face's files, and theirs as a checkpoint's.

What would be written is tried first: hard texts, lines of this program and every piece of the vocabulary, cut by the
run's tokenizer and, from those files, by the `tokenizers` library. Where one id differs no tokenizer is written, and a
sentence says so: a file that loads and is wrong would be worse than none.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megazero.base import UserError, checked, write_json
from megazero.data import Tokenizer, load_tokenizer, tokenizer_in, told
from megazero.hf.files import read_json
from megazero.state import Reader

CONFIG = "tokenizer_config.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"             # transformers' that takes a tokenizer.json as it is
OURS = "megazero_tokenizer"             # the key of it that says what an import cannot know from the files:
FORM = {"type": str, "eod": (range(2**31), None), "special_tokens?": [str]}

# Texts that tell tokenizers apart.
HARD = (
    "", " ", "  ", "   ", "a", " a", "a ", "  a", "a  ", "a  b", "a   b    c     d", " Hello", "Hello  ", "Hello world",
    "\u2581", "\u2581x", "x\u2581", " \u2581 ", "\n", "\n\n", " \n ", "a\n  b", "\n\n\n  x", "\r\n", "a\r\nb", "\t",
    "a\tb", "\t\tx", "x \t y", "\u00a0", "a\u00a0b", "\u3000x", "\u2028", "a\u200bb", "\ufeffx", "a\x00b", "\ufffd",
    "e\u0301", "\u00e9", "\u1ec7", "e\u0323\u0302", "\uff76\uff9e", "\u1112\u1161\u11ab", "ﬁ ① Ａ ～ ™ ½", "日本語 😀",
    "नमस्ते", "Ünïcödé", "ไทยน้ำ", "한국어", "العربية", "שלום", "\U0001f468\u200d\U0001f469 \u2764\ufe0f", "<s>",
    "</s>", "a</s>b", "<unk>", "<pad>", "<0x0A>", "<|endoftext|>", "x<|endoftext|> y",
    # what one character became, and a mark
    "\xa0\u200d", "x\u3000\u0302", "\ufefb\u064e", "ﬁ\u0301", "Ａ\u0301", "x²\u0305", "²\ufe0f", "½\u200d",
    "(\xa0\u0651)", "B\u0301", "\u00ca\u0301", "ㄱㅏ가ㄳ", "ß\u0301", "™\ufe0f", "\u200d\u0e33\u0301",
    "1000000.00 + 0000000 = 12345678", "-----", "=" * 40, "|---|---|---|", "....", "!!!!!!!", "hahahahaha", "a" * 25,
    "def f(x):\n    return  x + 1\n", "  naïve — 漢字 \n\n\tend", "http://x.y/z?a=b#e", "I'll DON'T",
    *(" " * n + "x" for n in range(4, 40)))


def export_tokenizer(reader: Reader, output: Path, longest: int) -> tuple[Tokenizer | None, str | None]:
    """Writes the checkpoint's tokenizer for transformers.
    Returns it, and where it could not be written the sentence that says why."""
    identity = reader.index["tokenizer"]
    if identity is None:
        return None, None
    tokenizer = load_tokenizer(identity, reader.folder.parent / "tokenizer")
    imported = "special_ids" in reader.index and "tokenizer.json" in tokenizer.files()
    try:
        said = None if imported else tried(tokenizer)
    except UserError as error:
        return tokenizer, (f"{type(tokenizer).__name__}: {str(error).rstrip('.')}; no tokenizer was written, "
                           "since one that gives other ids than in training would be wrong without a word.")
    for name, path in tokenizer.files().items():
        shutil.copyfile(path, output / name)
    if said is not None:
        if not (output / "tokenizer.json").exists() or read_json(output / "tokenizer.json") != said:
            write_json(output / "tokenizer.json", said)
        (output / "special_tokens_map.json").unlink(missing_ok=True)    # an older form of what the configuration says
    if said is not None or not (output / CONFIG).exists():
        _write_config(output, special_ids(reader, tokenizer), longest, None if imported else tokenizer)
    return tokenizer, None


def outlook(tokenizer: Tokenizer) -> str:
    """Whether it can be exported, or what is in the way: told before training, when another can be chosen."""
    try:
        tried(tokenizer)
    except UserError as error:
        return f"{type(tokenizer).__name__}, which cannot be exported: {error}"
    return f"{type(tokenizer).__name__}, which can be exported"


def special_ids(reader: Reader, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """An import keeps its own; a run of ours starts documents with the id that ended the one before, unless its
    tokenizer begins every text."""
    eod, bos = (tokenizer.eod, tokenizer.bos) if tokenizer else (None, None)
    return reader.index.get("special_ids") or {
        "bos_token_id": eod if bos is None else bos, "eos_token_id": eod, "pad_token_id": None}


def tried(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids for every probe. Raises UserError where none does."""
    import tokenizers
    said = tokenizer.words()
    with told("the library behind transformers does not take it", "train with another"):
        library = tokenizers.Tokenizer.from_str(json.dumps(said))
        texts = list(probes(tokenizer, library))
        theirs = [e.ids for e in library.encode_batch(texts)]
    cut = list(zip(texts, tokenizer.encode_batch(texts), theirs, strict=True))
    wrong = sorted((case for case in cut if case[1] != case[2]), key=lambda case: len(case[0]))
    if wrong:
        text, here, there = map(_short, wrong[0])
        raise UserError(f"{text} is {here} here and would be {there} in transformers")
    return said


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def probes(tokenizer: Tokenizer, library: Any) -> Iterator[str]:
    """Hard texts, lines and a page of this program, and ids (of a large vocabulary a part): their text, their name, and
    their text beside another's."""
    yield from HARD
    lines = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))).split("\n")
    yield from lines
    yield "\n".join(lines)
    ids = sorted(set(library.get_vocab(with_added_tokens=True).values()))           # which may have holes
    ids = ids[::1 + len(ids) // 50_000]
    pieces = [tokenizer.decode([i]) for i in ids]
    for at, i in enumerate(ids):
        yield pieces[at]
        yield pieces[at] + pieces[(at * 7919 + 1) % len(pieces)]
        yield library.id_to_token(i) or ""


def _write_config(output: Path, ids: Mapping[str, Any], longest: int, tokenizer: Tokenizer | None) -> None:
    """tokenizer_config.json, by which transformers takes tokenizer.json as it is, names the special tokens that
    config.json has the ids of. `tokenizer`: None for an imported one, which may put what it likes around a text."""
    import tokenizers
    library = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    first = {k.removesuffix("_id"): i[0] if isinstance(i, list) else i for k, i in ids.items()}
    names = {k: library.id_to_token(i) for k, i in first.items() if i is not None}
    unknown = _unknown(library) or names.get("eos_token")
    # where no special token comes from text here, none does there
    whole = not any(token.special for token in library.get_added_tokens_decoder().values())
    ours = {"add_bos_token": tokenizer.bos is not None, "add_eos_token": False, "split_special_tokens": whole,
            OURS: {k: v for k, v in tokenizer.identity().items() if k != "files"}} if tokenizer else {}
    said = read_json(output / CONFIG) if (output / CONFIG).exists() else {}
    kept = {k: v for k, v in said.items() if k not in ("bos_token", "eos_token", "auto_map")}
    write_json(output / CONFIG, {
        **kept, "tokenizer_class": TOKENIZER_CLASS, **names, **({"unk_token": unknown} if unknown else {}),
        **ours, "clean_up_tokenization_spaces": False, "model_max_length": longest}, indent=2)


def _unknown(library: Any) -> str | None:
    model = json.loads(library.to_str())["model"]
    i = model.get("unk_id")
    return model.get("unk_token") if i is None else model["vocab"][i][0]


def import_tokenizer(folder: Path, output: Path) -> Tokenizer | None:
    """Keeps the folder's tokenizer beside the checkpoint: as an export of ours describes it, or in the first form found
    that this program reads."""
    tokenizer = _found(folder)
    if tokenizer is not None:
        tokenizer.identity()                                    # reads each file: what cannot be kept is said first
        (output / "tokenizer").mkdir()
        for name, path in tokenizer.files().items():
            shutil.copyfile(path, output / "tokenizer" / name)
    kept = output / "tokenizer" / CONFIG
    said = read_json(kept) if kept.exists() else {}
    if "auto_map" in said:                                      # names code, which an export would ask to have run
        write_json(kept, {k: v for k, v in said.items() if k != "auto_map"}, indent=2)
        return _found(output / "tokenizer")
    return tokenizer


def _found(folder: Path) -> Tokenizer | None:
    path = folder / CONFIG
    said = read_json(path).get(OURS) if path.is_file() else None
    if said is not None:
        try:
            checked(said, FORM)
            tokenizer = tokenizer_in(folder, said["type"], said.get("special_tokens", ()))
            if tokenizer is not None:
                tokenizer.eod = checked(said["eod"], (range(tokenizer.vocab_size), None))
                return tokenizer
        except ValueError as error:
            raise UserError(f"{path}: {OURS}: {error}; remove it.") from None
    kinds = ("HuggingFaceTokenizer", "GPT2BPETokenizer", "SentencePieceTokenizer")
    return next((found for kind in kinds if (found := tokenizer_in(folder, kind)) is not None), None)
