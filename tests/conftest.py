"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest

from tests.server import Server, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server of the demo model with default options, for every test that only asks it things."""
    with serve() as running:
        yield running
