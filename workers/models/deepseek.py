"""Latent attention: DeepSeek V2, V3, R1, Moonlight and Kimi K2 (which say they are V3), V3.2 and GLM 5, which choose
what tokens see, GLM 4.7 Flash, MiniCPM 3, and LongCat, whose layers are two with a mixture of experts that bridges
both."""

from functools import partial
from typing import Any

from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.latent import LatentAttention, LatentSizes
from cableway.workers.blocks.layers import ShortcutLayer
from cableway.workers.blocks.linear import Axis
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.moe import Groups, IdentityMoE, Router
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.rope import yarn_length
from cableway.workers.blocks.sparse import Index, SparseLatentAttention
from cableway.workers.models.config import Count, Never, Size
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_MIX
from cableway.workers.models.hf_names import HF, LAYER
from cableway.workers.models.layouts import by_group
from cableway.workers.models.moe import DeepseekMoEConfig, mixture, shared_experts, sigmoid_mixture, some_sparse
from cableway.workers.models.multipliers import MiniCPMConfig, multiplied
from cableway.workers.models.names import Names, Target, names, neighbours_to_halves, of_mlp
from cableway.workers.models.registry import arch


def last_neighbours(part: str, axis: Axis, rope_dim: int) -> Any:
    """Of each head the last numbers are rotated, as neighbours."""
    return None if part == "latent" else neighbours_to_halves(part, axis, rope_dim, first=axis.unit - rope_dim)


def latent_names(prefix: str, to: str, rope_dim: int) -> Names:
    """Names of latent attention. `rope_dim`: of each head, whose last numbers are rotated as neighbours; 0 = halves."""
    turned = partial(last_neighbours, rope_dim=rope_dim) if rope_dim else None
    return names(
        {
            "q_a_proj": "q_down",
            "q_a_layernorm": "q_norm",
            "q_b_proj": Target("q", turned),
            "q_proj": Target("q", turned),
            "kv_a_proj_with_mqa": Target("kv_down", turned),
            "kv_a_layernorm": "kv_norm",
            "kv_b_proj": Target("kv_up", layout=by_group),
            "o_proj": "out",
        },
        ignored=("rotary_emb",),
        prefix=prefix,
        to=to,
    )


def _names(c: Any) -> Names:
    rope_dim = c.qk_rope_head_dim if c.rope_interleave else 0
    return HF | latent_names("model.layers.{}.self_attn.", "layers.{}.mix.", rope_dim)


def _gguf(c: Any) -> Names:
    turned = partial(last_neighbours, rope_dim=c.qk_rope_head_dim)
    q, kv = Target("q", turned), Target("kv_down", turned)
    return GGUF | names({"attn_q": q, "attn_q_b": q, "attn_kv_a_mqa": kv}, **GGUF_MIX)


LONGCAT = HF | names(
    {
        "input_layernorm.{}": "norms_in.{}",
        "post_attention_layernorm.{}": "norms_mlp.{}",
        **of_mlp("mlps.{}.*", "mlps.{}"),
        "mlp.experts.{}.gate_proj": "moe.gate_up.{}.gate",
        "mlp.experts.{}.up_proj": "moe.gate_up.{}.up",
        "mlp.experts.{}.down_proj": "moe.down.{}",
        "mlp.router.classifier": "moe.router.gate",
        "mlp.router.e_score_correction_bias": "moe.router.correction",
    },
    **LAYER,
)


class DeepseekV3Config(DeepseekMoEConfig, frozen=True, kw_only=True):
    q_lora_rank: Size | None = None
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    rope_interleave: bool = True
    mlp_bias: Never = False
    topk_method: str = "greedy"


class DeepseekV32Config(DeepseekV3Config, frozen=True, kw_only=True):
    q_lora_rank: Size
    norm_topk_prob: bool = True
    index_topk: Size = 2048
    index_head_dim: Size = 128
    index_n_heads: Size = 64
    indexer_rope_interleave: bool = False
    indexer_types: list[str] | None = None


class GlmMoeDsaConfig(DeepseekV32Config, frozen=True, kw_only=True):
    index_n_heads: Size = 32
    indexer_rope_interleave: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        pattern = config.get("index_topk_pattern")
        if pattern is None:
            every, first = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset", 2) - 1
            layers = range(config["num_hidden_layers"])
            pattern = ["shared" if max(i - first, 0) % every else "full" for i in layers]
        kinds = {"F": "full", "S": "shared"}
        config["indexer_types"] = config.get("indexer_types") or [kinds.get(kind, kind) for kind in pattern]


class MiniCPM3Config(MiniCPMConfig, frozen=True, kw_only=True):
    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    rope_interleave: bool = False
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        super().derive(config)
        config.setdefault("v_head_dim", config["hidden_size"] // config["num_attention_heads"])


class LongcatConfig(DeepseekV3Config, frozen=True, kw_only=True):
    zero_expert_num: Count = 0


def latent_attention(
    c: Any, q_scale: float = 1.0, kv_scale: float = 1.0, kind: type[LatentAttention] = LatentAttention, **options: Any
) -> LatentAttention:
    nope_dim, rope_dim, rope = c.qk_nope_head_dim, c.qk_rope_head_dim, c.rope_parameters
    scale = q_scale * (nope_dim + rope_dim) ** -0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_length(rope["factor"], rope["mscale_all_dim"]) ** 2
    return kind(
        c.hidden_size,
        c.num_attention_heads,
        LatentSizes(c.kv_lora_rank, c.q_lora_rank or 0, nope_dim, rope_dim, c.v_head_dim),
        scale=scale,
        bias=c.attention_bias,
        kv_scale=kv_scale,
        **{"rope": c.rope(), **options},
    )


@arch("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", config=DeepseekV3Config, hf=_names, gguf=_gguf)
def deepseek_v3(c: DeepseekV3Config) -> Decoder:
    return pre_norm(c, latent_attention(c), some_sparse(c, sigmoid_mixture(c)))


def _index_names(c: DeepseekV32Config, prefix: str, q: str, k: str, weights: str) -> Names:
    turned = partial(neighbours_to_halves, rotary_dim=c.qk_rope_head_dim) if c.indexer_rope_interleave else None
    slots = {q: Target("q", turned), k: Target("k", turned), "k_norm": Target("k_norm", turned), weights: "weights"}
    return names(slots, prefix=prefix, to="layers.{}.mix.index.")


def _v32_names(c: DeepseekV32Config) -> Names:
    index = _index_names(c, "model.layers.{}.self_attn.indexer.", "wq_b", "wk", "weights_proj")
    return _names(c) | index


def _v32_gguf(c: DeepseekV32Config) -> Names:
    return _gguf(c) | _index_names(c, "blk.{}.indexer.", "attn_q_b", "attn_k", "proj")


@arch("DeepseekV32ForCausalLM", config=DeepseekV32Config, hf=_v32_names, gguf=_v32_gguf)
@arch("GlmMoeDsaForCausalLM", config=GlmMoeDsaConfig, hf=_v32_names, gguf=_v32_gguf)
def deepseek_v32(c: DeepseekV32Config) -> Decoder:
    sizes = (c.q_lora_rank, c.index_n_heads, c.index_head_dim, c.index_topk)
    index = Index(c.hidden_size, *sizes, rope=c.rope())
    mix = partial(latent_attention, c, kind=SparseLatentAttention)
    kinds = c.indexer_types or ["full"] * c.num_hidden_layers
    mixes = c.by_layer({"full": mix(index=index), "shared": mix(index=None)}, kinds)
    return pre_norm(c, mixes, some_sparse(c, sigmoid_mixture(c)))


@arch("DeepseekV2ForCausalLM", config=DeepseekV3Config, hf=_names, gguf=_gguf)
def deepseek_v2(c: DeepseekV3Config) -> Decoder:
    groups = Groups(c.n_group, c.topk_group, 1) if c.topk_method == "group_limited_greedy" else None
    moe = mixture(c, shared=shared_experts(c), groups=groups, scale=c.routed_scaling_factor)
    return pre_norm(c, latent_attention(c), some_sparse(c, moe))


@arch("MiniCPM3ForCausalLM", config=MiniCPM3Config, hf=_names, gguf=GGUF)
def minicpm3(c: MiniCPM3Config) -> Decoder:
    return multiplied(c, latent_attention(c))


def _longcat_names(c: LongcatConfig) -> Names:
    # transformers saves matrices for the experts that only give back what they are given.
    zero_experts = range(c.num_experts, c.num_experts + c.zero_expert_num)
    layers = range(c.num_hidden_layers)
    beyond = Names(beyond=tuple(f"model.layers.{i}.mlp.experts.{n}." for i in layers for n in zero_experts))
    return LONGCAT | beyond | latent_names("model.layers.{}.self_attn.{}.", "layers.{}.mixes.{}.", c.qk_rope_head_dim)


@arch("LongcatFlashForCausalLM", config=LongcatConfig, hf=_longcat_names)
def longcat(c: LongcatConfig) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    q_scale, kv_scale = ((c.hidden_size / size) ** 0.5 for size in (c.q_lora_rank or c.hidden_size, c.kv_lora_rank))
    num_choices = c.num_experts + c.zero_expert_num
    router = Router(c.hidden_size, num_choices, c.num_experts_per_tok, correction=True, scale=c.routed_scaling_factor)
    layer = ShortcutLayer(
        mixes=[latent_attention(c, q_scale=q_scale, kv_scale=kv_scale)] * 2,
        mlps=[MLP.of(c)] * 2,
        moe=IdentityMoE.of(c, router),
        norms_in=[norm] * 2,
        norms_mlp=[norm] * 2,
    )
    return Decoder(c, [layer] * c.num_hidden_layers, norm_out=norm)
