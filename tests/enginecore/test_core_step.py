"""The core's own time for a step, bounded so widely that a busy machine passes and a cost that doubles does not."""

from cableway.bench.core_step import AIM_US, measure


def test_a_step_of_256_rows_is_cheap():
    timing = measure(rows=256, frontends=2, steps=150, depth=1)
    assert 0 < timing.step_us < 2 * AIM_US
