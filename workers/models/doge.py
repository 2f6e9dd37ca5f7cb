"""Doge: a number of each key, made from values, is added to its scores; the stream counts by weights. Experts, if there
are any, are single units, which each token chooses for itself. So transformers has it for tokens one by one; of several
it mixes up the scores, so that a prompt in one go comes out otherwise there."""

import math
from functools import partial

from cableway.workers.blocks.attention import KeyBiasAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import WeightedStreamLayer
from cableway.workers.blocks.mlp import MLP, RetrievingMLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import DecoderConfig, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.names import names
from cableway.workers.models.registry import arch

DOGE = HF | names(
    {
        "self_attn.A": "mix.growth",
        "self_attn.dt_proj": "mix.step",
        "self_attn.dt_proj.bias": "mix.step_bias",
        "mlp.router_gate": "mlp.score",
        "mlp.down_embed": "mlp.units_in",
        "mlp.up_embed": "mlp.units_out",
        "input_residual": "keep_mix",
        "post_attention_residual": "keep_mlp",
    },
    **LAYER,
)


class DogeConfig(DecoderConfig, frozen=True, kw_only=True):
    is_moe: bool = False
    num_experts: Size = 16_384
    num_experts_per_tok: Size = 64
    keep_window_size: Size = 2048

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        if self.num_experts_per_tok > math.isqrt(self.num_experts) ** 2:
            raise ValueError(f"{self.num_experts_per_tok} of {self.num_experts} experts in a square")


@arch("DogeForCausalLM", config=DogeConfig, hf=DOGE)
def doge(c: DogeConfig) -> Decoder:
    head_norm = RMSNorm(c.head_dim, c.norm_eps)
    mix = KeyBiasAttention.of(c, window=c.sliding_window or 0, qk_norm=head_norm, most_tokens=c.keep_window_size)
    mlp = MLP.of(c)
    if c.is_moe:
        mlp = RetrievingMLP.of(c, num_units=c.num_experts, top_k=c.num_experts_per_tok)
    return pre_norm(c, mix, mlp, layer=partial(WeightedStreamLayer, hidden_size=c.hidden_size))
