"""Causal attention of new tokens over a paged cache of latents, by absorbed queries: prefill and decode.

    a = softmax(scale * q · cᵀ + mask) c[:rank]

What a token keeps is one row c for all heads: a latent of `rank` numbers, which serves as key and value, and a rotated
key. Which keys a token sees: as in attention_plan.py, without a window.

q        [num_tokens, num_heads, width]          dtype of cache, contiguous
cache    [1, num_blocks, block_size, 1, width]   bf16|f16|f32, contiguous; see latent_write.py
plan     an AttentionPlan
returns  [num_tokens, num_heads, rank]           contiguous

Where it fits hopper_latent.py computes this. Else the sequences that come first and bring one token each are computed
by latent_decode.py, the others here, and all of them where results must be invariant or where there are very many. A
program takes some rows, heads of one token or of some, through all keys of its sequence; each tile of latents is read
once, for scores and for sums.
Bound: bytes for decode (the latents of every sequence), FLOPs for prefill (2 * (width + rank) a head and visible key).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import attention_plan, hopper_latent, latent_decode
from cableway.kernels.attention_plan import AttentionPlan, Scores
from cableway.kernels.cpu import attention as cpu_attention
from cableway.kernels.lang import gpu_capability, jit, tl, triton
from cableway.kernels.latent_decode import add_latents
from cableway.kernels.registry import FLOATS, Call, are_contiguous, call, check, grid, kernel, nbytes

_MOST_SHARED_OUT = 1024
"""With more sequences a GPU is full without, and each one's parts would be kept: gigabytes for tokens of a prompt."""

_FEW_HEADS = 16
"""Of a sequence alone, which is latent_decode's: what counts is how soon programs have begun (H200, 8,192 keys: 21.5 us
and 25.5)."""


def ref(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, rank: int) -> Tensor:
    return attention_plan.ref(q, cache.expand(2, *cache.shape[1:]), plan, Scores(scale))[..., :rank].contiguous()


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _latent_attention(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, work_ptr, scale, table_stride,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_REST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One item of the work, TILE query tokens of one sequence, for HEADS of its heads."""
    item, first_head = tl.program_id(1), tl.program_id(0) * HEADS
    sequence, first_query = tl.load(work_ptr + item * 2).to(tl.int64), tl.load(work_ptr + item * 2 + 1)
    if sequence >= 0:
        start = tl.load(query_start_ptr + sequence)
        num_queries = tl.load(query_start_ptr + sequence + 1) - start
        length = tl.load(seq_lens_ptr + sequence)
        row = tl.arange(0, TILE * HEADS)
        query, head = first_query + row // HEADS, first_head + row % HEADS
        position = length - num_queries + query
        row_inside = ((query < num_queries) & (head < NUM_HEADS))[:, None]
        place = ((start + query).to(tl.int64) * NUM_HEADS + head)[:, None]
        latent, rest = tl.arange(0, BLOCK_RANK), RANK + tl.arange(0, BLOCK_REST)
        q_latent = tl.load(q_ptr + place * WIDTH + latent, mask=row_inside & (latent < RANK)[None, :], other=0.0)
        q_rest = tl.load(q_ptr + place * WIDTH + rest, mask=row_inside & (rest < WIDTH)[None, :], other=0.0)
        top = tl.full((TILE * HEADS,), float("-inf"), tl.float32)
        mass = tl.zeros((TILE * HEADS,), tl.float32)
        sums = tl.zeros((TILE * HEADS, BLOCK_RANK), tl.float32)
        end_key = tl.minimum(length, length - num_queries + first_query + TILE)
        for keys_from in range(0, end_key, KEYS):
            top, mass, sums = add_latents(
                q_latent, q_rest, cache_ptr, table_ptr + sequence * table_stride, keys_from, end_key, position,
                top, mass, sums, scale, WIDTH, RANK, BLOCK_SIZE, BLOCK_RANK, BLOCK_REST, KEYS,
            )  # fmt: skip
        y = sums / tl.where(mass == 0, 1.0, mass)[:, None]  # nobody's rows see nothing
        inside = row_inside & (latent < RANK)[None, :]
        tl.store(out_ptr + place * RANK + latent, y.to(out_ptr.dtype.element_ty), mask=inside)


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, rank: int) -> Tensor:
    check(are_contiguous(plan.query_start, plan.seq_lens) and plan.block_table.stride(1) == 1, "the plan is strided")
    num_tokens, num_heads, width = q.shape
    shares_out = plan.may_have_singles and not plan.invariant and len(plan.seq_lens) <= _MOST_SHARED_OUT
    is_for_hopper = hopper_latent.fits(q, plan, rank)
    if not shares_out:
        out = torch.empty(num_tokens, num_heads, rank, dtype=q.dtype, device=q.device)
    else:
        is_alone = len(plan.seq_lens) == 1 and num_heads <= _FEW_HEADS
        decode = hopper_latent.decode if is_for_hopper and not is_alone else latent_decode.launch
        out = decode(q, cache, plan, scale=scale, rank=rank)
        if plan.max_query_len == 1 and num_tokens == len(plan.seq_lens):
            return out
    if is_for_hopper:
        hopper_latent.prefill(q, cache, plan, out, scale=scale, skips_singles=shares_out)
        return out
    is_hopper = gpu_capability() == 90 and q.dtype != torch.float32
    rows, keys, num_warps = (64, 32, 8) if is_hopper else (16, 16, 4)
    heads = min(triton.next_power_of_2(num_heads), rows)
    work = plan.prefill_work(num_tokens=num_tokens, tile=rows // heads, skips_singles=shares_out)
    _latent_attention[(triton.cdiv(num_heads, heads), len(work))](
        q, cache, out, plan.query_start, plan.seq_lens, plan.block_table, work, scale, plan.block_table.stride(0),
        NUM_HEADS=num_heads, WIDTH=width, RANK=rank, BLOCK_SIZE=cache.shape[2], TILE=rows // heads, HEADS=heads,
        BLOCK_RANK=max(triton.next_power_of_2(rank), 16), BLOCK_REST=max(triton.next_power_of_2(width - rank), 16),
        KEYS=keys, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    return out


def make(
    spans, num_heads: int, rank: int, width: int, dtype: torch.dtype, invariant: bool = False, device: str = "cpu"
) -> Call:
    """`spans`: (new tokens, length) of each sequence."""
    made = attention_plan.make(spans, (num_heads, 1, width), dtype, invariant=invariant, device=device)
    q, cache, plan, *_ = made.args
    return call(q.contiguous(), cache[:1].clone(), plan, scale=2 * width**-0.5, rank=rank)


def _visible_keys(made: Call) -> int:
    spans = made.args[2].spans
    return sum(p + 1 for start, end, length in spans for p in range(length - end + start, length))


UNEVEN = tuple((1, length) for length in (255, 3, 400, 257, 1))
SHORT = ((1, 70), (1, 3), (5, 68))
MIXED = ((1, 40), (1, 90), (20, 20), (7, 30), (1, 9), (70, 75))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED,), num_heads=(4, 20), rank=(32,), width=(48,), dtype=FLOATS),
        *grid(spans=(((1, 130),) * 2,), num_heads=(16,), rank=(24,), width=(32,), dtype=FLOATS),
        *grid(spans=(UNEVEN,), num_heads=(3,), rank=(32,), width=(48,), dtype=FLOATS),
        *grid(spans=(UNEVEN,), num_heads=(40, 70), rank=(32,), width=(48,), dtype=(torch.bfloat16,)),
        *grid(spans=(SHORT,), num_heads=(20,), rank=(256,), width=(288,), dtype=(torch.float16, torch.bfloat16)),
        *grid(spans=(SHORT,), num_heads=(70,), rank=(512,), width=(576,), dtype=(torch.float16,)),
        *grid(spans=(MIXED,), num_heads=(4,), rank=(32,), width=(48,), dtype=FLOATS, invariant=(True,)),
    ],
    bench_cases=grid(
        spans=(((1, 1024),) * 64, ((1024, 1024),)),
        num_heads=(16, 128),
        rank=(512,),
        width=(576,),
        dtype=(torch.bfloat16,),
    ),
    num_bytes=lambda c: nbytes(c.args[0]) + nbytes(c.args[1][:, 0, 0]) * sum(s[2] for s in c.args[2].spans),
    num_flops=lambda c: 2 * c.args[0].shape[1] * (c.args[0].shape[2] + c.kwargs["rank"]) * _visible_keys(c),
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2},
)
def latent_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, rank: int) -> Tensor:
    """Attend q [T, H, width] to the latents of its sequences -> [T, H, rank]; ValueError when shapes do not fit."""
    check(q.dim() == 3 and q.is_contiguous() and q.dtype in FLOATS, "q is not [T, H, width], contiguous")
    check(cache.dim() == 5 and cache.shape[0] == cache.shape[3] == 1 and cache.shape[4] == q.shape[2], "cache")
    check(cache.is_contiguous() and cache.dtype == q.dtype and 0 < rank <= q.shape[2], "cache does not fit q")
    if not q.is_cpu:
        return launch(q, cache, plan, scale=scale, rank=rank)
    twice = cache.expand(2, *cache.shape[1:])
    return cpu_attention.attend(q, twice, plan, Scores(scale))[..., :rank].contiguous()
