"""Attention within whole sequences, in both directions: what encoders do.

    a = softmax(scale * q · kᵀ + bias[h, R + min(max(key - query, -R), R)]) v

q, k, v    [num_tokens, num_heads, head_dim]  bf16|f16|f32; heads contiguous, tokens may be strided
sequences  Sequences: which tokens each has
bias       [num_heads, 2 R + 1] f32, contiguous, of distances; or None
returns    [num_tokens, num_heads, head_dim]  contiguous

Bound: FLOPs, 4 * head_dim a head and pair of tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, Call, call, check, grid, kernel, nbytes


@dataclass(frozen=True)
class Sequences:
    """Tokens query_start[i]:query_start[i + 1] are sequence i."""

    query_start: Tensor  # [num_seqs + 1] i32, contiguous
    max_len: int  # tokens of the longest, at least

    def spans(self) -> list[tuple[int, int]]:
        """(first token, end token) of each, on the host: waits for the device."""
        return list(itertools.pairwise(self.query_start.tolist()))


def ref(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, bias: Tensor | None, *, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, end in sequences.spans():
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), k[start:end].float()) * scale
        if bias is not None:
            scores = scores + by_distance(bias, end - start)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end].float()).to(q.dtype)
    return out


def by_distance(bias: Tensor, num_tokens: int) -> Tensor:
    """bias [H, 2 R + 1] -> that of each pair of tokens [H, queries, keys]"""
    reach, place = bias.shape[1] // 2, torch.arange(num_tokens, device=bias.device)
    return bias[:, (place - place[:, None]).clamp(-reach, reach) + reach]


@jit(do_not_specialize=("query_start_ptr",))
def _whole_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, query_start_ptr, bias_ptr, scale, q_stride, k_stride, v_stride, num_heads, reach,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """A tile of query tokens of one sequence, for one head."""
    head, sequence, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TILE
    start = tl.load(query_start_ptr + sequence).to(tl.int64)
    length = (tl.load(query_start_ptr + sequence + 1) - start).to(tl.int32)
    if first < length:
        query, dim = first + tl.arange(0, TILE), tl.arange(0, BLOCK_DIM)
        element, dim_inside = head * HEAD_DIM + dim, dim < HEAD_DIM
        inside = (query < length)[:, None] & dim_inside[None, :]
        q = tl.load(q_ptr + (start + query)[:, None] * q_stride + element[None, :], mask=inside, other=0.0)
        top = tl.full((TILE,), float("-inf"), tl.float32)
        mass = tl.zeros((TILE,), tl.float32)
        sums = tl.zeros((TILE, BLOCK_DIM), tl.float32)
        for keys_from in range(0, length, KEYS):
            key = keys_from + tl.arange(0, KEYS)
            key_inside = key < length
            kv_inside = key_inside[:, None] & dim_inside[None, :]
            token = (start + key)[:, None]
            k = tl.load(k_ptr + token * k_stride + element[None, :], mask=kv_inside, other=0.0)
            v = tl.load(v_ptr + token * v_stride + element[None, :], mask=kv_inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_BIAS:
                distance = tl.minimum(tl.maximum(key[None, :] - query[:, None], -reach), reach) + reach
                scores += tl.load(bias_ptr + head * (2 * reach + 1) + distance)
            scores = tl.where(key_inside[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            decay = tl.exp(top - new_top)
            mass = mass * decay + tl.sum(weights, 1)
            sums = sums * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        place = ((start + query) * num_heads)[:, None] * HEAD_DIM + element[None, :]
        tl.store(out_ptr + place, (sums / mass[:, None]).to(q.dtype), mask=inside)


def launch(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, bias: Tensor | None, *, scale: float) -> Tensor:
    (_, num_heads, head_dim), num_seqs = q.shape, len(sequences.query_start) - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    keys = min(max((1 << 13) // (block_dim * q.element_size()), 16), 64)
    _whole_attention[(num_heads, num_seqs, triton.cdiv(sequences.max_len, 64))](
        q, k, v, out, sequences.query_start, q if bias is None else bias, scale, q.stride(0), k.stride(0), v.stride(0),
        num_heads, 0 if bias is None else bias.shape[1] // 2, HEAD_DIM=head_dim, HAS_BIAS=bias is not None, TILE=64,
        KEYS=keys, BLOCK_DIM=block_dim, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def make(
    lengths, heads: tuple[int, int], dtype: torch.dtype, reach: int = 0, more: int = 0, device: str = "cpu"
) -> Call:
    """`lengths`: of the sequences. `heads`: num_heads, head_dim. `more`: by how much the longest may be longer."""
    num_heads, head_dim = heads
    qkv = torch.randn(sum(lengths), 3 * num_heads, head_dim, device=device).to(dtype)
    starts = torch.tensor((0, *lengths), device=device).cumsum(0).int()
    bias = torch.randn(num_heads, 2 * reach + 1, device=device) if reach else None
    sequences = Sequences(starts, max(lengths) + more)
    return call(*qkv.split(num_heads, 1), sequences, bias, scale=2 * head_dim**-0.5)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(lengths=((5, 70, 1, 33),), heads=((3, 64), (4, 20)), dtype=FLOATS, reach=(0, 9), more=(0, 90)),
        *grid(lengths=((100,),), heads=((2, 128),), dtype=FLOATS, reach=(200,)),
    ],
    bench_cases=grid(lengths=((512,) * 8,), heads=((16, 64),), dtype=(torch.bfloat16,), reach=(0, 128)),
    num_bytes=lambda c: 4 * nbytes(c.args[0]),
    num_flops=lambda c: (
        4 * c.args[0].shape[1] * c.args[0].shape[2] * sum((end - start) ** 2 for start, end in c.args[3].spans())
    ),
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2},
)
def whole_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, bias: Tensor | None, *, scale: float
) -> Tensor:
    """Attend q to the keys of its sequence, all [T, H, D], before and behind; ValueError when shapes do not fit."""
    check(q.dim() == 3 and q.shape == k.shape == v.shape, "q, k and v are not [T, H, D]")
    check(all(x.stride()[1:] == (q.shape[2], 1) and x.dtype in FLOATS for x in (q, k, v)), "heads are not contiguous")
    check(q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype")
    if bias is not None:
        check(bias.dim() == 2 and bias.shape[0] == q.shape[1] and bias.shape[1] % 2 == 1, "bias is not [H, 2 R + 1]")
        check(bias.dtype == torch.float32 and bias.is_contiguous(), "bias is strided, or not f32")
    if not q.is_cpu:
        return launch(q, k, v, sequences, bias, scale=scale)
    return _on_cpu(q, k, v, sequences.spans(), bias, scale)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], bias: Tensor | None, scale: float) -> Tensor:
    if q.dtype == torch.float16:  # CPUs have no fast products of it
        return _on_cpu(q.float(), k.float(), v.float(), spans, bias, scale).half()
    out = torch.empty(q.shape, dtype=q.dtype)
    for start, end in spans:
        heads = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        mask = None if bias is None else by_distance(bias, end - start).to(q.dtype)[None]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)
        out[start:end] = y[0].transpose(0, 1)
    return out
