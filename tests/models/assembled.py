"""Families that transformers does not know, made like those of rewritten.py of a relative some of whose modules are
exchanged for others: for modules of a third family, or for a few lines that say what is new."""

import math
from collections import OrderedDict
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.diffllama.modeling_diffllama import apply_rotary_pos_emb
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from tests.checkpoints import randomize
from tests.models.rewritten import (
    MOE_FIELDS,
    QKV,
    REWRITTEN,
    Config,
    Rewritten,
    Tensors,
    both,
    both_tensors,
    deepseek_tensors,
    fuse,
    old_rope,
    renamed,
    ungated_share,
)
from tests.models.zoo import DEFAULT, GEMMA3N, LLAMA4, QWEN35, ZOO

KEPT = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "dtype", "model_type"),
}
"""Keys that mean the same everywhere."""


def only(*keys: str, **others: Any) -> Any:
    """Leave a config these keys and those that mean the same everywhere, and add others."""

    def change(config: Config) -> None:
        for key in [key for key in config if key not in KEPT and key not in keys]:
            del config[key]
        config |= others

    return change


PLAMO = {
    "input_layernorm": "pre_mixer_norm",
    "post_attention_layernorm": "post_mixer_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
    "self_attn.": "mixer.",
    "model.layers.": "model.layers.layers.",
}
NEAR_AND_FAR = {"full_attention": {**DEFAULT, "rope_theta": 1000.0}, "sliding_attention": DEFAULT}
GEMMA3 = {
    "hidden_activation": "silu",
    "query_pre_attn_scalar": 16,
    "sliding_window": 9,
    "tie_word_embeddings": False,
    "rms_norm_eps": 0.02,
}


def plamo_tensors(tensors: Tensors, config: Config) -> None:
    """Norms hold weights less numbers of their own, and embeddings are what the layers see."""
    for key, tensor in tensors.items():
        for norm, offset in (("post_attention_layernorm", 1 / 5), ("post_feedforward_layernorm", 5**-1.5)):
            if norm in key:
                tensors[key] = tensor + 1 - offset
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * config["hidden_size"] ** 0.5


PLAMO_TENSORS = (
    plamo_tensors,
    fuse("self_attn.qkv_proj", *QKV),
    fuse("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
)


class HeadNorm(nn.Module):
    """An RMS norm with a weight a head; x [B, H, T, D]."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.02) * self.weight[:, None]


class Mixer(JambaMambaMixer):
    """Called as an attention is."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


PLAMO2_HEADS, PLAMO2_MAMBA = (4, 2), {"mamba_num_heads": 8, "mamba_d_state": 10, "mamba_d_conv": 3}


def plamo2_modules(model: Any) -> None:
    """Every other layer is Jamba's Mamba, whose channels of a head are alike; heads are normalised each by its own."""
    mamba = transformers.JambaConfig(
        hidden_size=64,
        mamba_d_state=10,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=64,
        mamba_conv_bias=False,
        rms_norm_eps=0.02,
    )
    for number, layer in enumerate(model.model.layers):
        if number % 2 == 0:
            layer.self_attn = Mixer(mamba, number)
        else:
            layer.self_attn.q_norm, layer.self_attn.k_norm = (HeadNorm(num, 16) for num in PLAMO2_HEADS)
    randomize(model)
    for layer in model.model.layers[::2]:
        mixer = layer.self_attn
        mixer.A_log.data[:] = mixer.A_log[:, :1]
        for weight in (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.D, mixer.A_log):
            of_head = weight.data.unflatten(0, (8, 16))
            of_head[:] = of_head[:, :1].clone()


def plamo2_tensors(tensors: Tensors, config: Config) -> None:
    for number in range(0, config["num_hidden_layers"], 2):
        mixer = f"model.layers.{number}.self_attn."
        old = {key.removeprefix(mixer): tensors.pop(key) for key in list(tensors) if key.startswith(mixer)}
        x, z = (part.unflatten(0, (8, 16)) for part in old["in_proj.weight"].chunk(2))
        dt, b, c = old["x_proj.weight"].split((64, 10, 10))
        new = {
            "in_proj.weight": torch.cat((z, x), 1).flatten(0, 1),
            "bcdt_proj.weight": torch.cat((b, c, dt)),
            "dt_proj.weight": old["dt_proj.weight"][::16],
            "dt_bias": old["dt_proj.bias"][::16],
            "A_log": old["A_log"][::16, 0],
            "D": old["D"][::16],
            "dt_norm_weight": old["dt_layernorm.weight"],
            "B_norm_weight": old["b_layernorm.weight"],
            "C_norm_weight": old["c_layernorm.weight"],
            "conv1d.weight": old["conv1d.weight"],
            "out_proj.weight": old["out_proj.weight"],
        }
        tensors |= {mixer + name: tensor for name, tensor in new.items()}


def experts_apart(*slots: str, at: str = "mlp.experts") -> Any:
    """Experts of one tensor [X, out, in], gates above the others, one by one: as `at.{}.` and these names."""

    def change(tensors: Tensors, config: Config) -> None:
        for key in [key for key in tensors if key.endswith(f"{at}.gate_up_proj")]:
            prefix = key.removesuffix(".gate_up_proj")
            gates, ups = tensors.pop(key).chunk(2, 1)
            for expert, parts in enumerate(zip(gates, ups, tensors.pop(f"{prefix}.down_proj"), strict=True)):
                tensors |= {f"{prefix}.{expert}.{slot}.weight": part for slot, part in zip(slots, parts, strict=True)}

    return change


def experts_stacked(*slots: str, at: str = "mlp.experts") -> Any:
    """Experts one by one in one tensor [X, out, in] a matrix."""

    def change(tensors: Tensors, config: Config) -> None:
        for layer in range(config["num_hidden_layers"]):
            for slot in slots:
                keys = [f"model.layers.{layer}.{at}.{i}.{slot}.weight" for i in range(config["num_experts"])]
                if keys[0] in tensors:
                    joined = torch.stack([tensors.pop(key) for key in keys])
                    tensors[f"model.layers.{layer}.{at}.{slot}.weight"] = joined

    return change


GROK = {
    "input_layernorm.weight": "pre_attn_norm.scale",
    "post_attention_layernorm.weight": "post_attn_norm.scale",
    "pre_feedforward_layernorm.weight": "pre_moe_norm.scale",
    "post_feedforward_layernorm.weight": "post_moe_norm.scale",
    "model.norm.weight": "model.norm.scale",
    "self_attn.": "attn.",
    "mlp.": "moe_block.",
}


def grok_modules(model: Any) -> None:
    """MLPs are OLMoE's experts."""
    experts = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=40, num_experts=8, num_experts_per_tok=3, hidden_act="gelu_pytorch_tanh"
    )
    for layer in model.model.layers:
        layer.mlp = OlmoeSparseMoeBlock(experts)
    randomize(model)


def grok_tensors(tensors: Tensors, config: Config) -> None:
    """Norms as they multiply; embeddings and logits without the multipliers that the config now has."""
    for key in tensors:
        if "norm" in key:
            tensors[key] = tensors[key] + 1
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * config["hidden_size"] ** 0.5 / 3
    tensors["lm_head.weight"] = tensors["lm_head.weight"] / 0.7


class Bypass(MixtralDecoderLayer):
    """Arctic's layers with experts."""

    def __init__(self, config: Any, number: int):
        super().__init__(config, number)
        narrow = transformers.MixtralConfig(hidden_size=64, intermediate_size=64, hidden_act="silu")
        self.residual_ffn, self.residual_layernorm = Gated(narrow), MixtralRMSNorm(64, 0.02)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        after = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **options)[0]
        past = self.mlp(self.post_attention_layernorm(hidden_states))
        return after + self.residual_ffn(self.residual_layernorm(after)) + past


class Gated(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.w1, self.w3 = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.w2 = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def arctic_modules(model: Any) -> None:
    for number, layer in enumerate(model.model.layers):
        if (number + 1) % model.config.moe_layer_frequency == 0:
            model.model.layers[number] = Bypass(model.config, number)
        else:
            layer.mlp = nn.Sequential(OrderedDict(mlp=Gated(model.config)))
    randomize(model)


def step3_modules(model: Any) -> None:
    """Queries go through a narrow norm; shared experts have no gate."""
    for layer in model.model.layers:
        narrow = OrderedDict(
            q_proj=nn.Linear(64, 28, bias=False), inter_norm=MixtralRMSNorm(28, 0.02), wq=nn.Linear(28, 64, bias=False)
        )
        layer.self_attn.q_proj = nn.Sequential(narrow)
    randomize(model)
    ungated_share(model)


def solar_bridges(model: Any) -> None:
    """Streams kept before layers 0 and 1, and blended into those of 2 and 3."""
    kept: dict[str, Tensor] = {}

    def before(number: int) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], options: Any) -> Any:
            stream, *others = arguments
            kept.update({name: stream for name, keeps in (("first", (0, 2)), ("second", (1,))) if number in keeps})
            for name, takes in (("first", (1, 3)), ("second", (3,))):
                if number in takes:
                    stream = 0.7 * kept[name] + 0.3 * stream
            return (stream, *others), options

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(before(number), with_kwargs=True)


class GroupedDifferential(nn.Module):
    """2 groups of 2 signals and a noise head, over one pair of KV heads; head by head."""

    def __init__(self, number: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, size * 16, bias=False) for size in (6, 2, 2))
        self.o_proj = nn.Linear(2 * 2 * 32, 64, bias=False)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.zeros(16)) for _ in range(4)
        )
        self.subln = nn.RMSNorm(32, eps=0.03)
        self.first = 0.8 - 0.6 * math.exp(-0.3 * (number - 1))

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor, **_: Any) -> Any:
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        v, mask = torch.cat((v[:, 0], v[:, 1]), -1), attention_mask[:, 0]

        def attend(head: int, key: int) -> Tensor:
            return (q[:, head] @ k[:, key].mT / 4 + mask).softmax(-1) @ v

        part = (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp() + self.first
        signals = [attend(3 * g + i, 0) - part * attend(3 * g + 2, 1) for g in range(2) for i in range(2)]
        return self.o_proj(torch.cat([self.subln(y) * (1 - self.first) for y in signals], -1)), None


class PolyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        powers = [power * torch.rsqrt(power.square().mean(-1, keepdim=True) + 1e-6) for power in (x**3, x**2, x)]
        return sum(weight * power for weight, power in zip(self.weight, powers, strict=True)) + self.bias


def motif_modules(model: Any) -> None:
    for number, layer in enumerate(model.model.layers):
        layer.self_attn, layer.mlp.act_fn = GroupedDifferential(number), PolyNorm()
    randomize(model)


ASSEMBLED = {
    "MotifForCausalLM": Rewritten(
        "DiffLlama",
        config=both(
            old_rope,
            only("rope_theta", "head_dim", hidden_act="poly_norm", attn_rms_norm_eps=0.03, use_bias=False),
            lambda config: config.update(num_attention_heads=6, num_noise_heads=2, k_ratio=1),
        ),
        prepare=motif_modules,
    ),
    "Plamo3ForCausalLM": Rewritten(
        "Gemma3",
        {
            **GEMMA3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": NEAR_AND_FAR,
        },
        PLAMO,
        only("head_dim", window_size=9, sliding_window_pattern=3, rope_theta=1000.0, rope_local_theta=10_000.0),
        both_tensors(*PLAMO_TENSORS),
    ),
    "Plamo2ForCausalLM": Rewritten(
        "Gemma3",
        {
            **GEMMA3,
            "num_hidden_layers": 4,
            "rope_parameters": dict.fromkeys(NEAR_AND_FAR, DEFAULT),
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        {"q_norm.weight": "q_weight", "k_norm.weight": "k_weight", **PLAMO},
        only(**PLAMO2_MAMBA, attention_window_size=8, full_attention_idx=[3], mamba_step=2, hidden_size_per_head=16),
        both_tensors(*PLAMO_TENSORS, plamo2_tensors),
        prepare=plamo2_modules,
    ),
    "Grok1ModelForCausalLM": Rewritten(
        "Gemma2",
        {
            **{name: value for name, value in GEMMA3.items() if name != "hidden_activation"},
            "layer_types": ["full_attention"] * 3,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": None,
        },
        GROK,
        both(
            old_rope,
            only("rope_theta", attn_output_multiplier=1 / 3, max_attn_value=1.5, embedding_multiplier_scale=3.0),
            lambda config: config.update(
                output_multiplier_scale=0.7, num_experts=8, num_experts_per_tok=3, intermediate_size=40
            ),
        ),
        both_tensors(experts_apart("linear", "linear_v", "linear_1"), grok_tensors),
        prepare=grok_modules,
    ),
    "ArcticForCausalLM": Rewritten(
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 4, "moe_layer_frequency": 2},
        {"residual_ffn": "residual_mlp", "mlp.mlp.": "block_sparse_moe.mlp."},
        both(
            old_rope,
            only("rope_theta", "num_local_experts", "num_experts_per_tok", "moe_layer_frequency", use_residual=True),
            lambda config: config.update(parallel_attn_mlp_res=True),
        ),
        prepare=arctic_modules,
    ),
    "Step3TextForCausalLM": Rewritten(
        "Qwen2Moe",
        {**MOE_FIELDS, "num_key_value_heads": 1, "norm_topk_prob": False},
        {
            "q_proj.q_proj": "q_proj",
            "q_proj.inter_norm": "inter_norm",
            "q_proj.wq": "wq",
            "mlp.shared_expert.": "share_expert.",
            "mlp.experts.": "moe.",
            "mlp.gate.": "moe.gate.",
        },
        both(
            old_rope,
            only("rope_theta", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
            renamed(num_experts="moe_num_experts", num_experts_per_tok="moe_top_k", rope_theta="rope_theta"),
            lambda config: config.update(
                share_q_dim=28, share_expert_dim=80, moe_layers_enum="1,2", norm_expert_weight=False, head_dim=16
            ),
            renamed(num_key_value_heads="num_attention_groups"),
        ),
        both_tensors(deepseek_tensors, experts_stacked("gate_proj", "up_proj", "down_proj")),
        prepare=step3_modules,
    ),
    "SolarForCausalLM": Rewritten(
        "Llama",
        {"num_hidden_layers": 4},
        config=lambda config: config.update(
            bskcn_1=[0, 2], bskcn_2=[1], bskcn_3=[1, 3], bskcn_4=[3], bskcn_tv=[0.9, 0.7]
        ),
        prepare=solar_bridges,
    ),
}


def several_positions(config: Config) -> None:
    """Rotations by time, height and width, which are one for text."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind, sections = ("xdrope", "xdrope_section") if "alpha" in rope else ("mrope", "mrope_section")
    config["rope_scaling"] = {**rope, "type": kind, sections: [2, 3, 3]}
    del config["rope_scaling"]["rope_type"]


def within(kin: str, fields: Config, prefix: str) -> Rewritten:
    """The text part of a model of more: its config in `text_config`, its tensors under another name, and others."""

    def change(config: Config) -> None:
        config["text_config"] = {key: config.pop(key) for key in list(config) if key != "architectures"}

    def add(tensors: Tensors, config: Config) -> None:
        tensors |= {f"{tower}.patch.weight": torch.ones(3, 3) for tower in ("vision_tower", "visual")}

    head = {"lm_head": "language_model.lm_head"} if prefix.startswith("language_model") else {}
    return Rewritten(kin, fields, {"model.": prefix, **head}, change, add)


WITHIN = {
    "Llama4ForConditionalGeneration": within("Llama4", LLAMA4, "language_model.model."),
    "Gemma3nForConditionalGeneration": within("Gemma3n", GEMMA3N, "model.language_model."),
    "Gemma3ForConditionalGeneration": within("Gemma3", ZOO["Gemma3ForCausalLM"][0], "language_model.model."),
    "Mistral3ForConditionalGeneration": within("Ministral3", ZOO["Ministral3ForCausalLM"][0], "language_model.model."),
    "Qwen2VLForConditionalGeneration": Rewritten("Qwen2", config=several_positions),
    "Qwen3VLForConditionalGeneration": within("Qwen3", {}, "model.language_model."),
    "Qwen3_5ForConditionalGeneration": within("Qwen3_5", QWEN35, "model.language_model."),
    "Qwen3_5MoeForConditionalGeneration": within(
        "Qwen3_5Moe", ZOO["Qwen3_5MoeForCausalLM"][0], "model.language_model."
    ),
    "HunYuanVLForConditionalGeneration": Rewritten(
        "HunYuanDenseV1", ZOO["HunYuanDenseV1ForCausalLM"][0], config=several_positions
    ),
}
WITHIN["Qwen2_5_VLForConditionalGeneration"] = WITHIN["Qwen2VLForConditionalGeneration"]
REWRITTEN |= ASSEMBLED | WITHIN
