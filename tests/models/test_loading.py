"""Loading is strict, and a broken or hostile file is one line said about it."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from cableway.ipc import modelfiles
from cableway.ipc.modelfiles import ModelError
from cableway.workers import models
from tests.checkpoints import oracle, save, tiny
from tests.models import gguf_files
from tests.models.harness import load, logits_of, prompt


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(path: Path | str, **options: Any) -> str:
    """The one line that refuses to load."""
    with pytest.raises(ModelError) as caught:
        load(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Storage forms that mean the same


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint and its logits."""
    folder = tiny(tmp_path_factory.mktemp("reference"), "qwen3")
    return folder, logits_of(load(folder), prompt())


def copied(reference: tuple[Path, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Put the reference's config into an empty folder; its tensors."""
    (folder / "config.json").write_bytes((reference[0] / "config.json").read_bytes())
    return load_file(reference[0] / "model.safetensors")


def test_shards(tmp_path: Path, reference: tuple[Path, torch.Tensor]) -> None:
    save(oracle("qwen3"), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path), prompt()), reference[1])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(tmp_path: Path, reference: tuple[Path, torch.Tensor], name: str, zipped: bool) -> None:
    torch.save(copied(reference, tmp_path), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits_of(load(tmp_path), prompt()), reference[1])


def test_fused_projections(tmp_path: Path, reference: tuple[Path, torch.Tensor]) -> None:
    tensors = copied(reference, tmp_path)
    for i in range(3):
        stem = f"model.layers.{i}."
        qkv = [tensors.pop(f"{stem}self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"{stem}self_attn.qkv_proj.weight"] = torch.cat(qkv)
        gate_up = [tensors.pop(f"{stem}mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{stem}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load(tmp_path), prompt()), reference[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_exact_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = oracle("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
        expected = model(prompt()[None]).logits[0]
    folder = save(model.to(dtype), tmp_path)
    torch.testing.assert_close(logits_of(load(folder), prompt()), expected, atol=1e-4, rtol=0)


def test_tensors_known_to_hold_nothing_are_skipped(tmp_path: Path, reference: tuple[Path, torch.Tensor]) -> None:
    tensors = copied(reference, tmp_path)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load(tmp_path), prompt()), reference[1])


def test_a_tied_head_that_is_saved_too_is_skipped(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama", tie_word_embeddings=True)
    expected = logits_of(load(folder), prompt())
    change_weights(folder, lambda t: t.update({"lm_head.weight": torch.zeros(300, 64)}))
    assert torch.equal(logits_of(load(folder), prompt()), expected)


def test_dummy_weights_need_a_config_alone_and_follow_the_seed(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen3")
    (folder / "model.safetensors").unlink()
    one, again, other = (logits_of(load(folder, load_format="dummy", seed=seed), prompt()) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert 0.3 < one.std() < 3


# ---------------------------------------------------------------------------------------------------------------------
# Strictness


def test_the_error_names_both_sides(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.sideways_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    change_weights(folder, rename)
    line = refusal(folder)
    assert "without a slot: model.layers.1.mlp.sideways_proj.weight" in line
    assert "without a tensor: layers.1.mlp.gate_up.up.weight" in line


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", lambda t: t.pop("model.norm.weight"), "norm_out.weight"),
        ("llama", lambda t: t.pop("lm_head.weight"), "head.weight"),
        ("qwen2", lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), "layers.0.mix.qkv.k.bias"),
        ("llama", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), "mix.qkv.k.bias"),
        ("mistral", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), "q_proj.bias"),
        ("llama", lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.zeros(64)}), "layers.3."),
        ("llama", lambda t: t.update({"extra": torch.zeros(1)}), "extra"),
        ("llama", lambda t: t.update({"model.embed_tokens.weight": torch.zeros(299, 64)}), r"(299, 64)"),
        ("llama", lambda t: t.update({"model.norm.weight": torch.zeros(64, 1)}), r"(64, 1)"),
        (
            "qwen3",
            lambda t: t.update({"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(192, 64)}),
            "second time",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, family: str, change: Any, said: str) -> None:
    folder = tiny(tmp_path, family)
    change_weights(folder, change)
    assert said in refusal(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "b.safetensors")
    assert "'model.norm.weight' is in another file too" in refusal(folder)


def test_an_unknown_architecture_names_the_nearest(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")
    change_config(folder, architectures=["Llama5ForCausalLM"])
    assert "LlamaForCausalLM" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/cableway-was-here"),))


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


BROKEN_SAFETENSORS = {
    "empty": b"",
    "noise": b"\x93noise" * 50,
    "header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "header is no json": safetensors_file(b"{" * 500),
    "deep header": safetensors_file(b'{"a":' * 20_000),
    "offsets past the end": safetensors_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "shape overflows": safetensors_file(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "negative shape": safetensors_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "integers": safetensors_file(b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', b"12345678"),
}


@pytest.mark.parametrize("fault", BROKEN_SAFETENSORS)
def test_broken_safetensors(tmp_path: Path, fault: str) -> None:
    folder = tiny(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes(BROKEN_SAFETENSORS[fault])
    assert "model.safetensors" in refusal(folder)


def test_truncated_safetensors(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"model.norm.weight": Evil()}),
        b"",
        b"PK\x03\x04 nothing more",
        b"\x80\x04noise",
    ],
)
def test_hostile_pickles(tmp_path: Path, content: bytes) -> None:
    folder = tiny(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refusal(folder)
    assert not Path("/tmp/cableway-was-here").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        {"a": 3},
        {1: torch.zeros(3)},
        {"a": torch.zeros(3, dtype=torch.int8)},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"state_dict": {"a": torch.zeros(3)}},
    ],
)
def test_torch_files_that_hold_no_named_tensors(tmp_path: Path, content: Any) -> None:
    folder = tiny(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)


@pytest.mark.parametrize("kept_frac", [0.2, 0.6, 0.999])
def test_truncated_gguf(tmp_path: Path, kept_frac: float) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, oracle("llama"), "llama", Kind.F16)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_frac)])
    assert "model.gguf" in refusal(path)


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "64", [64], 1 << 40, 10**400, True, {}])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_hostile_sizes_in_a_config(tmp_path: Path, field: str, value: Any) -> None:
    folder = tiny(tmp_path, "llama")
    change_config(folder, **{field: value})
    refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": -1.0},
        {"head_dim": 15},
        {"num_key_value_heads": 3},
        {"hidden_act": "sideways"},
        {"rope_parameters": "llama3"},
        {"rope_parameters": {"rope_type": "backwards"}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1.0}},
        {"rope_parameters": None, "rope_scaling": 7},
        {"quantization_config": {"quant_method": "gptq"}},
        {"architectures": []},
        {"architectures": [7]},
        {"architectures": "LlamaForCausalLM"},
        {"tie_word_embeddings": "no"},
    ],
)
def test_hostile_configs(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = tiny(tmp_path, "llama")
    change_config(folder, **fields)
    refusal(folder)


def test_layer_types_must_fit_the_layers(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen3")
    for types in (["full_attention"], ["full_attention"] * 2 + ["sideways"], [["full_attention"]] * 3):
        change_config(folder, layer_types=types)
        refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------


def test_family_files_know_nothing_of_ranks_formats_caches_or_devices() -> None:
    folder = Path(models.__file__).parent
    families = [path for path in folder.glob("*.py") if "@arch(" in path.read_text()]
    assert {path.stem for path in families} >= {"llama", "qwen3"}
    for path in families:
        source = path.read_text().lower()
        for word in (
            "rank",
            "mesh",
            "parallel",
            "dtype",
            "device",
            "cuda",
            "torch",
            "cache",
            "format",
            "quant",
            "lora",
        ):
            assert not re.search(rf"\b{word}s?\b", source), f"{path.name} speaks of {word!r}"


def test_the_demo_model_is_located() -> None:
    assert modelfiles.locate("smollm2-135m").kind == "gguf"
