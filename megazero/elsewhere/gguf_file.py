"""One of our checkpoints as a GGUF file, which llama.cpp and its kin run: tensors by the `gguf` package's own table of
names, one at a time in memory.

llama.cpp turns neighbouring channels in its llama models, so rows of q and k change places there. Its vectors are fp32
whatever the matrices are.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megazero.base import UserError
from megazero.data import load_tokenizer
from megazero.elsewhere.leave import Told, cannot_say, theirs
from megazero.elsewhere.names import NamedRow
from megazero.elsewhere.source import Tensors, here
from megazero.plan import Architecture, Family, Llama3, Rotary, family_of, rows, shapes
from megazero.state import Reader

Tensor = torch.Tensor
# model_type -> the name of its graph in llama.cpp
GRAPHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "phi3": "phi3",
          "starcoder2": "starcoder2"}
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}       # of matrices, in its words
BLOCK = 32                              # channels that share a scale in q8_0


def write_gguf(reader: Reader, path: Path, kind: str, told: Told = lambda *_: None) -> str | None:
    """Writes the file, its matrices in `kind` of KINDS. Returns why it has no tokenizer, if it has none. Raises
    UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError("--to gguf: needs the package gguf, which is not installed; pip install gguf.") from None
    a = reader.architecture
    family = family_of(a, reader.index.get("family"))
    graph = _graph(a, family)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[graph], a.layers)
    tensors: Tensors = {}
    for name, t in theirs(reader, _rows(a, family, graph)).items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(f"--to gguf: the package gguf knows no name for {name}; take a newer one.")
        tensors[new] = t
    if a.rotary and a.rotary.scaling:
        tensors["rope_freqs.weight"] = here(_stretch(a.rotary, a.seq_length))
    writer = gguf.GGUFWriter(str(path), graph)
    for add, value in _words(a, gguf, kind):
        getattr(writer, f"add_{add}")(value)
    without = _tokenizer(reader, writer, gguf)
    forms = {name: _form(t.shape, kind) for name, t in tensors.items()}
    for name, t in tensors.items():
        made = gguf.GGMLQuantizationType[forms[name]]
        shape = gguf.quant_shape_to_byte_shape(t.shape, made) if forms[name] in ("BF16", "Q8_0") else t.shape
        dtype = np.dtype({"F16": "float16", "F32": "float32"}.get(forms[name], "uint8"))
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    _write(writer, gguf, tensors, forms, told)
    writer.close()
    return without


def _write(writer: Any, gguf: Any, tensors: Tensors, forms: Mapping[str, str], told: Told) -> None:
    done, total = 0, sum(int(np.prod(t.shape)) for t in tensors.values())
    for name, t in tensors.items():
        tensor = t.read().float()
        data = tensor.numpy()
        if forms[name] == "F16":
            data = data.astype(np.float16)
            if not np.isfinite(data).all() and tensor.isfinite().all():
                raise UserError(f"--dtype fp16: {name} holds {tensor.abs().max().item():g}, more than fp16 can hold; "
                                "write bf16 or fp32.")
        elif forms[name] != "F32":
            data = gguf.quants.quantize(data, gguf.GGMLQuantizationType[forms[name]])
            data = data if data.dtype == np.uint8 else data.view(np.uint8)
        writer.write_tensor_data(data)
        done += tensor.numel()
        told(done, total)


def _stretch(rotary: Rotary, length: int) -> Tensor:
    """What each frequency is divided by, [channels / 2]."""
    plain = replace(rotary, scaling=None)
    return torch.tensor(plain.frequencies(length)) / torch.tensor(rotary.frequencies(length))


def _form(shape: tuple[int, ...], kind: str) -> str:
    """What a tensor is stored as: vectors whole, and rows that no blocks fit in half precision."""
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % BLOCK else KINDS[kind]


def _graph(a: Architecture, family: Family) -> str:
    graph = GRAPHS.get(family.model_type)
    if graph is None:
        raise UserError(f"--to gguf: {family.model_type} is not among the models that are written here: "
                        f"{', '.join(GRAPHS)}.")
    cannot_say(a, "gguf", "learned_positions rotary norm activation bias qkv_bias o_bias norm_bias qk_norm tied",
               window=a.window if a.window >= a.seq_length else 0)
    if a.rotary and a.rotary.scaling and not (isinstance(a.rotary.scaling, Llama3) and graph == "llama"):
        raise UserError(f"--to gguf: its rotary scaling is not that of Llama 3, the only one written for {graph}.")
    if a.activation not in ("swiglu", "gelu_tanh"):
        raise UserError(f"--to gguf: its activation is {a.activation}, llama.cpp has GELU by the tanh formula and "
                        "SwiGLU.")
    return graph


def _rows(a: Architecture, family: Family, graph: str) -> list[NamedRow]:
    """Hugging Face's rows; matrices always [out, in]."""
    def form(name: str) -> str:
        return "turned" if graph == "llama" and ("q_proj" in name or "k_proj" in name) else "stacked"

    ours = shapes(a)
    if lost := next((r.theirs for r in rows(a, family) for n in r.ours if n not in ours), None):
        raise UserError(f"--to gguf: llama.cpp's {graph} needs {lost}, which this model does not have.")
    return [NamedRow(r.theirs, r.ours, form(r.theirs)) for r in rows(a, family)]


def _words(a: Architecture, gguf: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """(what, value) of its header."""
    yield "file_type", getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(KINDS[kind], f"MOSTLY_{KINDS[kind]}"))
    yield from (("context_length", a.learned_positions or a.seq_length), ("embedding_length", a.hidden),
                ("block_count", a.layers), ("feed_forward_length", a.ffn), ("head_count", a.heads),
                ("head_count_kv", a.kv_heads), ("vocab_size", a.vocab_size), ("key_length", a.head_dim),
                ("value_length", a.head_dim))
    yield ("layer_norm_rms_eps" if a.norm == "RMSNorm" else "layer_norm_eps"), a.epsilon
    if a.rotary:
        yield from (("rope_dimension_count", a.rotary.channels), ("rope_freq_base", a.rotary.base))


def _tokenizer(reader: Reader, writer: Any, gguf: Any) -> str | None:
    """The tokenizer's words where they are GPT-2's; else a sentence."""
    identity = reader.index["tokenizer"]
    if not identity or identity["type"] != "GPT2BPETokenizer":
        writer.add_tokenizer_model("none")
        what = f"a {identity['type']}" if identity else "no tokenizer"
        return f"the run has {what}, and only a GPT2BPETokenizer is written: the file has token ids alone"
    tokenizer = load_tokenizer(identity, reader.folder.parent / "tokenizer")
    files = tokenizer.files()
    vocabulary = json.loads(files["vocab.json"].read_text())
    merges = [line for line in files["merges.txt"].read_text().splitlines() if line and not line.startswith("#version")]
    pieces = {i: piece for piece, i in vocabulary.items()}
    size = reader.architecture.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([pieces.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([gguf.TokenType.UNUSED if i not in pieces else
                            gguf.TokenType.CONTROL if i == tokenizer.eod else gguf.TokenType.NORMAL
                            for i in range(size)])
    writer.add_token_merges(merges)
    if tokenizer.eod is not None:
        writer.add_bos_token_id(tokenizer.eod)
        writer.add_eos_token_id(tokenizer.eod)
    return None
