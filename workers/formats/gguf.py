"""The block types of GGUF files. A block of 32 (or 256) numbers is some bytes of small integers with their scales.

The `gguf` package decodes them to plain numbers. Types of 4 bits with a scale every 32 numbers can also stay integers
(see `GroupInts`).
"""

import math

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
_LONG_ROW_LEN = 1 << 14
_BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Blocks:
    """Encoded tensors are [rows, blocks, block_bytes] u8."""

    is_group_ints = False

    def __init__(self, name: str):
        self.name = name
        self._kind = GGMLQuantizationType[name]
        self.block_len, self.block_bytes = GGML_QUANT_SIZES[self._kind]

    def decode(self, encoded: Tensor) -> Tensor:
        """-> [rows, numbers] f32"""
        num_rows, row_len = encoded.shape[0], encoded.shape[1] * self.block_len
        # The package goes through 16 rows at a time in Python: hand it fewer and longer ones.
        joined = math.gcd(num_rows, 1 << max(0, (_LONG_ROW_LEN // row_len).bit_length() - 1))
        values = dequantize(encoded.reshape(num_rows // joined, -1).numpy(), self._kind)
        return torch.from_numpy(values).view(num_rows, row_len)

    def group_ints(self, encoded: Tensor) -> GroupInts:
        raise NotImplementedError


class Q4(Blocks):
    """16 bytes of two codes each, after a scale d: `(q - 8) d`, or after d and a minimum m: `q d + m`."""

    is_group_ints = True

    def group_ints(self, encoded: Tensor) -> GroupInts:
        head_bytes = self.block_bytes - GROUP_LEN // 2
        head = _halves(encoded[..., :head_bytes])
        packed = encoded[..., head_bytes:]
        codes = torch.cat((packed & 15, packed >> 4), -1).flatten(1)
        scale = head[..., 0]
        zero = head[..., 1] + 8 * scale if head_bytes == 4 else torch.zeros_like(scale)
        return GroupInts(codes, scale, zero)


def _halves(encoded: Tensor) -> Tensor:
    """Bytes that hold float16 values -> float32."""
    return encoded.contiguous().view(torch.float16).float()


_ENCODINGS: dict[int, Encoding] = {
    **dict.fromkeys(_PLAIN_DTYPES, PLAIN),
    **{GGMLQuantizationType[name]: Blocks(name) for name in _BLOCK_TYPES},
    GGMLQuantizationType.Q4_0: Q4("Q4_0"),
    GGMLQuantizationType.Q4_1: Q4("Q4_1"),
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
