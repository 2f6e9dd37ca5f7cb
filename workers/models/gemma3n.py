"""Gemma 3n: several streams of which each layer computes one; later layers attend to earlier ones' keys and values."""

from typing import Annotated, Any

from msgspec import Meta

from cableway.ipc.modelfiles import ModelError
from cableway.workers.blocks.altup import AltUp, AltUpDecoder, AltUpLayer, Laurel, LayerInput, LayerInputs
from cableway.workers.blocks.attention import BorrowingAttention, ValueNormAttention
from cableway.workers.blocks.mlp import MLP, Activation, SparseMLP
from cableway.workers.blocks.norm import RMSNorm, Scale, SoftCap
from cableway.workers.models.config import Count, Factor, Size, Window
from cableway.workers.models.gemma import Gemma3Config
from cableway.workers.models.gguf_names import GGUF, GGUF_LAYER
from cableway.workers.models.hf_names import HF, LAYER, POST_NORM, known_as, of_text
from cableway.workers.models.layouts import stacked
from cableway.workers.models.names import Names, Target, names
from cableway.workers.models.registry import arch

_AROUND = {
    "inputs.table": ("model.embed_tokens_per_layer", "per_layer_token_embd"),
    "inputs.project": ("model.per_layer_model_projection", "per_layer_model_proj"),
    "inputs.norm": ("model.per_layer_projection_norm", "per_layer_proj_norm"),
    "spread.{}": ("model.altup_projections.{}",),
    "join.{}": ("model.altup_unembed_projections.{}",),
}
_IN_LAYERS = {
    "altup.norm": ("altup.router_norm", "altup_router_norm"),
    "altup.router": ("altup.modality_router", "altup_router"),
    "altup.guess": ("altup.prediction_coefs", "altup_predict_coef"),
    "altup.mend": ("altup.correction_coefs", "altup_correct_coef"),
    "scale": ("altup.correct_output_scale", "altup_correct_scale"),
    "laurel.left": ("laurel.linear_left", "laurel_l"),
    "laurel.right": ("laurel.linear_right", "laurel_r"),
    "laurel.norm": ("laurel.post_laurel_norm", "laurel_post_norm"),
    "layer_input.gate": ("per_layer_input_gate", "inp_gate"),
    "layer_input.up": ("per_layer_projection", "proj"),
    "layer_input.norm": ("post_per_layer_input_norm", "post_norm"),
}
"""The names in folders, and in GGUF files."""
GEMMA3N = HF | POST_NORM | names(known_as(_IN_LAYERS), **LAYER) | names(known_as(_AROUND))
GGUF_STREAMS = {"altup_proj": Target("spread", layout=stacked), "altup_unembd_proj": Target("join", layout=stacked)}
GGUF_GEMMA3N = GGUF | names(known_as(_IN_LAYERS), **GGUF_LAYER) | names(known_as(_AROUND) | GGUF_STREAMS)


class Gemma3nConfig(Gemma3Config, frozen=True, kw_only=True):
    global_period = 5
    intermediate_size: tuple[Size, ...]
    sliding_window: Window = 512
    final_logit_softcapping: Factor | None = 30.0
    vocab_size_per_layer_input: Size = 262_144
    hidden_size_per_layer_input: Size = 256
    altup_num_inputs: Annotated[int, Meta(ge=2, le=64)] = 4
    altup_active_idx: Count = 0
    altup_correct_scale: bool = True
    num_kv_shared_layers: Count = 15
    laurel_rank: Size = 64
    activation_sparsity_pattern: tuple[Annotated[float, Meta(ge=0, lt=1)], ...]

    def __post_init__(self) -> None:
        Gemma3Config.__post_init__(self)
        if {len(self.intermediate_size), len(self.activation_sparsity_pattern)} != {self.num_hidden_layers}:
            raise ValueError(f"an intermediate_size or sparsity for each of {self.num_hidden_layers} layers is missing")
        if self.altup_active_idx >= self.altup_num_inputs:
            raise ValueError(f"stream {self.altup_active_idx} of {self.altup_num_inputs} cannot be computed")

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        num_layers = config["num_hidden_layers"]
        super().derive(config)
        if not isinstance(config["intermediate_size"], list):
            config["intermediate_size"] = [config["intermediate_size"]] * num_layers
        if config.get("activation_sparsity_pattern") is None:
            num_sparse = 10 if num_layers > 10 else 0
            config["activation_sparsity_pattern"] = [0.95] * num_sparse + [0.0] * (num_layers - num_sparse)

    @property
    def num_own(self) -> int:
        """Layers that keep keys and values."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def source(self, kind: str) -> int:
        """The layer whose keys and values later ones of its kind borrow."""
        own = self.layer_types[: self.num_own] if self.num_own > 0 else []
        if kind not in own:
            raise ModelError(f"config: no layer of {kind} keeps the keys and values that later ones borrow")
        return self.num_own - 1 - own[::-1].index(kind)


def _borrowing(scheme: Names, c: Gemma3nConfig, layers: str, queries: str, *unused: str) -> Names:
    """Layers that borrow keys and values may still come with what would make them."""
    borrowers = range(c.num_own, c.num_hidden_layers)
    own = names({f"{layers}.{i}.{queries}": f"layers.{i}.mix.q" for i in borrowers})
    return scheme | own | Names(beyond=tuple(f"{layers}.{i}.{name}." for i in borrowers for name in unused))


def _names(c: Gemma3nConfig) -> Names:
    return _borrowing(
        GEMMA3N, c, "model.layers", *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "k_norm"))
    )


def _gguf(c: Gemma3nConfig) -> Names:
    return _borrowing(GGUF_GEMMA3N, c, "blk", "attn_q", "attn_k", "attn_v", "attn_k_norm")


@arch("Gemma3nForCausalLM", config=Gemma3nConfig, hf=_names, gguf=_gguf)
@arch("Gemma3nForConditionalGeneration", config=Gemma3nConfig, hf=of_text(_names), like="Gemma3n")
def gemma3n(c: Gemma3nConfig) -> AltUpDecoder:
    eps, act = c.norm_eps, Activation(c.hidden_act)
    norm, head_norm = RMSNorm(c.hidden_size, eps), RMSNorm(c.head_dim, eps)
    windows = {"full_attention": 0, "sliding_attention": c.sliding_window}
    kinds = {
        kind: ValueNormAttention.of(c, scale=1.0, rope=c.rope(kind), window=window, qk_norm=head_norm, eps=eps)
        for kind, window in windows.items()
    }

    def layer(number: int, kind: str) -> AltUpLayer:
        ffn_size, sparsity = c.intermediate_size[number], c.activation_sparsity_pattern[number]
        borrows = number >= c.num_own
        return AltUpLayer(
            number=number,
            norm_in=norm,
            mix=BorrowingAttention(c.source(kind), kinds[kind], bias=c.attention_bias) if borrows else kinds[kind],
            norm_mix_out=norm,
            norm_mlp=norm,
            mlp=SparseMLP.of(c, ffn_size=ffn_size, sparsity=sparsity) if sparsity else MLP.of(c, ffn_size=ffn_size),
            norm_mlp_out=norm,
            altup=AltUp(c.hidden_size, c.altup_num_inputs, c.altup_active_idx, eps),
            laurel=Laurel(c.hidden_size, c.laurel_rank, eps),
            layer_input=LayerInput(c.hidden_size, c.hidden_size_per_layer_input, act, eps),
            scales=c.altup_correct_scale,
            hidden_size=c.hidden_size,
        )

    kinds_of = c.by_layer({kind: kind for kind in kinds})
    inputs = LayerInputs(
        c.hidden_size, c.num_hidden_layers, c.hidden_size_per_layer_input, c.vocab_size_per_layer_input, eps
    )
    return AltUpDecoder(
        c,
        [layer(number, kind) for number, kind in enumerate(kinds_of)],
        norm_out=norm,
        num_streams=c.altup_num_inputs,
        inputs=inputs,
        on_embed=Scale(c.hidden_size**0.5),
        on_logits=SoftCap(c.final_logit_softcapping) if c.final_logit_softcapping else None,
    )
