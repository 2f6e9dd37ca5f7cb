"""Latent attention: a token keeps one narrow row for all heads, from which their keys and values are made.

By absorption they never are: each head's query is taken through the matrix that makes its keys, and what attention
gives through the matrix that makes its values.

Key: T tokens, H heads, R rank of the latents.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cableway.kernels.latent_attention import latent_attention
from cableway.kernels.latent_write import latent_write
from cableway.kernels.rope import rope as rotate
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Mixer, Slot
from cableway.workers.blocks.linear import Linear, by_heads
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis, Mesh

_EPS = 1e-6


class HeadMatrices(Slot):
    """For each head a matrix that makes its keys [nope, R] and one that makes its values [v, R]."""

    def __init__(self, num_heads: int, nope_dim: int, v_dim: int, rank: int):
        self.heads = Axis("heads", num_heads)
        self.parts = {"k": Axis("heads", num_heads, nope_dim), "v": Axis("heads", num_heads, v_dim)}
        self.leaves = {"weight": (rank,)}

    def load(self, parts: Mapping[str, Mapping[str, Stored]], place: Place) -> None:
        by_head = {
            part: parts[part]["weight"].piece(place.mesh.span(axis)).decode(place.dtype).unflatten(0, (-1, axis.unit))
            for part, axis in self.parts.items()
        }
        self.make_keys = by_head["k"].to(place.device, copy=True)  # [H, nope, R]
        self.make_values = by_head["v"].transpose(1, 2).contiguous().to(place.device)  # [H, R, v]
        self._is_invariant = place.invariant

    def through(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x [T, H, n] through matrices [H, n, m] -> [T, H, m]"""
        return by_heads(x, matrices, is_invariant=self._is_invariant)


class LatentAttention(Mixer):
    """Causal self-attention over latents.

    Args:
        latent: size of the latents. q_latent: queries are made from latents of their own; 0 = from x at once.
        nope_dim, rope_dim: parts of a head's query and key that are not rotated, and that are.
        v_dim: of a head's value.
        bias: of what makes latents, and of the output.
        q_scale, kv_scale: of queries, and of the latents of keys and values.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, q_latent: int, latent: int, nope_dim: int, rope_dim: int, v_dim: int,
        rope: Rope, scale: float, bias: bool = False, q_scale: float = 1.0, kv_scale: float = 1.0,
    ):  # fmt: skip
        embed, heads = Axis("embed", hidden_size), Axis("heads", num_heads, nope_dim + rope_dim)
        narrow = Axis("latent", q_latent)
        self.q_down = Linear(narrow, embed, bias=bias) if q_latent else None
        self.q_norm = RMSNorm(q_latent, _EPS) if q_latent else None
        self.q = Linear(heads, narrow if q_latent else embed)
        self.kv_down = Linear({"latent": Axis("latent", latent), "k": Axis("latent", 1, rope_dim)}, embed, bias=bias)
        self.kv_norm = RMSNorm(latent, _EPS)
        self.kv_up = HeadMatrices(num_heads, nope_dim, v_dim, latent)
        self.out = Linear(embed, Axis("heads", num_heads, v_dim), bias=bias)
        self.rope, self.scale = rope, scale
        self.rank, self.nope_dim, self.rope_dim = latent, nope_dim, rope_dim
        self.q_scale, self.kv_scale = q_scale, kv_scale

    def state(self, mesh: Mesh) -> StateSpec:
        return StateSpec("latent", (self.number,), 1, self.rank + self.rope_dim, num_planes=1)

    def ropes(self) -> list[Rope]:
        return [self.rope]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E], and this layer's cache takes the latents of the T tokens."""
        q = self.q(x if self.q_down is None else self.q_norm(self.q_down(x)))
        if self.q_scale != 1:
            q = q.mul_(self.q_scale)
        q = q.unflatten(1, (-1, self.nope_dim + self.rope_dim))
        kept = self.kv_down(x)
        latent = self.kv_norm(kept[:, : self.rank])
        kept[:, : self.rank] = latent if self.kv_scale == 1 else latent.mul_(self.kv_scale)
        rotate(q[..., self.nope_dim :], kept[:, None, self.rank :], step.angles(self.rope))
        absorbed = self.kv_up.through(q[..., : self.nope_dim], self.kv_up.make_keys)
        cache, plan, slots = step.state(self.number)
        latent_write(kept, cache, slots)
        whole = torch.cat((absorbed, q[..., self.nope_dim :]), -1)
        y = latent_attention(whole, cache, plan, scale=self.scale, rank=self.rank)
        return self.out(self.kv_up.through(y, self.kv_up.make_values).flatten(1))
