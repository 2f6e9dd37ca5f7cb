"""Rows through a matrix each, that of the group they are for: the experts of a mixture.

    y = weight * gate(W x + b);  gate(z) = z, or of halves silu(z1) * z2

Which rows are for which group, and how they are cut into tiles, says order_by_expert.py: `rows` are row numbers in the
order of groups. On the way in x is by row numbers, and y in that order; on the way out, `outward`, the other way.

x        [num_rows or num_tokens, in]  bf16|f16|f32   rows may be strided; a token's is for several, one after another
w        [num_groups, out, in]         dtype of x, contiguous; where gated [num_groups, 2 * out, in]
rows     [num_rows]                    i32
tiles    [num_tiles, 3]                i32   of at most tile_rows rows
bias     [num_groups, out or 2 * out]  dtype of x, or None
weights  [num_rows]                    f32, by row numbers, or None
y        [num_rows, out]               dtype of x, contiguous

Nothing here waits to know how large groups are: there is a program for every tile that there can be, and those that
find none do nothing. A row's result is the same whatever rows are beside it, where the tuning is the same.
Bound: bytes for few rows (the matrices of groups that have any), FLOPs for many.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import (
    TensorDescriptor,
    gdc_launch_dependents,
    gdc_wait,
    gpu_capability,
    jit,
    overlapping,
    tl,
    triton,
)
from cableway.kernels.order_by_expert import order_by_expert
from cableway.kernels.registry import FLOATS, Call, are_contiguous, call, check, grid, kernel, nbytes
from cableway.kernels.tuning import OF_BYTES, Tunable


def ref(
    x: Tensor, w: Tensor, rows: Tensor, tiles: Tensor, bias: Tensor | None = None, *, tile_rows: int,
    gated: bool = False, weights: Tensor | None = None, outward: bool = False,
) -> Tensor:  # fmt: skip
    share = len(rows) // len(x)
    y = torch.empty(len(rows), w.shape[1] // (1 + gated), dtype=x.dtype, device=x.device)
    for group, first, end in tiles.tolist():
        if group < 0:
            continue
        numbers = rows[first:end].long()
        z = (x[first:end] if outward else x[numbers // share]).float() @ w[group].float().T
        if bias is not None:
            z += bias[group].float()
        if gated:
            z = F.silu(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :]
        if weights is not None:
            z *= weights[numbers, None]
        y[numbers if outward else slice(first, end)] = z.to(x.dtype)
    return y


@jit
def _grouped_linear(
    x_ptr, w_ptr, w_tiles, rows_ptr, tiles_ptr, bias_ptr, weights_ptr, y_ptr, x_stride,
    NUM_OUT: tl.constexpr, NUM_IN: tl.constexpr, SHARE: tl.constexpr, OUTWARD: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, IN_TILES: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, SWAPPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of rows, and OUT columns. SWAPPED: rows are the columns of the products. IN_TILES: the hardware brings
    tiles of the matrices by itself."""
    WIDTH: tl.constexpr = NUM_OUT * (1 + GATED)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.arange(0, IN)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    group = tl.load(tile_ptr)
    if group >= 0:
        first, end = tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
        place = first + tl.arange(0, ROWS)
        is_row = place < end
        place = tl.minimum(place, end - 1)  # from the end on the last one over and over
        number = tl.load(rows_ptr + place)
        if OUTWARD:
            from_row, to_row = place, number
        else:
            from_row, to_row = number // SHARE, place
        is_column = column < NUM_OUT
        x_row = x_ptr + from_row.to(tl.int64)[:, None] * x_stride + part[None, :]
        w_row = w_ptr + (group.to(tl.int64) * WIDTH + tl.where(is_column, column, 0))[:, None] * NUM_IN + part[None, :]
        first_row = group * WIDTH + tl.program_id(0) * OUT
        z = tl.zeros((OUT, ROWS) if SWAPPED else (ROWS, OUT), tl.float32)
        up = z
        for done in range(0, NUM_IN, IN):
            if NUM_IN % IN == 0:
                x = tl.load(x_row + done)
            else:
                inside = (part < NUM_IN - done)[None, :]
                x = tl.load(x_row + done, mask=inside, other=0.0)
            if IN_TILES:
                w = w_tiles.load([first_row, done])
                if GATED:
                    up_w = w_tiles.load([first_row + NUM_OUT, done])
            elif NUM_IN % IN == 0:
                w = tl.load(w_row + done)
                if GATED:
                    up_w = tl.load(w_row + NUM_OUT * NUM_IN + done)
            else:
                w = tl.load(w_row + done, mask=inside, other=0.0)
                if GATED:
                    up_w = tl.load(w_row + NUM_OUT * NUM_IN + done, mask=inside, other=0.0)
            if SWAPPED:
                z = tl.dot(w, tl.trans(x), z, input_precision="ieee")
            else:
                z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
            if GATED:
                if SWAPPED:
                    up = tl.dot(up_w, tl.trans(x), up, input_precision="ieee")
                else:
                    up = tl.dot(x, tl.trans(up_w), up, input_precision="ieee")
        across: tl.constexpr = 1 if SWAPPED else 0
        along: tl.constexpr = 0 if SWAPPED else 1
        if HAS_BIAS:
            bias_at = bias_ptr + group * WIDTH + column
            bias = tl.load(bias_at, mask=is_column, other=0.0).to(tl.float32)
            z += tl.expand_dims(bias, across)
            if GATED:
                bias = tl.load(bias_at + NUM_OUT, mask=is_column, other=0.0).to(tl.float32)
                up += tl.expand_dims(bias, across)
        if GATED:
            z = z * tl.sigmoid(z) * up
        if HAS_WEIGHTS:
            z *= tl.expand_dims(tl.load(weights_ptr + number), along)
        y_at = y_ptr + tl.expand_dims(to_row.to(tl.int64), along) * NUM_OUT + tl.expand_dims(column, across)
        inside = tl.expand_dims(is_row, along) & tl.expand_dims(is_column, across)
        tl.store(y_at, z.to(y_ptr.dtype.element_ty), mask=inside)


class Tuning(NamedTuple):
    """Shape of a program's tile."""

    out: int
    block_in: int
    num_warps: int
    num_stages: int
    swapped: bool = False  # rows are the columns of products
    in_tiles: bool = False  # the hardware brings tiles of the matrices by itself


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_groups: int
    num_out: int
    num_in: int
    gated: bool
    item_bytes: int
    tile_rows: int


TILE_ROWS = (16, 32, 64, 128)
INVARIANT_ROWS = 16
"""Rows of a tile where they must not depend on how many rows there are."""


def tile_rows_for(num_rows: int, num_groups: int, *, invariant: bool = False) -> int:
    """As many as a group has, or twice that while weights are all that is waited for: they are to be read once."""
    if invariant:
        return INVARIANT_ROWS
    mean = num_rows / num_groups
    return 16 if mean <= 8 else 32 if mean <= 24 else 64 if mean <= 48 else 128


def _rule(key: Key) -> Tuning:
    """Few rows are the columns of products; for many, tiles of a matrix are as large as registers allow.

    PERF, H200, 128 experts of 2 x 768 x 2048 gated, and of 2048 x 768, us: 16 tokens of 8 rows 121 and 63 (4.3 TB/s),
    256 tokens 188 and 102, 8,192 tokens 736 and 427 (560 and 483 TFLOP/s; 786 and 427 where programs bring all tiles).
    """
    block_in = 128 // key.item_bytes
    if key.tile_rows < 64 or key.item_bytes == 4 or gpu_capability() != 90:
        return Tuning(64, block_in, 4, 3 if key.tile_rows == 64 else 2 if key.tile_rows > 64 else 4, key.tile_rows < 64)
    if key.tile_rows == 64:
        return Tuning(64, block_in, 4, 4) if key.gated else Tuning(128, block_in, 8, 3)
    in_tiles = key.gated and key.num_in * key.item_bytes % 16 == 0
    return Tuning(128 if key.gated else 256, block_in, 8, 4, in_tiles=in_tiles)


def _candidates(key: Key) -> Iterator[Tuning]:
    few = key.tile_rows < 64
    in_tiles = (False, True) if gpu_capability() >= 90 and key.num_in * key.item_bytes % 16 == 0 else (False,)
    for out, num_warps, num_stages, by_tiles in product((32, 64, 128, 256), (4, 8), (3, 4), in_tiles):
        width, block_in = out * (1 + key.gated), 128 // key.item_bytes
        numbers = width * key.tile_rows // (32 * num_warps)
        stage_bytes = (key.tile_rows + width) * 128
        if (
            stage_bytes * num_stages <= 220 << 10
            and 8 <= numbers <= 128
            and (not few or (num_warps == 4 and out < 128))
        ):
            yield Tuning(out, block_in, num_warps, num_stages, few, by_tiles)


def _tiles_of(w: Tensor, t: Tuning) -> Any:
    return TensorDescriptor.from_tensor(w.view(-1, w.shape[2]), [t.out, t.block_in])


def launch(
    x: Tensor, w: Tensor, rows: Tensor, tiles: Tensor, bias: Tensor | None = None, *, tile_rows: int,
    gated: bool = False, weights: Tensor | None = None, outward: bool = False, tuned: Tuning | None = None,
) -> Tensor:  # fmt: skip
    check(x.stride(1) == 1, "x is strided within its rows")
    num_rows, num_groups, num_out, num_in = len(rows), w.shape[0], w.shape[1] // (1 + gated), x.shape[1]
    t = tuned or tuning(Key(num_groups, num_out, num_in, gated, x.element_size(), tile_rows))
    y = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    _grouped_linear[(triton.cdiv(num_out, t.out), len(tiles))](
        x, w, _tiles_of(w, t) if t.in_tiles else None, rows, tiles, bias, weights, y, x.stride(0),
        NUM_OUT=num_out, NUM_IN=num_in, SHARE=num_rows // len(x), OUTWARD=outward, GATED=gated,
        HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None,
        IN_TILES=t.in_tiles, ROWS=tile_rows, OUT=t.out, IN=t.block_in, SWAPPED=t.swapped,
        num_warps=t.num_warps, num_stages=t.num_stages, **overlapping(),
    )  # fmt: skip
    return y


def make(
    sizes: tuple[int, ...], num_out: int, num_in: int, dtype: torch.dtype, tile_rows: int = 16, share: int = 1,
    gated: bool = False, biased: bool = False, outward: bool = False, device: str = "cpu",
):  # fmt: skip
    """`sizes`: rows of each group. `share`: rows that a row of x is for."""
    groups = torch.arange(len(sizes), device=device, dtype=torch.int32).repeat_interleave(
        torch.tensor(sizes, device=device), output_size=sum(sizes)
    )
    groups = groups[torch.randperm(len(groups), device=device)]
    rows, tiles = order_by_expert(groups[:, None], num_experts=len(sizes), tile_rows=tile_rows)
    x = torch.randn(len(groups) // (1 if outward else share), num_in, device=device).to(dtype)
    w = torch.randn(len(sizes), num_out * (1 + gated), num_in, device=device).mul(num_in**-0.5).to(dtype)
    bias = torch.randn(w.shape[:2], device=device).to(dtype) if biased else None
    weights = torch.rand(len(groups), device=device) if outward else None
    return call(x, w, rows, tiles, bias, tile_rows=tile_rows, gated=gated, weights=weights, outward=outward)


def _make(key: Key, device: str) -> Call:
    """As many rows as make tiles full, or, where tiles are smallest, one for an eighth of the groups."""
    some = max(key.num_groups // 8, 1)
    full = (key.tile_rows,) * key.num_groups
    sizes = (1,) * some + (0,) * (key.num_groups - some) if key.tile_rows == min(TILE_ROWS) else full
    return make(
        sizes, key.num_out, key.num_in, OF_BYTES[key.item_bytes], tile_rows=key.tile_rows, gated=key.gated,
        device=device,
    )  # fmt: skip


tuning = Tunable("grouped_linear", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(sizes=((3, 0, 18, 1),), num_out=(96,), num_in=(40,), dtype=FLOATS, share=(2,), gated=(False, True)),
        *grid(
            sizes=((0, 200, 0, 0, 5),), num_out=(30,), num_in=(130,), dtype=FLOATS, tile_rows=(32, 64, 128),
            outward=(False, True), biased=(True,),
        ),
        *grid(
            sizes=((1, 0, 0, 1, 0, 70, 0, 0, 0),), num_out=(64,), num_in=(64,), dtype=FLOATS, tile_rows=(16, 64),
            share=(8,), gated=(True,), biased=(True,),
        ),
    ],
    bench_cases=[
        *grid(
            sizes=((1,) * 8 + (0,) * 120,), num_out=(768,), num_in=(2048,), dtype=(torch.bfloat16,), gated=(True,),
            share=(8,),
        ),
        *grid(
            sizes=((512,) * 128,), num_out=(768,), num_in=(2048,), dtype=(torch.bfloat16,), gated=(True,),
            share=(8,), tile_rows=(128,),
        ),
        *grid(
            sizes=((512,) * 128,), num_out=(2048,), num_in=(768,), dtype=(torch.bfloat16,), outward=(True,),
            tile_rows=(128,),
        ),
    ],
    num_bytes=lambda c: nbytes(c.args[0]) + nbytes(c.args[1][0]) * len(c.args[3][c.args[3][:, 0] >= 0, 0].unique()),
    num_flops=lambda c: 2 * len(c.args[2]) * c.args[1][0].numel(),
)  # fmt: skip
def grouped_linear(
    x: Tensor, w: Tensor, rows: Tensor, tiles: Tensor, bias: Tensor | None = None, *, tile_rows: int,
    gated: bool = False, weights: Tensor | None = None, outward: bool = False,
) -> Tensor:  # fmt: skip
    """x [num_rows or num_tokens, in] -> y [num_rows, out]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[2], "x and w are not [rows, in], [groups, out, in]")
    check(w.shape[1] % (1 + gated) == 0, "an odd number of columns is no gate")
    check(rows.dim() == 1 and len(x) > 0 and len(rows) % len(x) == 0, "rows are not as many for each of x")
    check(not outward or len(rows) == len(x), "there is not a row of x for each")
    check(tiles.dim() == 2 and tiles.shape[1] == 3, "tiles are not [tiles, 3]")
    check(rows.dtype == tiles.dtype == torch.int32 and are_contiguous(w, rows, tiles), "rows or tiles, or w is strided")
    check(x.dtype == w.dtype and x.dtype in FLOATS and tile_rows in TILE_ROWS, "dtypes, or the size of tiles")
    if bias is not None:
        check(bias.shape == w.shape[:2] and bias.dtype == x.dtype and bias.is_contiguous(), "bias does not fit")
    if weights is not None:
        fits = weights.shape == rows.shape and weights.dtype == torch.float32
        check(fits and weights.is_contiguous(), "weights are not [rows] f32")
    options = {"tile_rows": tile_rows, "gated": gated, "weights": weights, "outward": outward}
    return (ref if x.is_cpu else launch)(x, w, rows, tiles, bias, **options)
