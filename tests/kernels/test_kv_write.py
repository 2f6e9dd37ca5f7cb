"""What captured graphs rely on."""

import pytest
import torch

from tests.kernels import laws


@pytest.mark.skipif(not laws.RUNS_TRITON, reason="no GPU; test_triton.py runs it in the interpreter")
@pytest.mark.parametrize(("name", "which"), [("kv_write", 3), ("rope_and_write", 5)])
def test_a_negative_slot_writes_nothing(name: str, which: int, device: str):
    kernel = laws.named(name)
    made = laws.make(kernel, next(case for case in kernel.cases if case["num_tokens"] > 3), device)
    slots = made.args[which]
    slots[::3] = -1
    laws.assert_equals_ref(kernel, made)
    assert (slots >= 0).any()
    torch.testing.assert_close(slots[::3], torch.full_like(slots[::3], -1))
