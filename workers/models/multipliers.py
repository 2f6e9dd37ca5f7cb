"""Granite, MiniCPM, TeleFLM: Llama with multipliers of embeddings, sublayers' results and logits."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.norm import Scale
from cableway.workers.models.config import DecoderConfig, Factor
from cableway.workers.models.frames import sandwich
from cableway.workers.models.gguf_names import GGUF_NEIGHBOURS
from cableway.workers.models.names import HF
from cableway.workers.models.registry import arch, relative


class GraniteConfig(DecoderConfig, frozen=True, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    attention_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0


class MiniCPMConfig(GraniteConfig, frozen=True, kw_only=True):
    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        config["embedding_multiplier"] = config.get("scale_emb", 1)
        config["residual_multiplier"] = config.get("scale_depth", num_layers**0.5) / num_layers**0.5
        config["attention_multiplier"] = (config.get("head_dim") or hidden // config["num_attention_heads"]) ** -0.5
        config["logits_scaling"] = hidden / config.get("dim_model_base", hidden)


class TeleFLMConfig(GraniteConfig, frozen=True, kw_only=True):
    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        MiniCPMConfig.derive(config)
        if config.get("use_mup"):
            config["embedding_multiplier"] = config["input_mult"]
            config["logits_scaling"] = config["mup_scale_factor"] / config["output_mult"]


@arch("GraniteForCausalLM", config=GraniteConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
@arch("MiniCPMForCausalLM", config=MiniCPMConfig, hf=HF, gguf=GGUF_NEIGHBOURS, verified=relative("Granite"))
@arch("TeleFLMForCausalLM", "TeleFLM", config=TeleFLMConfig, hf=HF, verified=relative("Granite"))
def granite(c: GraniteConfig) -> Decoder:
    return multiplied(c, Attention.of(c, scale=c.attention_multiplier))


def multiplied(c: Any, mix: Any, mlp: Any = None) -> Decoder:
    """Layers before norms, with the multipliers of the config."""
    less, embed, logits = Scale(c.residual_multiplier), Scale(c.embedding_multiplier), Scale(1 / c.logits_scaling)
    return sandwich(c, mix, mlp, mix_out=less, mlp_out=less, on_embed=embed, on_logits=logits)
