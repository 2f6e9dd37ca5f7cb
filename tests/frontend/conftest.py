"""One frontend process for many tests."""

from collections.abc import Iterator

import openai
import pytest

from tests.frontend.running import Frontend, start_frontend


@pytest.fixture(scope="session")
def shared_frontend() -> Iterator[Frontend]:
    with start_frontend() as frontend:
        yield frontend


@pytest.fixture
def frontend(shared_frontend: Frontend) -> Iterator[Frontend]:
    """A frontend that other tests used before; its core is as new. It must be alive at the end."""
    core = shared_frontend.core
    core.generates, core.aborted = [], {}
    settings = (
        "script",
        "step_s",
        "tokens_a_step",
        "refuses",
        "fails",
        "loses_logprobs",
        "is_ready",
        "is_silent",
        "step_age_s",
    )
    before = {name: getattr(core, name) for name in settings}
    yield shared_frontend
    for name, value in before.items():
        setattr(core, name, value)
    assert shared_frontend.process.poll() is None, shared_frontend.log


@pytest.fixture
def client(frontend: Frontend) -> Iterator[openai.OpenAI]:
    with frontend.client() as client:
        yield client
