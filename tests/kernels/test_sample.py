"""Tokens are drawn from the distribution that was asked for, and from nothing else."""

import pytest
import torch
from torch import Tensor

from cableway.kernels.sample import GROUP
from tests.kernels import laws

SAMPLE = laws.named("sample")
NUM_DRAWS = 40_000


def draw(logits: Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=7, choices=0, positions=0) -> Tensor:
    """Tokens [R] of logits [R, V]; an option is one number for all rows, or [R]."""

    def each(value, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=logits.device).expand(len(logits)).contiguous()

    fractions = (each(value, torch.float32) for value in (temperature, top_p, min_p))
    integers = torch.stack((each(top_k, torch.int32), each(choices, torch.int32)))
    rows = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    tables = torch.stack(tuple(fractions)), integers, each(seeds, torch.int64)
    return laws.form(SAMPLE)(logits, rows, *tables, each(positions, torch.int32))


def one_row() -> Tensor:
    """Logits [150], of three groups of tokens with unlike masses."""
    generator = torch.Generator().manual_seed(3)
    return 1.5 * torch.randn(150, generator=generator) + torch.tensor([0.0, 1.0, 2.5]).repeat_interleave(GROUP)[:150]


def probabilities(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """The distribution [V] of one row, worked out token by token; no two logits are equal."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[: top_k or None]
    mass_of_kept, mass, nucleus = float(p[kept].sum()), 0.0, []
    for token in kept:
        if mass >= top_p * mass_of_kept:
            break
        nucleus.append(token)
        mass += float(p[token])
    final = [token for token in nucleus if p[token] >= min_p * p[order[0]]]
    return torch.zeros_like(p).index_copy(0, torch.tensor(final), p[final] / p[final].sum())


def chi_square_excess(tokens: Tensor, p: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean; rare tokens count as one."""
    counts = tokens.long().bincount(minlength=len(p)).double()
    expected = p * len(tokens)
    common = expected >= 5
    counts = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


RULES = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.skipif(laws.INTERPRETED, reason="too slow; the interpreter draws the same tokens: see below")
@pytest.mark.parametrize("varied", ["seeds", "choices", "positions"])
@pytest.mark.parametrize("rules", RULES, ids=laws.label)
def test_frequencies_are_the_probabilities(rules: dict, varied: str, device: str):
    """Whichever of seed, choice and position varies from draw to draw."""
    logits = one_row()
    p = probabilities(logits, **rules)
    tokens = draw(logits.to(device).expand(NUM_DRAWS, -1), **rules, **{varied: torch.arange(NUM_DRAWS)}).cpu()
    assert set(tokens.tolist()) <= set(p.nonzero().flatten().tolist())
    if len(p.nonzero()) > 1:
        assert chi_square_excess(tokens, p) < 4.5
    groups = torch.arange(len(p)) // GROUP
    p_of_groups = torch.zeros(3, dtype=p.dtype).index_add(0, groups, p)
    if len(p_of_groups.nonzero()) > 1:
        assert chi_square_excess(tokens // GROUP, p_of_groups) < 8


def test_a_wrong_distribution_would_be_seen():
    logits = one_row()
    p, wrong = probabilities(logits), probabilities(logits, temperature=1.03)
    tokens = wrong.float().multinomial(NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(1))
    assert chi_square_excess(tokens, wrong) < 4.5 < chi_square_excess(tokens, p)


def test_every_form_draws_the_token_of_seed_choice_and_position(device: str):
    """Large vocabularies, both ends of every counter, all rules: the form at hand gives the reference's tokens."""
    num_rows = 12
    made = laws.make(SAMPLE, {"num_rows": num_rows, "vocab": 9000, "rules": "greedy top_k top_p min_p"}, device)
    _, _, _, (_, choices), seeds, positions = made.args
    seeds[:3] = torch.tensor([0, 1 << 32, (1 << 63) - 1])
    choices[3], positions[4:6] = 127, torch.tensor([0, 1 << 20])
    laws.assert_equals_ref(SAMPLE, made)


@pytest.mark.skipif(laws.INTERPRETED, reason="slow there, where a row has a program of its own")
def test_rows_are_independent(device: str):
    made = laws.make(SAMPLE, {"num_rows": 37, "vocab": 300, "rules": "greedy top_k top_p min_p"}, device)
    laws.assert_rows_are_independent(SAMPLE, made, 37)


@pytest.mark.parametrize("vocab", [3, 64, 5000, 49152])
def test_greedy_takes_the_lowest_of_the_likeliest(vocab: int, device: str):
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0] = 0  # all equal
    logits[1, vocab // 3 :: 2] = logits[1].max()
    logits[2, [vocab // 2, vocab - 1]] = 9
    expected = [row.tolist().index(row.max()) for row in logits]
    for rules in ({"temperature": 0.0}, {"temperature": 0.0, "top_k": 5, "top_p": 0.1, "min_p": 0.5}):
        assert draw(logits.to(device), **rules).tolist() == expected


def test_ties_with_the_last_kept_are_kept(device: str):
    logits = torch.zeros(1, 70)
    logits[0, :4], logits[0, 66:68] = 3.0, 3.1
    num_draws = 12 if laws.INTERPRETED else 200
    tokens = draw(logits.to(device).expand(num_draws, -1), top_k=3, positions=torch.arange(num_draws))
    kept = {0, 1, 2, 3, 66, 67}
    assert set(tokens.tolist()) <= kept
    assert len(set(tokens.tolist())) > 3
    assert set(tokens.tolist()) == kept or laws.INTERPRETED


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_gives_minus_one_and_harms_no_other(broken: float, device: str):
    rules = {"temperature": torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), "top_p": torch.tensor([1.0, 0.9, 1.0, 0.9, 1.0])}
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    before = draw(logits, **rules)
    logits[0, 4999] = logits[1, 17] = broken
    logits[4] = float("-inf")
    assert draw(logits, **rules).tolist() == [-1, -1, *before[2:4].tolist(), -1]


def test_forbidden_tokens_are_not_drawn(device: str):
    logits = torch.full((32, 300), float("-inf"), device=device)
    logits[:, [70, 299]] = torch.tensor([0.0, 0.5], device=device)
    tokens = draw(logits, temperature=1.5, positions=torch.arange(32)).tolist()
    assert set(tokens) == {70, 299}


@pytest.mark.parametrize("rules", ["greedy", "", "top_k top_p"])
def test_tokens_are_written_where_they_are_drawn_for(rules: str, device: str):
    made = laws.make(SAMPLE, {"num_rows": 4, "vocab": 300, "rules": rules}, device)
    logits, rows, *tables, positions = made.args
    logits[2] = float("nan")
    tokens = torch.full((6, 2050), 7, dtype=torch.int32, device=device)
    out = torch.zeros(4, dtype=torch.int32, device=device)
    drawn = laws.form(SAMPLE)(logits, rows, *tables, positions, tokens[:, :2048], out=out)
    assert torch.equal(drawn, out)
    assert drawn[2] == -1
    expected = torch.full_like(tokens, 7)
    expected[rows.long(), positions.long()] = drawn.clamp_min(0)
    assert torch.equal(tokens, expected)
