"""Work lists made on the device: between them every token of a step is computed, and none twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.kernels import decode_work, prefill_work


@settings(max_examples=200, deadline=None)
@given(
    query_lens=st.lists(st.integers(0, 70), min_size=1, max_size=30),
    num_singles=st.integers(0, 30),
    tile=st.sampled_from([1, 16, 64]),
    skips_singles=st.booleans(),
)
def test_every_token_is_in_one_list_once(query_lens: list[int], num_singles: int, tile: int, skips_singles: bool):
    query_lens = [1] * num_singles + query_lens
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_tokens = max(sum(query_lens), 1)
    work = prefill_work.ref(query_start, num_tokens=num_tokens, tile=tile, skips_singles=skips_singles)
    tokens = []
    for sequence, first in work.tolist():
        if sequence >= 0:
            end = min(first + tile, query_lens[sequence])
            assert end > first
            tokens += range(int(query_start[sequence]) + first, int(query_start[sequence]) + end)
    if skips_singles:
        seq_lens = torch.full((len(query_lens),), 5, dtype=torch.int32)
        options = {"num_shares": 4, "tile": 16, "least_tiles": 1, "num_kv_heads": 1}
        items, _ = decode_work.ref(query_start, seq_lens, **options)
        tokens += [sequence for sequence in items[:, 0].tolist() if sequence >= 0]
        assert set(range(num_singles)) <= set(items[:, 0].tolist())
    assert sorted(tokens) == list(range(sum(query_lens)))
    sequences = [sequence for sequence, _ in work.tolist()]
    assert sequences == sorted(sequences, reverse=True)
