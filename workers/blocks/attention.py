"""Grouped-query attention over a paged cache."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from cableway.kernels.kv_write import kv_write
from cableway.kernels.paged_attention import paged_attention
from cableway.kernels.rope import rope as rotate
from cableway.kernels.rope_and_write import rope_and_write
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Block, Mixer
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.norm import Clip, JointNorm, LayerNorm, RMSNorm, RMSScale
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis, Mesh

HeadNorm = RMSNorm | RMSScale | LayerNorm | JointNorm


class Attention(Mixer):
    """Causal self-attention.

    Args:
        rope: rotary positions; None = none.
        window: tokens a position sees, itself included; 0 = all before it.
        scale: of the scores; 1 / sqrt(head_dim) unless it is said otherwise.
        soft_cap: scores are kept within it smoothly, where it is not 0.
        qk_norm: norm of each head of q and k, or of all of them, before they are rotated; or one for each of the two.
        bias: of q, k and v. out_bias: of the output projection.
        clip: of q, k and v before they are rotated.
        scores: what is done to scores besides.
        norm_y: norm of what goes into the output projection.
    """

    takes_sum = True

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, rope: Rope | None,
        window: int = 0, scale: float | None = None, soft_cap: float = 0.0,
        qk_norm: HeadNorm | tuple[HeadNorm, HeadNorm] | None = None, bias: bool | None = False,
        out_bias: bool | None = False, clip: Clip | None = None, scores: "ALiBi | Sinks | None" = None,
        norm_y: JointNorm | None = None,
    ):  # fmt: skip
        self.embed = Axis("embed", hidden_size)
        self.heads, self.kv_heads = Axis("heads", num_heads, head_dim), Axis("kv_heads", num_kv_heads, head_dim)
        self.qkv = Linear({"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}, self.embed, bias=bias)
        self.clip = clip
        self.q_norm, self.k_norm = qk_norm if isinstance(qk_norm, tuple) else (qk_norm, qk_norm)
        self.scores = scores
        self.norm_y = norm_y
        self.out = Linear(self.embed, self.heads, bias=out_bias)
        self.rope = rope
        self.window = window
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.soft_cap = soft_cap

    @classmethod
    def of(cls, c: Any, **options: Any) -> Self:
        if "rope" not in options:
            options["rope"] = Rope.of(c.head_dim, c.rope_parameters)
        return cls(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, **options)

    def state(self, mesh: Mesh) -> StateSpec:
        num_kv_heads = mesh.span(self.kv_heads).size // self.head_dim
        kind = "sliding" if self.window else "paged"
        return StateSpec(kind, (self.number,), num_kv_heads, self.head_dim, self.window)

    def ropes(self) -> list[Rope]:
        return [] if self.rope is None else [self.rope]

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        q, *_, v = self.qkv.local_sizes
        self._num_heads, self._num_kv_heads = q // self.head_dim, v // self.head_dim
        self._options = {"scale": self.scale, "window": self.window, "soft_cap": self.soft_cap}
        if self.scores is not None:
            self._options |= self.scores.options
        self._norms, self._eps = None, 0.0
        if self.is_fused and self.q_norm is not None:
            self._norms, self._eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps

    @property
    def is_fused(self) -> bool:
        """Whether one kernel does all between the projection and attention."""
        return self.rope is not None and self.clip is None and type(self.q_norm) in (type(None), RMSNorm)

    def project(self, x: Tensor | Sum, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, E] -> q [T, H, D], k and v [T, KV, D], normed and rotated."""
        q, k, v = self.split(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = self.clip(q), self.clip(k), self.clip(v)
        if self.rope is not None:
            rotate(q, k, step.angles(self.rope))
        return q, k, v

    def split(self, x: Tensor | Sum) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, E] -> q [T, H, D], k and v [T, KV, D], as they are projected."""
        num_q, num_kv = self._num_heads, self._num_kv_heads
        return self.qkv(x).view(-1, num_q + 2 * num_kv, self.head_dim).split((num_q, num_kv, num_kv), 1)

    def __call__(self, x: Tensor | Sum, step: Step) -> Tensor:
        """x [T, E] -> [T, E], and this layer's cache takes the keys and values of the T tokens."""
        cache, plan, slots = step.state(self.number)
        if self.is_fused:
            angles = step.angles(self.rope)
            q = rope_and_write(*self.split(x), angles, cache, slots, self._norms, eps=self._eps)
        else:
            q, k, v = self.project(x, step)
            kv_write(k, v, cache, slots)
        y = paged_attention(q, cache, plan, **self._options).flatten(1)
        return self.out(y if self.norm_y is None else self.norm_y(y))


class GatedAttention(Attention):
    """What attention gives counts by a sigmoid of a gate for each of its numbers, projected beside q."""

    def __init__(self, hidden_size: int, num_heads: int, *rest: Any, bias: bool | None = False, **options: Any):
        super().__init__(hidden_size, num_heads, *rest, bias=bias, **options)
        parts = {"q": self.heads, "gate": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        self.qkv = Linear(parts, self.embed, bias=bias)

    def __call__(self, x: Tensor | Sum, step: Step) -> Tensor:
        num_q, num_kv = self._num_heads, self._num_kv_heads
        heads = self.qkv(x).view(-1, 2 * num_q + 2 * num_kv, self.head_dim)
        q, gate, k, v = heads.split((num_q, num_q, num_kv, num_kv), 1)
        cache, plan, slots = step.state(self.number)
        q = rope_and_write(q, k, v, step.angles(self.rope), cache, slots, self._norms, eps=self._eps)
        y = paged_attention(q, cache, plan, **self._options)
        return self.out(y.mul_(gate.sigmoid()).flatten(1))


class LateNormAttention(Attention):
    """Norms q and k after they are rotated."""

    is_fused = False

    def project(self, x: Tensor | Sum, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.split(x)
        if self.rope is not None:
            rotate(q, k, step.angles(self.rope))
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)


class ALiBi(Block):
    """Scores fall with distance, at a slope of each head's own: a geometric series over the heads.

    Args:
        most: the series runs down to 2^-most.
        scale: of the slopes.
    """

    def __init__(self, num_heads: int, *, most: float = 8.0, scale: float = 1.0):
        self.heads = Axis("heads", num_heads)
        self.most = most
        self.scale = scale

    def prepare(self, place: Place) -> None:
        span = place.mesh.span(self.heads)
        slopes = torch.tensor(_slopes(self.heads.count, self.most)[span.start : span.stop]) * self.scale
        self.options = {"slopes": slopes.to(place.device)}


def _slopes(num_heads: int, most: float) -> Sequence[float]:
    """2^-(most i / n) for the n heads up to a power of 2; those beyond take every second one of the series of 2 n."""
    power = 1 << math.floor(math.log2(num_heads))
    series = [2 ** (-most * i / power) for i in range(1, power + 1)]
    between = [2 ** (-most * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return (series + between)[:num_heads]


class Sinks(Block):
    """A score a head, learned, that takes its part of the softmax and gives nothing."""

    def __init__(self, num_heads: int):
        self.logits = Vector(Axis("heads", num_heads))

    def prepare(self, place: Place) -> None:
        self.options = {"sinks": self.logits.weight}
