"""State space models and hybrids: Mamba, FalconMamba (norms inside), Mamba 2; Jamba, Bamba, Granite 4, Nemotron-H, with
some layers of attention; Falcon-H1, with both in each; LFM 2, with short convolutions."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer, MixerLayer, MLPLayer, TwoMixerLayer
from cableway.workers.blocks.mamba import Mamba, Mamba2, ShortConv
from cableway.workers.blocks.mlp import MLP, PlainMLP
from cableway.workers.blocks.moe import sigmoid
from cableway.workers.blocks.norm import RMSNorm, RMSScale, Scale
from cableway.workers.models.config import Count, DecoderConfig, Factor, MoEConfig, Never, Size
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS, PLAIN_MLP, TWO_MIXERS
from cableway.workers.models.gguf_names import MAMBA2 as GGUF_MAMBA2
from cableway.workers.models.moe import GRANITE_MOE, mixture, on_frame
from cableway.workers.models.names import ATTENTION, EMBEDDINGS, Names, Target, experts, names, scaled
from cableway.workers.models.registry import arch

LAYER = {"prefix": "model.layers.{}.", "to": "layers.{}."}
MIXER = {
    "in_proj": "project",
    "conv1d": "conv",
    "x_proj": "select",
    "dt_proj": "dt",
    "A_log": "a_log",
    "D": "d",
    "dt_bias": "dt_bias",
    "norm": "norm",
    "dt_layernorm": "dt_norm",
    "b_layernorm": "b_norm",
    "c_layernorm": "c_norm",
    "out_proj": "out",
}
MAMBA = names(MIXER, prefix="backbone.layers.{}.mixer.", to="layers.{}.mix.") | names(
    {
        "backbone.embeddings": "embed",
        "backbone.layers.{}.norm": "layers.{}.norm_in",
        "backbone.norm_f": "norm_out",
        "lm_head": "head",
    }
)
IN_HYBRID = names(MIXER, prefix="model.layers.{}.mamba.", to="layers.{}.mix.")
FEED_FORWARD = names(
    {
        "feed_forward.gate_proj": "mlp.gate_up.gate",
        "feed_forward.up_proj": "mlp.gate_up.up",
        "feed_forward.down_proj": "mlp.down",
        "feed_forward.router": "mlp.router.gate",
        "input_layernorm": "norm_in",
        "pre_ff_layernorm": "norm_mlp",
    },
    **LAYER,
)
JAMBA = (
    EMBEDDINGS
    | ATTENTION
    | IN_HYBRID
    | FEED_FORWARD
    | experts("feed_forward.experts")
    | names({"model.final_layernorm": "norm_out"})
)
GRANITE_HYBRID = GRANITE_MOE | IN_HYBRID
GRANITE_DENSE_HYBRID = GRANITE_HYBRID | names(
    {"shared_mlp.input_linear": "mlp.gate_up", "shared_mlp.output_linear": "mlp.down"}, **LAYER
)
NEMOTRON_H = MAMBA | names(
    {
        "q_proj": "mix.qkv.q",
        "k_proj": "mix.qkv.k",
        "v_proj": "mix.qkv.v",
        "o_proj": "mix.out",
        "up_proj": "mlp.up",
        "down_proj": "mlp.down",
    },
    prefix="backbone.layers.{}.mixer.",
    to="layers.{}.",
)
LFM2 = (
    EMBEDDINGS
    | ATTENTION
    | experts("feed_forward.experts", "w1", "w3", "w2")
    | names(
        {
            "self_attn.out_proj": "mix.out",
            "self_attn.q_layernorm": "mix.q_norm",
            "self_attn.k_layernorm": "mix.k_norm",
            "conv.in_proj": "mix.project",
            "conv.conv": "mix.conv",
            "conv.out_proj": "mix.out",
            "feed_forward.w1": "mlp.gate_up.gate",
            "feed_forward.w3": "mlp.gate_up.up",
            "feed_forward.w2": "mlp.down",
            "feed_forward.gate": "mlp.router.gate",
            "feed_forward.expert_bias": "mlp.router.correction",
            "operator_norm": "norm_in",
            "ffn_norm": "norm_mlp",
        },
        **LAYER,
    )
    | names({"model.embedding_norm": "norm_out"})
)
GGUF_LFM2 = GGUF | names({"token_embd_norm": "norm_out"})  # which is the first thing there is, in its own code


class MambaConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    state_size: Size = 16
    conv_kernel: Size = 4
    time_step_rank: Size
    use_bias: bool = False
    use_conv_bias: bool = True
    mixer_rms_eps: float = 1e-6
    tie_word_embeddings: bool = True

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        hidden = config["hidden_size"]
        config["num_attention_heads"] = 1
        config["intermediate_size"] = config.get("intermediate_size") or int(config.get("expand", 2) * hidden)
        if config.get("time_step_rank", "auto") == "auto":
            config["time_step_rank"] = -(-hidden // 16)


class Mamba2Config(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    num_heads: Size = 128
    head_dim: Size = 64
    n_groups: Size = 8
    state_size: Size = 128
    conv_kernel: Size = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config["num_attention_heads"], config["intermediate_size"] = 1, 1
        if config["num_heads"] * config["head_dim"] != config.get("expand", 2) * config["hidden_size"]:
            raise ValueError("heads are not `expand` times as wide as hidden_size")


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

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        if config.get("mamba_dt_rank", "auto") == "auto":
            config["mamba_dt_rank"] = -(-config["hidden_size"] // 16)


class HybridConfig(MoEConfig, frozen=True, kw_only=True):
    """Attention and Mamba 2; of Granite with experts, multipliers, and attention that mostly knows no positions."""

    layer_types: list[str]
    attention_bias: bool = False
    mlp_bias: bool = False
    mamba_n_heads: Size = 128
    mamba_d_head: Size = 64
    mamba_n_groups: Size = 1
    mamba_d_state: Size = 256
    mamba_d_conv: Size = 4
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    position_embedding_type: str | None = "rope"
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    attention_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0
    shared_intermediate_size: Count = 0
    num_experts: Count = 0
    num_experts_per_tok: Count = 0

    def __post_init__(self) -> None:
        if self.num_experts:
            MoEConfig.__post_init__(self)

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        kinds = config.get("layer_types") or config.get("layers_block_type")
        if kinds is None:
            indices = config.get("attn_layer_indices") or []
            kinds = ["attention" if i in indices else "mamba" for i in range(config["num_hidden_layers"])]
        config["layer_types"] = kinds
        head_dim = config.get("mamba_d_head", "auto")
        if head_dim == "auto":
            head_dim = config.get("mamba_expand", 2) * config["hidden_size"] // config["mamba_n_heads"]
            config["mamba_d_head"] = head_dim
        if config["mamba_n_heads"] * head_dim != config.get("mamba_expand", 2) * config["hidden_size"]:
            raise ValueError("mamba_n_heads are not `mamba_expand` times as wide as hidden_size")

    def mixes(self, attention: Attention, norm_eps: float | None) -> list[Any]:
        """The mixer of each layer."""
        mamba = Mamba2(
            self.hidden_size,
            self.mamba_n_heads,
            self.mamba_d_head,
            self.mamba_n_groups,
            self.mamba_d_state,
            self.mamba_d_conv,
            bias=self.mamba_proj_bias,
            conv_bias=self.mamba_conv_bias,
            norm_eps=norm_eps,
            limit=self.time_step_limit,
        )
        kinds = {
            **dict.fromkeys(("attention", "full_attention"), attention),
            **dict.fromkeys(("mamba", "linear_attention"), mamba),
        }
        return self.by_layer(self.layer_types, kinds)


class BambaConfig(HybridConfig, frozen=True, kw_only=True):
    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        HybridConfig.derive(config)
        if not config.get("rope_parameters"):
            config.setdefault("partial_rotary_factor", 0.5)


class NemotronHConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    head_dim: Size = 128
    layer_types: list[str]
    hidden_act: str = "relu2"
    attention_bias: bool = False
    mlp_bias: bool = False
    mamba_num_heads: Size = 128
    mamba_head_dim: Size = 64
    n_groups: Size = 8
    ssm_state_size: Size = 128
    conv_kernel: Size = 4
    use_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_min: float = 0.001

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config["hidden_act"] = config.get("mlp_hidden_act", "relu2")
        kinds = {"M": "mamba", "*": "attention", "-": "mlp"}
        config["layer_types"] = config.get("layers_block_type") or [
            kinds.get(kind, kind) for kind in config.get("hybrid_override_pattern", "")
        ]
        config["num_hidden_layers"] = len(config["layer_types"])


class Lfm2Config(MoEConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    layer_types: list[str]
    conv_bias: bool = False
    conv_L_cache: Size = 3
    num_dense_layers: Count = 0
    use_expert_bias: bool = True
    norm_topk_prob: bool = True
    num_experts: Count = 0
    num_experts_per_tok: Count = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_experts:
            MoEConfig.__post_init__(self)

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config.get("tie_word_embeddings", config.get("tie_embedding", True))
        full = config.get("full_attn_idxs") or []
        kinds = ["full_attention" if i in full else "conv" for i in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)
        if config.get("block_auto_adjust_ff_dim", "num_experts" not in config):
            size = int(2 * config["intermediate_size"] / 3)
            if config.get("block_ffn_dim_multiplier") is not None:
                step = config.get("block_multiple_of", 256)
                size = -(-int(config["block_ffn_dim_multiplier"] * size) // step) * step
            config["intermediate_size"] = size


class FalconH1Config(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    attention_bias: Never = False
    mlp_bias: Never = False
    projectors_bias: Never = False
    mamba_proj_bias: Never = False
    mamba_rms_norm: Never = False
    mamba_n_heads: Size = 128
    mamba_d_head: Size = 64
    mamba_n_groups: Size = 1
    mamba_d_state: Size = 256
    mamba_d_conv: Size = 4
    mamba_conv_bias: bool = True
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    embedding_multiplier: Factor = 1.0
    lm_head_multiplier: Factor = 1.0
    key_multiplier: Factor = 1.0
    attention_in_multiplier: Factor = 1.0
    attention_out_multiplier: Factor = 1.0
    ssm_in_multiplier: Factor = 1.0
    ssm_out_multiplier: Factor = 1.0
    ssm_multipliers: tuple[Factor, Factor, Factor, Factor, Factor] = (1.0,) * 5
    mlp_multipliers: tuple[Factor, Factor] = (1.0, 1.0)

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        wide = config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * config["hidden_size"]
        if wide != config["mamba_n_heads"] * config["mamba_d_head"]:
            raise ValueError("mamba_n_heads of mamba_d_head are not as wide as mamba_d_ssm")


def _falcon_h1_names(c: FalconH1Config) -> Names:
    """Multipliers of what linear maps take or give are taken into their weights."""
    sections = {part: c.ssm_in_multiplier * m for part, m in zip("zxbc", c.ssm_multipliers, strict=False)}
    sections["dt"] = c.ssm_in_multiplier * c.ssm_multipliers[4]
    scales = {
        "mamba.in_proj": Target("mixes.0.project", layout=scaled(sections)),
        "mamba.out_proj": Target("mixes.0.out", layout=scaled(c.ssm_out_multiplier)),
        "self_attn.q_proj": Target("mixes.1.qkv.q", layout=scaled(c.attention_in_multiplier)),
        "self_attn.k_proj": Target("mixes.1.qkv.k", layout=scaled(c.attention_in_multiplier * c.key_multiplier)),
        "self_attn.v_proj": Target("mixes.1.qkv.v", layout=scaled(c.attention_in_multiplier)),
        "self_attn.o_proj": Target("mixes.1.out", layout=scaled(c.attention_out_multiplier)),
        "feed_forward.gate_proj": Target("mlp.gate_up.gate", layout=scaled(c.mlp_multipliers[0])),
        "feed_forward.down_proj": Target("mlp.down", layout=scaled(c.mlp_multipliers[1])),
    }
    mixer = names(MIXER, prefix="model.layers.{}.mamba.", to="layers.{}.mixes.0.")
    out = names({"model.final_layernorm": "norm_out"})
    return EMBEDDINGS | FEED_FORWARD | mixer | names(scales, **LAYER) | out


@arch("FalconH1ForCausalLM", config=FalconH1Config, hf=_falcon_h1_names, gguf=GGUF | TWO_MIXERS)
def falcon_h1(c: FalconH1Config) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    mix = Mamba2(
        c.hidden_size,
        c.mamba_n_heads,
        c.mamba_d_head,
        c.mamba_n_groups,
        c.mamba_d_state,
        c.mamba_d_conv,
        bias=False,
        conv_bias=c.mamba_conv_bias,
        norm_eps=None,
        limit=c.time_step_limit,
    )
    layer = TwoMixerLayer(norm_in=norm, mixes=[mix, Attention.of(c)], norm_mlp=norm, mlp=MLP.of(c))
    embed, logits = Scale(c.embedding_multiplier), Scale(c.lm_head_multiplier)
    return Decoder(c, [layer] * c.num_hidden_layers, norm_out=norm, on_embed=embed, on_logits=logits)


@arch("MambaForCausalLM", config=MambaConfig, hf=MAMBA, gguf=GGUF)
def mamba(c: MambaConfig) -> Decoder:
    return mamba_decoder(c, None)


@arch("FalconMambaForCausalLM", config=MambaConfig, hf=MAMBA, gguf=GGUF)
def falcon_mamba(c: MambaConfig) -> Decoder:
    sizes, eps = (c.time_step_rank, c.state_size), c.mixer_rms_eps
    return mamba_decoder(c, (RMSScale(sizes[0], eps), RMSScale(sizes[1], eps), RMSScale(sizes[1], eps)))


def mamba_decoder(c: MambaConfig, norms: Any) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    mix = Mamba(
        c.hidden_size,
        c.intermediate_size,
        c.state_size,
        c.time_step_rank,
        c.conv_kernel,
        bias=c.use_bias,
        conv_bias=c.use_conv_bias,
        norms=norms,
    )
    return Decoder(c, [MixerLayer(norm_in=norm, mix=mix)] * c.num_hidden_layers, norm_out=norm)


@arch("Mamba2ForCausalLM", config=Mamba2Config, hf=MAMBA, gguf=GGUF | GGUF_MAMBA2)
def mamba2(c: Mamba2Config) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    mix = Mamba2(
        c.hidden_size,
        c.num_heads,
        c.head_dim,
        c.n_groups,
        c.state_size,
        c.conv_kernel,
        bias=c.use_bias,
        conv_bias=c.use_conv_bias,
        norm_eps=c.norm_eps,
        limit=c.time_step_limit,
    )
    return Decoder(c, [MixerLayer(norm_in=norm, mix=mix)] * c.num_hidden_layers, norm_out=norm)


@arch("JambaForCausalLM", config=JambaConfig, hf=JAMBA, gguf=GGUF)
def jamba(c: JambaConfig) -> Decoder:
    sizes, eps = (c.mamba_dt_rank, c.mamba_d_state, c.mamba_d_state), c.norm_eps
    dt_norm, b_norm, c_norm = (RMSNorm(size, eps) for size in sizes)
    mix = Mamba(
        c.hidden_size,
        c.mamba_expand * c.hidden_size,
        c.mamba_d_state,
        c.mamba_dt_rank,
        c.mamba_d_conv,
        bias=c.mamba_proj_bias,
        conv_bias=c.mamba_conv_bias,
        norms=(dt_norm, b_norm, c_norm),
    )
    attention, moe, dense, layers = Attention.of(c, rope=None), mixture(c), MLP.of(c), range(c.num_hidden_layers)
    mixes = [attention if i % c.attn_layer_period == c.attn_layer_offset else mix for i in layers]
    is_sparse = [i % c.expert_layer_period == c.expert_layer_offset and c.num_experts > 1 for i in layers]
    return on_frame(c, mixes, [moe if sparse else dense for sparse in is_sparse])


@arch("BambaForCausalLM", config=BambaConfig, hf=JAMBA)
def bamba(c: BambaConfig) -> Decoder:
    mixes = c.mixes(Attention.of(c, bias=c.attention_bias, out_bias=c.attention_bias), c.norm_eps)
    return on_frame(c, mixes, [MLP.of(c, bias=c.mlp_bias)] * c.num_hidden_layers)


def _granite_names(c: HybridConfig) -> Any:
    return GRANITE_HYBRID if c.num_experts else GRANITE_DENSE_HYBRID


@arch("GraniteMoeHybridForCausalLM", config=HybridConfig, hf=_granite_names, gguf=GGUF_NEIGHBOURS | GGUF_MAMBA2)
def granite_hybrid(c: HybridConfig) -> Decoder:
    norm, bias, less = RMSNorm(c.hidden_size, c.norm_eps), c.attention_bias, Scale(c.residual_multiplier)
    position = {} if c.position_embedding_type == "rope" else {"rope": None}
    attention = Attention.of(c, bias=bias, out_bias=bias, scale=c.attention_multiplier, **position)
    shared = MLP.of(c, ffn_size=c.shared_intermediate_size)
    mlp = mixture(c, shared=shared, renorm=0.0) if c.num_experts else shared
    layers = [
        Layer(norm_in=norm, mix=mix, norm_mix_out=less, norm_mlp=norm, mlp=mlp, norm_mlp_out=less)
        for mix in c.mixes(attention, c.norm_eps)
    ]
    embed, logits = Scale(c.embedding_multiplier), Scale(1 / c.logits_scaling)
    return Decoder(c, layers, norm_out=norm, on_embed=embed, on_logits=logits)


@arch("NemotronHForCausalLM", config=NemotronHConfig, hf=NEMOTRON_H, gguf=GGUF | GGUF_MAMBA2 | PLAIN_MLP)
def nemotron_h(c: NemotronHConfig) -> Decoder:
    norm, bias = RMSNorm(c.hidden_size, c.norm_eps), c.attention_bias
    mix = Mamba2(
        c.hidden_size,
        c.mamba_num_heads,
        c.mamba_head_dim,
        c.n_groups,
        c.ssm_state_size,
        c.conv_kernel,
        bias=c.mamba_proj_bias,
        conv_bias=c.use_conv_bias,
        norm_eps=c.norm_eps,
        limit=(c.time_step_min, float("inf")),
    )
    attention = MixerLayer(norm_in=norm, mix=Attention.of(c, rope=None, bias=bias, out_bias=bias))
    kinds = {
        **dict.fromkeys(("mamba", "linear_attention"), MixerLayer(norm_in=norm, mix=mix)),
        **dict.fromkeys(("attention", "full_attention"), attention),
        "mlp": MLPLayer(norm_in=norm, mlp=PlainMLP.of(c, bias=c.mlp_bias)),
    }
    return Decoder(c, c.by_layer(c.layer_types, kinds), norm_out=norm)


@arch("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", config=Lfm2Config, hf=LFM2, gguf=GGUF_LFM2)
def lfm2(c: Lfm2Config) -> Decoder:
    attention = Attention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps))
    conv = ShortConv(c.hidden_size, c.conv_L_cache, bias=c.conv_bias)
    dense = MLP.of(c)
    moe = None
    if c.num_experts:
        renorm = 1e-6 if c.norm_topk_prob else None
        router = {"score": sigmoid, "correction": c.use_expert_bias, "renorm": renorm}
        moe = mixture(c, scale=c.routed_scaling_factor, **router)
    mlps = [dense if moe is None or i < c.num_dense_layers else moe for i in range(c.num_hidden_layers)]
    return on_frame(c, c.by_layer(c.layer_types, {"full_attention": attention, "conv": conv}), mlps)
