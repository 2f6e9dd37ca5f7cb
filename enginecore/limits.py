"""What the core takes in, and with which words it declines the rest."""

from typing import NamedTuple

from cableway.enginecore.waiting import WaitingQueue
from cableway.ipc.messages import Generate

_MAX_KEY = 2**31 - 1


class Limits(NamedTuple):
    """Of one scheduler; from the configuration."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_queued_requests: int
    max_queued_tokens: int
    prefix_cache: bool = True
    by_priority: bool = False
    plans_runs: bool = False  # whether workers may go on by themselves for some steps


class Refusal(NamedTuple):
    """Fields of a `Failed`."""

    status: int
    code: str
    text: str


SHUTTING_DOWN = Refusal(503, "service_unavailable", "the server is shutting down")


def refusal(generate: Generate, limits: Limits, queue: WaitingQueue, max_len: int) -> Refusal | None:
    """Why this request is not queued; None when it is. A request bigger than the limits passes when nobody waits."""
    sampling = generate.sampling
    packed = [generate.prompt, generate.source, sampling.eos_token_ids, sampling.stop_token_ids]
    packed += [sampling.allowed_token_ids, *sampling.bad_words]
    if any(len(ints) % 4 for ints in packed + [choice.output for choice in generate.choices]):
        return Refusal(400, "invalid_request", "token ids are not packed int32 values")
    if any(not 0 <= choice.key <= _MAX_KEY for choice in generate.choices):
        return Refusal(400, "invalid_request", "a choice's key is no positive int32")
    num_prompt = len(generate.prompt) // 4
    if not num_prompt:
        return Refusal(400, "empty_prompt", "the prompt has no tokens")
    num_source = len(generate.source) // 4
    if too_long := length_refusal(num_prompt, sampling.max_tokens, max_len, num_source):
        return too_long
    if num_source >= limits.max_num_batched_tokens:  # it is encoded in one step, beside the sequence's first token
        most = limits.max_num_batched_tokens - 1
        text = f"the prompt has {num_source} tokens, and at most {most} are encoded in one step"
        return Refusal(400, "context_length_exceeded", text)
    if generate.resumed or not queue.num_requests:
        return None
    num_choices = len(generate.choices)
    if queue.num_requests + num_choices > limits.max_queued_requests:
        return _try_later(f"{queue.num_requests} requests")
    if queue.num_tokens + num_choices * (num_prompt + num_source) > limits.max_queued_tokens:
        return _try_later(f"{queue.num_tokens} tokens")
    return None


def length_refusal(num_prompt: int, max_tokens: int, max_len: int, num_source: int = 0) -> Refusal | None:
    """A prompt has to leave room for one token, when one is asked for; a source may be as long as a sequence."""
    if num_source > max_len:
        text = f"the prompt has {num_source} tokens, and {max_len} are the most that can be encoded"
        return Refusal(400, "context_length_exceeded", text)
    if num_prompt + min(max_tokens, 1) <= max_len:
        return None
    text = f"the prompt has {num_prompt} tokens, and a sequence may have {max_len} with what is generated"
    return Refusal(400, "context_length_exceeded", text)


def _try_later(waiting: str) -> Refusal:
    return Refusal(429, "rate_limit_exceeded", f"{waiting} are waiting already; try again later")
