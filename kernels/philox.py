"""Counter-based random numbers: the same draws on any device, in any batch, in any order.

Philox4x32-10 (Salmon et al., 2011) turns a key (a request's 63-bit seed) and a 128-bit counter into four random words.
The counter is (index // 4, position, choice, stream) and `index % 4` names the word, so each (seed, choice, position)
owns 2**34 words in every stream, and no draw depends on another.

A word becomes a Gumbel variate g = -log(E), E = -log(1 - v), v = word / 2**32. Small v decide who wins: they keep all
their bits, and E comes from its series there, because a GPU's fast logarithm near 1 has few correct digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_SERIES_BELOW = 1 / 16
_LARGEST = 1 - 2**-24  # the float32 below 1: keeps E finite


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words (i64, 0 … 2**32 - 1) of each counter; all tensors i64 and broadcast against one another."""
    key = [seed & _WORD, seed >> 32 & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product of 32-bit words held in i64; the product may wrap, its bits stay right."""
    product = word * multiplier
    return product & _WORD, product >> 32 & _WORD


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel variates, float32, of random 32-bit words in i64."""
    v = ((words.float() + 0.5) * 2.0**-32).clamp_max(_LARGEST)
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5)))))
    return -torch.where(v < _SERIES_BELOW, series, -torch.log(1 - v)).log()


def gumbels(seed: Tensor, choice: Tensor, position: Tensor, stream: int, index: Tensor) -> Tensor:
    """Variates [R, n] float32 of the draws `index` [R, n] i64, n and every index of a row's run a multiple of four.

    seed [R] i64, choice [R], position [R]: see `sample`. `index[:, ::4]` are multiples of four, the rest consecutive.
    """
    row = tuple(x.long()[:, None] for x in (position, choice))
    words = philox(seed[:, None], (index[:, ::4] >> 2, *row, torch.full_like(row[0], stream)))
    return gumbel(torch.stack(torch.broadcast_tensors(*words), -1).flatten(1))


@jit
def gumbel_triton(words):
    """`gumbel` of u32 words."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (1 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * 0.2))))
    return -tl.log(tl.where(v < 0.0625, series, -tl.log(1 - v)))


@jit
def gumbels_triton(seed, choice, position, stream, first, NUM: tl.constexpr):
    """Variates of the draws first … first + NUM - 1 of one row; `first` and NUM are multiples of four."""
    counter = (first // 4 + tl.arange(0, NUM // 4)).to(tl.uint32)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(
        seed, counter, zero + position.to(tl.uint32), zero + choice.to(tl.uint32), zero + stream, 10
    )
    return gumbel_triton(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
