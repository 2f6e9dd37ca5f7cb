"""Scores by which a sparse attention chooses the keys of a token, over a paged cache of one narrow key a token.

    s[t, j] = sum over h of w[t, h] max(q[t, h] · k[j], 0) of the first length[t] keys of its sequence; -inf of others

q         [num_tokens, num_heads, head_dim]           dtype of cache, contiguous
w         [num_tokens, num_heads]                     f32, contiguous
cache     [1, num_blocks, block_size, 1, head_dim]    bf16|f16|f32, contiguous; see latent_write.py
tokens    a TokenPlan: whose each token is, and how many keys it sees
returns   [num_tokens, max_keys] f32

Bound: bytes for few tokens (the keys of their sequences), FLOPs for many (2 * num_heads * head_dim a pair).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, Call, call, check, grid, kernel, nbytes


@dataclass(frozen=True)
class TokenPlan:
    """Where the keys of each token's sequence lie."""

    sequence: Tensor  # [num_tokens] i64, contiguous: row of the block table
    lengths: Tensor  # [num_tokens] i32, contiguous: keys it sees; 0 of nobody's
    block_table: Tensor  # [num_seqs, max_blocks] i32, rows may be strided
    max_keys: int  # that any of them sees

    def split(self, num: int) -> list[TokenPlan]:
        """`num` tokens each time."""
        parts = zip(self.sequence.split(num), self.lengths.split(num), strict=True)
        return [TokenPlan(*part, self.block_table, self.max_keys) for part in parts]


def ref(q: Tensor, w: Tensor, cache: Tensor, tokens: TokenPlan) -> Tensor:
    block_size = cache.shape[2]
    scores = torch.full((len(q), tokens.max_keys), float("-inf"), device=q.device)
    for token, (sequence, length) in enumerate(zip(tokens.sequence.tolist(), tokens.lengths.tolist(), strict=True)):
        blocks = tokens.block_table[sequence, : -(-length // block_size)].long()
        k = cache[0, blocks, :, 0].flatten(0, 1)[:length].float()
        scores[token, :length] = w[token] @ (q[token].float() @ k.T).relu()
    return scores


@jit(do_not_specialize=("table_stride", "max_keys"))  # which vary between steps
def _index_scores(
    q_ptr, w_ptr, cache_ptr, out_ptr, sequence_ptr, lengths_ptr, table_ptr, table_stride, max_keys,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One token and a tile of keys."""
    token, key = tl.program_id(0).to(tl.int64), tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    length = tl.load(lengths_ptr + token)
    key_inside = key < length
    scores = tl.full((KEYS,), float("-inf"), tl.float32)
    if tl.program_id(1) * KEYS < length:
        head, dim = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
        inside = (head < NUM_HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
        place = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(q_ptr + place, mask=inside, other=0.0)
        w = tl.load(w_ptr + token * NUM_HEADS + head, mask=head < NUM_HEADS, other=0.0)
        table_ptr += tl.load(sequence_ptr + token) * table_stride
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key_inside, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(cache_ptr + place, mask=key_inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        products = tl.maximum(tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
        scores = tl.where(key_inside, tl.sum(products * w[:, None], 0), scores)
    tl.store(out_ptr + token * max_keys + key, scores, mask=key < max_keys)


def launch(q: Tensor, w: Tensor, cache: Tensor, tokens: TokenPlan) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(num_tokens, tokens.max_keys, dtype=torch.float32, device=q.device)
    keys = 32 if q.dtype == torch.float32 else 64
    _index_scores[(num_tokens, triton.cdiv(tokens.max_keys, keys))](
        q, w, cache, out, tokens.sequence, tokens.lengths, tokens.block_table, tokens.block_table.stride(0),
        tokens.max_keys, NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_SIZE=cache.shape[2],
        BLOCK_HEADS=max(triton.next_power_of_2(num_heads), 16), BLOCK_DIM=max(triton.next_power_of_2(head_dim), 16),
        KEYS=keys, num_warps=4,
    )  # fmt: skip
    return out


def make(
    lengths, heads: tuple[int, int], dtype: torch.dtype, block_size: int = 16, more: int = 0, device: str = "cpu"
) -> Call:
    """`lengths`: keys that each token sees; two tokens a sequence. `heads`: num_heads, head_dim."""
    num_heads, head_dim = heads
    num_seqs, width = -(-len(lengths) // 2), -(-max(lengths) // block_size) + 1
    table = torch.randperm(num_seqs * width, device=device).view(num_seqs, width).int()
    tokens = TokenPlan(
        torch.arange(len(lengths), device=device) // 2,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table,
        max(lengths) + more,
    )
    q = torch.randn(len(lengths), num_heads, head_dim, device=device).to(dtype)
    cache = torch.randn(1, table.numel(), block_size, 1, head_dim, device=device).to(dtype)
    return call(q, torch.randn(len(lengths), num_heads, device=device), cache, tokens)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(lengths=((5, 70, 0, 33, 1),), heads=((6, 20), (64, 128)), dtype=FLOATS, more=(0, 40)),
    bench_cases=grid(lengths=((4096,) * 64,), heads=((64, 128),), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: nbytes(c.args[2][0, 0, 0]) * int(c.args[3].lengths.sum()),
    num_flops=lambda c: 2 * c.args[0][0].numel() * int(c.args[3].lengths.sum()),
    tolerances={torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 4e-1},
)
def index_scores(q: Tensor, w: Tensor, cache: Tensor, tokens: TokenPlan) -> Tensor:
    """Scores [T, max_keys] of all keys for q [T, H, D] with w [T, H]; ValueError when shapes or dtypes do not fit."""
    check(q.dim() == 3 and q.is_contiguous() and q.dtype in FLOATS, "q is not [T, H, D], contiguous")
    check(w.shape == q.shape[:2] and w.dtype == torch.float32 and w.is_contiguous(), "w is not [T, H] f32")
    check(cache.dim() == 5 and cache.shape[0] == cache.shape[3] == 1 and cache.shape[4] == q.shape[2], "cache")
    check(cache.dtype == q.dtype and cache.is_contiguous(), "cache does not fit q")
    check(tokens.sequence.dtype == torch.int64 and len(tokens.sequence) == len(tokens.lengths) == len(q), "tokens")
    return _on_cpu(q, w, cache, tokens) if q.is_cpu else launch(q, w, cache, tokens)


def _on_cpu(q: Tensor, w: Tensor, cache: Tensor, tokens: TokenPlan) -> Tensor:
    """Sequence by sequence."""
    scores = torch.full((len(q), tokens.max_keys), float("-inf"))
    for sequence in tokens.sequence.unique().tolist():
        own = (tokens.sequence == sequence).nonzero()[:, 0]
        lengths = tokens.lengths[own]
        num_keys = int(lengths.max())
        blocks = tokens.block_table[sequence, : -(-num_keys // cache.shape[2])].long()
        k = cache[0, blocks, :, 0].flatten(0, 1)[:num_keys].float()
        products = torch.einsum("thd,kd->thk", q[own].float(), k).relu_()
        found = torch.einsum("thk,th->tk", products, w[own])
        scores[own, :num_keys] = found.masked_fill_(torch.arange(num_keys) >= lengths[:, None], float("-inf"))
    return scores
