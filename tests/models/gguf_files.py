"""GGUF files as llama.cpp's converter makes them (names, order of q and k): write small ones, read the demo's."""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from cableway.ipc import modelfiles
from cableway.ipc.gguf import read_header
from tests.models.converter.writing import finish

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_CAN_QUANTIZE = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4, Kind.BF16, Kind.F16, Kind.F32)
_SCALE_OFFSETS = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
_SCALE_OFFSETS |= {Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,)}
"""Where a block of the types that the gguf package cannot write keeps its float16 scales."""


def random_blocks(kind: Kind, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes [num_rows, row_bytes] that are valid blocks of `kind`, of the size of weights."""
    random = np.random.default_rng(seed)
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (num_rows, num_columns // block_len, block_bytes), dtype=np.uint8)
    for offset in _SCALE_OFFSETS[kind]:
        scales = random.uniform(1e-5, 2e-4, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def encode(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Values as blocks of `kind`; for types that cannot be written, random blocks of the same shape."""
    if kind in _CAN_QUANTIZE:
        return gguf.quants.quantize(values, kind)
    return random_blocks(kind, *values.shape, seed=values.size)


def write(path: Path, model: Any, architecture: str, kind: Kind, *, extra: Any = None) -> None:
    """Write a transformers `model` with matrices of `kind`, and give the model the values that the file holds.

    Args:
        extra: name -> (values, type) of further tensors.
    """
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stem, leaf = name.rsplit(".", 1)
            is_rotated = architecture == "llama" and stem.endswith(("q_proj", "k_proj"))
            order = _converter_order(len(weight), config.head_dim) if is_rotated else slice(None)
            if weight.dim() == 1:
                writer.add_tensor(f"{_gguf_name(stem)}.{leaf}", weight[order].numpy())
                continue
            encoded = encode(weight[order].numpy(), kind)
            writer.add_tensor(f"{_gguf_name(stem)}.{leaf}", encoded, raw_dtype=kind)
            weight[order] = torch.from_numpy(np.array(gguf.quants.dequantize(encoded, kind))).view_as(weight)
    for name, (values, raw_kind) in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=raw_kind)
    finish(writer)


@functools.cache
def demo_model() -> LlamaForCausalLM:
    """The demo model in transformers, float32; `test_gguf.py` holds its weights against transformers' own reading."""
    files = modelfiles.locate("smollm2-135m")
    known = LlamaConfig().to_dict().keys() - {"architectures", "model_type"}
    config = LlamaConfig(**{name: value for name, value in files.config.items() if name in known})
    config.rope_parameters = {"rope_type": "default", "rope_theta": files.config["rope_theta"]}
    with no_init_weights():
        model = LlamaForCausalLM(config).eval()
    tensors, data = read_header(files.path).tensors, np.memmap(files.path, np.uint8, "r")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stem, leaf = name.rsplit(".", 1)
            if stem == "lm_head":
                continue
            info = tensors[f"{_gguf_name(stem)}.{leaf}"]
            raw = data[info.offset : info.offset + info.num_bytes].reshape(*info.shape[:-1], -1)
            values = torch.from_numpy(np.array(gguf.quants.dequantize(raw, Kind(info.ggml_type))))
            is_rotated = stem.endswith(("q_proj", "k_proj"))
            weight[_converter_order(len(weight), config.head_dim) if is_rotated else slice(None)] = values
    model.tie_weights()
    return model


def _converter_order(num_rows: int, head_dim: int) -> Tensor:
    """Rows of q or k as llama.cpp's converter permutes them: each pair that is rotated together side by side."""
    rows = torch.arange(num_rows).view(-1, 2, head_dim // 2)
    return rows.swapaxes(1, 2).flatten()


def _gguf_name(stem: str) -> str:
    if stem in _NAMES:
        return _NAMES[stem]
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"
