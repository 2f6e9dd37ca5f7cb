"""Fixtures for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import Server, serve

# Threads of OpenMP that wait for each other spin. Beside other jobs of `make test` that is most of what they do: what
# takes 10 s with threads that sleep took 82 s, 38 of them of a CPU. Read when torch is loaded, here and in servers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 300 tokens, with a tokenizer: for what does not depend on the model, which starts sooner."""
    from tests import checkpoints  # and with it transformers, for those who ask

    return checkpoints.tiny(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server of the demo model with default options, for every test that only asks it things."""
    with serve() as running:
        yield running
