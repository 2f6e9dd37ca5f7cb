"""Differential attention: DiffLlama, and Motif, whose MLPs have PolyNorm for activation and, in the larger model, whose
noise heads serve several signal heads each."""

from typing import Any

from cableway.kernels.attention_plan import Scores
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.differential import DifferentialAttention
from cableway.workers.blocks.mlp import MLP, PolyNorm
from cableway.workers.blocks.norm import RMSNorm, RMSScale
from cableway.workers.models.config import DecoderConfig, Epsilon, Never, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.hf_names import HF, LAYER, MIX
from cableway.workers.models.layouts import in_halves
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

MOTIF = HF | names({"mlp.act_fn.weight": "mlp.act.factors", "mlp.act_fn.bias": "mlp.act.offset"}, **LAYER)
DIFFLLAMA = HF | names({f"{part}_proj": Target(f"qkv.{part}", layout=in_halves) for part in "qkv"}, **MIX)


class DiffLlamaConfig(DecoderConfig, frozen=True, kw_only=True):
    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        if self.num_key_value_heads % 2:
            raise ValueError(f"{self.num_key_value_heads} heads are no pairs")


class MotifConfig(DiffLlamaConfig, frozen=True, kw_only=True):
    attn_rms_norm_eps: Epsilon = 1e-5
    use_bias: bool = False
    use_sliding_window: Never = False
    num_noise_heads: Size
    k_ratio: Size = 1

    def __post_init__(self) -> None:
        DiffLlamaConfig.__post_init__(self)
        noises = self.num_noise_heads
        if self.num_attention_heads % noises or noises % (self.num_key_value_heads // 2) or self.k_ratio != 1:
            heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"{heads} heads are no groups with one of {noises} noise heads each")

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        if config.get("hidden_act") != "poly_norm":
            raise ValueError(f"hidden_act {config.get('hidden_act')!r} is not poly_norm")
        config["num_noise_heads"] = config.get("num_noise_heads") or config["num_attention_heads"] // 2


@arch("DiffLlamaForCausalLM", config=DiffLlamaConfig, hf=DIFFLLAMA)
def diffllama(c: DiffLlamaConfig) -> Decoder:
    norm = RMSScale(2 * c.head_dim, c.norm_eps)
    return differential(c, c.num_attention_heads // 2, 0, norm, c.attention_bias, MLP.of(c))


@arch("MotifForCausalLM", config=MotifConfig, hf=MOTIF, like="DiffLlama")
def motif(c: MotifConfig) -> Decoder:
    mlp = MLP.of(c, act=PolyNorm(c.intermediate_size), bias=c.use_bias)
    return differential(c, c.num_noise_heads, -1, RMSNorm(2 * c.head_dim, c.attn_rms_norm_eps), c.use_bias, mlp)


def differential(
    c: DecoderConfig, num_groups: int, first_depth: int, head_norm: RMSNorm | RMSScale, bias: bool, mlp: MLP
) -> Decoder:
    def mix(number: int) -> DifferentialAttention:
        return DifferentialAttention(
            c.hidden_size,
            num_groups,
            c.num_key_value_heads // 2,
            c.head_dim,
            Scores(c.head_dim**-0.5),
            rope=c.rope(),
            num_signals=c.num_attention_heads // num_groups - 1,
            depth=first_depth + number,
            norm=head_norm,
            bias=bias,
            out_bias=bias,
        )

    return pre_norm(c, [mix(number) for number in range(c.num_hidden_layers)], mlp)
