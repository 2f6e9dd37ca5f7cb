"""Products with matrices of small integers, as files hold them: rows of activations by the bytes of the file.

torch has none of 8 bits with a scale every 32 numbers, and rounds the scales of its own of 4 bits. Activations become
16-bit integers with one scale a row, which is finer than bfloat16; integers are multiplied and added exactly within a
group, in float32 between groups.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import float32, intp, njit, types, uint32
from numba.extending import intrinsic

from cableway.kernels.cpu.compiled import (
    FLOAT,
    INT,
    KINDS,
    bits_of_f32,
    exp,
    f32_at,
    f32_of_bits,
    floats,
    integers,
    read,
    write,
)
from cableway.kernels.cpu.team import Loop, Prepared, loop

__all__ = ["KINDS", "Loop", "Prepared"]

GROUP_LEN = 32
"""Numbers of a row of weights that share a scale."""
_LANES = GROUP_LEN // 2
_FINEST = 32767
_F32 = KINDS[torch.float32]
_NO_FRACTION = 1.5 * 2**23
_SUMS = ir.VectorType(FLOAT, _LANES)
_NARROW, _WIDE = ir.VectorType(ir.IntType(16), GROUP_LEN), ir.VectorType(ir.IntType(32), GROUP_LEN)
_INDEX = ir.IntType(32)


def _dot_of(bits: int, num_tokens: int):
    """Make dot(codes, scales, x, num_groups): sums over groups g of scale[g] * (code[g] · x[g]) for each token.

    Codes are a row of i8, or of 4 bits each two rows in one of bytes (the first in the low bits); scales f32, of one
    row after the other; x i16, one token after the other. All are given by address. The result is a tuple: for each
    row, each token.

    Written for LLVM, as Numba turns loops over bytes into code that goes one by one: a group becomes four instructions
    where there are vectors of 512 bits, and what fits elsewhere.
    """
    num_rows = 8 // bits
    kind = types.UniTuple(float32, num_rows * num_tokens)

    def generate(context, builder, signature, arguments):
        codes, scales, x, num_groups = arguments
        before = builder.block
        group_block, after = builder.append_basic_block("group"), builder.append_basic_block("after")
        builder.branch(group_block)
        builder.position_at_end(group_block)
        group = builder.phi(INT)
        group.add_incoming(INT(0), before)
        sums = [builder.phi(_SUMS) for _ in range(kind.count)]
        for total in sums:
            total.add_incoming(ir.Constant(_SUMS, [0.0] * _LANES), before)

        def load(base, element, number, row):
            """Group number `group` of a row of groups of `number` elements."""
            loaded_type = element if number == 1 else ir.VectorType(element, number)
            num_bytes = 4 if element is FLOAT else element.width // 8
            index = builder.add(group, builder.mul(num_groups, INT(row)))
            address = builder.add(base, builder.mul(index, INT(number * num_bytes)))
            loaded = builder.load(builder.inttoptr(address, loaded_type.as_pointer()))
            loaded.align = num_bytes
            return loaded

        def pairs_added(products):
            """Products [32] of i32, neighbours added: an instruction of its own on most processors."""
            first, second = (
                ir.Constant(ir.VectorType(_INDEX, _LANES), [_INDEX(2 * lane + odd) for lane in range(_LANES)])
                for odd in (0, 1)
            )
            shuffle = builder.shuffle_vector
            return builder.add(shuffle(products, products, first), shuffle(products, products, second))

        def everywhere(number):
            one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), number, _INDEX(0))
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INDEX, _LANES), [0] * _LANES))

        stored = load(codes, ir.IntType(8), GROUP_LEN, 0)
        if bits == 8:
            rows = [builder.sext(stored, _WIDE)]
        else:
            both = builder.zext(stored, _NARROW)
            low = builder.and_(both, ir.Constant(_NARROW, [15] * GROUP_LEN))
            high = builder.lshr(both, ir.Constant(_NARROW, [4] * GROUP_LEN))
            rows = [builder.zext(low, _WIDE), builder.zext(high, _WIDE)]
        tokens = [builder.sext(load(x, ir.IntType(16), GROUP_LEN, token), _WIDE) for token in range(num_tokens)]
        next_group = builder.add(group, INT(1))
        new_sums = []
        for number, row in enumerate(rows):
            scale = everywhere(load(scales, FLOAT, 1, number))
            for token in tokens:
                exact = builder.sitofp(pairs_added(builder.mul(row, token)), _SUMS)
                scaled = builder.fmul(exact, scale, flags=("contract",))
                new_sums.append(builder.fadd(scaled, sums[len(new_sums)], flags=("contract",)))
        for total, new in zip(sums, new_sums, strict=True):
            total.add_incoming(new, group_block)
        group.add_incoming(next_group, group_block)
        builder.cbranch(builder.icmp_signed("<", next_group, num_groups), group_block, after)
        builder.position_at_end(after)
        name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
        module = builder.module
        add_up = module.globals.get(name) or ir.Function(module, ir.FunctionType(FLOAT, [FLOAT, _SUMS]), name)
        totals = [builder.call(add_up, [FLOAT(0.0), new], fastmath=("reassoc",)) for new in new_sums]
        return context.make_tuple(builder, kind, totals)

    return intrinsic(lambda context, codes, scales, x, num_groups: (kind(intp, intp, intp, intp), generate))


_dot_8_1, _dot_4_1, _dot_4_4 = _dot_of(8, 1), _dot_of(4, 1), _dot_of(4, 4)


@njit(inline="always")
def _normalise_sum(row, token, num_in, residual, norm, eps, offset, total):
    """row [num_in] = RMS norm of row + residual [.., num_in] f32; the sum itself goes to `total`, if that is not 0."""
    kept, weight = f32_at(residual), f32_at(norm)
    squares = float32(0)
    for i in range(num_in):
        row[i] += kept[token * num_in + i]
        squares += row[i] * row[i]
    if total:
        write(total, token * num_in, num_in, _F32, row)
    scale = float32(1) / np.sqrt(squares / float32(num_in) + eps)
    for i in range(num_in):
        row[i] = row[i] * scale * (weight[i] + offset)


@njit(inline="always")
def _as_integers(row, num_in, fine, sums):
    """A row [num_in] as integers times a unit; `sums` gets that unit, then the sums of the groups.

    The unit is NaN if a number is not finite.
    """
    largest_bits = uint32(0)  # of a number without its sign; the order of bits is that of numbers
    for i in range(num_in):
        largest_bits = max(largest_bits, bits_of_f32(row[i]) & uint32(0x7FFFFFFF))
    largest = f32_of_bits(largest_bits)
    is_finite = largest_bits < uint32(0x7F800000)
    sums[0] = largest / float32(_FINEST) if is_finite else np.nan
    per_unit = float32(_FINEST) / largest if is_finite and largest > 0 else float32(0)
    for i in range(num_in):
        # The sum has no room for a fraction: its low bits are the nearest integer.
        fine[i] = np.int16(bits_of_f32(row[i] * per_unit + float32(_NO_FRACTION)) & uint32(0xFFFF))
    for group in range(num_in // GROUP_LEN):
        total = np.int32(0)
        for i in range(group * GROUP_LEN, (group + 1) * GROUP_LEN):
            total += np.int32(fine[i])
        sums[1 + group] = total


@loop(10)
def multiply_int8(begin, end, arguments):
    """y [num_rows, num_out] = x [num_rows, num_in] Wᵀ for rows `begin` … `end` of W: i8 codes, and their scales.

    A row's result does not depend on the others. Numbers that are not finite give results that are not.
    """
    x, x_stride, num_rows, y, kind, codes, scales, scale_kind, num_in, num_out = integers(arguments, 10)
    num_groups = num_in // GROUP_LEN
    row, fine = np.empty(num_in, np.float32), np.empty((num_rows, num_in), np.int16)
    sums = np.empty((num_rows, 1 + num_groups), np.float32)
    for token in range(num_rows):
        read(x, token * x_stride, num_in, kind, row)
        _as_integers(row, num_in, fine[token], sums[token])
    scale, result = np.empty(num_groups, np.float32), np.empty(1, np.float32)
    for out in range(begin, end):
        read(scales, out * num_groups, num_groups, scale_kind, scale)
        for token in range(num_rows):
            row_of_x = fine.ctypes.data + token * num_in * 2
            result[0] = sums[token, 0] * _dot_8_1(codes + out * num_in, scale.ctypes.data, row_of_x, num_groups)[0]
            write(y, token * num_out + out, 1, kind, result)


@loop(9, 2)
def multiply_int4(begin, end, arguments):
    """y = gate(n(x) Wᵀ + b), where W is `codes * scale + offset`, for pairs `begin` … `end` of rows of W.

    A pair is row i of W in the low bits of its codes, and row i of W's second half in the high ones. `scales` are
    [pairs, 2, 2, groups]: of both rows their scales, then of both their offsets. Where `gated`, silu of the first row
    times the second is what comes out. Where `residual` is not 0 the input is the norm of its sum with x, which goes
    to `total`.
    """
    x, x_stride, num_rows, y, bias, gated, residual, total, norm = integers(arguments, 9)
    eps, norm_offset = floats(arguments + 72, 2)
    kind, codes, scales, scale_kind, num_in, num_pairs = integers(arguments + 88, 6)
    num_groups = num_in // GROUP_LEN
    row, fine = np.empty(num_in, np.float32), np.empty((num_rows, num_in), np.int16)
    sums = np.empty((num_rows, 1 + num_groups), np.float32)
    for token in range(num_rows):
        read(x, token * x_stride, num_in, kind, row)
        if residual:
            _normalise_sum(row, token, num_in, residual, norm, eps, norm_offset, 0 if begin else total)
        _as_integers(row, num_in, fine[token], sums[token])
    num = end - begin
    scale, results = np.empty(4 * num_groups, np.float32), np.empty((2, num_rows, num), np.float32)
    for pair in range(begin, end):
        read(scales, pair * 4 * num_groups, 4 * num_groups, scale_kind, scale)
        token = 0
        while token < num_rows:
            row_of_x = fine.ctypes.data + token * num_in * 2
            if token + 4 <= num_rows:
                together = 4
                dots = _dot_4_4(codes + pair * num_in, scale.ctypes.data, row_of_x, num_groups)
                for i in range(4):
                    results[0, token + i, pair - begin] = dots[i]
                    results[1, token + i, pair - begin] = dots[4 + i]
            else:
                together = 1
                dot, other_dot = _dot_4_1(codes + pair * num_in, scale.ctypes.data, row_of_x, num_groups)
                results[0, token, pair - begin], results[1, token, pair - begin] = dot, other_dot
            for i in range(token, token + together):
                offset, other_offset = float32(0), float32(0)
                for group in range(num_groups):
                    offset += scale[2 * num_groups + group] * sums[i, 1 + group]
                    other_offset += scale[3 * num_groups + group] * sums[i, 1 + group]
                results[0, i, pair - begin] += offset
                results[1, i, pair - begin] += other_offset
            token += together
    biases = np.zeros((2, num), np.float32)
    if bias:
        for half in range(2):
            read(bias, half * num_pairs + begin, num, kind, biases[half])
    for token in range(num_rows):
        first, second = results[0, token], results[1, token]
        for i in range(num):
            first[i] = first[i] * sums[token, 0] + biases[0, i]
            second[i] = second[i] * sums[token, 0] + biases[1, i]
        if gated:
            for i in range(num):
                first[i] = first[i] / (float32(1) + exp(-first[i])) * second[i]
            write(y, token * num_pairs + begin, num, kind, first)
        else:
            write(y, 2 * token * num_pairs + begin, num, kind, first)
            write(y, (2 * token + 1) * num_pairs + begin, num, kind, second)
