"""The block types of GGUF files. A block of 32 (or 256) numbers is some bytes of small integers with their scales.

The `gguf` package decodes them to plain numbers. Types of 4 and of 8 bits with a scale every 32 numbers can also stay
integers (see `GroupInts` and `GroupBytes`).
"""

import math

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.workers.formats.stored import GROUP_LEN, PLAIN, Encoding, GroupBytes, GroupInts

_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_LONG_ROW_LEN = 1 << 14
_BLOCK_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)


class Blocks:
    """Encoded tensors are [..., blocks, block_bytes] u8."""

    group_ints = group_bytes = None

    def __init__(self, name: str):
        self.name = name
        self._kind = GGMLQuantizationType[name]
        self.block_len, self.block_bytes = GGML_QUANT_SIZES[self._kind]

    def decode(self, encoded: Tensor) -> Tensor:
        """-> [..., numbers] f32"""
        *dims, num_blocks, _ = encoded.shape
        num_rows, row_len = math.prod(dims), num_blocks * self.block_len
        # The package goes through 16 rows at a time in Python: hand it fewer and longer ones.
        joined = math.gcd(num_rows, 1 << max(0, (_LONG_ROW_LEN // row_len).bit_length() - 1))
        values = dequantize(encoded.reshape(num_rows // joined, -1).numpy(), self._kind)
        return torch.from_numpy(values).view(*dims, row_len)


class Q8(Blocks):
    """A scale d, then 32 codes of a byte: `q d`."""

    def group_bytes(self, encoded: Tensor) -> GroupBytes:
        head, codes = encoded.split((2, GROUP_LEN), -1)
        return GroupBytes(codes.contiguous().view(torch.int8).flatten(1), _halves(head)[..., 0])


class Q4(Blocks):
    """16 bytes of two codes each, after a scale d: `(q - 8) d`, or after d and a minimum m: `q d + m`."""

    def group_ints(self, encoded: Tensor) -> GroupInts:
        head_bytes = self.block_bytes - GROUP_LEN // 2
        head = _halves(encoded[..., :head_bytes])
        packed = encoded[..., head_bytes:]
        codes = torch.cat((packed & 15, packed >> 4), -1).flatten(1)
        scale = head[..., 0]
        return GroupInts(codes, scale, head[..., 1] if head_bytes == 4 else -8 * scale)


class Q4K(Blocks):
    """256 codes q with scales d, e, and for each 32 of them 6-bit s and m: `q s d - m e`."""

    def group_ints(self, encoded: Tensor) -> GroupInts:
        halves, packed, pairs = encoded.split((4, 12, 128), -1)
        d, e = _halves(halves).unsqueeze(-1).unbind(-2)
        # Of the 8 s and m the first four are the low 6 bits of bytes 0-3 and 4-7; of the others bytes 8-11 hold the low
        # 4 bits, s before m, and the top bits of bytes 0-7 the high two.
        s, m, low = packed.split(4, -1)
        scale = d * torch.cat((s & 63, (low & 15) | (s >> 6 << 4)), -1)
        minimum = e * torch.cat((m & 63, (low >> 4) | (m >> 6 << 4)), -1)
        pairs = pairs.unflatten(-1, (4, 1, 32))
        codes = torch.cat((pairs & 15, pairs >> 4), -2).flatten(1)
        return GroupInts(codes, scale.flatten(1), -minimum.flatten(1))


def _halves(encoded: Tensor) -> Tensor:
    """Bytes that hold float16 values -> float32."""
    return encoded.contiguous().view(torch.float16).float()


_ENCODINGS: dict[int, Encoding] = {
    **dict.fromkeys(_PLAIN_DTYPES, PLAIN),
    **{GGMLQuantizationType[name]: Blocks(name) for name in _BLOCK_TYPES},
    GGMLQuantizationType.Q8_0: Q8("Q8_0"),
    GGMLQuantizationType.Q4_0: Q4("Q4_0"),
    GGMLQuantizationType.Q4_1: Q4("Q4_1"),
    GGMLQuantizationType.Q4_K: Q4K("Q4_K"),
}


def encoding(ggml_type: int, num_dims: int, tensor_name: str) -> Encoding:
    """The encoding of a tensor of a GGUF type; ModelError for those not served."""
    known = [GGMLQuantizationType(kind) for kind in (_PLAIN_DTYPES if num_dims < 2 else _ENCODINGS)]
    if ggml_type not in known:
        kind, names = GGMLQuantizationType(ggml_type).name, ", ".join(kind.name for kind in known)
        raise ModelError(f"tensor {tensor_name!r} of {num_dims} dimensions is {kind}, not one of {names}")
    return _ENCODINGS[ggml_type]


def view(data: np.ndarray, shape: tuple[int, ...], ggml_type: int) -> Tensor:
    """A tensor's bytes in the file, as its encoding takes them."""
    if dtype := _PLAIN_DTYPES.get(GGMLQuantizationType(ggml_type)):
        return torch.from_numpy(data).view(dtype).view(shape)
    return torch.from_numpy(data).view(*shape[:-1], -1, GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)][1])
