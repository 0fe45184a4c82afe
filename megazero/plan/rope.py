"""Rotary positions (Su et al. 2021, RoFormer) as numbers: how fast each pair of channels turns, and the ways in which
weights that were trained on short sequences are stretched over long ones. Pure.

A scaling is a dataclass whose fields are the keys that `rope_parameters` of a config.json has for it, and those that
flags have; a new one is one more class, in SCALINGS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log, pi

Frequencies = list[float]               # radians per token of each pair of channels, the fastest first


@dataclass(frozen=True)
class Rotary:
    """`channels` of each head turn: pair j by base^(-2 j / channels) radians per token, unless `scaling` says so."""

    base: float
    channels: int
    scaling: "Scaling | None" = None

    def frequencies(self, length: int) -> Frequencies:
        """Those of sequences of so many tokens."""
        plain = powers(self.base, self.channels)
        return self.scaling.stretched(plain, self.base, length) if self.scaling else plain

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.amplitude if self.scaling else 1.0


def powers(base: float, channels: int) -> Frequencies:
    return [base ** (-2 * j / channels) for j in range(channels // 2)]


@dataclass(frozen=True)
class Linear:
    """Positions lie closer together (Chen et al. 2023, Position Interpolation)."""

    factor: float
    rope_type: str = "linear"
    amplitude = 1.0

    def stretched(self, plain: Frequencies, base: float, length: int) -> Frequencies:
        return [f / self.factor for f in plain]


@dataclass(frozen=True)
class Dynamic:
    """Sequences longer than the original length have a larger base, so that the slowest pair of channels turns as far
    as `factor` says (Peng et al. 2023, YaRN, appendix B.1: dynamic NTK-aware interpolation). Those of a run are as long
    as its samples, also while it generates."""

    factor: float
    original_max_position_embeddings: int
    rope_type: str = "dynamic"
    amplitude = 1.0

    def stretched(self, plain: Frequencies, base: float, length: int) -> Frequencies:
        longer, channels = max(length / self.original_max_position_embeddings, 1), 2 * len(plain)
        grown = self.factor * longer - (self.factor - 1)
        return powers(base * grown ** (channels / max(channels - 2, 1)), channels)


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths are stretched, short ones kept, those between blended (Dubey et al. 2024; Meta's code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"
    amplitude = 1.0

    def stretched(self, plain: Frequencies, base: float, length: int) -> Frequencies:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = [self.original_max_position_embeddings * f / (2 * pi) for f in plain]       # within the original length
        return blended(plain, self.factor, [(n - low) / (high - low) for n in turns])


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn often within the original length are kept, those that turn seldom stretched, and scores grow with
    the factor (Peng et al. 2023, sections 3.2 to 3.4). `attention_factor` 0: by the formula of section 3.4, or with
    both `mscale` by that of DeepSeek-V2; `truncate`: the borders between the three are whole channels."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    rope_type: str = "yarn"

    @property
    def amplitude(self) -> float:
        def grown(by: float) -> float:
            return 0.1 * by * log(self.factor) + 1 if self.factor > 1 else 1.0

        both = self.mscale and self.mscale_all_dim
        return self.attention_factor or (grown(self.mscale) / grown(self.mscale_all_dim) if both else grown(1.0))

    def stretched(self, plain: Frequencies, base: float, length: int) -> Frequencies:
        channels, original = 2 * len(plain), self.original_max_position_embeddings

        def pair(turns: float) -> float:
            """Which one turns so often within the original length."""
            return channels * log(original / (turns * 2 * pi)) / (2 * log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        low, high = (floor(low), ceil(high)) if self.truncate else (low, high)
        low, high = max(low, 0), min(high, channels - 1)
        return blended(plain, self.factor, [1 - (j - low) / (high - low or 0.001) for j in range(len(plain))])


Scaling = Linear | Dynamic | Llama3 | Yarn
SCALINGS: dict[str, type[Scaling]] = {"linear": Linear, "dynamic": Dynamic, "llama3": Llama3, "yarn": Yarn}


def blended(plain: Frequencies, factor: float, kept: Sequence[float]) -> Frequencies:
    """Each frequency kept (1 or more), divided by `factor` (0 or less), or a mean of both."""
    parts = [min(max(part, 0.0), 1.0) for part in kept]
    return [f * (part + (1 - part) / factor) for f, part in zip(plain, parts, strict=True)]
