"""4-bit integers with a scale and an offset every 32 numbers, on a CPU in bfloat16.

The integers are multiplied as they are where few rows make the product a matter of bytes. Beside them the same matrix
is kept dense for many rows, where it is a matter of arithmetic.
PERF: the 120 matrices of SmolLM2-135M, 2 threads, 1 / 2 / 4 / 5 / 8 / 16 rows: as integers 4.5 / 5.8 / 8.5 / 10 / 15 /
25 ms, dense 12 / 13 / 11 / 12 / 13 / 18 ms.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.lang import products
from cableway.kernels.silu_mul import silu_mul
from cableway.workers.formats.base import Place, Sum
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.stored import GROUP_LEN, Encoding, Piece, narrowed

_MAX_ROWS = 5


class Params(NamedTuple):
    codes: Tensor  # [out / 2, in] u8: row i in the low bits, row out / 2 + i in the high ones
    scales: Tensor  # [out / 2, 2, 2, in / GROUP_LEN]: scales of both rows, offsets of both
    dense: Tensor | None
    product: products.Prepared
    num_pairs: int


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
        # Pairs of a row of the first half and one of the second: where the halves are gate and up, a product can gate.
        scales = narrowed(torch.stack((scale, offset)).unflatten(1, (2, -1)).permute(2, 0, 1, 3).contiguous())
        first, second = codes.chunk(2)
        codes, dense = first | second << 4, self._many_rows.finish(pieces) if self._many_rows else None
        kind, scale_kind = products.KINDS[torch.bfloat16], products.KINDS[scales.dtype]
        num_pairs, num_in = codes.shape
        product = products.Prepared(
            products.multiply_int4, num_pairs, 2 * num_in, 11,
            kind, codes.data_ptr(), scales.data_ptr(), scale_kind, num_in, num_pairs,
        )  # fmt: skip
        return Params(codes, scales, dense, product, num_pairs)

    def fused(self, x: Tensor | Sum, params: Params, bias: Tensor | None, *, gated: bool) -> Tensor:
        """x [T, in] -> [T, out], or [T, out / 2] where gated: silu(first half) * second half."""
        delta = x.delta if isinstance(x, Sum) else x
        num_rows, num_out = delta.shape[0], params.num_pairs * (1 if gated else 2)
        if params.dense is not None and num_rows > _MAX_ROWS:
            y = self._many_rows.apply(x if delta is x else x.tensor(), params.dense)
            y = y if bias is None else y.add_(bias)
            return silu_mul(y) if gated else y
        y = torch.empty(num_rows, num_out, dtype=torch.bfloat16)
        bias_at = 0 if bias is None else bias.data_ptr()
        ends = delta.data_ptr(), delta.stride(0), num_rows, y.data_ptr(), bias_at, gated
        if delta is x:
            params.product(*ends, 0, 0, 0, 0, 0)
        else:
            residual, norm, total = x.residual, x.norm, torch.empty_like(x.residual)
            addresses = residual.data_ptr(), total.data_ptr(), norm.weight.data_ptr()
            params.product(*ends, *addresses, _bits(norm.eps), 0)
            residual.set_(total)  # others read what it is made of while one thread writes it
        return y

    def apply(self, x: Tensor, params: Params) -> Tensor:
        return self.fused(x, params, None, gated=False)


@cache
def _bits(value: float) -> int:
    """A number as the integer that has its bits."""
    return struct.unpack("=q", struct.pack("=d", value))[0]
