"""Which part of each weight this rank holds, and the collectives. Nothing else knows of ranks.

A weight names its logical axes; `AXES` maps an axis to a dimension of the mesh. How a tensor is cut, which products
need a sum over ranks afterwards, how far the vocabulary is padded: all of it follows from that table.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cableway.ipc.modelfiles import ModelError

AXES = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "ffn": "tp"}
"""Logical axis -> mesh dimension it is cut along. Axes that are not named here are whole on every rank."""

_PADDED = {"vocab": 64}
"""Axes that may grow by rows of zeros, to a multiple of this on each rank."""

_SHARED = {"kv_heads"}
"""Axes that several ranks may hold the same unit of, where there are more ranks than units."""


@dataclass(frozen=True)
class Axis:
    """A logical axis: `count` units of `unit` numbers each, such as 9 heads of 64. Only whole units are cut apart."""

    name: str
    count: int
    unit: int = 1

    @property
    def size(self) -> int:
        return self.count * self.unit


class Span(NamedTuple):
    """What a rank holds of an axis: numbers `start:stop` of the checkpoint, then zeros up to `size`."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Mesh:
    """This rank's place among `tp_size` tensor-parallel ranks. `group` is a torch.distributed process group."""

    tp_rank: int = 0
    tp_size: int = 1
    group: Any = None

    def is_cut(self, axis: Axis) -> bool:
        return self._num_ranks(axis) > 1

    def span(self, axis: Axis) -> Span:
        """The part of `axis` that this rank holds; ModelError when its units cannot be dealt out evenly."""
        ranks = self._num_ranks(axis)
        rank = self.tp_rank if ranks > 1 else 0
        if axis.name in _PADDED:
            step = ranks * _PADDED[axis.name]
            size = -(-axis.size // step) * step // ranks
            return Span(min(rank * size, axis.size), min((rank + 1) * size, axis.size), size)
        if axis.name in _SHARED and ranks % axis.count == 0:
            rank, ranks = rank * axis.count // ranks, axis.count
        if axis.count % ranks:
            raise ModelError(f"{axis.count} {axis.name} cannot be split over {ranks} ranks")
        size = axis.size // ranks
        return Span(rank * size, (rank + 1) * size, size)

    def num_held(self, axis: Axis) -> int:
        """Numbers of an axis that all ranks hold together: more than it has where some hold the same."""
        return self.span(axis).size * self._num_ranks(axis)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place."""
        if self.tp_size > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Join the ranks' last dimensions: [..., n] -> [..., tp_size * n]."""
        if self.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def _num_ranks(self, axis: Axis) -> int:
        return self.tp_size if AXES.get(axis.name) == "tp" else 1
