"""The offline workloads: token ids in, token counts out; greedy, end-of-sequence ignored, the same for every engine.

The lists are those that other engines were timed on, drawn from Python's own generator in the same order, so that
figures compare. Repeats shift every token id, so that no run is served from an earlier run's prefix cache.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

DEFAULT_VOCAB = 100_000
_LOWEST_ID = 10  # ids below are special tokens in most vocabularies
_SHIFT = 7919  # a prime: repeats share no prefix


class BenchRequest(NamedTuple):
    prompt: list[int]
    output_len: int


def _uniform(
    seed: int, count: int, prompt_len: tuple[int, int], output_len: tuple[int, int]
) -> Callable[[int], list[BenchRequest]]:
    def draw(vocab: int) -> list[BenchRequest]:
        rng = random.Random(seed)
        requests = []
        for _ in range(count):
            length = rng.randint(*prompt_len)
            prompt = [rng.randint(_LOWEST_ID, vocab - _LOWEST_ID) for _ in range(length)]
            requests.append(BenchRequest(prompt, rng.randint(*output_len)))
        return requests

    return draw


def _shared_prefix(vocab: int) -> list[BenchRequest]:
    (head,) = _uniform(5, 1, (2048, 2048), (1, 1))(vocab)
    tails = _uniform(6, 256, (128, 128), (32, 32))(vocab)
    return [BenchRequest(head.prompt + tail.prompt, tail.output_len) for tail in tails]


WORKLOADS: dict[str, tuple[str, Callable[[int], list[BenchRequest]]]] = {
    "decode1": ("one request, 128 in, 256 out: latency of a lone user", _uniform(1, 1, (128, 128), (256, 256))),
    "mixed256": ("256 requests, 100-1024 in, 100-1024 out", _uniform(0, 256, (100, 1024), (100, 1024))),
    "batch256": ("256 requests, 1024 in, 256 out: serving-like", _uniform(2, 256, (1024, 1024), (256, 256))),
    "prefill": ("64 requests, 4096 in, 1 out: prompt processing", _uniform(3, 64, (4096, 4096), (1, 1))),
    "long": ("4 requests, 32000 in, 64 out: long context", _uniform(4, 4, (32000, 32000), (64, 64))),
    "prefix": ("256 requests that share 2048 tokens, 128 of their own, 32 out", _shared_prefix),
    "decode16": ("16 requests, 128 in, 128 out: a small server", _uniform(7, 16, (128, 128), (128, 128))),
    "prompt512": (
        "8 requests, 512 in, 1 out: prompt processing on a small machine",
        _uniform(8, 8, (512, 512), (1, 1)),
    ),
}
"""name -> (what it shows, requests for a vocabulary)"""


def workload(name: str, vocab: int = DEFAULT_VOCAB, repeat: int = 0) -> list[BenchRequest]:
    """Requests of workload `name` with ids below `vocab`; each `repeat` has fresh tokens of the same lengths."""
    requests = WORKLOADS[name][1](min(vocab, DEFAULT_VOCAB))
    if not repeat:
        return requests
    span = min(vocab, DEFAULT_VOCAB) * 9 // 10
    return [BenchRequest([(t + _SHIFT * repeat) % span + _LOWEST_ID for t in r.prompt], r.output_len) for r in requests]
