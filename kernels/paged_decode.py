"""Attention of one new token a sequence over a paged KV cache, from one sequence to hundreds, of any lengths.

Formula and arguments: attention_plan.py; the plan has one token a sequence, in order. A sequence of length 0 gives
zeros, and its row of the block table is not read. One program takes all query heads of a KV head through one stretch of
a sequence's keys (decode_work.py). Where a sequence has several, each leaves its part in float32, and the one that
arrives last puts them together: a sequence that is not cut costs no second kernel.

Bound: bytes (keys and values of every sequence).

Bytes bound many sequences. A few leave most of a GPU idle and wait for one program's chain of steps: it loads its first
tile before the kernel that makes the newest key is done (EARLY), and has more warps on longer tiles.

PERF, H200, 8 KV heads of 128, bf16, us a launch in a graph whose caches do not fit the L2 cache; in brackets the bytes
at 4.3 TB/s: 4 x 200 6.5 (1), 16 x 200 8.8 (3), 64 x 300 25 (18), 128 x 160 25 (20), 256 x 160 46 (39), 256 x 300 83
(73), 256 x 1,100 274 (270); of uneven lengths 54 x 1,327 78 (68), 170 x 959 169 (155), 256 x 623 168 (152), where whole
sequences took 109, 210, 180. In a step of one token: 3.3 a layer to 256 keys, 5.8 to 512. Sums over keys without matrix
units, two tiles at once or prefetches of later tiles to the L2 cache: all slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan, Scores, check_fits, make, num_bytes, ref
from cableway.kernels.cpu import attention as cpu_attention
from cableway.kernels.decode_parts import leave_part
from cableway.kernels.kv_cache import F8, NO_SCALES, KVScales, as_factor, beside, block_size_of, scales_at
from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, num_processors, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, Call, are_contiguous, check, grid, kernel
from cableway.kernels.tuning import OF_BYTES, Tunable


class Tuning(NamedTuple):
    """How the work is shared out."""

    tile_bytes: int = 1 << 14  # of keys, as many as of values, that a program loads at once
    most_tile_keys: int = 64
    num_warps: int = 4
    num_stages: int = 3  # tiles of keys and values on their way or in use
    shares_a_processor: int = 2
    least_stretch_keys: int = 256
    early: bool = False  # the first tile is loaded before the kernel before is done, and none through shared memory


MANY = Tuning(tile_bytes=1 << 13, num_warps=1, num_stages=2, shares_a_processor=28)
"""Small tiles, as more programs hide each other's beginnings, and of uneven sequences short stretches."""
SOME = MANY._replace(shares_a_processor=14)
FEW = Tuning(
    tile_bytes=1 << 15, most_tile_keys=128, num_warps=8, num_stages=1, shares_a_processor=1, least_stretch_keys=512,
    early=True,
)  # fmt: skip
_MOST_FEW, _MOST_SOME, _MANY = 16, 96, 256
"""Few sequences leave most of the GPU idle: what counts is how long the last program takes."""


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    kv_item_bytes: int
    most_seqs: int  # _MOST_FEW, _MOST_SOME, or _MANY for all beyond


def _rule(key: Key) -> Tuning:
    if key.most_seqs == _MOST_FEW:
        return FEW
    more = SOME if key.most_seqs == _MOST_SOME else MANY
    # A warp has no registers for large heads of 8 bits beside what they are converted to.
    return more._replace(num_warps=2) if key.kv_item_bytes == 1 and key.head_dim > 128 else more


def _candidates(key: Key) -> Iterator[Tuning]:
    whole = _rule(key)._replace(tile_bytes=1 << 16)
    if key.most_seqs == _MOST_FEW:
        for keys, num_warps, stretch in product((64, 128, 256), (4, 8), (256, 512)):
            yield whole._replace(most_tile_keys=keys, num_warps=num_warps, least_stretch_keys=stretch)
    else:
        stages = (3, 4) if key.kv_item_bytes == 1 else (2, 3)
        for keys, num_warps, num_stages in product((32, 64, 128), (1, 2, 4), stages):
            if 16 * num_warps <= keys <= 64 * num_warps:
                yield whole._replace(most_tile_keys=keys, num_warps=num_warps, num_stages=num_stages)
        yield whole._replace(shares_a_processor=4)


@jit
def _load_tile(
    keys_ptr, value_offset, block, key, end_key, kv_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, BLOCK_DIM] of a head as the cache keeps them, zeros from end_key on, and their scales."""
    dim, key_inside = tl.arange(0, BLOCK_DIM), key < end_key
    slot = block.to(tl.int64) * ROWS_A_BLOCK + key % BLOCK_SIZE
    place = keys_ptr + (slot * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
    inside = key_inside[:, None] & (dim < HEAD_DIM)[None, :]
    k = tl.load(place, mask=inside, other=0.0)
    v = tl.load(place + value_offset, mask=inside, other=0.0)
    k_scale, v_scale = 1.0, 1.0
    if HAS_SCALES:
        sizes = NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK
        k_scale = scales_at(keys_ptr, block, key, key_inside, kv_head, *sizes)
        v_scale = scales_at(keys_ptr + value_offset, block, key, key_inside, kv_head, *sizes)
    return k, v, k_scale, v_scale


@jit
def _with_newest(
    tile, is_newest, keys_ptr, value_offset, block, newest, kv_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """A tile whose key `newest` (-1: there is none) was not there yet when it was loaded, with that key."""
    k, v, k_scale, v_scale = tile
    dim = tl.arange(0, BLOCK_DIM)
    inside = dim < tl.where(newest >= 0, HEAD_DIM, 0)
    place = keys_ptr + ((block * ROWS_A_BLOCK + newest % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM + dim
    k = tl.where(is_newest[:, None], tl.load(place, mask=inside, other=0.0)[None, :], k)
    v = tl.where(is_newest[:, None], tl.load(place + value_offset, mask=inside, other=0.0)[None, :], v)
    if HAS_SCALES:
        sizes = NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK
        k_scale = tl.where(is_newest, scales_at(keys_ptr, block, newest, newest >= 0, kv_head, *sizes), k_scale)
        v_newest_scale = scales_at(keys_ptr + value_offset, block, newest, newest >= 0, kv_head, *sizes)
        v_scale = tl.where(is_newest, v_newest_scale, v_scale)
    return k, v, k_scale, v_scale


@jit
def _add_tile(
    q, tile, key_inside, distance, slope, top, mass, sums, scale, soft_cap,
    HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, REACH: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Take one more tile of keys into a softmax."""
    k, v, k_scale, v_scale = tile
    scores = tl.dot(q, tl.trans(as_factor(k, q.dtype)), input_precision="ieee") * scale
    if HAS_SCALES:
        scores *= k_scale[None, :]
    if HAS_CAP:
        scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)
    if HAS_SLOPES:
        scores -= slope[:, None] * distance.to(tl.float32)[None, :]
    if REACH:
        scores += tl.load(slope[:, None] + tl.minimum(tl.maximum(distance, 0), REACH)[None, :])
    scores = tl.where(key_inside[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - new_top[:, None])
    decay = tl.exp(top - new_top)
    mass = mass * decay + tl.sum(weights, 1)
    if HAS_SCALES:
        weights *= v_scale[None, :]
    sums = sums * decay[:, None] + tl.dot(weights.to(q.dtype), as_factor(v, q.dtype), input_precision="ieee")
    return new_top, mass, sums


@jit
def _attend(
    q, tile, keys_ptr, value_offset, table_ptr, first_key, end_key, kv_head, scale, soft_cap, newest, slope, top, mass,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
    HAS_TILE: tl.constexpr, HAS_SLOPES: tl.constexpr, REACH: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Softmax over a stretch of keys: top score [rows], mass [rows] and weighted sums [rows, dim], all f32.

    It begins from `top` and `mass`. Scores fall by `slope` [rows] with a key's distance from the key `newest`;
    where REACH is not 0 they have what `slope` points to, the first of REACH + 1 numbers for distances.

    HAS_TILE: the first tile is given, and each is loaded while the one before it is added up; otherwise tiles go
    through shared memory, several at a time.
    """
    sums = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    key = first_key + tl.arange(0, TILE)
    block = tl.load(table_ptr + (key + HAS_TILE * TILE) // BLOCK_SIZE, mask=key + HAS_TILE * TILE < end_key, other=0)
    for _ in range(first_key, end_key, TILE):
        key_inside, distance = key < end_key, newest - key
        next_key = key + TILE
        if HAS_TILE:
            this, to_load = tile, next_key
        else:
            to_load = key
        loaded = _load_tile(
            keys_ptr, value_offset, block, to_load, end_key, kv_head,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK, BLOCK_DIM, HAS_SCALES,
        )  # fmt: skip
        if HAS_TILE:
            tile = loaded
        else:
            this = loaded
        # The blocks of a tile are known before its keys are asked for.
        after = to_load + TILE
        block = tl.load(table_ptr + after // BLOCK_SIZE, mask=after < end_key, other=0)
        top, mass, sums = _add_tile(
            q, this, key_inside, distance, slope, top, mass, sums, scale, soft_cap,
            HAS_CAP, HAS_SLOPES, REACH, HAS_SCALES,
        )  # fmt: skip
        key = next_key
    return top, mass, sums


@jit
def _beginning(
    slopes_ptr, sinks_ptr, seq_len_ptr, head, first_head, has_sinks,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_SLOPES: tl.constexpr, REACH: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """What `_attend` begins with: `slope`, the newest key, `top` and `mass`. has_sinks: of one part of a sequence."""
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass, slope, last_key = tl.zeros((BLOCK_ROWS,), tl.float32), top, 0
    if REACH:
        slope = slopes_ptr + (first_head + tl.minimum(head, GROUP - 1)) * (REACH + 1)
    elif HAS_SLOPES:
        slope = tl.load(slopes_ptr + first_head + head, mask=head < GROUP, other=0.0)
    if REACH or HAS_SLOPES:
        last_key = tl.load(seq_len_ptr) - 1
    if HAS_SINKS and has_sinks:  # a score that this part has seen before all keys
        top = tl.load(sinks_ptr + first_head + head, mask=head < GROUP, other=0.0)
        mass += 1.0
    return slope, last_key, top, mass


@jit(do_not_specialize=("tops_ptr", "masses_ptr", "table_stride"))  # which vary between steps
def _paged_decode(
    q_ptr, cache_ptr, out_ptr, table_ptr, work_ptr, arrivals_ptr, tops_ptr, masses_ptr, sums_ptr,
    seq_lens_ptr, slopes_ptr, sinks_ptr, scale, soft_cap, value_scale, q_stride, value_offset, table_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS_A_BLOCK: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, REACH: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_GROUP: tl.constexpr, EARLY: tl.constexpr,
    IS_FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item of the work, for the query heads of one KV head. Heads of a token lie side by side, and so they run.

    IS_FIRST: the work was made by the kernel before.
    """
    HAS_SCALES: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
    kv_head, item = tl.program_id(0), tl.program_id(1)
    if PDL and IS_FIRST:
        gdc_wait()
    sequence = tl.load(work_ptr + item * 5).to(tl.int64)
    first_key, end_key = tl.load(work_ptr + item * 5 + 1), tl.load(work_ptr + item * 5 + 2)
    first_item, num_parts = tl.load(work_ptr + item * 5 + 3), tl.load(work_ptr + item * 5 + 4)
    if PDL and item == 0 and sequence < 0:
        gdc_wait()  # whoever has nothing to do may be done before the kernel before is, but not all of them
    if sequence >= 0:
        table_ptr += sequence * table_stride
        dim, tile = tl.arange(0, BLOCK_DIM), 0
        if EARLY:
            # All keys but the newest, which the kernel before may not have written yet, lie there from earlier steps.
            key, newest = first_key + tl.arange(0, TILE), end_key - 1
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < newest, other=0)
            tile = _load_tile(
                cache_ptr, value_offset, block, key, newest, kv_head,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK, BLOCK_DIM, HAS_SCALES,
            )  # fmt: skip
            newest_block = tl.load(table_ptr + newest // BLOCK_SIZE, mask=newest >= 0, other=0).to(tl.int64)
        if PDL and not IS_FIRST:
            gdc_wait()
        if PDL:
            # Not sooner: what the next kernels load ahead would stand in the way of what all of them wait for.
            gdc_launch_dependents()
        head = tl.arange(0, BLOCK_ROWS)
        inside = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        element = head[:, None] * HEAD_DIM + dim[None, :]
        first_head = kv_head * GROUP
        q = tl.load(q_ptr + sequence * q_stride + first_head * HEAD_DIM + element, mask=inside, other=0.0)
        q = beside(q, cache_ptr.dtype.element_ty)
        if EARLY:
            tile = _with_newest(
                tile, key == newest, cache_ptr, value_offset, newest_block, newest, kv_head,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK, BLOCK_DIM, HAS_SCALES,
            )  # fmt: skip
        slope, last_key, top, mass = _beginning(
            slopes_ptr, sinks_ptr, seq_lens_ptr + sequence, head, first_head, item == first_item,
            GROUP, BLOCK_ROWS, HAS_SLOPES, REACH, HAS_SINKS,
        )  # fmt: skip
        top, mass, sums = _attend(
            q, tile, cache_ptr, value_offset, table_ptr, first_key, end_key, kv_head, scale, soft_cap, last_key,
            slope, top, mass,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK, HAS_CAP, BLOCK_ROWS, BLOCK_DIM, TILE, EARLY,
            HAS_SLOPES, REACH, HAS_SCALES,
        )  # fmt: skip
        out_ptr += (sequence * NUM_KV_HEADS * GROUP + first_head) * HEAD_DIM
        if num_parts == 1:
            y = sums * value_scale / tl.where(mass == 0, 1.0, mass)[:, None]
            tl.store(out_ptr + element, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            leave_part(
                out_ptr, tops_ptr, masses_ptr, sums_ptr, arrivals_ptr + sequence * NUM_KV_HEADS + kv_head,
                item, first_item, num_parts, first_head, top, mass, sums, value_scale,
                NUM_KV_HEADS * GROUP, GROUP, HEAD_DIM, BLOCK_PARTS, BLOCK_ROWS, BLOCK_GROUP, BLOCK_DIM,
            )  # fmt: skip


def launch(
    q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES, *,
    tuned: Tuning | None = None,
) -> Tensor:  # fmt: skip
    (_, num_heads, head_dim), (_, _, rows_a_block, num_kv_heads, _) = q.shape, cache.shape
    check(are_contiguous(plan.seq_lens) and plan.block_table.stride(1) == 1, "the plan is strided")
    most_seqs = next((most for most in (_MOST_FEW, _MOST_SOME) if len(plan.seq_lens) <= most), _MANY)
    chosen = tuned or tuning(Key(num_heads, num_kv_heads, head_dim, q.element_size(), cache.element_size(), most_seqs))
    group = num_heads // num_kv_heads
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    block_group = triton.next_power_of_2(group)
    tile = min(max(chosen.tile_bytes // (block_dim * q.element_size()), 16), chosen.most_tile_keys)
    num_shares = max(chosen.shares_a_processor * num_processors() // num_kv_heads, 1)
    slopes, sinks = scores.slopes if scores.biases is None else scores.biases, scores.sinks
    num_works = len(plan._decode_works)
    work, arrivals = plan.decode_work(
        num_shares=num_shares, tile=tile, least_tiles=-(-chosen.least_stretch_keys // tile),
        num_kv_heads=num_kv_heads, window=scores.window,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_parts = len(work) * num_heads
    parts = torch.empty(num_parts * (head_dim + 2), dtype=torch.float32, device=q.device)
    sums, tops, masses = parts.split((num_parts * head_dim, num_parts, num_parts))
    _paged_decode[(num_kv_heads, len(work))](
        q, cache, out, plan.block_table, work, arrivals, tops, masses, sums,
        plan.seq_lens, q if slopes is None else slopes, q if sinks is None else sinks,
        scores.scale * scales.key, scores.soft_cap, scales.value, q.stride(0), cache.stride(0),
        plan.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size_of(cache),
        ROWS_A_BLOCK=rows_a_block, HAS_CAP=scores.soft_cap > 0,
        HAS_SLOPES=scores.slopes is not None, REACH=0 if scores.biases is None else scores.biases.shape[1] - 1,
        HAS_SINKS=sinks is not None,
        BLOCK_ROWS=max(block_group, 16), BLOCK_DIM=block_dim, TILE=tile,
        BLOCK_PARTS=max(512 * chosen.num_warps // (block_group * block_dim), 1), BLOCK_GROUP=block_group,
        EARLY=chosen.early,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        IS_FIRST=len(plan._decode_works) > num_works, **overlapping(),
    )  # fmt: skip
    return out


def _make(key: Key, device: str) -> Call:
    """As many sequences, of some hundred tokens."""
    spans = _spans(*(700,) * (4 if key.most_seqs == _MOST_FEW else key.most_seqs))
    kept_as = torch.int8 if key.kv_item_bytes == 1 else None
    return make(spans, key[:3], OF_BYTES[key.item_bytes], kept_as=kept_as, device=device)


tuning = Tunable("paged_decode", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


def _spans(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((1, length) for length in lengths)


SHORT, LONG, MANY_SHORT = _spans(5, 33, 1, 64), _spans(1500), _spans(*range(1, 200, 11))
UNEVEN = _spans(255, 3, 700, 256, 257, 1, 512)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(SHORT, LONG, UNEVEN), heads=((9, 3, 64), (4, 1, 128)), dtype=FLOATS),
        *grid(spans=(MANY_SHORT,), heads=((4, 2, 128), (3, 3, 96)), dtype=FLOATS, window=(0, 50)),
        *grid(spans=(LONG, UNEVEN), heads=((6, 2, 80),), dtype=FLOATS, window=(16, 600), block_size=(32,)),
        *grid(spans=(UNEVEN,), heads=((6, 2, 112),), dtype=FLOATS, window=(0, 300), soft_cap=(2.0,)),
        *grid(spans=(LONG, UNEVEN), heads=((6, 2, 32),), dtype=FLOATS, slopes=(False, True), sinks=(True,)),
        *grid(spans=(UNEVEN,), heads=((3, 3, 48),), dtype=FLOATS, window=(300,), slopes=(True,), soft_cap=(2.0,)),
        *grid(spans=(UNEVEN,), heads=((6, 2, 32), (3, 3, 64)), dtype=FLOATS, reach=(9, 300)),
        *grid(spans=(UNEVEN,), heads=((16, 1, 96), (3, 3, 256), (20, 1, 192)), dtype=FLOATS, block_size=(64, 24)),
        *grid(
            spans=(MANY_SHORT, UNEVEN),
            heads=((6, 2, 80),),
            dtype=FLOATS,
            block_size=(24,),
            window=(0, 300),
            kept_as=(torch.int8, *F8),
            scales=(KVScales(0.5, 3.0),),
        ),
    ],
    bench_cases=[
        *grid(
            spans=(_spans(128), _spans(2000), _spans(32_768), _spans(*(1024,) * 64), _spans(*(512,) * 256)),
            heads=((16, 8, 128), (32, 8, 128)),
            dtype=(torch.bfloat16,),
        ),
        *grid(
            spans=(_spans(2000), _spans(*(1024,) * 64)),
            heads=((32, 8, 128),),
            dtype=(torch.bfloat16,),
            kept_as=(torch.int8, torch.float8_e4m3fn),
        ),
    ],
    num_bytes=num_bytes,
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2},
)
def paged_decode(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES) -> Tensor:
    """Attend q [num_seqs, H, D] to the cached keys of its sequences -> the same shape; ValueError as paged_attention.

    The sums of a sequence may be cut otherwise in another batch: not for plans that ask for invariant results.
    """
    check_fits(q, cache, scores)
    check(len(q) == len(plan.seq_lens) and plan.max_query_len == 1, "not one token a sequence")
    check(not plan.invariant, "the plan asks for invariant results")
    form = cpu_attention.attend if q.device.type == "cpu" else launch
    return form(q, cache, plan, scores, scales)
