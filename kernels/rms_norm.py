"""RMSNorm over the last dimension.   y = x / sqrt(mean(x²) + eps) * (w + offset)

x  [..., hidden]  bf16|f16|f32   last dimension contiguous; leading dimensions may be strided
w  [hidden]       f32
y  [..., hidden]  dtype of x, contiguous

`offset` is 1.0 for families that store w - 1 (Gemma).
Bound: bytes; reads x and w, writes y. Row-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (w.float() + offset)).to(x.dtype)


@jit
def _rms_norm(x_ptr, w_ptr, y_ptr, x_stride, hidden, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
    y = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps) * w
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    warps = min(max(block // 512, 1), 16)
    _rms_norm[(rows.shape[0],)](rows, w, y, rows.stride(0), hidden, eps, offset, BLOCK=block, num_warps=warps)
    return y


def make(num_tokens: int, hidden: int, dtype: torch.dtype, strided: bool = False, offset: float = 0.0, device="cpu"):
    x = torch.randn(num_tokens, hidden * (1 + strided), device=device).to(dtype)[:, :hidden]
    return call(x, torch.randn(hidden, device=device), eps=1e-5, offset=offset)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_tokens=(1, 7), hidden=(64, 576), dtype=FLOATS, strided=(False, True), offset=(0.0, 1.0)),
    bench_cases=grid(num_tokens=(1, 16, 512), hidden=(576, 4096), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: 2 * nbytes(c.args[0]) + nbytes(c.args[1]),
)
def rms_norm(x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the rows of x [..., hidden]; ValueError when w does not fit."""
    check(w.shape == x.shape[-1:] and w.dtype == torch.float32 and x.dtype in FLOATS, "x or w does not fit")
    check(x.stride(-1) == 1 and w.stride(0) == 1, "x is strided within its rows, or w")
    if not x.is_cpu:
        return launch(x, w, eps=eps, offset=offset)
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    y = torch.empty(x.shape, dtype=x.dtype)
    num_outer, num_inner, size = rows.shape
    loops.run(
        loops.normalise, num_outer * num_inner, 4 * size, x.data_ptr(), rows.stride(0), rows.stride(1), num_inner,
        loops.KINDS[x.dtype], 0, 0, 0, w.data_ptr(), y.data_ptr(), size, eps, offset,
    )  # fmt: skip
    return y
