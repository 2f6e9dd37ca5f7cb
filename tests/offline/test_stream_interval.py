"""Tokens that come together are those that come alone, whatever is asked of them, and whatever dies meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cableway import LLM, SamplingParams
from tests.offline.test_lifecycle import processes

ASKED: list[dict[str, Any]] = [
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"temperature": 0, "logprobs": 3, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.8, "seed": 5, "min_tokens": 30, "stop": ["a", "e"]},
    {"temperature": 0, "prompt_logprobs": 2, "bad_words": ["th"], "logit_bias": {7: 2.0}},
]


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, num_threads=1, max_num_seqs=4, batch_invariant=True, stream_interval_s=0) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, num_threads=1, max_num_seqs=4, batch_invariant=True, stream_interval_s=0.03) as llm:
        yield llm


@pytest.mark.parametrize("asked", ASKED, ids=[next(reversed(asked)) for asked in ASKED])
def test_the_same_results(alone: LLM, together: LLM, asked: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=90, **asked)
    for prompts in ([[5, 6, 7]], [[5, 6, 7], [8, 9, 10, 11]]):
        expected, results = (llm.generate(prompts, params, use_tqdm=False) for llm in (alone, together))
        for one, other in zip(expected, results, strict=True):
            assert one.prompt_logprobs == other.prompt_logprobs
            assert one.outputs == other.outputs


@pytest.mark.parametrize("victim", ["workers", "enginecore"])
def test_what_was_not_told_is_computed_again(alone: LLM, together: LLM, victim: str) -> None:
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=240, ignore_eos=True)
    (expected,) = alone.generate([[5, 6, 7]], params, use_tqdm=False)
    results = []
    thread = threading.Thread(target=lambda: results.extend(together.generate([[5, 6, 7]], params, use_tqdm=False)))
    killed = processes(together.config.core.runtime_dir)[victim]
    thread.start()
    time.sleep(0.1)
    os.kill(killed, signal.SIGKILL)
    thread.join(60)
    assert results[0].outputs == expected.outputs
    assert processes(together.config.core.runtime_dir)[victim] != killed
