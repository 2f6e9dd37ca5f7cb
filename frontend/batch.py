"""Many prompts through one engine, from a program without an event loop of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec
import uvloop

from cableway.frontend.client import EngineClient
from cableway.frontend.job import Job, Update
from cableway.frontend.outputs import CompletionOutput, RequestOutput, logprobs_at, prompt_logprobs
from cableway.frontend.params import SamplingParams
from cableway.frontend.text import ChoiceText, TokenLogprob, token_logprobs
from cableway.frontend.tokens import Tokenizer
from cableway.ipc.messages import Logprobs, Sampling

_FEW_CHOICES = 8
_PACE_S = 0.01
"""How long the mailbox fills when many choices run: nobody watches their tokens, and one look costs the same."""

T = TypeVar("T")


class EventLoop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin `work` on the loop; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BatchRequest(msgspec.Struct):
    """A prompt to continue, checked."""

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    sampling: Sampling
    decoder_prompt: list[int] = []
    """What the decoder begins with, where the model has an encoder."""

    @property
    def begun(self) -> list[int]:
        """What is continued."""
        return self.decoder_prompt or self.prompt_ids


class _Choice:
    """One continuation on its way to a `CompletionOutput`."""

    def __init__(self, request: "_Running", index: int, tokenizer: Tokenizer | None):
        params = request.of.params
        self.request = request
        self.output = CompletionOutput(index)
        self._tokenizer = tokenizer
        self._wants_logprobs = params.logprobs is not None
        self._logprobs: list[TokenLogprob] = []
        self._text: ChoiceText | None = None
        if tokenizer is not None and params.detokenize:
            self._text = ChoiceText(index, tokenizer, request.of.begun, params.text_options())

    def take(self, update: Update) -> bool:
        """Take in what came; True when the choice has ended. Raises the error that ended it, if one did."""
        if update.error is not None:
            raise update.error
        output = self.output
        if self._text is not None:
            delta = self._text.feed(update)
            output.text += delta.text
            output.token_ids += delta.token_ids
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        else:
            output.token_ids += update.token_ids
            if update.finish is not None:
                output.finish_reason, output.stop_reason = update.finish.reason, update.finish.stop_token
        self._logprobs += _unpack(update.logprobs)
        self.request.prompt_logprobs += _unpack(update.prompt_logprobs)
        if update.finish is not None:
            self.request.num_cached_tokens = update.finish.num_cached_tokens
        if output.finish_reason is None:
            return False
        if self._wants_logprobs:
            entries = self._logprobs[: len(output.token_ids)]
            output.logprobs = [logprobs_at(entry, self._tokenizer) for entry in entries]
            output.cumulative_logprob = sum(entry.logprob or 0.0 for entry in entries)
        return True


class _Running:
    """A request whose choices have not all ended."""

    def __init__(self, request: BatchRequest, tokenizer: Tokenizer | None):
        self.of = request
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.choices = [_Choice(self, index, tokenizer) for index in range(request.params.n)]
        self.num_open = len(self.choices)

    def result(self, tokenizer: Tokenizer | None) -> RequestOutput:
        of = self.of
        wants_prompt = of.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=of.request_id,
            prompt=of.prompt,
            prompt_token_ids=of.prompt_ids,
            outputs=[choice.output for choice in self.choices],
            prompt_logprobs=prompt_logprobs(self.prompt_logprobs, tokenizer) if wants_prompt else None,
            finished=True,
            num_cached_tokens=self.num_cached_tokens,
        )


async def run(
    client: EngineClient,
    requests: Sequence[BatchRequest],
    tokenizer: Tokenizer | None,
    max_live: int,
    on_result: Callable[[RequestOutput], None],
) -> None:
    """Put all requests through the engine, `max_live` choices or one request at a time; results as they end.

    Raises:
        RequestError: one of them was ended by an error; the others are aborted.
    """
    job = Job()
    live: dict[int, _Choice] = {}
    waiting = _submissions(client, requests, tokenizer, job, live)
    try:
        while len(live) < max_live and next(waiting, False):
            pass
        async for updates in job:
            for update in updates:
                choice = live.get(update.index)
                if choice is None or not choice.take(update):
                    continue
                del live[update.index]
                job.abort(update.index)  # a stop string ended it; the engine does not know of those
                choice.request.num_open -= 1
                if not choice.request.num_open:
                    on_result(choice.request.result(tokenizer))
            while len(live) < max_live and next(waiting, False):
                pass
            if len(live) > _FEW_CHOICES:
                await asyncio.sleep(_PACE_S)
    finally:
        job.abort()


def _submissions(
    client: EngineClient,
    requests: Iterable[BatchRequest],
    tokenizer: Tokenizer | None,
    job: Job,
    live: dict[int, _Choice],
) -> Iterator[bool]:
    """Submit one request each time it is asked for the next."""
    num_choices = 0
    for request in requests:
        running = _Running(request, tokenizer)
        live |= dict(enumerate(running.choices, num_choices))
        client.submit(
            request.begun,
            request.sampling,
            n=request.params.n,
            request_id=request.request_id,
            first_index=num_choices,
            job=job,
            source_ids=request.prompt_ids if request.decoder_prompt else (),
        )
        num_choices += len(running.choices)
        yield True


def _unpack(messages: Iterable[Logprobs]) -> list[TokenLogprob]:
    return [entry for packed in messages for entry in token_logprobs(packed)]
