"""Time steps and decays of recurrent layers, of what a projection gives.

    y = scale * min(max(log(1 + exp(x + b)), low), high)

x      [num_tokens, channels]  bf16|f16|f32   rows may be strided
b      [channels] f32, contiguous, or None
scale  [channels] f32, contiguous, or None
y      [num_tokens, channels]  f32, contiguous

Bound: bytes; reads x, writes y. A number depends on its own alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes

_BLOCK = 1024


def ref(x: Tensor, b: Tensor | None, scale: Tensor | None, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    y = torch.nn.functional.softplus(x.double() + (0 if b is None else b)).clamp(low, high)
    return (y * (1 if scale is None else scale)).float()


@jit
def softplus(x):
    """log(1 + exp(x)) of x f32, to the last bits for large negative ones too."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    # What the sum lost is made good: its logarithm over what was added to 1 hardly depends on it.
    small = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + small


@jit(do_not_specialize=("num_numbers",))
def _time_steps(
    x_ptr, b_ptr, scale_ptr, y_ptr, x_stride, num_numbers, low, high,
    CHANNELS: tl.constexpr, HAS_B: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, channel = number < num_numbers, number % CHANNELS
    b = tl.zeros((BLOCK,), tl.float32)
    scale = b + 1.0
    if HAS_B:
        b = tl.load(b_ptr + channel)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + channel)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + number // CHANNELS * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    y = scale * tl.minimum(tl.maximum(softplus(x + b), low), high)
    tl.store(y_ptr + number, y, mask=inside)


def launch(x: Tensor, b: Tensor | None, scale: Tensor | None, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    num_tokens, channels = x.shape
    y = torch.empty(num_tokens, channels, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(num_tokens * channels))
    _time_steps[(triton.cdiv(num_tokens * channels, block),)](
        x, x if b is None else b, x if scale is None else scale, y, x.stride(0), num_tokens * channels, low, high,
        CHANNELS=channels, HAS_B=b is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=4, **overlapping(),
    )  # fmt: skip
    return y


def make(num_tokens: int, channels: int, dtype: torch.dtype, has_b: bool, has_scale: bool, high=math.inf, device="cpu"):
    """x is a view of a projection."""
    x = (4 * torch.randn(num_tokens, channels + 7, device=device)).to(dtype)[:, 7:]
    b, scale = torch.randn(2, channels, device=device)
    return call(x, b if has_b else None, scale if has_scale else None, low=0.0, high=high)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 9), channels=(40,), dtype=FLOATS, has_b=(False, True), has_scale=(False, True)),
        *grid(num_tokens=(70,), channels=(300,), dtype=FLOATS, has_b=(True,), has_scale=(False,), high=(1.5,)),
    ],
    bench_cases=grid(num_tokens=(64, 8192), channels=(80,), dtype=(torch.bfloat16,), has_b=(True,), has_scale=(False,)),
    num_bytes=lambda c: nbytes(c.args[0]) + 4 * c.args[0].numel(),
)
def time_steps(
    x: Tensor, b: Tensor | None, scale: Tensor | None, *, low: float = 0.0, high: float = math.inf
) -> Tensor:
    """y [T, C]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and x.stride(1) == 1 and x.dtype in FLOATS, "x is not [T, C], or strided in its rows")
    for other in (b, scale):
        fits = other is None or (other.shape == x.shape[1:] and other.dtype == torch.float32 and other.is_contiguous())
        check(fits, "b or scale does not fit x")
    if not x.is_cpu:
        return launch(x, b, scale, low=low, high=high)
    h = x.float() if b is None else x.float().add(b)
    # Exponential and logarithm give a number's bits whatever is beside it; torch's own softplus does not.
    y = h.abs().neg_().exp_().log1p_().add_(h.clamp(min=0)).clamp_(low, high)
    return y if scale is None else y.mul_(scale)
