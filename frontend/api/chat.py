"""POST /v1/chat/completions."""

from collections.abc import Sequence
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
from cableway.frontend.api.messages import Messages, chat_prompt
from cableway.frontend.api.sampling import (
    check_logprobs,
    common_checks,
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
from cableway.frontend.sse import ChunkTemplate
from cableway.frontend.text import Delta, TextOptions, TokenLogprob

routes = web.RouteTableDef()


class ChatRequest(SamplingFields, kw_only=True):
    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    reasoning_effort: str | None = None

    # Known to OpenAI's or vLLM's clients and not served yet.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    store: Any = None
    echo: Any = None
    best_of: Any = None
    documents: Any = None


_UNSERVED = UNSERVED | {
    "tools": [],
    "tool_choice": ["none", "auto"],
    "functions": [],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
    "verbosity": ["medium"],
    "store": [],
    "echo": [],
    "best_of": [1],
    "documents": [],
}
_decoder = msgspec.json.Decoder(ChatRequest)


@routes.post("/v1/chat/completions")
async def chat_completions(request: web.Request) -> web.StreamResponse:
    body = await read_json(request, _decoder)
    model = find_model(request, body.model)
    refuse_unserved(body, _UNSERVED)
    prompt_logprobs = common_checks(body, request.app[CONFIG].max_logprobs, model)
    logprobs = _num_logprobs(body, request.app[CONFIG].max_logprobs)
    options = text_options(body, logprobs=logprobs >= 0)
    variables = {"reasoning_effort": body.reasoning_effort} if body.reasoning_effort is not None else {}
    prompt_ids = await chat_prompt(body.messages, body, model, variables)
    max_tokens = _max_tokens(body, len(prompt_ids), model)
    sampling = sampling_of(body, model, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    with Generation(request, model, body, prefix="chatcmpl") as generation:
        generation.submit(prompt_ids, sampling, options)
        if body.stream:
            return await stream(request, generation, _Chunks(generation, body, options))
        wholes = await collect(generation)
        return await json_answer(generation, wholes, lambda: _response(generation, wholes, body))


def _num_logprobs(body: ChatRequest, limit: int) -> int:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(400, "`top_logprobs` needs `logprobs`.", param="top_logprobs", code="invalid_value")
    return check_logprobs(body.top_logprobs or 0, limit, "top_logprobs") if body.logprobs else -1


def _max_tokens(body: ChatRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    if body.max_tokens == 0:
        raise RequestError(400, "`max_tokens` must be at least 1.", param="max_tokens", code="invalid_value")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return room(num_prompt_tokens, asked, model, max_tokens_param=param, prompt_param="messages")


class _Chunks:
    """The chunks of one streamed chat."""

    def __init__(self, generation: Generation, body: ChatRequest, options: TextOptions):
        self._generation = generation
        self._has_usage = wants_usage(body)
        self._has_usage_throughout = wants_usage_throughout(body)
        self._has_logprobs = bool(body.logprobs)
        self._has_token_ids = bool(body.return_token_ids)
        self._is_plain = not (self._has_logprobs or self._has_token_ids or self._has_usage_throughout)
        self._token_name = token_name(body, generation.model)
        self.is_text_only = self._is_plain and options.is_plain
        self._begun: set[int] = set()
        self.template = ChunkTemplate(
            generation.envelope("chat.completion.chunk"),
            before_text=b'"delta":{"content":',
            after_text=b"}",
            has_usage=self._has_usage,
        )

    def of(self, delta: Delta) -> bytes:
        """The chunks that a delta makes: role first, text, finish reason last; none when there is nothing to say."""
        index = delta.index
        if self._is_plain and delta.finish_reason is None and index in self._begun:
            return self.template.text(index, delta.text) if delta.text else b""
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._first(index))
        if delta.text or delta.logprobs or (self._has_token_ids and delta.token_ids):
            chunks.append(self._text(delta))
        if delta.finish_reason is not None:
            chunks.append(self._fields(index, {}, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason))
        return b"".join(chunks)

    def ending(self) -> bytes:
        return self.template.usage(self._generation.usage()) if self._has_usage else b""

    def _first(self, index: int) -> bytes:
        of_chunk = {"prompt_token_ids": self._generation.prompts[0]} if self._has_token_ids else {}
        return self._fields(index, {"role": "assistant", "content": ""}, of_chunk)

    def _text(self, delta: Delta) -> bytes:
        if self._is_plain:
            return self.template.text(delta.index, delta.text)
        more: dict[str, Any] = {}
        if self._has_token_ids:
            more["token_ids"] = delta.token_ids
        if self._has_logprobs:
            more["logprobs"] = _logprobs_json(delta.logprobs, self._generation.model, self._token_name)
        return self._fields(delta.index, {"content": delta.text}, **more)

    def _fields(self, index: int, delta: dict[str, Any], of_chunk: dict[str, Any] | None = None, **more: Any) -> bytes:
        fields = {"delta": delta, "logprobs": None, "finish_reason": None, **more}
        if self._has_usage_throughout:
            of_chunk = {**(of_chunk or {}), "usage": self._generation.usage()}
        return self.template.fields(index, fields, of_chunk)


def _response(generation: Generation, wholes: list[Whole], body: ChatRequest) -> dict[str, Any]:
    model = generation.model
    name = token_name(body, model)
    choices = []
    for index, whole in enumerate(wholes):
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": _logprobs_json(whole.logprobs, model, name) if body.logprobs else None,
            "finish_reason": whole.finish_reason,
            "stop_reason": whole.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = whole.token_ids
        choices.append(choice)
    answer = generation.envelope("chat.completion") | {"choices": choices, "usage": generation.usage()}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs_json(generation.prompts[0], generation.prompt_logprobs[0], model)
    if body.return_token_ids:
        answer["prompt_token_ids"] = generation.prompts[0]
    return answer


def _logprobs_json(entries: Sequence[tuple[int, TokenLogprob]], model: ServedModel, name: TokenName) -> dict[str, Any]:
    """OpenAI's chat form: a list of tokens, each with those likeliest in its place."""

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = list(model.tokenizer.token_bytes(token_id))
        return {"token": name(token_id), "logprob": finite(logprob), "bytes": spelled}

    content = [
        one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*candidate) for candidate in entry.top]}
        for _, entry in entries
    ]
    return {"content": content, "refusal": None}
