"""Rotary position embedding: frequencies of each kind, and the table of angles made from them once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cableway.ipc.modelfiles import ModelError


def _default(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Positions are squeezed by `factor`."""
    return frequencies / parameters["factor"]


def _llama3(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended by their turns in the old context."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept_frac = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept_frac + (1 - kept_frac) / parameters["factor"])


_KINDS: dict[str, tuple[Callable[[Tensor, Mapping[str, Any]], Tensor], tuple[str, ...]]] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}
"""rope_type -> (how it changes the plain frequencies, the parameters it takes)"""


@dataclass(frozen=True)
class Rope:
    """Rotation by position of the first `rotary_dim` numbers of a head. A value: layers alike share a table."""

    rotary_dim: int
    theta: float
    kind: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, rotary_dim: int, parameters: Mapping[str, Any]) -> "Rope":
        """From a config's `rope_parameters`; ModelError when they are of an unknown kind or not complete."""
        kind = parameters.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ModelError(f"rope_type {kind!r} is not supported (known: {', '.join(_KINDS)})")
        wanted = ("rope_theta", *_KINDS[kind][1])
        for name in wanted:
            value = parameters.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ModelError(f"rope_parameters of type {kind!r} need a positive number {name}, not {value!r}")
        if rotary_dim % 2:
            raise ModelError(f"rotary embedding of an odd number of dimensions, {rotary_dim}")
        values = tuple((name, float(parameters[name])) for name in wanted[1:])
        return cls(rotary_dim, float(parameters["rope_theta"]), kind, values)

    def table(self, num_positions: int, divisors: Tensor | None = None) -> Tensor:
        """[num_positions, rotary_dim] f32: cosines, then sines, of each position's angles.

        Args:
            divisors: [rotary_dim / 2] numbers that a checkpoint divides the frequencies by.
        """
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        frequencies = _KINDS[self.kind][0](1 / self.theta**exponents, dict(self.parameters))
        if divisors is not None:
            frequencies = frequencies.to(divisors.device) / divisors
        angles = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), -1)
