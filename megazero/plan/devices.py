"""What makers state of their devices. Pure."""

from typing import NamedTuple

GB = 10**9


class Device(NamedTuple):
    """One that has all `words` in the name by which CUDA calls it.

    memory      bytes
    peaks       FLOP/s of dense matrix products by dtype, without sparsity
    """

    words: str
    memory: int
    peaks: dict[str, float]


def _stated(half: float, single: float) -> dict[str, float]:
    """Peaks from TFLOP/s of tensor cores in half precision, and of fp32."""
    return {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": single * 1e12}


# NVIDIA's data sheets of the A100, H100 and H200, which state tensor cores with sparsity: half of it. The first row
# that fits counts.
DEVICES = (
    Device("H100 PCIe", 80 * GB, _stated(756, 51)),
    Device("H100 NVL", 94 * GB, _stated(835, 60)),
    Device("H200", 141 * GB, _stated(989, 67)),
    Device("H100", 80 * GB, _stated(989, 67)),
    Device("A100 80GB", 80 * GB, _stated(312, 19.5)),
    Device("A100", 40 * GB, _stated(312, 19.5)),
)


def device_of(name: str) -> Device | None:
    """The row of a device by its name; None for one that is not listed, which must be measured."""
    return next((d for d in DEVICES if all(word in name for word in d.words.split())), None)
