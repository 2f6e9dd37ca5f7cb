"""T5, Flan-T5 and mT5: an encoder, and a decoder that attends to it. No positions: scores have what heads have learned
of distances, in the first layer, for all, or in UMT5 in each; and they are not scaled."""

from typing import Any, ClassVar

from cableway.workers.blocks.block import shared
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.encoder import BiasedAttention, CrossAttention, Encoder, EncoderAttention, RelativeBias
from cableway.workers.blocks.layers import CrossLayer, Layer
from cableway.workers.blocks.mlp import MLP, PlainMLP
from cableway.workers.blocks.norm import RMSNorm, Scale
from cableway.workers.models.config import DecoderConfig, NumLayers, Size
from cableway.workers.models.hf_names import known_as
from cableway.workers.models.layouts import transposed
from cableway.workers.models.names import Names, names
from cableway.workers.models.registry import arch

_NORMS = {"encoder": ("norm_in", "norm_mlp"), "decoder": ("norm_in", "norm_cross", "norm_mlp")}
_STACK = {
    "norm_in": ("attn_norm",),
    "mix.qkv.q": ("SelfAttention.q", "attn_q"),
    "mix.qkv.k": ("SelfAttention.k", "attn_k"),
    "mix.qkv.v": ("SelfAttention.v", "attn_v"),
    "mix.out": ("SelfAttention.o", "attn_o"),
    "norm_cross": ("cross_attn_norm",),
    "cross.q": ("EncDecAttention.q", "cross_attn_q"),
    "cross.kv.k": ("EncDecAttention.k", "cross_attn_k"),
    "cross.kv.v": ("EncDecAttention.v", "cross_attn_v"),
    "cross.out": ("EncDecAttention.o", "cross_attn_o"),
    "norm_mlp": ("ffn_norm",),
    "mlp.up": ("DenseReluDense.wi",),
    "mlp.gate_up.gate": ("DenseReluDense.wi_0", "ffn_gate"),
    "mlp.gate_up.up": ("DenseReluDense.wi_1",),
    "mlp.down": ("DenseReluDense.wo", "ffn_down"),
}
"""The names in folders, and in GGUF files."""
_DISTANCES = {"mix.relative.table": ("SelfAttention.relative_attention_bias", "attn_rel_b")}
_IN_STACKS = known_as(_STACK) | known_as(_DISTANCES, layout=transposed)


class T5Config(DecoderConfig, frozen=True, kw_only=True):
    encoder_layers: NumLayers
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    is_gated: bool
    scale_decoder_outputs: bool
    feed_forward: ClassVar[str] = "relu"
    """Where a file does not say it."""

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        kind, _, act = config.get("feed_forward_proj", cls.feed_forward).rpartition("-")
        tied = config.get("tie_word_embeddings", True)
        config |= {
            "num_attention_heads": config["num_heads"],
            "encoder_layers": config["num_layers"],
            "num_hidden_layers": config.get("num_decoder_layers") or config["num_layers"],
            "is_gated": kind == "gated",
            "hidden_act": "gelu_new" if (kind, act) == ("gated", "gelu") else act,
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": config.get("scale_decoder_outputs", tied),
        }


class UMT5Config(T5Config, frozen=True, kw_only=True):
    feed_forward = "gated-gelu"


class MT5Config(UMT5Config, frozen=True, kw_only=True):
    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config.setdefault("scale_decoder_outputs", False)
        super().derive(config)


def _names(c: T5Config) -> Names:
    around = {
        "shared": "embed",
        "encoder.final_layer_norm": "encoder.norm_out",
        "decoder.final_layer_norm": "norm_out",
        "lm_head": "head",
    }
    scheme = names(around, ignored=("encoder.embed_tokens", "decoder.embed_tokens"))
    unused = ("EncDecAttention.relative_attention_bias",)  # which the first release of all has
    for stack, to, num_layers in (("encoder", "encoder.", c.encoder_layers), ("decoder", "", c.num_hidden_layers)):
        norms = {
            f"{stack}.block.{i}.layer.{n}.layer_norm": f"{to}layers.{i}.{norm}"
            for i in range(num_layers)
            for n, norm in enumerate(_NORMS[stack])
        }
        of_layer = {"prefix": f"{stack}.block.{{}}.layer.{{}}.", "to": f"{to}layers.{{}}."}
        scheme |= names(_IN_STACKS, ignored=unused, **of_layer) | names(norms)
    return scheme


def _gguf(c: T5Config) -> Names:
    around = {
        "token_embd": "embed",
        "enc.output_norm": "encoder.norm_out",
        "dec.output_norm": "norm_out",
        "output": "head",
    }
    stack = _IN_STACKS | {"ffn_up": "mlp.gate_up.up" if c.is_gated else "mlp.up"}
    encoder = names(stack, prefix="enc.blk.{}.", to="encoder.layers.{}.")
    decoder = names(stack, ignored=("cross_attn_rel_b",), prefix="dec.blk.{}.", to="layers.{}.")
    return names(around) | encoder | decoder


@arch("T5ForConditionalGeneration", config=T5Config, hf=_names, gguf=_gguf)
@arch("MT5ForConditionalGeneration", config=MT5Config, hf=_names)
@arch("T5WithLMHeadModel", config=T5Config, hf=_names, like="T5")
def t5(c: T5Config) -> Decoder:
    return _encoder_decoder(c, *map(shared, _biases(c)))


@arch("UMT5ForConditionalGeneration", config=UMT5Config, hf=_names, gguf=_gguf)
def umt5(c: UMT5Config) -> Decoder:
    return _encoder_decoder(c, *_biases(c))


def _biases(c: T5Config) -> list[RelativeBias]:
    """Of a decoder, which looks back, and of an encoder."""
    buckets = (c.num_attention_heads, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    return [RelativeBias(*buckets, both_ways=both_ways) for both_ways in (False, True)]


def _encoder_decoder(c: T5Config, before: RelativeBias, around: RelativeBias) -> Decoder:
    norm, mlp = RMSNorm(c.hidden_size, c.norm_eps), (MLP if c.is_gated else PlainMLP).of(c)
    options = {"rope": None, "scale": 1.0}
    encoder_layer = Layer(norm_in=norm, mix=EncoderAttention.of(c, relative=around, **options), norm_mlp=norm, mlp=mlp)
    decoder_layer = CrossLayer(
        norm_in=norm,
        mix=BiasedAttention.of(c, relative=before, **options),
        norm_cross=norm,
        cross=CrossAttention(c.hidden_size, c.num_attention_heads, c.head_dim, scale=1.0),
        norm_mlp=norm,
        mlp=mlp,
    )
    return Decoder(
        c,
        [decoder_layer] * c.num_hidden_layers,
        norm_out=norm,
        on_logits=Scale(c.hidden_size**-0.5) if c.scale_decoder_outputs else None,
        encoder=Encoder([encoder_layer] * c.encoder_layers, norm_out=norm),
    )
