"""What captured graphs rely on."""

import pytest
import torch

from tests.kernels import laws

KV_WRITE = laws.named("kv_write")


@pytest.mark.skipif(not laws.RUNS_TRITON, reason="no GPU; test_triton.py runs it in the interpreter")
def test_a_negative_slot_writes_nothing(device: str):
    made = laws.make(KV_WRITE, KV_WRITE.cases[-1], device)
    slots = made.args[3]
    slots[::3] = -1
    laws.assert_equals_ref(KV_WRITE, made)
    assert (slots >= 0).any()
    torch.testing.assert_close(slots[::3], torch.full_like(slots[::3], -1))
