"""Mixtures of experts on Llama's frame: Mixtral, PhiMoE, OLMoE, Qwen 2 and 3, GLM 4.5, Dots, Ernie 4.5, Hunyuan, Solar
Open, MiniMax M2, Granite, DBRX, GPT-OSS, DeepSeek V1, Bailing. Routers differ, and which layers are dense."""

from typing import Any

from cableway.workers.blocks.attention import Attention, ClippedAttention, LateNormAttention, SinkAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP, ClampedGate
from cableway.workers.blocks.moe import Groups, MoE, Router, SparseMixer
from cableway.workers.blocks.norm import LayerNorm, RMSNorm
from cableway.workers.models.config import Count, Epsilon, Factor, MoEConfig, Size, Window
from cableway.workers.models.frames import near_and_far, pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_LAYER, GGUF_NEIGHBOURS, MID_NORM
from cableway.workers.models.glm import halves
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.layouts import stacked, stacked_in_turns, stacked_transposed
from cableway.workers.models.names import Target, names
from cableway.workers.models.olmo import joint_norms
from cableway.workers.models.registry import arch

GPT_OSS = HF | names(
    {
        "mlp.experts.gate_up_proj": Target("mlp.gate_up", layout=stacked_in_turns),
        "mlp.experts.gate_up_proj_bias": Target("mlp.gate_up", layout=stacked_in_turns, leaf="bias"),
        "mlp.experts.down_proj": Target("mlp.down", layout=stacked_in_turns),
        "mlp.experts.down_proj_bias": Target("mlp.down", layout=stacked_in_turns, leaf="bias"),
    },
    **LAYER,
)
"""A part of one expert alone is `in_turns` with itself: as it is."""
DBRX = HF | names(
    {
        "ffn.experts.mlp.w1": Target("mlp.gate_up", layout=stacked, parts=("gate",)),
        "ffn.experts.mlp.v1": Target("mlp.gate_up", layout=stacked, parts=("up",)),
        "ffn.experts.mlp.w2": Target("mlp.down", layout=stacked_transposed),
    },
    prefix="transformer.blocks.{}.",
    to="layers.{}.",
)
GGUF_DBRX = names({"attn_output_norm": "norm_mlp"}, **GGUF_LAYER)
BAILING = HF | names({"attention.query_key_value": "mix.qkv"}, **LAYER)


class PhiMoEConfig(MoEConfig, frozen=True, kw_only=True):
    router_jitter_noise: Factor = 0.01
    lm_head_bias: bool = False


class OlmoeConfig(MoEConfig, frozen=True, kw_only=True):
    clip_qkv: Factor | None = None


class QwenMoEConfig(MoEConfig, frozen=True, kw_only=True):
    """Every `decoder_sparse_step`-th layer has experts, but for those of `mlp_only_layers`."""

    shared_expert_intermediate_size: Count = 0
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    qkv_bias: bool = True
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def windows(self) -> list[int]:
        window = (self.use_sliding_window and self.sliding_window) or 0
        if self.layer_types is None:
            return [window if i < self.max_window_layers and i % 2 == 0 else 0 for i in range(self.num_hidden_layers)]
        return self.by_layer({"full_attention": 0, "sliding_attention": window})

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class DeepseekMoEConfig(MoEConfig, frozen=True, kw_only=True):
    moe_layer_freq: Size = 1
    use_qk_norm: bool = False
    num_nextn_predict_layers: Count = 0

    def is_sparse(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class BailingConfig(DeepseekMoEConfig, frozen=True, kw_only=True):
    use_qkv_bias: bool = False
    use_bias: bool = False
    norm_topk_prob: bool = True


class SolarOpenConfig(DeepseekMoEConfig, frozen=True, kw_only=True):
    norm_topk_prob: bool = True


class Glm4MoEConfig(SolarOpenConfig, frozen=True, kw_only=True):
    rotary_frac = 0.5


class Dots1Config(DeepseekMoEConfig, frozen=True, kw_only=True):
    max_window_layers: Count = 62

    def windows(self) -> list[int]:
        if self.layer_types is not None:
            return super().windows()
        return [(i >= self.max_window_layers and self.sliding_window) or 0 for i in range(self.num_hidden_layers)]


class ErnieMoEConfig(MoEConfig, frozen=True, kw_only=True):
    use_bias: bool = False
    moe_layer_start_index: Count = 1
    moe_layer_end_index: int = -1
    moe_layer_interval: Size = 1
    tie_word_embeddings: bool = True

    def is_sparse(self, layer: int) -> bool:
        end = self.num_hidden_layers - 1 if self.moe_layer_end_index == -1 else self.moe_layer_end_index
        return (layer + 1) % self.moe_layer_interval == 0 and self.moe_layer_start_index <= layer <= end


class HunyuanMoEConfig(MoEConfig, frozen=True, kw_only=True):
    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        for key in ("moe_topk", "num_shared_expert", "moe_intermediate_size", "num_experts_per_tok"):
            if isinstance(config.get(key), list):  # one a layer, and all alike in what is published
                config[key] = config[key][0]


class DbrxConfig(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    clip_qkv: Factor | None = None

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        attention, ffn = config["attn_config"], config["ffn_config"]
        if ffn.get("moe_normalize_expert_weights") not in (1, None):
            raise ValueError("moe_normalize_expert_weights is neither 1 nor null")
        config |= {
            "num_key_value_heads": attention.get("kv_n_heads", 1),
            "clip_qkv": attention.get("clip_qkv"),
            "rope_theta": attention.get("rope_theta", config.get("rope_theta")),
            "intermediate_size": ffn["ffn_hidden_size"],
            "num_experts": ffn["moe_num_experts"],
            "num_experts_per_tok": ffn["moe_top_k"],
            "norm_topk_prob": ffn.get("moe_normalize_expert_weights") is not None,
            "hidden_act": (ffn.get("ffn_act_fn") or {}).get("name", "silu"),
        }


class GptOssConfig(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    sliding_window: Window = 128
    global_period = 2
    attention_bias: bool = True
    swiglu_alpha: Factor = 1.702
    swiglu_limit: Factor = 7.0


def mixture(c: MoEConfig, *, shared: Any = None, shared_gate: bool = False, **rule: Any) -> MoE:
    """Experts chosen by softmax unless it is said otherwise."""
    router = Router.of(c, **{"renorm": 0.0 if c.norm_topk_prob else None, **rule})
    return MoE.of(c, router, shared=shared, shared_gate=shared_gate)


def shared_experts(c: MoEConfig, **options: Any) -> MLP | None:
    """Experts that every token goes through, as one MLP."""
    return MLP.of(c, ffn_size=c.moe_intermediate_size * c.n_shared_experts, **options) if c.n_shared_experts else None


def sigmoid_router(c: MoEConfig) -> Router:
    """That of DeepSeek V3: sigmoid scores, corrected and grouped for the choice."""
    groups, renorm = Groups(c.n_group, c.topk_group, 2), 1e-20 if c.norm_topk_prob else None
    return Router.of(c, score="sigmoid", correction=True, groups=groups, renorm=renorm, scale=c.routed_scaling_factor)


def sigmoid_mixture(c: MoEConfig) -> MoE:
    """The experts of DeepSeek V3."""
    return MoE.of(c, sigmoid_router(c), shared=shared_experts(c))


def some_sparse(c: Any, moe: MoE, dense: MLP | None = None) -> list[Any]:
    """The MLP of each layer: experts where the config says so."""
    dense = dense or MLP.of(c)
    return [moe if c.is_sparse(i) else dense for i in range(c.num_hidden_layers)]


@arch("MixtralForCausalLM", config=MoEConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
def mixtral(c: MoEConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, window=c.sliding_window or 0), mixture(c, renorm=0.0))


@arch("PhimoeForCausalLM", config=PhiMoEConfig, hf=HF, gguf=GGUF)
@arch("PhiMoEForCausalLM", config=PhiMoEConfig, hf=HF, like="Phimoe")
def phimoe(c: PhiMoEConfig) -> Decoder:
    mix, norm = Attention.of(c, window=c.sliding_window or 0), LayerNorm(c.hidden_size, c.norm_eps)
    router = SparseMixer(c.hidden_size, c.num_experts, c.num_experts_per_tok, jitter=c.router_jitter_noise)
    return pre_norm(c, mix, MoE.of(c, router), norm, head_bias=c.lm_head_bias)


@arch("OlmoeForCausalLM", config=OlmoeConfig, hf=HF, gguf=GGUF)
def olmoe(c: OlmoeConfig) -> Decoder:
    return pre_norm(c, ClippedAttention.of(c, clip=c.clip_qkv, qk_norm=joint_norms(c)), mixture(c))


@arch("Qwen2MoeForCausalLM", config=QwenMoEConfig, hf=HF, gguf=GGUF)
def qwen2_moe(c: QwenMoEConfig) -> Decoder:
    mixes = [Attention.of(c, window=window, bias=c.qkv_bias) for window in c.windows()]
    moe = mixture(c, shared=MLP.of(c, ffn_size=c.shared_expert_intermediate_size), shared_gate=True)
    return pre_norm(c, mixes, some_sparse(c, moe))


@arch("Qwen3MoeForCausalLM", config=QwenMoEConfig, hf=HF, gguf=GGUF)
def qwen3_moe(c: QwenMoEConfig) -> Decoder:
    window = (c.use_sliding_window and c.sliding_window) or 0
    mix = Attention.of(c, window=window, qk_norm=RMSNorm(c.head_dim, c.norm_eps))
    return pre_norm(c, mix, some_sparse(c, mixture(c)))


@arch("DeepseekForCausalLM", config=DeepseekMoEConfig, hf=HF, gguf=GGUF_NEIGHBOURS, like="Qwen2Moe")
def deepseek(c: DeepseekMoEConfig) -> Decoder:
    return pre_norm(c, Attention.of(c), some_sparse(c, mixture(c, shared=shared_experts(c))))


@arch("BailingMoeForCausalLM", config=BailingConfig, hf=BAILING, like="Qwen2Moe")
def bailing(c: BailingConfig) -> Decoder:
    mix = Attention.of(c, bias=c.use_qkv_bias or c.use_bias, out_bias=c.use_bias)
    return pre_norm(c, mix, some_sparse(c, mixture(c, shared=shared_experts(c))))


@arch("Glm4MoeForCausalLM", config=Glm4MoEConfig, hf=HF, gguf=GGUF | MID_NORM)
@arch("SolarOpenForCausalLM", config=SolarOpenConfig, hf=HF)
def glm4_moe(c: SolarOpenConfig) -> Decoder:
    head_norm = RMSNorm(c.head_dim, c.norm_eps) if c.use_qk_norm else None
    return pre_norm(c, Attention.of(c, out_bias=False, qk_norm=head_norm), some_sparse(c, sigmoid_mixture(c)))


@arch("Dots1ForCausalLM", config=Dots1Config, hf=HF, gguf=GGUF)
def dots1(c: Dots1Config) -> Decoder:
    norm = RMSNorm(c.head_dim, c.norm_eps)
    mixes = [Attention.of(c, window=window, qk_norm=norm) for window in c.windows()]
    return pre_norm(c, mixes, some_sparse(c, sigmoid_mixture(c)))


@arch("Ernie4_5_MoeForCausalLM", config=ErnieMoEConfig, hf=halves(HF), gguf=GGUF_NEIGHBOURS)
def ernie_moe(c: ErnieMoEConfig) -> Decoder:
    bias = c.use_bias
    moe = mixture(c, shared=shared_experts(c, bias=bias), correction=True, renorm=0.0)
    return pre_norm(c, Attention.of(c, bias=bias, out_bias=bias), some_sparse(c, moe, MLP.of(c, bias=bias)))


@arch("HunYuanMoEV1ForCausalLM", config=HunyuanMoEConfig, hf=HF, gguf=GGUF)
def hunyuan_moe(c: HunyuanMoEConfig) -> Decoder:
    mix = LateNormAttention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps))
    return pre_norm(c, mix, mixture(c, shared=MLP.of(c), renorm=0.0))


@arch("MiniMaxM2ForCausalLM", config=MoEConfig, hf=HF, gguf=GGUF)
def minimax_m2(c: MoEConfig) -> Decoder:
    mix = Attention.of(c, qk_norm=joint_norms(c))
    return pre_norm(c, mix, mixture(c, score="sigmoid", correction=True, renorm=0.0))


@arch("DbrxForCausalLM", config=DbrxConfig, hf=DBRX, gguf=GGUF | GGUF_DBRX)
def dbrx(c: DbrxConfig) -> Decoder:
    norm = LayerNorm(c.hidden_size, c.norm_eps, bias=False)
    return pre_norm(c, ClippedAttention.of(c, clip=c.clip_qkv), mixture(c), norm)


@arch("GptOssForCausalLM", config=GptOssConfig, hf=GPT_OSS, gguf=GGUF | MID_NORM)
def gpt_oss(c: GptOssConfig) -> Decoder:
    act, router = ClampedGate(c.swiglu_alpha, c.swiglu_limit), Router.of(c, renorm=0.0, bias=True)
    return pre_norm(c, near_and_far(c, SinkAttention), MoE.of(c, router, act=act, bias=True))
