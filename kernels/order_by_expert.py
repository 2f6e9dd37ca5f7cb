"""Rows by the expert they are for, and tiles of these.

A token has top_k rows, one after another: row t * top_k + k is for experts[t, k]. Here they are put in order by expert,
those of one as they come, and cut into tiles of at most `tile_rows` rows of one expert.

experts  [num_tokens, top_k]  i32, contiguous, below num_experts
rows     [num_tokens * top_k] i32   row numbers in order
tiles    [num_tiles, 3]       i32   expert, first place in `rows`, place after its last; expert -1 = no tile

num_tiles is what there can be at most. Nothing here waits to know how many there are.
Bound: bytes, of counts where there are many tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes


def most_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """That so many rows can make, however they are spread."""
    return min(num_rows // tile_rows + min(num_experts, num_rows), num_rows)


def ref(experts: Tensor, *, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    flat = experts.flatten().tolist()
    rows = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    tiles, first = [], 0
    for expert in range(num_experts):
        end = first + flat.count(expert)
        tiles += [(expert, at, min(at + tile_rows, end)) for at in range(first, end, tile_rows)]
        first = end
    tiles += [(-1, 0, 0)] * (most_tiles(len(flat), num_experts, tile_rows) - len(tiles))
    on = {"dtype": torch.int32, "device": experts.device}
    return torch.tensor(rows, **on), torch.tensor(tiles, **on).view(-1, 3)


@jit
def _count(experts_ptr, first, end, EXPERTS: tl.constexpr):
    """[EXPERTS]: how many of these rows each expert has"""
    counts = tl.zeros((EXPERTS,), tl.int32)
    for at in range(first, end, 1024):
        row = at + tl.arange(0, 1024)
        inside = row < end
        counts += tl.histogram(tl.load(experts_ptr + row, mask=inside, other=0), EXPERTS, mask=inside)
    return counts


@jit(do_not_specialize=("num_rows",))
def _count_by_expert(
    experts_ptr, counts_ptr, num_rows, NUM_EXPERTS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """How many of a program's rows each expert has."""
    expert = tl.arange(0, EXPERTS)
    first = tl.program_id(0) * ROWS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts = _count(experts_ptr, first, tl.minimum(first + ROWS, num_rows), EXPERTS)
    tl.store(counts_ptr + tl.program_id(0) * NUM_EXPERTS + expert, counts, mask=expert < NUM_EXPERTS)


@jit
def _write_tiles(tiles_ptr, num_tiles, start, total, TILE_ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """This program's part of the tiles of experts that begin at `start` and have `total` rows."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    expert = tl.arange(0, start.shape[0])
    num = (total + TILE_ROWS - 1) // TILE_ROWS
    last = tl.cumsum(num, 0)
    for i in range(program, tl.max(num, 0), num_programs):
        place, first = tiles_ptr + (last - num + i) * 3, start + i * TILE_ROWS
        tl.store(place, expert, mask=i < num)
        tl.store(place + 1, first, mask=i < num)
        tl.store(place + 2, tl.minimum(first + TILE_ROWS, start + total), mask=i < num)
    for at in range(tl.sum(num, 0) + program * AT_ONCE, num_tiles, num_programs * AT_ONCE):
        tile = at + tl.arange(0, AT_ONCE)
        for field in tl.static_range(3):
            tl.store(tiles_ptr + tile * 3 + field, -1 if field == 0 else 0, mask=tile < num_tiles)


@jit(do_not_specialize=("num_rows", "num_tiles"))
def _order_by_expert(
    experts_ptr, counts_ptr, places_ptr, rows_ptr, tiles_ptr, num_rows, num_tiles,
    NUM_EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr,
    EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Puts a program's rows in their places, and makes its part of the tiles. COUNTED: each program's rows were."""
    expert = tl.arange(0, EXPERTS)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    first = program * ROWS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if COUNTED:
        total, before = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
        for at in range(0, num_programs, AT_ONCE):
            other = at + tl.arange(0, AT_ONCE)
            inside = (other < num_programs)[:, None] & (expert < NUM_EXPERTS)[None, :]
            counts = tl.load(counts_ptr + other[:, None] * NUM_EXPERTS + expert[None, :], mask=inside, other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((other < program)[:, None], counts, 0), 0)
    else:
        before = _count(experts_ptr, 0, first, EXPERTS)
        total = before + _count(experts_ptr, first, num_rows, EXPERTS)
    start = tl.cumsum(total, 0) - total
    places_ptr += program * EXPERTS
    tl.store(places_ptr + expert, start + before)
    tl.debug_barrier()  # what one thread stored others load
    row = first + tl.arange(0, ROWS)
    mine = tl.load(experts_ptr + row, mask=row < num_rows, other=0)
    place = tl.load(places_ptr + mine)
    num_earlier = tl.zeros((ROWS, AT_ONCE), tl.int32)
    # PERF: unrolled, so that no load waits for the one before; 8,192 tokens, 8 of 128 experts: 25.5 us, not 37.6.
    for at in tl.static_range(0, ROWS, AT_ONCE):
        other = first + at + tl.arange(0, AT_ONCE)
        theirs = tl.load(experts_ptr + other, mask=other < num_rows, other=-1)
        is_earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < row[:, None])
        num_earlier += is_earlier.to(tl.int32)
    tl.store(rows_ptr + place + tl.sum(num_earlier, 1), row, mask=row < num_rows)
    _write_tiles(tiles_ptr, num_tiles, start, total, TILE_ROWS, AT_ONCE)


_FEW_ROWS = 4096  # that each program counts by itself


def launch(experts: Tensor, *, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    num_rows, width = experts.numel(), max(triton.next_power_of_2(num_experts), 32)
    is_counted = num_rows > _FEW_ROWS
    block = 512 if is_counted else 128
    num_programs = triton.cdiv(num_rows, block)
    num_tiles = most_tiles(num_rows, num_experts, tile_rows)
    on = {"dtype": torch.int32, "device": experts.device}
    rows, tiles = torch.empty(num_rows, **on), torch.empty(num_tiles, 3, **on)
    sizes = {"NUM_EXPERTS": num_experts, "ROWS": block, "EXPERTS": width, "num_warps": 8, **overlapping()}
    counts, places = None, torch.empty(num_programs, width, **on)
    if is_counted:
        counts = torch.empty(num_programs, num_experts, **on)
        _count_by_expert[(num_programs,)](experts, counts, num_rows, **sizes)
    _order_by_expert[(num_programs,)](
        experts, counts, places, rows, tiles, num_rows, num_tiles,
        TILE_ROWS=tile_rows, COUNTED=is_counted, AT_ONCE=min(32, 16384 // width), **sizes,
    )  # fmt: skip
    return rows, tiles


def make(num_tokens: int, num_experts: int, top_k: int, tile_rows: int, likely: int = 0, device="cpu"):
    """`likely`: so many experts alone are chosen; 0 = any."""
    experts = torch.randint(likely or num_experts, (num_tokens, top_k), device=device, dtype=torch.int32)
    return call(experts, num_experts=num_experts, tile_rows=tile_rows)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7, 32), num_experts=(8, 60), top_k=(2, 4), tile_rows=(16,)),
        *grid(num_tokens=(100, 133), num_experts=(5, 40), top_k=(3,), tile_rows=(16, 64), likely=(0, 4)),
        *grid(num_tokens=(40,), num_experts=(300,), top_k=(5,), tile_rows=(16,)),
        *grid(num_tokens=(2100,), num_experts=(6, 100), top_k=(2,), tile_rows=(128,)),
    ],
    bench_cases=[
        *grid(num_tokens=(16, 256), num_experts=(128,), top_k=(8,), tile_rows=(16,)),
        *grid(num_tokens=(8192,), num_experts=(128, 512), top_k=(8,), tile_rows=(128,)),
    ],
    num_bytes=lambda c: 2 * nbytes(c.args[0]),
)
def order_by_expert(experts: Tensor, *, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """experts [num_tokens, top_k] -> rows, tiles; ValueError when experts are not i32, or tile_rows no size."""
    check(experts.dim() == 2 and experts.dtype == torch.int32 and are_contiguous(experts), "experts: [tokens, k] i32")
    check(num_experts > 0 and tile_rows > 0, "no experts, or empty tiles")
    return (ref if experts.is_cpu else launch)(experts, num_experts=num_experts, tile_rows=tile_rows)
