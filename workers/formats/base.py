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


@dataclass(slots=True)
class Sum:
    """What goes into a product, not computed yet: `norm` of `residual` [T, E] f32 + `delta` [T, E].

    The sum is written to `residual`, so a Sum is used once: by a product that takes it along, or by `tensor()`.
    """

    delta: Tensor
    residual: Tensor
    norm: Any  # an RMSNorm

    def __len__(self) -> int:
        return len(self.delta)

    def tensor(self) -> Tensor:
        return self.norm.add(self.delta, self.residual)


def joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One below the other on a device, always a copy: what is held must not be a view of a file that may change."""
    tensors = [tensor.to(device) for tensor in tensors]
    if device.type == "meta":
        # PERF: torch's own imports its compiler there, which takes more than a second under Python's lock.
        return tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
    return torch.cat(tensors)


class Format(Protocol):
    """A way to hold a matrix [out, in] and to multiply by it."""

    def finish(self, pieces: Sequence[Piece]) -> Any:
        """Join pieces (along out), repack them, and put them on the device: the `params` of `apply`."""

    def apply(self, x: Tensor, params: Any) -> Tensor:
        """x [T, in] @ matrix.T -> [T, out], in the dtype of x."""
