"""A GGUF file's metadata as the config.json that its family has in a Hugging Face folder."""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cableway.ipc.gguf import Header, ModelError
from cableway.ipc.gguf_families import FAMILIES
from cableway.ipc.gguf_values import (
    File,
    Value,
    has,
    head_dim,
    layer_types,
    num_layers,
    one,
    rope_scaling,
    rotated_frac,
)

_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
"""ggml_type -> dtype, for those that are plain numbers"""

_num_heads, _num_kv_heads = one("attention.head_count"), one("attention.head_count_kv")
_COMMON: dict[str, Value] = {
    "num_hidden_layers": num_layers,
    "num_nextn_predict_layers": "nextn_predict_layers",
    "hidden_size": "embedding_length",
    "intermediate_size": one("feed_forward_length"),
    "num_attention_heads": _num_heads,
    "num_key_value_heads": lambda file: _num_kv_heads(file) or _num_heads(file) or None,
    "head_dim": lambda file: head_dim(file) if file["attention.head_count"] else None,
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "sliding_window": lambda file: file["attention.sliding_window"] or None,
    "layer_types": layer_types,
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "rope_theta": "rope.freq_base",
    "rope_scaling": rope_scaling,
    "partial_rotary_factor": rotated_frac,
    "num_experts": lambda file: file["expert_count"] or None,
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": lambda file: file["expert_weights_scale"] or None,
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "attention_bias": has("attn_q.bias"),
    "mlp_bias": has("ffn_up.bias"),
    "tie_word_embeddings": lambda file: not file.has("output.weight"),
}


def derive(headers: Sequence[Header]) -> dict[str, Any]:
    """The config of a model in GGUF files, without its token ids; ModelError when its metadata gives none.

    Args:
        headers: the first has the metadata.
    """
    file, header = File(headers), headers[0]
    family = FAMILIES.get(file.architecture) if isinstance(file.architecture, str) else None
    if family is None:
        near = difflib.get_close_matches(str(file.architecture), FAMILIES, 3, 0.3) or sorted(FAMILIES)
        known = ", ".join(near)
        raise ModelError(f"{header.path}: architecture {file.architecture!r} is not supported (near it: {known})")
    name = family.transformers
    config: dict[str, Any] = {
        "architectures": [name if isinstance(name, str) else name(file)],
        "model_type": file.architecture,
    }
    for name, value in {**_COMMON, **family.fields}.items():
        try:
            found = file[value] if isinstance(value, str) else value(file)
        except (TypeError, ValueError, ArithmeticError):
            raise ModelError(f"{header.path}: metadata gives no usable {name}") from None
        if found is not None:
            config[name] = found
    if not isinstance(config.get("hidden_size"), int):
        raise ModelError(f"{header.path}: metadata gives no usable hidden_size")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        config["vocab_size"] = len(tokens)  # some writers round the key of that name, or leave it out
    if dtype := _dtype(headers):
        config["dtype"] = dtype
    return config


def _dtype(headers: Sequence[Header]) -> str | None:
    """The dtype of most of the matrices' numbers; None where they are quantized."""
    counts: Counter[int] = Counter()
    for tensor in (tensor for header in headers for tensor in header.raw_tensors.values()):
        if len(tensor.shape) > 1:
            counts[tensor.ggml_type] += math.prod(tensor.shape)
    return _DTYPES.get(counts.most_common(1)[0][0]) if counts else None
