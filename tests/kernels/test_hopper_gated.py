"""Where hopper_gated is chosen, what is compiled for it ahead, and on a GPU its results."""

import pytest
import torch

from cableway.kernels import hopper_gated, linear
from cableway.kernels.registry import Call
from tests.kernels import laws

CASES = [
    {"num_tokens": 300, "num_out": 512, "num_in": 1024},
    {"num_tokens": 100, "num_out": 776, "num_in": 1096, "biased": True},
    {"num_tokens": 1030, "num_out": 264, "num_in": 520, "biased": True, "strided": True},  # columns of no panel
    {"num_tokens": 190, "num_out": 1032, "num_in": 72},  # fewer steps than stages
    {"num_tokens": 5000, "num_out": 4096, "num_in": 1024, "strided": True},  # several tiles a program
    {"num_tokens": 250, "num_out": 14336, "num_in": 4096, "biased": True},  # shared out, all
    {"num_tokens": 180, "num_out": 14336, "num_in": 4096},
    {"num_tokens": 120, "num_out": 14336, "num_in": 4096},
    {"num_tokens": 1030, "num_out": 3080, "num_in": 4096},  # the first of them shared out
]


@laws.needs_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_equal_the_reference(case: dict, dtype: torch.dtype):
    torch.manual_seed(0)
    made = linear.make(**case, gated=True, dtype=dtype, device="cuda")
    expected = linear.ref(*made.args, **made.kwargs)
    first = hopper_gated.launch(*made.args)
    torch.testing.assert_close(first, expected, atol=2e-2, rtol=1.6e-2)
    assert torch.equal(first, hopper_gated.launch(*made.args))


def of(num_tokens: int, num_rows: int, num_in: int, device: str = "cpu") -> Call:
    x = torch.empty(num_tokens, num_in, dtype=torch.bfloat16, device=device)
    return Call((x, torch.empty(num_rows, num_in, dtype=torch.bfloat16, device=device)), {})


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_gated, "gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_gated, "num_processors", lambda: 132)
    monkeypatch.setattr(hopper_gated, "_plan", hopper_gated._plan.__wrapped__)  # kept for 132 processors alone


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "num_in", "fits"),
    [
        (8192, 28672, 4096, True),
        (256, 28672, 4096, True),
        (192, 28672, 4096, True),
        (80, 28672, 4096, False),
        (320, 28672, 4096, False),  # of two tiles of 192
        (256, 6144, 1024, True),
        (8192, 6144, 64, False),
        (8192, 6152, 1024, False),  # halves are no multiples of eight rows
        (8192, 6144, 1028, False),  # rows begin anywhere
    ],
)
def test_it_is_for_what_keeps_processors_busy(processors, num_tokens, num_rows, num_in, fits):
    assert hopper_gated.fits(*of(num_tokens, num_rows, num_in).args) is fits


def test_all_that_some_number_of_tokens_may_need_is_compiled_ahead(processors, monkeypatch):
    """Steps are rehearsed for few numbers of tokens."""
    rehearsed, needed = set(), set()
    kernel = hopper_gated._KERNEL.load
    monkeypatch.setattr(
        hopper_gated.compilation,
        "in_background",
        lambda function, constants: rehearsed.add((function == kernel, constants)),
    )
    for num_tokens in (128, 256, 1024, 8192):
        x, weight = of(num_tokens, 6144, 4096, "meta").args
        if hopper_gated.fits(x, weight):
            hopper_gated.launch(x, weight, None)
    for num_tokens in range(1, 8192, 37):
        x, weight = of(num_tokens, 6144, 4096).args
        if hopper_gated.fits(x, weight):
            tile = hopper_gated._plan(num_tokens, 6144, 4096).tile
            needed.add((True, hopper_gated._constants(tile, x, None)))
    assert rehearsed >= needed > set()


@pytest.mark.parametrize(("num_rows", "num_shared"), [(28672, 112), (6144, 0)])  # 112 tiles and 24, 66 at once
def test_tiles_that_do_not_fill_their_rounds_are_shared_out(processors, num_rows, num_shared):
    assert hopper_gated._plan(256, num_rows, 4096).num_shared == num_shared
