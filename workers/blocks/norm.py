"""Normalisation."""

from torch import Tensor

from cableway.kernels.add_rms_norm import add_rms_norm
from cableway.kernels.rms_norm import rms_norm
from cableway.workers.blocks.linear import Vector
from cableway.workers.parallel import Axis


class RMSNorm(Vector):
    """y = x / sqrt(mean(x²) + eps) * weight, over the last `size` numbers."""

    def __init__(self, size: int, eps: float):
        super().__init__(Axis("norm", size))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, contiguous"""
        return rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [T, size] f32 += x [T, size], in place; the normalised sum, in the dtype of x."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps)
