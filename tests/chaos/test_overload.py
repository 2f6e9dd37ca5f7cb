"""More clients than can be served: they are told to come back, nobody else notices, and no process grows on."""

import asyncio
import collections
import json
import os
import signal
import time

import psutil
import pytest

from tests.chaos import leaks
from tests.chaos.clients import Clients
from tests.chaos.workload import MODEL, asks
from tests.server import Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FLAGS = ["--max-model-len", "2048", "--num-threads", "1", "--log-level", "warning", "--no-access-log"]
KV_MIB = 64  # little: a CPU takes its pages as they are first written, which is no growth
LIMITS = ["--kv-cache-memory-bytes", str(KV_MIB << 20), "--max-queued-requests", "600", "--max-queued-tokens", "300000"]
NUM_IDLE, NUM_SLOW, NUM_FLOOD = 2000, 500, 3000
MAX_GROWTH_MIB = 150


def resident_mib(server: Server) -> dict[str, float]:
    return {
        f"{process.role} {process.rank}": psutil.Process(process.pid).memory_info().rss / 2**20
        for process in server.processes()
    }


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.base_url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port), limit=1 << 10)  # takes little in before it is read


async def ask(server: Server, num_words: int, **more: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request, and read nothing of its answer."""
    reader, writer = await connect(server)
    body = {"model": MODEL, "prompt": "word " * num_words, "max_tokens": 200, "stream": True, "ignore_eos": True} | more
    payload = json.dumps(body).encode()
    writer.write(f"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n".encode())
    writer.write(b"Content-Type: application/json\r\n\r\n" + payload)
    return reader, writer


async def flood(server: Server, gate: asyncio.Semaphore) -> str:
    """One request too many: its status, if it says what a refusal has to say. It leaves once it is let in."""
    async with gate:
        reader, writer = await ask(server, 1000)
        try:
            async with asyncio.timeout(2):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except TimeoutError:
            return "let in"
        finally:
            writer.close()
    status = head.split()[1]
    assert status != "429" or "Retry-After: " in head, head
    return status


async def overload(server: Server) -> collections.Counter[str]:
    idle = [await connect(server) for _ in range(NUM_IDLE)]
    slow = [await ask(server, 10) for _ in range(NUM_SLOW)]
    gate = asyncio.Semaphore(200)
    statuses = collections.Counter(await asyncio.gather(*(flood(server, gate) for _ in range(NUM_FLOOD))))
    clients = [*idle, *slow]
    print(f"\n{dict(statuses)}\n", resident_mib(server), flush=True)
    for _, writer in clients:
        writer.close()
    return statuses


def test_floods_are_refused_and_memory_stays_bounded() -> None:
    with serve(*FLAGS, *LIMITS) as server:
        asyncio.run(Clients(server.base_url).run(asks(1, 12, 8), 12))
        before = resident_mib(server)
        statuses = asyncio.run(overload(server))
        after = resident_mib(server)
        assert statuses.keys() <= {"429", "200", "let in"}
        assert statuses["429"] > NUM_FLOOD / 2
        growth = {name: round(after[name] - before[name]) for name in before}
        print(growth)
        assert max(growth.values()) < MAX_GROWTH_MIB, growth
        leaks.wait_idle(server)
        asyncio.run(Clients(server.base_url).run(asks(2, 4, 8), 4))


def test_a_stopped_frontend_holds_up_nobody() -> None:
    """Its requests run on, or are dropped; those of others are answered meanwhile."""
    with serve(*FLAGS, "--frontends", "2", "--heartbeat-timeout-s", "60") as server:
        core_pid, (stopped, other) = server.pids("enginecore")[0], server.processes("frontend")
        clients = Clients(server.base_url)
        core = psutil.Process(core_pid)
        before_mib = core.memory_info().rss / 2**20

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(clients.run(asks(3, 36, 64), 36))
                await clients.are_mid_generation(24)
                os.kill(stopped.pid, signal.SIGSTOP)
                ports = {c.raddr.port for c in psutil.Process(other.pid).net_connections("tcp") if c.raddr}
                mine = [attempt for attempt in clients.under_way if attempt.port in ports]
                assert len(mine) >= 4
                deadline_s = time.monotonic() + 60
                while any(attempt in clients.under_way for attempt in mine):
                    assert time.monotonic() < deadline_s, "held up"
                    await asyncio.sleep(0.1)
                assert psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED
                os.kill(stopped.pid, signal.SIGCONT)
                await task

        asyncio.run(run())
        assert clients.num_answered == 36
        assert clients.num_broken == 0
        assert core.pid == server.pids("enginecore")[0]
        assert core.memory_info().rss / 2**20 - before_mib < MAX_GROWTH_MIB
        leaks.wait_idle(server)
