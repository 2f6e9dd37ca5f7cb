"""Llama 4: most layers are rotated and see a chunk, with q and k brought to length after that; the others know no
positions, see everything, and their queries grow with it. Experts take what is weighted already."""

from typing import Any

from cableway.workers.blocks.attention import Attention, LateNormAttention, Temper, TemperedAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.moe import InputMoE, Router
from cableway.workers.blocks.norm import RMSScale
from cableway.workers.models.config import Epsilon, Factor, MoEConfig, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF
from cableway.workers.models.glm import halves
from cableway.workers.models.hf_names import HF, LAYER, of_text
from cableway.workers.models.layouts import stacked_transposed
from cableway.workers.models.moe import some_sparse
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

LLAMA4 = HF | names(
    {
        "feed_forward.experts.gate_up_proj": Target("mlp.gate_up", layout=stacked_transposed),
        "feed_forward.experts.down_proj": Target("mlp.down", layout=stacked_transposed),
    },
    **LAYER,
)


class Llama4Config(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    intermediate_size_mlp: Size
    use_qk_norm: bool = True
    no_rope_layers: list[int]
    moe_layers: list[int]
    attention_chunk_size: Size | None = 8192
    attn_temperature_tuning: bool | int = True
    floor_scale: Size = 8192
    attn_scale: Factor = 0.1

    def __post_init__(self) -> None:
        MoEConfig.__post_init__(self)
        if len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(f"no_rope_layers says nothing of some of {self.num_hidden_layers} layers")

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        layers = range(config["num_hidden_layers"])
        period, step = config.get("no_rope_layer_interval") or 4, config.get("interleave_moe_layer_step") or 1
        config["no_rope_layers"] = config.get("no_rope_layers") or [(i + 1) % period for i in layers]
        if config.get("moe_layers") is None:
            config["moe_layers"] = list(layers[step - 1 :: step])

    def is_sparse(self, layer: int) -> bool:
        return layer in self.moe_layers


@arch("Llama4ForCausalLM", config=Llama4Config, hf=halves(LLAMA4), gguf=halves(GGUF))
@arch("Llama4ForConditionalGeneration", config=Llama4Config, hf=of_text(halves(LLAMA4)), like="Llama4")
def llama4(c: Llama4Config) -> Decoder:
    near_norm = RMSScale(c.head_dim, c.norm_eps) if c.use_qk_norm else None
    near = LateNormAttention.of(c, chunk=c.attention_chunk_size or 0, qk_norm=near_norm)
    far = Attention.of(c, rope=None)
    if c.attn_temperature_tuning:
        far = TemperedAttention.of(c, rope=None, temper=Temper(c.floor_scale, c.attn_scale, 1))
    moe = InputMoE.of(c, Router.of(c, score="sigmoid"), shared=MLP.of(c))
    mixes = [near if turns else far for turns in c.no_rope_layers[: c.num_hidden_layers]]
    return pre_norm(c, mixes, some_sparse(c, moe, MLP.of(c, ffn_size=c.intermediate_size_mlp)))
