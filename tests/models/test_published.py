"""Published sizes, without weights: as many numbers as the model is said to have, and a name for each place.

Tiny checkpoints cannot show what only large ones have, such as a first layer that is dense or a pattern of many layers.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from cableway.ipc import modelfiles
from cableway.workers import models, weights
from tests.models.published import ABOUT, EXACTLY


def general(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", path)


@pytest.mark.parametrize("model", EXACTLY | ABOUT)
def test_sizes_and_names(model: str, tmp_path: Path) -> None:
    name, num_expected, fields = (EXACTLY | ABOUT)[model]
    config = {**fields, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = modelfiles.locate(str(tmp_path), "dummy")
    weights.outline(files, dtype=torch.bfloat16, max_model_len=1024, load_format="dummy")
    decoder = models.find(config).build(config)
    slots = {path: slot for path, slot in decoder.slots() if path not in decoder.tied}
    num = sum(
        torch.Size((axis.size, *dims)).numel()
        for slot in slots.values()
        for axis in slot.parts.values()
        for leaf, dims in slot.leaves.items()
        if leaf not in slot.optional
    )
    assert num == (num_expected if model in EXACTLY else pytest.approx(num_expected, rel=4e-3))
    named = {general(target.path) for target in models.find(config).names("folder", config).targets.values()}
    parts = {(path, part) for path, slot in slots.items() if slot.leaves.keys() - slot.optional for part in slot.parts}
    assert not {(p, part) for p, part in parts if not named & {general(p), general(f"{p}.{part}".rstrip("."))}}
