"""4-bit integers with a scale and an offset every 32 numbers, on a CPU in bfloat16.

The integers are multiplied as they are where few rows make the product a matter of bytes. Beside them the same matrix
is kept dense for many rows, where it is a matter of arithmetic.
PERF: the 120 matrices of SmolLM2-135M, 2 threads, 1 / 2 / 4 / 5 / 8 / 16 rows: as integers 4.5 / 5.8 / 8.5 / 10 / 15 /
25 ms, dense 12 / 13 / 11 / 12 / 13 / 18 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.lang import products
from cableway.workers.formats.base import Place
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.int8 import integers_product
from cableway.workers.formats.stored import GROUP_LEN, Encoding, Piece, narrowed

_MAX_ROWS = 5


class Params(NamedTuple):
    codes: Tensor  # [out / 2, in] u8: two rows in one, the first in the low bits
    scales: Tensor  # [out / 2, 2, 2, in / GROUP_LEN]: scales of both rows, offsets of both
    dense: Tensor | None
    product: products.Prepared


class Int4:
    """A row's result is the same, to the bit, whatever rows are beside it."""

    def __init__(self, place: Place):
        self._many_rows = None if place.invariant else Packed(place)

    @staticmethod
    def fits(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> bool:
        shape_fits = num_out % 2 == 0 and num_in % GROUP_LEN == 0
        return shape_fits and place.dtype == torch.bfloat16 and all(encoding.group_ints for encoding in encodings)

    def finish(self, pieces: Sequence[Piece]) -> Params:
        ints = [map(piece.pad, piece.encoding.group_ints(piece.encoded)) for piece in pieces]
        codes, scale, offset = (torch.cat(part) for part in zip(*ints, strict=True))
        scales = narrowed(torch.stack((scale, offset)).unflatten(1, (-1, 2)).transpose(0, 1).contiguous())
        codes = codes[::2] | codes[1::2] << 4
        dense = self._many_rows.finish(pieces) if self._many_rows else None
        return Params(codes, scales, dense, integers_product(products.multiply_int4, codes, scales, 2 * len(codes)))

    def apply(self, x: Tensor, params: Params) -> Tensor:
        num_rows = x.shape[0]
        if params.dense is not None and num_rows > _MAX_ROWS:
            return self._many_rows.apply(x, params.dense)
        y = torch.empty(num_rows, 2 * len(params.codes), dtype=x.dtype)
        params.product(x.data_ptr(), x.stride(0), num_rows, y.data_ptr())
        return y
