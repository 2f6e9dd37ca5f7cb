"""Steps for nobody that touch everything a request can reach, so that the first request waits for nothing."""

from collections.abc import Iterator, Sequence

from cableway.ipc.messages import NewRow, Sampling, StepPlan, ints

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(seed=1, top_k=20, top_p=0.9, min_p=0.1),
    Sampling(frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=1.2),
    Sampling(logit_bias={0: 1.0}, min_tokens=4, eos_token_ids=ints([0])),
    Sampling(bad_words=[ints([0]), ints([1, 2])], allowed_token_ids=ints(range(8))),
    Sampling(logprobs=0),
    Sampling(logprobs=5),
)
"""Between them, all that can be asked of a draw."""
_PROMPT = ints([0, 0])


def plans(max_num_seqs: int, kinds: Sequence[str]) -> Iterator[StepPlan]:
    """Prompts and single tokens, drawn in every way, copied blocks, and log-probabilities of a prompt.

    Args:
        kinds: of the state groups.
    """
    num_rows = min(len(SAMPLINGS), max_num_seqs)
    yield _plan(2, SAMPLINGS[:num_rows], kinds)
    yield _plan(1, (), kinds, num_rows=num_rows)
    yield _plan(2, (Sampling(prompt_logprobs=1),), kinds, freed=num_rows)


def _plan(
    num_tokens: int, entering: tuple[Sampling, ...], kinds: Sequence[str], *, num_rows: int = 0, freed: int = 0
) -> StepPlan:
    """So many tokens in each of the rows that enter, or of the first `num_rows`. All share one block."""
    source = (2, _PROMPT) if "encoder" in kinds else ()
    new = [
        NewRow(row, _PROMPT, 2, 0, 0, sampling, [ints([0])] * len(kinds), *source)
        for row, sampling in enumerate(entering)
    ]
    num_rows = num_rows or len(new)
    return StepPlan(
        epoch=0,
        step=0,
        rows=ints(range(num_rows)),
        num_tokens=ints([num_tokens] * num_rows),
        samples=ints([1] * num_rows),
        new=new,
        freed=ints(range(freed)),
        blocks=b"",
        num_new_blocks=ints([0] * (num_rows * len(kinds))),
        copies=ints([0, 0]),
    )
