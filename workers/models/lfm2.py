"""LFM 2: short convolutions, with attention in some layers; experts in the larger ones."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mamba import ShortConv
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import Count, Epsilon, Size, SomeMoEConfig
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF
from cableway.workers.models.hf_names import HF
from cableway.workers.models.moe import mixture, some_sparse
from cableway.workers.models.names import names
from cableway.workers.models.registry import arch

GGUF_LFM2 = GGUF | names({"token_embd_norm": "norm_out"})  # which is the first thing there is, in its own code


class Lfm2Config(SomeMoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    layer_types: list[str]
    conv_bias: bool = False
    conv_L_cache: Size = 3
    num_dense_layers: Count = 0
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        full = config.get("full_attn_idxs") or []
        kinds = ["full_attention" if i in full else "conv" for i in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)
        if config.get("block_auto_adjust_ff_dim", "num_experts" not in config):
            size = int(2 * config["intermediate_size"] / 3)
            if config.get("block_ffn_dim_multiplier") is not None:
                step = config.get("block_multiple_of", 256)
                size = -(-int(config["block_ffn_dim_multiplier"] * size) // step) * step
            config["intermediate_size"] = size

    def is_sparse(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.num_dense_layers


@arch("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", config=Lfm2Config, hf=HF, gguf=GGUF_LFM2)
def lfm2(c: Lfm2Config) -> Decoder:
    attention = Attention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps))
    conv = ShortConv(c.hidden_size, c.conv_L_cache, bias=c.conv_bias)
    mlps: Any = MLP.of(c)
    if c.num_experts:
        rule = {"score": "sigmoid", "correction": c.use_expert_bias, "renorm": 1e-6 if c.norm_topk_prob else None}
        mlps = some_sparse(c, mixture(c, scale=c.routed_scaling_factor, **rule))
    return pre_norm(c, c.by_layer({"full_attention": attention, "conv": conv}), mlps)
