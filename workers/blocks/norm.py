"""Normalisation. A norm is called on rows; `add` fuses the sum of a residual stream with the norm of it."""

import torch
from torch import Tensor

from cableway.kernels.add_layer_norm import add_layer_norm
from cableway.kernels.add_rms_norm import add_rms_norm
from cableway.kernels.layer_norm import layer_norm
from cableway.kernels.rms_norm import rms_norm
from cableway.workers.blocks.block import Block, Filling, Slot
from cableway.workers.blocks.linear import Vector
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis


class RMSNorm(Vector):
    """y = x / sqrt(mean(x²) + eps) * (weight + offset), over the last `size` numbers.

    Args:
        offset: 1 where the checkpoint holds weight - 1.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__(Axis("norm", size))
        self.eps = eps
        self.offset = offset

    def load(self, parts: Filling, place: Place) -> None:
        super().load(parts, place)
        self.weight += self.offset

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, contiguous"""
        return rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, size] f32 += x [T, size], in place; the normalised sum, in the dtype of x."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps)


class Unweighted(Block):
    """A norm without a weight: one of ones, for kernels that want one."""

    def __init__(self, size: int, eps: float):
        self.size = size
        self.eps = eps
        self._ones: Tensor

    def prepare(self, place: Place) -> None:
        self._ones = torch.ones(self.size, device=place.device)


class RMSScale(Unweighted):
    """y = x / sqrt(mean(x²) + eps): an RMSNorm without a weight."""

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._ones, eps=self.eps)


class HeadRMSNorm(Vector):
    """An RMSNorm with a weight of its own for each head, which a checkpoint gives as one row.

    Args:
        heads: each of as many numbers as are normalised together.
    """

    def __init__(self, heads: Axis, eps: float):
        super().__init__(heads)
        self.head_dim, self.eps = heads.unit, eps
        self._ones: Tensor

    def prepare(self, place: Place) -> None:
        self._ones = torch.ones(self.head_dim, device=place.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads, head_dim] -> the same shape, contiguous"""
        return (rms_norm(x, self._ones, eps=self.eps) * self.weight.view(-1, self.head_dim)).to(x.dtype)


class LayerNorm(Slot):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + offset) + bias, over the last `size` numbers.

    Args:
        bias: whether the checkpoint has one; None = as it pleases.
        heads: axis of the heads, where each has a weight of its own.
    """

    def __init__(
        self, size: int, eps: float, *, bias: bool | None = True, offset: float = 0.0, heads: Axis | None = None
    ):
        self.parts = {"": heads or Axis("norm", size)}
        self.leaves = {"weight": ()} if bias is False else {"weight": (), "bias": ()}
        self.optional = frozenset({"bias"} if bias is None else ())
        self.size, self.eps, self.offset = size, eps, offset
        self._weight: Tensor
        self._bias: Tensor | None = None

    def load(self, parts: Filling, place: Place) -> None:
        span = place.mesh.span(self.parts[""])
        leaves = {leaf: stored.piece(span).decode(torch.float32) for leaf, stored in parts[""].items()}
        weight = leaves["weight"] + self.offset
        self._weight = (weight if len(weight) == self.size else weight.view(-1, self.size)).to(place.device)
        if "bias" in leaves:
            self._bias = leaves["bias"].to(place.device, copy=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, contiguous"""
        return layer_norm(x, self._weight, self._bias, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, size] f32 += x [T, size], in place; the normalised sum, in the dtype of x."""
        return add_layer_norm(x, residual, self._weight, self._bias, eps=self.eps)


class HeadNorms(Slot):
    """A LayerNorm for each head, which a checkpoint gives one by one: parts `0`, `1`, … of weights without biases."""

    def __init__(self, heads: Axis, eps: float):
        self.parts = {str(head): Axis("norm", heads.unit) for head in range(heads.count)}
        self.leaves = {"weight": ()}
        self.heads, self.eps = heads, eps
        self._weight: Tensor

    def load(self, parts: Filling, place: Place) -> None:
        held, unit = place.mesh.span(self.heads), self.heads.unit
        rows = self.share(parts, place, torch.float32)[held.start // unit : held.stop // unit]
        self._weight = torch.stack(rows).to(place.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads, head_dim] -> the same shape, contiguous"""
        return layer_norm(x, self._weight, None, eps=self.eps)


class PlainLayerNorm(Unweighted):
    """A LayerNorm without weight or bias."""

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self._ones, None, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return add_layer_norm(x, residual, self._ones, None, eps=self.eps)


class JointNorm(Vector):
    """An RMSNorm over numbers that are cut over ranks, such as all heads of q together."""

    def __init__(self, axis: Axis, eps: float):
        super().__init__(axis)
        self.eps = eps
        self._place: Place

    def prepare(self, place: Place) -> None:
        self._place = place

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, …], whose last dimensions are this rank's share of the axis -> the same shape, contiguous."""
        rows = x.flatten(1)
        axis, mesh = self.parts[""], self._place.mesh
        if not mesh.is_cut(axis):
            return rms_norm(rows, self.weight, eps=self.eps).view(x.shape)
        wide = rows.float()
        mean = mesh.all_reduce(wide.square().sum(-1, keepdim=True)).div_(mesh.num_held(axis))
        return (wide * torch.rsqrt(mean + self.eps) * self.weight).to(x.dtype).view(x.shape)


class Scale(Block):
    """y = x * factor: multipliers of embeddings, residuals and logits, where a norm could stand too."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """In place."""
        return x.mul_(self.factor)


class SoftCap(Block):
    """y = cap * tanh(x / cap)"""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        """In place."""
        return x.div_(self.cap).tanh_().mul_(self.cap)
