"""Linear attention by the delta rule: a state is corrected towards each token's value at its key.

Key: T tokens, E hidden.
"""

from typing import Any, Self

import torch
from torch import Tensor

from cableway.kernels.delta_inputs import delta_inputs
from cableway.kernels.delta_scan import delta_scan
from cableway.kernels.gated_norm import gated_norm
from cableway.kernels.rms_norm import rms_norm
from cableway.kernels.time_steps import time_steps
from cableway.workers.blocks.adapted import Adapter
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.mamba import CausalConv, Recurrent
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh


class GatedDeltaNet(Recurrent):
    """Qwen3-Next: linear attention whose state is corrected towards each value, and a norm of heads before the gate.

    Args:
        most: part of a correction that is made at most; beyond 1 what a state holds may change its sign.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_k_heads: int, head_dim: int, key_dim: int, width: int, *,
        norm_eps: float, most: float = 1.0,
    ):  # fmt: skip
        embed, heads = Axis("embed", hidden_size), Axis("heads", num_heads)
        self.keys, self.values = Axis("heads", num_k_heads, key_dim), Axis("heads", num_heads, head_dim)
        convolved = {"q": self.keys, "k": self.keys, "v": self.values}
        self.project = Linear({**convolved, "z": self.values}, embed)
        self.steps = Linear({"b": heads, "a": heads}, embed)
        self.conv = CausalConv(convolved, width, bias=False, silu=True)
        self.a_log, self.dt_bias = Vector(heads), Vector(heads)
        self.norm = RMSNorm(head_dim, norm_eps)
        self.out = Linear(embed, self.values)
        self.head_dim, self.key_dim, self.most = head_dim, key_dim, most

    @classmethod
    def of(cls, c: Any, **options: Any) -> Self:
        """Sizes as the config has them."""
        heads = (c.linear_num_value_heads, c.linear_num_key_heads, c.linear_value_head_dim, c.linear_key_head_dim)
        return cls(c.hidden_size, *heads, c.linear_conv_kernel_dim, **options)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.values).size * self.key_dim

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        keys, values = place.mesh.span(self.keys).size, place.mesh.span(self.values).size
        self._sizes = (2 * keys + values, values)
        self._conv_sizes = (2 * keys, values)
        self._a = -self.a_log.weight.exp()

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        ba = self.steps(x)
        x, z = self.project(x).split(self._sizes, 1)
        x, states = self.conv(x, states, plan)
        qk, v = x.split(self._conv_sizes, 1)
        q, k, g, beta = delta_inputs(qk, ba, self.dt_bias.weight, self._a, key_dim=self.key_dim, most=self.most)
        y = delta_scan(q, k, v.unflatten(1, (-1, self.head_dim)), g, beta, states, plan)
        return self.out(gated_norm(y, z, self.norm.weight[None], eps=self.norm.eps, gates_first=False))


class KeyedDeltaNet(Recurrent):
    """Kimi Linear: each number of a key decays by itself, and a norm of heads counts by a sigmoid of a gate."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, width: int, *, norm_eps: float):
        embed, self.heads = Axis("embed", hidden_size), Axis("heads", num_heads, head_dim)
        convolved = {"q": self.heads, "k": self.heads, "v": self.heads}
        self.project = Linear(convolved, embed)
        self.conv = CausalConv(convolved, width, bias=False, silu=True)
        self.beta = Linear(Axis("heads", num_heads), embed)
        self.decay, self.gate = Adapter(self.heads, embed, head_dim), Adapter(self.heads, embed, head_dim)
        self.a_log, self.dt_bias = Vector(Axis("heads", num_heads)), Vector(self.heads)
        self.norm = RMSNorm(head_dim, norm_eps)
        self.out = Linear(embed, self.heads)
        self.head_dim = head_dim

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.heads).size * self.head_dim

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._a = -self.a_log.weight.exp().repeat_interleave(self.head_dim)
        # Weights of RMS norms: of queries, whose length is 1 / sqrt(head_dim) then, and of keys, whose length is 1.
        self._lengths = [
            torch.full((self.head_dim,), self.head_dim**power, device=place.device) for power in (-1, -0.5)
        ]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        beta = sigmoid(self.beta(x).float())
        g = time_steps(self.decay(x), self.dt_bias.weight, self._a).unflatten(1, (-1, self.head_dim))
        gate = self.gate(x)
        heads, states = self.conv(self.project(x), states, plan)
        q, k, v = heads.unflatten(1, (3, -1, self.head_dim)).unbind(1)
        q, k = (
            rms_norm(part, length, eps=1e-6 / self.head_dim) for part, length in zip((q, k), self._lengths, strict=True)
        )
        y = self.norm(delta_scan(q, k, v, g, beta, states, plan))
        return self.out(y.flatten(1).mul_(sigmoid(gate)))
