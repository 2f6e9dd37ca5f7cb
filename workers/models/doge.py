"""Doge: a number of each key, made from values, is added to its scores; the stream counts by weights."""

from cableway.workers.blocks.attention import KeyBiasAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import WeightedStreamLayer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import Never, Size, Window
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.llama import LlamaConfig
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

DOGE = HF | names(
    {
        "self_attn.A": Target("mix.growth", leaf="weight"),
        "self_attn.dt_proj": "mix.step",
        "self_attn.dt_proj.bias": Target("mix.step_bias", leaf="weight"),
        "input_residual": Target("keep_mix", leaf="weight"),
        "post_attention_residual": Target("keep_mlp", leaf="weight"),
    },
    **LAYER,
)


class DogeConfig(LlamaConfig, frozen=True, kw_only=True):
    is_moe: Never = False
    sliding_window: Window | None = None
    keep_window_size: Size = 2048


@arch("DogeForCausalLM", config=DogeConfig, hf=DOGE)
def doge(c: DogeConfig) -> Decoder:
    norm, head_norm = RMSNorm(c.hidden_size, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
    mix = KeyBiasAttention.of(c, window=c.sliding_window or 0, qk_norm=head_norm, most_tokens=c.keep_window_size)
    layer = WeightedStreamLayer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c), hidden_size=c.hidden_size)
    return Decoder(c, [layer] * c.num_hidden_layers, norm_out=norm)
