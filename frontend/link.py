"""Link: a frontend's connection to one engine's core, and the choices that it works on.

A core that dies takes nothing along: every live choice is held here with its prompt, sampling and the tokens delivered
so far, and goes to the next core as soon as that says Welcome. Only the reader of a `Job` may notice, as a pause.
"""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from cableway.frontend.errors import RequestError
from cableway.frontend.job import Update
from cableway.frontend.live import LiveChoice, LiveRequest, unknown_part
from cableway.ipc import messages
from cableway.ipc.config import FrontendConfig, frontends_address
from cableway.ipc.endpoint import Arrival, AsyncEndpoint, Endpoint, PeerDown, PeerUp, Undecodable, identity
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Failed,
    Finish,
    Generate,
    Hello,
    IfLost,
    Logprobs,
    Ping,
    Refused,
    Sleep,
    Status,
    Tokens,
    Wake,
    Welcome,
    ints,
    unpack_ints,
)

PING_INTERVAL_S = 1.0
_KEY_MASK = 0x7FFFFFFF


class EngineLost(Exception):
    """The core refused this process, or what it sends cannot be understood: the process cannot work any more."""


class Link:
    """The connection to one engine's core, and the choices it is working on."""

    def __init__(self, config: FrontendConfig, engine: str, rank: int, log: Any):
        self._log = log
        self.status: Status | None = None
        self.status_at_s = time.monotonic()
        self._told_status = asyncio.Event()
        self._address = frontends_address(config.runtime_dir, engine)
        self._engine = engine
        self._rank = rank
        self._max_queued = config.max_queued_requests, config.max_queued_tokens
        self._max_running = config.max_num_seqs, config.max_num_seqs * config.max_model_len
        self._num_prompt_tokens = 0  # of the requests that have live choices
        self._patience_s = config.step_timeout_s
        self._endpoint: AsyncEndpoint | None = None
        self._epoch: int | None = None  # None while no core has welcomed us
        self._last_epoch: int | None = None
        self._away_since_s = time.monotonic()
        self._live: dict[int, LiveChoice] = {}
        self._due: list[LiveChoice] = []  # those with something `fresh`
        self._keys = itertools.count(1)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def start(self, on_arrivals: Any) -> None:
        endpoint = Endpoint(self._address, receives=messages.ToFrontend, own_identity=identity("frontend", self._rank))
        self._endpoint = AsyncEndpoint(endpoint, on_arrivals)

    def close(self) -> None:
        if self._endpoint is not None:
            for job in {choice.job for choice in self._live.values()}:
                job.abort()
            self._endpoint.close()
            self._endpoint = None

    def submit(self, request: LiveRequest, choices: list[LiveChoice]) -> None:
        num_tokens = request.num_tokens
        if self._live and self._is_full(len(choices), num_tokens):
            raise RequestError(
                429, "The engine's queue is full; try again later.", type="rate_limit_error", code="queue_full",
                retry_after_s=1,
            )  # fmt: skip
        self._num_prompt_tokens += num_tokens
        request.num_live = len(choices)
        for choice in choices:
            self._take_key(choice)
            choice.job.opened(choice.index, partial(self._abort, choice))
        if self._epoch is not None:
            self._generate(request, choices)

    def _is_full(self, num_choices: int, num_tokens: int) -> bool:
        """Whether no core could take in more: one that is away, or stopped, must not fill this process's memory."""
        is_away = self._epoch is None
        wanted = len(self._live) + num_choices, self._num_prompt_tokens + num_tokens
        most = (
            queued + (0 if is_away else running)
            for queued, running in zip(self._max_queued, self._max_running, strict=True)
        )
        return any(number > limit for number, limit in zip(wanted, most, strict=True))

    def tick(self) -> None:
        """Once a second: keep the lease, ask for the status, and lose patience with a core that stays away."""
        if self._epoch is not None:
            self._send(Ping())
        elif self._live and time.monotonic() - self._away_since_s > self._patience_s:
            self.fail_all(
                RequestError(
                    503, "The engine is not available.", type="server_error", code="engine_unavailable", retry_after_s=5
                )
            )

    async def set_asleep(self, asleep: bool) -> None:
        """Say so until the core says that it is done: one that dies meanwhile has a successor that has not heard.

        Not before it is asked: what is known here may be of before another frontend said otherwise.
        """
        while True:
            status = await self.asked(Sleep() if asleep else Wake())
            if status and status.asleep == asleep and (asleep or status.ready):
                return

    async def asked(self, question: Ping | Sleep | Wake) -> Status | None:
        """What the core tells next; None while it is away, or says nothing for a while."""
        self._told_status.clear()
        if self._epoch is not None:
            self._send(question)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told_status.wait(), PING_INTERVAL_S)
            return self.status
        return None

    def fail_all(self, error: RequestError) -> None:
        if self._live and self._epoch is not None:
            self._send(Abort(ints(self._live)))
        for choice in list(self._live.values()):
            self._end(choice).error = error
        self._deliver()

    def on_arrivals(self, arrivals: list[Arrival]) -> None:
        """Take in all that came, then deliver it: where several steps came at once, each choice gets one update."""
        for arrival in arrivals:
            self._on_arrival(arrival)
        self._deliver()

    def _deliver(self) -> None:
        due, self._due = self._due, []
        for choice in due:
            update, choice.fresh = choice.fresh, None
            if update is not None:  # else its reader aborted it a moment ago
                choice.job.deliver(update)

    def _update(self, choice: LiveChoice) -> Update:
        """The update that is filled for a choice in this turn."""
        update = choice.fresh
        if update is None:
            update = choice.fresh = Update(choice.index, [])
            self._due.append(choice)
        return update

    def _on_arrival(self, arrival: Arrival) -> None:
        match arrival.message:
            case Tokens() as tokens:
                if tokens.epoch == self._epoch:
                    self._on_tokens(tokens)
            case Status() as status:
                if status.epoch == self._epoch:
                    self.status, self.status_at_s = status, time.monotonic()
                    self._told_status.set()
            case Failed() as failed:
                self._on_failed(failed)
            case IfLost(key=key, standing=standing):
                if (choice := self._live.get(key)) is not None:
                    choice.if_lost = standing, len(choice.output)
            case Welcome(version=version, epoch=epoch):
                if version != PROTOCOL_VERSION:
                    raise EngineLost(f"engine {self._engine} speaks protocol {version}, this is {PROTOCOL_VERSION}")
                self._on_welcome(epoch)
            case PeerUp():
                self._send(Hello(PROTOCOL_VERSION, "frontend", self._rank, os.getpid(), self._engine))
            case PeerDown():
                if self._epoch is not None:
                    self._log.warning("engine_away", engine=self._engine, num_live=len(self._live))
                    self._epoch, self.status = None, None
                    self._away_since_s = self.status_at_s = time.monotonic()
            case Refused(reason) | Undecodable(reason):
                raise EngineLost(f"engine {self._engine}: {reason}")

    def _on_welcome(self, epoch: int) -> None:
        self._log.info("engine_welcome", engine=self._engine, epoch=epoch, num_resumed=len(self._live))
        if self._last_epoch not in (None, epoch):
            for choice in self._live.values():
                if choice.request.was_sent:
                    choice.outlives_core()
        self._epoch = self._last_epoch = epoch
        self._resume(self._live.values())
        self._send(Ping())

    def _on_tokens(self, tokens: Tokens) -> None:
        position, due = 0, self._due
        token_ids = unpack_ints(tokens.token_ids).tolist()
        columns = (unpack_ints(column).tolist() for column in (tokens.keys, tokens.first_index, tokens.num_tokens))
        for key, first_index, num in zip(*columns, strict=True):
            choice = self._live.get(key)  # None: aborted while these tokens were under way
            if choice is not None:
                expected = len(choice.output)
                if first_index == expected:
                    new_ids = token_ids[position : position + num]
                    choice.output.fromlist(new_ids)
                    if choice.fresh is None:
                        choice.fresh = Update(choice.index, new_ids)
                        due.append(choice)
                    else:
                        choice.fresh.token_ids += new_ids
                elif first_index > expected:
                    self._log.error("tokens_missing", engine=self._engine, expected=expected, first_index=first_index)
                    self._resume([choice])
            position += num
        for logprobs in tokens.logprobs:
            self._on_logprobs(logprobs)
        for finish in tokens.finished:
            self._on_finish(finish)

    def _on_logprobs(self, logprobs: Logprobs) -> None:
        choice = self._live.get(logprobs.key)
        if choice is None:
            return
        # A core that takes a request up again says what the one before said already: only the rest is new.
        if logprobs.prompt:
            new = unknown_part(logprobs, 1 + choice.request.num_prompt_logprobs)
            if new is not None:
                choice.request.num_prompt_logprobs += new.num
                update = self._update(choice)
                update.prompt_logprobs = [*update.prompt_logprobs, new]
        elif (new := unknown_part(logprobs, choice.num_logprobs)) is not None:
            choice.num_logprobs += new.num
            update = self._update(choice)
            update.logprobs = [*update.logprobs, new]

    def _on_finish(self, finish: Finish) -> None:
        choice = self._live.get(finish.key)
        if choice is not None:
            self._end(choice).finish = finish

    def _on_failed(self, failed: Failed) -> None:
        choice = self._live.get(failed.key)
        if choice is not None:
            is_full = failed.status == 429
            kind = "invalid_request_error" if failed.status < 429 else "rate_limit_error" if is_full else "server_error"
            self._end(choice).error = RequestError(
                failed.status, failed.text, type=kind, code=failed.code, retry_after_s=1 if is_full else None
            )

    def _end(self, choice: LiveChoice) -> Update:
        """Forget a choice that has ended; returns its last update."""
        self._forget(choice)
        return self._update(choice)

    def _abort(self, choice: LiveChoice) -> None:
        choice.fresh = None
        if choice.key in self._live:
            self._forget(choice)
            if self._epoch is not None:
                self._send(Abort(ints([choice.key])))

    def _forget(self, choice: LiveChoice) -> None:
        del self._live[choice.key]
        choice.request.num_live -= 1
        if not choice.request.num_live:
            self._num_prompt_tokens -= choice.request.num_tokens

    def _resume(self, choices: Iterable[LiveChoice]) -> None:
        """Submit again with what was delivered, under new keys, so that nothing meant for the old ones can be taken."""
        by_request: dict[LiveRequest, list[LiveChoice]] = {}
        for choice in choices:
            by_request.setdefault(choice.request, []).append(choice)
        for request, members in by_request.items():
            if request.was_sent:
                self._send(Abort(ints(choice.key for choice in members)))
            for choice in members:
                del self._live[choice.key]
                self._take_key(choice)
            self._generate(request, members)

    def _generate(self, request: LiveRequest, choices: list[LiveChoice]) -> None:
        self._send(
            Generate(
                request_id=request.request_id,
                prompt=request.prompt,
                choices=[choice.told() for choice in choices],
                sampling=request.sampling,
                priority=request.priority,
                cache_salt=request.cache_salt,
                resumed=request.was_sent,
                source=request.source,
            )
        )
        request.was_sent = True

    def _take_key(self, choice: LiveChoice) -> None:
        key = next(self._keys) & _KEY_MASK
        while key in self._live:
            key = next(self._keys) & _KEY_MASK
        choice.key = key
        self._live[key] = choice

    def _send(self, message: Any) -> None:
        assert self._endpoint is not None, "not started"
        self._endpoint.send(message)
