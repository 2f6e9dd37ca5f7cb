"""The random numbers are Philox4x32-10's, the same in every form, and their Gumbel variates are Gumbel."""

import pytest
import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl
from cableway.kernels.philox import gumbel, gumbels, gumbels_triton, philox
from tests.kernels import laws

# Known answers that Random123 is published with: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str):
    low, high = words(key)
    seed = torch.tensor(high << 32 | low, dtype=torch.uint64).view(torch.int64)
    drawn = philox(seed, tuple(torch.tensor(word) for word in words(counter)))
    assert [int(word) for word in drawn] == words(expected)


def variates(stream: int, first: int, num: int) -> Tensor:
    """[5, num] of rows with seeds, choices and positions from both ends of their ranges."""
    seeds = torch.tensor([0, 1, 1 << 32, (1 << 63) - 1, 0x123456789ABCDEF])
    choices, positions = torch.tensor([0, 1, 127, 3, 0]), torch.tensor([0, 1, (1 << 31) - 1, 2048, 77])
    return gumbels(seeds, choices, positions, stream, torch.arange(first, first + num).expand(5, -1))


def test_a_variate_is_that_of_its_own_counter():
    """Four words a counter, in order; nothing depends on which others are drawn with it."""
    whole = variates(stream=0, first=0, num=64)
    assert torch.equal(variates(stream=0, first=32, num=8), whole[:, 32:40])
    drawn = philox(torch.tensor(1 << 32), tuple(torch.tensor(x) for x in (5, (1 << 31) - 1, 127, 0)))
    assert torch.equal(whole[2, 20:24], gumbel(torch.stack(drawn)))
    assert not (variates(stream=1, first=0, num=64) == whole).any()


def test_variates_are_gumbel():
    """The largest gap to the distribution function exp(-exp(-g)) is what chance allows (Kolmogorov, 0.1 %)."""
    num = 1 << 16
    ordered = variates(stream=0, first=0, num=num).flatten().double().sort().values
    expected = (-(-ordered).exp()).exp()
    gap = (expected - torch.arange(1, len(ordered) + 1) / len(ordered)).abs().max()
    assert gap < 1.95 / len(ordered) ** 0.5


def test_ends_of_the_words_are_finite_and_in_order():
    ends = gumbel(torch.tensor([0, 1, 2, 1 << 28, (1 << 28) + 512, 1 << 31, (1 << 32) - 257, (1 << 32) - 1]))
    assert ends.isfinite().all()
    assert (ends[1:] <= ends[:-1]).all()
    assert 22 < ends[0] < 23
    assert -4 < ends[-1] < -2


@jit
def _draw(seed_ptr, choice_ptr, position_ptr, out_ptr, stream, first, NUM: tl.constexpr):
    row = tl.program_id(0)
    seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
    drawn = gumbels_triton(seed, choice, position, stream, first, NUM)
    tl.store(out_ptr + row * NUM + tl.arange(0, NUM), drawn)


@pytest.mark.skipif(not laws.RUNS_TRITON, reason="no GPU; test_triton.py runs it in the interpreter")
@pytest.mark.parametrize(("stream", "first"), [(0, 0), (1, 0), (1, 1 << 17)])
def test_triton_draws_the_same(stream: int, first: int, device: str):
    rows = ([0, 1, 1 << 32, (1 << 63) - 1, 0x123456789ABCDEF], [0, 1, 127, 3, 0], [0, 1, (1 << 31) - 1, 2048, 77])
    dtypes = torch.int64, torch.int32, torch.int32
    made = [torch.tensor(values, dtype=dtype, device=device) for values, dtype in zip(rows, dtypes, strict=True)]
    drawn = torch.empty(5, 64, device=device)
    _draw[(5,)](*made, drawn, stream, first, NUM=64)
    torch.testing.assert_close(drawn.cpu(), variates(stream, first, 64), rtol=1e-5, atol=1e-5)
