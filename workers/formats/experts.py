"""Matrices of many experts, of which each row is multiplied by its own."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cableway.kernels.grouped_linear import grouped_linear
from cableway.workers.formats.base import Format, Place
from cableway.workers.formats.stored import Piece


class OneByOne:
    """On a CPU: each expert in the format that suits it, one after another."""

    def __init__(self, form: Format):
        self._form = form

    def finish(self, experts: Sequence[Sequence[Piece]]) -> list[Any]:
        return [self._form.finish(pieces) for pieces in experts]

    def apply(self, x: Tensor, params: list[Any], offsets: Tensor) -> Tensor:
        ends = offsets.tolist()
        spans = [(e, start, end) for e, (start, end) in enumerate(pairwise(ends)) if end > start]
        return torch.cat([self._form.apply(x[start:end], params[e]) for e, start, end in spans])


class Together:
    """On a GPU: one kernel for all, on plain numbers."""

    def __init__(self, place: Place):
        self._place = place

    def finish(self, experts: Sequence[Sequence[Piece]]) -> Tensor:
        form = self._place
        return torch.stack(
            [torch.cat([piece.decode(form.dtype).to(form.device) for piece in pieces]) for pieces in experts]
        )

    def apply(self, x: Tensor, params: Tensor, offsets: Tensor) -> Tensor:
        return grouped_linear(x, params, offsets)
