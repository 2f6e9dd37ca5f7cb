"""Matrices of plain numbers in the compute dtype."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Piece

_TILE_ROWS = 16


class Dense:
    """Row-major, multiplied by torch."""

    def __init__(self, place: Place):
        self.place = place

    def finish(self, pieces: Sequence[Piece]) -> Tensor:
        weight = torch.cat([piece.decode(self.place.dtype) for piece in pieces])
        return weight.to(self.place.device)

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        return F.linear(x, params)


class Tiled(Dense):
    """On a CPU, a row's sums in the same order whatever rows are beside it: each product takes exactly 16 rows.

    A BLAS picks its kernel, and with it the order of its sums, by the number of rows.
    """

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % _TILE_ROWS))
        tiles = [F.linear(tile, params) for tile in padded.split(_TILE_ROWS)]
        return torch.cat(tiles)[:num_rows] if len(tiles) > 1 else tiles[0][:num_rows]


class Packed(Dense):
    """On a CPU, bfloat16 or float16 in the blocked layout of oneDNN, which plain products make anew at every call.

    PERF: 3072 x 576 by 4 rows, one thread: 88 us packed, 169 us row-major; by 256 rows 4.2 and 4.4 ms.
    """

    @staticmethod
    def fits(place: Place) -> bool:
        return place.dtype in (torch.bfloat16, torch.float16) and torch.backends.mkldnn.is_available()

    def finish(self, pieces: Sequence[Piece]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(super().finish(pieces), _TILE_ROWS)

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, params, None, "none", [], "")
