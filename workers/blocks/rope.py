"""Rotary position embedding: frequencies of each kind, and the table of angles made from them once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cableway.ipc.modelfiles import ModelError

Parameters = Mapping[str, Any]


class _Plain(NamedTuple):
    """What a kind starts from: a rotation of `dim` numbers whose slowest turns once in about `theta` positions."""

    dim: int
    theta: float
    num_positions: int  # that the model is loaded for

    @property
    def frequencies(self) -> Tensor:
        """[dim / 2] radians a position"""
        return 1 / self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim)


def _default(plain: _Plain, p: Parameters) -> Tensor:
    return plain.frequencies


def _linear(plain: _Plain, p: Parameters) -> Tensor:
    """Positions are squeezed by `factor`."""
    return plain.frequencies / p["factor"]


def _llama3(plain: _Plain, p: Parameters) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended by their turns in the old context."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * plain.frequencies / (2 * math.pi)
    kept_frac = ((turns - low) / (high - low)).clamp(0, 1)
    return plain.frequencies * (kept_frac + (1 - kept_frac) / p["factor"])


def _dynamic(plain: _Plain, p: Parameters) -> Tensor:
    """The slowest wave is stretched so far as positions go beyond the old context. Ours are those it is loaded for:
    what was computed once stays valid as a sequence grows."""
    old, factor = p["max_position_embeddings"], p["factor"]
    stretch = factor * max(plain.num_positions, old) / old - (factor - 1)
    return plain._replace(theta=plain.theta * stretch ** (plain.dim / (plain.dim - 2))).frequencies


def _alpha(plain: _Plain, p: Parameters) -> Tensor:
    """The slowest wave is stretched by a factor of its own."""
    return plain._replace(theta=plain.theta * p["alpha"] ** (plain.dim / (plain.dim - 2))).frequencies


def _yarn(plain: _Plain, p: Parameters) -> Tensor:
    """As llama3, but blended by the index of a frequency, between those that turn beta_slow and beta_fast times."""
    old, theta, dim = p["original_max_position_embeddings"], plain.theta, plain.dim
    low, high = (
        dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (p.get("beta_fast") or 32, p.get("beta_slow") or 1)
    )
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed_frac = ((torch.arange(dim // 2) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return plain.frequencies * (1 - slowed_frac + slowed_frac / p["factor"])


def _longrope(plain: _Plain, p: Parameters) -> Tensor:
    """Each frequency has a divisor of its own, one for contexts that are no longer than the old one, one for others."""
    is_long = plain.num_positions > p["original_max_position_embeddings"]
    divisors = p["long_factor" if is_long else "short_factor"]
    if len(divisors) != plain.dim // 2:
        raise ModelError(f"rope_parameters: longrope needs {plain.dim // 2} factors, not {len(divisors)}")
    return plain.frequencies / torch.tensor(divisors)


def _no_length(p: Parameters) -> float:
    return 1.0


def yarn_length(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies by to keep attention as sharp in a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_length(p: Parameters) -> float:
    if p.get("attention_factor"):
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return yarn_length(p["factor"], p["mscale"]) / yarn_length(p["factor"], p["mscale_all_dim"])
    return yarn_length(p["factor"])


def _longrope_length(p: Parameters) -> float:
    if p.get("attention_factor"):
        return p["attention_factor"]
    factor, old = p["factor"], p["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0


class _Kind(NamedTuple):
    frequencies: Callable[[_Plain, Parameters], Tensor]
    needed: tuple[str, ...] = ()
    length: Callable[[Parameters], float] = _no_length  # of the rotated vectors


_ORIGINAL = "original_max_position_embeddings"
_OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_FACTORS = ("long_factor", "short_factor")
_LONGROPE = _Kind(_longrope, ("factor", _ORIGINAL, *_FACTORS), _longrope_length)
_KINDS = {
    **dict.fromkeys(("default", "mrope"), _Kind(_default)),
    "linear": _Kind(_linear, ("factor",)),
    "dynamic": _Kind(_dynamic, ("factor", "max_position_embeddings")),
    "llama3": _Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
    **dict.fromkeys(("alpha", "xdrope"), _Kind(_alpha, ("alpha",))),
    "yarn": _Kind(_yarn, ("factor", _ORIGINAL), _yarn_length),
    **dict.fromkeys(("longrope", "su"), _LONGROPE),
}
"""rope_type -> how it is computed, and the parameters it cannot do without. Those that give each of several positions
(time, height, width) frequencies of its own, `mrope` and `xdrope`, are plain ones: of text they are all the same."""


@dataclass(frozen=True)
class Rope:
    """Rotation by position of the first `rotary_dim` numbers of a head. A value: layers alike share a table."""

    rotary_dim: int
    theta: float
    kind: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, head_dim: int, parameters: Parameters) -> "Rope":
        """From a config's `rope_parameters`; ModelError when they are of an unknown kind or not complete.

        `partial_rotary_factor` among them is the part of a head that is rotated.
        """
        kind = parameters.get("rope_type", "default")
        if kind == "dynamic" and parameters.get("alpha"):  # as Hunyuan calls it
            kind = "alpha"
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ModelError(f"rope_type {kind!r} is not supported (known: {', '.join(_KINDS)})")
        wanted = ("rope_theta", *_KINDS[kind].needed)
        for name in (*wanted, *(name for name in _OPTIONAL if parameters.get(name) is not None)):
            if not _is_sound(name, parameters.get(name)):
                value = parameters.get(name)
                raise ModelError(f"rope_parameters of type {kind!r} need a positive number {name}, not {value!r}")
        part = parameters.get("partial_rotary_factor", 1.0)
        rotary_dim = int(head_dim * part) if isinstance(part, int | float) and 0 < part <= 1 else 0
        if rotary_dim % 2 or not rotary_dim:
            raise ModelError(f"rotary embedding of {rotary_dim} of {head_dim} dimensions")
        values = ((name, parameters.get(name)) for name in (*wanted[1:], *_OPTIONAL))
        fixed = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values)
        return cls(rotary_dim, float(parameters["rope_theta"]), kind, fixed)

    def table(self, num_positions: int, divisors: Tensor | None = None) -> Tensor:
        """[num_positions, rotary_dim] f32: cosines, then sines, of each position's angles.

        Args:
            divisors: [rotary_dim / 2] numbers that a checkpoint divides the frequencies by.
        """
        kind, parameters = _KINDS[self.kind], {name: value for name, value in self.parameters if value is not None}
        frequencies = kind.frequencies(_Plain(self.rotary_dim, self.theta, num_positions), parameters)
        if divisors is not None:
            frequencies = frequencies.to(divisors.device) / divisors
        angles = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), -1) * kind.length(parameters)


def _is_sound(name: str, value: Any) -> bool:
    if name in _FACTORS:
        return isinstance(value, list) and all(_is_sound("", x) for x in value)
    if name == "truncate":
        return isinstance(value, bool)
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf
