"""The floating-point types: one table for settings, sizes, tensors and files."""

from typing import NamedTuple


class Dtype(NamedTuple):
    """torch's name, bytes of an element, the code in safetensors files."""

    torch: str
    width: int
    code: str


DTYPES = {
    "fp64": Dtype("float64", 8, "F64"),
    "fp32": Dtype("float32", 4, "F32"),
    "bf16": Dtype("bfloat16", 2, "BF16"),
    "fp16": Dtype("float16", 2, "F16"),
}
