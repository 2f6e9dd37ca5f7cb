"""GLM: Llama with biases on q, k and v that rotates neighbouring pairs, of half of each head. GLM 4 0414 adds norms
after each sublayer; ChatGLM 2 to 4 are the same model as GLM under names of its own."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.models.config import DecoderConfig, Epsilon, Size
from cableway.workers.models.frames import pre_norm, sandwich
from cableway.workers.models.gguf_names import FUSED_MLP, GGUF
from cableway.workers.models.hf_names import HF
from cableway.workers.models.names import Names, interleaved, names
from cableway.workers.models.registry import arch

# What others have group after group and without a gate, ChatGLM has part after part and with one.
CHATGLM = HF | names(
    {"self_attention.query_key_value": "mix.qkv", "mlp.dense_h_to_4h": "mlp.gate_up"},
    prefix="transformer.encoder.layers.{}.",
    to="layers.{}.",
)


class GlmConfig(DecoderConfig, frozen=True, kw_only=True):
    head_dim: Size = 128
    norm_eps: Epsilon = 1.5625e-07
    attention_bias: bool = True
    rotary_frac = 0.5


class ChatGLMConfig(DecoderConfig, frozen=True, kw_only=True):
    add_qkv_bias: bool = False
    add_bias_linear: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        if config.get("multi_query_attention"):
            config["num_key_value_heads"] = config["multi_query_group_num"]
        rotation = {"rope_theta": 10_000.0 * config.get("rope_ratio", 1.0), "partial_rotary_factor": 0.5}
        config["rope_parameters"] = rotation


def halves(scheme: Names) -> Any:
    """The scheme for a config, whose rotated pairs are neighbours."""
    return lambda c: interleaved(scheme, c.rope().rotary_dim)


@arch("GlmForCausalLM", config=GlmConfig, hf=halves(HF), gguf=halves(GGUF | FUSED_MLP))
def glm(c: GlmConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, out_bias=False))


@arch("Glm4ForCausalLM", config=GlmConfig, hf=halves(HF), gguf=halves(GGUF | FUSED_MLP))
def glm4(c: GlmConfig) -> Decoder:
    return sandwich(c, Attention.of(c, out_bias=False))


@arch("ChatGLMModel", "ChatGLMForConditionalGeneration", config=ChatGLMConfig, hf=halves(CHATGLM), like="Glm")
def chatglm(c: ChatGLMConfig) -> Decoder:
    bias = c.add_bias_linear
    return pre_norm(c, Attention.of(c, bias=bias or c.add_qkv_bias, out_bias=bias), MLP.of(c, bias=bias))
