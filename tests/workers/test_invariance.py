"""Under `batch_invariant` a request's tokens and log-probabilities are the same, bit for bit, whatever is around it."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from cableway.bench.driver import Driver, Position
from cableway.ipc import modelfiles
from cableway.ipc.messages import Sampling
from cableway.workers.batch import Decoder
from tests.workers.running import drive, load, prompt_of, worker_config

Outcome = tuple[list[int], dict[int, Position]]

PROMPT = prompt_of(45)
SAMPLINGS = (
    Sampling(temperature=0.0, logprobs=4),
    Sampling(temperature=1.1, seed=11, top_p=0.9, logprobs=4, presence_penalty=0.3),
)


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """More threads than one, since they split work by the shape of the batch."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def make_driver(request, checkpoint) -> Callable[[], Driver]:
    return driver_maker(worker_config(checkpoint, dtype=request.param, batch_invariant=True, num_threads=2))


def driver_maker(config) -> Callable[[], Driver]:
    decoder: Decoder = load(config)
    torch.set_num_threads(2)
    return lambda: drive(decoder, config)


def alone(driver: Driver, sampling: Sampling, num_tokens: int, prompt: list[int] = PROMPT) -> Outcome:
    request = driver.add(prompt, sampling)
    driver.generate(num_tokens)
    return request.output, request.logprobs


def among_others(driver: Driver, sampling: Sampling, num_tokens: int, num_others: int) -> Outcome:
    """Others come before and after it, with prompts of every length, and leave in the middle."""
    dice = random.Random(4)
    others = [
        driver.add(prompt_of(dice.randint(1, 70), seed), Sampling(seed=seed, temperature=seed % 2))
        for seed in range(num_others)
    ]
    for other in others[::2]:
        driver.step({other.row: len(other.tokens)})
    request = driver.add(PROMPT, sampling)
    while len(request.output) < num_tokens:
        running = list(driver.running.values())
        dice.shuffle(running)
        driver.step({r.row: min(len(r.tokens) - r.num_computed, dice.randint(1, 9)) for r in running})
        if len(driver.running) > num_others // 2:
            driver.remove(next(r for r in running if r is not request))
    return request.output, request.logprobs


def in_chunks(driver: Driver, sampling: Sampling, num_tokens: int, chunk_len: int) -> Outcome:
    request = driver.add(PROMPT, sampling)
    while not request.output:
        driver.step({request.row: min(chunk_len, len(request.tokens) - request.num_computed)})
    driver.generate(num_tokens)
    return request.output, request.logprobs


def cached(driver: Driver, sampling: Sampling, num_tokens: int, num_cached: int) -> Outcome:
    owner = driver.add(PROMPT, Sampling())
    driver.step()
    request = driver.add(PROMPT, sampling, shared=(owner, num_cached))
    driver.remove(owner)
    driver.generate(num_tokens)
    return request.output, request.logprobs


def preempted(driver: Driver, sampling: Sampling, num_tokens: int) -> Outcome:
    """What was computed token by token is computed at once, and the other way round."""
    request = driver.add(PROMPT, sampling)
    driver.generate(num_tokens // 2)
    driver.remove(request)
    resumed = driver.add(PROMPT, sampling, output=request.output)
    driver.generate(num_tokens)
    return resumed.output, request.logprobs | resumed.logprobs


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_bit_for_bit(make_driver: Callable[[], Driver], sampling: Sampling):
    expected = alone(make_driver(), sampling, 24)
    assert among_others(make_driver(), sampling, 24, 63) == expected
    assert in_chunks(make_driver(), sampling, 24, 1) == expected
    assert in_chunks(make_driver(), sampling, 24, 19) == expected
    assert cached(make_driver(), sampling, 24, 8) == expected
    assert cached(make_driver(), sampling, 24, 44) == expected
    assert preempted(make_driver(), sampling, 24) == expected


def test_bit_for_bit_on_the_real_model():
    model = modelfiles.locate("smollm2-135m").path
    make = driver_maker(worker_config(model, dtype="bfloat16", batch_invariant=True, num_threads=2, max_num_seqs=24))
    expected = alone(make(), SAMPLINGS[0], 6)
    assert among_others(make(), SAMPLINGS[0], 6, 20) == expected
    assert in_chunks(make(), SAMPLINGS[0], 6, 7) == expected
    assert cached(make(), SAMPLINGS[1], 6, 32) == alone(make(), SAMPLINGS[1], 6)
