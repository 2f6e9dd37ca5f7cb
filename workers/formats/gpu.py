"""Matrices on a GPU: row-major, and multiplied together with what comes before and after where that saves a kernel.

One token takes the time of the matrix's bytes and of the gaps between kernels. There one kernel of ours adds the
residual stream, normalises, multiplies, adds the bias and gates. Small matrices are ours for a few tokens, too, and on
Hopper gated ones that keep all processors busy; the rest is the library's.
PERF, one H200, a token of qwen3-0.6b / llama-3.1-8b, all products of the body: cuBLAS 830 / 3,950 us and norms and
gates beside it, here 345 / 3,340 with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.gemv import MOST_IN, gemv
from cableway.kernels.linear import linear, pays
from cableway.kernels.silu_mul import silu_mul
from cableway.workers.formats.base import Sum
from cableway.workers.formats.dense import Dense


class OnGpu(Dense):
    """`fused` is `apply` of an input that may be a Sum, then bias and gate."""

    def fused(self, x: Tensor | Sum, matrix: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
        """x [T, in] -> [T, out], or [T, out / 2] where gated: silu(first half) * second half."""
        if len(x) == 1 and matrix.shape[1] <= MOST_IN:
            return _one_row(x, matrix, bias, gated)
        x = x.tensor() if isinstance(x, Sum) else x
        if pays(x, matrix, gated=gated):
            return linear(x, matrix, bias, gated=gated)
        y = F.linear(x, matrix, bias)
        return silu_mul(y) if gated else y

    def fused_and_input(self, x: Sum, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """`fused`, and the input itself, of which more is to be made."""
        if len(x) == 1 and matrix.shape[1] <= MOST_IN:
            return _one_sum(x, matrix, bias, also_input=True)
        tensor = x.tensor()
        return self.fused(tensor, matrix, bias, gated=False), tensor

    def write(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        """The product in float32, unrounded, into `out` [T, out]."""
        if len(x) == 1 and matrix.shape[1] <= MOST_IN:
            gemv(x, matrix, out=out)
        elif x.dtype == torch.float32:
            torch.mm(x, matrix.T, out=out)
        else:
            torch.mm(x, matrix.T, torch.float32, out=out)


class Invariant(OnGpu):
    """Products whose sums are in one order whatever rows are beside a row: a library's depend on their number."""

    def fused(self, x: Tensor | Sum, matrix: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
        x = x.tensor() if isinstance(x, Sum) else x
        return linear(x, matrix, bias, gated=gated, invariant=True)

    def fused_and_input(self, x: Sum, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        tensor = x.tensor()
        return self.fused(tensor, matrix, bias, gated=False), tensor

    def write(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        linear(x, matrix, out=out, invariant=True)


def _one_row(x: Tensor | Sum, matrix: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    if not isinstance(x, Sum):
        return gemv(x, matrix, bias, gated=gated)
    return _one_sum(x, matrix, bias, gated=gated)[0]


def _one_sum(x: Sum, matrix: Tensor, bias: Tensor | None, **options: bool) -> tuple[Tensor, ...]:
    y, total, *also = gemv(x.delta, matrix, bias, residual=x.residual, norm=x.norm.weight, eps=x.norm.eps, **options)
    # While one program writes the sum others still read what it is made of: it takes the place of the old one here.
    x.residual.set_(total)
    return y, *also
