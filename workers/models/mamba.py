"""State space models: Mamba, FalconMamba (norms inside), Mamba 2."""

from typing import Any

from cableway.workers.blocks.block import Mixer
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer
from cableway.workers.blocks.mamba import Mamba, Mamba2
from cableway.workers.blocks.norm import RMSNorm, RMSScale
from cableway.workers.models.config import DecoderConfig, Epsilon, Size
from cableway.workers.models.gguf_names import GGUF
from cableway.workers.models.gguf_names import MAMBA2 as GGUF_MAMBA2
from cableway.workers.models.hf_names import HF
from cableway.workers.models.registry import arch


class MambaConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    state_size: Size = 16
    conv_kernel: Size = 4
    mamba_dt_rank: Size
    use_bias: bool = False
    use_conv_bias: bool = True
    mixer_rms_eps: Epsilon = 1e-6
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        hidden = config["hidden_size"]
        config["num_attention_heads"] = 1
        config["intermediate_size"] = config.get("intermediate_size") or int(config.get("expand", 2) * hidden)


class Mamba2Config(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    mamba_n_heads: Size = 128
    mamba_d_head: Size = 64
    mamba_n_groups: Size = 8
    mamba_d_state: Size = 128
    mamba_d_conv: Size = 4
    mamba_proj_bias: bool = False
    mamba_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["num_attention_heads"], config["intermediate_size"] = 1, 1
        config["mamba_d_head"], config["mamba_proj_bias"] = config["head_dim"], config.get("use_bias", False)
        if config["num_heads"] * config["head_dim"] != config.get("expand", 2) * config["hidden_size"]:
            raise ValueError("heads are not `expand` times as wide as hidden_size")


@arch("MambaForCausalLM", config=MambaConfig, hf=HF, gguf=GGUF)
def mamba(c: MambaConfig) -> Decoder:
    return mamba_decoder(c, None)


@arch("FalconMambaForCausalLM", config=MambaConfig, hf=HF, gguf=GGUF)
def falcon_mamba(c: MambaConfig) -> Decoder:
    sizes, eps = (c.mamba_dt_rank, c.state_size), c.mixer_rms_eps
    return mamba_decoder(c, (RMSScale(sizes[0], eps), RMSScale(sizes[1], eps), RMSScale(sizes[1], eps)))


def mamba_decoder(c: MambaConfig, norms: Any) -> Decoder:
    sizes = (c.intermediate_size, c.state_size, c.mamba_dt_rank, c.conv_kernel)
    return mixers(c, Mamba(c.hidden_size, *sizes, bias=c.use_bias, conv_bias=c.use_conv_bias, norms=norms))


@arch("Mamba2ForCausalLM", config=Mamba2Config, hf=HF, gguf=GGUF | GGUF_MAMBA2)
def mamba2(c: Mamba2Config) -> Decoder:
    return mixers(c, Mamba2.of(c, norm_eps=c.norm_eps))


def mixers(c: DecoderConfig, mix: Mixer) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    return Decoder(c, [Layer(norm_in=norm, mix=mix)] * c.num_hidden_layers, norm_out=norm)
