"""MiniMax-Text-01 and M1: experts, and lightning attention but for every eighth layer; norms stand on the stream."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import NormedStreamLayer
from cableway.workers.blocks.lightning import LightningAttention
from cableway.workers.blocks.norm import RMSNorm, Scale
from cableway.workers.models.config import Epsilon, Factor, MoEConfig
from cableway.workers.models.hf_names import HF, MIX
from cableway.workers.models.layouts import by_group
from cableway.workers.models.moe import mixture
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

MINIMAX = HF | names(
    {
        "qkv_proj": Target("project", layout=by_group, parts=("q", "k", "v")),
        "output_gate": "project.gate",
        "norm": "norm",
    },
    ignored=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
    **MIX,
)


class MiniMaxConfig(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    layer_types: list[str]
    full_attn_alpha_factor: Factor = 1.0
    full_attn_beta_factor: Factor = 1.0
    linear_attn_alpha_factor: Factor = 1.0
    linear_attn_beta_factor: Factor = 1.0
    mlp_alpha_factor: Factor = 1.0
    mlp_beta_factor: Factor = 1.0

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        kinds = ["linear_attention" if i % 2 else "full_attention" for i in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)


class MiniMaxText01Config(MiniMaxConfig, frozen=True, kw_only=True):
    """As it was first published."""

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        if not config.get("postnorm"):
            raise ValueError("a stream without norms on it (postnorm) is not supported")
        config["layer_types"] = ["full_attention" if full else "linear_attention" for full in config["attn_type_list"]]
        for ours, theirs in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp")):
            for letter in ("alpha", "beta"):
                config[f"{ours}_{letter}_factor"] = config.get(f"layernorm_{theirs}_{letter}", 1.0)


@arch("MiniMaxForCausalLM", config=MiniMaxConfig, hf=MINIMAX)
@arch("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM", config=MiniMaxText01Config, hf=MINIMAX, like="MiniMax")
def minimax(c: MiniMaxConfig) -> Decoder:
    norm, moe, last = RMSNorm(c.hidden_size, c.norm_eps), mixture(c, renorm=0.0), c.num_hidden_layers - 1
    full = Attention.of(c, window=c.sliding_window or 0)

    def layer(number: int, kind: str) -> NormedStreamLayer:
        mix, keep, add = full, c.full_attn_alpha_factor, c.full_attn_beta_factor
        if kind == "linear_attention":
            rate = 1 - number / (last + 1e-5) + 1e-5
            mix = LightningAttention(c.hidden_size, c.num_attention_heads, c.head_dim, rate=rate, norm_eps=1e-6)
            keep, add = c.linear_attn_alpha_factor, c.linear_attn_beta_factor
        return NormedStreamLayer(
            norm_in=norm,
            mix=mix,
            norm_mix_out=Scale(add),
            norm_mlp=norm,
            mlp=moe,
            norm_mlp_out=Scale(c.mlp_beta_factor),
            keep=(keep, c.mlp_alpha_factor),
        )

    kinds = c.by_layer({kind: kind for kind in ("full_attention", "linear_attention")})
    return Decoder(c, [layer(number, kind) for number, kind in enumerate(kinds)], norm_out=norm)
