"""What the endpoints that generate text have in common: a request's choices under way, and how they are sent."""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from cableway.frontend import sse
from cableway.frontend.api.schema import SamplingFields
from cableway.frontend.errors import RequestError
from cableway.frontend.job import Job, Update
from cableway.frontend.keys import ENGINE, FACTS, METRICS, MODELS, REQUEST_ID
from cableway.frontend.metrics import TalliedHistogram
from cableway.frontend.served import ServedModel
from cableway.frontend.text import ChoiceText, Delta, TextOptions, TokenLogprob, token_logprobs
from cableway.ipc.messages import Sampling

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""
_FEW_LOGPROBS = 256
"""Tokens; the log-probabilities of more are put into words in a thread, which takes up to 40 µs a token."""

TokenName = Callable[[int], str]
"""What a token goes by in log-probabilities."""


def find_model(request: web.Request, name: str) -> ServedModel:
    """The model a client asks for; 404 when it is not served here."""
    model = request.app[MODELS].get(name)
    if model is None:
        raise RequestError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")
    return model


class Generation:
    """The choices of one client's request, from submission to the last token; a context, which aborts what is left.

    Args:
        prefix: of the id that the client sees.
        n: choices a prompt.
    """

    def __init__(self, request: web.Request, model: ServedModel, body: SamplingFields, *, prefix: str):
        self.id = f"{prefix}-{secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = model
        self.n = body.n or 1
        self.prompts: list[list[int]] = []
        self.prompt_logprobs: list[list[TokenLogprob]] = []
        self._request = request
        self._body = body
        self._metrics = request.app[METRICS].of(model.name)
        self.job = Job()
        self._choices: list[ChoiceText] = []
        self._num_cached: dict[int, int] = {}
        self._open: set[int] = set()
        self._began_s = time.perf_counter()
        self._has_failed = False

    def submit(self, prompt_ids: list[int], sampling: Sampling, options: TextOptions) -> None:
        """Add a prompt, whose choices are numbered on from those of the prompts before it."""
        first = len(self._choices)
        indices = range(first, first + self.n)
        self.prompts.append(prompt_ids)
        self.prompt_logprobs.append([])
        decoder_prompt = self.model.decoder_prompt
        begun = list(decoder_prompt) or prompt_ids
        self._choices.extend(ChoiceText(i, self.model.tokenizer, begun, options) for i in indices)
        self._open.update(indices)
        self._request.app[ENGINE].submit(
            begun,
            sampling,
            n=self.n,
            priority=self._body.priority or 0,
            cache_salt=self._body.cache_salt or "",
            request_id=self._request[REQUEST_ID],
            first_index=first,
            model=self.model.name,
            job=self.job,
            source_ids=prompt_ids if decoder_prompt else (),
        )

    async def next_deltas(self) -> list[Delta]:
        """What is new, as soon as anything is; not to be called when `job.has_ended`. RequestError when one fails."""
        return [delta for update in await anext(self.job) if (delta := self.delta(update)) is not None]

    def usage(self) -> dict[str, Any]:
        """Token counts of all prompts and choices, in OpenAI's form."""
        num_prompt = sum(map(len, self.prompts))
        num_made = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_made,
            "total_tokens": num_prompt + num_made,
            # The engine tells at a choice's end; one that was cut off by a stop string never had its say.
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())}
            if len(self._num_cached) == len(self.prompts)
            else None,
        }

    def envelope(self, kind: str) -> dict[str, Any]:
        """The fields that a response and each of its chunks begin with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.job.abort()
        for _index in self._open:
            self._metrics.finished("error" if isinstance(error, Exception) or self._has_failed else "abort")
        usage = self.usage()
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.prompt_len.observe(usage["prompt_tokens"])
        self._metrics.generation_len.observe(usage["completion_tokens"])
        self._metrics.generation_tokens.inc(usage["completion_tokens"])
        self._metrics.e2e_latency_s.observe(time.perf_counter() - self._began_s)
        self._request[FACTS] |= {
            "id": self.id,
            "model": self.model.name,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }

    def failed(self) -> None:
        """The stream ends with an error that was told within it."""
        self._has_failed = True

    def plain_text(self, index: int, around_text: tuple[bytes, bytes]) -> "PlainText":
        """From now on, until it ends, what choice `index` is fed becomes chunks of text and nothing else."""
        return PlainText(self._choices[index], self._metrics.inter_token_latency_s, around_text)

    def delta(self, update: Update) -> Delta | None:
        """What an update makes; None when that is nothing. RequestError when it is the choice's failure."""
        if update.error is not None:
            raise update.error
        index = update.index
        for packed in update.prompt_logprobs:
            self.prompt_logprobs[index // self.n].extend(token_logprobs(packed))
        if not update.token_ids and update.finish is None:
            return None
        choice = self._choices[index]
        self._clock(choice, len(update.token_ids))
        delta = choice.feed(update)
        if update.finish is not None:
            self._metrics.queue_s.observe(update.finish.queue_s)
            if index % self.n == 0:
                self._num_cached[index] = update.finish.num_cached_tokens
        if delta.finish_reason is not None:
            self.job.abort(index)  # it ended by a stop string; where the engine ended it this does nothing
            self._open.discard(index)
            self._metrics.finished(delta.finish_reason)
        return delta

    def _clock(self, choice: ChoiceText, num_tokens: int) -> None:
        now_s = time.perf_counter()
        facts = self._request[FACTS]
        if choice.fed_s and num_tokens:
            self._metrics.inter_token_latency_s.observe_many((now_s - choice.fed_s) / num_tokens, num_tokens)
        elif "first_token_s" not in facts:
            facts["first_token_s"] = round(now_s - self._began_s, 6)
            self._metrics.time_to_first_token_s.observe(now_s - self._began_s)
        choice.fed_s = now_s


class PlainText:
    """A choice that goes on as text and nothing else.

    PERF: nearly every token of every stream comes here; what is touched for it is kept few.
    """

    __slots__ = ("_after", "_before", "_choice", "_gaps_s")

    def __init__(self, choice: ChoiceText, gaps_s: TalliedHistogram, around_text: tuple[bytes, bytes]):
        self._choice = choice
        self._gaps_s = gaps_s
        self._before, self._after = around_text

    def chunk(self, token_ids: list[int]) -> bytes:
        """The chunk that tokens make; empty when they end within a character."""
        choice, now_s, num_tokens = self._choice, time.perf_counter(), len(token_ids)
        self._gaps_s.observe_many((now_s - choice.fed_s) / num_tokens, num_tokens)
        choice.fed_s = now_s
        choice.num_tokens += num_tokens
        text = choice.detokenizer.feed(token_ids)
        return b"%b%b%b" % (self._before, sse.encode(text), self._after) if text else b""


class Whole:
    """All that came of one choice, for an answer in one piece."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[tuple[int, TokenLogprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


async def collect(generation: Generation) -> list[Whole]:
    """Every choice, complete, in order."""
    wholes = [Whole() for _ in range(generation.n * len(generation.prompts))]
    while not generation.job.has_ended:
        for delta in await generation.next_deltas():
            wholes[delta.index].add(delta)
    return wholes


async def json_answer(generation: Generation, wholes: list[Whole], make: Callable[[], dict[str, Any]]) -> web.Response:
    """What `make` makes of the choices as a response, without holding up the loop for many log-probabilities."""
    num_of_prompts = generation.n * sum(map(len, generation.prompt_logprobs))
    if num_of_prompts + sum(len(whole.logprobs) for whole in wholes) <= _FEW_LOGPROBS:
        return json_response(make())
    return await asyncio.to_thread(lambda: json_response(make()))


def json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=sse.encode(body), content_type="application/json")


def token_name(body: SamplingFields, model: ServedModel) -> TokenName:
    """How a request wants tokens named: as text, or as `token_id:5`, which no two tokens have in common."""
    return "token_id:{}".format if body.return_tokens_as_token_ids else model.tokenizer.token_text


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can say."""
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


def prompt_logprobs_json(
    prompt_ids: list[int], entries: list[TokenLogprob], model: ServedModel
) -> list[dict[str, Any] | None]:
    """vLLM's form: null for the first token, then a map of token ids for each; the prompt's own token comes first."""

    def one(token_id: int, logprob: float | None, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": model.tokenizer.token_text(token_id)}

    shown: list[dict[str, Any] | None] = [None]
    for entry in entries:
        tokens = {str(entry.token_id): one(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top, 1):
            tokens.setdefault(str(token_id), one(token_id, logprob, rank))
        shown.append(tokens)
    return shown[: len(prompt_ids)]
