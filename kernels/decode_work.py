"""How decode attention of one step is shared out over a GPU: stretches of keys of about equal length.

Sequences are cut so that about `num_shares` stretches of equal length would be all the work there is, but none into
stretches below `least_tiles` tiles, as putting results together costs too. So one long sequence keeps a whole GPU busy,
alone or beside hundreds of short ones, many sequences of equal length are not cut at all, and the size of the result
does not depend on lengths: a captured graph may replay it. A sequence of length 0 is one stretch of no keys. Only a
sequence whose one token is the step's token of the same number takes part, as those that come first and bring one each:
prefill_work.py has the others.

With n_i the tiles that sequence i sees and m = max(ceil(sum n / num_shares), least_tiles), sequence i is cut into
s_i = max(ceil(n_i / m), 1) stretches of ceil(n_i / s_i) tiles; the last may be shorter, and ends with the sequence.

query_start  [num_seqs + 1] i32   tokens query_start[i]:query_start[i + 1] belong to sequence i
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
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int,
    window: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    singles = [i for i in range(len(lengths)) if starts[i : i + 2] == [i, i + 1]]
    tiles = [-(-min(lengths[i], window or lengths[i]) // tile) for i in singles]
    most_tiles = max(-(-sum(tiles) // num_shares), least_tiles)
    items: list[tuple[int, ...]] = []
    for sequence, num_tiles in zip(singles, tiles, strict=True):
        length = lengths[sequence]
        num_stretches = max(-(-num_tiles // most_tiles), 1)
        keys = -(-num_tiles // num_stretches) * tile
        start, first_item = length - min(length, window or length), len(items)
        for first in range(start, start + num_stretches * keys, keys) if keys else (start,):
            items.append((sequence, first, min(first + keys, length), first_item, num_stretches))
    items += [(-1, 0, 0, 0, 0)] * (len(lengths) + num_shares - 1 - len(items))
    arrivals = torch.zeros(len(lengths), num_kv_heads, dtype=torch.int32, device=seq_lens.device)
    return torch.tensor(items, dtype=torch.int32, device=seq_lens.device), arrivals


_VARYING = (
    "query_start_ptr", "seq_lens_ptr", "num_seqs", "num_items", "num_arrivals", "num_shares", "least_tiles", "window"
)  # fmt: skip


@jit
def singles(query_start_ptr, seq_lens_ptr, sequence, num_seqs):
    """Which of the sequences take part, and their lengths (0 of others)."""
    inside = sequence < num_seqs
    inside = inside & (tl.load(query_start_ptr + sequence, mask=inside, other=-1) == sequence)
    inside = inside & (tl.load(query_start_ptr + sequence + 1, mask=inside, other=-1) == sequence + 1)
    return inside, tl.load(seq_lens_ptr + sequence, mask=inside, other=0)


@jit(do_not_specialize=_VARYING)  # one compilation for batches of every size
def _decode_work(
    query_start_ptr, seq_lens_ptr, work_ptr, arrivals_ptr, num_seqs, num_items, num_arrivals, num_shares, least_tiles,
    window, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)  # a sequence, first
    inside, length = singles(query_start_ptr, seq_lens_ptr, lane, num_seqs)
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
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int,
    window: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_seqs = len(seq_lens)
    num_items = num_seqs + num_shares - 1
    work = torch.empty(num_items, 5, dtype=torch.int32, device=seq_lens.device)
    arrivals = torch.empty(num_seqs, num_kv_heads, dtype=torch.int32, device=seq_lens.device)
    _decode_work[(1,)](
        query_start, seq_lens, work, arrivals, num_seqs, num_items, arrivals.numel(), num_shares, least_tiles, window,
        TILE=tile, BLOCK=max(triton.next_power_of_2(num_seqs), 512), num_warps=4,
    )  # fmt: skip
    return work, arrivals


def make(seq_lens, num_shares, tile, least_tiles, num_kv_heads=2, window=0, later_queries=(), device="cpu") -> Call:
    query_lens = [1] * (len(seq_lens) - len(later_queries)) + list(later_queries)
    query_start = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles}
    return call(query_start, lengths, **options, num_kv_heads=num_kv_heads, window=window)


LENGTHS = (
    (0,),
    (1,),
    (100_000,),
    (0, 64, 65, 0, 1024, 1, 128),
    (16,) * 33,
    (7, 5000, 0, 9, 6),
    (300, 301, 4096, 63, 129),
)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(seq_lens=LENGTHS, num_shares=(1, 16), tile=(16, 64), least_tiles=(1, 4), window=(0, 100)),
        *grid(
            seq_lens=LENGTHS[3:],
            num_shares=(16,),
            tile=(16,),
            least_tiles=(1,),
            later_queries=((2, 1), (0, 3, 0), (2, 0, 1)),
        ),
    ],
    bench_cases=grid(seq_lens=((128,), (1024,) * 256), num_shares=(33,), tile=(64,), least_tiles=(4,)),
    num_bytes=lambda c: nbytes(*c.args),
)
def decode_work(
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, num_kv_heads: int,
    window: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Share out sequences of those lengths; ValueError when shapes or counts do not fit."""
    check(query_start.dtype == torch.int32 and query_start.is_contiguous(), "query_start is strided, or not i32")
    check(query_start.shape == (seq_lens.shape[0] + 1,), "query_start is not [num_seqs + 1]")
    check(seq_lens.dim() == 1 and seq_lens.dtype == torch.int32, "seq_lens is not [num_seqs] i32")
    check(seq_lens.is_contiguous() and len(seq_lens) > 0, "seq_lens is strided or empty")
    check(min(num_shares, tile, least_tiles, num_kv_heads) > 0 and window >= 0, "a count is not positive")
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles, "num_kv_heads": num_kv_heads}
    return (ref if seq_lens.is_cpu else launch)(query_start, seq_lens, **options, window=window)
