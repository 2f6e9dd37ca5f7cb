"""Encoder-decoders: an encoder sees the whole of a source at once, and a decoder attends to what it made of that."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
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


class RelativeBias(Block):
    """What each head has learned for a distance, by buckets: one for each small distance, then ever wider ones.

    Args:
        most: distances from here on are all in the last bucket.
        both_ways: half of the buckets are for keys behind a token.
    """

    def __init__(self, num_heads: int, num_buckets: int, most: int, *, both_ways: bool):
        self.table = Vector(Axis("heads", num_heads), num_buckets)
        self.num_buckets, self.most, self.both_ways = num_buckets, most, both_ways

    def prepare(self, place: Place) -> None:
        if self.both_ways:  # from `most` before a token to `most` behind it
            half = self.num_buckets // 2
            near = self._buckets(half)
            buckets = torch.cat((near[1:].flip(0), near[:1], near[1:] + half))
        else:  # back from a token
            buckets = self._buckets(self.num_buckets)
        self.by_distance = self.table.weight[:, buckets.to(place.device)].contiguous()

    def _buckets(self, num: int) -> Tensor:
        """Of the distances 0 … most."""
        distance, exact = torch.arange(self.most + 1), num // 2
        wider = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.most / exact) * (num - exact)
        return torch.where(distance < exact, distance, (exact + wider.long()).clamp(max=num - 1))


class BiasedAttention(Attention):
    """Causal attention whose scores have what `relative` has learned."""

    def __init__(self, *sizes: Any, relative: RelativeBias, **options: Any):
        super().__init__(*sizes, **options)
        self.relative = relative

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self.scores = replace(self.scores, biases=self.relative.by_distance)


class EncoderAttention(Attention):
    """Attention within a source, in both directions."""

    def __init__(self, *sizes: Any, relative: RelativeBias | None = None, **options: Any):
        super().__init__(*sizes, **options)
        self.relative = relative

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Sequences) -> Tensor:
        bias = self.relative and self.relative.by_distance
        return whole_attention(q, k, v, step, bias, scale=self.scores.scale)


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
