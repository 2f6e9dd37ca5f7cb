"""Step 3: queries from narrow latents, one KV head, and experts beside a shared one but for the first layers."""

from typing import Any

from cableway.workers.blocks.attention import NarrowAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.models.config import Epsilon, MoEConfig, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.layouts import stacked
from cableway.workers.models.moe import mixture, some_sparse
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

STEP3 = HF | names(
    {
        "self_attn.inter_norm": "mix.latent_norm",
        "self_attn.wq": "mix.up",
        "moe.gate_proj": Target("mlp.gate_up", layout=stacked, parts=("gate",)),
        "moe.up_proj": Target("mlp.gate_up", layout=stacked, parts=("up",)),
        "moe.down_proj": Target("mlp.down", layout=stacked),
    },
    **LAYER,
)


class Step3Config(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    share_q_dim: Size
    share_expert_dim: Size
    moe_layers: tuple[int, ...]

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config.setdefault("num_key_value_heads", 1)
        layers = config.get("moe_layers_enum") or range(1, config["num_hidden_layers"])
        config["moe_layers"] = [int(i) for i in (layers.split(",") if isinstance(layers, str) else layers)]

    def is_sparse(self, layer: int) -> bool:
        return layer in self.moe_layers


@arch("Step3TextForCausalLM", config=Step3Config, hf=STEP3, like="Qwen2Moe")
def step3(c: Step3Config) -> Decoder:
    mix = NarrowAttention.of(c, latent=c.share_q_dim, eps=c.norm_eps)
    return pre_norm(c, mix, some_sparse(c, mixture(c, shared=MLP.of(c, ffn_size=c.share_expert_dim))))
