"""Fused residual add and RMSNorm.   h = x + r;  y = h / sqrt(mean(h²) + eps) * (w + offset)

x  [num_tokens, hidden]  bf16|f16|f32   rows may be strided
r  [num_tokens, hidden]  dtype of x     rows may be strided; h is written over it
w  [hidden]              f32
y  [num_tokens, hidden]  dtype of x, contiguous

h is rounded to the dtype of r before it is normalised, so that the sum that is kept is the one that was normalised.
Bound: bytes; reads x, r and w, writes r and y. Row-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import rms_norm
from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(x: Tensor, r: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    r.copy_(x.float() + r.float())
    return rms_norm.ref(r, w, eps=eps, offset=offset)


@jit
def _add_rms_norm(x_ptr, r_ptr, w_ptr, y_ptr, x_stride, r_stride, hidden, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row * r_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + r).to(r_ptr.dtype.element_ty)
    tl.store(r_ptr + row * r_stride + column, rounded, mask=inside)
    h = rounded.to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    y = h * tl.rsqrt(tl.sum(h * h, 0) / hidden + eps) * w
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, r: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    check(x.stride(1) == r.stride(1) == 1 and w.is_contiguous(), "x or r are strided within their rows, or w")
    num_tokens, hidden = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(num_tokens,)](
        x, r, w, y, x.stride(0), r.stride(0), hidden, eps, offset, BLOCK=block, num_warps=min(max(block // 512, 1), 16)
    )
    return y


def make(num_tokens: int, hidden: int, dtype: torch.dtype, strided: bool = False, offset: float = 0.0, device="cpu"):
    x, r = torch.randn(2, num_tokens, hidden * (1 + strided), device=device).to(dtype)[..., :hidden]
    return call(x, r, torch.randn(hidden, device=device), eps=1e-5, offset=offset)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_tokens=(1, 7), hidden=(64, 576), dtype=FLOATS, strided=(False, True), offset=(0.0, 1.0)),
    bench_cases=grid(num_tokens=(1, 16, 512), hidden=(576, 4096), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: 4 * nbytes(c.args[0]) + nbytes(c.args[2]),
    updates=(1,),
)
def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Add x to `residual` in place and return the normalised sum; ValueError when shapes or dtypes do not fit."""
    check(x.shape == residual.shape and x.dtype == residual.dtype, "x and residual differ in shape or dtype")
    check(w.shape == x.shape[-1:], f"w {tuple(w.shape)} does not fit x {tuple(x.shape)}")
    if x.device.type != "cpu":
        return launch(x, residual, w, eps=eps, offset=offset)
    return rms_norm.rms_norm(residual.add_(x), w, eps=eps, offset=offset)
