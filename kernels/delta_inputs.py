"""What the gated delta rule takes (delta_scan.py), of what a convolution and a projection give.

    q' = q / (|q| sqrt(key_dim)),   k' = k / |k|,   |x| = sqrt(sum x² + 1e-6)
    g = rate log(1 + exp(a + bias)),   beta = most / (1 + exp(-b))

qk      [num_tokens, 2 * num_k_heads * key_dim]   bf16|f16|f32  rows may be strided; q of all heads, then k
ba      [num_tokens, 2 * num_heads]               bf16|f16|f32  rows may be strided; b of all heads, then a
bias    [num_heads] f32, contiguous
rate    [num_heads] f32, contiguous
q', k'  [num_tokens, num_k_heads, key_dim]        dtype of qk; of one tensor, token by token
g, beta [num_tokens, num_heads]                   f32, contiguous

Bound: bytes; reads qk, writes q' and k'. A token's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes
from cableway.kernels.time_steps import softplus, time_steps

_EPS = 1e-6
_ELEMENTS = 2048
"""Of keys and queries, of a program."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def ref(qk: Tensor, ba: Tensor, bias: Tensor, rate: Tensor, *, key_dim: int, most: float) -> Inputs:
    heads = qk.float().unflatten(1, (2, -1, key_dim))
    heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _EPS)
    b, a = ba.float().chunk(2, 1)
    g = rate * torch.nn.functional.softplus(a.double() + bias).float()
    q, k = heads.unbind(1)
    return (q * key_dim**-0.5).to(qk.dtype), k.to(qk.dtype), g, most * torch.sigmoid(b)


@jit
def _delta_inputs(
    qk_ptr, ba_ptr, bias_ptr, rate_ptr, y_ptr, g_ptr, beta_ptr, qk_stride, ba_stride, query_scale, eps, most,
    NUM_K_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some heads of keys and queries of one token; the first of its programs makes g and beta too."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    head_inside = head < NUM_HEADS
    bias = tl.load(bias_ptr + head, mask=head_inside, other=0.0)
    rate = tl.load(rate_ptr + head, mask=head_inside, other=0.0)
    if PDL:
        gdc_wait()
    row, n = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY)
    inside = (row < 2 * NUM_K_HEADS)[:, None] & (n < KEY_DIM)[None, :]
    place = row[:, None] * KEY_DIM + n[None, :]
    x = tl.load(qk_ptr + token * qk_stride + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) + eps) * tl.where(row < NUM_K_HEADS, query_scale, 1.0)
    y = (x * scale[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * (2 * NUM_K_HEADS * KEY_DIM) + place, y, mask=inside)
    if tl.program_id(1) == 0:
        b = tl.load(ba_ptr + token * ba_stride + head, mask=head_inside, other=0.0).to(tl.float32)
        a = tl.load(ba_ptr + token * ba_stride + NUM_HEADS + head, mask=head_inside, other=0.0).to(tl.float32)
        tl.store(g_ptr + token * NUM_HEADS + head, rate * softplus(a + bias), mask=head_inside)
        tl.store(beta_ptr + token * NUM_HEADS + head, most * tl.sigmoid(b), mask=head_inside)


def launch(qk: Tensor, ba: Tensor, bias: Tensor, rate: Tensor, *, key_dim: int, most: float) -> Inputs:
    num_tokens, num_heads, num_k_heads = len(qk), len(bias), qk.shape[1] // (2 * key_dim)
    y = torch.empty(num_tokens, 2, num_k_heads, key_dim, dtype=qk.dtype, device=qk.device)
    g, beta = (torch.empty(num_tokens, num_heads, device=qk.device) for _ in range(2))
    block_key = triton.next_power_of_2(key_dim)
    rows = min(max(_ELEMENTS // block_key, 1), triton.next_power_of_2(2 * num_k_heads))
    _delta_inputs[(num_tokens, triton.cdiv(2 * num_k_heads, rows))](
        qk, ba, bias, rate, y, g, beta, qk.stride(0), ba.stride(0), key_dim**-0.5, _EPS, most,
        NUM_K_HEADS=num_k_heads, KEY_DIM=key_dim, NUM_HEADS=num_heads, ROWS=rows, BLOCK_KEY=block_key,
        BLOCK_HEADS=triton.next_power_of_2(num_heads), num_warps=4, **overlapping(),
    )  # fmt: skip
    q, k = y.unbind(1)
    return q, k, g, beta


def make(num_tokens: int, heads: tuple[int, int], key_dim: int, dtype: torch.dtype, most: float, device="cpu"):
    """`heads`: num_heads, num_k_heads. Both inputs are views of larger ones."""
    num_heads, num_k_heads = heads
    qk = torch.randn(num_tokens, 2 * num_k_heads * key_dim + 8, device=device).to(dtype)[:, :-8]
    ba = (4 * torch.randn(num_tokens, 2 * num_heads + 3, device=device)).to(dtype)[:, 3:]
    return call(qk, ba, *torch.randn(2, num_heads, device=device), key_dim=key_dim, most=most)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), heads=((6, 3),), key_dim=(16, 40), dtype=FLOATS, most=(1.0, 2.0)),
        *grid(num_tokens=(3,), heads=((32, 16), (30, 30)), key_dim=(96, 128), dtype=FLOATS, most=(1.0,)),
    ],
    bench_cases=grid(num_tokens=(64, 8192), heads=((32, 16),), key_dim=(128,), dtype=(torch.bfloat16,), most=(1.0,)),
    num_bytes=lambda c: 2 * nbytes(c.args[0]),
)
def delta_inputs(qk: Tensor, ba: Tensor, bias: Tensor, rate: Tensor, *, key_dim: int, most: float) -> Inputs:
    """q' and k' [T, K, D], g and beta [T, H]; ValueError when shapes or dtypes do not fit.

    Args:
        most: beta is below.
    """
    check(qk.dim() == ba.dim() == 2 and len(qk) == len(ba) and qk.shape[1] % (2 * key_dim) == 0, "qk or ba")
    check(qk.stride(1) == ba.stride(1) == 1 and qk.dtype in FLOATS and ba.dtype in FLOATS, "qk or ba is strided")
    for x in (bias, rate):
        check(2 * len(x) == ba.shape[1] and x.dtype == torch.float32 and x.is_contiguous(), "bias or rate")
    if not qk.is_cpu:
        return launch(qk, ba, bias, rate, key_dim=key_dim, most=most)
    heads = qk.float().unflatten(1, (2, -1, key_dim))
    q, k = (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _EPS)).unbind(1)
    b, a = ba.float().chunk(2, 1)
    beta = b.neg().exp_().add_(1).reciprocal_().mul_(most)  # bits that do not depend on what is beside a number
    return q.mul(key_dim**-0.5).to(qk.dtype), k.to(qk.dtype), time_steps(a, bias, rate), beta
