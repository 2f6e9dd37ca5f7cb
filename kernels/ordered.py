"""Integers in place of floats: a warp has an instruction for the largest of its integers, and none for floats."""

from __future__ import annotations

from cableway.kernels.lang import jit, tl


@jit
def ordered(x):
    """int32 keys in the order of float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
