"""What captured graphs and layers that share a plan rely on, and that the work is all of the work."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.kernels import decode_work
from cableway.kernels.registry import Call
from tests.kernels import laws

DECODE = laws.named("paged_decode")
needs_triton = pytest.mark.skipif(not laws.RUNS_TRITON, reason="no GPU; test_triton.py runs it in the interpreter")


def made_of(lengths: list[int], device: str, heads: tuple[int, int, int] = (6, 2, 64)) -> Call:
    torch.manual_seed(0)
    return DECODE.make(tuple((1, length) for length in lengths), heads, torch.float32, device=device)


@needs_triton
@pytest.mark.parametrize("lengths", [[0, 5, 0], [0], [700, 0, 0, 1], [0, 1300]])
def test_rows_of_nobody_are_zero_and_have_no_blocks(lengths: list[int], device: str):
    made = made_of(lengths, device)
    _, _, plan = made.args
    plan.block_table[plan.seq_lens == 0] = -(1 << 30)
    laws.assert_equals_ref(DECODE, made)
    assert not laws.form(DECODE)(*made.args, **made.kwargs)[plan.seq_lens == 0].any()


@needs_triton
def test_layers_share_a_plan(device: str):
    """What one layer leaves behind does not show in the next, whose cache is another."""
    made = made_of([1500, 3, 600], device)
    q, cache, plan = made.args
    for layer in range(3):
        other = cache * (1 - layer)
        laws.assert_close(
            laws.form(DECODE)(q, other, plan, **made.kwargs), DECODE.ref(q, other, plan, **made.kwargs), DECODE
        )


@pytest.mark.skipif(laws.DEVICES != ["cuda"], reason="no GPU")
def test_a_captured_graph_takes_any_lengths(device: str):
    made = made_of([4000] * 5, device, heads=(8, 2, 128))
    q, cache, plan = made.args

    def run() -> torch.Tensor:
        return laws.form(DECODE)(q, cache, dataclasses.replace(plan, _decode_works={}), **made.kwargs)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ([4000] * 5, [4000, 0, 0, 0, 0], [1, 2, 3, 0, 3999], [256, 257, 255, 64, 65], [0] * 5):
        plan.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        fresh = dataclasses.replace(plan, _decode_works={})
        laws.assert_close(out, DECODE.ref(q, cache, fresh, **made.kwargs), DECODE)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    num_shares=st.integers(1, 40),
    tile=st.sampled_from([16, 64]),
    least_tiles=st.integers(1, 6),
    window=st.sampled_from([0, 1, 100, 1000]),
)
def test_work_is_every_visible_key_once(lengths: list[int], num_shares: int, tile: int, least_tiles: int, window: int):
    options = {"num_shares": num_shares, "tile": tile, "least_tiles": least_tiles, "window": window}
    query_start = torch.arange(len(lengths) + 1, dtype=torch.int32)
    work, arrivals = decode_work.ref(query_start, torch.tensor(lengths, dtype=torch.int32), **options, num_kv_heads=2)
    assert work.shape == (len(lengths) + num_shares - 1, 5)
    assert arrivals.shape == (len(lengths), 2)
    items = work.tolist()
    busy = [item for item in items if item[0] >= 0]
    assert items[: len(busy)] == busy
    for sequence, length in enumerate(lengths):
        own = [(index, item) for index, item in enumerate(busy) if item[0] == sequence]
        assert all(item[3:] == [own[0][0], len(own)] for _, item in own)
        stretches = [(first, end) for _, (_, first, end, _, _) in own]
        assert stretches[0][0] == length - min(length, window or length)
        assert stretches[-1][1] == length
        assert all(end == first for (_, end), (first, _) in itertools.pairwise(stretches))
        assert all(first < end for first, end in stretches) or length == 0
        keys = min(length, window or length)
        assert len(own) <= max(-(-keys // (least_tiles * tile)), 1)


def test_refuses_steps_that_are_not_for_it():
    made = made_of([5, 6], "cpu")
    q, cache, plan = made.args
    for refused in (dataclasses.replace(plan, max_query_len=2), dataclasses.replace(plan, invariant=True)):
        with pytest.raises(ValueError, match=r"one token|invariant"):
            DECODE.function(q, cache, refused, **made.kwargs)
