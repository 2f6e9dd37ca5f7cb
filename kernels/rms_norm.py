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


@jit(do_not_specialize=("num_inner", "num_rows"))
def _rms_norm(
    x_ptr, w_ptr, y_ptr, x_outer, x_inner, num_inner, num_rows, hidden, eps, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < hidden)[None, :]
    start = row // num_inner * x_outer + row % num_inner * x_inner
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < hidden, other=0.0).to(tl.float32) + offset
    y = x * tl.rsqrt(tl.sum(x * x, 1) / hidden + eps)[:, None] * w[None, :]
    tl.store(y_ptr + row[:, None] * hidden + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, w: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    hidden = x.shape[-1]
    rows = x if x.dim() == 3 else x.reshape(1, -1, hidden)
    num_rows = rows.shape[0] * rows.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    # The heads of a token are short rows: some together fill a program.
    num_together = min(max(1024 // block, 1), 16)
    _rms_norm[(triton.cdiv(num_rows, num_together),)](
        rows, w, y, rows.stride(0), rows.stride(1), rows.shape[1], num_rows, hidden, eps, offset,
        ROWS=num_together, BLOCK=block, num_warps=min(max(num_together * block // 512, 1), 16),
    )  # fmt: skip
    return y


def make(
    num_tokens: int, hidden: int, dtype: torch.dtype, strided: bool = False, offset: float = 0.0, heads: int = 0,
    device="cpu",
):  # fmt: skip
    """`heads`: so many rows a token, beside others of a projection."""
    shape = (num_tokens, heads + 2, hidden) if heads else (num_tokens, hidden * (1 + strided))
    x = torch.randn(shape, device=device).to(dtype)
    return call(x[:, :heads] if heads else x[:, :hidden], torch.randn(hidden, device=device), eps=1e-5, offset=offset)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), hidden=(64, 576), dtype=FLOATS, strided=(False, True), offset=(0.0, 1.0)),
        *grid(num_tokens=(1, 7), hidden=(80, 128), dtype=FLOATS, heads=(1, 5)),
    ],
    bench_cases=[
        *grid(num_tokens=(1, 16, 512), hidden=(576, 4096), dtype=(torch.bfloat16,)),
        *grid(num_tokens=(1, 256), hidden=(128,), heads=(16,), dtype=(torch.bfloat16,)),
    ],
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
        loops.normalise, num_outer * num_inner, 4 * size, rows.data_ptr(), rows.stride(0), rows.stride(1), num_inner,
        loops.KINDS[x.dtype], 0, 0, 0, w.data_ptr(), y.data_ptr(), size, eps, offset,
    )  # fmt: skip
    return y
