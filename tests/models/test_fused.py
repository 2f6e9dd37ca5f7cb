"""Products that take norms, biases and gates along give what the blocks give one by one. Here by their CPU forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cableway.workers import formats
from cableway.workers.formats.base import Place
from cableway.workers.formats.gpu import Invariant, OnGpu
from cableway.workers.formats.stored import Encoding
from tests.checkpoints import oracle, save
from tests.models.harness import Session, load, prompt


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(oracle(request.param), tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("form", [OnGpu, Invariant])
def test_logits_are_those_of_single_blocks(form: type, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt in one chunk, and token by token: one row is where most is fused."""
    ids = prompt(12)
    expected = Session(load(checkpoint)).step([(0, ids)])[0]

    def choose(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> Any:
        return form(place)

    monkeypatch.setattr(formats, "choose", choose)
    model = load(checkpoint)
    in_one = Session(model).step([(0, ids)])[0]
    session = Session(model)
    one_by_one = torch.cat([session.step([(0, ids[i : i + 1])])[0] for i in range(len(ids))])
    torch.testing.assert_close(in_one, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_by_one, expected, rtol=1e-4, atol=1e-4)
