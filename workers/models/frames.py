"""How most families put layers together. A mixer or an MLP is that of every layer, or a list has one for each."""

from functools import partial
from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer, Norm, ParallelLayer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import DecoderConfig


def pre_norm(
    c: DecoderConfig, mix: Any, mlp: Any = None, norm: Norm | None = None, *, layer: Any = Layer, **out: Any
) -> Decoder:
    """A norm before each mixer and each MLP (RMS and gated unless they are given), and one at the end.

    Args:
        layer: what makes a layer of these: of other than one after another.
    """
    norm, mlp = norm or RMSNorm(c.hidden_size, c.norm_eps), mlp or MLP.of(c)
    blocks = zip(_each(c, mix), _each(c, mlp), strict=True)
    layers = [layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=mlp) for mix, mlp in blocks]
    return Decoder(c, layers, **{"norm_out": norm, **out})


def sandwich(
    c: DecoderConfig, mix: Any, mlp: Any = None, norm: Norm | None = None, *, mix_out: Any = None, mlp_out: Any = None,
    **out: Any,
) -> Decoder:  # fmt: skip
    """Norms after each mixer and each MLP too, or multipliers."""
    norm = norm or RMSNorm(c.hidden_size, c.norm_eps)
    layer = partial(Layer, norm_mix_out=mix_out or norm, norm_mlp_out=mlp_out or norm)
    return pre_norm(c, mix, mlp, norm, layer=layer, **out)


def post_norm(c: DecoderConfig, mix: Any) -> Decoder:
    """A norm after each mixer and each MLP, and none before them."""
    norm, mlp = RMSNorm(c.hidden_size, c.norm_eps), MLP.of(c)
    layers = [Layer(mix=mix, norm_mix_out=norm, mlp=mlp, norm_mlp_out=norm) for mix in _each(c, mix)]
    return Decoder(c, layers, norm_out=norm)


def side_by_side(c: DecoderConfig, mix: Any, mlp: Any, norm: Norm, **out: Any) -> Decoder:
    """Mixer and MLP on the same stream, after one norm."""
    layers = [ParallelLayer(norm_in=norm, mix=mix, mlp=mlp) for mix in _each(c, mix)]
    return Decoder(c, layers, norm_out=norm, **out)


def near_and_far(c: Any, mixer: type[Attention] = Attention, **options: Any) -> list[Attention]:
    """Attention of each layer, by its type: to a window or to everything, with the rotation of that type."""
    kinds = {
        kind: mixer.of(c, rope=c.rope(kind), window=window, **options)
        for kind, window in (("full_attention", 0), ("sliding_attention", c.sliding_window or 0))
        if kind in (c.layer_types or ())
    }
    return c.by_layer(kinds)


def _each(c: DecoderConfig, block: Any) -> list[Any]:
    return block if isinstance(block, list) else [block] * c.num_hidden_layers
