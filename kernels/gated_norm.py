"""What a recurrent mixer gives, times a gate and normed in groups: before the norm, after it, or without one.

    y = n(x silu(z)) w   where the gate is first,   y = n(x) w silu(z)   where it is not,   y = x silu(z)   without w
    n(h) = h / sqrt(mean(h²) + eps) over a group

x  [num_tokens, num_groups, size]  bf16|f16|f32, contiguous
z  [num_tokens, num_groups * size]  dtype of x   rows may be strided
w  [num_groups, size] or [1, size]  f32, contiguous, or None
y  [num_tokens, num_groups * size]  dtype of x, contiguous

Bound: bytes; reads x and z, writes y. A token's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, loops, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, Call, call, check, grid, kernel, nbytes

_ELEMENTS, _MOST_COLUMNS = 1024, 2048
"""Of a program at once: where groups are small, and where they are large."""
_MANY_ROWS, _MANY_TURNS = 4096, 4
"""Of rows, from when on a program reads its weights once for several."""


def ref(x: Tensor, z: Tensor, w: Tensor | None, *, eps: float = 0.0, gates_first: bool = True) -> Tensor:
    h, gate = x.float(), torch.nn.functional.silu(z.float()).view(x.shape)
    if gates_first or w is None:
        h = h * gate
    if w is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w
        h = h if gates_first else h * gate
    return h.flatten(1).to(x.dtype)


@jit(do_not_specialize=("num_rows", "num_turns"))
def _gated_norm(
    x_ptr, z_ptr, w_ptr, y_ptr, z_stride, num_rows, num_turns, eps,
    NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, NUM_WEIGHTS: tl.constexpr, GATES_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some groups, counted token by token, in turns that share their weights."""
    if PDL:
        gdc_launch_dependents()
    PARTS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    first_row, column = tl.program_id(0).to(tl.int64) * (ROWS * num_turns), tl.arange(0, BLOCK)
    weights = ()
    for part in tl.static_range(PARTS):
        if NUM_WEIGHTS > 0:
            w_row = (first_row + tl.arange(0, ROWS)) % NUM_WEIGHTS
            w_place = w_row[:, None] * SIZE + part * BLOCK + column[None, :]
            w_inside = (column < SIZE - part * BLOCK)[None, :]
            weights += (tl.load(w_ptr + w_place, mask=w_inside, other=0.0),)
    if PDL:
        gdc_wait()
    for turn in range(num_turns):
        row = first_row + turn * ROWS + tl.arange(0, ROWS)
        z_row = row // NUM_GROUPS * z_stride + row % NUM_GROUPS * SIZE
        xs, zs = (), ()
        for part in tl.static_range(PARTS):
            inside = (row < num_rows)[:, None] & (column < SIZE - part * BLOCK)[None, :]
            place = part * BLOCK + column[None, :]
            xs += (tl.load(x_ptr + row[:, None] * SIZE + place, mask=inside, other=0.0),)
            zs += (tl.load(z_ptr + z_row[:, None] + place, mask=inside, other=0.0),)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        if NUM_WEIGHTS > 0:
            for part in tl.static_range(PARTS):
                h = _gated(xs[part], zs[part], GATES_FIRST)
                squares += h * h
        scale = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)[:, None]
        for part in tl.static_range(PARTS):
            h = _gated(xs[part], zs[part], GATES_FIRST or NUM_WEIGHTS == 0)
            if NUM_WEIGHTS > 0:
                h *= scale * weights[part]
                if not GATES_FIRST:
                    h = _gated(h, zs[part], True)
            inside = (row < num_rows)[:, None] & (column < SIZE - part * BLOCK)[None, :]
            place = row[:, None] * SIZE + part * BLOCK + column[None, :]
            tl.store(y_ptr + place, h.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _gated(x, z, GATED: tl.constexpr):
    """x f32, times silu(z) where GATED."""
    h = x.to(tl.float32)
    if GATED:
        gate = z.to(tl.float32)
        h *= gate * tl.sigmoid(gate)
    return h


def launch(x: Tensor, z: Tensor, w: Tensor | None, *, eps: float = 0.0, gates_first: bool = True) -> Tensor:
    num_tokens, num_groups, size = x.shape
    num_rows, num_weights = num_tokens * num_groups, 0 if w is None else len(w)
    y = torch.empty(num_tokens, num_groups * size, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(size), _MOST_COLUMNS)
    rows = max(_ELEMENTS // block, 1)
    num_turns = _MANY_TURNS if num_weights == 1 and num_rows >= _MANY_ROWS * rows else 1
    _gated_norm[(triton.cdiv(num_rows, rows * num_turns),)](
        x, z, x if w is None else w, y, z.stride(0), num_rows, num_turns, eps,
        NUM_GROUPS=num_groups, SIZE=size, NUM_WEIGHTS=num_weights, GATES_FIRST=gates_first,
        ROWS=rows, BLOCK=block, num_warps=max(rows * block // 512, 1) if block < _MOST_COLUMNS else 8, **overlapping(),
    )  # fmt: skip
    return y


def make(
    num_tokens: int, groups: tuple[int, int], dtype: torch.dtype, num_weights: int, gates_first: bool, device="cpu"
) -> Call:
    """`groups`: num_groups, size. z is a view of a projection."""
    num_groups, size = groups
    x = torch.randn(num_tokens, num_groups, size, device=device).to(dtype)
    z = torch.randn(num_tokens, num_groups * size + 7, device=device).to(dtype)[:, 7:]
    w = torch.randn(num_weights, size, device=device) if num_weights else None
    return call(x, z, w, eps=1e-5, gates_first=gates_first)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), groups=((3, 40),), dtype=FLOATS, num_weights=(0, 1, 3), gates_first=(False, True)),
        *grid(num_tokens=(1, 5), groups=((1, 1100),), dtype=FLOATS, num_weights=(1,), gates_first=(True,)),
    ],
    bench_cases=[
        *grid(
            num_tokens=(64, 8192), groups=((1, 5120),), dtype=(torch.bfloat16,), num_weights=(0, 1), gates_first=(True,)
        ),
        *grid(
            num_tokens=(64, 8192), groups=((32, 128),), dtype=(torch.bfloat16,), num_weights=(1,), gates_first=(False,)
        ),
    ],
    num_bytes=lambda c: 3 * nbytes(c.args[0]),
)
def gated_norm(x: Tensor, z: Tensor, w: Tensor | None, *, eps: float = 0.0, gates_first: bool = True) -> Tensor:
    """y [T, G * size]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 3 and x.is_contiguous() and x.dtype in FLOATS, "x is not [T, G, size], contiguous")
    check(z.shape == (x.shape[0], x.shape[1] * x.shape[2]) and z.dtype == x.dtype and z.stride(1) == 1, "z")
    fits = w is None or (w.dim() == 2 and len(w) in (1, x.shape[1]) and w.shape[1] == x.shape[2])
    check(fits and (w is None or (w.dtype == torch.float32 and w.is_contiguous())), "w")
    if not x.is_cpu:
        return launch(x, z, w, eps=eps, gates_first=gates_first)
    num_tokens, num_groups, size = x.shape
    y = torch.empty(num_tokens, num_groups * size, dtype=x.dtype)
    loops.run(
        loops.gate, num_tokens * num_groups, 8 * size, x.data_ptr(), z.data_ptr(), z.stride(0), y.data_ptr(),
        loops.KINDS[x.dtype], 0 if w is None else w.data_ptr(), 0 if w is None else len(w), num_groups, size,
        gates_first, eps,
    )  # fmt: skip
    return y
