"""Hybrids of Mamba and attention: Jamba, Bamba, Granite 4 and Nemotron-H have some layers of attention, Falcon-H1 both
mixers in each layer. Layers of Nemotron-H are a mixer alone, or an MLP or experts without gates."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer, MixerSum, MLPLayer
from cableway.workers.blocks.mamba import Mamba, Mamba2
from cableway.workers.blocks.mlp import MLP, PlainMLP
from cableway.workers.blocks.moe import PlainMoE
from cableway.workers.blocks.norm import RMSNorm, Scale
from cableway.workers.models.config import Count, Epsilon, Factor, MoEConfig, Never, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS, PLAIN_MLP, TWO_MIXERS
from cableway.workers.models.gguf_names import MAMBA2 as GGUF_MAMBA2
from cableway.workers.models.hf_names import HF, LAYER, RECURRENT, known_as
from cableway.workers.models.layouts import scaled
from cableway.workers.models.moe import mixture, sigmoid_router, some_sparse
from cableway.workers.models.multipliers import GRANITE_MOE, GraniteConfig, multiplied
from cableway.workers.models.names import Names, Target, names
from cableway.workers.models.registry import arch

GRANITE_DENSE_HYBRID = GRANITE_MOE | names(
    {"shared_mlp.input_linear": "mlp.gate_up", "shared_mlp.output_linear": "mlp.down"}, **LAYER
)
NEMOTRON_H = HF | names(
    {
        "up_proj": "mlp.up",
        "down_proj": "mlp.down",
        "gate": "mlp.router.gate",
        "gate.e_score_correction_bias": "mlp.router.correction",
        "experts.{}.up_proj": "mlp.up.{}",
        "experts.{}.down_proj": "mlp.down.{}",
        "shared_experts.up_proj": "mlp.shared.up",
        "shared_experts.down_proj": "mlp.shared.down",
        "fc1_latent_proj": "mlp.narrow",
        "fc2_latent_proj": "mlp.widen",
    },
    prefix="backbone.layers.{}.mixer.",
    to="layers.{}.",
)


class JambaConfig(MoEConfig, frozen=True, kw_only=True):
    attn_layer_period: Size = 8
    attn_layer_offset: Count = 4
    expert_layer_period: Size = 2
    expert_layer_offset: Count = 1
    mamba_d_state: Size = 16
    mamba_d_conv: Size = 4
    mamba_expand: Size = 2
    mamba_dt_rank: Size
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False

    def is_sparse(self, layer: int) -> bool:
        return layer % self.expert_layer_period == self.expert_layer_offset and self.num_experts > 1


class HybridConfig(GraniteConfig, frozen=True, kw_only=True):
    """Attention and Mamba 2; of Granite with experts, multipliers, and attention that mostly knows no positions."""

    layer_types: list[str]
    mamba_n_heads: Size = 128
    mamba_d_head: Size = 64
    mamba_n_groups: Size = 1
    mamba_d_state: Size = 256
    mamba_d_conv: Size = 4
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    position_embedding_type: str | None = "rope"

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        indices = config.get("attn_layer_indices") or []
        kinds = ["attention" if i in indices else "mamba" for i in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)
        head_dim = config.get("mamba_d_head", "auto")
        if head_dim == "auto":
            head_dim = config.get("mamba_expand", 2) * config["hidden_size"] // config["mamba_n_heads"]
            config["mamba_d_head"] = head_dim
        if config["mamba_n_heads"] * head_dim != config.get("mamba_expand", 2) * config["hidden_size"]:
            raise ValueError("mamba_n_heads are not `mamba_expand` times as wide as hidden_size")

    def of_two(self, attention: Any, mamba: Any, **others: Any) -> list[Any]:
        """The one or the other by each layer's type, which has two names."""
        return self.by_layer(
            {"attention": attention, "full_attention": attention, "mamba": mamba, "linear_attention": mamba, **others}
        )


class BambaConfig(HybridConfig, frozen=True, kw_only=True):
    rotary_frac = 0.5


class NemotronHConfig(HybridConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    norm_topk_prob: bool = True
    moe_shared_expert_intermediate_size: Count = 0
    moe_latent_size: Size | None = None
    head_dim: Size = 128
    hidden_act: str = "relu2"
    mamba_n_groups: Size = 8
    mamba_d_state: Size = 128

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["time_step_limit"] = (config.get("time_step_min", 0.001), float("inf"))
        kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        pattern = config.get("hybrid_override_pattern", "")
        config["layer_types"] = config.get("layer_types") or [kinds.get(kind, kind) for kind in pattern]
        config["num_hidden_layers"] = len(config["layer_types"])
        if "moe" not in config["layer_types"]:
            config["n_routed_experts"] = 0


class FalconH1Config(HybridConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    layer_types: list[str] | None = None
    attention_bias: Never = False
    mlp_bias: Never = False
    projectors_bias: Never = False
    mamba_proj_bias: Never = False
    mamba_rms_norm: Never = False
    lm_head_multiplier: Factor = 1.0
    key_multiplier: Factor = 1.0
    attention_in_multiplier: Factor = 1.0
    attention_out_multiplier: Factor = 1.0
    ssm_in_multiplier: Factor = 1.0
    ssm_out_multiplier: Factor = 1.0
    ssm_multipliers: tuple[Factor, Factor, Factor, Factor, Factor] = (1.0,) * 5
    mlp_multipliers: tuple[Factor, Factor] = (1.0, 1.0)

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        wide = config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * config["hidden_size"]
        if wide != config["mamba_n_heads"] * config["mamba_d_head"]:
            raise ValueError("mamba_n_heads of mamba_d_head are not as wide as mamba_d_ssm")


def _falcon_h1_names(c: FalconH1Config) -> Names:
    """Multipliers of what linear maps take or give are taken into their weights."""
    sections = {part: c.ssm_in_multiplier * m for part, m in zip("zxbc", c.ssm_multipliers, strict=False)}
    sections["dt"] = c.ssm_in_multiplier * c.ssm_multipliers[4]
    scales = {
        "mamba.in_proj": Target("mix.mixes.0.project", layout=scaled(sections)),
        "mamba.out_proj": Target("mix.mixes.0.out", layout=scaled(c.ssm_out_multiplier)),
        "self_attn.q_proj": Target("mix.mixes.1.qkv.q", layout=scaled(c.attention_in_multiplier)),
        "self_attn.k_proj": Target("mix.mixes.1.qkv.k", layout=scaled(c.attention_in_multiplier * c.key_multiplier)),
        "self_attn.v_proj": Target("mix.mixes.1.qkv.v", layout=scaled(c.attention_in_multiplier)),
        "self_attn.o_proj": Target("mix.mixes.1.out", layout=scaled(c.attention_out_multiplier)),
        "feed_forward.gate_proj": Target("mlp.gate_up.gate", layout=scaled(c.mlp_multipliers[0])),
        "feed_forward.down_proj": Target("mlp.down", layout=scaled(c.mlp_multipliers[1])),
    }
    return HF | names(known_as(RECURRENT, "mamba.", to="mix.mixes.0.") | scales, **LAYER)


@arch("FalconH1ForCausalLM", config=FalconH1Config, hf=_falcon_h1_names, gguf=GGUF | TWO_MIXERS)
def falcon_h1(c: FalconH1Config) -> Decoder:
    mix = MixerSum([Mamba2.of(c, norm_eps=None), Attention.of(c)])
    return pre_norm(c, mix, on_embed=Scale(c.embedding_multiplier), on_logits=Scale(c.lm_head_multiplier))


@arch("JambaForCausalLM", config=JambaConfig, hf=HF, gguf=GGUF)
def jamba(c: JambaConfig) -> Decoder:
    norms = tuple(RMSNorm(size, c.norm_eps) for size in (c.mamba_dt_rank, c.mamba_d_state, c.mamba_d_state))
    sizes = (c.mamba_expand * c.hidden_size, c.mamba_d_state, c.mamba_dt_rank, c.mamba_d_conv)
    mix = Mamba(c.hidden_size, *sizes, bias=c.mamba_proj_bias, conv_bias=c.mamba_conv_bias, norms=norms)
    attention, layers = Attention.of(c, rope=None), range(c.num_hidden_layers)
    mixes = [attention if i % c.attn_layer_period == c.attn_layer_offset else mix for i in layers]
    return pre_norm(c, mixes, some_sparse(c, mixture(c)))


@arch("BambaForCausalLM", config=BambaConfig, hf=HF)
def bamba(c: BambaConfig) -> Decoder:
    return pre_norm(c, c.of_two(Attention.of(c), Mamba2.of(c, norm_eps=c.norm_eps)))


def _granite_names(c: HybridConfig) -> Names:
    return GRANITE_MOE if c.num_experts else GRANITE_DENSE_HYBRID


@arch("GraniteMoeHybridForCausalLM", config=HybridConfig, hf=_granite_names, gguf=GGUF_NEIGHBOURS | GGUF_MAMBA2)
def granite_hybrid(c: HybridConfig) -> Decoder:
    rope = c.rope() if c.position_embedding_type == "rope" else None
    shared = MLP.of(c, ffn_size=c.shared_intermediate_size, bias=False)
    mlp = mixture(c, shared=shared, renorm=0.0) if c.num_experts else shared
    attention = Attention.of(c, rope=rope, scale=c.attention_multiplier)
    return multiplied(c, c.of_two(attention, Mamba2.of(c, norm_eps=c.norm_eps)), mlp)


def _nemotron_experts(c: NemotronHConfig) -> PlainMoE:
    shared = PlainMLP.of(c, ffn_size=c.moe_shared_expert_intermediate_size)
    return PlainMoE.of(c, sigmoid_router(c), shared=shared, latent=c.moe_latent_size or 0, bias=c.mlp_bias)


@arch("NemotronHForCausalLM", config=NemotronHConfig, hf=NEMOTRON_H, gguf=GGUF | GGUF_MAMBA2 | PLAIN_MLP)
def nemotron_h(c: NemotronHConfig) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    mamba = Layer(norm_in=norm, mix=Mamba2.of(c, norm_eps=c.norm_eps))
    attention = Layer(norm_in=norm, mix=Attention.of(c, rope=None))
    others = {"mlp": MLPLayer(norm_in=norm, mlp=PlainMLP.of(c))}
    if c.num_experts:
        others["moe"] = MLPLayer(norm_in=norm, mlp=_nemotron_experts(c))
    return Decoder(c, c.of_two(attention, mamba, **others), norm_out=norm)
