"""What makers state of their devices. Pure."""

import re
from typing import NamedTuple

GB = 10**9


class Device(NamedTuple):
    """One that has all `words` in the name by which CUDA calls it, whole: H20 is not H200.

    memory      bytes
    peaks       FLOP/s of dense matrix products by dtype, without sparsity
    """

    words: str
    memory: int
    peaks: dict[str, float]


def _stated(half: float, single: float) -> dict[str, float]:
    """Peaks from TFLOP/s of tensor cores in half precision, and of fp32."""
    return {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": single * 1e12}


# NVIDIA's data sheets, which state tensor cores with sparsity: half of it (of H20 and the NVL ones as vendors repeat
# them). The first row that fits counts.
DEVICES = (
    Device("GB200", 186 * GB, _stated(2500, 80)),
    Device("B200", 180 * GB, _stated(2250, 75)),
    Device("GH200", 96 * GB, _stated(989, 67)),
    Device("H200 NVL", 141 * GB, _stated(835, 60)),
    Device("H200", 141 * GB, _stated(989, 67)),
    Device("H100 PCIe", 80 * GB, _stated(756, 51)),
    Device("H100 NVL", 94 * GB, _stated(835, 60)),
    Device("H100", 80 * GB, _stated(989, 67)),
    Device("H800 PCIe", 80 * GB, _stated(756, 51)),
    Device("H800", 80 * GB, _stated(989, 67)),
    Device("H20", 96 * GB, _stated(148, 44)),
    Device("A100 80GB", 80 * GB, _stated(312, 19.5)),
    Device("A100", 40 * GB, _stated(312, 19.5)),
    Device("L40S", 48 * GB, _stated(362, 91.6)),
    Device("RTX 4090", 24 * GB, _stated(165, 82.6)),            # with sums in fp32
)
LESS = {"MIG", "Laptop", "D"}           # in the name of a slice of a device, or of a smaller one that is called alike


def device_of(name: str) -> Device | None:
    """The row of a device by its name; None for one that is not listed, which must be measured."""
    words = set(re.split(r"[ -]", name))
    return None if words & LESS else next((d for d in DEVICES if words.issuperset(d.words.split())), None)


def named(word: str) -> Device | None:
    """The row that a flag names: as CUDA calls it, in small letters, with - between words."""
    return next((d for d in DEVICES if d.words.lower().replace(" ", "-") == word.lower()), None)
