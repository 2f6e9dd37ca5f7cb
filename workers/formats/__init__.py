"""How a weight matrix is held in memory and multiplied. One file a format; model files know none of them.

Many encodings in files end in few formats here, each with one product tuned for it. Where a file's integers can be
multiplied as they are, they stay integers; nothing is ever rounded to fewer bits than the file has or the compute
dtype gives.
"""

from collections.abc import Sequence

from cableway.workers.formats.base import Format, Place, Sum
from cableway.workers.formats.dense import Dense, Packed, Tiled
from cableway.workers.formats.experts import OneByOne, Together
from cableway.workers.formats.gpu import Invariant, OnGpu
from cableway.workers.formats.int4 import Int4
from cableway.workers.formats.int8 import Int8
from cableway.workers.formats.stored import Encoding

__all__ = ["Format", "Place", "Sum", "choose", "choose_for_experts"]


def choose(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> Format:
    """The fastest format that keeps all that these encodings hold of a matrix [num_out, num_in]."""
    if place.device.type != "cpu":
        return Invariant(place) if place.invariant else OnGpu(place)
    if Int4.fits(encodings, num_out, num_in, place):
        return Int4(place)
    if Int8.fits(encodings, num_in, place):
        return Int8(place)
    form = Packed(place) if Packed.fits(place) else Dense(place)
    return Tiled(form) if place.invariant else form


def choose_for_experts(encodings: Sequence[Encoding], num_out: int, num_in: int, place: Place) -> OneByOne | Together:
    """The same for many matrices of that shape, of which a row is multiplied by one."""
    return OneByOne(choose(encodings, num_out, num_in, place)) if place.device.type == "cpu" else Together(place)
