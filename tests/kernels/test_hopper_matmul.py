"""Where hopper_matmul is chosen, what is compiled for it ahead, and on a GPU its results."""

import pytest
import torch

from cableway.kernels import hopper_matmul, linear
from cableway.kernels.registry import Call
from tests.kernels import laws

CASES = [
    {"num_tokens": 300, "num_out": 512, "num_in": 1024},
    {"num_tokens": 1030, "num_out": 264, "num_in": 520, "biased": True, "strided": True},  # columns of no panel
    {"num_tokens": 100, "num_out": 776, "num_in": 1096, "gated": True, "biased": True},
    {"num_tokens": 190, "num_out": 1032, "num_in": 72, "gated": True},  # fewer steps than stages
    {"num_tokens": 5000, "num_out": 4096, "num_in": 1024, "gated": True, "strided": True},  # several tiles a program
    {"num_tokens": 5000, "num_out": 5120, "num_in": 1024, "biased": True},
    {"num_tokens": 250, "num_out": 14336, "num_in": 4096, "gated": True, "biased": True},  # shared out, all
    {"num_tokens": 180, "num_out": 14336, "num_in": 4096, "gated": True},
    {"num_tokens": 120, "num_out": 14336, "num_in": 4096, "gated": True},
    {"num_tokens": 1030, "num_out": 3080, "num_in": 4096, "gated": True},  # the first of them shared out
]


@laws.needs_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_equal_the_reference(case: dict, dtype: torch.dtype):
    torch.manual_seed(0)
    made = linear.make(**case, dtype=dtype, device="cuda")
    expected = linear.ref(*made.args, **made.kwargs)
    options = {"gated": made.kwargs["gated"]}
    first = hopper_matmul.launch(*made.args, **options)
    torch.testing.assert_close(first, expected, atol=2e-2, rtol=1.6e-2)
    assert torch.equal(first, hopper_matmul.launch(*made.args, **options))


def of(num_tokens: int, num_rows: int, num_in: int, device: str = "cpu") -> Call:
    x = torch.empty(num_tokens, num_in, dtype=torch.bfloat16, device=device)
    return Call((x, torch.empty(num_rows, num_in, dtype=torch.bfloat16, device=device)), {})


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_matmul, "gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_matmul, "num_processors", lambda: 132)
    monkeypatch.setattr(hopper_matmul, "_plan", hopper_matmul._plan.__wrapped__)  # kept for 132 processors alone


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_in", "gated", "fits"),
    [
        (8192, 4096, 4096, False, True),
        (1024, 4096, 4096, False, True),
        (1024, 6144, 4096, False, False),  # 96 pairs of tiles where 66 are at once
        (256, 4096, 14336, False, False),
        (256, 28672, 4096, True, True),
        (192, 28672, 4096, True, True),
        (80, 28672, 4096, True, False),
        (320, 28672, 4096, True, False),  # of two tiles of 192
        (256, 6144, 1024, True, True),
        (8192, 6144, 64, True, False),
        (8192, 6152, 1028, False, False),  # rows begin anywhere
    ],
)
def test_it_is_for_what_keeps_processors_busy(processors, num_tokens, num_rows, num_in, gated, fits):
    assert hopper_matmul.fits(*of(num_tokens, num_rows, num_in).args, gated=gated) is fits


@pytest.mark.parametrize("gated", [False, True])
def test_all_that_some_number_of_tokens_may_need_is_compiled_ahead(processors, monkeypatch, gated):
    """Steps are rehearsed for few numbers of tokens."""
    rehearsed, needed = set(), set()
    kernel = hopper_matmul._KERNEL.load
    monkeypatch.setattr(
        hopper_matmul.compilation,
        "in_background",
        lambda function, constants: rehearsed.add((function == kernel, constants)),
    )
    for num_tokens in (128, 256, 1024, 8192):
        x, weight = of(num_tokens, 6144, 4096, "meta").args
        if hopper_matmul.fits(x, weight, gated=gated):
            hopper_matmul.launch(x, weight, None, gated=gated)
    for num_tokens in range(1, 8192, 37):
        x, weight = of(num_tokens, 6144, 4096).args
        if hopper_matmul.fits(x, weight, gated=gated):
            tile = hopper_matmul._plan(num_tokens, 6144, 4096, gated).tile
            needed.add((True, hopper_matmul._constants(tile, x, None, gated)))
    assert rehearsed >= needed > set()


@pytest.mark.parametrize(("gated", "num_shared"), [(True, 112), (False, 0)])
def test_what_is_gated_is_shared_out(processors, gated, num_shared):
    assert hopper_matmul._plan(256, 28672, 4096, gated).num_shared == num_shared  # 112 tiles, 66 at once
