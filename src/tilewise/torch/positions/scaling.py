"""How rotary frequencies are changed to reach beyond the length a model was trained on.

A scaling answers `frequencies(base, theta)`, made of the unscaled ones (d/2,), theta^(-2i/d), and `magnitude`, a factor
of the turned features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...validate.operand import real


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not real(name, number) > 0:
            raise ValueError(f"{name}: got {number}, expected a positive number")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023): all positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError, beginning with the argument's name."""
        _positive(factor=self.factor)

    @property
    def magnitude(self) -> float:
        """1: features keep their length."""
        return 1.0

    def frequencies(self, base: Tensor, theta: float) -> Tensor:
        """base (d/2,) -> (d/2,)."""
        return base / self.factor


@dataclass(frozen=True, slots=True)
class NtkScaling:
    """The base changed so that the slowest pair is interpolated by `factor` and the fastest not at all (bloc97, 2023).

    theta becomes theta * factor^(d / (d - 2)), so frequency i of d/2 is divided by factor^(2 i / (d - 2)).
    """

    factor: float

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError, beginning with the argument's name."""
        _positive(factor=self.factor)

    @property
    def magnitude(self) -> float:
        """1: features keep their length."""
        return 1.0

    def frequencies(self, base: Tensor, theta: float) -> Tensor:
        """base (d/2,) -> (d/2,)."""
        pairs = base.shape[0]
        share = torch.arange(pairs, dtype=base.dtype, device=base.device) / max(pairs - 1, 1)
        return base / self.factor**share


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """The scaling of Llama 3.1: slow pairs interpolated, fast ones kept, a smooth passage between.

    Attributes:
        factor: how much slow pairs are slowed down.
        low_freq_factor, high_freq_factor: turns within `original_length` up to which a pair is slow, and from which it
            is fast.
        original_length: the length the model was trained on.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError, beginning with the argument's name."""
        _positive(factor=self.factor, original_length=self.original_length)
        if not real("low_freq_factor", self.low_freq_factor) < real("high_freq_factor", self.high_freq_factor):
            raise ValueError(
                f"high_freq_factor: got {self.high_freq_factor}, expected more than low_freq_factor, "
                f"{self.low_freq_factor}"
            )

    @property
    def magnitude(self) -> float:
        """1: features keep their length."""
        return 1.0

    def frequencies(self, base: Tensor, theta: float) -> Tensor:
        """base (d/2,) -> (d/2,)."""
        turns = self.original_length * base / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * base / self.factor + kept * base


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): interpolation by a ramp over the pairs' turns, and slightly longer features.

    Attributes:
        factor: how much slow pairs are slowed down.
        original_length: the length the model was trained on.
        beta_fast, beta_slow: turns within `original_length` from which a pair is kept, and up to which it is slowed.
        attention_factor: the features' factor; None is 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError, beginning with the argument's name."""
        _positive(
            factor=self.factor, original_length=self.original_length, beta_slow=self.beta_slow, beta_fast=self.beta_fast
        )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast: got {self.beta_fast}, expected at least beta_slow, {self.beta_slow}")
        if self.attention_factor is not None:
            _positive(attention_factor=self.attention_factor)

    @property
    def magnitude(self) -> float:
        """Factor of queries and keys alike."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, base: Tensor, theta: float) -> Tensor:
        """base (d/2,) -> (d/2,)."""
        if theta == 1:
            raise ValueError("theta: got 1, expected another base, with which pairs turn at different speeds")
        pairs = base.shape[0]
        first = max(math.floor(self._pair(self.beta_fast, pairs, theta)), 0)
        last = min(math.ceil(self._pair(self.beta_slow, pairs, theta)), 2 * pairs - 1)
        numbers = torch.arange(pairs, dtype=base.dtype, device=base.device)
        slowed = ((numbers - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
        return (1 - slowed) * base + slowed * base / self.factor

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """The number of the pair, as a real number, that turns so often within the original length."""
        return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)


Scaling = LinearScaling | NtkScaling | Llama3Scaling | YarnScaling
