"""Tiny random checkpoints made by transformers, our oracle, with statistics under which a fault shows (DESIGN §11).

Weights are drawn from N(0, 1/fan_in), norms and biases carry noise, so that each of them moves the logits.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_SCALES = {"norm": 0.2, "bias": 0.5}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def oracle(family: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model of `family` in float32; `overrides` are fields of its config, `head_dim=None` leaves it out."""
    return random_model(FAMILIES[family][1], {**SIZES, **overrides}, seed)


def random_model(model_class: Any, fields: dict[str, Any], seed: int = 0, *, attention: str = "eager") -> Any:
    """A random transformers model in float32; `head_dim` is left out of the config where it is None."""
    config = model_class.config_class(**{name: fields[name] for name in fields if name != "head_dim" or fields[name]})
    config._attn_implementation = attention
    model = model_class(config).eval()
    randomize(model, seed)
    return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every weight anew: matrices N(0, 1/fan_in), norms 1 + noise, biases noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1 and "norm" not in name:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            elif name.endswith("bias") or "lambda" in name:
                weight.copy_(_SCALES["bias"] * noise)
            else:
                weight.copy_(1 + _SCALES["norm"] * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point():  # such as corrections of routers
                buffer.copy_(_SCALES["bias"] * torch.randn(buffer.shape, generator=generator))


def save(model: transformers.PreTrainedModel, folder: Path, *, old_spelling: bool = False, **save_options: Any) -> Path:
    """Write a checkpoint; `old_spelling` as files before transformers 5 put it (rope_theta, rope_scaling, …)."""
    model.save_pretrained(folder, **save_options)
    if old_spelling:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)
        path.write_text(json.dumps(config))
    return folder


def tiny(
    folder: Path | str, family: str = "llama", *, tokenizer: bool = False, seed: int = 0, **overrides: Any
) -> Path:
    """Write a tiny random checkpoint of `family` (see `FAMILIES`) into `folder`, which is returned.

    Args:
        tokenizer: add a byte-level tokenizer of 256 bytes and four special tokens, with a chat template.
        overrides: fields of the config; `vocab_size` is at least 260 where there is a tokenizer.
    """
    folder = Path(folder)
    save(oracle(family, seed=seed, **overrides), folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token: ids 0 … 255, then <s>, </s>, <|start|>, <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>", "<|start|>", "<|end|>"])
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
