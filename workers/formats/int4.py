"""4-bit integers with a scale and an offset every 32 numbers, on a CPU in bfloat16.

The integers are multiplied as they are where few rows make the product a matter of bytes. Beside them the same matrix
is kept dense for many rows, where it is a matter of arithmetic.
PERF: the 120 matrices of SmolLM2-135M, 2 threads, 1 / 4 / 5 / 8 / 16 rows: as integers 3.9 / 6.4 / 11.2 / 11.6 / 23 ms,
dense 11.4 / 10.6 / 10.1 / 12.4 / 14 ms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.workers.formats.base import Place
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.stored import GROUP_LEN, Encoding, Piece

_MAX_ROWS = 4
_OUT_MULTIPLE = 16
_PACK_CHUNK_ROWS = 4096


class Params(NamedTuple):
    packed: Tensor
    scale_and_zero: Tensor  # [in / GROUP_LEN, out, 2] bf16
    dense: Tensor | None


class Int4:
    """torch's packed 4-bit product: a row's result is the same, to the bit, whatever rows are beside it."""

    def __init__(self, place: Place):
        self._many_rows = None if place.invariant else Packed(place)

    @staticmethod
    def fits(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> bool:
        shape_fits = num_out % _OUT_MULTIPLE == 0 and num_in % GROUP_LEN == 0
        return shape_fits and place.dtype == torch.bfloat16 and all(encoding.group_ints for encoding in encodings)

    def finish(self, pieces: Sequence[Piece]) -> Params:
        ints = [map(piece.pad, piece.encoding.group_ints(piece.encoded)) for piece in pieces]
        codes, scale, zero = (torch.cat(part) for part in zip(*ints, strict=True))
        # The op takes 8 times the bytes it packs, so a large matrix goes through it piece by piece.
        packed = [torch._convert_weight_to_int4pack_for_cpu(rows.int(), 1) for rows in codes.split(_PACK_CHUNK_ROWS)]
        scale_and_zero = torch.stack((scale, zero), -1).transpose(0, 1).to(torch.bfloat16).contiguous()
        dense = self._many_rows.finish(pieces) if self._many_rows else None
        return Params(torch.cat(packed), scale_and_zero, dense)

    def apply(self, x: Tensor, params: Params) -> Tensor:
        if self._many_rows is not None and x.shape[0] > _MAX_ROWS:
            return self._many_rows.apply(x, params.dense)
        return torch._weight_int4pack_mm_for_cpu(x, params.packed, GROUP_LEN, params.scale_and_zero)
