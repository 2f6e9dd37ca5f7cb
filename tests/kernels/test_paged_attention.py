"""Invariant attention gives a token the same result, to the bit, however its sequence is cut and beside whomever."""

import pytest
import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan, Scores
from cableway.kernels.kv_cache import cache_of
from tests.kernels import laws

ATTENTION = laws.named("paged_attention")
LENGTH = 75
CUTS = [(20, 1, 54), (16, 59), (75,), (16, 48, 11), (1, 74), (20, 1, 1, 53), (74, 1)]


def attend(q: Tensor, cache: Tensor, table: Tensor, spans: list[tuple[int, int, int]], window: int) -> list[Tensor]:
    """Attention of each span (sequence, first position, end), all computed in one step."""
    lengths = torch.tensor([end - first for _, first, end in spans])
    plan = AttentionPlan(
        query_start=torch.cat((torch.zeros(1), lengths.cumsum(0))).int().to(q.device),
        seq_lens=torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=q.device),
        block_table=table[[sequence for sequence, _, _ in spans]],
        max_query_len=int(lengths.max()),
        max_seq_len=max(end for _, _, end in spans),
        invariant=True,
    )
    step = torch.cat([q[sequence, first:end] for sequence, first, end in spans])
    return list(laws.form(ATTENTION)(step, cache, plan, Scores(0.25, window)).split(lengths.tolist()))


@pytest.mark.parametrize(
    ("window", "kept_as"), [(0, None), (9, None), (32, None), (9, torch.int8), (0, torch.float8_e4m3fn)]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=laws.slow_where_interpreted)])
def test_chunks_and_neighbours_do_not_show(dtype: torch.dtype, window: int, kept_as: torch.dtype | None, device: str):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, LENGTH, 3, 32, generator=generator).to(dtype).to(device)
    cache = cache_of(torch.randn(2, 15, 16, 1, 32, generator=generator), kept_as or dtype).to(device)
    table = torch.randperm(15, generator=generator).view(3, 5).int().to(device)
    (whole,) = attend(q, cache, table, [(1, 0, LENGTH)], window)
    for cut in CUTS[:2] if laws.INTERPRETED else CUTS:
        ends = torch.tensor(cut).cumsum(0).tolist()
        for first, end in zip((0, *ends), ends, strict=False):
            alone = attend(q, cache, table, [(1, first, end)], window)[0]
            _, beside, _ = attend(q, cache, table, [(0, 30, 31), (1, first, end), (2, 0, 20)], window)
            assert torch.equal(alone, whole[first:end]), (first, end)
            assert torch.equal(beside, whole[first:end]), (first, end)
