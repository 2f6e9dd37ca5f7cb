"""From a request's fields to the engine's `Sampling` and to how its text is cut."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cableway.frontend.api.schema import SamplingFields
from cableway.frontend.errors import RequestError
from cableway.frontend.served import ServedModel
from cableway.frontend.text import TextOptions
from cableway.frontend.words import leave_nothing, ways_to_say
from cableway.ipc.messages import Ints, Sampling, ints

_LEAST_TOP_P = 1e-6
"""What a `top_p` of 0 means: the likeliest token alone."""


def check_tokens(token_ids: Iterable[int], model: ServedModel, param: str) -> None:
    """400 when a token id is not in the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                400,
                f"Token id {token_id} is not in the vocabulary of {model.vocab_size} tokens.",
                param=param,
                code="invalid_value",
            )


def room(
    num_prompt_tokens: int, max_tokens: int | None, model: ServedModel, *, max_tokens_param: str, prompt_param: str
) -> int:
    """How many tokens a prompt of this length may be given: what was asked for, or else all that fit.

    Where an encoder takes the prompt, that may be as long as what the decoder says, whatever the length of either.

    Raises:
        RequestError: 400 `context_length_exceeded` when the prompt, or the prompt and `max_tokens`, do not fit.
    """
    if model.decoder_prompt and num_prompt_tokens <= model.max_model_len:
        num_prompt_tokens = len(model.decoder_prompt)
    left = model.max_model_len - num_prompt_tokens
    if left < 1:
        raise RequestError(
            400,
            f"This model's maximum context length is {model.max_model_len} tokens, and the prompt has "
            f"{num_prompt_tokens}: there is no room for an answer. Shorten the prompt.",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if max_tokens is None:
        default: int = model.defaults.get("max_new_tokens", left)
        return min(left, default)
    if max_tokens > left:
        raise RequestError(
            400,
            f"This model's maximum context length is {model.max_model_len} tokens. However, you asked for "
            f"{num_prompt_tokens + max_tokens}: {num_prompt_tokens} in the prompt and {max_tokens} in the completion.",
            param=max_tokens_param,
            code="context_length_exceeded",
        )
    return max_tokens


def sampling_of(
    body: SamplingFields, model: ServedModel, *, max_tokens: int, logprobs: int, prompt_logprobs: int
) -> Sampling:
    """The engine's parameters: the request's own fields, then the model's defaults, then OpenAI's."""
    check_tokens(body.logit_bias or (), model, "logit_bias")
    check_tokens(body.stop_token_ids or (), model, "stop_token_ids")
    check_tokens(body.allowed_token_ids or (), model, "allowed_token_ids")
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            400, f"`min_tokens` ({min_tokens}) is above `max_tokens` ({max_tokens}).", param="min_tokens"
        )

    def chosen(name: str, default: Any) -> Any:
        value = getattr(body, name)
        return model.defaults.get(name, default) if value is None else value

    sampling = Sampling(
        seed=secrets.randbits(63) if body.seed is None else body.seed & (2**63 - 1),
        temperature=chosen("temperature", 1.0),
        top_p=max(chosen("top_p", 1.0), _LEAST_TOP_P),
        top_k=max(chosen("top_k", 0), 0),
        min_p=chosen("min_p", 0.0),
        max_tokens=max(max_tokens, 1),
        min_tokens=min_tokens,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        logit_bias=body.logit_bias or {},
        eos_token_ids=b"" if body.ignore_eos else ints(model.eos_token_ids),
        stop_token_ids=ints(dict.fromkeys(body.stop_token_ids or ())),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        bad_words=bad_words(body.bad_words or (), model),
        allowed_token_ids=ints(dict.fromkeys(body.allowed_token_ids or ())),
    )
    if leave_nothing(sampling):
        raise RequestError(
            400,
            "No token is left to begin with: each of `allowed_token_ids` is one of `bad_words`, or would end the text "
            "before `min_tokens`.",
            param="allowed_token_ids",
            code="invalid_value",
        )
    return sampling


def bad_words(words: Sequence[str], model: ServedModel) -> list[Ints]:
    """Token sequences that may not be said; 400 for a word that is none, or too long."""
    try:
        return [ints(way) for way in ways_to_say(words, model.tokenizer)]
    except ValueError as error:
        raise RequestError(400, f"`bad_words`: {error}.", param="bad_words", code="invalid_value") from None


def text_options(body: SamplingFields, *, logprobs: bool, discard: bool = False) -> TextOptions:
    """How the choices' text is cut; 400 for a stop string that is empty."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if isinstance(body.stop, str) and not body.stop:
        stops = []  # some clients send "" where they mean none
    if not all(stops):
        raise RequestError(400, "A stop string must not be empty.", param="stop", code="invalid_value")
    return TextOptions(
        stops=stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        discard=discard,
    )


def check_logprobs(value: int | None, limit: int, param: str) -> int:
    """A number of log-probabilities within the server's limit; -1 for none."""
    if value is None:
        return -1
    if value > limit:
        raise RequestError(400, f"`{param}` is at most {limit}.", param=param, code="invalid_value")
    return value


def common_checks(body: SamplingFields, max_logprobs: int, model: ServedModel) -> int:
    """Fields that depend on each other; returns the number of prompt log-probabilities, -1 for none."""
    if body.prompt_logprobs is not None and model.decoder_prompt:
        raise RequestError(
            400, "An encoder takes the prompt of this model: it has no log-probabilities.", param="prompt_logprobs",
            code="unsupported_parameter",
        )  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "`stream_options` needs `stream`.", param="stream_options", code="invalid_value")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError(400, "`prompt_logprobs` cannot be streamed.", param="prompt_logprobs", code="invalid_value")
    return check_logprobs(body.prompt_logprobs, max_logprobs, "prompt_logprobs")


def wants_usage(body: SamplingFields) -> bool:
    """Whether a stream ends with its token counts."""
    return bool(body.stream_options is not None and body.stream_options.include_usage)


def wants_usage_throughout(body: SamplingFields) -> bool:
    """Whether each of its chunks has the token counts so far, too."""
    return wants_usage(body) and bool(body.stream_options and body.stream_options.continuous_usage_stats)


def for_prompt(sampling: Sampling, body: SamplingFields, max_tokens: int) -> Sampling:
    """The same for another prompt of the request: its own length, and its own seed when the client gave none."""
    seed = secrets.randbits(63) if body.seed is None else sampling.seed
    return msgspec.structs.replace(sampling, seed=seed, max_tokens=max(max_tokens, 1))
