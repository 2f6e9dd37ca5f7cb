"""BART and mBART: an encoder, and a decoder that attends to it; learned positions. Norms of BART stand on the stream,
after each sum; those of mBART before each sublayer and after the last."""

from functools import partial
from typing import Self

from msgspec.structs import replace

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder, Positions
from cableway.workers.blocks.encoder import CrossAttention, Encoder, EncoderAttention
from cableway.workers.blocks.layers import CrossLayer, Layer, PostNormLayer
from cableway.workers.blocks.mlp import PlainMLP
from cableway.workers.blocks.norm import LayerNorm
from cableway.workers.models.config import DecoderConfig, Epsilon, NumLayers, Size
from cableway.workers.models.layouts import flat, scaled
from cableway.workers.models.names import Names, Target, names, of_parts
from cableway.workers.models.registry import arch

_LAYER = {
    **of_parts("self_attn.*_proj", "mix.qkv"),
    "self_attn.out_proj": "mix.out",
    "self_attn_layer_norm": "norm_in",
    "encoder_attn.q_proj": "cross.q",
    **of_parts("encoder_attn.*_proj", "cross.kv", "kv"),
    "encoder_attn.out_proj": "cross.out",
    "encoder_attn_layer_norm": "norm_cross",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "final_layer_norm": "norm_mlp",
}


class BartConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    encoder_layers: NumLayers
    encoder_attention_heads: Size
    encoder_ffn_dim: Size
    max_position_embeddings: Size
    scale_embedding: bool = False

    @property
    def of_encoder(self) -> Self:
        """The same with the encoder's sizes for the decoder's."""
        heads = self.encoder_attention_heads
        sizes = {"head_dim": self.hidden_size // heads, "intermediate_size": self.encoder_ffn_dim}
        return replace(self, num_attention_heads=heads, num_key_value_heads=heads, **sizes)

    @property
    def embed_scale(self) -> float:
        """Of the embeddings of tokens."""
        return self.hidden_size**0.5 if self.scale_embedding else 1.0


def _names(c: BartConfig) -> Names:
    """Where embeddings are scaled, positions are divided by as much instead: a norm follows."""
    positions = scaled(1 / c.embed_scale)
    around = {
        "shared": "embed",
        "encoder.embed_positions": Target("encoder.positions.table", layout=positions),
        "encoder.layernorm_embedding": "encoder.on_embed",
        "encoder.layer_norm": "encoder.norm_out",
        "decoder.embed_positions": Target("positions.table", layout=positions),
        "decoder.layernorm_embedding": "on_embed",
        "decoder.layer_norm": "norm_out",
    }
    copies = ("encoder.embed_tokens", "decoder.embed_tokens", "encoder.version", "decoder.version")
    head = {"lm_head": "head", "final_logits_bias": Target("head", layout=flat, leaf="bias")}
    return (
        names(around, prefix="model.", ignored=copies)
        | names(_LAYER, prefix="model.encoder.layers.{}.", to="encoder.layers.{}.")
        | names(_LAYER, prefix="model.decoder.layers.{}.", to="layers.{}.")
        | names(head)
    )


@arch("BartForConditionalGeneration", config=BartConfig, hf=_names)
def bart(c: BartConfig) -> Decoder:
    return encoder_decoder(c, PostNormLayer, PostNormLayer, None)


@arch("MBartForConditionalGeneration", config=BartConfig, hf=_names)
def mbart(c: BartConfig) -> Decoder:
    return encoder_decoder(c, Layer, CrossLayer, LayerNorm(c.hidden_size, c.norm_eps))


def encoder_decoder(c: BartConfig, layer: type, cross_layer: type, norm_out: LayerNorm | None) -> Decoder:
    hidden, norm = c.hidden_size, LayerNorm(c.hidden_size, c.norm_eps)
    embedded = LayerNorm(hidden, c.norm_eps / c.embed_scale**2)
    positions = partial(Positions, c.max_position_embeddings, hidden, offset=2)
    options = {"rope": None, "bias": True, "out_bias": True}
    encoder_layer = layer(
        norm_in=norm,
        mix=EncoderAttention.of(c.of_encoder, **options),
        norm_mlp=norm,
        mlp=PlainMLP.of(c.of_encoder, bias=True),
    )
    decoder_layer = cross_layer(
        norm_in=norm,
        mix=Attention.of(c, **options),
        norm_cross=norm,
        cross=CrossAttention(hidden, c.num_attention_heads, c.head_dim, scale=c.head_dim**-0.5, bias=True),
        norm_mlp=norm,
        mlp=PlainMLP.of(c, bias=True),
    )
    encoder_layers = [encoder_layer] * c.encoder_layers
    return Decoder(
        c,
        [decoder_layer] * c.num_hidden_layers,
        norm_out=norm_out,
        positions=positions(),
        on_embed=embedded,
        head_bias=None,
        encoder=Encoder(encoder_layers, norm_out=norm_out, positions=positions(), on_embed=embedded),
    )
