"""8-bit integers with a scale every 32 numbers, on a CPU in bfloat16: Q8_0.

Up to three rows read the integers as they are; for more, where arithmetic counts, the same matrix is kept dense beside.
PERF: the head of SmolLM2-135M, 49,152 x 576, 2 threads, 1 / 2 / 3 / 4 / 8 rows: as integers 0.8 / 0.9 / 1.3 / 1.7 / 3.5
ms, dense 1.7 / 1.8 / 1.6 / 1.5 / 2.2 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.lang import products
from cableway.workers.formats.base import Place
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.stored import GROUP_LEN, Encoding, Piece, narrowed

_MAX_ROWS = 3


class Params(NamedTuple):
    codes: Tensor  # [out, in] i8
    scales: Tensor  # [out, in / GROUP_LEN]
    dense: Tensor
    product: products.Prepared


class Int8:
    """Integers times activations of 16 bits, added exactly within a group."""

    def __init__(self, place: Place):
        self._many_rows = Packed(place)

    @staticmethod
    def fits(encodings: Sequence[Encoding], num_in: int, place: Place) -> bool:
        shape_fits = num_in % GROUP_LEN == 0 and not place.invariant
        return shape_fits and place.dtype == torch.bfloat16 and all(encoding.group_bytes for encoding in encodings)

    def finish(self, pieces: Sequence[Piece]) -> Params:
        ints = [map(piece.pad, piece.encoding.group_bytes(piece.encoded)) for piece in pieces]
        codes, scale = (torch.cat(part) for part in zip(*ints, strict=True))
        scales, dense = narrowed(scale), self._many_rows.finish(pieces)
        kind, scale_kind = products.KINDS[torch.bfloat16], products.KINDS[scales.dtype]
        num_out, num_in = codes.shape
        product = products.Prepared(
            products.multiply_int8, num_out, 2 * num_in, 4,
            kind, codes.data_ptr(), scales.data_ptr(), scale_kind, num_in, num_out,
        )  # fmt: skip
        return Params(codes, scales, dense, product)

    def apply(self, x: Tensor, params: Params) -> Tensor:
        num_rows = x.shape[0]
        if num_rows > _MAX_ROWS:
            return self._many_rows.apply(x, params.dense)
        y = torch.empty(num_rows, len(params.codes), dtype=x.dtype)
        params.product(x.data_ptr(), x.stride(0), num_rows, y.data_ptr())
        return y
