"""How a key of a config.json is found in a GGUF file's metadata, where it is not simply there under another name."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from cableway.ipc.gguf import Header, read_floats

_MAX_LAYERS = 4096
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class File:
    """What a model's headers say of its architecture: `file["block_count"]`, None where it says nothing."""

    def __init__(self, headers: Sequence[Header]):
        self._metadata, self._headers = headers[0].metadata, headers
        self.architecture = self._metadata.get("general.architecture")
        self._names = frozenset[str]().union(*(header.tensor_names for header in headers))
        self._layers: dict[str, set[int]] = {}
        for name in self._names:
            if found := _BLOCK.fullmatch(name):
                self._layers.setdefault(found[2], set()).add(int(found[1]))

    def __getitem__(self, key: str) -> Any:
        return self._metadata.get(f"{self.architecture}.{key}")

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of this name, in the file or in a block."""
        return tensor in self._names or tensor in self._layers

    def floats(self, tensor: str) -> list[float]:
        """The numbers of a short tensor; ModelError when it is none."""
        holds = [header for header in self._headers if tensor in header.tensor_names]
        return read_floats(holds[0] if holds else self._headers[0], tensor)

    def num_rows(self, tensor: str) -> int:
        """First dimension of a tensor."""
        shapes = [header.raw_tensors[tensor].shape for header in self._headers if tensor in header.tensor_names]
        return shapes[0][0] if shapes and shapes[0] else 0

    def layers_with(self, tensor: str) -> set[int]:
        return self._layers.get(tensor, set())


Value = str | Callable[[File], Any]
"""A key of the metadata, without the architecture's name, or what makes the value; None = the config has no such key"""


class Family(NamedTuple):
    transformers: str | Callable[[File], str]
    fields: Mapping[str, Value] = {}


def num_layers(file: File) -> int:
    """Blocks, without those past the last layer, which predict further tokens."""
    count: int = file["block_count"] - (file["nextn_predict_layers"] or 0)
    if not 0 < count <= _MAX_LAYERS:
        raise ValueError("too many layers, or none")
    return count


def has(tensor: str) -> Value:
    return lambda file: file.has(tensor)


def always(value: Any) -> Value:
    return lambda file: value


def either(key: str, yes: str, no: str) -> Callable[[File], str]:
    """By a key that is absent, zero or false in files of one family and not in those of the other."""
    return lambda file: yes if file[key] else no


def head_dim(file: File) -> Any:
    return file["attention.key_length"] or file["embedding_length"] // file["attention.head_count"]


def rotated_frac(file: File) -> Any:
    return file["rope.dimension_count"] and file["rope.dimension_count"] / head_dim(file)


def one(key: str) -> Callable[[File], Any]:
    """A number, or the one that layers have which have any, where each layer's is given."""

    def find(file: File) -> Any:
        value = file[key]
        numbers = {number for number in value if number} if isinstance(value, list) else {value}
        if len(numbers) > 1:
            raise ValueError("layers differ")
        return next(iter(numbers), None)

    return find


def rope_scaling(file: File) -> dict[str, Any] | None:
    scaling = {
        "rope_type": file["rope.scaling.type"],
        "factor": file["rope.scaling.factor"],
        "original_max_position_embeddings": file["rope.scaling.original_context_length"],
        "beta_fast": file["rope.scaling.yarn_beta_fast"],
        "beta_slow": file["rope.scaling.yarn_beta_slow"],
    }
    if file.has("rope_factors_long.weight"):
        scaling["rope_type"] = "longrope"
        scaling["attention_factor"] = file["rope.scaling.attn_factor"]
        for length in ("long", "short"):
            scaling[f"{length}_factor"] = file.floats(f"rope_factors_{length}.weight")
    elif scaling["rope_type"] in (None, "none"):
        return None
    if (per_log := file["rope.scaling.yarn_log_multiplier"]) is not None:
        scaling["mscale"] = scaling["mscale_all_dim"] = 10 * per_log
    return {key: value for key, value in scaling.items() if value is not None}


def layer_types(file: File) -> list[str] | None:
    """Where each layer's is given; other files repeat the pattern of their family."""
    pattern = file["attention.sliding_window_pattern"]
    return (
        ["sliding_attention" if near else "full_attention" for near in pattern] if isinstance(pattern, list) else None
    )


def by_layer(key: str, change: Callable[[Any], Any] = lambda value: value) -> Value:
    """A number of each layer, where there is one."""
    return lambda file: None if file[key] is None else [change(value) for value in file[key]]


def kinds(tensors: Mapping[str, str]) -> Value:
    """The type of each layer, by a tensor that only layers of that type have."""
    return lambda file: [
        next((kind for tensor, kind in tensors.items() if i in file.layers_with(tensor)), None)
        for i in range(num_layers(file))
    ]


def turns(layers: Collection[int], count: int) -> tuple[int, int]:
    """period, offset of layers that come round regularly; ValueError when they do not."""
    first, second = [*sorted(layers), count, 2 * count][:2]
    period = second - first if len(layers) > 1 else count
    if set(layers) != {i for i in range(count) if i % period == first}:
        raise ValueError("layers come round at no regular distance")
    return period, first


def attention_turns(file: File) -> tuple[int, int]:
    return turns(file.layers_with("attn_q.weight"), num_layers(file))


def expert_turns(file: File) -> tuple[int, int]:
    return turns(file.layers_with("ffn_gate_inp.weight"), num_layers(file))


def far_is_scaled(file: File) -> dict[str, Any]:
    """RoPE scaling of those layers that see everything."""
    plain = {"rope_theta": file["rope.freq_base"], "rope_type": "default"}
    return {"sliding_attention": plain, "full_attention": plain | (rope_scaling(file) or {})}


def query_scalar(num_layers_of_largest: int) -> Value:
    """Of Gemma: the size of a head, but in the largest model of a generation that of an even share of hidden_size."""

    def find(file: File) -> Any:
        if file["block_count"] == num_layers_of_largest:
            return file["embedding_length"] // file["attention.head_count"]
        return head_dim(file)

    return find
