"""Grouped-query attention over a paged cache."""

from typing import Any, Self

from torch import Tensor

from cableway.kernels.paged_attention import paged_attention
from cableway.kernels.rope_and_write import rope_and_write
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Block
from cableway.workers.blocks.linear import Linear
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis, Mesh


class Attention(Block):
    """Causal self-attention with rotary positions.

    Args:
        window: tokens a position sees, itself included; 0 = all before it.
        qk_norm: norm of each head of q and k before they are rotated.
        bias: of q, k and v. out_bias: of the output projection.
    """

    takes_sum = True

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, rope: Rope, window: int = 0,
        qk_norm: RMSNorm | None = None, bias: bool | None = False, out_bias: bool | None = False,
    ):  # fmt: skip
        self.embed = Axis("embed", hidden_size)
        self.heads, self.kv_heads = Axis("heads", num_heads, head_dim), Axis("kv_heads", num_kv_heads, head_dim)
        self.qkv = Linear({"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}, self.embed, bias=bias)
        self.q_norm, self.k_norm = qk_norm, qk_norm
        self.out = Linear(self.embed, self.heads, bias=out_bias)
        self.rope = rope
        self.window = window
        self.head_dim = head_dim

    @classmethod
    def of(cls, c: Any, **options: Any) -> Self:
        rope = Rope.of(c.head_dim, c.rope_parameters)
        return cls(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, rope=rope, **options)

    def state(self, layer: int, mesh: Mesh) -> StateSpec:
        """What this rank keeps of each token for layer number `layer`."""
        num_kv_heads = mesh.span(self.kv_heads).size // self.head_dim
        kind = "sliding" if self.window else "paged"
        return StateSpec(kind, (layer,), num_kv_heads, self.head_dim, self.window)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        q, k, _ = self.qkv.local_sizes
        self._num_heads, self._num_kv_heads = q // self.head_dim, k // self.head_dim
        self._scale = self.head_dim**-0.5
        self._norms, self._eps = None, 0.0
        if self.q_norm is not None:
            self._norms, self._eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps

    def __call__(self, x: Tensor | Sum, step: Step, layer: int) -> Tensor:
        """x [T, E] -> [T, E], and this layer's cache takes the keys and values of the T tokens."""
        num_q, num_kv = self._num_heads, self._num_kv_heads
        heads = self.qkv(x).view(-1, num_q + 2 * num_kv, self.head_dim)
        q, k, v = heads.split((num_q, num_kv, num_kv), 1)
        cache, plan, slots = step.state(layer)
        q = rope_and_write(q, k, v, step.angles(self.rope), cache, slots, self._norms, eps=self._eps)
        y = paged_attention(q, cache, plan, scale=self._scale, window=self.window)
        return self.out(y.view(-1, num_q * self.head_dim))
