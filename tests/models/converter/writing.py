"""Checkpoint folders written as GGUF files, as llama.cpp's converter does: its conventions, described on their own.

Nothing here comes of the engine's tables. Names of tensors are the gguf package's map from transformers' names.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

from tests.models.converter.families import Conversion
from tests.models.converter.metadata import layers, scaling

BLOCK_LEN = 32
_NEVER_QUANTIZED = ("ffn_gate_inp", "ssm_", "norm", "position_embd")


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    name = key.format(arch=writer.arch)
    match value:
        case None:
            return
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def convert(folder: Path, path: Path, kind: Kind, conversion: Conversion, **options: Any) -> None:
    """Write a checkpoint as a GGUF file, in blocks of `kind` those matrices whose rows are whole blocks."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for change in conversion.changes:
        change(tensors, config)
    writer = gguf.GGUFWriter(path, conversion.architecture, **options)
    for key, value in conversion.fields.items():
        put(writer, key, value(config))
    for key, value in scaling(config).items():
        if key not in conversion.fields:
            put(writer, key, value)
    writer.add_token_list([f"token {i}" for i in range(config["vocab_size"])])
    known_as = conversion.kin or conversion.architecture
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == known_as)
    names = names_of(architecture, max(layers(config), config.get("num_decoder_layers", 0)))
    for name, tensor in tensors.items():
        known = name if name.startswith(("rope_f", "blk.")) else names.get_name(name, (".weight", ".bias"))
        assert known is not None, name
        values = tensor.contiguous().numpy()
        is_plain = tensor.dim() < 2 or any(part in known for part in _NEVER_QUANTIZED) or values.shape[-1] % BLOCK_LEN
        used = Kind.F32 if is_plain else kind
        writer.add_tensor(known, gguf.quants.quantize(values, used), raw_dtype=used)
    finish(writer)


def names_of(architecture: gguf.MODEL_ARCH, num_layers: int) -> gguf.TensorNameMap:
    """The package's map, which changes its table for every later one where an architecture has names of its own."""
    table = gguf.TensorNameMap.block_mappings_cfg
    before = dict(table)
    names = gguf.get_tensor_name_map(architecture, num_layers)
    table.clear()
    table.update(before)
    return names


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_blocks(values: Tensor, kind: Kind) -> Tensor:
    """What blocks of `kind` hold of these."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)))


def rounded(model: Any, kind: Kind) -> None:
    """Give a model the values that blocks of `kind` hold."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.shape[-1] % BLOCK_LEN == 0:
                weight.copy_(in_blocks(weight, kind))
