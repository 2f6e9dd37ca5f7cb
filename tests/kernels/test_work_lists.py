"""Work lists made on the device: between them every token of a step is computed, and none twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.kernels import decode_work, level_work, prefill_work


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


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(-1, 300)), min_size=1, max_size=9),
    tile=st.sampled_from([1, 16]),
)
def test_heavy_items_come_first(lengths: list[tuple[int, int]], tile: int):
    query_lens, before = (torch.tensor(x) for x in zip(*lengths, strict=True))
    query_start = torch.cat((torch.zeros(1), query_lens.cumsum(0))).int()
    options = {"num_tokens": max(int(query_lens.sum()), 1), "tile": tile, "skips_singles": False}
    work = prefill_work.ref(query_start, **options)
    seq_lens = torch.where(before < 0, 0, before + query_lens).int()  # some are nobody's
    ordered = prefill_work.heavy_first(work, query_start, seq_lens).tolist()
    assert sorted(ordered) == sorted(work.tolist())
    num_keys = [max(int(seq_lens[i] - query_lens[i]) + first, 0) if i >= 0 else -1 for i, first in ordered]
    assert num_keys == sorted(num_keys, reverse=True)


@settings(max_examples=100, deadline=None)
@given(
    seq_lens=st.lists(st.integers(0, 900), min_size=1, max_size=20),
    num_shares=st.integers(1, 20),
    least_tiles=st.integers(1, 3),
)
def test_shares_are_level(seq_lens: list[int], num_shares: int, least_tiles: int):
    query_start = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    options = {"num_shares": num_shares, "tile": 16, "least_tiles": least_tiles}
    work = level_work.ref(query_start, torch.tensor(seq_lens, dtype=torch.int32), **options)
    most_tiles = max(-(-sum(max(-(-n // 16), 1) for n in seq_lens) // num_shares), least_tiles)
    keys: dict[int, list[int]] = {i: [] for i in range(len(seq_lens))}
    for begin, end in work.shares.tolist():
        stretches = work.items[begin:end].tolist()
        assert sum(max(-(-(last - first) // 16), 1) for _, first, last, *_ in stretches) <= most_tiles
        for sequence, first, last, *_ in stretches:
            keys[sequence] += range(first, last)
    assert keys == {i: list(range(n)) for i, n in enumerate(seq_lens)}
    for first, number in work.cuts.tolist():
        if number:
            assert number > 1
            assert len({sequence for sequence, *_ in work.items[first : first + number].tolist()}) == 1
