"""State space mixers, and short convolutions.

Key: T tokens, E hidden, C channels, H heads of P numbers, G groups, N numbers of a state a channel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.causal_conv import causal_conv
from cableway.kernels.delta_scan import delta_scan
from cableway.kernels.rms_norm import rms_norm
from cableway.kernels.silu_mul import silu_mul
from cableway.kernels.state_scan import state_scan
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Block, Mixer, Slot
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis, Mesh


class Table(Slot):
    """Rows of numbers along one or several axes, cut like them; in float32."""

    def __init__(self, parts: Mapping[str, Axis], *dims: int):
        self.parts, self.leaves = parts, {"weight": dims}
        self.weight: Tensor

    def load(self, parts: Mapping[str, Mapping[str, Stored]], place: Place) -> None:
        pieces = [parts[part]["weight"].piece(place.mesh.span(axis)) for part, axis in self.parts.items()]
        self.weight = torch.cat([piece.decode(torch.float32) for piece in pieces]).to(place.device)


class CausalConv(Slot):
    """A convolution over tokens for each channel of the parts; its state is the inputs that the next token sees."""

    def __init__(self, parts: Mapping[str, Axis], width: int, *, bias: bool, silu: bool):
        self.parts, self.width, self.silu = parts, width, silu
        self.leaves = {"weight": (1, width), "bias": ()} if bias else {"weight": (1, width)}
        self._weight: Tensor
        self._bias: Tensor | None = None

    def load(self, parts: Mapping[str, Mapping[str, Stored]], place: Place) -> None:
        spans = {part: place.mesh.span(axis) for part, axis in self.parts.items()}

        def joined(leaf: str) -> Tensor:
            pieces = [parts[part][leaf].piece(span).decode(torch.float32) for part, span in spans.items()]
            return torch.cat(pieces).to(place.device)

        self._weight = joined("weight").squeeze(1).contiguous()
        if "bias" in self.leaves:
            self._bias = joined("bias")

    def state_len(self, mesh: Mesh) -> int:
        return sum(mesh.span(axis).size for axis in self.parts.values()) * (self.width - 1)

    def __call__(self, x: Tensor, states: Tensor, step: Step, mixer: int) -> Tensor:
        """x [T, C] -> [T, C]"""
        return causal_conv(x, self._weight, self._bias, states, step.recurrent(mixer)[1], silu=self.silu)


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
        y = self.conv(b * x, step.recurrent(self.number)[0], step, self.number)
        return self.out(y.mul_(c))


class Mamba(Recurrent):
    """Mamba 1: each channel has a state of its own.

    Args:
        inner_size: channels. state_size: N. step_size: numbers that the time step is made of.
        norms: of time step, b and c.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, state_size: int, step_size: int, width: int, *, bias: bool,
        conv_bias: bool, norms: tuple[Block, Block, Block] | None = None,
    ):  # fmt: skip
        embed, self.inner = Axis("embed", hidden_size), Axis("ffn", inner_size)
        self.project = Linear({"x": self.inner, "z": self.inner}, embed, bias=bias)
        self.conv = CausalConv({"": self.inner}, width, bias=conv_bias, silu=True)
        state = Axis("state", state_size)
        self.select = Linear({"dt": Axis("step", step_size), "b": state, "c": state}, self.inner)
        self.dt_norm, self.b_norm, self.c_norm = norms or (None, None, None)
        self.dt = Linear(self.inner, Axis("step", step_size), bias=True)
        self.a_log, self.d = Table({"": self.inner}, state_size), Vector(self.inner)
        self.out = Linear(embed, self.inner, bias=bias)
        self.sizes = (step_size, state_size, state_size)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.inner).size * self.sizes[1]

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._a = -self.a_log.weight.exp()
        self._conv_len = self.conv.state_len(place.mesh)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        x, z = self.project(x).chunk(2, 1)
        x = self.conv(x, states[:, : self._conv_len], step, self.number)
        dt, b, c = self.select(x).split(self.sizes, 1)
        if self.dt_norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        dt = F.softplus(self.dt(dt).float())
        b, c = (part.float().contiguous()[:, None] for part in (b, c))
        scanned = state_scan(
            x.float()[..., None].contiguous(), dt, self._a, b, c, self.d.weight, states[:, self._conv_len :], plan
        )
        return self.out(silu_mul(torch.cat((z, scanned.squeeze(-1).to(x.dtype)), 1)))


class Mamba2(Recurrent):
    """Mamba 2: a state a head, which decays as one.

    Args:
        num_groups: heads of a group share b and c.
        limit: of time steps.
        norm_eps: of the norm after the gate, by group; None = there is none. norms_first: the gate is after it.
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

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.channels).size * self.state_size

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        mesh = self._mesh = place.mesh
        channels, groups = mesh.span(self.channels).size, mesh.span(self.groups).size
        self._sizes = (channels, channels + 2 * groups, mesh.span(self.heads).size)
        self._conv_sizes = (channels, groups, groups)
        self._a = -self.a_log.weight.exp()[:, None].expand(-1, self.state_size).contiguous()
        self._conv_len = self.conv.state_len(mesh)
        self._ones = torch.ones(self.channels.size // self.num_groups, device=place.device)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        z, x, dt = self.project(x).split(self._sizes, 1)
        x = self.conv(x, states[:, : self._conv_len], step, self.number)
        x, b, c = (part.float() for part in x.split(self._conv_sizes, 1))
        dt = F.softplus(dt.float() + self.dt_bias.weight).clamp_(*self.limit)
        x = x.unflatten(1, (-1, self.head_dim)).contiguous()
        b, c = (part.unflatten(1, (-1, self.state_size)).contiguous() for part in (b, c))
        y = state_scan(x, dt, self._a, b, c, self.d.weight, states[:, self._conv_len :], plan)
        return self.out(self._gated(y.flatten(1), z))

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """y [T, C] f32 * silu(z), normalised by group -> [T, C] in the dtype of z"""
        y = silu_mul(torch.cat((z.float(), y), 1))
        if self.norm is None:
            return y.to(z.dtype)
        group_len = self.channels.size // self.num_groups
        if y.shape[1] % group_len == 0:
            y = rms_norm(y.unflatten(1, (-1, group_len)), self._ones, eps=self.norm_eps).flatten(1)
        else:  # a group that is cut over ranks
            mean = self._mesh.all_reduce(y.square().sum(-1, keepdim=True)).div_(self.channels.size)
            y = y * torch.rsqrt(mean + self.norm_eps)
        return y.mul_(self.norm.weight).to(z.dtype)


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

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.values).size * self.key_dim

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        keys, values = place.mesh.span(self.keys).size, place.mesh.span(self.values).size
        self._sizes = (2 * keys + values, values)
        self._conv_sizes = (keys, keys, values)
        self._conv_len = self.conv.state_len(place.mesh)
        self._a = -self.a_log.weight.exp()
        # Keys have length 1, and queries 1 / sqrt(key_dim): an RMS norm with these for weights.
        self._lengths = [torch.full((self.key_dim,), self.key_dim**power, device=place.device) for power in (-1, -0.5)]

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        b, a = self.steps(x).float().chunk(2, 1)
        x, z = self.project(x).split(self._sizes, 1)
        q, k, v = self.conv(x, states[:, : self._conv_len], step, self.number).float().split(self._conv_sizes, 1)
        q, k = (
            rms_norm(part.unflatten(1, (-1, self.key_dim)), length, eps=1e-6 / self.key_dim)
            for part, length in zip((q, k), self._lengths, strict=True)
        )
        g = F.softplus(a + self.dt_bias.weight).mul_(self._a)
        v = v.unflatten(1, (-1, self.head_dim)).contiguous()
        beta = b.sigmoid().mul_(self.most).contiguous()
        y = delta_scan(q, k, v, g, beta, states[:, self._conv_len :], plan)
        y = self.norm(y.to(z.dtype)).flatten(0, 1)
        return self.out(silu_mul(torch.cat((z.reshape(y.shape), y), 1)).view(z.shape))
