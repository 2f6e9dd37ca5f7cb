"""8-bit integers with a scale every 32 numbers, on a CPU in bfloat16: Q8_0.

Up to four rows read the integers as they are; for more, where arithmetic counts, the same matrix is kept dense beside.
PERF: the head of SmolLM2-135M, 49,152 x 576, 2 threads, 1 / 2 / 4 rows: as integers 1.4 / 2.1 / 2.5 ms, dense 3.3 /
3.5 / 2.75.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.lang import loops
from cableway.workers.formats.base import Place
from cableway.workers.formats.dense import Packed
from cableway.workers.formats.stored import GROUP_LEN, Encoding, Piece

_MAX_ROWS = 4


class Params(NamedTuple):
    codes: Tensor  # [out, in] i8
    scale: Tensor  # [out, in / GROUP_LEN] f32
    dense: Tensor


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
        return Params(codes, scale, self._many_rows.finish(pieces))

    def apply(self, x: Tensor, params: Params) -> Tensor:
        num_rows, (num_out, num_in) = x.shape[0], params.codes.shape
        if num_rows > _MAX_ROWS:
            return self._many_rows.apply(x, params.dense)
        y = torch.empty(num_rows, num_out, dtype=x.dtype)
        loops.run(
            loops.multiply_int8, num_out, num_rows * num_in, x.data_ptr(), x.stride(0), loops.KINDS[x.dtype], num_rows,
            params.codes.data_ptr(), params.scale.data_ptr(), y.data_ptr(), num_in, num_out,
        )  # fmt: skip
        return y
