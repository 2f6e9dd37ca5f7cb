"""What loops compiled by Numba are made of: compiling, arguments, and numbers in memory by address and dtype.

Loops compute in float32. Compiled code is kept on disk beside this file, or else where Numba keeps it for a user.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, float32, intp, njit, types, uint16, uint32
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes as loops take them."""
_F32, _BF16 = 0, 1
INT, FLOAT = ir.IntType(64), ir.FloatType()

# Numba knows what has changed of the file that a loop is in, and not of those which that file imports.
_FOLDER = Path(__file__).parent
_digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.py")))).hexdigest()
numba.config.CACHE_DIR = str(_FOLDER / "__pycache__" / f"loops-{_digest[:16]}")


def compiled(signature: Signature, function: Callable):
    options = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to: compile at every start
        return cfunc(signature, **options)(function)


def _pointer(numba_type, llvm_type):
    @intrinsic
    def at(context, address):
        def generate(_, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm_type.as_pointer())

        return types.CPointer(numba_type)(intp), generate

    return at


f32_at = _pointer(float32, ir.FloatType())
i8_at = _pointer(types.int8, ir.IntType(8))
u8_at = _pointer(types.uint8, ir.IntType(8))
u16_at = _pointer(uint16, ir.IntType(16))
i32_at = _pointer(types.int32, ir.IntType(32))
i64_at = _pointer(types.int64, ir.IntType(64))


@intrinsic(prefer_literal=True)
def integers(context, address, number):
    """That many i64 from an address on, as a tuple."""
    kind = types.UniTuple(intp, number.literal_value)

    def generate(context, builder, signature, arguments):
        first = builder.inttoptr(arguments[0], INT.as_pointer())
        loaded = [builder.load(builder.gep(first, [INT(i)])) for i in range(kind.count)]
        return context.make_tuple(builder, kind, loaded)

    return kind(intp, number), generate


@intrinsic(prefer_literal=True)
def floats(context, address, number):
    """That many f64 from an address on, as a tuple of f32."""
    kind = types.UniTuple(float32, number.literal_value)

    def generate(context, builder, signature, arguments):
        first = builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())
        loaded = [builder.load(builder.gep(first, [INT(i)])) for i in range(kind.count)]
        return context.make_tuple(builder, kind, [builder.fptrunc(value, FLOAT) for value in loaded])

    return kind(intp, number), generate


@intrinsic
def f32_of_bits(context, bits):
    return float32(uint32), lambda _, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def bits_of_f32(context, value):
    return uint32(float32), lambda _, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def f32_of_half(context, bits):
    def generate(_, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return float32(uint16), generate


@intrinsic
def _half_of_f32(context, value):
    def generate(_, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return uint16(float32), generate


@njit(inline="always")
def read(address, start, size, kind, into):
    """into[i] = element start + i of the tensor of dtype `kind` at `address`"""
    if kind == _F32:
        wide = f32_at(address)
        for i in range(size):
            into[i] = wide[start + i]
    elif kind == _BF16:
        narrow = u16_at(address)
        for i in range(size):
            into[i] = f32_of_bits(uint32(narrow[start + i]) << uint32(16))
    else:
        narrow = u16_at(address)
        for i in range(size):
            into[i] = f32_of_half(narrow[start + i])


@njit(inline="always")
def write(address, start, size, kind, values):
    """Element start + i = values[i], rounded to nearest even; NaN stays NaN."""
    if kind == _F32:
        wide = f32_at(address)
        for i in range(size):
            wide[start + i] = values[i]
    elif kind == _BF16:
        narrow = u16_at(address)
        for i in range(size):
            bits = bits_of_f32(values[i])
            rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
            is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
            narrow[start + i] = uint16(0x7FC0) if is_nan else uint16(rounded)
    else:
        narrow = u16_at(address)
        for i in range(size):
            narrow[start + i] = _half_of_f32(values[i])


@njit(inline="always")
def exp(x):
    """e**x to 2 units in the last place, without a branch; x counts as at least -104, which gives 0, and at most 88."""
    x = min(max(x, float32(-104.0)), float32(88.0))
    n = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - n * float32(0.693145751953125) - n * float32(1.428606765330187e-06)
    p = float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + float32(c)
    p = p * r * r + r + float32(1)
    return p * f32_of_bits(uint32(max(np.int32(n) + np.int32(127), np.int32(0))) << uint32(23))
