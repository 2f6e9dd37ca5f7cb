"""POST /v1/completions: the legacy form, with prompts as texts or token ids."""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from cableway.frontend.api.generation import (
    Generation,
    TokenName,
    Whole,
    collect,
    find_model,
    finite,
    json_answer,
    prompt_logprobs_json,
    token_name,
)
from cableway.frontend.api.messages import in_thread_if_long
from cableway.frontend.api.sampling import (
    check_logprobs,
    check_tokens,
    common_checks,
    for_prompt,
    room,
    sampling_of,
    text_options,
    wants_usage,
    wants_usage_throughout,
)
from cableway.frontend.api.schema import UNSERVED, SamplingFields, read_json, refuse_unserved
from cableway.frontend.api.streaming import stream
from cableway.frontend.errors import RequestError
from cableway.frontend.keys import CONFIG
from cableway.frontend.served import ServedModel
from cableway.frontend.sse import ChunkTemplate, encode
from cableway.frontend.text import Delta, TextOptions, TokenLogprob
from cableway.frontend.tokens import Detokenizer

routes = web.RouteTableDef()

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
MAX_PROMPT_LOGPROBS = 1 << 23
"""Of all prompts together, each as often as it has choices, and of all tokens told of in each place: a frontend holds
the answer, of 16 to 60 bytes each, in memory."""


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    best_of: Annotated[int, Meta(ge=0, le=20)] | None = None

    # Known to OpenAI's or vLLM's clients and not served yet.
    suffix: Any = None
    prompt_embeds: Any = None


_UNSERVED = UNSERVED | {"suffix": [], "prompt_embeds": []}
_decoder = msgspec.json.Decoder(CompletionRequest)


class _Prompt(msgspec.Struct):
    text: str | None  # as the client sent it, when it sent text
    token_ids: list[int]


@routes.post("/v1/completions")
async def completions(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _decoder)
    model = find_model(request, body.model)
    refuse_unserved(body, _UNSERVED)
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise RequestError(
            400, "`best_of` above `n` is not supported yet.", param="best_of", code="unsupported_parameter"
        )
    limit = request.app[CONFIG].max_logprobs
    prompt_logprobs = common_checks(body, limit, model)
    logprobs = check_logprobs(body.logprobs, limit, "logprobs")
    if body.echo and model.decoder_prompt:
        raise RequestError(
            400, "An encoder takes the prompt of this model: there is nothing that goes on from it.", param="echo",
            code="unsupported_parameter",
        )  # fmt: skip
    if body.echo:
        prompt_logprobs = max(prompt_logprobs, logprobs)
    prompts = await _prompts(body, model)
    if len(prompts) * (body.n or 1) > request.app[CONFIG].max_queued_requests:
        raise RequestError(
            400,
            f"{len(prompts)} prompts with `n` {body.n or 1} are more than the queue holds "
            f"({request.app[CONFIG].max_queued_requests}).",
            param="prompt",
            code="invalid_value",
        )
    limits = [_max_tokens(body, len(prompt.token_ids), model) for prompt in prompts]
    _check_prompt_logprobs(body, prompts, prompt_logprobs)
    sampling = sampling_of(body, model, max_tokens=min(limits), logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    options = text_options(body, logprobs=logprobs >= 0, discard=body.max_tokens == 0)
    with Generation(request, model, body, prefix="cmpl") as generation:
        for prompt, max_tokens in zip(prompts, limits, strict=True):
            generation.submit(prompt.token_ids, for_prompt(sampling, body, max_tokens), options)
        form = _Form(generation, body, prompts, options)
        if body.stream:
            return await stream(request, generation, form)
        wholes = await collect(generation)
        return await json_answer(generation, wholes, lambda: form.response(wholes))


def _max_tokens(body: CompletionRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    most = room(num_prompt_tokens, body.max_tokens, model, max_tokens_param="max_tokens", prompt_param="prompt")
    return min(most, DEFAULT_MAX_TOKENS) if body.max_tokens is None else most


async def _prompts(body: CompletionRequest, model: ServedModel) -> list[_Prompt]:
    """The prompts in any of the four forms they may have; 400 for another, or an empty one."""
    adds_special_tokens = body.add_special_tokens is not False

    def prompt_of(given: str | list[int]) -> _Prompt:
        if isinstance(given, str):
            return _Prompt(given, model.tokenizer.encode(given, adds_special_tokens))
        check_tokens(given, model, "prompt")
        return _Prompt(None, given)

    several = _several(body.prompt)
    prompts = await in_thread_if_long(sum(map(len, several)), lambda: [prompt_of(given) for given in several])
    if not all(prompt.token_ids for prompt in prompts):
        raise RequestError(400, "A prompt must not be empty.", param="prompt", code="invalid_value")
    return prompts


def _several(prompt: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    for kind in (str, int, list):
        if all(isinstance(item, kind) for item in prompt):
            several: Any = [prompt] if kind is int else prompt
            if not 1 <= len(several) <= MAX_PROMPTS or not prompt:
                break
            return several  # type: ignore[no-any-return]
    raise RequestError(
        400,
        f"`prompt` is a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either.",
        param="prompt",
        code="invalid_value",
    )


def _check_prompt_logprobs(body: CompletionRequest, prompts: list[_Prompt], prompt_logprobs: int) -> None:
    num = (1 + prompt_logprobs) * (body.n or 1) * sum(len(prompt.token_ids) for prompt in prompts)
    if num > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            400,
            f"The prompts' log-probabilities would be {num} numbers, and at most {MAX_PROMPT_LOGPROBS} are told: ask "
            f"for fewer in a place, of fewer prompts, or with a smaller `n`.",
            param="logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
            code="invalid_value",
        )


class _Echo(msgspec.Struct):
    """A prompt as its choices begin with it."""

    text: str
    logprobs: dict[str, list[Any]] | None


class _Form:
    """What a completion looks like, streamed or whole."""

    def __init__(self, generation: Generation, body: CompletionRequest, prompts: list[_Prompt], options: TextOptions):
        self._generation = generation
        self._model = generation.model
        self._body = body
        self._prompts = prompts
        self._has_usage = wants_usage(body)
        self._has_usage_throughout = wants_usage_throughout(body)
        self._is_plain = body.logprobs is None and not body.return_token_ids and not self._has_usage_throughout
        self._skips_special_tokens = options.skip_special_tokens
        self._token_name = token_name(body, generation.model)
        self._echoes: dict[int, _Echo] = {}
        self.is_text_only = self._is_plain and options.is_plain
        self._begun: set[int] = set()
        self.template = ChunkTemplate(
            generation.envelope("text_completion"), before_text=b'"text":', after_text=b"", has_usage=self._has_usage
        )

    def of(self, delta: Delta) -> bytes:
        """The chunk that a delta makes; empty when there is nothing to say."""
        index = delta.index
        if self._is_plain and delta.finish_reason is None and (index in self._begun or not self._body.echo):
            return self.template.text(index, delta.text) if delta.text else b""
        is_first = index not in self._begun
        self._begun.add(index)
        if not (
            (self._body.echo and is_first)
            or delta.text
            or delta.logprobs
            or delta.finish_reason
            or self._body.return_token_ids
        ):
            return b""
        whole = Whole()
        whole.add(delta)
        of_chunk = {"usage": self._generation.usage()} if self._has_usage_throughout else None
        return self.template.fields(index, self._fields(index, whole, is_first=is_first), of_chunk)

    def ending(self) -> bytes:
        return self.template.usage(self._generation.usage()) if self._has_usage else b""

    def response(self, wholes: list[Whole]) -> dict[str, Any]:
        # Encoded one by one: the whole is perhaps large, and an encoder lets no other thread run.
        choices = [
            msgspec.Raw(encode({"index": index, **self._fields(index, whole, is_first=True)}))
            for index, whole in enumerate(wholes)
        ]
        return self._generation.envelope("text_completion") | {"choices": choices, "usage": self._generation.usage()}

    def _fields(self, index: int, whole: Whole, *, is_first: bool) -> dict[str, Any]:
        number = index // self._generation.n
        echo = self._echo(number) if self._body.echo else None
        fields: dict[str, Any] = {
            "text": echo.text + whole.text if echo and is_first else whole.text,
            "logprobs": None,
            "finish_reason": whole.finish_reason,
        }
        if whole.finish_reason is not None:
            fields["stop_reason"] = whole.stop_reason
        if self._body.logprobs is not None:
            offset = len(echo.text) if echo else 0
            logprobs = self._logprobs([(offset + own, entry) for own, entry in whole.logprobs])
            if echo and echo.logprobs and is_first:
                logprobs = {name: echo.logprobs[name] + own for name, own in logprobs.items()}
            fields["logprobs"] = logprobs
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_json(
                self._prompts[number].token_ids, self._generation.prompt_logprobs[number], self._model
            )
        if self._body.return_token_ids:
            fields["token_ids"] = whole.token_ids
            fields["prompt_token_ids"] = self._prompts[number].token_ids if is_first else None
        return fields

    def _echo(self, number: int) -> _Echo:
        """A prompt's text and log-probabilities, made once for all of its choices."""
        echo = self._echoes.get(number)
        if echo is None:
            prompt = self._prompts[number]
            text = prompt.text
            if text is None:
                text = self._model.tokenizer.decode(prompt.token_ids, self._skips_special_tokens)
            wants_logprobs = self._body.logprobs is not None
            logprobs = self._logprobs(self._prompt_entries(number, text)) if wants_logprobs else None
            echo = self._echoes[number] = _Echo(text, logprobs)
        return echo

    def _prompt_entries(self, number: int, text: str) -> list[tuple[int, TokenLogprob]]:
        """The prompt's own tokens, each with the offset in `text` where it begins; the first has no log-probability."""
        prompt = self._prompts[number]
        entries = [TokenLogprob(prompt.token_ids[0], None, 0, []), *self._generation.prompt_logprobs[number]]
        # A client's text may hold special tokens, and more may have been put around it, such as `<s>`.
        detokenizer = Detokenizer(
            self._model.tokenizer, skip_special_tokens=prompt.text is None and self._skips_special_tokens
        )
        pieces = [detokenizer.feed([entry.token_id]) for entry in entries]
        spelled = "".join(pieces)
        position = spelled.find(text)
        if position < 0:  # a space more after a special token, or half a character at the end
            position = max(len(spelled) - len(text), 0)
        offset = -position
        placed = []
        for entry, piece in zip(entries, pieces, strict=True):
            placed.append((min(max(offset, 0), len(text)), entry))
            offset += len(piece)
        return placed

    def _logprobs(self, entries: list[tuple[int, TokenLogprob]]) -> dict[str, list[Any]]:
        return _logprobs_json(entries, self._body.logprobs or 0, self._token_name)


def _logprobs_json(entries: list[tuple[int, TokenLogprob]], num_top: int, name: TokenName) -> dict[str, list[Any]]:
    """OpenAI's legacy form: parallel lists."""
    top_logprobs: list[dict[str, float] | None] = []
    for _, entry in entries:
        if entry.logprob is None:
            top_logprobs.append(None)
            continue
        top = {name(token_id): finite(logprob) for token_id, logprob in entry.top[:num_top]}
        top_logprobs.append({name(entry.token_id): finite(entry.logprob)} | top)
    return {
        "tokens": [name(entry.token_id) for _, entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for _, entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [offset for offset, _ in entries],
    }
