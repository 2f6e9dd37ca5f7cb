"""Prefill attention on GPUs of the Hopper generation, in Gluon: bf16 and f16.

Formula and arguments: attention_plan.py; items: prefill_work.py. A program of four warps takes 64 rows, the query heads
of one KV head for one tile of query tokens, through their keys, 64 at a time. Keys and values come by asynchronous
copies, each from the slot where it lies, a tile ahead of their use; the slots themselves are read a tile before that.
The tensor cores multiply the values of one tile while the softmax of the next is computed.

Bound: FLOPs, 4 * head_dim a head and visible key.

PERF (H200, 8 KV heads of 128, bf16; TFLOP/s at 8 x 1,024, 2 x 4,096, 1 x 8,192 tokens and 8,192 of 32,000): 288, 415,
454, 471. With two tiles of keys in shared memory the last is 7 % less; 128 rows in eight warps 278, 398, 429, 437, and
with 128 keys 256, 375, 406, 375: two programs a processor hide each other's beginnings and ends. A tile takes 448
instructions (484 before copies went without masks: 290, 402, 432, 448) where its products take 512 cycles. The wait for
the values' products must follow a branch: within one block the assembler moves it before the softmax (264, 343, 365),
and it serialises all products where warps are specialised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cableway.kernels.lang import async_load, gl, gluon_jit, gpu_capability, hopper, triton

if TYPE_CHECKING:
    from cableway.kernels.attention_plan import AttentionPlan, Scores

_ROWS = _KEYS = 64
_LOG2_E = 1.4426950408889634


@gluon_jit
def _slots(table_ptr, first_key, end_key, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, COPY: gl.constexpr):
    """Where the keys first_key … first_key + KEYS lie in the cache. From end_key on it is the last one over and over.

    PERF: fewer instructions than to leave rows out, and nobody sees them. Nobody has no blocks, either.
    """
    key = gl.minimum(first_key + gl.arange(0, KEYS, gl.SliceLayout(1, COPY)), end_key - 1).to(gl.uint32)
    block = gl.maximum(gl.load(table_ptr + key // BLOCK_SIZE), 0).to(gl.uint32)
    return block * BLOCK_SIZE + key % BLOCK_SIZE


@gluon_jit
def _start_copy(
    tile, head_ptr, slots, SLOT_STRIDE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_DIM: gl.constexpr,
    COPY: gl.constexpr,
):  # fmt: skip
    """Keys or values of one head on their way to a tile [KEYS, BLOCK_DIM] in shared memory, zeros behind HEAD_DIM."""
    dim = gl.expand_dims(gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, COPY)), 0)
    places = (head_ptr + dim) + gl.expand_dims(slots.to(gl.int64) * SLOT_STRIDE, 1)
    if HEAD_DIM == BLOCK_DIM:
        async_load(tile, places)
    else:
        async_load(tile, places, mask=dim < HEAD_DIM)
    hopper.async_copy.commit_group()


@gluon_jit
def _softmax(
    scores, top, mass, position, first_key, scale, cap, window,
    IS_CUT: gl.constexpr, HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr, KEYS: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Weights [rows, KEYS] of one tile, and what the tiles before must be multiplied by; all logarithms to base 2.

    `scale` makes scores logarithms, or arguments of the cap's tanh, which `cap` makes logarithms.
    """
    if HAS_CAP:
        scores = cap - 2 * cap / (1 + gl.exp2(scores * scale))
        factor = 1.0
    else:
        factor = scale
    if IS_CUT:
        key = gl.expand_dims(first_key + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES)), 0)
        seen = key <= gl.expand_dims(position, 1)  # so it is before the sequence's end, too
        if HAS_WINDOW:
            seen = seen & (key > gl.expand_dims(position, 1) - window)
        scores = gl.where(seen, scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    # A row that has seen nothing yet has no maximum: keep its differences finite.
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores * factor - gl.expand_dims(shift, 1))
    decay = gl.exp2(top - shift)
    return weights, new_top, mass * decay + gl.sum(weights, 1), decay


@gluon_jit
def _scaled(sums, decay, SUMS: gl.constexpr):
    """Each row [rows, BLOCK_DIM] times its decay [rows]."""
    return sums * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, SUMS)), 1)


@gluon_jit
def _attend(
    q_tile, keys_ptr, values_ptr, table_ptr, first_key, end_key, first_position, scale, cap, window,
    SLOT_STRIDE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, HAS_CAP: gl.constexpr,
    HAS_WINDOW: gl.constexpr, BLOCK_GROUP: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Attention of a tile [ROWS, BLOCK_DIM] in shared memory to a sequence's keys: the same in float32."""
    ROWS: gl.constexpr = q_tile.shape[0]
    BLOCK_DIM: gl.constexpr = q_tile.shape[1]
    dtype: gl.constexpr = q_tile.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_DIM], dtype)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, BLOCK_DIM], TILE)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, BLOCK_DIM], TILE)
    position = first_position + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) // BLOCK_GROUP
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    mass = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    sums = hopper.warpgroup_mma_init(gl.full([ROWS, BLOCK_DIM], 0.0, gl.float32, SUMS))
    zero = gl.full([ROWS, KEYS], 0.0, gl.float32, SCORES)

    slots = _slots(table_ptr, first_key, end_key, BLOCK_SIZE, KEYS, COPY)
    _start_copy(keys.index(0), keys_ptr, slots, SLOT_STRIDE, HEAD_DIM, BLOCK_DIM, COPY)
    for tile in gl.static_range(STAGES - 1):
        _start_copy(values.index(tile), values_ptr, slots, SLOT_STRIDE, HEAD_DIM, BLOCK_DIM, COPY)
        slots = _slots(table_ptr, first_key + (tile + 1) * KEYS, end_key, BLOCK_SIZE, KEYS, COPY)
        _start_copy(keys.index(tile + 1), keys_ptr, slots, SLOT_STRIDE, HEAD_DIM, BLOCK_DIM, COPY)
    next_slots = _slots(table_ptr, first_key + STAGES * KEYS, end_key, BLOCK_SIZE, KEYS, COPY)
    hopper.async_copy.wait_group(2 * STAGES - 2)
    hopper.fence_async_shared()
    scores = hopper.warpgroup_mma(q_tile, keys.index(0).permute((1, 0)), zero, use_acc=False)
    weights, top, mass, decay = _softmax(
        scores, top, mass, position, first_key, scale, cap, window, True, HAS_CAP, HAS_WINDOW, KEYS, SCORES
    )
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    tile = 0
    # Tiles that all rows see whole, then those that some do not.
    uncut_end = first_key + KEYS
    if not HAS_WINDOW:
        uncut_end = gl.maximum(uncut_end, (first_position + 1) // KEYS * KEYS)
    for part in gl.static_range(2):
        for key in range(uncut_end if part else first_key + KEYS, end_key if part else uncut_end, KEYS):
            sums, operand = hopper.warpgroup_mma_wait(0, [sums, operand])
            sums = _scaled(sums, decay, SUMS)
            operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            # Keys of this tile and values of the one before have come.
            hopper.async_copy.wait_group(2 * STAGES - 4)
            hopper.fence_async_shared()
            before, this = values.index(tile % STAGES), keys.index((tile + 1) % STAGES)
            scores = hopper.warpgroup_mma(q_tile, this.permute((1, 0)), zero, use_acc=False, is_async=True)
            sums = hopper.warpgroup_mma(operand, before, sums, is_async=True)
            free_values, free_keys = values.index((tile + STAGES - 1) % STAGES), keys.index(tile % STAGES)
            _start_copy(free_values, values_ptr, slots, SLOT_STRIDE, HEAD_DIM, BLOCK_DIM, COPY)
            _start_copy(free_keys, keys_ptr, next_slots, SLOT_STRIDE, HEAD_DIM, BLOCK_DIM, COPY)
            slots = next_slots
            next_slots = _slots(table_ptr, key + STAGES * KEYS, end_key, BLOCK_SIZE, KEYS, COPY)
            scores = hopper.warpgroup_mma_wait(1, [scores])
            weights, top, mass, decay = _softmax(
                scores, top, mass, position, key, scale, cap, window, part == 1, HAS_CAP, HAS_WINDOW, KEYS, SCORES
            )
            tile += 1
    hopper.async_copy.wait_group(0)
    hopper.fence_async_shared()
    sums, operand = hopper.warpgroup_mma_wait(0, [sums, operand])
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    sums = hopper.warpgroup_mma(operand, values.index(tile % STAGES), _scaled(sums, decay, SUMS))
    is_empty = gl.expand_dims(gl.convert_layout(mass == 0, gl.SliceLayout(1, SUMS)), 1)  # nobody's
    return gl.where(is_empty, 0.0, _scaled(sums, 1 / mass, SUMS))


@gluon_jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))
def _hopper_prefill(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, work_ptr, scale, cap, window,
    q_stride, value_offset, table_stride,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    HAS_CAP: gl.constexpr, HAS_WINDOW: gl.constexpr, ROWS: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    BLOCK_DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One item of the work, for the query heads of one KV head."""
    kv_head = gl.program_id(0)
    item_ptr = work_ptr + gl.program_id(1) * 2
    sequence = gl.load(item_ptr).to(gl.int64)
    if sequence >= 0:
        # Neighbouring threads take 16 bytes each of a row.
        ACROSS: gl.constexpr = min(BLOCK_DIM // 8, 32)
        COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        start = gl.load(query_start_ptr + sequence)
        num_queries = gl.load(query_start_ptr + sequence + 1) - start
        first_query, length = gl.load(item_ptr + 1), gl.load(seq_lens_ptr + sequence)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
        dim = gl.expand_dims(gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, COPY)), 0)
        query, head = first_query + row // BLOCK_GROUP, row % BLOCK_GROUP
        token = (start + query).to(gl.int64)
        element = gl.expand_dims((kv_head * GROUP + head) * HEAD_DIM, 1) + dim
        inside = gl.expand_dims((query < num_queries) & (head < GROUP), 1) & (dim < HEAD_DIM)
        q = gl.load(q_ptr + gl.expand_dims(token * q_stride, 1) + element, mask=inside, other=0.0)
        q_tile = gl.allocate_shared_memory(
            dtype, [ROWS, BLOCK_DIM], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DIM], dtype), q
        )
        first_position = length - num_queries + first_query
        first_key = 0
        if HAS_WINDOW:
            first_key = gl.maximum(first_position - window + 1, 0)
        end_key = gl.maximum(gl.minimum(length, first_position + ROWS // BLOCK_GROUP), 1)
        keys_ptr = cache_ptr + kv_head * HEAD_DIM
        y = _attend(
            q_tile, keys_ptr, keys_ptr + value_offset, table_ptr + sequence * table_stride, first_key, end_key,
            first_position, scale, cap, window,
            NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, HAS_CAP, HAS_WINDOW, BLOCK_GROUP, KEYS, STAGES, COPY,
        )  # fmt: skip
        out_place = gl.expand_dims(token * (NUM_KV_HEADS * GROUP * HEAD_DIM), 1) + element
        gl.store(out_ptr + out_place, gl.convert_layout(y.to(dtype), COPY), mask=inside)


def fits(q: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand."""
    (_, num_heads, head_dim), is_half = q.shape, q.dtype != torch.float32
    return gpu_capability() == 90 and is_half and head_dim % 8 == 0 and num_heads <= _ROWS and not plan.invariant


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, out: Tensor, scores: Scores) -> None:
    """Write `out` [T, H, D] for the sequences that paged_decode leaves."""
    (num_tokens, num_heads, head_dim), (_, _, block_size, num_kv_heads, _) = q.shape, cache.shape
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    work = plan.prefill_work(num_tokens=num_tokens, tile=max(_ROWS // block_group, 1), skips_singles=True)
    block_dim = max(triton.next_power_of_2(head_dim), 64)
    # The cap's tanh(z) is 1 - 2 / (1 + exp(2 z)).
    factor, cap = scores.scale, scores.soft_cap * _LOG2_E
    if scores.soft_cap:
        factor *= 2 / scores.soft_cap
    _hopper_prefill[(num_kv_heads, len(work))](
        q, cache, out, plan.query_start, plan.seq_lens, plan.block_table, work, factor * _LOG2_E, cap, scores.window,
        q.stride(0), cache.stride(0), plan.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, HAS_CAP=scores.soft_cap > 0,
        HAS_WINDOW=scores.window > 0, ROWS=_ROWS, BLOCK_GROUP=block_group, BLOCK_DIM=block_dim,
        KEYS=_KEYS if block_dim <= 128 else _KEYS // 2, STAGES=3 if block_dim <= 128 else 2, num_warps=4,
    )  # fmt: skip
