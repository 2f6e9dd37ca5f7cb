"""Kimi Linear: a delta rule whose states decay by each number of a key, and in every fourth layer latent attention that
knows no positions; the experts of DeepSeek V3, under Mixtral's names."""

from typing import Any

from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.delta import KeyedDeltaNet
from cableway.workers.models.config import Count, Epsilon, Size
from cableway.workers.models.deepseek import DeepseekV3Config, latent_attention, latent_names
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.hf_names import HF, RECURRENT, known_as
from cableway.workers.models.layouts import flat
from cableway.workers.models.moe import sigmoid_mixture, some_sparse
from cableway.workers.models.names import Target, names, of_parts
from cableway.workers.models.registry import arch

KIMI_LINEAR = HF | latent_names("model.layers.{}.self_attn.", "layers.{}.mix.", 0)
_DELTA = known_as(RECURRENT) | {
    **of_parts("*_proj", "project"),
    "A_log": Target("a_log", layout=flat),
    "b_proj": "beta",
    "f_a_proj": "decay.down",
    "f_b_proj": "decay.up",
    "g_a_proj": "gate.down",
    "g_b_proj": "gate.up",
}


class KimiLinearConfig(DeepseekV3Config, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    norm_topk_prob: bool = True
    layer_types: list[str]
    mlp_layer_types: list[str] | None = None
    first_k_dense_replace: Count = 1
    linear_num_heads: Size = 32
    linear_head_dim: Size = 128
    linear_conv_kernel_dim: Size = 4

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        of_heads, num_layers = config.get("linear_attn_config") or {}, config["num_hidden_layers"]
        published = {
            "linear_num_heads": of_heads.get("num_heads"),
            "linear_head_dim": of_heads.get("head_dim"),
            "linear_conv_kernel_dim": of_heads.get("short_conv_kernel_size"),
        }
        config |= {name: value for name, value in published.items() if value is not None}
        full = of_heads.get("full_attn_layers", range(5, num_layers + 1, 4))  # counted from 1
        kinds = ["full_attention" if i + 1 in full else "linear_attention" for i in range(num_layers)]
        config["layer_types"] = config.get("layer_types") or kinds

    def is_sparse(self, layer: int) -> bool:
        return self.mlp_layer_types[layer] == "sparse" if self.mlp_layer_types else super().is_sparse(layer)


def _names(c: KimiLinearConfig) -> Any:
    scheme = KIMI_LINEAR
    for i, kind in enumerate(c.layer_types):
        if kind == "linear_attention":
            scheme |= names(_DELTA, prefix=f"model.layers.{i}.self_attn.", to=f"layers.{i}.mix.")
    return scheme


@arch("KimiLinearForCausalLM", config=KimiLinearConfig, hf=_names)
def kimi_linear(c: KimiLinearConfig) -> Decoder:
    sizes = (c.linear_num_heads, c.linear_head_dim, c.linear_conv_kernel_dim)
    kinds = {
        "full_attention": latent_attention(c, rope=None),
        "linear_attention": KeyedDeltaNet(c.hidden_size, *sizes, norm_eps=c.norm_eps),
    }
    return pre_norm(c, c.by_layer(kinds), some_sparse(c, sigmoid_mixture(c)))
