"""Every kernel's public launcher on a CPU. No test names a kernel: a new one is found here by itself."""

import pytest

from cableway.kernels.registry import Case, Kernel, kernels
from tests.kernels import laws

CASES = [(kernel, case) for kernel in kernels() for case in kernel.cases]
ROW_WISE = [
    (kernel, {**case, "num_tokens": 37})
    for kernel, case in CASES
    if "does not depend on the others" in laws.contract(kernel) and case["num_tokens"] == 1
]


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=laws.label)
def test_launcher_equals_ref(kernel: Kernel, case: Case):
    laws.assert_equals_ref(kernel, kernel.function, laws.make(kernel, case))


@pytest.mark.parametrize(("kernel", "case"), ROW_WISE, ids=laws.label)
def test_rows_are_independent_where_that_is_promised(kernel: Kernel, case: Case):
    laws.assert_rows_are_independent(kernel, kernel.function, laws.make(kernel, case), case["num_tokens"])


def test_promises_are_found():
    assert {kernel.name for kernel, _ in ROW_WISE} >= {"rms_norm", "add_rms_norm", "rope", "silu_mul"}


@pytest.mark.parametrize("kernel", kernels(), ids=laws.label)
def test_launcher_refuses_or_computes(kernel: Kernel):
    laws.assert_refuses_or_computes(kernel, kernel.function, laws.make(kernel, kernel.cases[-1]))
