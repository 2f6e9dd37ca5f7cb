"""Sums of planes of 4-bit integers with a scale and an offset every 32 numbers, on a CPU in bfloat16.

The integers are multiplied as they are where few rows make the product a matter of bytes; beside them the same matrix
is kept dense for many rows, where it is a matter of arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.workers.formats.base import Place
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.stored import GROUP_LEN, Encoding, GroupInts, Piece

_MAX_ROWS = 6
"""Up to this many rows the 4-bit product is the faster one."""

_PACK_ROWS = 16
_PACK_CHUNK_ROWS = 4096


class Params(NamedTuple):
    packed: Tensor
    scale_and_zero: Tensor  # [planes * in / GROUP_LEN, out, 2] bf16
    dense: Tensor | None
    num_planes: int


class Int4:
    """torch's packed 4-bit product. Planes lie side by side along `in`, and meet the same x again for each."""

    def __init__(self, place: Place):
        self._many_rows = None if place.invariant else Packed(place)

    @staticmethod
    def fits(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> bool:
        """One number of planes for all pieces, and a shape that the product takes."""
        planes = {encoding.num_planes for encoding in encodings}
        shape_fits = num_out % _PACK_ROWS == 0 and num_in % GROUP_LEN == 0
        return (
            len(planes) == 1 and 0 not in planes and shape_fits and Packed.fits(place) and place.dtype == torch.bfloat16
        )

    def finish(self, pieces: Sequence[Piece]) -> Params:
        planes = [_padded(piece.encoding.group_ints(piece.encoded), piece.num_padding) for piece in pieces]
        codes, scale, zero = (torch.cat(part, 1) for part in zip(*planes, strict=True))
        num_planes, num_out, num_in = codes.shape
        side_by_side = codes.transpose(0, 1).reshape(num_out, num_planes * num_in)
        # The op takes 8 times the bytes it packs, so a large matrix goes through it piece by piece.
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows.int(), 1)
            for rows in side_by_side.split(_PACK_CHUNK_ROWS)
        ]
        scale_and_zero = torch.stack((scale, zero), -1).transpose(1, 2).flatten(0, 1).bfloat16().contiguous()
        dense = self._many_rows.finish(pieces) if self._many_rows else None
        return Params(torch.cat(packed), scale_and_zero, dense, num_planes)

    def apply(self, x: Tensor, params: Params) -> Tensor:
        if self._many_rows is not None and x.shape[0] > _MAX_ROWS:
            return self._many_rows.apply(x, params.dense)
        if params.num_planes > 1:
            x = x.repeat(1, params.num_planes)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, params.packed, GROUP_LEN, params.scale_and_zero)


def _padded(planes: GroupInts, num_rows: int) -> GroupInts:
    """Append rows of zeros: any code, with scale and zero 0."""
    if not num_rows:
        return planes
    return GroupInts(*(torch.cat((part, part.new_zeros(len(part), num_rows, part.shape[2])), 1) for part in planes))
