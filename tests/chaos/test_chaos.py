"""Kill and stop every process under load: each client still gets, to the letter, what an undisturbed server gives."""

import asyncio
import itertools
from functools import partial

import pytest

from tests.chaos import leaks
from tests.chaos.clients import Clients
from tests.chaos.faults import MIN_STREAMS, Fault, Mischief, plan
from tests.chaos.workload import Answer, Ask, asks
from tests.server import Server, serve

FLAGS = ["--batch-invariant", "--frontends", "2", "--heartbeat-timeout-s", "2", "--log-level", "warning"]
# Memory for about half of the load, so that requests are preempted; steps too small for the longer prompts, so that
# some are half computed; and one thread, because threads that wait for each other starve on a busy machine.
FLAGS += ["--num-kv-blocks", "72", "--max-model-len", "384", "--max-num-batched-tokens", "96", "--num-threads", "1"]

say = partial(print, flush=True)  # `make chaos` runs with -s: minutes without a word look stuck


async def undisturbed(server: Server, requests: list[Ask], concurrency: int) -> dict[str, Answer]:
    clients = Clients(server.base_url)
    await clients.run(requests, concurrency)
    return clients.answers


async def disturbed(
    server: Server, requests: list[Ask], truth: dict[str, Answer], concurrency: int, faults: list[Fault], seed: int
) -> tuple[Clients, Mischief]:
    clients = Clients(server.base_url, truth)
    mischief = Mischief(server, clients, seed, say)
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(itertools.cycle(requests), concurrency))
        await mischief.run(faults)
        clients.stop()
    return clients, mischief


def chaos(*, seed: int, num_faults: int, num_requests: int, num_tokens: int, concurrency: int) -> None:
    requests = asks(seed, num_requests, num_tokens)
    with serve(*FLAGS) as server:
        folder = server.runtime_dir
        truth = asyncio.run(undisturbed(server, requests, concurrency))
        say(f"\ntruth: {sum(answer.num_tokens for answer in truth.values())} tokens of {len(truth)} requests")
        before = leaks.holdings(server)
        faults = plan(seed, num_faults)
        clients, mischief = asyncio.run(disturbed(server, requests, truth, concurrency, faults, seed))
        assert len(mischief.outcomes) == num_faults
        assert all(outcome.num_hit >= MIN_STREAMS for outcome in mischief.outcomes)
        assert clients.num_sent == clients.num_answered >= concurrency
        say(f"{clients.num_answered} answered, {clients.num_broken} asked again of another frontend")
        say(mischief.summary())
        leaks.assert_holds_again(server, before)
        assert server.stop() == 0
        leaks.assert_nothing_left(server, folder)


@pytest.mark.timeout(300)
def test_a_few_faults() -> None:
    chaos(seed=1, num_faults=4, num_requests=12, num_tokens=24, concurrency=32)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_faults() -> None:
    chaos(seed=7, num_faults=52, num_requests=60, num_tokens=32, concurrency=40)
