"""Attention of one new token a sequence over a paged cache of latents, from one sequence to hundreds, of any lengths.

Formula and arguments: latent_attention.py; stretches of keys: decode_work.py. A program takes up to 64 heads through
one stretch, each latent read once as key and as value. Where a sequence has several stretches each leaves its part in
float32, and a second kernel puts them together, a head a program: one that arrives last would have too much to read.

Bound: bytes (the latents of every sequence) for up to about 64 heads, beyond that FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan
from cableway.kernels.lang import gpu_capability, jit, num_processors, tl, triton
from cableway.kernels.online_softmax import add_scores

_LEAST_STRETCH_KEYS = 128


class Tuning(NamedTuple):
    """How the work is shared out; of up to so many heads."""

    heads: int
    keys: int  # that are loaded at once
    num_warps: int
    num_stages: int
    programs_a_processor: int


_HOPPER = (Tuning(16, 32, 4, 5, 2), Tuning(32, 32, 8, 5, 2), Tuning(64, 32, 8, 4, 1))
_ANY = Tuning(16, 16, 4, 2, 1)


@jit
def add_latents(
    q_latent, q_rest, cache_ptr, table_ptr, keys_from, end_key, last_key, top, mass, sums, scale,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_REST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Take the latents from keys_from on into a softmax, up to end_key, and for a row up to its last_key [rows]."""
    latent, rest = tl.arange(0, BLOCK_RANK), RANK + tl.arange(0, BLOCK_REST)
    key = keys_from + tl.arange(0, KEYS)
    inside = key < end_key
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=inside, other=0)
    slot = (block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * WIDTH
    c_latent = tl.load(cache_ptr + slot + latent, mask=inside[:, None] & (latent < RANK)[None, :], other=0.0)
    c_rest = tl.load(cache_ptr + slot + rest, mask=inside[:, None] & (rest < WIDTH)[None, :], other=0.0)
    scores = tl.dot(q_rest, tl.trans(c_rest), input_precision="ieee")
    scores = tl.dot(q_latent, tl.trans(c_latent), scores, input_precision="ieee") * scale
    seen = inside[None, :] & (key[None, :] <= last_key[:, None])
    weights, decay, top, mass = add_scores(tl.where(seen, scores, float("-inf")), top, mass)
    sums = tl.dot(weights.to(c_latent.dtype), c_latent, sums * decay[:, None], input_precision="ieee")
    return top, mass, sums


@jit(do_not_specialize=("tops_ptr", "masses_ptr", "table_stride"))  # which vary between steps
def _latent_decode(
    q_ptr, cache_ptr, out_ptr, table_ptr, work_ptr, tops_ptr, masses_ptr, sums_ptr, scale, table_stride,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_REST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One item of the work, for HEADS heads."""
    item = tl.program_id(1)
    sequence = tl.load(work_ptr + item * 5).to(tl.int64)
    if sequence >= 0:
        first_key, end_key = tl.load(work_ptr + item * 5 + 1), tl.load(work_ptr + item * 5 + 2)
        head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
        latent, rest = tl.arange(0, BLOCK_RANK), RANK + tl.arange(0, BLOCK_REST)
        head_inside = (head < NUM_HEADS)[:, None]
        place = (sequence * NUM_HEADS + head)[:, None]
        q_latent = tl.load(q_ptr + place * WIDTH + latent, mask=head_inside & (latent < RANK)[None, :], other=0.0)
        q_rest = tl.load(q_ptr + place * WIDTH + rest, mask=head_inside & (rest < WIDTH)[None, :], other=0.0)
        top = tl.full((HEADS,), float("-inf"), tl.float32)
        mass = tl.zeros((HEADS,), tl.float32)
        sums = tl.zeros((HEADS, BLOCK_RANK), tl.float32)
        last_key = head * 0 + end_key
        for keys_from in range(first_key, end_key, KEYS):
            top, mass, sums = add_latents(
                q_latent, q_rest, cache_ptr, table_ptr + sequence * table_stride, keys_from, end_key, last_key,
                top, mass, sums, scale, WIDTH, RANK, BLOCK_SIZE, BLOCK_RANK, BLOCK_REST, KEYS,
            )  # fmt: skip
        inside = head_inside & (latent < RANK)[None, :]
        if tl.load(work_ptr + item * 5 + 4) == 1:
            y = sums / tl.where(mass == 0, 1.0, mass)[:, None]  # nobody's rows see nothing
            tl.store(out_ptr + place * RANK + latent, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            part = item.to(tl.int64) * NUM_HEADS + head
            tl.store(tops_ptr + part, top, mask=head < NUM_HEADS)
            tl.store(masses_ptr + part, mass, mask=head < NUM_HEADS)
            tl.store(sums_ptr + part[:, None] * RANK + latent[None, :], sums, mask=inside)


@jit(do_not_specialize=("tops_ptr", "masses_ptr"))  # which vary between steps
def _latent_parts(
    out_ptr, work_ptr, tops_ptr, masses_ptr, sums_ptr,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """The softmax over all keys of a sequence, of one head, from its parts; the program of the first one makes it."""
    head, item = tl.program_id(0), tl.program_id(1)
    sequence, num_parts = tl.load(work_ptr + item * 5).to(tl.int64), tl.load(work_ptr + item * 5 + 4)
    if (sequence >= 0) & (num_parts > 1) & (tl.load(work_ptr + item * 5 + 3) == item):
        latent = tl.arange(0, BLOCK_RANK)
        top, mass = float("-inf"), 0.0
        sums = tl.zeros((BLOCK_RANK,), tl.float32)
        for first in range(0, num_parts, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            place = (item + part).to(tl.int64) * NUM_HEADS + head
            tops = tl.load(tops_ptr + place, mask=part < num_parts, other=float("-inf"))
            masses = tl.load(masses_ptr + place, mask=part < num_parts, other=0.0)
            inside = (part < num_parts)[:, None] & (latent < RANK)[None, :]
            parts = tl.load(sums_ptr + place[:, None] * RANK + latent[None, :], mask=inside, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            weights, decay = tl.exp(tops - new_top), tl.exp(top - new_top)
            mass = mass * decay + tl.sum(weights * masses, 0)
            sums = sums * decay + tl.sum(weights[:, None] * parts, 0)
            top = new_top
        place = (sequence * NUM_HEADS + head) * RANK + latent
        tl.store(out_ptr + place, (sums / mass).to(out_ptr.dtype.element_ty), mask=latent < RANK)


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, rank: int) -> Tensor:
    """out [T, H, rank], written for the sequences that come first and bring one token each."""
    tuning = _ANY
    if gpu_capability() == 90 and q.dtype != torch.float32:
        tuning = next((t for t in _HOPPER if q.shape[1] <= t.heads), _HOPPER[-1])
    return launch_tuned(q, cache, plan, tuning, scale=scale, rank=rank)


def launch_tuned(q: Tensor, cache: Tensor, plan: AttentionPlan, tuning: Tuning, *, scale: float, rank: int) -> Tensor:
    (num_tokens, num_heads, width), num_seqs = q.shape, len(plan.seq_lens)
    num_tiles = triton.cdiv(num_heads, tuning.heads)
    num_places = max(num_processors() * tuning.programs_a_processor // num_tiles, 1)
    # As many stretches of sequences of one length as there are places for at once, and not some more.
    num_shares = max(num_places // num_seqs, 1) * min(num_seqs, num_places)
    work, _ = plan.decode_work(
        num_shares=num_shares, tile=tuning.keys, least_tiles=_LEAST_STRETCH_KEYS // tuning.keys, num_kv_heads=1,
        window=0,
    )  # fmt: skip
    out = torch.empty(num_tokens, num_heads, rank, dtype=q.dtype, device=q.device)
    num_parts = len(work) * num_heads
    parts = torch.empty(num_parts * (rank + 2), dtype=torch.float32, device=q.device)
    sums, tops, masses = parts.split((num_parts * rank, num_parts, num_parts))
    block_rank = max(triton.next_power_of_2(rank), 16)
    _latent_decode[(num_tiles, len(work))](
        q, cache, out, plan.block_table, work, tops, masses, sums, scale, plan.block_table.stride(0),
        NUM_HEADS=num_heads, WIDTH=width, RANK=rank, BLOCK_SIZE=cache.shape[2], HEADS=tuning.heads,
        BLOCK_RANK=block_rank, BLOCK_REST=max(triton.next_power_of_2(width - rank), 16), KEYS=tuning.keys,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
    _latent_parts[(num_heads, len(work))](
        out, work, tops, masses, sums, NUM_HEADS=num_heads, RANK=rank, BLOCK_RANK=block_rank, BLOCK_PARTS=8, num_warps=4
    )
    return out
