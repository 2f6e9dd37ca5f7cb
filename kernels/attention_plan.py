"""What attention over a paged KV cache is told and must compute, whatever kernel does it.

    a = softmax(cap(scale * q · kᵀ) + mask) v,   cap(z) = soft_cap * tanh(z / soft_cap) where soft_cap > 0

With `slopes` (ALiBi) the mask falls by slopes[h] for each position that a key lies back; with `biases` it is
biases[h, min(d, R)] for a key that lies d positions back; with `sinks` the softmax has
one score more, sinks[h], that nothing is read for.

The i-th of the n new tokens of a sequence of length L (n included) has position p = L - n + i and sees the keys at
positions 0 … p, or p - window + 1 … p where window > 0, or p - p % chunk … p where chunk > 0, which is a multiple of
block_size. Query head h reads KV head h // (num_heads / num_kv_heads).
The new tokens' own keys and values are already in the cache: kv_write runs first.

q            [num_tokens, num_heads, head_dim]  bf16|f16|f32; heads contiguous, tokens may be strided
cache        [2, num_blocks, block_rows, num_kv_heads, head_dim]  dtype of q, or of 8 bits; see kv_cache.py
plan         an AttentionPlan: which tokens and which blocks each sequence has
scores       a Scores: scale, window, soft_cap, slopes, sinks, chunk and biases
scales       of keys and of values, where the cache is f8
returns      [num_tokens, num_heads, head_dim]  contiguous
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cableway.kernels import decode_work, level_work, prefill_work
from cableway.kernels.cpu import attention as cpu_attention
from cableway.kernels.cuda import Constants
from cableway.kernels.kv_cache import NO_SCALES, KVScales, block_size_of, cache_of, check_cache, numbers, scales_of
from cableway.kernels.registry import Call, call, check, nbytes

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Scores:
    """What makes weights of products of queries and keys: the same in every step."""

    scale: float
    window: int = 0  # keys that a token sees, its own included; 0 = all before it
    soft_cap: float = 0.0
    slopes: Tensor | None = None  # [num_heads] f32
    sinks: Tensor | None = None  # [num_heads] f32
    chunk: int = 0  # positions are cut into chunks of so many, and a token sees its own chunk; 0 = they are not
    biases: Tensor | None = None  # [num_heads, R + 1] f32, contiguous; not beside slopes

    def in_powers_of_two(self) -> tuple[float, float]:
        """(scale, cap) for kernels whose weights are 2^score; with a cap, whose tanh(z) is 1 - 2 / (1 + exp(2 z))."""
        if self.soft_cap:
            return 2 * self.scale / self.soft_cap * LOG2_E, self.soft_cap * LOG2_E
        return self.scale * LOG2_E, 0.0


@dataclass(frozen=True)
class AttentionPlan:
    """Where one step's queries and keys lie: made once a step and state group, used by each of its layers.

    With `invariant` the result of a token does not depend, to the bit, on the batch around it nor on how its sequence
    was cut into chunks.
    """

    query_start: Tensor  # [num_seqs + 1] i32; tokens query_start[i]:query_start[i + 1] belong to sequence i
    seq_lens: Tensor  # [num_seqs] i32; tokens computed before, and the new ones; 0 of nobody, whose result is zeros
    block_table: Tensor  # [num_seqs, max_blocks] i32; entries past a sequence's length are not read
    max_query_len: int
    max_seq_len: int
    invariant: bool = False
    may_have_singles: bool = True  # whether the first sequence may bring one token
    _host_plans: dict[tuple, cpu_attention.HostPlan] = field(default_factory=dict)
    _decode_works: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _level_works: dict[tuple, level_work.LevelWork] = field(default_factory=dict)
    _prefill_works: dict[tuple, Tensor] = field(default_factory=dict)
    _heavy_prefill_works: dict[tuple, Tensor] = field(default_factory=dict)
    _chunked: dict[tuple, AttentionPlan] = field(default_factory=dict)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(first token, end token, sequence length) of each sequence, on the host: waits for the device."""
        starts = self.query_start.tolist()
        return list(zip(starts[:-1], starts[1:], self.seq_lens.tolist(), strict=True))

    def on_host(self, block_size: int, window: int, dtype: torch.dtype) -> cpu_attention.HostPlan:
        """What the CPU form works from; made by the first layer that asks."""
        key = block_size, window, dtype
        if key not in self._host_plans:
            self._host_plans[key] = cpu_attention.HostPlan.of(self, *key)
        return self._host_plans[key]

    def decode_work(self, **options) -> tuple[Tensor, Tensor]:
        """What the programs of paged_decode.py work from, see decode_work.py; made by the first layer that asks."""
        key = tuple(options.items())
        if key not in self._decode_works:
            self._decode_works[key] = decode_work.launch(self.query_start, self.seq_lens, **options)
        return self._decode_works[key]

    def has_level_work(self, **options) -> bool:
        """Whether a layer has asked for it before: to the first one it comes from the kernel right before."""
        return tuple(options.items()) in self._level_works

    def level_work(self, **options) -> level_work.LevelWork:
        """What programs with equal shares of keys work from, see level_work.py; made by the first layer that asks."""
        key = tuple(options.items())
        if key not in self._level_works:
            self._level_works[key] = level_work.launch(self.query_start, self.seq_lens, **options)
        return self._level_works[key]

    def prefill_work(self, **options) -> Tensor:
        """What programs that take tiles of query tokens work from, see prefill_work.py; made by the first layer."""
        key = tuple(options.items())
        if key not in self._prefill_works:
            self._prefill_works[key] = prefill_work.launch(self.query_start, **options)
        return self._prefill_works[key]

    def heavy_prefill_work(self, **options) -> Tensor:
        """The same, those first whose tokens see most keys: for programs that take them in turns."""
        if len(self.seq_lens) == 1:  # of one sequence they stand so
            return self.prefill_work(**options)
        key = tuple(options.items())
        if key not in self._heavy_prefill_works:
            work = self.prefill_work(**options)
            self._heavy_prefill_works[key] = prefill_work.heavy_first(work, self.query_start, self.seq_lens)
        return self._heavy_prefill_works[key]

    def in_chunks(self, chunk: int, block_size: int, num_tokens: int) -> AttentionPlan:
        """The same tokens, each of which sees its own chunk; made by the first layer that asks.

        A sequence is taken apart into one for each chunk that its new tokens touch, whose blocks begin where the chunk
        does. Their order stays; those that are left over, as shapes may not depend on lengths, are nobody's.
        """
        check(chunk % block_size == 0, f"chunks of {chunk} tokens are not whole blocks of {block_size}")
        if (key := (chunk, block_size)) not in self._chunked:
            self._chunked[key] = _in_chunks(self, chunk, block_size, num_tokens)
        return self._chunked[key]


def _in_chunks(plan: AttentionPlan, chunk: int, block_size: int, num_tokens: int) -> AttentionPlan:
    starts, lengths = plan.query_start.long(), plan.seq_lens.long()
    num_seqs, (_, width) = len(lengths), plan.block_table.shape
    before = (lengths - starts.diff()).clamp(min=0)
    first = before // chunk
    num_touched = (lengths - 1).clamp(min=0) // chunk - first + 1
    ends = num_touched.cumsum(0)
    # n > 1 new tokens touch at most n // chunk + 2 chunks.
    num_pieces = (
        num_seqs if plan.max_query_len == 1 else num_seqs + num_tokens // chunk + min(num_seqs, num_tokens // 2)
    )
    piece = torch.arange(num_pieces, device=lengths.device)
    sequence = torch.searchsorted(ends, piece, right=True).clamp(max=num_seqs - 1)
    is_left_over = piece >= ends[-1]
    begin = (first + num_touched - ends)[sequence].add_(piece).mul_(chunk)
    query_start = starts[sequence] + (begin - before[sequence]).clamp(min=0)
    query_start = torch.cat((query_start.where(~is_left_over, starts[-1]), starts[-1:]))
    seq_lens = (lengths[sequence] - begin).clamp(0, chunk).masked_fill(is_left_over, 0)
    columns = begin[:, None] // block_size + torch.arange(min(chunk // block_size, width), device=begin.device)
    return AttentionPlan(
        query_start.int(),
        seq_lens.int(),
        plan.block_table[sequence[:, None], columns.clamp(max=width - 1)],
        min(plan.max_query_len, chunk),
        min(plan.max_seq_len, chunk),
        plan.invariant,
    )


def macros(q: Tensor, cache: Tensor, scores: Scores) -> Constants:
    """What every kernel of attention in CUDA C++ is compiled for."""
    (_, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    return (
        ("T_NAME", '"bf16"' if q.dtype == torch.bfloat16 else '"f16"'),
        ("HEAD_DIM", head_dim), ("NUM_KV_HEADS", num_kv_heads), ("GROUP", num_heads // num_kv_heads),
        ("BLOCK_SIZE", block_size_of(cache)),
        ("HAS_CAP", int(scores.soft_cap > 0)), ("HAS_WINDOW", int(scores.window > 0)),
        ("HAS_SLOPES", int(scores.slopes is not None)), ("HAS_SINKS", int(scores.sinks is not None)),
    )  # fmt: skip


def num_bytes(made: Call) -> int:
    """Queries and results once, and every key and value of each sequence."""
    q, cache, plan, *_ = made.args
    return 2 * nbytes(q) + nbytes(cache[:, 0, 0]) * sum(length for _, _, length in plan.spans)


def check_fits(q: Tensor, cache: Tensor, scores: Scores) -> None:
    """Raise ValueError where q, the cache, or slopes and sinks are not what the contract says."""
    if scores.biases is not None:
        check(scores.biases.dim() == 2 and scores.biases.shape[0] == q.shape[1], "biases are not [H, R + 1]")
        check(scores.biases.dtype == torch.float32 and scores.biases.is_contiguous(), "biases are strided, or not f32")
        check(scores.slopes is None and scores.biases.shape[1] > 1, "biases beside slopes, or of nothing")
    for x in (scores.slopes, scores.sinks):
        check(x is None or (x.shape == q.shape[1:2] and x.dtype == torch.float32), "slopes or sinks are not [H] f32")
    check(q.dim() == 3 and q.stride()[1:] == (q.shape[2], 1), "q is not [T, H, D] with contiguous heads")
    check_cache(cache, q.dtype)
    check(cache.shape[4] == q.shape[2], "cache does not fit q")
    check(q.shape[1] % cache.shape[3] == 0, "num_heads is no multiple of num_kv_heads")


def ref(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES) -> Tensor:
    group, block_size = q.shape[1] // cache.shape[3], block_size_of(cache)
    planes = [plane * scale for plane, scale in zip(numbers(cache), scales, strict=True)]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for i, (start, end, length) in enumerate(plan.spans):
        blocks = plan.block_table[i, : -(-length // block_size)].long()
        k, v = (x[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in planes)
        z = torch.einsum("qhd,khd->hqk", q[start:end].float(), k) * scores.scale
        if scores.soft_cap:
            z = scores.soft_cap * torch.tanh(z / scores.soft_cap)
        distance = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        if scores.slopes is not None:
            z = z - scores.slopes[:, None, None] * distance.to(q.device)
        if scores.biases is not None:
            z = z + scores.biases[:, distance.clamp(0, scores.biases.shape[1] - 1).to(q.device)]
        unseen = (distance < 0) | (distance >= (scores.window or length))
        if scores.chunk:
            unseen |= distance > (torch.arange(length - end + start, length) % scores.chunk)[:, None]
        z = z.masked_fill(unseen.to(q.device), float("-inf"))
        if scores.sinks is not None:
            z = torch.cat((z, scores.sinks[:, None, None].expand(-1, end - start, 1)), -1)
        out[start:end] = torch.einsum("hqk,khd->qhd", z.softmax(-1)[..., :length], v).to(q.dtype)
    return out


def make(
    spans: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    block_size: int = 16,
    window: int = 0,
    chunk: int = 0,
    soft_cap: float = 0.0,
    invariant: bool = False,
    slopes: bool = False,
    sinks: bool = False,
    reach: int = 0,
    kept_as: torch.dtype | None = None,
    scales: KVScales = NO_SCALES,
    device: str = "cpu",
) -> Call:
    """`spans`: (new tokens, length) of each sequence. `heads`: num_heads, num_kv_heads, head_dim. `kept_as`: dtype of
    the cache, where it is another."""
    num_heads, num_kv_heads, head_dim = heads
    query_lens, seq_lens = zip(*spans, strict=True)
    width = -(-max(seq_lens) // block_size) + 1
    num_blocks = len(spans) * width
    # Tokens of a fused projection; blocks that no sequence owns hold NaN, as a broken request may have left them.
    q = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)[:, :num_heads]
    numbers_kept = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, device=device).to(dtype)
    cache = cache_of(numbers_kept, kept_as or dtype)
    table = torch.randperm(num_blocks, device=device).view(-1, width).int()
    by_slot = scales_of(cache).transpose(2, 3) if kept_as == torch.int8 else cache
    for row, length in zip(table.long(), seq_lens, strict=True):
        used = -(-length // block_size)
        by_slot[:, row[used:]] = float("nan")
        by_slot[:, row[used - 1 : used], length - (used - 1) * block_size :] = float("nan")
    plan = AttentionPlan(
        query_start=torch.tensor((0, *query_lens), device=device).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=table,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        invariant=invariant,
    )
    scores = Scores(
        2 * head_dim**-0.5,
        window,
        soft_cap,
        torch.rand(num_heads, device=device) if slopes else None,
        torch.randn(num_heads, device=device) * 2 if sinks else None,
        chunk,
        torch.randn(num_heads, reach + 1, device=device) if reach else None,
    )
    return call(q, cache, plan, scores=scores, scales=scales)
