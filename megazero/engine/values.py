"""What somebody keeps of a run (a scheduler's place, a script's own words) as JSON and tensors: nothing is pickled.

    numbers, texts, None, lists, mappings of texts    as they are; tuples become lists
    inf, nan                                          {"$float": "nan"}
    other mappings                                    {"$pairs": [[key, value] ...]}, keys of numbers, texts, None
    tensors, arrays of numpy                          {"$tensor": NUMBER, "shape": [...], "dtype": "float32"}, the
                                                      tensor apart
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from megazero.base import Form, UserError, checked, loads, said
from megazero.state import DIMENSIONS, OF_DTYPE

Tensor = torch.Tensor
FLOAT, TENSOR, PAIRS = "$float", "$tensor", "$pairs"
KEYS = (type(None), bool, int, float, str)
DTYPE = {str(dtype).removeprefix("torch."): dtype for dtype in OF_DTYPE}
MARKED: Mapping[str, Form] = {          # what stands for something else
    FLOAT: {FLOAT: re.compile("-?inf|nan")}, PAIRS: {PAIRS: [list]},
    TENSOR: {TENSOR: re.compile(r"\d{1,9}"), "shape": [range(2**53)], "dtype": re.compile("|".join(DTYPE))}}


def packed(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors are put into `tensors`, by number. Raises UserError for what would have to be
    pickled, and says where it stands."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return packed(value.item(), where, tensors)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value.copy())
    if isinstance(value, Tensor):
        return _tensor(value, where, tensors)
    if isinstance(value, Mapping):
        if wrong := [k for k in value if type(k) not in KEYS or str(k).startswith("$")]:
            raise UserError(f"{where}: has the key {said(wrong[0])}; name it by a number, or a text that does not "
                            "begin with $.")
        pairs = [(key, packed(v, f"{where}.{key}", tensors)) for key, v in value.items()]
        return dict(pairs) if all(type(k) is str for k in value) else {PAIRS: [list(pair) for pair in pairs]}
    if isinstance(value, (list, tuple)):
        return [packed(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    raise UserError(f"{where}: is a {type(value).__name__}, which could only be pickled; keep numbers, texts, lists, "
                    "mappings and tensors.")


def _tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.layout != torch.strided or value.dtype not in OF_DTYPE or value.dim() > DIMENSIONS:
        kind = f"{str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"
        raise UserError(f"{where}: is a tensor of {kind} and {value.dim()} dimensions; keep dense ones of at most "
                        f"{DIMENSIONS}, of real numbers.")
    tensors[number := str(len(tensors))] = value.detach()
    return {TENSOR: number, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def readable(words: Mapping[str, Any], where: str) -> None:
    """Raises UserError for words that would be written and never read again: too deep, too many."""
    try:
        loads(json.dumps(words))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be kept as JSON ({error}); keep less, or keep it in tensors.") from None


def unpacked(value: Any, read: Callable[[str], Tensor]) -> Any:
    """What `packed` made of a value, turned round; `read` gives a tensor by its number. Raises ValueError."""
    if isinstance(value, list):
        return [unpacked(v, read) for v in value]
    if not isinstance(value, dict):
        return value
    mark = next((key for key in value if key.startswith("$")), None)
    if mark is None:
        return {key: unpacked(v, read) for key, v in value.items()}
    if mark not in MARKED or faulty(value, MARKED[mark]):
        raise ValueError(f"{said(value)} stands for nothing")
    if mark == FLOAT:
        return float(value[FLOAT])
    if mark == PAIRS:
        return {key: unpacked(v, read) for key, v in value[PAIRS]}
    shape, dtype = value["shape"], DTYPE[value["dtype"]]
    found = torch.empty(shape, dtype=dtype) if 0 in shape else read(value[TENSOR])
    if found.numel() != math.prod(shape) or found.dtype != dtype:
        raise ValueError(f"{said(value)} is not what that tensor is")
    return found.reshape(shape)


def faulty(value: Mapping[str, Any], form: Form) -> bool:
    try:
        checked(value, form)
    except ValueError:
        return True
    return any(len(pair) != 2 or type(pair[0]) not in KEYS for pair in value.get(PAIRS, []))
