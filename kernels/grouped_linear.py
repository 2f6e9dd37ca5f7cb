"""Products of groups of rows with a matrix each: the experts of a mixture.   y = x Wᵀ, W that of the row's group

x        [num_rows, in]             bf16|f16|f32  rows of group g are offsets[g] … offsets[g + 1] - 1
w        [num_groups, out, in]      dtype of x, contiguous
offsets  [num_groups + 1]           i32, ascending, from 0 to num_rows
y        [num_rows, out]            dtype of x, contiguous

Nothing here waits to know how large groups are: the grid has a program for every tile that there can be, and those that
find no group do nothing.
Bound: bytes for few rows (the matrices of groups that have any), FLOPs for many.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, Call, are_contiguous, call, check, grid, kernel, nbytes
from cableway.kernels.tuning import OF_BYTES, Tunable


def ref(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.tolist()
    rows = [x[start:end].float() @ w[g].float().T for g, (start, end) in enumerate(pairwise(ends))]
    return torch.cat(rows).to(x.dtype)


@jit
def _grouped_linear(
    x_ptr, w_ptr, offsets_ptr, y_ptr, num_groups, num_out, num_in, x_stride,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows of one group, and OUT columns."""
    tile = tl.program_id(1)
    index = tl.arange(0, GROUPS)
    start = tl.load(offsets_ptr + index, mask=index < num_groups, other=0)
    end = tl.load(offsets_ptr + index + 1, mask=index < num_groups, other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    if group < num_groups:
        mine = index == group
        first = tl.sum(tl.where(mine, start + (tile - last + tiles) * ROWS, 0), 0)
        until = tl.sum(tl.where(mine, end, 0), 0)
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(0) * OUT + tl.arange(0, OUT)
        part = tl.arange(0, IN)
        x_row = x_ptr + row.to(tl.int64)[:, None] * x_stride + part[None, :]
        w_row = w_ptr + (group.to(tl.int64) * num_out + column)[:, None] * num_in + part[None, :]
        sums = tl.zeros((ROWS, OUT), tl.float32)
        for done in range(0, num_in, IN):
            inside = (part < num_in - done)[None, :]
            x = tl.load(x_row + done, mask=inside & (row < until)[:, None], other=0.0)
            w = tl.load(w_row + done, mask=inside & (column < num_out)[:, None], other=0.0)
            sums += tl.dot(x, tl.trans(w), input_precision="ieee")
        place = row.to(tl.int64)[:, None] * num_out + column[None, :]
        inside = (row < until)[:, None] & (column < num_out)[None, :]
        tl.store(y_ptr + place, sums.to(y_ptr.dtype.element_ty), mask=inside)


class Tuning(NamedTuple):
    """Shape of a program's tile."""

    out: int = 64
    block_in: int = 64
    num_warps: int = 4
    num_stages: int = 3


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_groups: int
    num_out: int
    num_in: int
    item_bytes: int
    rows: int  # of a tile: about as many as a group has


_FEWEST_ROWS, _MOST_ROWS = 16, 64


def _rule(key: Key) -> Tuning:
    return Tuning(block_in=32 if key.item_bytes == 4 else 64)


def _candidates(key: Key) -> Iterator[Tuning]:
    for out, block_in, num_warps, num_stages in product((64, 128), (64, 128), (4, 8), (3, 4)):
        if block_in * key.item_bytes <= 256 and out * block_in >= 1024 * num_warps:
            yield Tuning(out, block_in, num_warps, num_stages)


def launch(x: Tensor, w: Tensor, offsets: Tensor, *, tuned: Tuning | None = None) -> Tensor:
    check(x.stride(1) == 1 and are_contiguous(w, offsets), "x is strided within its rows, or w or offsets are")
    (num_rows, num_in), (num_groups, num_out, _) = x.shape, w.shape
    y = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    rows = min(max(triton.next_power_of_2(num_rows // num_groups), _FEWEST_ROWS), _MOST_ROWS)
    t = tuned or tuning(Key(num_groups, num_out, num_in, x.element_size(), rows))
    num_tiles = min(triton.cdiv(num_rows, rows) + num_groups, num_rows)
    _grouped_linear[(triton.cdiv(num_out, t.out), num_tiles)](
        x, w, offsets, y, num_groups, num_out, num_in, x.stride(0),
        GROUPS=triton.next_power_of_2(num_groups), ROWS=rows, OUT=t.out, IN=t.block_in,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return y


def make(sizes: tuple[int, ...], num_out: int, num_in: int, dtype: torch.dtype, device: str = "cpu"):
    """`sizes`: rows of each group."""
    x = torch.randn(sum(sizes), num_in, device=device).to(dtype)
    w = torch.randn(len(sizes), num_out, num_in, device=device).mul(num_in**-0.5).to(dtype)
    return call(x, w, torch.tensor((0, *sizes), device=device).cumsum(0).int())


def _make(key: Key, device: str) -> Call:
    """As many rows as make tiles full, or, where tiles are smallest, one for an eighth of the groups."""
    some = max(key.num_groups // 8, 1)
    sizes = (1,) * some + (0,) * (key.num_groups - some) if key.rows == _FEWEST_ROWS else (key.rows,) * key.num_groups
    return make(sizes, key.num_out, key.num_in, OF_BYTES[key.item_bytes], device=device)


tuning = Tunable("grouped_linear", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(sizes=((3, 0, 17, 1),), num_out=(96,), num_in=(40,), dtype=FLOATS),
        *grid(sizes=((0, 200, 0, 0, 5),), num_out=(30,), num_in=(130,), dtype=FLOATS),
        *grid(sizes=((1, 0, 0, 1, 0, 0, 0, 0, 0),), num_out=(64,), num_in=(64,), dtype=FLOATS),
    ],
    bench_cases=grid(
        sizes=((1,) * 8 + (0,) * 120, (128,) * 128), num_out=(1536,), num_in=(2048,), dtype=(torch.bfloat16,)
    ),
    num_bytes=lambda c: nbytes(c.args[0]) + nbytes(c.args[1][0]) * int((c.args[2].diff() > 0).sum()),
    num_flops=lambda c: 2 * c.args[0].numel() * c.args[1].shape[1],
)
def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x [num_rows, in] -> [num_rows, out]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[2], "x and w are not [rows, in], [groups, out, in]")
    check(offsets.shape == (w.shape[0] + 1,) and offsets.dtype == torch.int32, "offsets are not [groups + 1] i32")
    check(x.dtype == w.dtype and x.dtype in FLOATS, "dtypes of x and w do not fit")
    if not x.is_cpu:
        return launch(x, w, offsets)
    ends = offsets.tolist()
    check(ends[-1] == len(x), "offsets do not end with the rows of x")
    return torch.cat([F.linear(x[start:end], w[g]) for g, (start, end) in enumerate(pairwise(ends))])
