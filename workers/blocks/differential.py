"""Differential attention: what a noise head takes is taken off what the signal heads of its group do."""

import math
from typing import Any

from torch import Tensor

from cableway.kernels.attention_plan import Scores
from cableway.kernels.kv_write import kv_write
from cableway.kernels.paged_attention import paged_attention
from cableway.kernels.rope import rope as rotate
from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.norm import RMSNorm, RMSScale
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis


class DifferentialAttention(Attention):
    """A KV head is a pair: keys of the signals and of the noise, and one value as wide as both. Queries are as wide,
    with zeros where the other's key is, so that one attention does for all.

    Args:
        head_dim: of queries, and of a key.
        num_signals: heads of a group, beside its noise; they come first.
        depth: of the layer: the deeper, the more of the noise is taken off before anything is learned.
        norm: of what a signal head gives [2 head_dim].
    """

    is_fused = False

    def __init__(
        self, hidden_size: int, num_groups: int, num_pairs: int, head_dim: int, scores: Scores, *, num_signals: int,
        depth: int, norm: RMSNorm | RMSScale, out_bias: bool, **options: Any,
    ):  # fmt: skip
        self.narrow, self.num_signals, self.first = head_dim, num_signals, 0.8 - 0.6 * math.exp(-0.3 * depth)
        super().__init__(hidden_size, num_groups, num_pairs, 2 * head_dim, scores, **options)
        out = Axis("heads", num_groups, num_signals * self.head_dim)
        self.out = Linear(Axis("embed", hidden_size), out, bias=out_bias)
        self.q1, self.k1, self.q2, self.k2 = (Vector(Axis("norm", head_dim)) for _ in range(4))
        self.norm_y = norm

    def projected(self) -> dict[str, Axis]:
        queries = Axis("heads", self.heads.count, (self.num_signals + 1) * self.narrow)
        return {"q": queries, "k": self.kv_heads, "v": self.kv_heads}

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        pairs = ((self.q1, self.k1), (self.q2, self.k2))
        more, less = ((q.weight * k.weight).sum().exp() for q, k in pairs)
        self._part = more - less + self.first

    def project(self, x: Tensor | Sum) -> tuple[Tensor, ...]:
        parts = self.qkv(x).split(self.qkv.local_sizes, 1)
        return tuple(part.unflatten(1, (-1, self.narrow)) for part in parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        cache, plan, slots = step.state(self.number)
        rotate(q, k, step.angles(self.rope))
        scales = step.scales(self.number)
        kv_write(*(part.flatten(1).unflatten(1, (-1, self.head_dim)) for part in (k, v)), cache, slots, scales)
        q = q.unflatten(1, (-1, self.num_signals + 1))
        wide = q.new_zeros(*q.shape[:3], self.head_dim)
        wide[:, :, :-1, : self.narrow], wide[:, :, -1, self.narrow :] = q[:, :, :-1], q[:, :, -1]
        y = paged_attention(wide.flatten(1, 2), cache, plan, self.scores, scales).view(wide.shape)
        y = (y[:, :, :-1].float() - self._part * y[:, :, -1:]).to(q.dtype)
        return self.norm_y(y).mul_(1 - self.first)
