"""One tiny Llama for all tests of the worker, and transformers' view of it.

Machines with a GPU may not have transformers: it is imported for those tests that ask for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cableway.bench.driver import Driver
from cableway.ipc.config import WorkerConfig
from cableway.workers.batch import Decoder
from tests.workers import running

if TYPE_CHECKING:
    import transformers


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import checkpoints

    return checkpoints.tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> transformers.PreTrainedModel:
    from tests import checkpoints

    torch.set_num_threads(1)
    return checkpoints.oracle("llama")


@pytest.fixture(scope="session")
def config(checkpoint: Path) -> WorkerConfig:
    return running.worker_config(checkpoint)


@pytest.fixture(scope="session")
def decoder(config: WorkerConfig) -> Decoder:
    return running.load(config)


@pytest.fixture
def driver(decoder: Decoder, config: WorkerConfig) -> Driver:
    """A runner with empty rows."""
    return running.drive(decoder, config)
