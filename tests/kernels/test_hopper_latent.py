"""What puts the parts of cut sequences together; the rest of hopper_latent.py needs a GPU: test_registry.py has it."""

import pytest
import torch

from cableway.kernels import hopper_latent, level_work
from tests.kernels import laws


@pytest.mark.skipif(not laws.RUNS_TRITON, reason="test_triton.py runs it in the interpreter")
@pytest.mark.parametrize("num_heads", [2, 70])  # parts at once: 32 of 128 columns, 8 of all
def test_parts_are_put_together(num_heads: int, device: str):
    torch.manual_seed(0)
    query_start, seq_lens = torch.arange(6).int(), torch.tensor((300, 64, 1, 5000, 0), dtype=torch.int32)
    options = {"num_shares": 16, "tile": 64, "least_tiles": 2}
    work = level_work.LevelWork(*(x.to(device) for x in level_work.ref(query_start, seq_lens, **options)))
    shape = len(work.items), num_heads
    sums, tops, masses = torch.randn(*shape, 256), torch.randn(shape) * 3, torch.rand(shape) + 0.1
    out = torch.full((5, num_heads, 256), torch.nan, device=device)
    hopper_latent._put_together(out, work, *(x.to(device) for x in (sums, tops, masses)))
    assert out[[0, 1, 2, 4]].isnan().all()  # those that are whole
    ((first, number),) = (cut for cut in work.cuts.tolist() if cut[1])
    parts = slice(first, first + number)
    shares = torch.exp2(tops[parts]) / (torch.exp2(tops[parts]) * masses[parts]).sum(0)
    expected = torch.einsum("ph,phc->hc", shares, sums[parts])
    assert number > 8
    assert torch.allclose(out[3].cpu(), expected, atol=1e-4)
