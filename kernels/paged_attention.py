"""Causal attention of new tokens over a paged KV cache: prefill, chunked prefill and decode in one.

    a = softmax(cap(scale * q · kᵀ) + mask) v,   cap(z) = soft_cap * tanh(z / soft_cap) where soft_cap > 0

The i-th of the n new tokens of a sequence of length L (n included) has position p = L - n + i and sees the keys at
positions 0 … p, or p - window + 1 … p where window > 0. Query head h reads KV head h // (num_heads / num_kv_heads).
The new tokens' own keys and values are already in the cache (kv_write runs first).

q            [num_tokens, num_heads, head_dim]  dtype of cache; heads contiguous, tokens may be strided
cache        [2, num_blocks, block_size, num_kv_heads, head_dim]  see kv_write.py
query_start  [num_seqs + 1]         i32  tokens query_start[i]:query_start[i + 1] belong to sequence i
seq_lens     [num_seqs]             i32
block_table  [num_seqs, max_blocks] i32  entries past a sequence's length are any valid block
returns      [num_tokens, num_heads, head_dim]  contiguous

Bound: bytes for decode (keys and values of every sequence), FLOPs for prefill (4 * head_dim a query head and visible key).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Where one step's queries and keys lie: made once a step and state group, used by each of its layers.

    With `invariant` the result of a token does not depend, to the bit, on the batch around it nor on how its sequence
    was cut into chunks.
    """

    query_start: Tensor  # [num_seqs + 1] i32
    seq_lens: Tensor  # [num_seqs] i32
    block_table: Tensor  # [num_seqs, max_blocks] i32
    max_query_len: int
    max_seq_len: int
    invariant: bool = False

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(first token, end token, sequence length) of each sequence, on the host: read on a CPU only."""
        starts = self.query_start.tolist()
        return list(zip(starts[:-1], starts[1:], self.seq_lens.tolist(), strict=True))


def ref(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0, soft_cap: float = 0.0) -> Tensor:
    group, block_size = q.shape[1] // cache.shape[3], cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, (start, end, length) in enumerate(plan.spans):
        blocks = plan.block_table[i, : -(-length // block_size)].long()
        k, v = (x[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1).float() for x in cache)
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        distance = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        hidden = distance < 0 if not window else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
    return out


def paged_attention(
    q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0, soft_cap: float = 0.0
) -> Tensor:
    """Attend q [T, H, D] to the cached keys of its sequences -> [T, H, D]; ValueError when shapes do not fit."""
    if soft_cap:
        return ref(q, cache, plan, scale=scale, window=window, soft_cap=soft_cap)
    group, block_size = q.shape[1] // cache.shape[3], cache.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, (start, end, length) in enumerate(plan.spans):
        blocks = plan.block_table[i, : -(-length // block_size)].long()
        k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in cache)
        num = end - start
        queries = q[start:end].unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # [KV, group, n, D]
        if num == 1 and not window:
            mask = None
        else:
            distance = torch.arange(length - num, length)[:, None] - torch.arange(length)
            mask = distance >= 0 if not window else (distance >= 0) & (distance < window)
            mask = mask.repeat(group, 1)
        y = F.scaled_dot_product_attention(queries.flatten(1, 2)[None], k[None], v[None], attn_mask=mask, scale=scale)
        out[start:end] = y[0].unflatten(1, (group, num)).permute(2, 0, 1, 3).flatten(1, 2)
    return out
