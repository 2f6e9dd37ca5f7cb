"""A tensor as a checkpoint holds it: known without being read, cut before it is decoded.

An `Encoding` says how numbers are written in a file; a `Format` (see `formats/__init__.py`) how a matrix is held in
memory and multiplied. The first is the file's choice, the second ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cableway.workers.parallel import Span

GROUP_LEN = 32
"""Numbers along `in` that share a scale in `GroupInts` and `GroupBytes`."""


class GroupInts(NamedTuple):
    """A matrix of 4-bit integers: `codes * scale + offset`, exactly."""

    codes: Tensor  # [out, in] u8, 0 … 15
    scale: Tensor  # [out, in / GROUP_LEN] f32
    offset: Tensor  # [out, in / GROUP_LEN] f32


class GroupBytes(NamedTuple):
    """A matrix of 8-bit integers: `codes * scale`, exactly."""

    codes: Tensor  # [out, in] i8
    scale: Tensor  # [out, in / GROUP_LEN] f32


def narrowed(scales: Tensor) -> Tensor:
    """Scales [..] f32 in float16, if that holds them exactly."""
    halves = scales.half()
    return halves if torch.equal(halves.float(), scales) else scales


class Encoding(Protocol):
    """How a file writes numbers. Encoded tensors are [..., blocks, …] where a block holds `block_len` numbers."""

    name: str
    block_len: int
    group_ints: Callable[[Tensor], GroupInts] | None
    group_bytes: Callable[[Tensor], GroupBytes] | None
    """The same numbers as integers and scales, for encodings that are such."""

    def decode(self, encoded: Tensor) -> Tensor:
        """The numbers themselves, in a floating dtype that holds them exactly."""


class Plain:
    """Numbers as they are: float32, float16 or bfloat16."""

    name = "plain"
    block_len = 1
    group_ints = group_bytes = None

    def decode(self, encoded: Tensor) -> Tensor:
        return encoded


PLAIN = Plain()


class Piece(NamedTuple):
    """An encoded tensor in memory, or a view of the file, followed by `num_padding` rows of zeros."""

    encoding: Encoding
    encoded: Tensor
    num_padding: int = 0

    def decode(self, dtype: torch.dtype) -> Tensor:
        return self.pad(self.encoding.decode(self.encoded).to(dtype))

    def pad(self, rows: Tensor) -> Tensor:
        """Append the rows of zeros: integers with a scale and an offset of 0 are zeros."""
        if not self.num_padding:
            return rows
        return torch.cat((rows, rows.new_zeros(self.num_padding, *rows.shape[1:])))


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint. `read` gives it encoded, as a view of the file where that can be."""

    name: str
    shape: tuple[int, ...]  # in numbers, however they are encoded
    encoding: Encoding
    read: Callable[[], Tensor]
    row_order: Tensor | None = None
    """Within each unit of rows (a head), the stored row that belongs at each place; None = as they are."""

    def piece(self, rows: Span, columns: Span | None = None) -> Piece:
        """Cut out what one rank holds. Columns that split a block are decoded first."""
        encoding, encoded = self.encoding, self.read()[rows.start : rows.stop]
        if columns is not None and columns.stop - columns.start < self.shape[1]:
            if columns.start % encoding.block_len or columns.stop % encoding.block_len:
                encoding, encoded = PLAIN, encoding.decode(encoded)
            encoded = encoded[:, columns.start // encoding.block_len : columns.stop // encoding.block_len]
        if self.row_order is not None:
            encoded = encoded.unflatten(0, (-1, len(self.row_order)))[:, self.row_order].flatten(0, 1)
        return Piece(encoding, encoded, rows.size - (rows.stop - rows.start))

    def changed(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> "Stored":
        """What `change` makes of it as it is read: rows selected, however they are encoded."""
        return replace(self, shape=shape, read=lambda: change(self.read()))

    def computed(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> "Stored":
        """What `change` makes of its numbers, which are decoded as it is read."""
        return replace(self, shape=shape, encoding=PLAIN, read=lambda: change(self.encoding.decode(self.read())))

    def rows(self, start: int, stop: int) -> "Stored":
        """Some of its rows as a tensor of their own: one part of a matrix that is stored fused."""
        return replace(self, shape=(stop - start, *self.shape[1:]), read=lambda: self.read()[start:stop])
