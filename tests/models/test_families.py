"""Every registered family against transformers: same logits, whole or in chunks; each number of a config counts."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.workers import models
from tests.checkpoints import FAMILIES, oracle, save
from tests.models.harness import Session, load, logits_of, prompt

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama one layer, one kv head, odd sizes": (
        "llama",
        {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 257, "intermediate_size": 37},
    ),
    "llama no groups, other eps": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 0.05, "head_dim": 80}),
    "mistral window below the prompt": ("mistral", {"sliding_window": 11}),
    "mistral window above the prompt": ("mistral", {"sliding_window": 200}),
    "mistral no window": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2 tied, some layers windowed": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 biases, windows by layer": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def expected(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def checkpoint(folder: Path, variant: str, **save_options: Any) -> tuple[Path, Any]:
    family, overrides = VARIANTS[variant]
    model = oracle(family, **overrides)
    return save(model, folder, **save_options), model


def test_every_registered_architecture_is_tested() -> None:
    tested = {FAMILIES[family][1].__name__ for family, _ in VARIANTS.values()}
    assert tested == {architecture.name for architecture in models.architectures()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    folder, model = checkpoint(tmp_path, variant)
    ids = prompt(vocab_size=model.config.vocab_size)
    torch.testing.assert_close(logits_of(load(folder), ids), expected(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["llama tied", "llama 3.1 rope", "llama linear rope", "mistral no window", "qwen2"])
def test_configs_of_older_checkpoints_mean_the_same(tmp_path: Path, variant: str) -> None:
    folder, model = checkpoint(tmp_path, variant, old_spelling=True)
    assert "rope_theta" in json.loads((folder / "config.json").read_text())
    ids = prompt(vocab_size=model.config.vocab_size)
    torch.testing.assert_close(logits_of(load(folder), ids), expected(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_mixed_with_other_sequences_give_the_logits_of_one_go(tmp_path: Path, variant: str) -> None:
    folder, model = checkpoint(tmp_path, variant)
    a, b = prompt(40, model.config.vocab_size, seed=1), prompt(23, model.config.vocab_size, seed=2)
    session = Session(load(folder), num_seqs=2)
    steps = [[(0, a[:17])], [(1, b[:5]), (0, a[17:18])], [(0, a[18:33]), (1, b[5:22])], [(1, b[22:]), (0, a[33:])]]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunks in steps:
        for (sequence, _), logits in zip(chunks, session.step(chunks), strict=True):
            parts[sequence].append(logits)
    for ids, got in zip((a, b), parts, strict=True):
        torch.testing.assert_close(torch.cat(got), expected(model, ids), atol=TOLERANCE, rtol=0)


# A window beyond the layers it applies to, or an eps too small to matter, would hide a field.
CONTROLS = {
    "llama": {"rms_norm_eps": 0.05, "rope_parameters": LLAMA3},
    "mistral": {"rms_norm_eps": 0.05, "sliding_window": 10},
    "qwen2": {"rms_norm_eps": 0.05, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    "qwen3": {"rms_norm_eps": 0.05, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
}


def flipped(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value * 2 if isinstance(value, int) else value * 1.5


@pytest.mark.parametrize("family", CONTROLS)
def test_every_number_of_the_config_is_seen(tmp_path: Path, family: str) -> None:
    model = oracle(family, **CONTROLS[family])
    folder = save(model, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    ids = prompt()
    right = logits_of(load(folder), ids)
    torch.testing.assert_close(right, expected(model, ids), atol=TOLERANCE, rtol=0)

    fields = {field.name for field in msgspec.structs.fields(models.find(config).config)}
    changes = [{name: flipped(config[name])} for name in sorted(fields) if isinstance(config.get(name), int | float)]
    rope = config["rope_parameters"]
    numbers = [name for name, value in rope.items() if isinstance(value, int | float)]
    changes += [{"rope_parameters": {**rope, name: flipped(rope[name])}} for name in numbers]
    assert len(changes) > 10
    for change in changes:
        path.write_text(json.dumps({**config, **change}))
        try:
            wrong = logits_of(load(folder), ids)
        except ModelError:
            continue
        assert (wrong - right).abs().max() > 10 * TOLERANCE, f"{change} changes nothing"
