"""What lies between the q/k/v projection and attention: norms of heads, rotary embedding, and the KV cache written.

    q' = rotate(norm(q)) is returned;   rotate(norm(k)) and v go to their slots of the cache
    norm(x) = x / sqrt(mean(x²) + eps) * w over a head, or x where there are no norms;   rotate: see rope.py

q       [num_tokens, num_heads, head_dim]     bf16|f16|f32   heads contiguous, tokens may be strided
k, v    [num_tokens, num_kv_heads, head_dim]  dtype of q     the same
angles  a table of cosines and sines [max_positions, rotary] f32, and the tokens' positions [num_tokens] i32
cache   [2, num_blocks, block_rows, num_kv_heads, head_dim]  dtype of q, or of 8 bits; see kv_cache.py
slots   [num_tokens]  i64   distinct; a negative slot writes nothing
norms   (q's [head_dim] f32, k's [head_dim] f32), or None
scales  of keys and of values, where the cache is f8
q'      [num_tokens, num_heads, head_dim]     dtype of q

q and k are spoiled: what they hold afterwards is of no use. A token's result is the same whatever others are beside it.
Bound: bytes; reads q, k and v, writes as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import kv_cache
from cableway.kernels import kv_write as kv_writing
from cableway.kernels import rms_norm as rms_norms
from cableway.kernels import rope as ropes
from cableway.kernels.kv_cache import NO_SCALES, KVScales, block_size_of, write_heads
from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, loops, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, are_contiguous, call, check, grid, kernel, nbytes
from cableway.kernels.rope import Angles

Norms = tuple[Tensor, Tensor] | None


def ref(
    q: Tensor, k: Tensor, v: Tensor, angles: Angles, cache: Tensor, slots: Tensor, norms: Norms = None, *,
    eps: float = 0.0, scales: KVScales = NO_SCALES,
) -> Tensor:  # fmt: skip
    turned = []
    for x, norm in zip((q, k), norms or (None, None), strict=True):
        y = x.float() if norm is None else rms_norms.ref(x.float(), norm, eps=eps)
        turned.append(y.clone())
    ropes.ref(*turned, angles)
    kv_writing.ref(turned[1], v, cache, slots, scales)
    return turned[0].to(q.dtype)


@jit(do_not_specialize=("positions_ptr", "slots_ptr"))  # rows of tables whose length is that of a step
def _rope_and_write(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, positions_ptr, cache_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, out_ptr,
    q_stride, k_stride, v_stride, value_offset, key_factor, value_factor, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr, HAS_NORMS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: of q, of k or of v, which is not turned."""
    if PDL:
        gdc_launch_dependents()
    token, first_head = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_HEADS
    Q_HEADS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS * BLOCK_HEADS
    KV_HEADS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS * BLOCK_HEADS
    slot = tl.load(slots_ptr + token)
    is_q = first_head < Q_HEADS
    num_heads = tl.where(slot >= 0, NUM_KV_HEADS, 0)  # a row of nobody writes none
    num_turned, num_normed = 2 * HALF, HEAD_DIM
    norm_ptr, plane_ptr, factor = k_norm_ptr, cache_ptr, key_factor
    if is_q:
        num_heads = NUM_HEADS
        norm_ptr, x_ptr = q_norm_ptr, q_ptr + token * q_stride
    elif first_head < Q_HEADS + KV_HEADS:
        first_head -= Q_HEADS
        x_ptr = k_ptr + token * k_stride
    else:
        first_head -= Q_HEADS + KV_HEADS
        num_turned, num_normed = 0, 0
        plane_ptr += value_offset
        factor = value_factor
        x_ptr = v_ptr + token * v_stride

    dim = tl.arange(0, BLOCK_DIM)
    head = first_head + tl.arange(0, BLOCK_HEADS)
    turns = dim < num_turned
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * 2 * HALF + dim % HALF
    cos = tl.load(angle_ptr, mask=turns, other=1.0)
    sin = tl.load(angle_ptr + HALF, mask=turns, other=0.0)
    sin = tl.where(dim < HALF, -sin, sin)
    if HAS_NORMS:
        cos *= tl.load(norm_ptr + dim, mask=dim < num_normed, other=1.0)
        sin *= tl.load(norm_ptr + partner, mask=turns, other=0.0)
    if PDL:
        gdc_wait()

    inside = (head < num_heads)[:, None] & (dim < HEAD_DIM)[None, :]
    x_ptr += head[:, None] * HEAD_DIM
    x = tl.load(x_ptr + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
    y = x * cos[None, :] + other * sin[None, :]
    if HAS_NORMS:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
        y *= tl.where(num_normed > 0, scale, 1.0)[:, None]
    if is_q:
        place = out_ptr + (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(place, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        write_heads(
            plane_ptr, y, slot, head, dim, head < num_heads, factor, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK
        )


_ELEMENTS_A_PROGRAM = {1024: 2048, 32: 1024, 0: 256}
"""From so many tokens on: the best of those measured on an H200."""


def launch(
    q: Tensor, k: Tensor, v: Tensor, angles: Angles, cache: Tensor, slots: Tensor, norms: Norms = None, *,
    eps: float = 0.0, scales: KVScales = NO_SCALES,
) -> Tensor:  # fmt: skip
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    q_norm, k_norm = norms or (None, None)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_dim = triton.next_power_of_2(head_dim)
    num_elements = next(most for least, most in _ELEMENTS_A_PROGRAM.items() if num_tokens >= least)
    block_heads = max(min(num_elements // block_dim, triton.next_power_of_2(num_heads)), 1)
    num_programs = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(num_kv_heads, block_heads)
    _rope_and_write[(num_tokens, num_programs)](
        q, k, v, angles.cos_sin, angles.positions, cache, slots, q_norm, k_norm, out,
        q.stride(0), k.stride(0), v.stride(0), cache.stride(0), 1 / scales.key, 1 / scales.value, eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=angles.cos_sin.shape[1] // 2,
        BLOCK_SIZE=block_size_of(cache), ROWS_A_BLOCK=cache.shape[2], HAS_NORMS=norms is not None,
        BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim,
        num_warps=min(max(block_heads * block_dim // 256, 1), 4), **overlapping(),
    )  # fmt: skip
    return out


def make(
    num_tokens: int, heads: tuple[int, int, int], rotary: int, dtype: torch.dtype, normed: bool, block_size: int = 16,
    num_blocks: int = 16, kept_as: torch.dtype | None = None, scales: KVScales = NO_SCALES, device="cpu",
):  # fmt: skip
    """`heads`: num_heads, num_kv_heads, head_dim. q, k and v are views of one projection. `kept_as`: see kv_write.py"""
    num_heads, num_kv_heads, head_dim = heads
    q, k, angles = ropes.make(num_tokens, *heads, rotary, dtype, device=device).args
    qkv = q.as_strided((num_tokens, num_heads + 2 * num_kv_heads, head_dim), q.stride())
    before = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, device=device)
    cache = kv_cache.cache_of(before, kept_as or dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    norms = tuple(torch.randn(2, head_dim, device=device)) if normed else None
    return call(q, k, qkv[:, num_heads + num_kv_heads :], angles, cache, slots, norms, eps=1e-5, scales=scales)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), heads=((9, 3, 64),), rotary=(64, 24), dtype=FLOATS, normed=(False, True)),
        *grid(num_tokens=(1, 40), heads=((4, 4, 80), (16, 1, 128)), rotary=(80,), dtype=FLOATS, normed=(False, True)),
        *grid(
            num_tokens=(2,), heads=((3, 1, 112), (2, 2, 96), (6, 2, 256)), rotary=(96,), dtype=FLOATS, normed=(True,)
        ),
        *grid(
            num_tokens=(5,),
            heads=((3, 1, 112), (6, 3, 64)),
            rotary=(64,),
            dtype=FLOATS,
            normed=(True, False),
            block_size=(24,),
            kept_as=(torch.int8, *kv_cache.F8),
            scales=(KVScales(0.03, 0.004),),
        ),
    ],
    bench_cases=[
        *grid(
            num_tokens=(1, 16, 256), heads=((16, 8, 128),), rotary=(128,), dtype=(torch.bfloat16,), normed=(False, True)
        ),
        *grid(
            num_tokens=(8192,),
            heads=((16, 8, 128), (32, 4, 128)),
            rotary=(128,),
            dtype=(torch.bfloat16,),
            normed=(False, True),
            num_blocks=(512,),
        ),
        *grid(
            num_tokens=(1, 256),
            heads=((16, 8, 128),),
            rotary=(128,),
            dtype=(torch.bfloat16,),
            normed=(True,),
            kept_as=(torch.int8, torch.float8_e4m3fn),
        ),
    ],
    num_bytes=lambda c: 2 * nbytes(*c.args[:3]),
    updates=(4,),
    spoils=(0, 1),
)
def rope_and_write(
    q: Tensor, k: Tensor, v: Tensor, angles: Angles, cache: Tensor, slots: Tensor, norms: Norms = None, *,
    eps: float = 0.0, scales: KVScales = NO_SCALES,
) -> Tensor:  # fmt: skip
    """q' [T, H, D], and the cache takes k and v; ValueError when shapes or dtypes do not fit.

    On a CPU no slot may be negative.
    """
    _check_fits(q, k, v, angles, cache, slots, norms)
    if not q.is_cpu:
        return launch(q, k, v, angles, cache, slots, norms, eps=eps, scales=scales)
    if norms is not None:
        q, k = rms_norms.rms_norm(q, norms[0], eps=eps), rms_norms.rms_norm(k, norms[1], eps=eps)
    (num_tokens, num_heads, _), num_kv_heads, (_, rotary) = q.shape, k.shape[1], angles.cos_sin.shape
    loops.run(
        loops.rotate_and_write, num_tokens, 4 * (num_heads + num_kv_heads) * rotary,
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), loops.KINDS[q.dtype],
        angles.cos_sin.data_ptr(), angles.positions.data_ptr(), slots.data_ptr(), num_heads, rotary,
        *loops.integers_of(cache), 1 / scales.key, 1 / scales.value,
    )  # fmt: skip
    return q


def _check_fits(q, k, v, angles: Angles, cache, slots, norms: Norms) -> None:
    table, positions, head_dim = angles.cos_sin, angles.positions, q.shape[-1]
    fits = q.dim() == cache.dim() - 2 == 3 and k.shape == v.shape and k.shape[1:] == cache.shape[3:]
    check(fits, "q, k, v or cache")
    check(q.shape[0] == k.shape[0] == slots.shape[0] == positions.shape[0], "numbers of tokens differ")
    kv_cache.check_cache(cache, q.dtype)
    check(q.dtype == k.dtype == v.dtype, "dtypes of q, k and v differ")
    check(all(x.stride()[1:] == (head_dim, 1) for x in (q, k, v)), "heads are strided")
    check(are_contiguous(slots, table, positions), "slots or angles are strided")
    check(slots.dtype == torch.int64 and positions.dtype == torch.int32, "slots are not i64, or positions not i32")
    check(table.dtype == torch.float32 and table.shape[1] % 2 == 0 and table.shape[1] <= head_dim, "cos_sin")
    if norms is not None:
        fits = all(w.shape == (head_dim,) and w.dtype == torch.float32 and w.is_contiguous() for w in norms)
        check(fits, "a norm is not [head_dim] f32")
