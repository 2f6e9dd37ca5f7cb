"""`SamplingParams`: how offline requests are continued, under the names that vLLM's users know."""

import functools
import math
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from cableway.frontend.text import TextOptions
from cableway.ipc.messages import Sampling, ints

_MAX_SEED = 2**63 - 1
_RANGES = {
    "n": (1, 2**16),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (-_MAX_SEED - 1, 2 * _MAX_SEED + 1),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 1e6),
    "logprobs": (0, 2**31 - 1),
    "prompt_logprobs": (0, 2**31 - 1),
}


def fitting(value: Any, kind: Any, name: str) -> Any:
    """`value` as a type's plain form, also from a range, a set, or numbers of NumPy; ValueError when it does not fit.

    What is wrong here would be no message to the engine, which answers those alone.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(value, enc_hook=_plain), kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else list(value)


@functools.cache
def _kinds(params: "type[SamplingParams]") -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(params)}


class SamplingParams(msgspec.Struct, kw_only=True):
    """How a prompt is continued. ValueError when a value cannot be; TypeError for an unknown name.

    `temperature` 0 is greedy; `top_k` 0 and -1 switch it off; `max_tokens` None allows all that fit; `seed` None draws
    one. `logprobs` k gives each token's log-probability and those of the k likeliest; `prompt_logprobs` the same for
    the prompt. `stop` strings need `detokenize`, without which results have token ids only. The last token of a word
    of `bad_words` is not drawn after the others of it; only `allowed_token_ids` are drawn, where there are any.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """ValueError when a value cannot be: at the beginning, and when one may have been set since."""
        for name, kind in _kinds(type(self)).items():
            setattr(self, name, fitting(getattr(self, name), kind, name))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # a NaN is in no range
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if not all(self.stops):
            raise ValueError("a stop string must not be empty")
        if self.stops and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        if not all(math.isfinite(bias) for bias in (self.logit_bias or {}).values()):
            raise ValueError("logit_bias must be finite")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty")

    @property
    def stops(self) -> list[str]:
        """The stop strings, however they were given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def token_ids(self) -> list[int]:
        """Every token id that is named, to be checked against a vocabulary."""
        return [*(self.stop_token_ids or ()), *(self.logit_bias or ()), *(self.allowed_token_ids or ())]

    def sampling(
        self, num_left: int, eos_token_ids: Sequence[int], bad_words: Sequence[Sequence[int]] = ()
    ) -> Sampling:
        """The engine's parameters for a prompt that leaves room for `num_left` tokens; `bad_words` as token ids."""
        return Sampling(
            seed=secrets.randbits(63) if self.seed is None else self.seed & _MAX_SEED,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            max_tokens=num_left if self.max_tokens is None else min(self.max_tokens, num_left),
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias or {}),
            eos_token_ids=b"" if self.ignore_eos else ints(eos_token_ids),
            stop_token_ids=ints(dict.fromkeys(self.stop_token_ids or ())),
            logprobs=-1 if self.logprobs is None else self.logprobs,
            prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
            bad_words=[ints(word) for word in bad_words],
            allowed_token_ids=ints(dict.fromkeys(self.allowed_token_ids or ())),
        )

    def text_options(self) -> TextOptions:
        """How the text is cut."""
        return TextOptions(
            stops=self.stops,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            min_tokens=self.min_tokens,
        )

    @classmethod
    def with_defaults(cls, defaults: dict[str, Any]) -> "SamplingParams":
        """What the model's authors would have; `defaults` as of `served.sampling_defaults`."""
        renamed = {"max_tokens" if name == "max_new_tokens" else name: value for name, value in defaults.items()}
        return cls(**renamed)
