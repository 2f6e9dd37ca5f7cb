"""Mends of Triton 3.9's interpreter: what it computes wrongly, and what it works out again with each operation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder


def mend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InterpreterBuilder, "create_dot", _dot_of_floats(InterpreterBuilder.create_dot))
    patch.setattr(interpreter, "_convert_float", _rounding_to_8_bits(interpreter._convert_float))
    _replace_language_once(patch)
    builder = interpreter.interpreter_builder  # looks for overflows, and tells nobody where it does not debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", _kept_by_name(interpreter._get_np_dtype))
    _keep_types(patch)


def _dot_of_floats(dot: Callable[..., Any]) -> Callable[..., Any]:
    """It keeps bfloat16 as its bits, and tl.dot multiplies those."""

    def dot_of_floats(builder, a, b, *rest):
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(builder, a, b, *rest)

    return dot_of_floats


def _rounding_to_8_bits(convert: Callable[..., Any]) -> Callable[..., Any]:
    """It loses what is carried from the mantissa to the exponent."""
    kinds = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def converted(values, from_dtype, to_dtype, rounding):
        if from_dtype != tl.float32 or to_dtype not in kinds:
            return convert(values, from_dtype, to_dtype, rounding)
        return torch.tensor(values).to(kinds[to_dtype]).view(torch.uint8).numpy()

    return converted


def _replace_language_once(patch: pytest.MonkeyPatch) -> None:
    """It looks through the whole language again whenever a kernel calls a function."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # modules, by their names' address, whose language this launch has replaced

    def replaced_once(function):
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(function.__globals__))
        return replace(function)

    def launched(executor, *args, **kwargs):
        done.clear()  # at its end a launch puts back what it replaced
        return launch(executor, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", replaced_once)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)


def _kept_by_name(numpy_dtype: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """It makes a table of all dtypes to look one up."""
    kept: dict[str, np.dtype] = {}

    def looked_up(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        if scalar.name not in kept:
            kept[scalar.name] = numpy_dtype(scalar)
        return kept[scalar.name]

    return looked_up


def _keep_types(patch: pytest.MonkeyPatch) -> None:
    """It checks, names and wraps the shape of every result anew; shapes are few, and nothing changes one."""
    init_type, init_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, ...]] = {}

    def like_others(block_type, element_ty, shape):
        key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in types:
            init_type(block_type, element_ty, shape)
            types[key] = dict(vars(block_type))
        vars(block_type).update(types[key])

    def of_known_shape(tensor, handle, type):
        if type.name not in shapes:
            init_tensor(tensor, handle, type)
            shapes[type.name] = tensor.shape, tensor.numel
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.shape, tensor.numel = shapes[type.name]

    patch.setattr(tl.block_type, "__init__", like_others)
    patch.setattr(tl.tensor, "__init__", of_known_shape)
