"""The requests of a chaos run: every way to draw and cut tokens, and what an answer must repeat to the letter."""

import random
from dataclasses import dataclass, field
from typing import Any

MODEL = "smollm2-135m"
_WORDS = ("river", "stone", "engine", "cable", "winter", "lantern", "harbour", "market", "orchard", "valley", "copper")


@dataclass(frozen=True)
class Ask:
    """One request, and where it goes."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Answer:
    """What a client has of one request, streamed or not, in one form; two answers to the same request are equal."""

    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)

    def add(self, payload: dict[str, Any]) -> None:
        """Take in a whole response, or one chunk of a stream."""
        for part in payload.get("choices", ()):
            into = self.choices.setdefault(
                part["index"], {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None, "stop_reason": None}
            )
            said = part.get("message") or part.get("delta") or part
            into["text"] += said.get("text") or said.get("content") or ""
            into["token_ids"] += part.get("token_ids") or []
            into["logprobs"] += _logprobs(part.get("logprobs"))
            for name in ("finish_reason", "stop_reason"):
                if part.get(name) is not None:
                    assert into[name] is None, "a choice ended twice"
                    into[name] = part[name]
            if part.get("prompt_logprobs"):
                into["prompt_logprobs"] = part["prompt_logprobs"]
        if payload.get("prompt_logprobs"):
            self.choices[0]["prompt_logprobs"] = payload["prompt_logprobs"]
        if payload.get("usage"):
            counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # how many were cached depends on the load
            self.usage = {name: payload["usage"][name] for name in counts}

    @property
    def num_tokens(self) -> int:
        return sum(len(choice["token_ids"]) for choice in self.choices.values())


def _logprobs(given: dict[str, Any] | None) -> list[Any]:
    """Chat's form is a list of tokens, that of completions a list a field."""
    if not given:
        return []
    if "content" in given:
        return list(given["content"])
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return [list(entry) for entry in zip(*(given[name] for name in names), strict=True)]


def asks(seed: int, num: int, num_tokens: int) -> list[Ask]:
    """`num` different requests of about `num_tokens` tokens each, kinds in turn."""
    rng = random.Random(seed)
    return [_KINDS[number % len(_KINDS)](rng, number, num_tokens) for number in range(num)]


def _completion(kind: str, rng: random.Random, number: int, num_tokens: int, num_words: int = 12, **more: Any) -> Ask:
    prompt = f"Story {number}. " + " ".join(rng.choice(_WORDS) for _ in range(num_words))
    return Ask(f"{kind}-{number}", "/v1/completions", _body(num_tokens, prompt=prompt, **more))


def _chat(kind: str, rng: random.Random, number: int, num_tokens: int, **more: Any) -> Ask:
    question = f"Tell me about the {rng.choice(_WORDS)} and the {rng.choice(_WORDS)}, part {number}."
    messages = [{"role": "user", "content": question}]
    return Ask(f"{kind}-{number}", "/v1/chat/completions", _body(num_tokens, messages=messages, **more))


def _body(num_tokens: int, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": num_tokens, "return_token_ids": True, "ignore_eos": True} | more
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body


def _greedy(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _completion("greedy", rng, number, num_tokens, temperature=0, stream=True)


def _seeded(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _chat("seeded", rng, number, num_tokens, temperature=1.0, top_p=0.95, seed=number, stream=True)


def _several(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _completion("several", rng, number, num_tokens // 2, n=3, temperature=0.9, seed=number, stream=True)


def _stopped(rng: random.Random, number: int, num_tokens: int) -> Ask:
    stop = ["town", " river ", "\n\n\n", "xyzzy"]
    return _chat("stopped", rng, number, num_tokens, temperature=0.8, seed=number, stop=stop, stream=True)


def _scored(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _chat("scored", rng, number, num_tokens, temperature=0, logprobs=True, top_logprobs=3, stream=True)


def _scored_prompt(rng: random.Random, number: int, num_tokens: int) -> Ask:
    more = {"logprobs": 2, "prompt_logprobs": 1, "temperature": 0.7, "seed": number}
    return _completion("scored-prompt", rng, number, num_tokens // 2, num_words=40, **more)


def _penalised(rng: random.Random, number: int, num_tokens: int) -> Ask:
    penalties = {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.15, "min_tokens": 8}
    more = penalties | {"temperature": 0.9, "seed": number, "logit_bias": {"260": -2.0}, "ignore_eos": False}
    return _completion("penalised", rng, number, num_tokens, stream=True, **more)


def _long_prompt(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _completion("long-prompt", rng, number, num_tokens, num_words=150, temperature=0, stream=True)


def _whole(rng: random.Random, number: int, num_tokens: int) -> Ask:
    return _chat("whole", rng, number, num_tokens, temperature=0.9, seed=number, top_k=40)


_KINDS = [_greedy, _seeded, _several, _stopped, _scored, _greedy, _penalised, _long_prompt, _whole, _seeded]
_KINDS += [_scored_prompt, _greedy]
