"""Words that may not be said: the last token of a word cannot be drawn after the others of it, on logits, in place.

    logits[row, w] = -inf   for each word (w1, …, wn, w) where the last n tokens of the row's output are w1, …, wn

logits  [num_rows, vocab]  f32   contiguous rows
words   [num_slots, num_words, longest]  i32   a word's tokens stand at the end of its line, -1 before them;
                                           a line of -1 is none
tokens  [num_token_rows, max_len]  i32   prompt and output so far
where   [5, n]  i64   for each row that has words: its rows of logits, of words and of tokens; the position of the token
                      to be drawn, and that of the first of the output

Bound: latency; a few bytes a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes

_WORDS_A_PROGRAM = 128


def ref(logits: Tensor, words: Tensor, tokens: Tensor, where: Tensor) -> None:
    for row, slot, token_row, position, first in where.T.tolist():
        said = tokens[token_row, first:position].tolist()
        for line in words[slot].tolist():
            word = [token for token in line if token >= 0]
            if line[-1] >= 0 and len(word) <= len(said) + 1 and said[len(said) + 1 - len(word) :] == word[:-1]:
                logits[row, word[-1]] = float("-inf")


@jit(do_not_specialize=("where_ptr", "num_words", "longest", "tokens_stride", "num"))
def _forbid_words(
    logits_ptr, words_ptr, tokens_ptr, where_ptr, num_words, longest, logits_stride, tokens_stride, num,
    BLOCK: tl.constexpr,
):  # fmt: skip
    where_ptr += tl.program_id(0)
    row, slot = tl.load(where_ptr), tl.load(where_ptr + num)
    position, first = tl.load(where_ptr + 3 * num), tl.load(where_ptr + 4 * num)
    tokens_ptr += tl.load(where_ptr + 2 * num) * tokens_stride
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words_ptr += (slot * num_words + word) * longest
    was_said = word < num_words
    for nth in range(longest - 1):
        at = position - longest + 1 + nth
        token = tl.load(tokens_ptr + at, mask=at >= first, other=-2)
        wanted = tl.load(words_ptr + nth, mask=was_said, other=-1)
        was_said = was_said & ((wanted == -1) | (wanted == token))
    last = tl.load(words_ptr + longest - 1, mask=was_said, other=-1)
    tl.store(logits_ptr + row * logits_stride + last, float("-inf"), mask=last >= 0)


def launch(logits: Tensor, words: Tensor, tokens: Tensor, where: Tensor) -> None:
    check(are_contiguous(words, where) and tokens.stride(1) == 1, "an argument is strided")
    _, num_words, longest = words.shape
    _forbid_words[(where.shape[1], triton.cdiv(num_words, _WORDS_A_PROGRAM))](
        logits, words, tokens, where, num_words, longest, logits.stride(0), tokens.stride(0), where.shape[1],
        BLOCK=_WORDS_A_PROGRAM, num_warps=4,
    )  # fmt: skip


def make(num_words: int, longest: int, lengths: tuple[tuple[int, int], ...], vocab: int = 40, device="cpu"):
    """`lengths`: tokens of prompt and of output of each row. Of 3 tokens, so that words are said."""
    num = len(lengths)
    words = torch.randint(3, (num + 1, num_words, longest), device=device, dtype=torch.int32)
    empty = torch.randint(longest + 1, words.shape[:2], device=device)
    words[torch.arange(longest, device=device) < empty[..., None]] = -1
    tokens = torch.randint(3, (num + 2, 40), device=device, dtype=torch.int32)
    rows = [torch.randperm(num + more, device=device)[:num] for more in range(3)]
    prompts, outputs = torch.tensor(lengths, device=device).T
    where = torch.stack((*rows, prompts + outputs, prompts))
    return call(torch.randn(num, vocab, device=device), words, tokens, where)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_words=(1, 7, 200), longest=(1, 2, 5), lengths=(((4, 0), (4, 2), (3, 30), (1, 4)), ((2, 3),))),
    bench_cases=grid(num_words=(64,), longest=(4,), lengths=(((10, 20),) * 64,), vocab=(151_936,)),
    num_bytes=lambda c: nbytes(c.args[1]),
    updates=(0,),
)
def forbid_words(logits: Tensor, words: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Forbid the ends of words in logits [R, V]; ValueError when shapes or dtypes do not fit."""
    check(logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1, "logits are not float32 rows")
    check(words.dim() == 3 and tokens.dim() == 2 and words.dtype == tokens.dtype == torch.int32, "words or tokens")
    check(where.dim() == 2 and len(where) == 5 and where.dtype == torch.int64, "where is not [5, n] i64")
    if not logits.is_cpu:
        return launch(logits, words, tokens, where)
    rows, slots, token_rows, positions, first = where
    of_rows, before = words[slots], torch.arange(1 - words.shape[2], 0)
    at = positions[:, None] + before
    said = torch.where(at >= first[:, None], tokens[token_rows[:, None], at.clamp_min(0)], -2)
    was_said = ((of_rows[..., :-1] == -1) | (of_rows[..., :-1] == said[:, None])).all(-1) & (of_rows[..., -1] >= 0)
    nth, word = was_said.nonzero(as_tuple=True)
    logits[rows[nth], of_rows[nth, word, -1].long()] = float("-inf")
    return None
