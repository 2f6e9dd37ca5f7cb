"""Llama family: Llama 1-3, Mistral, CWM, Yi, and Qwen2 (biases on q, k and v; later layers may see a window)."""

from typing import Any

from cableway.workers.blocks.attention import Attention, Temper, TemperedAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.models.config import DecoderConfig, Never, Window, WindowedConfig
from cableway.workers.models.frames import near_and_far, pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS
from cableway.workers.models.hf_names import HF, of_text
from cableway.workers.models.registry import arch


class MistralConfig(DecoderConfig, frozen=True, kw_only=True):
    sliding_window: Window | None = 4096


class MinistralConfig(MistralConfig, frozen=True, kw_only=True):
    """All layers see a window where it is not said which."""

    global_period = 1 << 30


class CwmConfig(MinistralConfig, frozen=True, kw_only=True):
    """Every fourth layer sees everything, from the first on."""

    mlp_bias: Never = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        kinds = ["sliding_attention" if i % 4 else "full_attention" for i in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)


@arch("LlamaForCausalLM", config=DecoderConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
@arch("AquilaForCausalLM", "AquilaModel", config=DecoderConfig, hf=HF, like="Llama")
@arch("XverseForCausalLM", config=DecoderConfig, hf=HF, gguf=GGUF_NEIGHBOURS, like="Llama")
@arch("NanbeigeForCausalLM", config=DecoderConfig, hf=HF, like="Llama")
@arch("YiForCausalLM", config=DecoderConfig, hf=HF, like="Llama")
def llama(c: DecoderConfig) -> Decoder:
    # Relatives of Llama save biases without a word about them in the config: one is used where there is one.
    bias, mlp_bias = c.attention_bias or None, c.mlp_bias or None
    return pre_norm(c, Attention.of(c, bias=bias, out_bias=bias), MLP.of(c, bias=mlp_bias))


@arch("MistralForCausalLM", config=MistralConfig, hf=HF)
def mistral(c: MistralConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, window=c.sliding_window or 0))


@arch("Ministral3ForCausalLM", config=MistralConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
@arch("Mistral3ForConditionalGeneration", config=MistralConfig, hf=of_text(HF), like="Ministral3")
def ministral3(c: MistralConfig) -> Decoder:
    scale = c.rope_parameters.get("llama_4_scaling_beta")
    if not scale:
        return mistral(c)
    temper = Temper(c.rope_parameters["original_max_position_embeddings"], scale)
    return pre_norm(c, TemperedAttention.of(c, window=c.sliding_window or 0, temper=temper))


@arch("MinistralForCausalLM", config=MinistralConfig, hf=HF)
@arch("CwmForCausalLM", config=CwmConfig, hf=HF)
def ministral(c: MinistralConfig) -> Decoder:
    return pre_norm(c, near_and_far(c))


@arch("Qwen2ForCausalLM", config=WindowedConfig, hf=HF, gguf=GGUF)
@arch("MiMoForCausalLM", config=WindowedConfig, hf=HF, like="Qwen2")
@arch("Qwen2VLForConditionalGeneration", config=WindowedConfig, hf=of_text(HF), like="Qwen2")
@arch("Qwen2_5_VLForConditionalGeneration", config=WindowedConfig, hf=of_text(HF), like="Qwen2")
def qwen2(c: WindowedConfig) -> Decoder:
    return pre_norm(c, [Attention.of(c, window=window, bias=True) for window in c.windows()])
