"""Zamba 1 and 2: layers of Mamba, some of which first go through an attention and an MLP that they share. These see the
embeddings again; in Zamba 2 each of the layers adapts them by narrow products of its own."""

import itertools
from typing import Any, Literal

from cableway.workers.blocks.adapted import AdaptedAttention, AdaptedMLP, WideAttention
from cableway.workers.blocks.block import Mixer, shared
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import DetourLayer, Layer
from cableway.workers.blocks.linear import Axis, Linear
from cableway.workers.blocks.mamba import HeadedMamba, Mamba2
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import DecoderConfig, Epsilon, Never, Size
from cableway.workers.models.hf_names import HF, LAYER, RECURRENT, known_as
from cableway.workers.models.layouts import by_head, flat, in_turns
from cableway.workers.models.names import Names, Target, names, of_mlp, of_parts
from cableway.workers.models.registry import arch

_DETOUR = {
    "input_layernorm": "norm_both",
    **of_parts("self_attn.*_proj", "attention.qkv"),
    "self_attn.o_proj": "attention.out",
    "pre_ff_layernorm": "norm_mlp",
    **of_mlp("feed_forward.*"),
    "feed_forward.gate_up_proj": "mlp.gate_up",
}
_HEADED = {
    "in_proj": Target("project", layout=in_turns),
    "x_proj_weight": Target("select", layout=by_head),
    "dt_proj_weight": Target("dt", layout=by_head),
    "dt_proj_bias": Target("dt", layout=flat, leaf="bias"),
    "A_log": Target("a_log", layout=by_head),
    "D": Target("d", layout=flat),
}


def _names(c: "ZambaConfig | Zamba2Config", detour: str, mixer: dict[str, str | Target]) -> Names:
    """`detour`: what the blocks that layers share are called; they are in the first of these layers."""
    own = {"input_layernorm": "norm_in", "mamba_decoder.input_layernorm": "norm_in", "linear": "join"}
    own |= {f"{detour}.{name}": path for name, path in _DETOUR.items()}
    scheme = HF | names(own, **LAYER)
    for name in ("mamba", "mamba_decoder.mamba"):
        scheme |= names(known_as(RECURRENT) | mixer, prefix=f"model.layers.{{}}.{name}.", to="layers.{}.mix.")
    return scheme | Names(beyond=tuple(f"model.layers.{i}.{detour}." for i in c.detours[c.num_mem_blocks :]))


def _adapters(c: "Zamba2Config") -> Names:
    """Adapters of all layers are beside the block that they adapt, numbered by layer."""
    table = {}
    for number, layer in enumerate(c.detours):
        block = f"model.layers.{c.detours[number % c.num_mem_blocks]}.shared_transformer"
        kinds = {
            "feed_forward.gate_up_proj_adapter_list": "mlp.adapter",
            **{f"self_attn.linear_{part}_adapter_list": f"attention.adapters.{i}" for i, part in enumerate("qkv")},
        }
        for name, path in kinds.items():
            table[f"{block}.{name}.{number}.0"] = f"layers.{layer}.{path}.down"
            table[f"{block}.{name}.{number}.1"] = f"layers.{layer}.{path}.up"
    return names(table)


class SharingConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    layers_block_type: list[str]
    num_mem_blocks: Size = 1
    mamba_d_conv: Size = 4
    mamba_expand: Size = 2

    @property
    def detours(self) -> list[int]:
        """Layers that go through a block that they share."""
        return [i for i, kind in enumerate(self.layers_block_type) if kind == "hybrid"]


class ZambaConfig(SharingConfig, frozen=True, kw_only=True):
    n_mamba_heads: Size = 2
    hidden_mamba_act: Literal["silu"] = "silu"
    mamba_d_state: Size = 16
    mamba_dt_rank: Size
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        _derive_head_dim(config)
        period, offset = config.get("attn_layer_period", 6), config.get("attn_layer_offset", 4)
        later = ["hybrid" if i % period == offset else "mamba" for i in range(config["num_hidden_layers"] - 3)]
        config["layers_block_type"] = config.get("layers_block_type") or ["mamba", "mamba", "hybrid", *later]


class Zamba2Config(SharingConfig, frozen=True, kw_only=True):
    use_shared_attention_adapter: bool = False
    adapter_rank: Size = 128
    use_mem_rope: bool = False
    use_long_context: Never = False
    n_mamba_heads: Size = 8
    mamba_ngroups: Size = 1
    mamba_d_state: Size = 64
    add_bias_linear: bool = False
    time_step_min: float = 0.001

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        _derive_head_dim(config)
        config.setdefault("intermediate_size", 4 * config["hidden_size"])


def _derive_head_dim(config: dict[str, Any]) -> None:
    derived = 2 * config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = config.get("attention_head_dim") or derived


@arch("ZambaForCausalLM", config=ZambaConfig, hf=lambda c: _names(c, "shared_transf", _HEADED))
def zamba(c: ZambaConfig) -> Decoder:
    sizes = (c.mamba_expand * c.hidden_size, c.mamba_d_state, c.mamba_dt_rank, c.mamba_d_conv)
    biases = {"bias": c.mamba_proj_bias, "conv_bias": c.mamba_conv_bias}
    mix = HeadedMamba(c.hidden_size, *sizes, num_heads=c.n_mamba_heads, **biases)
    attention = WideAttention.of(c, rope=None, scale=(c.head_dim / 2) ** -0.5)
    return sharing(c, mix, [(attention, MLP.of(c))])


@arch("Zamba2ForCausalLM", config=Zamba2Config, hf=lambda c: _names(c, "shared_transformer", {}) | _adapters(c))
def zamba2(c: Zamba2Config) -> Decoder:
    head_dim = c.mamba_expand * c.hidden_size // c.n_mamba_heads
    sizes = (c.n_mamba_heads, head_dim, c.mamba_ngroups, c.mamba_d_state, c.mamba_d_conv)
    limit, bias = (c.time_step_min, float("inf")), c.add_bias_linear
    mix = Mamba2(c.hidden_size, *sizes, bias=bias, conv_bias=True, norm_eps=1e-5, limit=limit)
    options = {"scale": (c.head_dim / 2) ** -0.5, "rope": c.rope() if c.use_mem_rope else None}
    blocks = []
    for _ in range(c.num_mem_blocks):
        if c.use_shared_attention_adapter:
            attention: WideAttention = AdaptedAttention.of(c, adapter_rank=c.adapter_rank, **options)
        else:
            attention = WideAttention.of(c, **options)
        blocks.append((attention, AdaptedMLP.of(c, adapter_rank=c.adapter_rank, bias=c.add_bias_linear)))
    return sharing(c, mix, blocks)


def sharing(c: SharingConfig, mix: Mixer, blocks: list[tuple[WideAttention, MLP]]) -> Decoder:
    """Layers of `mix`, some of which go through one of the blocks first, in turns."""
    norm, detours = RMSNorm(c.hidden_size, c.norm_eps), []
    for attention, mlp in blocks:
        for slot in (attention.qkv, attention.out, mlp.gate_up, mlp.down):
            shared(slot)
        detours.append(
            DetourLayer(
                norm_both=shared(RMSNorm(2 * c.hidden_size, c.norm_eps)),
                attention=attention,
                norm_mlp=shared(RMSNorm(c.hidden_size, c.norm_eps)),
                mlp=mlp,
                join=Linear(Axis("embed", c.hidden_size), Axis("embed", c.hidden_size)),
                norm_in=norm,
                mix=mix,
            )
        )
    turns = itertools.cycle(detours)
    kinds = {"mamba": "mamba", "linear_attention": "mamba", "hybrid": "hybrid"}
    layers = [
        next(turns) if kind == "hybrid" else Layer(norm_in=norm, mix=mix)
        for kind in c.by_layer(kinds, c.layers_block_type)
    ]
    return Decoder(c, layers, norm_out=norm)
