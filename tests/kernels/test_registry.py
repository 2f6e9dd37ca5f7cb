"""Every kernel, in the form at hand (laws.py). No test names a kernel: a new one is found here by itself."""

import os

import pytest
import torch

from cableway.kernels.registry import Case, Kernel, kernels
from tests.kernels import laws


def _adds_little(case: Case) -> bool:
    """To the cases beside it, where the interpreter takes its time: sequences in float32 are there, too."""
    return case.get("dtype") == torch.float16 or ("spans" in case and case.get("dtype") == torch.bfloat16)


CASES = [
    pytest.param(kernel, case, marks=laws.slow_where_interpreted if _adds_little(case) else ())
    for kernel in kernels()
    for case in kernel.cases
]
ROW_WISE = [  # what makes rows depend on each other is how they are dealt out: in the interpreter float32 shows it
    pytest.param(
        kernel,
        {**case, "num_tokens": 37},
        marks=laws.slow_where_interpreted if case.get("dtype", torch.float32) != torch.float32 else (),
    )
    for kernel in kernels()
    for case in kernel.cases
    if "does not depend on the others" in laws.contract(kernel) and case["num_tokens"] == 1
]


def test_the_form_at_hand_is_the_one_that_was_asked_for():
    assert (os.environ.get("TRITON_INTERPRET") == "1") == laws.INTERPRETED


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=laws.label)
def test_form_equals_ref(kernel: Kernel, case: Case, device: str):
    laws.assert_equals_ref(kernel, laws.make(kernel, case, device))


@pytest.mark.parametrize(("kernel", "case"), ROW_WISE, ids=laws.label)
def test_rows_are_independent_where_that_is_promised(kernel: Kernel, case: Case, device: str):
    laws.assert_rows_are_independent(kernel, laws.make(kernel, case, device), case["num_tokens"])


def test_promises_are_found():
    promised = {case.values[0].name for case in ROW_WISE}
    assert promised >= {"rms_norm", "add_rms_norm", "rope", "silu_mul"}
    assert {case.values[0].name for case in ROW_WISE if not case.marks} == promised


@pytest.mark.parametrize("kernel", kernels(), ids=laws.label)
def test_launcher_refuses_or_computes(kernel: Kernel, device: str):
    laws.assert_refuses_or_computes(kernel, laws.make(kernel, kernel.cases[-1], device))
