"""A checkpoint's tokenizer as Hugging Face's files, and theirs as a checkpoint's."""

import shutil
from pathlib import Path
from typing import Any

from megazero.base import write_json
from megazero.data import Tokenizer, build_tokenizer, load_tokenizer
from megazero.state import Reader


def export_tokenizer(reader: Reader, output: Path, longest: int) -> Tokenizer | None:
    """Copies the checkpoint's tokenizer files,
    and writes the tokenizer_config.json by which transformers finds its class."""
    identity = reader.index["tokenizer"]
    if identity is None:
        return None
    tokenizer = load_tokenizer(identity, reader.folder.parent / "tokenizer")
    for name, path in tokenizer.files().items():
        shutil.copyfile(path, output / name)
    config = _tokenizer_config(tokenizer)
    if config and not (output / "tokenizer_config.json").exists():
        write_json(output / "tokenizer_config.json", {**config, "model_max_length": longest}, indent=2)
    return tokenizer


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Empty where transformers has no class that would give the same ids."""
    kind, path = type(tokenizer).__name__, tokenizer.files().get("tokenizer.model")
    if kind == "SentencePieceTokenizer" and path is not None:
        return _sentencepiece_config(path)
    if kind in ("GPT2BPETokenizer", "HuggingFaceTokenizer"):
        end = tokenizer.decode([tokenizer.eod]) if tokenizer.eod is not None else None
        special = {"bos_token": end, "eos_token": end, "unk_token": end} if end else {}
        return {"tokenizer_class": {"GPT2BPETokenizer": "GPT2Tokenizer"}.get(kind, "PreTrainedTokenizerFast"),
                **special}
    return {}


def _sentencepiece_config(path: Path) -> dict[str, Any]:
    """transformers reads Llama's kind of model alone: pairs merged, text as it is.
    Others would get other ids without a word."""
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE or model.normalizer_spec.name != "identity":
        return {}
    ids = {"bos_token": model.trainer_spec.bos_id, "eos_token": model.trainer_spec.eos_id,
           "unk_token": model.trainer_spec.unk_id}
    return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": False,
            "add_prefix_space": model.normalizer_spec.add_dummy_prefix, "clean_up_tokenization_spaces": False,
            **{k: model.pieces[i].piece for k, i in ids.items() if i >= 0}}


def import_tokenizer(folder: Path, output: Path) -> Tokenizer | None:
    """Keeps the folder's tokenizer beside the checkpoint, in the first form found that this program reads."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
    there = {name: str(folder / name) for name in names if (folder / name).is_file()}
    if "tokenizer.json" in there:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=there["tokenizer.json"])
    elif "vocab.json" in there and "merges.txt" in there:
        tokenizer = build_tokenizer("GPT2BPETokenizer", vocab_file=there["vocab.json"], merge_file=there["merges.txt"])
    elif "tokenizer.model" in there:
        tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=there["tokenizer.model"])
    else:
        return None
    (output / "tokenizer").mkdir()
    for name, path in tokenizer.files().items():
        shutil.copyfile(path, output / "tokenizer" / name)
    return tokenizer
