"""How decode attention of one step is shared out over a GPU: stretches of keys of about equal length.

Sequences are cut so that about `num_shares` stretches of equal length would be all the work there is, but none into
stretches below `least_tiles` tiles, as putting results together costs too. So one long sequence keeps a whole GPU busy,
alone or beside hundreds of short ones, many sequences of equal length are not cut at all, and the size of the result
does not depend on lengths: a captured graph may replay it. A sequence of length 0 is one stretch of no keys.

With n_i the tiles that sequence i sees and m = max(ceil(sum n / num_shares), least_tiles), sequence i is cut into
s_i = max(ceil(n_i / m), 1) stretches of ceil(n_i / s_i) tiles; the last may be shorter, and ends with the sequence.

seq_lens     [num_seqs] i32
num_shares, tile, least_tiles, num_kv_heads   counts; a tile is so many keys
window       keys that are seen, the last ones; 0 = all
returns      work [num_seqs + num_shares - 1, 5] i32: sequence (-1: nothing to do), first key, end key, item of the
             sequence's first stretch, number of its stretches; those of a sequence follow each other
             arrivals [num_seqs, num_kv_heads] i32, zero

Bound: latency; one program, once a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import Call, call, check, grid, kernel, nbytes


def ref(
    seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int, window: int = 0
) -> tuple[Tensor, Tensor]:
    lengths = seq_lens.tolist()
    tiles = [-(-min(length, window or length) // tile) for length in lengths]
    most_tiles = max(-(-sum(tiles) // num_shares), least_tiles)
    items: list[tuple[int, ...]] = []
    for sequence, (length, num_tiles) in enumerate(zip(lengths, tiles, strict=True)):
        num_stretches = max(-(-num_tiles // most_tiles), 1)
        keys = -(-num_tiles // num_stretches) * tile
        start, first_item = length - min(length, window or length), len(items)
        for first in range(start, start + num_stretches * keys, keys) if keys else (start,):
            items.append((sequence, first, min(first + keys, length), first_item, num_stretches))
    items += [(-1, 0, 0, 0, 0)] * (len(lengths) + num_shares - 1 - len(items))
    arrivals = torch.zeros(len(lengths), num_kv_heads, dtype=torch.int32, device=seq_lens.device)
    return torch.tensor(items, dtype=torch.int32, device=seq_lens.device), arrivals


_VARYING = ("seq_lens_ptr", "num_seqs", "num_items", "num_arrivals", "num_shares", "least_tiles", "window")


@jit(do_not_specialize=_VARYING)  # one compilation for batches of every size
def _decode_work(
    seq_lens_ptr, work_ptr, arrivals_ptr, num_seqs, num_items, num_arrivals, num_shares, least_tiles, window,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)  # a sequence, first
    inside = lane < num_seqs
    length = tl.load(seq_lens_ptr + lane, mask=inside, other=0)
    start = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    num_tiles = tl.cdiv(length - start, TILE)
    most_tiles = tl.maximum(tl.cdiv(tl.sum(num_tiles, 0), num_shares), least_tiles)
    num_stretches = tl.where(inside, tl.maximum(tl.cdiv(num_tiles, most_tiles), 1), 0)
    keys = tl.cdiv(num_tiles, tl.maximum(num_stretches, 1)) * TILE
    first_item = tl.cumsum(num_stretches, 0) - num_stretches
    for stretch in range(tl.max(num_stretches, 0)):
        here = inside & (stretch < num_stretches)
        first = start + stretch * keys
        item_ptr = work_ptr + (first_item + stretch) * 5
        tl.store(item_ptr, lane, mask=here)
        tl.store(item_ptr + 1, first, mask=here)
        tl.store(item_ptr + 2, tl.minimum(first + keys, length), mask=here)
        tl.store(item_ptr + 3, first_item, mask=here)
        tl.store(item_ptr + 4, num_stretches, mask=here)
    for first in range(tl.sum(num_stretches, 0), num_items, BLOCK):
        item = first + lane
        for column in tl.static_range(5):
            tl.store(work_ptr + item * 5 + column, -1 if column == 0 else 0, mask=item < num_items)
    for first in range(0, num_arrivals, BLOCK):
        tl.store(arrivals_ptr + first + lane, 0, mask=first + lane < num_arrivals)


def launch(
    seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int, window: int = 0
) -> tuple[Tensor, Tensor]:
    num_seqs = len(seq_lens)
    num_items = num_seqs + num_shares - 1
    work = torch.empty(num_items, 5, dtype=torch.int32, device=seq_lens.device)
    arrivals = torch.empty(num_seqs, num_kv_heads, dtype=torch.int32, device=seq_lens.device)
    _decode_work[(1,)](
        seq_lens, work, arrivals, num_seqs, num_items, arrivals.numel(), num_shares, least_tiles, window,
        TILE=tile, BLOCK=max(triton.next_power_of_2(num_seqs), 512), num_warps=4,
    )  # fmt: skip
    return work, arrivals


def make(seq_lens, num_shares, tile, least_tiles, num_kv_heads=2, window=0, device="cpu") -> Call:
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles}
    return call(lengths, **options, num_kv_heads=num_kv_heads, window=window)


LENGTHS = ((0,), (1,), (100_000,), (0, 64, 65, 0, 1024, 1, 128), (16,) * 33, (7, 5000, 0, 9), (300, 301, 4096, 63, 129))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(seq_lens=LENGTHS, num_shares=(1, 16), tile=(16, 64), least_tiles=(1, 4), window=(0, 100)),
    bench_cases=grid(seq_lens=((128,), (1024,) * 256), num_shares=(33,), tile=(64,), least_tiles=(4,)),
    num_bytes=lambda c: nbytes(*c.args),
)
def decode_work(
    seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Share out sequences of those lengths; ValueError when shapes or counts do not fit."""
    check(seq_lens.dim() == 1 and seq_lens.dtype == torch.int32, "seq_lens is not [num_seqs] i32")
    check(seq_lens.is_contiguous() and len(seq_lens) > 0, "seq_lens is strided or empty")
    check(min(num_shares, tile, least_tiles, num_kv_heads) > 0 and window >= 0, "a count is not positive")
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles, "num_kv_heads": num_kv_heads}
    return (ref if seq_lens.is_cpu else launch)(seq_lens, **options, window=window)
