"""Encoder-decoders: an encoder sees the whole of a source at once, and a decoder attends to what it made of that."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cableway.kernels.attention_plan import Scores
from cableway.kernels.kv_write import kv_write
from cableway.kernels.paged_attention import paged_attention
from cableway.kernels.whole_attention import Sequences, whole_attention
from cableway.workers.batch import Source, StateSpec
from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.block import Block, Mixer
from cableway.workers.blocks.layers import Norm, add
from cableway.workers.blocks.linear import Linear
from cableway.workers.blocks.step import Step
from cableway.workers.parallel import Axis, Mesh


class Encoder(Block):
    """What a source becomes before a decoder attends to it; it keeps nothing.

    Args:
        layers: templates, whose mixers are `EncoderAttention`.
        positions, on_embed, norm_out: as those of a decoder.
    """

    def __init__(
        self, layers: Sequence[Block], *, norm_out: Norm | None = None, positions: Block | None = None,
        on_embed: Any = None,
    ):  # fmt: skip
        self.positions = positions
        self.on_embed = on_embed and on_embed.copy()
        self.layers = [layer.copy() for layer in layers]
        self.norm_out = norm_out and norm_out.copy()

    def mixers(self) -> Iterator[Mixer]:
        return iter(())  # none that keeps a state

    def __call__(self, x: Tensor, source: Source) -> Tensor:
        """Embeddings x [U, E] of the tokens of some sources -> [U, E]"""
        if self.positions is not None:
            x = x.add_(self.positions(source.positions))
        if self.on_embed is not None:
            x = self.on_embed(x)
        sequences = Sequences(source.query_start, source.max_len)
        residual = torch.zeros_like(x, dtype=torch.float32)
        for layer in self.layers:
            x = layer(x, residual, sequences)
        return add(x, residual, self.norm_out)


class EncoderAttention(Attention):
    """Attention within a source, in both directions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Sequences) -> Tensor:
        return whole_attention(q, k, v, step, None, scale=self.scores.scale)


class CrossAttention(Mixer):
    """Attention of a decoder's tokens to all of their source, whose keys and values are kept once it is encoded."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, *, scale: float, bias: bool = False):
        embed = Axis("embed", hidden_size)
        self.heads = Axis("heads", num_heads, head_dim)
        self.q = Linear(self.heads, embed, bias=bias)
        self.kv = Linear({"k": self.heads, "v": self.heads}, embed, bias=bias)
        self.out = Linear(embed, self.heads, bias=bias)
        self.head_dim, self.scores = head_dim, Scores(scale)

    def state(self, mesh: Mesh) -> StateSpec:
        return StateSpec("encoder", (self.number,), mesh.span(self.heads).size // self.head_dim, self.head_dim)

    def keep(self, encoded: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Write keys and values of encoded [U, E] to their slots [U]."""
        k, v = self.kv(encoded).unflatten(1, (-1, self.head_dim)).chunk(2, 1)
        kv_write(k, v, cache, slots)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        cache, plan = step.source(self.number)
        q = self.q(x).unflatten(1, (-1, self.head_dim))
        return self.out(paged_attention(q, cache, plan, self.scores).flatten(1))
