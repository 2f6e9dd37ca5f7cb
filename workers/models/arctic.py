"""Arctic: every other layer has, beside a dense MLP, experts that start from what the layer is given."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import BypassLayer, Layer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import MoEConfig, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF_LAYER, GGUF_NEIGHBOURS
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.layouts import stacked
from cableway.workers.models.moe import mixture, some_sparse
from cableway.workers.models.names import Names, Target, names, of_mlp
from cableway.workers.models.registry import arch


class ArcticConfig(MoEConfig, frozen=True, kw_only=True):
    moe_layer_frequency: Size = 2
    parallel_attn_mlp_res: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["parallel_attn_mlp_res"] = config.get("parallel_attn_mlp_res") and config.get("use_residual", True)

    def is_sparse(self, layer: int) -> bool:
        return (layer + 1) % self.moe_layer_frequency == 0


PAST = names(
    {
        "ffn_norm_exps": "norm_moe",
        "ffn_gate_inp": "moe.router.gate",
        "ffn_gate_exps": Target("moe.gate_up", layout=stacked, parts=("gate",)),
        "ffn_up_exps": Target("moe.gate_up", layout=stacked, parts=("up",)),
        "ffn_down_exps": Target("moe.down", layout=stacked),
    },
    **GGUF_LAYER,
)


def _names(c: ArcticConfig) -> Names:
    if not c.parallel_attn_mlp_res:
        return HF
    past = {
        "block_sparse_moe.gate": "moe.router.gate",
        "block_sparse_moe.experts.{}.w1": "moe.gate_up.{}.gate",
        "block_sparse_moe.experts.{}.w3": "moe.gate_up.{}.up",
        "block_sparse_moe.experts.{}.w2": "moe.down.{}",
        "residual_layernorm": "norm_mlp",
        **of_mlp("residual_mlp.*", gate="w1", up="w3", down="w2"),
    }
    sparse = [i for i in range(c.num_hidden_layers) if c.is_sparse(i)]
    norms = {f"model.layers.{i}.post_attention_layernorm": f"layers.{i}.norm_moe" for i in sparse}
    return HF | names(past, **LAYER) | names(norms)


@arch("ArcticForCausalLM", config=ArcticConfig, hf=_names, gguf=GGUF_NEIGHBOURS | PAST, like="Mixtral")
def arctic(c: ArcticConfig) -> Decoder:
    norm, mix = RMSNorm(c.hidden_size, c.norm_eps), Attention.of(c)
    moe = mixture(c, renorm=0.0 if c.num_experts_per_tok > 1 else None)
    if not c.parallel_attn_mlp_res:
        return pre_norm(c, mix, some_sparse(c, moe))
    dense, narrow = Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c)), MLP.of(c, ffn_size=c.hidden_size)
    sparse = BypassLayer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=narrow, norm_moe=norm, moe=moe)
    return Decoder(c, [sparse if c.is_sparse(i) else dense for i in range(c.num_hidden_layers)], norm_out=norm)
