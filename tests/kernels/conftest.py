"""One thread, as other tests want the other core; the device; and a mended interpreter."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels import laws


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=laws.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


if laws.INTERPRETED:
    from tests.kernels import interpreter

    @pytest.fixture(scope="session", autouse=True)
    def mended() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            interpreter.mend(patch)
            yield
