"""Draw one token a row from its logits: temperature, top-k, top-p, min-p, then Gumbel-max on counter-based variates.

    x = logits / temperature;   kept: x >= t, t the largest of
        top-k   the k-th largest x
        top-p   the largest t with  mass(x >= t) >= top_p * mass(kept by top-k),  mass = sum of exp(x)
        min-p   max(x) + log(min_p)
    token = two-level Gumbel-max over what is kept: first a group of 64 tokens, argmax of log(mass of the group) + g,
    then a token of that group, argmax of x + g', with g and g' the row's own Gumbel variates (philox.py). This draws
    from softmax(kept x) exactly, for vocab / 64 + 64 variates in place of vocab.

Ties with the last one kept are kept, so no form has to sort. temperature 0 takes the likeliest token, the lowest id
among equals. A row with a NaN or +inf, or with nothing to draw, gives -1: the caller fails that request alone.

logits       [num_rows, vocab]  f32, contiguous rows
rows         [num_rows]  i32    the row of the three tables below that each row of logits belongs to
fractions    [3, n]      f32    temperature (0 = greedy), top_p (1 = off), min_p (0 = off)
integers     [2, n]      i32    top_k (0 = off), choice: which of a request's n continuations
seeds        [n]         i64    0 … 2**63 - 1
positions    [num_rows]  i32    of the token to be drawn, in prompt and output
tokens       [n, max_len] i32   rows of tokens, each of which is written at its position (-1 as 0), or None
out          [num_rows]  i32    where the result is written, or None
returns      [num_rows]  i32

Bound: bytes; reads logits twice, or once where all rows are greedy (and from cache for every bisection step of top-k
and top-p, where one program does a whole row).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, loops, overlapping, tl, triton
from cableway.kernels.ordered import ordered
from cableway.kernels.philox import gumbels, gumbels_triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes

GROUP = 64
GROUPS_STREAM, TOKENS_STREAM = 0, 1
_FIRST_CANDIDATES = 512


def ref(logits, rows, fractions, integers, seeds, positions, tokens=None, *, out=None) -> Tensor:
    table_rows = rows
    (temperature, top_p, min_p), (top_k, choices), seeds = _of_rows(rows, fractions, integers, seeds)
    drawn = []
    for row in range(logits.shape[0]):
        x = logits[row].float()
        if temperature[row] == 0 or not x.max().isfinite():
            drawn.append(int(x.argmax()) if x.max().isfinite() else -1)
            continue
        x = x / temperature[row]
        ordered = x.sort(descending=True).values
        if top_k[row] > 0:
            ordered = ordered[ordered >= ordered[min(int(top_k[row]), len(x)) - 1]]
        before = ordered.softmax(-1).cumsum(-1).roll(1)
        before[0] = 0
        threshold = torch.maximum(ordered[before < top_p[row]][-1], ordered[0] + min_p[row].log())
        kept = F.pad(x.masked_fill(x < threshold, float("-inf")), (0, -len(x) % GROUP), value=float("-inf"))
        counters = seeds[row, None], choices[row, None], positions[row, None]
        groups = kept.view(-1, GROUP)
        index = torch.arange(-(-len(groups) // 4) * 4, device=logits.device)
        scores = groups.logsumexp(-1) + gumbels(*counters, GROUPS_STREAM, index[None])[0, : len(groups)]
        index = scores.argmax() * GROUP + torch.arange(GROUP, device=logits.device)
        scores = kept[index] + gumbels(*counters, TOKENS_STREAM, index[None])[0]
        drawn.append(int(index[scores.argmax()]))
    token_ids = torch.tensor(drawn, dtype=torch.int32, device=logits.device)
    if tokens is not None:
        tokens[table_rows, positions] = token_ids.clamp_min(0)
    return token_ids if out is None else out.copy_(token_ids)


def _of_rows(rows: Tensor, fractions: Tensor, integers: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The options of each row of logits: [3, R], [2, R], [R]."""
    return fractions.index_select(1, rows), integers.index_select(1, rows), seeds.index_select(0, rows)


@jit
def _above(row_ptr, vocab, temperature, top, key, BLOCK: tl.constexpr):
    """How many x have a key of at least `key`, and the sum of their exp(x - top)."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")) / temperature
        above = (ordered(x) >= key) & (token < vocab)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _threshold(row_ptr, vocab, temperature, top, k, p, BLOCK: tl.constexpr):
    """The largest key that keeps k tokens, or the share p of the mass of those; found by bisection."""
    lowest = tl.full((), -0x80000000, tl.int64)
    key = lowest
    total = 1.0
    # Two searches over the 2**32 keys, each skipped where its rule is off: first for k, then for p.
    for search in range(2):
        wanted_count = tl.where(search == 0, k, 0)
        if ((search == 0) & (k > 0)) | ((search == 1) & (p < 1)):
            if search == 1:
                _, total = _above(row_ptr, vocab, temperature, top, key, BLOCK)
            low = tl.where(search == 0, lowest, key)
            high = ordered(top).to(tl.int64) + 1
            while high - low > 1:
                middle = (low + high) >> 1
                count, mass = _above(row_ptr, vocab, temperature, top, middle, BLOCK)
                enough = tl.where(search == 0, count >= wanted_count, mass >= p * total)
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            key = low
    return key


_ALIGNED_BY_CHANCE = ("arrivals_ptr", "scores_ptr", "groups_ptr", "rows_ptr", "positions_ptr", "out_ptr")
"""As the number of rows has it: one compilation for all."""


@jit(do_not_specialize=_ALIGNED_BY_CHANCE)
def _likeliest(
    logits_ptr, stride, tops_ptr, tokens_ptr, arrivals_ptr, vocab, stretch, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The largest logit of one stretch of a row, its first token, and inf where any is NaN."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row_ptr = logits_ptr + row * stride
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = tl.zeros((BLOCK,), tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for first in range(part * stretch, tl.minimum((part + 1) * stretch, vocab), BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf"))
        nans += (x != x).to(tl.int32)
        best_token = tl.where(x > best, token, best_token)
        best = tl.where(x > best, x, best)
    top = tl.max(best, 0)
    place = row * tl.num_programs(1) + part
    tl.store(tops_ptr + place, tl.where(tl.sum(nans, 0) > 0, float("inf"), top))
    tl.store(tokens_ptr + place, tl.min(tl.where(best == top, best_token, 0x7FFFFFFF), 0))
    if part == 0:
        tl.store(arrivals_ptr + row, 0)


@jit
def _best_group(
    row_ptr, begin, end, vocab, temperature, top, key, least, seed, choice, position,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of the groups of tokens begin … end - 1, the first with the largest score, and that score."""
    best_score = tl.full((), float("-inf"), tl.float32)
    best_group = tl.full((), 0, tl.int32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")) / temperature
        kept = (ordered(x) >= key) & (x >= least) & (token < vocab)
        mass = tl.sum(tl.reshape(tl.where(kept, tl.exp(x - top), 0.0), (BLOCK // GROUP, GROUP)), 1)
        score = tl.log(mass) + gumbels_triton(seed, choice, position, 0, first // GROUP, BLOCK // GROUP)
        score_here = tl.max(score, 0)
        group_here = first // GROUP + tl.argmax(score, 0)
        best_group = tl.where(score_here > best_score, group_here, best_group)
        best_score = tl.maximum(score_here, best_score)
    return best_score, best_group


@jit
def _draw_token(
    row_ptr, group, vocab, temperature, key, least, seed, choice, position, GROUP: tl.constexpr
):  # fmt: skip
    token = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(row_ptr + token, mask=token < vocab, other=float("-inf")) / temperature
    kept = (ordered(x) >= key) & (x >= least) & (token < vocab)
    score = x + gumbels_triton(seed, choice, position, 1, group * GROUP, GROUP)
    return group * GROUP + tl.argmax(tl.where(kept, score, float("-inf")), 0)


@jit
def _give(token, row, option_row, position, out_ptr, tokens_ptr, tokens_stride, HAS_TOKENS: tl.constexpr):
    tl.store(out_ptr + row, token)
    if HAS_TOKENS:
        tl.store(tokens_ptr + option_row.to(tl.int64) * tokens_stride + position, tl.maximum(token, 0))


@jit(do_not_specialize=_ALIGNED_BY_CHANCE)
def _sample(
    logits_ptr, stride, rows_ptr, fractions_ptr, integers_ptr, seeds_ptr, positions_ptr, out_ptr, to_ptr, to_stride,
    tops_ptr, tokens_ptr, scores_ptr, groups_ptr, arrivals_ptr, num_table_rows, vocab, stretch,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCK_PARTS: tl.constexpr, HAS_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One stretch of a row: the first does all where the row is greedy, or where its threshold must be found first."""
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    option_row = tl.load(rows_ptr + row)
    temperature = tl.load(fractions_ptr + option_row)
    p = tl.load(fractions_ptr + num_table_rows + option_row)
    min_p = tl.load(fractions_ptr + 2 * num_table_rows + option_row)
    k, choice = tl.load(integers_ptr + option_row), tl.load(integers_ptr + num_table_rows + option_row)
    seed, position = tl.load(seeds_ptr + option_row), tl.load(positions_ptr + row)
    parts = tl.arange(0, BLOCK_PARTS)
    place = row * num_parts + parts
    tops = tl.load(tops_ptr + place, mask=parts < num_parts, other=float("-inf"))
    tokens = tl.load(tokens_ptr + place, mask=parts < num_parts, other=0x7FFFFFFF)
    top = tl.max(tops, 0)
    is_bad = (top == float("-inf")) | (top == float("inf"))
    if is_bad | (temperature == 0):
        if part == 0:
            likeliest = tl.min(tl.where(tops == top, tokens, 0x7FFFFFFF), 0)
            token = tl.where(is_bad, -1, likeliest)
            _give(token, row, option_row, position, out_ptr, to_ptr, to_stride, HAS_TOKENS)
    else:
        row_ptr = logits_ptr + row * stride
        has_threshold = (k > 0) | (p < 1)
        top = top / temperature
        least = top + tl.log(min_p)
        if has_threshold:
            if part == 0:
                key = _threshold(row_ptr, vocab, temperature, top, k, p, BLOCK)
                _, group = _best_group(
                    row_ptr, 0, vocab, vocab, temperature, top, key, least, seed, choice, position, BLOCK, GROUP
                )
                token = _draw_token(row_ptr, group, vocab, temperature, key, least, seed, choice, position, GROUP)
                _give(token, row, option_row, position, out_ptr, to_ptr, to_stride, HAS_TOKENS)
        else:
            key = tl.full((), -0x80000000, tl.int64)
            end = tl.minimum((part + 1) * stretch, vocab)
            score, group = _best_group(
                row_ptr, part * stretch, end, vocab, temperature, top, key, least, seed, choice, position, BLOCK, GROUP
            )
            tl.store(scores_ptr + row * num_parts + part, score)
            tl.store(groups_ptr + row * num_parts + part, group)
            tl.debug_barrier()  # every thread has stored before one of them tells
            if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
                # Other programs wrote these: not to be looked for in this processor's own cache.
                inside = parts < num_parts
                scores = tl.load(scores_ptr + place, mask=inside, other=float("-inf"), cache_modifier=".cg")
                groups = tl.load(groups_ptr + place, mask=inside, other=0x7FFFFFFF, cache_modifier=".cg")
                group = tl.min(tl.where(scores == tl.max(scores, 0), groups, 0x7FFFFFFF), 0)
                token = _draw_token(row_ptr, group, vocab, temperature, key, least, seed, choice, position, GROUP)
                _give(token, row, option_row, position, out_ptr, to_ptr, to_stride, HAS_TOKENS)


_BLOCK = 4096
_MOST_PARTS = 64
_PROGRAMS = 512
"""About as many as keep a large GPU busy."""


def launch(logits, rows, fractions, integers, seeds, positions, tokens=None, *, out=None) -> Tensor:
    check(are_contiguous(rows, fractions, integers, seeds, positions), "an option is strided")
    num_rows, vocab = logits.shape
    num_blocks = triton.cdiv(vocab, _BLOCK)
    num_parts = min(num_blocks, _MOST_PARTS, max(_PROGRAMS // num_rows, 1))
    stretch = triton.cdiv(num_blocks, num_parts) * _BLOCK
    num_parts = triton.cdiv(vocab, stretch)
    arrivals, spare = torch.empty(2, num_rows, dtype=torch.int32, device=logits.device)
    out = spare if out is None else out
    values = torch.empty(2, num_rows, num_parts, device=logits.device)
    (tops, scores), (likeliest, groups) = values, torch.empty_like(values, dtype=torch.int32)
    options = overlapping()
    _likeliest[(num_rows, num_parts)](
        logits, logits.stride(0), tops, likeliest, arrivals, vocab, stretch, BLOCK=_BLOCK, num_warps=8, **options
    )
    _sample[(num_rows, num_parts)](
        logits, logits.stride(0), rows, fractions, integers, seeds, positions, out, tokens,
        0 if tokens is None else tokens.stride(0), tops, likeliest, scores, groups, arrivals,
        seeds.shape[0], vocab, stretch,
        BLOCK=_BLOCK, GROUP=GROUP, BLOCK_PARTS=_MOST_PARTS, HAS_TOKENS=tokens is not None, num_warps=8, **options,
    )  # fmt: skip
    return out


def make(num_rows: int, vocab: int, rules: str, device="cpu"):
    """`rules` names those that are on, in the first row and most others: any of "greedy top_k top_p min_p"."""
    num = num_rows + 2  # of the tables

    def mixed(name: str, off: float, values: Tensor) -> Tensor:
        on = torch.rand(num) < 0.75
        on[0] = True
        return torch.where(on & (name in rules), values, torch.full_like(values, off))

    temperature, top_k = mixed("greedy", 0.8, torch.zeros(num)), mixed("top_k", 0, torch.randint(1, 50, (num,)))
    top_p, min_p = mixed("top_p", 1, torch.rand(num)), mixed("min_p", 0, torch.rand(num) / 4)
    fractions = torch.stack((temperature, top_p, min_p)).to(device)
    integers = torch.stack((top_k, torch.randint(4, (num,)))).int().to(device)
    seeds = torch.randint(1 << 62, (num,), device=device)
    rows = torch.cat((torch.zeros(1), 1 + torch.randperm(num - 1)[: num_rows - 1])).int().to(device)
    positions = torch.randint(2048, (num_rows,), dtype=torch.int32, device=device)
    return call(2 * torch.randn(num_rows, vocab, device=device), rows, fractions, integers, seeds, positions)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(
        num_rows=(1, 5), vocab=(100, 2050), rules=("", "greedy", "top_k", "top_p", "min_p", "greedy top_k top_p min_p")
    ),
    bench_cases=grid(num_rows=(1, 16), vocab=(49152,), rules=("", "greedy", "top_k", "top_p")),
    num_bytes=lambda c: nbytes(c.args[0]),
)
def sample(
    logits: Tensor, rows: Tensor, fractions: Tensor, integers: Tensor, seeds: Tensor, positions: Tensor,
    tokens: Tensor | None = None, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Draw a token for each row of logits [R, V] -> [R] i32, -1 where it is broken; ValueError on what does not fit."""
    check(logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1, "logits are not float32 rows")
    check(rows.shape == positions.shape == logits.shape[:1], "rows or positions are not [num_rows]")
    check(rows.dtype == positions.dtype == integers.dtype == torch.int32, "rows, positions or integers are not i32")
    check(fractions.dtype == torch.float32 and seeds.dtype == torch.int64, "fractions are not f32, or seeds not i64")
    num = seeds.shape[:1]
    check(seeds.dim() == 1 and fractions.shape == (3, *num) and integers.shape == (2, *num), "not tables of n rows")
    if tokens is not None:
        check(
            tokens.dim() == 2 and len(tokens) == len(seeds) and tokens.dtype == torch.int32, "tokens are not [n, m] i32"
        )
        check(tokens.stride(1) == 1, "tokens are strided within their rows")
    if out is not None:
        check(out.shape == rows.shape and out.dtype == torch.int32 and out.is_contiguous(), "out is not [num_rows] i32")
    if logits.device.type != "cpu":
        return launch(logits, rows, fractions, integers, seeds, positions, tokens, out=out)
    token_ids = torch.empty(len(logits), dtype=torch.int32) if out is None else out
    options = _of_rows(rows, fractions, integers, seeds)
    loops.run(
        loops.likeliest, len(logits), logits.shape[1], logits.data_ptr(), logits.stride(0), logits.shape[1],
        token_ids.data_ptr(),
    )  # fmt: skip
    (temperature, top_p, min_p), (top_k, choices), seeds = options
    drawing = (temperature > 0) & (token_ids >= 0)
    if drawing.any():
        options = temperature, top_k, top_p, min_p, seeds, choices, positions
        token_ids[drawing] = _draw(logits[drawing], *(option[drawing] for option in options)).int()
    if tokens is not None:
        tokens[rows, positions] = token_ids.clamp_min(0)
    return token_ids


def _draw(logits, temperature, top_k, top_p, min_p, seeds, choices, positions) -> Tensor:
    """Two-level Gumbel-max on a CPU; every row has a temperature and a finite maximum."""
    num_rows, vocab = logits.shape
    x = logits / temperature[:, None]
    if vocab % GROUP:
        x = F.pad(x, (0, -vocab % GROUP), value=float("-inf"))
    weights = (x - x.amax(-1, keepdim=True)).exp_()
    if bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any()):
        dropped = x < _thresholds(x, weights, top_k, top_p, min_p)
        x = x.masked_fill_(dropped, float("-inf"))
        weights = weights.masked_fill_(dropped, 0)
    num_groups = x.shape[1] // GROUP
    index = torch.arange(-(-num_groups // 4) * 4).expand(num_rows, -1)
    variates = gumbels(seeds, choices, positions, GROUPS_STREAM, index)[:, :num_groups]
    groups = (weights.view(num_rows, num_groups, GROUP).sum(-1).log_() + variates).argmax(-1)
    index = groups[:, None] * GROUP + torch.arange(GROUP)
    scores = x.gather(1, index) + gumbels(seeds, choices, positions, TOKENS_STREAM, index)
    return index.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


def _thresholds(x: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The least x [R, 1] kept in each row. A few hundred candidates nearly always hold it; else all are sorted."""
    vocab = x.shape[1]
    off = torch.full((x.shape[0], 1), float("-inf"))
    for num in (min(_FIRST_CANDIDATES, vocab), vocab):
        candidates = x.topk(num).values
        index = (top_k.long()[:, None] - 1).clamp(0, num - 1)
        by_count = torch.where(top_k[:, None] > 0, candidates.gather(1, index), off)
        masses = (candidates - candidates[:, :1]).exp_().cumsum(-1)
        total = torch.where(x >= by_count, weights, 0).sum(-1, keepdim=True)
        short = masses < top_p[:, None] * total
        index = short.sum(-1, keepdim=True)
        by_mass = torch.where(top_p[:, None] < 1, candidates.gather(1, index.clamp_max(num - 1)), off)
        found = (top_k[:, None] <= num) & ((top_p[:, None] >= 1) | (index < num))
        if bool(found.all()):
            break
    by_share = candidates[:, :1] + min_p[:, None].log()
    return torch.maximum(torch.maximum(by_count, by_mass), by_share)
