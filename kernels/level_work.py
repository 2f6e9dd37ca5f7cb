"""How latent decode of one step is shared out over a GPU's programs: shares of the same number of tiles.

The tiles of all sequences stand in one row, which is cut at equal distances: a program takes stretch after stretch, of
one sequence after another, and only sequences across whose tiles a cut goes have several stretches, whose results are
put together. So programs end together whatever the lengths are. A sequence of length 0 has a tile of no keys. Only a
sequence whose one token is the step's token of the same number takes part, as those that come first and bring one each.
How large the result is does not depend on lengths: a captured graph may replay it.

query_start  [num_seqs + 1] i32   tokens query_start[i]:query_start[i + 1] belong to sequence i
seq_lens     [num_seqs] i32
num_shares, tile, least_tiles   counts; a tile is so many keys, a share at least so many tiles
window       keys that are seen, the last ones, and those before them in the first one's tile; 0 = all
returns      items [num_seqs + num_shares - 1, 5] i32: sequence (-1: nothing to do), first key, end key, item of the
             sequence's first stretch, number of its stretches; those of a share, and those of a sequence, follow each
             other
             shares [num_shares, 2] i32: first item, end item
             cuts [min(num_seqs, num_shares), 2] i32: first item of a sequence of several stretches (-1: no more
             of them), number of its stretches

Bound: latency; one program, once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.decode_work import LENGTHS, singles
from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import Call, call, check, grid, kernel, nbytes


class LevelWork(NamedTuple):
    items: Tensor
    shares: Tensor
    cuts: Tensor


def _empty(num_seqs: int, num_shares: int, device: torch.device) -> LevelWork:
    sizes = (num_seqs + num_shares - 1, 5), (num_shares, 2), (min(num_seqs, num_shares), 2)
    return LevelWork(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


def ref(
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, window: int = 0
) -> LevelWork:
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    singles = [i for i in range(len(lengths)) if starts[i : i + 2] == [i, i + 1]]
    unseen = [max(length - (window or length), 0) // tile for length in lengths]
    row = [(i, n) for i in singles for n in range(unseen[i], max(-(-lengths[i] // tile), 1))]
    most_tiles = max(-(-len(row) // num_shares), least_tiles)
    items: dict[int, list[int]] = {}  # by their places
    shares, of_sequence = [], {i: [] for i in singles}
    for share in range(num_shares):
        tiles = row[share * most_tiles : (share + 1) * most_tiles]
        places = []
        for i in dict.fromkeys(i for i, _ in tiles):
            numbers = [n for j, n in tiles if j == i]
            places.append(share + singles.index(i))
            of_sequence[i].append(places[-1])
            items[places[-1]] = [i, numbers[0] * tile, min((numbers[-1] + 1) * tile, lengths[i])]
        shares.append((places[0], places[-1] + 1) if places else (0, 0))
    work = _empty(len(lengths), num_shares, seq_lens.device)
    work.items[:] = torch.tensor((-1, 0, 0, 0, 0))
    for place, item in items.items():
        places = of_sequence[item[0]]
        work.items[place] = torch.tensor([*item, places[0], len(places)])
    cuts = [(places[0], len(places)) for places in of_sequence.values() if len(places) > 1]
    work.shares[:] = torch.tensor(shares)
    work.cuts[:] = torch.tensor(cuts + [(-1, 0)] * (len(work.cuts) - len(cuts)))
    return work


_VARYING = ("query_start_ptr", "seq_lens_ptr", "num_seqs", "num_shares", "num_cuts", "least_tiles", "window")


@jit(do_not_specialize=_VARYING)  # one compilation for batches of every size
def _level_work(
    query_start_ptr, seq_lens_ptr, items_ptr, shares_ptr, cuts_ptr, num_seqs, num_shares, num_cuts, least_tiles, window,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)  # a sequence, first
    inside, length = singles(query_start_ptr, seq_lens_ptr, lane, num_seqs)
    unseen = tl.where(window > 0, tl.maximum(length - window, 0) // TILE, 0)
    num_tiles = tl.where(inside, tl.maximum(tl.cdiv(length, TILE) - unseen, 1), 0)
    row_tiles = tl.sum(num_tiles, 0)
    most_tiles = tl.maximum(tl.cdiv(row_tiles, num_shares), least_tiles)
    first_tile = tl.cumsum(num_tiles, 0) - num_tiles
    nth = tl.cumsum(inside.to(tl.int32), 0) - 1  # of those that take part
    first_share, last_share = first_tile // most_tiles, (first_tile + num_tiles - 1) // most_tiles
    num_stretches = tl.where(inside, last_share - first_share + 1, 0)
    for stretch in range(tl.max(num_stretches, 0)):
        here = inside & (stretch < num_stretches)
        share = first_share + stretch
        place = share + nth
        begin, end = share * most_tiles - first_tile, (share + 1) * most_tiles - first_tile
        item_ptr = items_ptr + place * 5
        tl.store(item_ptr, lane, mask=here)
        tl.store(item_ptr + 1, (unseen + tl.maximum(begin, 0)) * TILE, mask=here)
        tl.store(item_ptr + 2, tl.minimum((unseen + end) * TILE, length), mask=here)
        tl.store(item_ptr + 3, first_share + nth, mask=here)
        tl.store(item_ptr + 4, num_stretches, mask=here)
        tl.store(shares_ptr + share * 2, place, mask=here & (begin >= 0))
        tl.store(shares_ptr + share * 2 + 1, place + 1, mask=here & ((end <= num_tiles) | (nth == tl.max(nth, 0))))
    # A cut between two sequences leaves a place before the later one empty, and so are those after the last.
    for column in tl.static_range(5):
        place = first_share + nth - 1
        is_empty = inside & (nth > 0) & (first_tile % most_tiles == 0)
        tl.store(items_ptr + place * 5 + column, -1 if column == 0 else 0, mask=is_empty)
    for first in range(tl.max(tl.where(inside, last_share + nth + 1, 0), 0), num_seqs + num_shares - 1, BLOCK):
        place = first + lane
        for column in tl.static_range(5):
            empty = place < num_seqs + num_shares - 1
            tl.store(items_ptr + place * 5 + column, -1 if column == 0 else 0, mask=empty)
    is_cut = num_stretches > 1
    nth_cut = tl.cumsum(is_cut.to(tl.int32), 0) - 1
    tl.store(cuts_ptr + nth_cut * 2, first_share + nth, mask=is_cut)
    tl.store(cuts_ptr + nth_cut * 2 + 1, num_stretches, mask=is_cut)
    for first in range(tl.cdiv(row_tiles, most_tiles), num_shares, BLOCK):
        share = first + lane
        tl.store(shares_ptr + share * 2, 0, mask=share < num_shares)
        tl.store(shares_ptr + share * 2 + 1, 0, mask=share < num_shares)
    for first in range(tl.sum(is_cut.to(tl.int32), 0), num_cuts, BLOCK):
        cut = first + lane
        tl.store(cuts_ptr + cut * 2, -1, mask=cut < num_cuts)
        tl.store(cuts_ptr + cut * 2 + 1, 0, mask=cut < num_cuts)


def launch(
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, window: int = 0
) -> LevelWork:
    num_seqs = len(seq_lens)
    work = _empty(num_seqs, num_shares, seq_lens.device)
    _level_work[(1,)](
        query_start, seq_lens, *work, num_seqs, num_shares, len(work.cuts), least_tiles, window,
        TILE=tile, BLOCK=max(triton.next_power_of_2(num_seqs), 512), num_warps=4,
    )  # fmt: skip
    return work


def make(seq_lens, num_shares, tile, least_tiles, window=0, later_queries=(), device="cpu") -> Call:
    query_lens = [1] * (len(seq_lens) - len(later_queries)) + list(later_queries)
    query_start = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles, "window": window}
    return call(query_start, lengths, **options)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(seq_lens=LENGTHS, num_shares=(1, 16), tile=(16, 64), least_tiles=(1, 4), window=(0, 100)),
        *grid(seq_lens=LENGTHS[3:], num_shares=(16,), tile=(16,), least_tiles=(1,), later_queries=((2, 1), (2, 0, 1))),
        *grid(seq_lens=LENGTHS[:1], num_shares=(3,), tile=(16,), least_tiles=(1,), later_queries=((2,),)),
    ],
    bench_cases=grid(seq_lens=((128,), (1024,) * 256), num_shares=(132,), tile=(64,), least_tiles=(2,)),
    num_bytes=lambda c: nbytes(*c.args),
)
def level_work(
    query_start: Tensor, seq_lens: Tensor, *, num_shares: int, tile: int, least_tiles: int, window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Share out sequences of those lengths; ValueError when shapes or counts do not fit."""
    check(query_start.dtype == torch.int32 and query_start.is_contiguous(), "query_start is strided, or not i32")
    check(query_start.shape == (seq_lens.shape[0] + 1,), "query_start is not [num_seqs + 1]")
    check(seq_lens.dim() == 1 and seq_lens.dtype == torch.int32, "seq_lens is not [num_seqs] i32")
    check(seq_lens.is_contiguous() and len(seq_lens) > 0, "seq_lens is strided or empty")
    check(min(num_shares, tile, least_tiles) > 0 and window >= 0, "a count is not positive")
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles, "window": window}
    return (ref if seq_lens.is_cpu else launch)(query_start, seq_lens, **options)
