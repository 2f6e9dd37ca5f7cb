"""Every kernel's Triton form in Triton's interpreter: test_triton.py runs this file in a process set for that."""

import pytest
from triton import language as tl
from triton.runtime import interpreter

from cableway.kernels.lang import jit
from cableway.kernels.registry import Case, Kernel, kernels
from tests.kernels import laws

CASES = [(kernel, case) for kernel in kernels() for case in kernel.cases]


pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) is -inf, as on a GPU


@pytest.fixture(autouse=True)
def dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter keeps bfloat16 as its bits, and tl.dot multiplies those."""
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_floats(builder, a, b, *rest):
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(builder, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_floats)


def test_the_interpreter_is_on():
    assert isinstance(jit(laws.make), interpreter.InterpretedFunction)


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=laws.label)
def test_triton_form_equals_ref(kernel: Kernel, case: Case):
    laws.assert_equals_ref(kernel, kernel.launch, laws.make(kernel, case))


@pytest.mark.parametrize("kernel", kernels(), ids=laws.label)
def test_what_the_launcher_lets_through_the_triton_form_computes(kernel: Kernel):
    laws.assert_refuses_or_computes(kernel, kernel.launch, laws.make(kernel, kernel.cases[-1]))
