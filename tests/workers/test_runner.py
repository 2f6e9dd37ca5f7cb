"""The runner, driven by hand-made plans, gives what transformers gives, however the work is cut and mixed."""

import random

import pytest
import transformers

from cableway.bench.driver import Driver
from cableway.ipc.messages import StepPlan, ints
from cableway.workers.runner import Runner
from tests.workers.running import BLOCK_SIZE, GREEDY, drive, expected_greedy, generate_alone, prompt_of, worker_config

NUM_TOKENS = 24


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, 50])
def test_greedy_equals_transformers(driver: Driver, oracle: transformers.PreTrainedModel, length: int):
    prompt = prompt_of(length)
    assert generate_alone(driver, prompt, NUM_TOKENS) == expected_greedy(oracle, prompt, NUM_TOKENS)


@pytest.mark.parametrize("chunk_len", [1, 3, BLOCK_SIZE, 17])
def test_a_chunked_prompt_gives_the_same(driver: Driver, oracle: transformers.PreTrainedModel, chunk_len: int):
    request = driver.add(prompt_of(41), GREEDY)
    while not request.output:
        driver.step({request.row: min(chunk_len, len(request.tokens) - request.num_computed)})
    driver.generate(NUM_TOKENS)
    assert request.output == expected_greedy(oracle, prompt_of(41), NUM_TOKENS)


def test_prefill_and_decode_in_one_batch(driver: Driver, oracle: transformers.PreTrainedModel):
    """Requests come one a step, some in chunks, so that every step mixes chunk lengths; rows are in any order."""
    dice = random.Random(3)
    prompts = [prompt_of(dice.randint(1, 60), seed) for seed in range(12)]
    waiting, requests = list(prompts), []
    while waiting or any(len(r.output) < NUM_TOKENS for r in requests):
        if waiting:
            requests.append(driver.add(waiting.pop(0), GREEDY))
        rows = {r.row: min(7, len(r.tokens) - r.num_computed) for r in requests if len(r.output) < NUM_TOKENS}
        driver.step(dict(dice.sample(list(rows.items()), len(rows))))
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == expected_greedy(oracle, prompt, NUM_TOKENS)


def test_a_preempted_request_goes_on(driver: Driver, oracle: transformers.PreTrainedModel):
    """It comes back in another row, over other blocks, with the tokens it had."""
    prompt = prompt_of(20)
    first = driver.add(prompt, GREEDY)
    driver.generate(9)
    driver.remove(first)
    others = [driver.add(prompt_of(30, seed), GREEDY) for seed in (1, 2)]
    driver.step()
    resumed = driver.add(prompt, GREEDY, output=first.output)
    assert resumed.row not in {first.row, *(other.row for other in others)}
    driver.generate(NUM_TOKENS)
    assert resumed.output == expected_greedy(oracle, prompt, NUM_TOKENS)


def test_a_freed_row_is_used_again(checkpoint, decoder, oracle):
    driver = drive(decoder, worker_config(checkpoint, max_num_seqs=1, num_kv_blocks=24))
    for seed, length in enumerate((60, 3, 31)):
        prompt = prompt_of(length, seed)
        assert generate_alone(driver, prompt, NUM_TOKENS) == expected_greedy(oracle, prompt, NUM_TOKENS)


@pytest.mark.parametrize("num_shared", [BLOCK_SIZE, 2 * BLOCK_SIZE + 3, 29])
def test_a_shared_prefix_is_not_computed_again(driver: Driver, oracle: transformers.PreTrainedModel, num_shared: int):
    """Whole blocks are shared, a partial one is copied; the owner goes on writing its own."""
    prefix = prompt_of(30)
    owner = driver.add(prefix, GREEDY)
    driver.step()
    follower_prompt = prefix[:num_shared] + prompt_of(6, seed=1)
    follower = driver.add(follower_prompt, GREEDY, shared=(owner, num_shared))
    driver.generate(NUM_TOKENS)
    assert owner.output == expected_greedy(oracle, prefix, NUM_TOKENS)
    assert follower.output == expected_greedy(oracle, follower_prompt, NUM_TOKENS)


def test_a_plan_that_contradicts_the_rows_is_an_error(driver: Driver):
    request = driver.add(prompt_of(5), GREEDY)
    with pytest.raises(ValueError, match="tokens that its rows do not have"):
        driver.step({request.row: 6})


def test_a_plan_without_rows_frees_and_copies(driver: Driver, decoder, config):
    runner = Runner(decoder, config)
    nothing = ints([])
    plan = StepPlan(1, 7, nothing, nothing, nothing, [], ints([0, 3]), nothing, nothing, ints([1, 2]))
    result = runner.step(plan)
    assert (result.epoch, result.step, result.token_ids) == (1, 7, b"")


def test_a_forgetful_runner_starts_anew(decoder, config, oracle):
    driver = drive(decoder, config)
    driver.add(prompt_of(20), GREEDY)
    driver.step()
    runner = driver._runner
    runner.forget()
    fresh = Driver(runner, config.block_size, config.max_num_seqs)
    prompt = prompt_of(33, seed=5)
    assert generate_alone(fresh, prompt, NUM_TOKENS) == expected_greedy(oracle, prompt, NUM_TOKENS)
