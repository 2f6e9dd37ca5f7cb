"""What a row's sampling parameters do to its tokens, and to nobody else's."""

import math

import pytest
import torch
import transformers

from cableway.bench.driver import Driver, Request
from cableway.ipc.messages import Sampling, ints
from cableway.workers.logprobs import TopLogprobs
from tests.workers.running import GREEDY, drive, expected_greedy, expected_logprobs, generate_alone, prompt_of

NUM_TOKENS = 24


def test_draws_are_a_function_of_seed_choice_and_position(driver: Driver):
    prompt, sampling = prompt_of(9), Sampling(seed=7, temperature=1.5)
    alone = generate_alone(driver, prompt, NUM_TOKENS, sampling)
    twin = driver.add(prompt, sampling)
    other_choice = driver.add(prompt, sampling, choice=1)
    other_seed = driver.add(prompt, Sampling(seed=8, temperature=1.5))
    greedy = driver.add(prompt, GREEDY)
    driver.generate(NUM_TOKENS)
    assert twin.output == alone
    assert len({tuple(r.output) for r in (twin, other_choice, other_seed, greedy)}) == 4


def test_a_resumed_request_draws_what_it_would_have(driver: Driver):
    prompt, sampling = prompt_of(9), Sampling(seed=2**63 - 1, temperature=1.2, top_p=0.9, top_k=40, min_p=0.01)
    whole = generate_alone(driver, prompt, NUM_TOKENS, sampling)
    resumed = driver.add(prompt, sampling, output=whole[:10])
    driver.generate(NUM_TOKENS)
    assert resumed.output == whole


def test_logprobs_equal_transformers(driver: Driver, oracle: transformers.PreTrainedModel):
    """Of the raw logits, whatever changes them; as many as each row asked for."""
    prompt = prompt_of(12)
    plain = driver.add(prompt, Sampling(temperature=0.0, logprobs=3))
    only_own = driver.add(prompt, Sampling(temperature=1.0, seed=3, logprobs=0))
    biased = driver.add(prompt, Sampling(temperature=0.0, logprobs=5, logit_bias={17: 100.0}))
    none = driver.add(prompt, GREEDY)
    driver.generate(NUM_TOKENS)
    assert biased.output == [17] * NUM_TOKENS
    assert none.logprobs == {}
    for request, num_top in ((plain, 3), (only_own, 0), (biased, 5)):
        assert sorted(request.logprobs) == list(range(12, 12 + NUM_TOKENS))
        check_logprobs(oracle, request, num_top)


def check_logprobs(oracle: transformers.PreTrainedModel, request: Request, num_top: int) -> None:
    expected = expected_logprobs(oracle, request.tokens)
    for position, given in request.logprobs.items():
        of_position = expected[position - 1]
        own = request.tokens[position]
        top = of_position.topk(num_top)
        assert given.token_ids == [own, *top.indices.tolist()]
        assert given.values == pytest.approx([float(of_position[own]), *top.values.tolist()], abs=1e-4)
        assert given.rank == 1 + int((of_position > of_position[own]).sum())


@pytest.mark.parametrize("chunk_len", [5, 100])
def test_prompt_logprobs_equal_transformers(
    driver: Driver, oracle: transformers.PreTrainedModel, chunk_len: int, monkeypatch: pytest.MonkeyPatch
):
    """In whatever chunks the prompt comes, beside others that want other numbers or none."""
    monkeypatch.setattr("cableway.workers.logprobs._LOGITS_BYTES", 4 * 300 * 3)  # so that three rows are judged at once
    requests = [
        driver.add(prompt_of(length, seed=length), Sampling(temperature=0.0, prompt_logprobs=num_top))
        for length, num_top in ((1, 2), (2, 0), (23, 4), (17, -1))
    ]
    while any(not r.output for r in requests):
        driver.step({r.row: min(chunk_len, len(r.tokens) - r.num_computed) for r in requests})
    for request in requests:
        num_top = request.sampling.prompt_logprobs
        judged = range(1, request.num_prompt_tokens) if num_top >= 0 else ()
        assert sorted(request.logprobs) == list(judged)
        check_logprobs(oracle, request, num_top)


def test_more_logprobs_than_the_vocabulary_has(driver: Driver):
    request = driver.add([1, 2, 3], Sampling(temperature=0.0, logprobs=1000, prompt_logprobs=1000))
    driver.step()
    assert [len(position.values) for position in request.logprobs.values()] == [301] * 3


def penalised(logits: torch.Tensor, request: Request, num_output: int) -> torch.Tensor:
    """Penalties as OpenAI and Hugging Face define them, token by token."""
    sampling, logits = request.sampling, logits.clone()
    prompt, output = request.tokens[: request.num_prompt_tokens], request.output[:num_output]
    for token_id in {*prompt, *output}:
        factor = sampling.repetition_penalty
        logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
    for token_id in set(output):
        logits[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token_id)
    return logits


@torch.inference_mode()
def test_penalties_see_prompt_and_output(driver: Driver, oracle: transformers.PreTrainedModel):
    prompt = prompt_of(12)
    kinds = (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.8},
        {"presence_penalty": -0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    )
    plain = driver.add(prompt, GREEDY)
    requests = [driver.add(prompt, Sampling(temperature=0.0, **kind)) for kind in kinds]
    driver.generate(NUM_TOKENS // 2)
    driver.remove(requests[3])  # preempted: it comes back with half of its output
    requests[3] = driver.add(prompt, requests[3].sampling, output=requests[3].output)
    driver.generate(NUM_TOKENS)
    assert plain.output == expected_greedy(oracle, prompt, NUM_TOKENS)
    for request in requests:
        logits = oracle(torch.tensor([request.tokens])).logits[0]
        for i in range(NUM_TOKENS):
            expected = penalised(logits[len(prompt) + i - 1], request, i)
            assert request.output[i] == int(expected.argmax())
        assert request.output != plain.output


def test_many_rows_with_penalties_come_and_go(driver: Driver):
    sampling = Sampling(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0)
    alone = generate_alone(driver, prompt_of(6), NUM_TOKENS, sampling)
    for num in (3, 11, 6):
        requests = [driver.add(prompt_of(6), sampling) for _ in range(num)]
        driver.generate(NUM_TOKENS)
        assert all(request.output == alone for request in requests)
        for request in requests:
            driver.remove(request)


def test_an_end_cannot_be_drawn_before_min_tokens(driver: Driver, oracle: transformers.PreTrainedModel):
    """`min_tokens` forbids what would have come; after it the bias wins."""
    ends = ints([5, 99_999_999])
    request = driver.add(
        prompt_of(8),
        Sampling(temperature=0.0, min_tokens=4, stop_token_ids=ends, eos_token_ids=ints([6, 5]), logit_bias={5: 100.0}),
    )
    resumed = driver.add(prompt_of(8), request.sampling, output=[1, 2, 3])
    driver.generate(8)
    assert 5 not in request.output[:4]
    assert request.output[4:] == [5] * 4
    assert resumed.output[3] != 5
    assert resumed.output[4:] == [5] * 4


def test_a_bias_for_a_token_that_does_not_exist_changes_nothing(driver: Driver, oracle: transformers.PreTrainedModel):
    sampling = Sampling(temperature=0.0, logit_bias={-1: 100.0, 300: 100.0, 2**31 - 1: -100.0})
    assert generate_alone(driver, prompt_of(8), 5, sampling) == expected_greedy(oracle, prompt_of(8), 5)


class Poisoned:
    """A decoder whose logits are broken for one row of each step."""

    def __init__(self, decoder, broken: int, value: float) -> None:
        self._decoder, self._broken, self._value = decoder, broken, value
        self.vocab_size, self.state_groups, self.forward = decoder.vocab_size, decoder.state_groups, decoder.forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._decoder.logits(hidden)
        logits[self._broken, 7] = self._value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken_sampling", [GREEDY, Sampling(seed=1, logprobs=2, presence_penalty=1.0)])
def test_broken_logits_fail_their_row_alone(decoder, config, oracle, value: float, broken_sampling: Sampling):
    driver = drive(Poisoned(decoder, broken=1, value=value), config)
    first = driver.add(prompt_of(8), GREEDY)
    broken = driver.add(prompt_of(9), broken_sampling)
    last = driver.add(prompt_of(10), GREEDY)
    driver.generate(2)
    assert broken.failed is not None
    assert (broken.failed.status, broken.failed.code) == (500, "broken_logits")
    for request in (first, last):
        assert request.failed is None
        assert request.output == expected_greedy(oracle, request.tokens[: request.num_prompt_tokens], 2)


def test_a_narrowed_logprob_is_one_row_of_it():
    found = TopLogprobs(torch.arange(12).view(3, 4), torch.arange(12.0).view(3, 4), torch.arange(3))
    narrow = found.narrowed(1, 2)
    assert [part.tolist() for part in narrow] == [[[4, 5, 6]], [[4.0, 5.0, 6.0]], [1]]


def forbidden_by_words(words: list[list[int]], output: list[int]) -> set[int]:
    """Tokens that would complete one of the words."""
    return {word[-1] for word in words if output[len(output) + 1 - len(word) :] == word[:-1] or len(word) == 1}


@torch.inference_mode()
def test_words_are_not_said(driver: Driver, oracle: transformers.PreTrainedModel):
    """Each next token is the likeliest of those that complete no word; words of the prompt's end do not count."""
    prompt = prompt_of(9)
    plain = expected_greedy(oracle, prompt, NUM_TOKENS)
    words = [plain[3:6], plain[5:7], [plain[9]], plain[10:15], [prompt[-1], plain[0]], [7] * 40, [5000]]
    request = driver.add(prompt, Sampling(temperature=0.0, bad_words=[ints(word) for word in words]))
    beside = driver.add(prompt, GREEDY)
    one_word = driver.add(prompt, Sampling(temperature=0.0, bad_words=[ints(plain[:2])]))
    driver.generate(NUM_TOKENS // 2)
    driver.remove(request)  # preempted: it comes back with half of its output
    request = driver.add(prompt, request.sampling, output=request.output)
    driver.generate(NUM_TOKENS)
    assert beside.output[:NUM_TOKENS] == plain
    assert one_word.output[0] == plain[0]
    assert one_word.output[1] != plain[1]
    assert request.output[:5] == plain[:5]
    logits = oracle(torch.tensor([request.tokens])).logits[0]
    for i in range(NUM_TOKENS):
        expected = logits[len(prompt) + i - 1].clone()
        forbidden = forbidden_by_words(words, request.output[:i]) - {5000}
        expected[list(forbidden)] = -math.inf
        assert request.output[i] == int(expected.argmax())


@torch.inference_mode()
def test_only_allowed_tokens_are_drawn(driver: Driver, oracle: transformers.PreTrainedModel):
    """Whatever else is asked for, and whoever asks for something beside it."""
    prompt, allowed = prompt_of(9), [0, 31, 32, 64, 150, 299, 300, 2**31 - 1, -1]
    penalised_greedy = Sampling(temperature=0.0, presence_penalty=2.0)
    alone = generate_alone(driver, prompt, NUM_TOKENS, penalised_greedy)
    greedy = driver.add(prompt, Sampling(temperature=0.0, allowed_token_ids=ints(allowed)))
    random = driver.add(
        prompt,
        Sampling(seed=3, temperature=9.0, allowed_token_ids=ints(allowed), presence_penalty=1.0, logit_bias={7: 100.0}),
    )
    beside = driver.add(prompt, penalised_greedy)
    plain = driver.add(prompt, Sampling(temperature=0.0, logprobs=1))
    driver.generate(NUM_TOKENS)
    logits = oracle(torch.tensor([greedy.tokens])).logits[0]
    for i, token_id in enumerate(greedy.output[:NUM_TOKENS]):
        of_position = logits[len(prompt) + i - 1]
        assert token_id == max(allowed[:6], key=lambda other: float(of_position[other]))
    assert len(set(random.output)) > 2
    assert set(random.output) <= set(allowed[:6])
    assert plain.output[:NUM_TOKENS] == expected_greedy(oracle, prompt, NUM_TOKENS)
    assert beside.output == alone
    none_left = driver.add(prompt, Sampling(allowed_token_ids=ints([1]), bad_words=[ints([1])]))
    driver.step()
    assert none_left.failed is not None


def test_tables_grow_with_the_words_of_those_who_come(driver: Driver):
    sampling = Sampling(temperature=0.0, bad_words=[ints([5, 6])])
    expected = generate_alone(driver, prompt_of(6), 8, sampling)
    for num, longest in ((2, 1), (9, 70), (3, 2)):
        words = [ints([i] * longest) for i in range(num)]
        others = [driver.add(prompt_of(6, i), Sampling(temperature=0.0, bad_words=words)) for i in range(num)]
        assert generate_alone(driver, prompt_of(6), 8, sampling) == expected
        for other in others:
            driver.remove(other)
