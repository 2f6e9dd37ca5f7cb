"""One offline engine a session of the demo model, in float32 and with one thread: other tests want the other core."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cableway import LLM


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM("smollm2-135m", dtype="float32", num_threads=1, max_num_seqs=32, max_model_len=1024) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, dtype="float32", num_threads=1, max_num_seqs=4) as llm:
        yield llm
