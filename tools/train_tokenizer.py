"""A tokenizer of your own text, ready for preprocess_data.py; see --help."""

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megazero.base import UserError, said
from megazero.corpus import Place, Unreadable, documents, find_sources, read_chunks
from megazero.data import END_OF_TEXT, characters_of, is_text
from megazero.settings import option, parse, run

MOST_IDS = 1 << 24                      # memory for as many is taken at once
LINE = 1 << 16                          # characters of a line that sentencepiece is given at a time


@dataclass(frozen=True)
class Settings:
    """Trains a tokenizer on text."""

    input: tuple[str, ...] = option(help="files of JSONL or text, or folders of them", unit="path")
    output: str = option(help="the path to write: a folder (bpe), a .model file (sentencepiece) or a .json file (char)",
                         unit="path")
    type: str = option("bpe", help="bpe: byte-level, for HuggingFaceTokenizer; "
                                   "sentencepiece: for SentencePieceTokenizer; char: for CharTokenizer",
                       choices=("bpe", "sentencepiece", "char"))
    vocab_size: int | None = option(None, help="number of ids, the end of document among them (bpe, sentencepiece)",
                                    unit="ids")
    special_tokens: tuple[str, ...] = option(
        (), help="tokens that are never cut, such as <fim_prefix>; ids of --vocab-size too (bpe, sentencepiece)",
        unit="token")
    json_keys: tuple[str, ...] = option(("text",), help="keys of the JSONL lines to read", unit="key")


def main() -> None:
    settings, began = parse(Settings, prog="train_tokenizer.py"), time.monotonic()
    if settings.type == "char" and settings.vocab_size is not None:
        raise UserError(f"--vocab-size {settings.vocab_size}: --type char takes every character there is; "
                        "leave it out.")
    if settings.type == "char" and settings.special_tokens:
        raise UserError(f"--special-tokens {' '.join(settings.special_tokens)}: "
                        "--type char knows single characters alone; leave it out.")
    if settings.type != "char" and settings.vocab_size is None:
        raise UserError(f"--vocab-size is missing: --type {settings.type} needs the number of ids, such as 8192.")
    if (settings.vocab_size or 0) > MOST_IDS:
        raise UserError(f"--vocab-size {settings.vocab_size}: is more than {MOST_IDS:,}; write a size such as 8192.")
    strange = [said(token) for token in settings.special_tokens if not (token and is_text(token))]
    if strange:
        raise UserError(f"--special-tokens {strange[0]}: is no text; write tokens such as <fim_prefix>.")
    if Path(settings.output).exists():
        raise UserError(f"--output {settings.output}: is there already, and data or checkpoints may depend on it; "
                        "name another, or remove it.")
    texts = Texts(settings)
    try:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        ids = {"bpe": train_bpe, "sentencepiece": train_sentencepiece, "char": train_char}[settings.type](
            texts, settings)
    except OSError as error:
        raise UserError(f"--output {settings.output}: cannot be written ({error.strerror}).") from None
    if settings.vocab_size is not None and ids < settings.vocab_size:
        print(f"--vocab-size {settings.vocab_size}: this text gives no more than {ids:,} ids; more text gives more",
              file=sys.stderr)
    print(f"{settings.output}: {ids:,} ids from {texts.characters / 1e6:,.1f} million characters "
          f"({texts.skipped:,} inputs skipped) in {time.monotonic() - began:.1f} s")


class Texts:
    """The texts of the inputs, in order, counted as they pass."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sources = find_sources(settings.input, settings.json_keys)
        self.characters = self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        keys = self._settings.json_keys
        for found in (found for chunk in read_chunks(self._sources, keys, Place()) for found in documents(chunk, keys)):
            if isinstance(found, Unreadable):
                self.skipped += 1
                continue
            for text in (text for texts in found.values() for text in texts):
                self.characters += len(text)
                yield text
        if not self.characters:
            raise UserError(f"--input {' '.join(self._settings.input)}: holds no text that can be read "
                            f"({self.skipped:,} inputs skipped); name files that do.")


def train_bpe(texts: Iterable[str], settings: Settings) -> int:
    """GPT-2's kind: any text can be said, bytes being its alphabet."""
    size = settings.vocab_size or 0
    least = 257 + len(settings.special_tokens)
    if size < least:
        raise UserError(f"--vocab-size {size}: byte-level BPE needs at least {least}, "
                        f"the bytes, {END_OF_TEXT} and special tokens.")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"               # one process that trains may use every core
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT, *settings.special_tokens],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(settings.output)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def train_sentencepiece(texts: Iterable[str], settings: Settings) -> int:
    """A BPE model that gives back every text as it was: no normalisation, unknown characters as bytes."""
    from sentencepiece import SentencePieceTrainer
    lines = (line[at:at + LINE] for text in texts for line in text.split("\n") for at in range(0, len(line), LINE))
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=settings.vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False,
            max_sentence_length=4 * LINE,                       # bytes; what is longer would be left out without a word
            user_defined_symbols=list(settings.special_tokens), minloglevel=2, num_threads=os.cpu_count())
    except RuntimeError as error:
        raise UserError(f"--vocab-size {settings.vocab_size}: sentencepiece cannot make that many pieces of this text "
                        f"({' '.join(str(error).split())}).") from None
    Path(settings.output).write_bytes(model.getvalue())
    return settings.vocab_size or 0


def train_char(texts: Iterable[str], settings: Settings) -> int:
    """The characters that occur, sorted."""
    characters = characters_of(texts)
    Path(settings.output).write_text(json.dumps(characters, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(characters)


if __name__ == "__main__":
    run(main)
