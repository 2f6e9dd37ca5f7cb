"""Clients of a chaos run: plain HTTP over one connection a request, so that each knows which frontend it lost."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.chaos.workload import Answer, Ask

_LINE_BYTES = 1 << 22


class Broken(Exception):
    """The connection ended before the answer did."""


class Wrong(AssertionError):
    """A client saw an error, or not what it should have."""


@dataclass(eq=False)
class Attempt:
    """One request under way."""

    ask: Ask
    port: int = 0  # the client's own
    answer: Answer = field(default_factory=Answer)
    num_events: int = 0

    @property
    def is_mid_generation(self) -> bool:
        """Some of its tokens were delivered, and more will be."""
        return self.num_events > 0


class Clients:
    """A closed loop: always `concurrency` requests under way, until `stop`; each answer is compared with the truth.

    Args:
        truth: answer of each request by name; None records answers in place of comparing them.
    """

    def __init__(self, base_url: str, truth: dict[str, Answer] | None = None):
        self.answers: dict[str, Answer] = {}
        self.under_way: set[Attempt] = set()
        self.num_sent = self.num_answered = self.num_broken = 0
        self.token_times_s: deque[float] = deque()
        self.expendable_ports: set[int] = set()
        """Whose frontend was killed: they may see their connection end."""
        self._host, self._port = urlsplit(base_url).hostname, urlsplit(base_url).port
        self._truth = truth
        self._is_stopped = False

    @property
    def num_mid_generation(self) -> int:
        return sum(attempt.is_mid_generation for attempt in self.under_way)

    async def are_mid_generation(self, num: int, timeout_s: float = 60.0) -> None:
        """Wait until so many streams have some of their tokens, and expect more."""
        deadline_s = time.monotonic() + timeout_s
        while self.num_mid_generation < num:
            assert time.monotonic() < deadline_s, f"only {self.num_mid_generation} streams"
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Begin no new request."""
        self._is_stopped = True

    async def run(self, asks: Iterable[Ask], concurrency: int) -> None:
        """Send these requests, at most `concurrency` at once; ends when all have been answered."""
        waiting = iter(asks)
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._one_after_another(waiting))

    async def _one_after_another(self, waiting: Iterable[Ask]) -> None:
        for ask in waiting:
            if self._is_stopped:
                return
            await self._ask(ask)

    async def _ask(self, ask: Ask) -> None:
        self.num_sent += 1
        while True:
            attempt = Attempt(ask)
            self.under_way.add(attempt)
            try:
                await self._attempt(attempt)
                break
            except (Broken, ConnectionError) as error:
                if attempt.port and attempt.port not in self.expendable_ports:
                    raise Wrong(f"{ask.name} lost its connection after {attempt.num_events} events: {error}") from error
                self.num_broken += 1
                await asyncio.sleep(0.1)
            finally:
                self.under_way.discard(attempt)
        self.num_answered += 1
        if self._truth is None:
            self.answers[ask.name] = attempt.answer
        elif attempt.answer != self._truth[ask.name]:
            raise Wrong(f"{ask.name}: {attempt.answer}\nundisturbed: {self._truth[ask.name]}")

    async def _attempt(self, attempt: Attempt) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LINE_BYTES)
        try:
            attempt.port = writer.get_extra_info("sockname")[1]
            body = json.dumps(attempt.ask.body).encode()
            head = f"POST {attempt.ask.path} HTTP/1.0\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(body)}"
            writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
            status = int(head.split(b" ", 2)[1])
            if status != 200:
                raise Wrong(f"{attempt.ask.name}: {status} {(await reader.read()).decode()}")
            if attempt.ask.is_streamed:
                await self._read_events(attempt, reader)
            else:
                await self._read_whole(attempt, reader)
        except asyncio.IncompleteReadError as error:
            raise Broken("no answer") from error
        finally:
            writer.close()

    async def _read_events(self, attempt: Attempt, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            payload = json.loads(data)
            if "error" in payload:
                raise Wrong(f"{attempt.ask.name}: {payload}")
            attempt.answer.add(payload)
            attempt.num_events += 1
            self.token_times_s.append(time.monotonic())
        raise Broken("the stream ended early")

    async def _read_whole(self, attempt: Attempt, reader: asyncio.StreamReader) -> None:
        text = await reader.read()
        try:
            attempt.answer.add(json.loads(text))
        except json.JSONDecodeError as error:
            raise Broken("half an answer") from error
