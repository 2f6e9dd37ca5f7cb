"""One thread, as other tests want the other core; the device; and mends of Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import laws


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=laws.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


if laws.INTERPRETED:

    @pytest.fixture(autouse=True)
    def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton 3.9's interpreter keeps bfloat16 as its bits, and tl.dot multiplies those."""
        from triton import language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        dot = InterpreterBuilder.create_dot

        def dot_of_floats(builder, a, b, *rest):
            a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
            return dot(builder, a, b, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_of_floats)

    @pytest.fixture(autouse=True)
    def rounding_to_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton 3.9's interpreter loses what is carried from the mantissa to the exponent."""
        from triton import language as tl
        from triton.runtime import interpreter

        convert, kinds = (
            interpreter._convert_float,
            {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2},
        )

        def converted(values, from_dtype, to_dtype, rounding):
            if from_dtype != tl.float32 or to_dtype not in kinds:
                return convert(values, from_dtype, to_dtype, rounding)
            return torch.tensor(values).to(kinds[to_dtype]).view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", converted)

    @pytest.fixture(autouse=True)
    def language_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton 3.9's interpreter looks through the whole language again whenever a kernel calls a function."""
        from triton.runtime import interpreter

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

        monkeypatch.setattr(interpreter, "_patch_lang", replaced_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
