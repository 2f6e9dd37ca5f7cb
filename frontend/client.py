"""EngineClient: submit prompts to engine cores, and receive tokens: one link (link.py) to each engine."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import structlog

from cableway.frontend.errors import RequestError
from cableway.frontend.job import Job, Update
from cableway.frontend.link import PING_INTERVAL_S, EngineLost, Link
from cableway.frontend.live import LiveChoice, LiveRequest
from cableway.ipc.config import FrontendConfig
from cableway.ipc.messages import Ping, Sampling, Status, ints

__all__ = ["EngineClient", "EngineLost", "Job", "Update"]


class EngineClient:
    """Connections to every engine of the configuration, one core each.

    `failed` is a future that never has a result: it gets an exception when this process cannot go on.

    Args:
        log: structlog logger; the process's own when there is none.
    """

    failed: "asyncio.Future[None]"

    def __init__(self, config: FrontendConfig, rank: int = 0, log: Any = None):
        log = log or structlog.get_logger()
        self._links = {engine: Link(config, engine, rank, log) for engine in dict.fromkeys(config.engines.values())}
        self._engines = config.engines
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Connect. Returns at once: a core may come up later, and requests wait for it."""
        self.failed = asyncio.get_running_loop().create_future()
        for link in self._links.values():
            link.start(self._guard(link.on_arrivals))
        self._tick()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        request_id: str = "",
        first_index: int = 0,
        model: str = "",
        job: Job | None = None,
        source_ids: Sequence[int] = (),
    ) -> Job:
        """Begin `n` continuations of a prompt, as choices `first_index` … `first_index + n - 1` of a job.

        Args:
            model: served name that says which engine; the first one when empty.
            job: one to add to, so that several prompts share a mailbox; a new one otherwise.
            source_ids: what the model's encoder takes, where it has one; `prompt_ids` is what its decoder begins with.

        Raises:
            RequestError: 429 when too many requests wait for a core that is away; 404 for an unknown model.
        """
        if model and model not in self._engines:
            raise RequestError(404, f"The model `{model}` does not exist.", param="model", code="model_not_found")
        engine = self._engines[model] if model else next(iter(self._engines.values()))
        job = job or Job()
        request = LiveRequest(request_id, ints(prompt_ids), sampling, priority, cache_salt, ints(source_ids))
        self._links[engine].submit(request, [LiveChoice(request, job, first_index + i, i) for i in range(n)])
        return job

    def status(self, model: str = "") -> Status | None:
        """What the engine of `model` last told of itself; None before it first did, or while its core is away."""
        return self._links[self._engines[model] if model else next(iter(self._engines.values()))].status

    def statuses(self) -> dict[str, tuple[Status | None, float]]:
        """For each engine: its last status, and that status's age in seconds."""
        now_s = time.monotonic()
        return {engine: (link.status, now_s - link.status_at_s) for engine, link in self._links.items()}

    async def set_asleep(self, asleep: bool) -> None:
        """Have every engine give its memory back, or take it again; returns when all have. Requests wait meanwhile."""
        await asyncio.gather(*(link.set_asleep(asleep) for link in self._links.values()))

    async def are_asleep(self) -> bool:
        """Whether every engine sleeps, as its core says now."""
        statuses = await asyncio.gather(*(link.asked(Ping()) for link in self._links.values()))
        return all(status is not None and status.asleep for status in statuses)

    @property
    def num_live(self) -> int:
        """Choices that have not ended."""
        return sum(link.num_live for link in self._links.values())

    def fail_all(self, error: RequestError) -> None:
        """End every live choice with `error`."""
        for link in self._links.values():
            link.fail_all(error)

    def close(self) -> None:
        """Abort what is live and disconnect."""
        if self._timer is not None:
            self._timer.cancel()
        for link in self._links.values():
            link.close()

    def _tick(self) -> None:
        for link in self._links.values():
            self._guard(link.tick)()
        self._timer = asyncio.get_running_loop().call_later(PING_INTERVAL_S, self._tick)

    def _guard(self, callback: Any) -> Any:
        """Wrap a callback of the event loop, whose exceptions would otherwise only be logged."""

        def guarded(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception as error:
                if not self.failed.done():
                    self.failed.set_exception(error)
                self.fail_all(RequestError(500, "The engine is lost.", type="server_error", code="engine_lost"))

        return guarded
