"""What a family reads of a config.json, typed and checked; spellings of older files are brought to today's first."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cableway.ipc.modelfiles import ModelError

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Window = Annotated[int, Meta(ge=1)]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that decoders share. A family adds its own, with the defaults that an absent key means there."""

    hidden_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=4096)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    rope_parameters: dict[str, Any]
    rms_norm_eps: Epsilon = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})")
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported (silu is)")


class WindowedConfig(DecoderConfig, frozen=True, kw_only=True):
    """A decoder some of whose layers see a window: those that `layer_types` names, or from `max_window_layers` on."""

    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def windows(self) -> list[int]:
        """Window of each layer, 0 = none; ModelError when `layer_types` does not fit."""
        window = (self.use_sliding_window and self.sliding_window) or 0
        if self.layer_types is None:
            return [window if i >= self.max_window_layers else 0 for i in range(self.num_hidden_layers)]
        by_type = {"full_attention": 0, "sliding_attention": window}
        if len(self.layer_types) != self.num_hidden_layers or not by_type.keys() >= set(self.layer_types):
            raise ModelError(f"config: layer_types does not name {self.num_hidden_layers} layers of {list(by_type)}")
        return [by_type[kind] for kind in self.layer_types]


Config = TypeVar("Config", bound=DecoderConfig)


def read(config: Mapping[str, Any], kind: type[Config]) -> Config:
    """Check a config.json against a family's fields; ModelError names the field that does not fit."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ModelError(f"config: weights quantized by {method!r} are not supported")
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    try:
        return msgspec.convert(_modern(config, required), kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise ModelError(f"config: {error}") from None


def _modern(config: Mapping[str, Any], required: set[str]) -> dict[str, Any]:
    """The same config as today's transformers would save it, with what older files leave to be derived."""
    modern = dict(config)
    heads, hidden = modern.get("num_attention_heads"), modern.get("hidden_size")
    if modern.get("num_key_value_heads") is None:
        modern["num_key_value_heads"] = heads
    if modern.get("head_dim") is None:
        modern.pop("head_dim", None)
        if "head_dim" in required and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            modern["head_dim"] = hidden // heads
    rope = modern.get("rope_parameters") or modern.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config: the rope parameters are no object but {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    modern["rope_parameters"] = {"rope_theta": modern.get("rope_theta", 10_000.0), **rope, "rope_type": kind}
    return modern
