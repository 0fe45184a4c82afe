"""What somebody keeps of a run (a scheduler's place, a script's own words) as JSON and tensors: nothing is pickled.

    numbers, texts, None, lists, mappings of texts    as they are; tuples become lists
    inf, nan                                          {"$float": "nan"}
    tensors, arrays of numpy                          {"$tensor": NUMBER, "shape": [...]}, the tensor apart
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from megazero.base import UserError, said

Tensor = torch.Tensor
FLOAT, TENSOR = "$float", "$tensor"
NUMBER = re.compile(r"\d{1,9}")


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
        tensors[number := str(len(tensors))] = value.detach()
        return {TENSOR: number, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        if wrong := next((k for k in value if not isinstance(k, str) or k.startswith("$")), None):
            raise UserError(f"{where}: has the key {said(wrong)}; name it by a text that does not begin with $.")
        return {key: packed(v, f"{where}.{key}", tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    raise UserError(f"{where}: is a {type(value).__name__}, which could only be pickled; keep numbers, texts, lists, "
                    "mappings and tensors.")


def unpacked(value: Any, read: Callable[[str], Tensor]) -> Any:
    """What `packed` made of a value, turned round; `read` gives a tensor by its number. Raises ValueError."""
    if isinstance(value, list):
        return [unpacked(v, read) for v in value]
    if not isinstance(value, dict):
        return value
    if FLOAT in value:
        return float(value[FLOAT])
    if TENSOR in value:
        shape = [int(n) for n in value["shape"]]
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=getattr(torch, value["dtype"]))
        return read(value[TENSOR]).reshape(shape)
    return {key: unpacked(v, read) for key, v in value.items()}
