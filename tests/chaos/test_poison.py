"""A request that keeps killing a process is found, alone, and failed; all others go on as if nothing had been."""

import asyncio
import http.client
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.clients import Clients
from tests.chaos.poison.poison_pill import pill
from tests.chaos.test_chaos import FLAGS, undisturbed
from tests.chaos.workload import MODEL, asks
from tests.server import Server, serve

PROGRAM = str(Path(__file__).parent / "poison" / "poison_server.py")
NUM_INNOCENT = 12
IN_PROMPT, WHILE_DRAWING, NEVER = 6, 30, 10_000


def ask_poison(server: Server, length: int) -> tuple[int, dict[str, Any]]:
    """Status and body of a request that kills when `length` of its tokens are computed."""
    body = {"model": MODEL, "prompt": [*pill(length), *range(1000, 1020)], "max_tokens": 24, "temperature": 0}
    connection = http.client.HTTPConnection(server.base_url.removeprefix("http://"), timeout=200)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


async def poisoned(server: Server, clients: Clients) -> list[tuple[int, dict[str, Any]]]:
    requests = asks(5, NUM_INNOCENT, 40)
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(requests, NUM_INNOCENT))
        await clients.are_mid_generation(NUM_INNOCENT // 2)
        tasks = [asyncio.to_thread(ask_poison, server, length) for length in (IN_PROMPT, WHILE_DRAWING, NEVER)]
        return await asyncio.gather(*tasks)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ["worker", "enginecore"])
def test_poison_is_quarantined_and_nobody_else(role: str) -> None:
    with serve(*FLAGS, program=[sys.executable, "-P", PROGRAM, role, "serve"]) as server:
        truth = asyncio.run(undisturbed(server, asks(5, NUM_INNOCENT, 40), NUM_INNOCENT))
        clients = Clients(server.base_url, truth)
        in_prompt, while_drawing, never = asyncio.run(poisoned(server, clients))
        for status, answer in (in_prompt, while_drawing):
            assert (status, answer["error"]["code"]) == (500, "quarantined"), answer
        assert never[0] == 200
        assert clients.num_answered == NUM_INNOCENT
        (process,) = server.processes(role)
        assert 4 <= process.restarts <= 12
        assert server.errors.count("request_quarantined") == 2
