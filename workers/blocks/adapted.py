"""Blocks for layers that share their weights, each with products of low rank of its own beside them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.block import Block
from cableway.workers.blocks.linear import Linear
from cableway.workers.blocks.mlp import MLP
from cableway.workers.parallel import Axis


class Adapter(Block):
    """A product of low rank: y = up(down(x))."""

    def __init__(self, out: Axis | Mapping[str, Axis], in_: Axis, rank: int):
        narrow = Axis("rank", rank)
        self.down, self.up = Linear(narrow, in_), Linear(out, narrow)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]"""
        return self.up(self.down(x))


class WideAttention(Attention):
    """Attention to the stream and the embeddings side by side, that gives a result for the stream alone."""

    def __init__(self, hidden_size: int, *sizes: Any, **options: Any):
        super().__init__(2 * hidden_size, *sizes, **options)
        self.out = Linear(Axis("embed", hidden_size), self.heads)


class AdaptedAttention(WideAttention):
    """With adapters of `adapter_rank` beside the projections of q, k and v."""

    def __init__(self, hidden_size: int, *sizes: Any, adapter_rank: int, **options: Any):
        super().__init__(hidden_size, *sizes, **options)
        embed = Axis("embed", 2 * hidden_size)
        self.adapters = [Adapter(axis, embed, adapter_rank) for axis in (self.heads, self.kv_heads, self.kv_heads)]

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = super().project(x)
        for part, adapter in zip(parts, self.adapters, strict=True):
            part.add_(adapter(x).view(part.shape))
        return parts


class AdaptedMLP(MLP):
    """With an adapter of `adapter_rank` beside the first matrix."""

    def __init__(self, hidden_size: int, ffn_size: int, *, adapter_rank: int, **options: Any):
        super().__init__(hidden_size, ffn_size, **options)
        ffn = Axis("ffn", ffn_size)
        self.adapter = Adapter({"gate": ffn, "up": ffn}, Axis("embed", hidden_size), adapter_rank)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.act.gate(self.gate_up(x).add_(self.adapter(x))))
