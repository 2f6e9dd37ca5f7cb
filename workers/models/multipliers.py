"""Granite, with experts or without, MiniCPM, TeleFLM: Llama with multipliers of embeddings, of what layers give, and of
logits."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import Scale
from cableway.workers.models.config import Count, Factor, SomeMoEConfig
from cableway.workers.models.frames import sandwich
from cableway.workers.models.gguf_names import GGUF_NEIGHBOURS
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.layouts import stacked
from cableway.workers.models.moe import mixture
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

GRANITE_MOE = HF | names(
    {
        "block_sparse_moe.input_linear": Target("mlp.gate_up", layout=stacked),
        "block_sparse_moe.output_linear": Target("mlp.down", layout=stacked),
        "shared_mlp.input_linear": "mlp.shared.gate_up",
        "shared_mlp.output_linear": "mlp.shared.down",
    },
    **LAYER,
)


class GraniteConfig(SomeMoEConfig, frozen=True, kw_only=True):
    shared_intermediate_size: Count = 0
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    attention_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0


class MiniCPMConfig(GraniteConfig, frozen=True, kw_only=True):
    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        config["embedding_multiplier"] = config.get("scale_emb", 1)
        config["residual_multiplier"] = config.get("scale_depth", num_layers**0.5) / num_layers**0.5
        config["attention_multiplier"] = (config.get("head_dim") or hidden // config["num_attention_heads"]) ** -0.5
        config["logits_scaling"] = hidden / config.get("dim_model_base", hidden)


class TeleFLMConfig(MiniCPMConfig, frozen=True, kw_only=True):
    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        super().derive(config)
        if config.get("use_mup"):
            config["embedding_multiplier"] = config["input_mult"]
            config["logits_scaling"] = config["mup_scale_factor"] / config["output_mult"]


@arch("GraniteForCausalLM", config=GraniteConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
@arch("MiniCPMForCausalLM", config=MiniCPMConfig, hf=HF, gguf=GGUF_NEIGHBOURS, like="Granite")
@arch("TeleFLMForCausalLM", "TeleFLM", config=TeleFLMConfig, hf=HF, like="Granite")
@arch("GraniteMoeForCausalLM", config=GraniteConfig, hf=GRANITE_MOE, gguf=GGUF_NEIGHBOURS)
@arch("GraniteMoeSharedForCausalLM", config=GraniteConfig, hf=GRANITE_MOE, gguf=GGUF_NEIGHBOURS)
def granite(c: GraniteConfig) -> Decoder:
    mlp, shared = MLP.of(c), None
    if c.num_experts:
        if c.shared_intermediate_size:
            shared = MLP.of(c, ffn_size=c.shared_intermediate_size)
        mlp = mixture(c, shared=shared, renorm=0.0)
    return multiplied(c, Attention.of(c, scale=c.attention_multiplier), mlp)


def multiplied(c: Any, mix: Any, mlp: Any = None) -> Decoder:
    """Layers before norms, with the multipliers of the config."""
    less, embed, logits = Scale(c.residual_multiplier), Scale(c.embedding_multiplier), Scale(1 / c.logits_scaling)
    return sandwich(c, mix, mlp, mix_out=less, mlp_out=less, on_embed=embed, on_logits=logits)
