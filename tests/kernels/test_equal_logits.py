"""Which of several equally likely tokens are told must not depend on how many somebody else in the batch asked for."""

import torch

from cableway.kernels.logprobs import logprobs


def test_equals_come_by_their_ids_however_many_are_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (4, 1000), generator=generator).float()
    logits[0, ::7] = -0.0
    chosen = torch.tensor([0, 1, 2, 3])
    expected = logits.sort(dim=-1, descending=True, stable=True).indices
    for num_top in (0, 1, 2, 5, 900):
        token_ids, values, _ = logprobs(logits, chosen, num_top)
        assert torch.equal(token_ids[:, 1:].long(), expected[:, :num_top])
        assert torch.allclose(values[:, 1:], logits.log_softmax(-1).gather(1, expected)[:, :num_top], atol=1e-5)
