"""What a family reads of a config.json, typed and checked; spellings of older files are brought to one first."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from cableway.ipc.modelfiles import ModelError
from cableway.workers.blocks.rope import Rope
from cableway.workers.parallel import Axis

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
NumLayers = Annotated[int, Meta(ge=1, le=4096)]
Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Window = Annotated[int, Meta(ge=1)]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]
Never = Literal[False]
"""A switch that no published checkpoint sets; one that does is refused."""
Factor = Annotated[float, Meta(gt=0, lt=1e6)]

_SPELLINGS = {
    **dict.fromkeys(("n_embd", "d_model", "n_embed"), "hidden_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "decoder_layers"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "decoder_attention_heads"), "num_attention_heads"),
    **dict.fromkeys(("num_kv_heads", "n_head_kv", "num_attention_groups"), "num_key_value_heads"),
    **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "d_ff"), "intermediate_size"),
    **dict.fromkeys(("kv_channels", "d_kv", "hidden_size_per_head"), "head_dim"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), "norm_eps"),
    **dict.fromkeys(("norm_epsilon", "rms_norm_epsilon"), "norm_eps"),
    **dict.fromkeys(("activation_function", "hidden_activation", "activation", "mlp_hidden_act"), "hidden_act"),
    "tie_embedding": "tie_word_embeddings",
    **dict.fromkeys(("n_positions", "max_seq_len", "n_ctx", "seq_length"), "max_position_embeddings"),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), "num_experts"),
    **dict.fromkeys(("moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), "num_experts_per_tok"),
    **dict.fromkeys(("moe_renormalize", "norm_expert_weight"), "norm_topk_prob"),
    "num_expert_group": "n_group",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts"), "n_shared_experts"),
    **dict.fromkeys(("mamba_num_heads", "n_mamba_heads", "num_heads"), "mamba_n_heads"),
    "mamba_head_dim": "mamba_d_head",
    **dict.fromkeys(("n_groups", "mamba_ngroups"), "mamba_n_groups"),
    **dict.fromkeys(("ssm_state_size", "state_size"), "mamba_d_state"),
    "conv_kernel": "mamba_d_conv",
    "use_conv_bias": "mamba_conv_bias",
    "time_step_rank": "mamba_dt_rank",
    "padded_vocab_size": "vocab_size",
    "rotary_emb_base": "rope_theta",
    **dict.fromkeys(("rotary_pct", "rope_pct"), "partial_rotary_factor"),
    "layers_block_type": "layer_types",
    "_sliding_window_pattern": "sliding_window_pattern",
}
"""Other names for what `DecoderConfig` calls by one. Of two names in a file the one that it uses wins."""
_DERIVED_WHERE_NULL = (
    *("head_dim", "num_key_value_heads", "intermediate_size", "layer_types"),
    *("n_group", "topk_group", "n_shared_experts"),
)


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that decoders share. A family adds its own, with the defaults that an absent key means there."""

    hidden_size: Size
    num_hidden_layers: NumLayers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    rope_parameters: dict[str, Any]
    norm_eps: Epsilon = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Count | None = None
    layer_types: list[str] | None = None

    rotary_frac: ClassVar[float] = 1.0
    """Part of a head that is rotated where a file has no `rope_parameters` and does not say."""
    global_period: ClassVar[int] = 0
    """Where a file does not say it: each how-many-th layer sees everything, the others a window; 0 = all the same."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})")

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        """Add to a config what a family leaves to be derived from its other keys."""

    def head_axes(self) -> tuple[Axis, Axis]:
        """Of all heads of q, and of all heads of k."""
        sizes = {"heads": self.num_attention_heads, "kv_heads": self.num_key_value_heads}
        heads, kv_heads = (Axis(name, count, self.head_dim) for name, count in sizes.items())
        return heads, kv_heads

    def rope(self, layer_type: str | None = None) -> Rope:
        """The rotation of heads; of layers of one type, where types may have their own."""
        parameters = self.rope_parameters
        if layer_type is not None and "rope_type" not in parameters:
            if layer_type not in parameters:
                raise ModelError(f"config: rope_parameters say nothing of layers of type {layer_type!r}")
            parameters = parameters[layer_type]
        return Rope.of(self.head_dim, parameters)

    def by_layer(self, values: Mapping[str, Any], kinds: Sequence[str] | None = None) -> list[Any]:
        """The value of each layer's type, or kind; ModelError when these do not fit the layers."""
        kinds = self.layer_types if kinds is None else kinds
        if kinds is None or len(kinds) != self.num_hidden_layers or not values.keys() >= set(kinds):
            raise ModelError(f"config: layer_types does not name {self.num_hidden_layers} layers of {list(values)}")
        return [values[kind] for kind in kinds]

    def windows(self) -> list[int]:
        """Window of each layer, 0 = none, by its type."""
        return self.by_layer({"full_attention": 0, "sliding_attention": self.sliding_window or 0})


class WindowedConfig(DecoderConfig, frozen=True, kw_only=True):
    """A decoder some of whose layers see a window: those that `layer_types` names, or from `max_window_layers` on."""

    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    max_window_layers: int = 28

    def windows(self) -> list[int]:
        window = (self.use_sliding_window and self.sliding_window) or 0
        if self.layer_types is None:
            return [window if i >= self.max_window_layers else 0 for i in range(self.num_hidden_layers)]
        return self.by_layer({"full_attention": 0, "sliding_attention": window})


class MoEConfig(DecoderConfig, frozen=True, kw_only=True):
    """A decoder some of whose MLPs are mixtures of experts."""

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    n_shared_experts: Count = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: Factor = 1.0
    n_group: Size = 1
    topk_group: Size = 1
    first_k_dense_replace: Count = 0

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        if self.num_experts_per_tok > self.num_experts or self.num_experts % self.n_group:
            raise ValueError(
                f"{self.num_experts} experts, {self.num_experts_per_tok} a token, in {self.n_group} groups"
            )
        group_len = self.num_experts // self.n_group
        if self.topk_group > self.n_group or (self.n_group > 1 and group_len < 2):
            raise ValueError(f"topk_group {self.topk_group} of {self.n_group} groups of {group_len} experts")
        if self.topk_group * group_len < self.num_experts_per_tok:
            raise ValueError(f"{self.topk_group} groups of {group_len} experts are too few for a token")


class SomeMoEConfig(MoEConfig, frozen=True, kw_only=True):
    """A decoder of a family some of whose models have experts."""

    num_experts: Count = 0
    num_experts_per_tok: Count = 0

    def __post_init__(self) -> None:
        if self.num_experts:
            MoEConfig.__post_init__(self)
        else:
            DecoderConfig.__post_init__(self)


def every(period: int, num_layers: int, other: str = "sliding_attention") -> list[str]:
    """Layer types where each `period`-th layer sees everything, the others a window, or what else they do."""
    return [other if (i + 1) % period else "full_attention" for i in range(num_layers)]


Config = TypeVar("Config", bound=DecoderConfig)


def read(config: Mapping[str, Any], kind: type[Config]) -> Config:
    """Check a config.json against a family's fields; ModelError names the field that does not fit."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ModelError(f"config: weights quantized by {method!r} are not supported")
    fields = {field.name: field.required for field in msgspec.structs.fields(kind)}
    try:
        return msgspec.convert(_modern(config, kind, fields), kind)
    except (msgspec.ValidationError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"config: {error}") from None


def _modern(config: Mapping[str, Any], kind: type[DecoderConfig], fields: Mapping[str, bool]) -> dict[str, Any]:
    """The same config in one spelling, with what older files leave to be derived. `fields`: name -> is it required."""
    modern = {key: _number(value) for key, value in config.items()}
    for other, name in _SPELLINGS.items():
        if other not in fields and modern.get(name) is None and modern.get(other) is not None:
            modern[name] = modern[other]
    for name in _DERIVED_WHERE_NULL:
        if modern.get(name) is None:
            modern.pop(name, None)
    kind.derive(modern)
    if kind.global_period:
        period = modern.get("sliding_window_pattern") or kind.global_period
        modern.setdefault("layer_types", every(period, modern["num_hidden_layers"]))
    if "mamba_dt_rank" in fields and modern.get("mamba_dt_rank", "auto") == "auto":
        modern["mamba_dt_rank"] = -(-modern["hidden_size"] // 16)
    if "qk_rope_head_dim" in fields:
        modern["head_dim"] = modern.get("qk_rope_head_dim")
    if "moe_intermediate_size" in fields:
        modern.setdefault("moe_intermediate_size", modern.get("intermediate_size"))
        modern.setdefault("intermediate_size", modern["moe_intermediate_size"])
    heads, hidden = modern.get("num_attention_heads"), modern.get("hidden_size")
    modern.setdefault("num_key_value_heads", heads)
    if fields["head_dim"] and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        modern.setdefault("head_dim", hidden // heads)
    if not modern.get("rope_parameters"):
        if modern.get("rotary_dim"):
            modern["partial_rotary_factor"] = modern["rotary_dim"] / modern["head_dim"]
        modern.setdefault("partial_rotary_factor", kind.rotary_frac)
    rope = modern.get("rope_parameters") or modern.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config: the rope parameters are no object but {rope!r}")
    by_type = bool(rope) and all(isinstance(value, Mapping) for value in rope.values())
    modern["rope_parameters"] = (
        {name: _rope(value, modern) for name, value in rope.items()} if by_type else _rope(rope, modern)
    )
    return modern


def _number(value: Any) -> Any:
    """Infinities, which JSON has no word for, are objects in newer files."""
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return [_number(item) for item in value] if isinstance(value, list) else value


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters, with those that older files keep elsewhere in the config."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {"rope_theta": config.get("rope_theta") or 10_000.0, **rope, "rope_type": kind}
    longest = config.get("max_position_embeddings")
    elsewhere = {
        "partial_rotary_factor": config.get("partial_rotary_factor"),
        "max_position_embeddings": longest,
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }
    found |= {name: value for name, value in elsewhere.items() if value is not None and found.get(name) is None}
    old = found.get("original_max_position_embeddings")
    if found.get("factor") is None and isinstance(old, int) and isinstance(longest, int) and old > 0:
        found["factor"] = longest / old
    return found
