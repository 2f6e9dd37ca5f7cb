"""State space mixers, and short convolutions.

Key: T tokens, E hidden, C channels, H heads of P numbers, G groups, N numbers of a state a channel.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from cableway.kernels.causal_conv import causal_conv
from cableway.kernels.gated_norm import gated_norm
from cableway.kernels.recurrence import RecurrentPlan
from cableway.kernels.state_scan import state_scan
from cableway.kernels.time_steps import time_steps
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Block, Filling, Mixer, Slot
from cableway.workers.blocks.linear import HeadLinear, Linear, Vector
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh


class CausalConv(Slot):
    """A convolution over tokens for each channel of the parts; its state is the inputs that the next token sees."""

    def __init__(self, parts: Mapping[str, Axis], width: int, *, bias: bool, silu: bool):
        self.parts, self.width, self.silu = parts, width, silu
        self.leaves = {"weight": (1, width), "bias": ()} if bias else {"weight": (1, width)}
        self._weight: Tensor
        self._bias: Tensor | None = None

    def load(self, parts: Filling, place: Place) -> None:
        self._state_len = self.state_len(place.mesh)
        weight = torch.cat(self.share(parts, place, torch.float32)).to(place.device)
        self._weight = weight.squeeze(1).T.contiguous()
        if "bias" in self.leaves:
            self._bias = torch.cat(self.share(parts, place, torch.float32, "bias")).to(place.device)

    def state_len(self, mesh: Mesh) -> int:
        return sum(mesh.span(axis).size for axis in self.parts.values()) * (self.width - 1)

    def __call__(self, x: Tensor, states: Tensor, plan: RecurrentPlan) -> tuple[Tensor, Tensor]:
        """x [T, C], a mixer's states, which begin with its own -> [T, C], and the rest of the states"""
        own, others = states[:, : self._state_len], states[:, self._state_len :]
        return causal_conv(x, self._weight, self._bias, own, plan, silu=self.silu), others


class Recurrent(Mixer):
    """A mixer that keeps a state of a sequence, as long as `state_len` says, instead of rows of tokens."""

    def state_len(self, mesh: Mesh) -> int:
        raise NotImplementedError

    def state(self, mesh: Mesh) -> StateSpec:
        return StateSpec("recurrent", (self.number,), 0, 0, state_len=self.state_len(mesh))


class ShortConv(Recurrent):
    """LFM2: y = out(c * conv(b * x)), with b, c and x projected."""

    def __init__(self, hidden_size: int, width: int, *, bias: bool):
        embed, channels = Axis("embed", hidden_size), Axis("ffn", hidden_size)
        self.project = Linear({"b": channels, "c": channels, "x": channels}, embed, bias=bias)
        self.conv = CausalConv({"": channels}, width, bias=bias, silu=False)
        self.out = Linear(embed, channels, bias=bias)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        b, c, x = self.project(x).chunk(3, 1)
        y, _ = self.conv(b * x, *step.recurrent(self.number))
        return self.out(y.mul_(c))


class Mamba(Recurrent):
    """Mamba 1: each channel has a state of its own.

    Args:
        inner_size: channels. state_size: N. step_size: numbers that the time step is made of.
        norms: of time step, b and c.
        head_dim: channels that share a time step, a and d.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, state_size: int, step_size: int, width: int, *, bias: bool,
        conv_bias: bool, norms: tuple[Block, Block, Block] | None = None, head_dim: int = 1,
    ):  # fmt: skip
        embed, heads = Axis("embed", hidden_size), Axis("ffn", inner_size // head_dim)
        self.inner = Axis("ffn", heads.count, head_dim)
        self.project = Linear({"x": self.inner, "z": self.inner}, embed, bias=bias)
        self.conv = CausalConv({"": self.inner}, width, bias=conv_bias, silu=True)
        state = Axis("state", state_size)
        self.select = Linear({"dt": Axis("step", step_size), "b": state, "c": state}, self.inner)
        self.dt_norm, self.b_norm, self.c_norm = norms or (None, None, None)
        self.dt = Linear(heads, Axis("step", step_size), bias=True)
        self.a_log, self.d = Vector(heads, state_size), Vector(heads)
        self.out = Linear(embed, self.inner, bias=bias)
        self.sizes = (step_size, state_size, state_size)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.inner).size * self.sizes[1]

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._a = -self.a_log.weight.exp()

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        x, z = self.project(x).chunk(2, 1)
        x, states = self.conv(x, states, plan)
        dt, b, c = self.selected(x)
        heads, dt = x.unflatten(1, (dt.shape[1], -1)), time_steps(dt, None, None)
        y = state_scan(heads, dt, self._a, b, c, self.d.weight, states, plan)
        return self.out(gated_norm(y, z, None))

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C] -> time steps [T, H], before they are made positive, and b and c [T, G, N]"""
        dt, b, c = self.select(x).split(self.sizes, 1)
        if self.dt_norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        return self.dt(dt), b[:, None], c[:, None]


class HeadedMamba(Mamba):
    """Zamba: Mamba 1 in heads, each of which has time steps, b and c of its own channels."""

    def __init__(
        self, hidden_size: int, inner_size: int, state_size: int, step_size: int, width: int, *, num_heads: int,
        bias: bool, conv_bias: bool,
    ):  # fmt: skip
        super().__init__(hidden_size, inner_size, state_size, step_size, width, bias=bias, conv_bias=conv_bias)
        self.head_dim = inner_size // num_heads
        self.select = HeadLinear(Axis("heads", num_heads, sum(self.sizes)), self.head_dim)
        self.dt = HeadLinear(Axis("heads", num_heads, self.head_dim), step_size, bias=True)

    def selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, b, c = self.select(x.unflatten(1, (-1, self.head_dim))).split(self.sizes, -1)
        return self.dt(dt).flatten(1), b.contiguous(), c.contiguous()


class Mamba2(Recurrent):
    """Mamba 2: a state a head, which decays as one.

    Args:
        num_groups: heads of a group share b and c.
        limit: of time steps.
        norm_eps: of the norm after the gate, by group; None = there is none.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, num_groups: int, state_size: int, width: int, *,
        bias: bool, conv_bias: bool, norm_eps: float | None, limit: tuple[float, float] = (0.0, float("inf")),
    ):  # fmt: skip
        embed = Axis("embed", hidden_size)
        self.heads, self.channels = Axis("heads", num_heads), Axis("heads", num_heads, head_dim)
        self.groups = Axis("kv_heads", num_groups, state_size)
        convolved = {"x": self.channels, "b": self.groups, "c": self.groups}
        self.project = Linear({"z": self.channels, **convolved, "dt": self.heads}, embed, bias=bias)
        self.conv = CausalConv(convolved, width, bias=conv_bias, silu=True)
        self.a_log, self.d, self.dt_bias = Vector(self.heads), Vector(self.heads), Vector(self.heads)
        self.norm = Vector(self.channels) if norm_eps is not None else None
        self.norm_eps = norm_eps or 0.0
        self.out = Linear(embed, self.channels, bias=bias)
        self.head_dim, self.state_size, self.num_groups, self.limit = head_dim, state_size, num_groups, limit

    @classmethod
    def of(cls, c: Any, *, norm_eps: float | None) -> Self:
        """Sizes, biases and limit as the config has them."""
        sizes = (c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, c.mamba_d_conv)
        biases = {"bias": c.mamba_proj_bias, "conv_bias": c.mamba_conv_bias}
        return cls(c.hidden_size, *sizes, **biases, norm_eps=norm_eps, limit=c.time_step_limit)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.channels).size * self.state_size

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        mesh = self._mesh = place.mesh
        channels, groups = mesh.span(self.channels).size, mesh.span(self.groups).size
        self._sizes = (channels, channels + 2 * groups, mesh.span(self.heads).size)
        self._conv_sizes = (channels, groups, groups)
        self._a = -self.a_log.weight.exp()[:, None]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        z, x, dt = self.project(x).split(self._sizes, 1)
        x, states = self.conv(x, states, plan)
        x, b, c = x.split(self._conv_sizes, 1)
        dt = time_steps(dt, self.dt_bias.weight, None, low=self.limit[0], high=self.limit[1])
        x, b, c = x.unflatten(1, (-1, self.head_dim)), *(part.unflatten(1, (-1, self.state_size)) for part in (b, c))
        y = state_scan(x, dt, self._a, b, c, self.d.weight, states, plan)
        return self.out(self._gated(y, z))

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """y [T, H, P] * silu(z), normalised by group -> [T, C]"""
        if self.norm is None:
            return gated_norm(y, z, None)
        group_len = self.channels.size // self.num_groups
        if z.shape[1] % group_len == 0:
            groups, weights = (x.view(-1, z.shape[1] // group_len, group_len) for x in (y, self.norm.weight))
            return gated_norm(groups, z, weights[0], eps=self.norm_eps)
        y = gated_norm(y, z, None).float()  # a group that is cut over ranks
        mean = self._mesh.all_reduce(y.square().sum(-1, keepdim=True)).div_(self.channels.size)
        return (y * torch.rsqrt(mean + self.norm_eps) * self.norm.weight).to(z.dtype)
