"""What a format is, and what it is told of where the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cableway.workers.formats.stored import Piece
from cableway.workers.parallel import Mesh


@dataclass(frozen=True)
class Place:
    """Where and in what numbers a model runs. `invariant`: a row's result may not depend, to the bit, on other rows."""

    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    invariant: bool = False
    mesh: Mesh = field(default_factory=Mesh)


class Format(Protocol):
    """A way to hold a matrix [out, in] and to multiply by it."""

    def finish(self, pieces: Sequence[Piece]) -> Any:
        """Join pieces (along out), repack them, and put them on the device: the `params` of `apply`."""

    def apply(self, x: Tensor, params: Any) -> Tensor:
        """x [T, in] @ matrix.T -> [T, out], in the dtype of x."""
