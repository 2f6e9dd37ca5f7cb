"""The block types of GGUF files. A block of 32 (or 256) numbers is some bytes of small integers with their scales.

Types of 4 and 8 bits with a scale every 32 numbers are also sums of 4-bit planes, exactly (see `GroupInts`); all others
are decoded to plain numbers by the `gguf` package.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.workers.formats.stored import GROUP_LEN, PLAIN, Encoding, GroupInts

_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Blocks:
    """Encoded tensors are [rows, blocks, block_bytes] u8."""

    num_planes = 0

    def __init__(self, name: str):
        self.name = name
        self._kind = GGMLQuantizationType[name]
        self.block_len, self.block_bytes = GGML_QUANT_SIZES[self._kind]

    def decode(self, encoded: Tensor) -> Tensor:
        """-> [rows, numbers] f32"""
        return torch.from_numpy(dequantize(encoded.flatten(1).numpy(), self._kind))

    def group_ints(self, encoded: Tensor) -> GroupInts:
        raise NotImplementedError


class Q4(Blocks):
    """16 bytes of two codes each, after a scale d: `(q - 8) d`, or after d and a minimum m: `q d + m`."""

    num_planes = 1

    def group_ints(self, encoded: Tensor) -> GroupInts:
        head_bytes = self.block_bytes - GROUP_LEN // 2
        head = _halves(encoded[..., :head_bytes])
        packed = encoded[..., head_bytes:]
        codes = torch.cat((packed & 15, packed >> 4), -1).flatten(1)
        scale = head[..., 0]
        zero = head[..., 1] + 8 * scale if head_bytes == 4 else torch.zeros_like(scale)
        return GroupInts(codes[None], scale[None], zero[None])


class Q8(Blocks):
    """A scale d and 32 signed bytes q: `q d` with q = 16 high + low, so two planes of scales 16 d and d."""

    num_planes = 2

    def group_ints(self, encoded: Tensor) -> GroupInts:
        scale = _halves(encoded[..., :2])[..., 0]
        q = encoded[..., 2:].flatten(1)
        high, low = (q >> 4) ^ 8, q & 15  # two's complement: flipping the sign bit of the high half adds 8 to it
        return GroupInts(
            torch.stack((high, low)),
            torch.stack((16 * scale, scale)),
            torch.stack((torch.zeros_like(scale), 8 * scale)),
        )


def _halves(encoded: Tensor) -> Tensor:
    """Bytes that hold float16 values -> float32."""
    return encoded.contiguous().view(torch.float16).float()


_ENCODINGS: dict[int, Encoding] = {
    **dict.fromkeys(_PLAIN_DTYPES, PLAIN),
    **{GGMLQuantizationType[name]: Blocks(name) for name in _BLOCK_TYPES},
    GGMLQuantizationType.Q4_0: Q4("Q4_0"),
    GGMLQuantizationType.Q4_1: Q4("Q4_1"),
    GGMLQuantizationType.Q8_0: Q8("Q8_0"),
}


def encoding(ggml_type: int, tensor_name: str) -> Encoding:
    """The encoding of a GGUF type; ModelError for those not served."""
    if ggml_type not in _ENCODINGS:
        known = ", ".join(kind.name for kind in map(GGMLQuantizationType, _ENCODINGS))
        raise ModelError(f"tensor {tensor_name!r} is {GGMLQuantizationType(ggml_type).name}, not one of {known}")
    return _ENCODINGS[ggml_type]


def view(data: np.ndarray, shape: tuple[int, ...], ggml_type: int) -> Tensor:
    """A tensor's bytes in the file, as its encoding takes them."""
    if dtype := _PLAIN_DTYPES.get(GGMLQuantizationType(ggml_type)):
        return torch.from_numpy(data).view(dtype).view(shape)
    return torch.from_numpy(data).view(*shape[:-1], -1, GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)][1])
