"""Products that take norms, biases and gates along give what the blocks give one by one. Here by their CPU forms."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


class Adding(OnGpu):
    """Adds products of more than four tokens to the stream."""

    num_added = 0

    def can_add(self, x: Tensor, matrix: Tensor) -> bool:
        return len(x) > 4

    def add_to(self, stream: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
        Adding.num_added += 1
        stream += F.linear(x, matrix, bias)


@pytest.mark.parametrize("wanted", [list(range(12)), [3, 11], []])
def test_products_are_added_to_the_stream(wanted: list[int], checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, but those of the last layer for tokens that nobody asks about."""
    ids = prompt(12)

    def hidden(model: Any) -> Tensor:
        found = []
        forward = model.forward
        model.forward = lambda batch, caches: (
            found.append(forward(replace(batch, logits_at=torch.tensor(wanted, dtype=torch.int64)), caches))
            or torch.zeros(12, found[0].shape[1])
        )
        Session(model).step([(0, ids)])
        return found[0]

    expected = hidden(load(checkpoint))
    monkeypatch.setattr(formats, "choose", lambda encodings, num_out, num_in, place: Adding(place))
    monkeypatch.setattr(Adding, "num_added", 0)
    model = load(checkpoint)
    torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-4)
    assert len(expected) == len(wanted)
    assert Adding.num_added == 2 * (len(model.layers) - (len(wanted) < 12))
