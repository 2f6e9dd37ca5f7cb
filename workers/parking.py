"""Weights out of a GPU's memory, into that of the host, and back."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cableway.workers.blocks.block import Block


class Parking:
    """A place in the host's memory for all that a model holds on a GPU.

    Tensors stay the same objects: only the memory behind them goes and comes, so nobody who holds one has to know.
    The place is kept when the weights have come back. They never change: the next time they need not be copied.
    """

    def __init__(self, model: Block) -> None:
        storages = [tensor.untyped_storage() for tensor in _tensors(model)]
        self._storages = list({storage.data_ptr(): storage for storage in storages}.values())
        self._copies: list[Tensor] = []

    def park(self) -> None:
        """Give the GPU's memory back."""
        if not self._copies:
            self._copies = [
                torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda)
                for storage in self._storages
            ]
            for copy, storage in zip(self._copies, self._storages, strict=True):
                copy.copy_(_bytes(storage))
        for storage in self._storages:
            storage.resize_(0)
        torch.cuda.empty_cache()

    def fetch(self) -> None:
        """Take the GPU's memory again, and fill it."""
        for copy, storage in zip(self._copies, self._storages, strict=True):
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All that are found in a model: in its blocks, and in what these keep lists and tables of."""
    match value:
        case Tensor():
            yield value
        case Block():
            yield from _tensors(vars(value))
        case dict():
            for item in value.values():
                yield from _tensors(item)
        case list() | tuple():
            for item in value:
                yield from _tensors(item)
