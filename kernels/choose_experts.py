"""The experts of each token and their weights, from a router's logits.

    scores  = softmax(logits), or 1 / (1 + exp(-logits))
    experts = the top_k largest of scores + correction, the largest first, of equal ones the first
    weights = scores of these; divided by their sum + renorm, where there is a renorm; times scale

With groups experts are num_groups stretches of one size, a group is as good as the sum of its `best` largest
scores + correction, and only experts of the `kept` best groups are chosen.

logits      [num_tokens, num_experts]  bf16|f16|f32   rows may be strided
correction  [num_experts]              f32, or None
groups      (num_groups, kept, best), or None
weights     [num_tokens, top_k]        f32
experts     [num_tokens, top_k]        i32

Bound: bytes; what is waited for are top_k maxima one after another. A row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.ordered import ordered
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes

SCORES = ("softmax", "sigmoid")
MOST_EXPERTS = 2048
"""That a warp can hold, padded to groups of powers of two."""
Groups = tuple[int, int, int]


def ref(
    logits: Tensor, correction: Tensor | None = None, *, top_k: int, score: str = "softmax",
    groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
    choice = scores if correction is None else scores + correction
    if groups is not None:
        num_groups, kept, best = groups
        by_group = choice.unflatten(-1, (num_groups, -1))
        worth = by_group.sort(descending=True).values[..., :best].sum(-1)
        chosen = worth.sort(descending=True, stable=True).indices[..., :kept]
        others = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, chosen, False)
        choice = by_group.masked_fill(others[..., None], float("-inf")).flatten(-2)
    experts = choice.sort(descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, experts)
    if renorm is not None:
        weights = weights / (weights.sum(-1, keepdim=True) + renorm)
    return weights * scale, experts.int()


@jit
def _only_groups(choice, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr):
    """choice [TOKENS, GROUPS * SIZE], -inf in groups that are not kept"""
    TOKENS: tl.constexpr = choice.shape[0]
    SIZE: tl.constexpr = choice.shape[1] // GROUPS
    by_group = tl.reshape(choice, (TOKENS, GROUPS, SIZE))
    member = tl.arange(0, SIZE)[None, None, :]
    left, worth = by_group, tl.zeros((TOKENS, GROUPS), tl.float32)
    for _ in tl.static_range(BEST):
        largest, at = tl.max(left, 2, return_indices=True, return_indices_tie_break_left=True)
        worth += largest
        left = tl.where(member == at[:, :, None], float("-inf"), left)
    group = tl.arange(0, GROUPS)[None, :]
    worth = tl.where(group < NUM_GROUPS, worth, float("-inf"))
    is_kept = tl.zeros((TOKENS, GROUPS), tl.int32)
    for _ in tl.static_range(KEPT):
        at = tl.argmax(worth, 1)
        is_kept = tl.where(group == at[:, None], 1, is_kept)
        worth = tl.where(group == at[:, None], float("-inf"), worth)
    return tl.reshape(tl.where(is_kept[:, :, None] == 1, by_group, float("-inf")), (TOKENS, GROUPS * SIZE))


@jit(do_not_specialize=("num_tokens",))
def _choose_experts(
    logits_ptr, correction_ptr, weights_ptr, experts_ptr, num_tokens, logits_stride, renorm, scale,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IS_SOFTMAX: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    HAS_RENORM: tl.constexpr, NUM_GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For TOKENS tokens. Columns are GROUPS groups of SIZE experts, of which some may not be."""
    column = tl.arange(0, GROUPS * SIZE)
    group, member = column // SIZE, column % SIZE
    expert = group * (NUM_EXPERTS // NUM_GROUPS) + member
    is_expert = (group < NUM_GROUPS) & (member < NUM_EXPERTS // NUM_GROUPS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside = is_token[:, None] & is_expert[None, :]
    logits_ptr += token.to(tl.int64)[:, None] * logits_stride + expert[None, :]
    logits = tl.load(logits_ptr, mask=inside, other=float("-inf")).to(tl.float32)
    logits = tl.where(is_token[:, None], logits, 0.0)
    if IS_SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    else:
        scores = tl.sigmoid(logits)
    choice = scores
    if HAS_CORRECTION:
        choice += tl.load(correction_ptr + expert, mask=is_expert, other=0.0)[None, :]
    choice = tl.where(is_expert[None, :], choice, float("-inf"))
    if KEPT > 0:
        choice = _only_groups(choice, NUM_GROUPS, GROUPS, KEPT, BEST)
    rank, slot = ordered(choice), tl.arange(0, SLOTS)[None, :]
    weights, experts = tl.zeros((TOKENS, SLOTS), tl.float32), tl.zeros((TOKENS, SLOTS), tl.int32)
    for k in tl.static_range(TOP_K):
        first = tl.min(tl.where(rank == tl.max(rank, 1)[:, None], column[None, :], GROUPS * SIZE), 1)
        is_at = column[None, :] == first[:, None]
        weights = tl.where(slot == k, tl.sum(tl.where(is_at, scores, 0.0), 1)[:, None], weights)
        chosen = first // SIZE * (NUM_EXPERTS // NUM_GROUPS) + first % SIZE
        experts = tl.where(slot == k, chosen[:, None], experts)
        rank = tl.where(is_at, -0x80000000, rank)
    if HAS_RENORM:
        weights = weights / (tl.sum(weights, 1)[:, None] + renorm)
    place = token[:, None] * TOP_K + slot
    inside = is_token[:, None] & (slot < TOP_K)
    tl.store(weights_ptr + place, weights * scale, mask=inside)
    tl.store(experts_ptr + place, experts, mask=inside)


_NUMBERS_A_WARP = 512
_FEW_TOKENS = 512  # that have a warp each


def launch(
    logits: Tensor, correction: Tensor | None = None, *, top_k: int, score: str = "softmax",
    groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, num_experts = logits.shape
    num_groups, kept, best = groups or (1, 0, 0)
    blocks, size = triton.next_power_of_2(num_groups), triton.next_power_of_2(num_experts // num_groups)
    tokens = 1 if num_tokens <= _FEW_TOKENS else min(max(_NUMBERS_A_WARP // (blocks * size), 1), 4)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    _choose_experts[(triton.cdiv(num_tokens, tokens),)](
        logits, correction, weights, experts, num_tokens, logits.stride(0), renorm or 0.0, scale,
        NUM_EXPERTS=num_experts, TOP_K=top_k, IS_SOFTMAX=score == "softmax", HAS_CORRECTION=correction is not None,
        HAS_RENORM=renorm is not None, NUM_GROUPS=num_groups, KEPT=kept if kept < num_groups else 0, BEST=best,
        TOKENS=tokens, GROUPS=blocks, SIZE=size, SLOTS=triton.next_power_of_2(top_k), num_warps=1, **overlapping(),
    )  # fmt: skip
    return weights, experts


def _on_cpu(
    logits: Tensor, correction: Tensor | None = None, *, top_k: int, score: str = "softmax",
    groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In parts of torch whose results for a row are the same in any batch, which its sigmoid's are not."""
    logits = logits.float()
    scores = logits.softmax(-1) if score == "softmax" else logits.neg().exp_().add_(1).reciprocal_()
    choice = scores if correction is None else scores + correction
    if groups is not None:
        num_groups, kept, best = groups
        by_group = choice.unflatten(-1, (num_groups, -1))
        chosen = by_group.topk(best, -1).values.sum(-1).topk(kept, -1).indices
        others = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(-1, chosen, False)
        choice = by_group.masked_fill(others[..., None], float("-inf")).flatten(-2)
    experts = choice.topk(top_k, -1).indices
    weights = scores.gather(-1, experts)
    if renorm is not None:
        weights = weights / (weights.sum(-1, keepdim=True) + renorm)
    return weights * scale, experts.int()


def make(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, score: str = "softmax", corrected: bool = False,
    groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0, strided: bool = False, device="cpu",
):  # fmt: skip
    """No two logits of a token are equal."""
    order = torch.rand(num_tokens, num_experts, device=device).argsort(-1)
    logits = ((order - num_experts // 2) / 32).to(dtype)
    if strided:
        logits = torch.cat((logits, logits), 1)[:, :num_experts]
    correction = torch.randn(num_experts, device=device) / 8 if corrected else None
    return call(logits, correction, top_k=top_k, score=score, groups=groups, renorm=renorm, scale=scale)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), num_experts=(8, 60, 128), top_k=(2,), dtype=FLOATS, renorm=(None, 0.0)),
        *grid(
            num_tokens=(5,), num_experts=(64, 160), top_k=(6,), dtype=FLOATS[:2], score=SCORES, corrected=(True,),
            groups=((8, 3, 2), (4, 2, 1), (1, 1, 2)), renorm=(1e-20,), scale=(2.5,), strided=(True,),
        ),
        *grid(num_tokens=(515,), num_experts=(6,), top_k=(2,), dtype=FLOATS[:1], renorm=(0.0,)),
        *grid(num_tokens=(3,), num_experts=(512,), top_k=(10,), dtype=FLOATS, renorm=(0.0,)),
    ],
    bench_cases=[
        *grid(num_tokens=(1, 256, 8192), num_experts=(128,), top_k=(8,), dtype=(torch.bfloat16,), renorm=(0.0,)),
        *grid(
            num_tokens=(256,), num_experts=(256,), top_k=(8,), dtype=(torch.bfloat16,), score=("sigmoid",),
            corrected=(True,), groups=((8, 4, 2),), renorm=(1e-20,), scale=(2.5,),
        ),
    ],
    num_bytes=lambda c: nbytes(c.args[0]) + 8 * len(c.args[0]) * c.kwargs["top_k"],
)  # fmt: skip
def choose_experts(
    logits: Tensor, correction: Tensor | None = None, *, top_k: int, score: str = "softmax",
    groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [num_tokens, num_experts] -> weights, experts [num_tokens, top_k]; ValueError when something does not
    fit."""
    check(logits.dim() == 2 and logits.stride(1) == 1 and logits.dtype in FLOATS, "logits are not [tokens, experts]")
    check(0 < top_k <= logits.shape[1] <= MOST_EXPERTS and score in SCORES, "top_k, or too many experts, or the score")
    if correction is not None:
        fits = correction.shape == logits.shape[1:] and correction.dtype == torch.float32
        check(fits and correction.is_contiguous(), "the correction is not [experts] f32")
    if groups is not None:
        num_groups, kept, best = groups
        check(logits.shape[1] % num_groups == 0 and 0 < kept <= num_groups, "groups do not fit the experts")
        check(0 < best <= logits.shape[1] // num_groups, "groups are smaller than what they are judged by")
    form = _on_cpu if logits.is_cpu else launch
    return form(logits, correction, top_k=top_k, score=score, groups=groups, renorm=renorm, scale=scale)
