"""What every endpoint's schema shares: reading a body, naming the field at fault, refusing what is not served yet."""

import asyncio
import re
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from cableway.frontend.errors import RequestError
from cableway.frontend.keys import CONFIG
from cableway.frontend.words import MAX_WORD_CHARS, MAX_WORDS

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIASES = 4096
MAX_CHOICES = 128
"""Of one prompt: the range of `n`."""

Body = TypeVar("Body")

_FAULT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptFields(msgspec.Struct, kw_only=True):
    """How a text or messages become token ids; a text has no use for those that speak of templates."""

    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None  # not taken from clients: a template is a program


class SamplingFields(PromptFields, kw_only=True):
    """Fields that /v1/chat/completions and /v1/completions have in common; null means the same as absent."""

    model: str
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIASES)] | None
    ) = None
    stop: (
        Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
        | Annotated[list[Annotated[str, Meta(max_length=MAX_STOP_CHARS)]], Meta(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    bad_words: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=MAX_WORD_CHARS)]], Meta(max_length=MAX_WORDS)]
        | None
    ) = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    user: str | None = None

    # Known to OpenAI's or vLLM's clients and not served yet: see `refuse_unserved`.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    logits_processors: Any = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None


UNSERVED: dict[str, list[Any]] = {
    "response_format": [{"type": "text"}],
    "structured_outputs": [],
    "guided_json": [],
    "guided_regex": [],
    "guided_choice": [],
    "guided_grammar": [],
    "logits_processors": [],
    "use_beam_search": [],
    "truncate_prompt_tokens": [],
}
"""Fields of `SamplingFields` that are not served yet -> the values that ask for nothing special."""


def refuse_unserved(body: msgspec.Struct, unserved: dict[str, list[Any]]) -> None:
    """400 for a field that would have to change the answer and cannot yet: silence would be a wrong answer."""
    for name, harmless in unserved.items():
        value = getattr(body, name)
        if value and value not in harmless:
            raise RequestError(400, f"`{name}` is not supported yet.", param=name, code="unsupported_parameter")


async def read_json(request: web.Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """The request's body as a struct; RequestError 400 that names the field at fault, 408 or 413 otherwise."""
    config = request.app[CONFIG]
    if (request.content_length or 0) > config.max_body_bytes:
        raise too_large(config.max_body_bytes)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError(415, "A body must not be compressed.", code="unsupported_content_encoding")
    try:
        async with asyncio.timeout(config.header_timeout_s):
            raw = await request.read()
    except TimeoutError:
        raise RequestError(408, "The request's body did not arrive in time.", code="request_timeout") from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large(config.max_body_bytes) from None
    try:
        # Decoded as a whole first: msgspec does not look into fields that a schema does not have.
        return decoder.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise RequestError(400, f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_utf8") from None
    except RecursionError:
        raise RequestError(400, "The body is nested too deeply.", code="invalid_json") from None
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except msgspec.DecodeError as error:
        raise RequestError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None


def too_large(max_body_bytes: int) -> RequestError:
    return RequestError(413, f"The body is larger than {max_body_bytes} bytes.", code="request_too_large")


def _misfit(text: str) -> RequestError:
    """msgspec's "Expected `float` <= 2.0 - at `$.temperature`" as an error with its `param`."""
    fault = _FAULT.match(text)
    assert fault is not None, text
    what, path = fault["what"], fault["path"] or ""
    if missing := _MISSING.search(what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(400, f"`{path}` is required.", param=path, code="missing_required_parameter")
    if not path:
        return RequestError(400, f"The body does not fit: {what}.", code="invalid_value")
    return RequestError(400, f"Invalid value for `{path}`: {what}.", param=path, code="invalid_value")
