"""Latent attention: a token keeps one narrow row for all heads, from which their keys and values are made.

By absorption they never are: each head's query is taken through the matrix that makes its keys, and what attention
gives through the matrix that makes its values.

Key: T tokens, H heads, R rank of the latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan
from cableway.kernels.latent_attention import latent_attention
from cableway.kernels.latent_write import latent_write
from cableway.kernels.rope import rope as rotate
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Filling, Mixer, Slot
from cableway.workers.blocks.linear import Linear, by_heads
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh

_EPS = 1e-6


class HeadMatrices(Slot):
    """For each head a matrix that makes its keys [nope, R] and one that makes its values [v, R]."""

    def __init__(self, num_heads: int, nope_dim: int, v_dim: int, rank: int):
        self.heads = Axis("heads", num_heads)
        self.parts = {"k": Axis("heads", num_heads, nope_dim), "v": Axis("heads", num_heads, v_dim)}
        self.leaves = {"weight": (rank,)}

    def load(self, parts: Filling, place: Place) -> None:
        shares = zip(self.share(parts, place, place.dtype), self.parts.values(), strict=True)
        keys, values = (share.unflatten(0, (-1, axis.unit)) for share, axis in shares)
        self.make_keys = keys.to(place.device, copy=True)  # [H, nope, R]
        self.make_values = values.transpose(1, 2).contiguous().to(place.device)  # [H, R, v]
        self._is_invariant = place.invariant

    def through(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x [T, H, n] through matrices [H, n, m] -> [T, H, m]"""
        return by_heads(x, matrices, is_invariant=self._is_invariant)


class LatentSizes(NamedTuple):
    latent: int  # of keys and values: R
    q_latent: int  # that queries are made from; 0 = they are made from x at once
    nope: int  # part of a head's query and key that is not rotated
    rope: int  # part that is
    v: int  # of a head's value


class LatentAttention(Mixer):
    """Causal self-attention over latents.

    Args:
        scale: of the scores.
        bias: of what makes latents, and of the output.
        kv_scale: of the latents of keys and values.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, sizes: LatentSizes, *, rope: Rope | None, scale: float,
        bias: bool = False, kv_scale: float = 1.0,
    ):  # fmt: skip
        embed, heads = Axis("embed", hidden_size), Axis("heads", num_heads, sizes.nope + sizes.rope)
        q_latent, latent = Axis("latent", sizes.q_latent), Axis("latent", sizes.latent)
        self.q_down = Linear(q_latent, embed, bias=bias) if sizes.q_latent else None
        self.q_norm = RMSNorm(sizes.q_latent, _EPS) if sizes.q_latent else None
        self.q = Linear(heads, q_latent if sizes.q_latent else embed)
        self.kv_down = Linear({"latent": latent, "k": Axis("latent", 1, sizes.rope)}, embed, bias=bias)
        self.kv_norm = RMSNorm(sizes.latent, _EPS)
        self.kv_up = HeadMatrices(num_heads, sizes.nope, sizes.v, sizes.latent)
        self.out = Linear(embed, Axis("heads", num_heads, sizes.v), bias=bias)
        self.sizes, self.rope, self.scale, self.kv_scale = sizes, rope, scale, kv_scale

    def state(self, mesh: Mesh) -> StateSpec:
        return StateSpec("latent", (self.number,), 1, self.sizes.latent + self.sizes.rope, num_planes=1)

    def ropes(self) -> list[Rope]:
        return [] if self.rope is None else [self.rope]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E], and this layer's cache takes the latents of the T tokens."""
        rank, nope, rope = self.sizes.latent, self.sizes.nope, self.sizes.rope
        narrow = x if self.q_down is None else self.q_norm(self.q_down(x))
        q = self.q(narrow).unflatten(1, (-1, nope + rope))
        kept = self.kv_down(x)
        latent = self.kv_norm(kept[:, :rank])
        kept[:, :rank] = latent if self.kv_scale == 1 else latent.mul_(self.kv_scale)
        if self.rope is not None:
            rotate(q[..., nope:], kept[:, None, rank:], step.angles(self.rope))
        absorbed = self.kv_up.through(q[..., :nope], self.kv_up.make_keys)
        cache, _, slots = step.state(self.number)
        latent_write(kept, cache, slots)
        cache, plan = self.seen(x, narrow, step)
        whole = torch.cat((absorbed, q[..., nope:]), -1)
        y = latent_attention(whole, cache, plan, scale=self.scale, rank=rank)
        return self.out(self.kv_up.through(y, self.kv_up.make_values).flatten(1))

    def seen(self, x: Tensor, narrow: Tensor, step: Step) -> tuple[Tensor, AttentionPlan]:
        """The latents that tokens see, for x and what queries are made from."""
        cache, plan, _ = step.state(self.number)
        return cache, plan
