"""Weights leave their memory and come back to other memory, and nobody who holds a tensor notices."""

from pathlib import Path

import torch

from cableway.workers.batch import Decoder
from cableway.workers.parking import Parking
from tests.workers.running import drive, generate_alone, prompt_of, worker_config


def test_a_model_is_the_same_afterwards(checkpoint: Path):
    from tests.workers.running import load

    config = worker_config(checkpoint)
    decoder: Decoder = load(config)
    expected = generate_alone(drive(decoder, config), prompt_of(9), 12)
    parking, weight = Parking(decoder), decoder.embed._table
    storage, before = weight.untyped_storage(), weight.clone()
    for _ in range(2):
        parking.park()
        assert storage.nbytes() == 0
        others = [torch.zeros_like(before) for _ in range(3)]  # what is given back is used by others
        parking.fetch()
        assert torch.equal(weight, before)
        assert generate_alone(drive(decoder, config), prompt_of(9), 12) == expected
        del others
    assert sum(copy.numel() for copy in parking._copies) >= 4 * before.numel()
