"""Paged attention on a CPU: what `paged_attention` runs there.

Sequences that bring one token are a loop over their keys where they lie. The others go one by one in plain torch, in
tiles of query tokens, so that a tile's scores stay in the processor's cache and keys after its last token cost nothing.

PERF (one thread, 9 heads on 3 KV heads of 64, bfloat16): 512 tokens 3.6 ms in tiles, 11.3 ms by torch's own causal
attention. The products leave scores in bfloat16 where q is: beside the other roundings this does not show
(SmolLM2-135M, KL to float32 0.0011 either way).

Invariant form: a tile is the positions 16 i … 16 i + 15 whatever part of them a chunk brings, rows that it does not
bring are zero, and the keys end with the tile. So every product's shape, and with it the order of its sums, is a
function of the position alone.

Key: n sequences that bring one token, P gathered positions of another, R rows of a tile, G query heads of a KV head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.kv_cache import NO_SCALES, KVScales, block_size_of, numbers
from cableway.kernels.lang import loops

if TYPE_CHECKING:
    from cableway.kernels.attention_plan import AttentionPlan, Scores

_TILE = 128
_INVARIANT_TILE = 16
_KEY_STEP = 64
"""Keys are padded to a multiple of this: oneDNN compiles a product anew for every shape it has not seen."""
_FEW_SCORES = 1 << 12
"""Up to this many scores a head, torch's own attention is the faster form of a tile."""


class Tile(NamedTuple):
    """Query tokens that are multiplied together, `start:end` of the step's, and their keys `first_key:last_key`."""

    start: int
    end: int
    rows_before: int  # zero rows, for positions that the chunk does not bring
    rows_after: int
    first_key: int
    last_key: int
    mask: Tensor  # [R, 1, k]: of the last k keys, 0 where the token sees, else -inf; all see the keys before


class Chunk(NamedTuple):
    """A sequence that brings several tokens. Keys count from the first gathered position."""

    blocks: Tensor  # [P / block_size] i32
    num_keys: int
    start: int  # first token
    num_tokens: int
    tiles: list[Tile]


class HostPlan(NamedTuple):
    """An AttentionPlan worked out for the CPU: once a step, used by each layer."""

    singles: Tensor  # [n, 3] i64: (row of the block table, token, length) of sequences that bring one token
    most_keys: int  # that one of them sees
    mean_keys: int
    chunks: list[Chunk]
    nobodies: list[tuple[int, int]]  # tokens start:end of sequences of length 0

    @classmethod
    def of(cls, plan: AttentionPlan, block_size: int, window: int, dtype: torch.dtype) -> HostPlan:
        table = plan.block_table.numpy()
        singles, chunks, nobodies = [], [], []
        for index, (start, end, length) in enumerate(plan.spans):
            if not length:
                nobodies.append((start, end))
            elif end - start == 1 and not plan.invariant:
                singles.append((index, start, length))
            elif end > start:
                tiles = _tiles(start, end, length, window, dtype, plan.invariant)
                chunks.append(_chunk(table[index], tiles, length, block_size))
        keys = [min(length, window or length) for _, _, length in singles] or [0]
        return cls(torch.tensor(singles, dtype=torch.int64), max(keys), sum(keys) // len(keys), chunks, nobodies)


def _tiles(start: int, end: int, length: int, window: int, dtype: torch.dtype, invariant: bool) -> list[Tile]:
    """The tiles of one sequence's new tokens; keys are positions here."""
    tile_len, key_step = (_INVARIANT_TILE, _INVARIANT_TILE) if invariant else (_TILE, _KEY_STEP)
    before = length - (end - start)  # tokens computed earlier
    tiles = []
    for first in range(before - before % tile_len if invariant else before, length, tile_len):
        last = first + tile_len if invariant else min(first + tile_len, length)
        first_key = max(first - window + 1, 0) // key_step * key_step if window else 0
        last_key = _up(last, key_step)
        few = not invariant and _is_few(last - first, last_key - first_key)
        masked_from = first_key if few or (window and last - window > first_key) else first
        position, key = np.arange(first, last)[:, None], np.arange(masked_from, last_key)
        seen = (key <= position) & (key > position - window) if window else key <= position
        here, there = max(first, before), min(last, length)
        shift = start - before
        tiles.append(
            Tile(here + shift, there + shift, here - first, last - there, first_key, last_key, _mask(seen, dtype))
        )
    return tiles


def _chunk(blocks: np.ndarray, tiles: list[Tile], length: int, block_size: int) -> Chunk:
    """Keys of the tiles now count from the first block that any of them needs."""
    first = tiles[0].first_key // block_size
    column = np.arange(first, -(-tiles[-1].last_key // block_size))
    column = np.where(column * block_size < length, column, first)
    shift = first * block_size
    tiles = [tile._replace(first_key=tile.first_key - shift, last_key=tile.last_key - shift) for tile in tiles]
    start = tiles[0].start
    return Chunk(torch.from_numpy(blocks[column]), length - shift, start, tiles[-1].end - start, tiles)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _mask(seen: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf"))).to(dtype)[:, None]


def _is_few(num_rows: int, num_keys: int) -> bool:
    """Whether a tile is small enough for torch's own attention."""
    return num_rows * num_keys <= _FEW_SCORES


class Heads(NamedTuple):
    num_kv_heads: int
    group: int  # G
    head_dim: int


def attend(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES) -> Tensor:
    """q [T, H, D] -> [T, H, D]; see `paged_attention`."""
    if q.dtype == torch.float16:  # CPUs have no fast products of it
        return attend(q.float(), cache, plan, scores, scales).half()
    if scales != NO_SCALES:
        y = attend(q, cache, plan, replace(scores, scale=scores.scale * scales.key))
        return y.mul_(scales.value)
    (_, _, _, num_kv_heads, head_dim), block_size = cache.shape, block_size_of(cache)
    host = plan.on_host(block_size, scores.window, q.dtype)
    heads = Heads(num_kv_heads, q.shape[1] // num_kv_heads, head_dim)
    slopes, sinks = scores.slopes if scores.biases is None else scores.biases, scores.sinks
    out = torch.empty(q.shape, dtype=q.dtype)
    for start, end in host.nobodies:
        out[start:end] = 0
    if len(host.singles):
        operations = 3 * heads.group * head_dim * host.mean_keys
        loops.run(
            loops.attend, len(host.singles) * num_kv_heads, operations, q.data_ptr(), q.stride(0), out.data_ptr(),
            loops.KINDS[q.dtype], plan.block_table.data_ptr(), plan.block_table.stride(0), host.singles.data_ptr(),
            host.most_keys, heads.group, scores.window,
            0 if slopes is None else slopes.data_ptr(), 0 if scores.biases is None else scores.biases.shape[1] - 1,
            0 if sinks is None else sinks.data_ptr(),
            *loops.integers_of(cache), scores.scale, scores.soft_cap,
        )  # fmt: skip
    if host.chunks:
        keys, values = cache.unbind()
        for chunk in host.chunks:
            _attend_chunk(q, keys, values, chunk, heads, scores, out, invariant=plan.invariant)
    return out


def _gather(blocks: Tensor, index: Tensor, heads: Heads, dtype: torch.dtype) -> Tensor:
    """Keys or values [P, KV * D] of the blocks [num_blocks, block_rows, KV, D] in `index`."""
    return numbers(blocks.index_select(0, index)[None], dtype).view(-1, heads.num_kv_heads * heads.head_dim)


def _attend_chunk(
    q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, heads: Heads, scores: Scores, out: Tensor, *, invariant: bool
) -> None:
    """Attention of one sequence's new tokens, q and out [T, H, D]."""
    # Whether torch's own attention computes the same.
    is_shaped = any(x is not None for x in (scores.slopes, scores.sinks, scores.biases))
    is_plain = not (invariant or scores.soft_cap or is_shaped)
    k, v = _gather(keys, chunk.blocks, heads, q.dtype), _gather(values, chunk.blocks, heads, q.dtype)
    k[chunk.num_keys :] = 0
    v[chunk.num_keys :] = 0
    num_kv_heads, group, head_dim = heads
    k, v = (x.view(-1, num_kv_heads, head_dim).transpose(0, 1) for x in (k, v))
    q, out = (x.unflatten(1, (num_kv_heads, group)) for x in (q, out))
    for tile in chunk.tiles:
        rows = q[tile.start : tile.end]
        if tile.rows_before or tile.rows_after:
            rows = F.pad(rows, (0, 0, 0, 0, 0, 0, tile.rows_before, tile.rows_after))
        num_rows = len(rows)
        rows = rows.transpose(0, 1).reshape(num_kv_heads, num_rows * group, head_dim)
        k_tile, v_tile = k[:, tile.first_key : tile.last_key], v[:, tile.first_key : tile.last_key]
        if is_plain and _is_few(num_rows, k_tile.shape[1]):
            mask = tile.mask.expand(-1, group, -1).flatten(0, 1)
            y = F.scaled_dot_product_attention(
                rows[None], k_tile[None], v_tile[None], attn_mask=mask, scale=scores.scale
            )[0]
        else:
            z = _products(rows, k_tile.transpose(1, 2), scores).view(num_kv_heads, num_rows, group, -1)
            if scores.slopes is not None:
                z += (_by_head(scores.slopes, heads) * _distances(tile, chunk)).to(z.dtype)
            if scores.biases is not None:
                back = (-_distances(tile, chunk)).clamp(0, scores.biases.shape[1] - 1)[:, 0]
                z += scores.biases[:, back].unflatten(0, (num_kv_heads, group)).transpose(1, 2).to(z.dtype)
            z[..., -tile.mask.shape[-1] :] += tile.mask
            sinks = None if scores.sinks is None else _by_head(scores.sinks, heads)
            y = torch.bmm(_weights(z, sinks).flatten(1, 2), v_tile)
        y = y.unflatten(1, (num_rows, group))[:, tile.rows_before : num_rows - tile.rows_after]
        out[tile.start : tile.end] = y.transpose(0, 1)


def _distances(tile: Tile, chunk: Chunk) -> Tensor:
    """How far each key lies from each token of a tile, [R, 1, k], negative where it lies before."""
    num_rows = tile.rows_before + tile.end - tile.start + tile.rows_after
    position = chunk.num_keys - chunk.num_tokens - tile.rows_before + tile.start - chunk.start + torch.arange(num_rows)
    return (torch.arange(tile.first_key, tile.last_key) - position[:, None])[:, None]


def _weights(z: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [KV, R, G, k], with a score more a head that nothing is read for."""
    if sinks is None:
        return z.softmax(-1)
    return torch.cat((z, sinks.to(z.dtype).expand(*z.shape[:-1], 1)), -1).softmax(-1)[..., :-1]


def _by_head(x: Tensor, heads: Heads) -> Tensor:
    """x [H] -> [KV, 1, G, 1]"""
    return x.view(heads.num_kv_heads, 1, heads.group, 1)


def _products(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """scale * q [b, m, d] @ k [b, d, n], capped where soft_cap > 0."""
    z, cap = torch.baddbmm(q.new_empty(1), q, k, beta=0, alpha=scores.scale), scores.soft_cap
    return z.div_(cap).tanh_().mul_(cap) if cap else z
