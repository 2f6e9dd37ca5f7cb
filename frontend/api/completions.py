"""POST /v1/completions: the legacy form, with prompts as texts or token ids."""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from cableway.frontend.api.generation import (
    Generation,
    Whole,
    collect,
    find_model,
    finite,
    json_response,
    prompt_logprobs_json,
)
from cableway.frontend.api.messages import text_prompt
from cableway.frontend.api.sampling import (
    check_logprobs,
    check_tokens,
    common_checks,
    for_prompt,
    room,
    sampling_of,
    text_options,
    wants_usage,
)
from cableway.frontend.api.schema import UNSERVED, SamplingFields, read_json, refuse_unserved
from cableway.frontend.api.streaming import stream
from cableway.frontend.errors import RequestError
from cableway.frontend.keys import CONFIG
from cableway.frontend.served import ServedModel
from cableway.frontend.sse import ChunkTemplate
from cableway.frontend.text import Delta, TextOptions, TokenLogprob
from cableway.frontend.tokens import Detokenizer

routes = web.RouteTableDef()

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024


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
    sampling = sampling_of(body, model, max_tokens=min(limits), logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    options = text_options(body, logprobs=logprobs >= 0, discard=body.max_tokens == 0)
    with Generation(request, model, body, prefix="cmpl") as generation:
        for prompt, max_tokens in zip(prompts, limits, strict=True):
            generation.submit(prompt.token_ids, for_prompt(sampling, body, max_tokens), options)
        form = _Form(generation, body, prompts, options)
        if body.stream:
            return await stream(request, generation, form)
        return json_response(form.response(await collect(generation)))


def _max_tokens(body: CompletionRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    most = room(num_prompt_tokens, body.max_tokens, model, max_tokens_param="max_tokens", prompt_param="prompt")
    return min(most, DEFAULT_MAX_TOKENS) if body.max_tokens is None else most


async def _prompts(body: CompletionRequest, model: ServedModel) -> list[_Prompt]:
    """The prompts in any of the four forms they may have; 400 for another, or an empty one."""
    adds_special_tokens = body.add_special_tokens is not False
    prompts = []
    for given in _several(body.prompt):
        if isinstance(given, str):
            token_ids = await text_prompt(given, model, add_special_tokens=adds_special_tokens)
            prompts.append(_Prompt(given, token_ids))
        else:
            check_tokens(given, model, "prompt")
            prompts.append(_Prompt(None, given))
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


class _Form:
    """What a completion looks like, streamed or whole."""

    def __init__(self, generation: Generation, body: CompletionRequest, prompts: list[_Prompt], options: TextOptions):
        self._generation = generation
        self._model = generation.model
        self._body = body
        self._prompts = prompts
        self._has_usage = wants_usage(body)
        self._is_plain = body.logprobs is None and not body.return_token_ids
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
        echo = bool(self._body.echo) and index not in self._begun
        self._begun.add(index)
        if not (echo or delta.text or delta.logprobs or delta.finish_reason or self._body.return_token_ids):
            return b""
        whole = Whole()
        whole.add(delta)
        return self.template.fields(index, self._fields(index, whole, echo=echo))

    def ending(self) -> bytes:
        return self.template.usage(self._generation.usage()) if self._has_usage else b""

    def response(self, wholes: list[Whole]) -> dict[str, Any]:
        choices = [
            {"index": index, **self._fields(index, whole, echo=bool(self._body.echo))}
            for index, whole in enumerate(wholes)
        ]
        return self._generation.envelope("text_completion") | {"choices": choices, "usage": self._generation.usage()}

    def _fields(self, index: int, whole: Whole, *, echo: bool) -> dict[str, Any]:
        number = index // self._generation.n
        echoed = self._echoed(number) if self._body.echo else ""
        entries = [(len(echoed) + offset, entry) for offset, entry in whole.logprobs]
        fields: dict[str, Any] = {
            "text": echoed + whole.text if echo else whole.text,
            "logprobs": None,
            "finish_reason": whole.finish_reason,
        }
        if whole.finish_reason is not None:
            fields["stop_reason"] = whole.stop_reason
        if self._body.logprobs is not None:
            shown = self._prompt_entries(number) + entries if echo else entries
            fields["logprobs"] = _logprobs_json(shown, self._body.logprobs, self._model)
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_json(
                self._prompts[number].token_ids, self._generation.prompt_logprobs[number], self._model
            )
        if self._body.return_token_ids:
            fields["token_ids"] = whole.token_ids
            fields["prompt_token_ids"] = self._prompts[number].token_ids if not self._body.stream else None
        return fields

    def _echoed(self, number: int) -> str:
        prompt = self._prompts[number]
        if prompt.text is None:
            prompt.text = self._model.tokenizer.decode(prompt.token_ids)
        return prompt.text

    def _prompt_entries(self, number: int) -> list[tuple[int, TokenLogprob]]:
        """The prompt's own tokens, each with the offset where it begins; the first has no log-probability."""
        token_ids = self._prompts[number].token_ids
        detokenizer = Detokenizer(self._model.tokenizer)
        entries = [TokenLogprob(token_ids[0], None, 0, []), *self._generation.prompt_logprobs[number]]
        offset = 0
        placed = []
        for entry in entries:
            placed.append((offset, entry))
            offset += len(detokenizer.feed([entry.token_id]))
        return placed


def _logprobs_json(entries: list[tuple[int, TokenLogprob]], num_top: int, model: ServedModel) -> dict[str, Any]:
    """OpenAI's legacy form: parallel lists."""
    token_text = model.tokenizer.token_text
    top_logprobs: list[dict[str, float] | None] = []
    for _, entry in entries:
        if entry.logprob is None:
            top_logprobs.append(None)
            continue
        top = {token_text(token_id): finite(logprob) for token_id, logprob in entry.top[:num_top]}
        top_logprobs.append({token_text(entry.token_id): finite(entry.logprob)} | top)
    return {
        "tokens": [token_text(entry.token_id) for _, entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for _, entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [offset for offset, _ in entries],
    }
