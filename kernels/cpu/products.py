"""Products with matrices of small integers, as files hold them: rows of activations by the bytes of the file.

torch has none of 8 bits with a scale every 32 numbers, and rounds the scales of its own of 4 bits. Activations become
16-bit integers with one scale a row, which is finer than bfloat16; integers are multiplied and added exactly within a
group, in float32 between groups.
"""

import numpy as np
from llvmlite import ir
from numba import float32, intp, njit, types, uint32
from numba.extending import intrinsic

from cableway.kernels.cpu.compiled import FLOAT, INT, KINDS, bits_of_f32, f32_of_bits, integers, read, write
from cableway.kernels.cpu.team import Loop, Prepared, loop

__all__ = ["KINDS", "Loop", "Prepared"]

GROUP_LEN = 32
"""Numbers of a row of weights that share a scale."""
_LANES = GROUP_LEN // 2
_FINEST = 32767
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
def _integers_of(x, x_stride, kind, num_rows, num_in):
    """Rows of x as integers [num_rows, num_in] times units, and per row that unit and then the sums of the groups.

    Rows that hold a number that is not finite get a unit that is NaN.
    """
    num_groups = num_in // GROUP_LEN
    fine = np.empty((num_rows, num_in), np.int16)
    numbers = np.empty(num_in + num_rows * (1 + num_groups), np.float32)
    row, sums = numbers[:num_in], numbers[num_in:].reshape(num_rows, 1 + num_groups)
    for token in range(num_rows):
        read(x, token * x_stride, num_in, kind, row)
        largest_bits = uint32(0)  # of a number without its sign; the order of bits is that of numbers
        for i in range(num_in):
            largest_bits = max(largest_bits, bits_of_f32(row[i]) & uint32(0x7FFFFFFF))
        largest = f32_of_bits(largest_bits)
        is_finite = largest_bits < uint32(0x7F800000)
        sums[token, 0] = largest / float32(_FINEST) if is_finite else np.nan
        per_unit = float32(_FINEST) / largest if is_finite and largest > 0 else float32(0)
        for i in range(num_in):
            # The sum has no room for a fraction: its low bits are the nearest integer.
            fine[token, i] = np.int16(bits_of_f32(row[i] * per_unit + float32(_NO_FRACTION)) & uint32(0xFFFF))
        for group in range(num_groups):
            total = np.int32(0)
            for i in range(group * GROUP_LEN, (group + 1) * GROUP_LEN):
                total += np.int32(fine[token, i])
            sums[token, 1 + group] = total
    return fine, sums


@loop(10)
def multiply_int8(begin, end, arguments):
    """y [num_rows, num_out] = x [num_rows, num_in] Wᵀ for rows `begin` … `end` of W: i8 codes, and their scales.

    A row's result does not depend on the others. Numbers that are not finite give results that are not.
    """
    x, x_stride, num_rows, y, kind, codes, scales, scale_kind, num_in, num_out = integers(arguments, 10)
    num_groups = num_in // GROUP_LEN
    fine, sums = _integers_of(x, x_stride, kind, num_rows, num_in)
    scale, result = np.empty(num_groups, np.float32), np.empty(1, np.float32)
    for row in range(begin, end):
        read(scales, row * num_groups, num_groups, scale_kind, scale)
        for token in range(num_rows):
            row_of_x = fine.ctypes.data + token * num_in * 2
            result[0] = sums[token, 0] * _dot_8_1(codes + row * num_in, scale.ctypes.data, row_of_x, num_groups)[0]
            write(y, token * num_out + row, 1, kind, result)


@loop(10)
def multiply_int4(begin, end, arguments):
    """The same where W is `codes * scale + offset`; rows are pairs of rows of W, one in the low bits, one in the high.

    `scales` are [pairs, 2, 2, groups]: of each row of a pair its scales, then of each its offsets.
    """
    x, x_stride, num_rows, y, kind, codes, scales, scale_kind, num_in, num_out = integers(arguments, 10)
    num_groups = num_in // GROUP_LEN
    fine, sums = _integers_of(x, x_stride, kind, num_rows, num_in)
    scale, results = np.empty(4 * num_groups, np.float32), np.empty((4, 2), np.float32)
    for pair in range(begin, end):
        read(scales, pair * 4 * num_groups, 4 * num_groups, scale_kind, scale)
        token = 0
        while token < num_rows:
            row_of_x = fine.ctypes.data + token * num_in * 2
            if token + 4 <= num_rows:
                together = 4
                dots = _dot_4_4(codes + pair * num_in, scale.ctypes.data, row_of_x, num_groups)
                for i in range(4):
                    results[i, 0], results[i, 1] = dots[i], dots[4 + i]
            else:
                together = 1
                results[0, 0], results[0, 1] = _dot_4_1(codes + pair * num_in, scale.ctypes.data, row_of_x, num_groups)
            for i in range(together):
                for row in range(2):
                    first, offset = (2 + row) * num_groups, float32(0)
                    for group in range(num_groups):
                        offset += scale[first + group] * sums[token + i, 1 + group]
                    results[i, row] = (results[i, row] + offset) * sums[token + i, 0]
                write(y, (token + i) * num_out + 2 * pair, 2, kind, results[i])
            token += together
