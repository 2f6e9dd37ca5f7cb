"""RWKV 4. A layer of its checkpoints is two here: a mixer in time, and one over channels, which keeps a token too."""

from typing import Any

from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer
from cableway.workers.blocks.norm import LayerNorm
from cableway.workers.blocks.rwkv import ChannelMix, TimeMix
from cableway.workers.models.config import DecoderConfig, Epsilon, Size
from cableway.workers.models.layouts import flat
from cableway.workers.models.names import Names, Target, names
from cableway.workers.models.registry import arch

_LAST_EPS = 1e-5

RWKV = names(
    {"rwkv.embeddings": "embed", "rwkv.blocks.0.pre_ln": "on_embed", "rwkv.ln_out": "norm_out", "head": "head"}
)
_TIME = {
    "time_decay": "mix.decay",
    "time_first": "mix.first",
    "time_mix_key": Target("mix.mixes.0", layout=flat),
    "time_mix_value": Target("mix.mixes.1", layout=flat),
    "time_mix_receptance": Target("mix.mixes.2", layout=flat),
    "key": "mix.k",
    "value": "mix.v",
    "receptance": "mix.r",
    "output": "mix.out",
}
_CHANNELS = {
    "time_mix_key": Target("mix.mixes.0", layout=flat),
    "time_mix_receptance": Target("mix.mixes.1", layout=flat),
    "key": "mix.up",
    "value": "mix.down",
    "receptance": "mix.r",
}


class RwkvConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    attention_hidden_size: Size

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["num_attention_heads"] = 1
        config["attention_hidden_size"] = config.get("attention_hidden_size") or config["hidden_size"]
        config.setdefault("intermediate_size", 4 * config["hidden_size"])


def _names(c: RwkvConfig) -> Names:
    scheme = RWKV
    for i in range(c.num_hidden_layers):
        block, halves = f"rwkv.blocks.{i}.", (f"layers.{2 * i}.", f"layers.{2 * i + 1}.")
        scheme |= names({"ln1": f"{halves[0]}norm_in", "ln2": f"{halves[1]}norm_in"}, prefix=block)
        scheme |= names(_TIME, prefix=f"{block}attention.", to=halves[0])
        scheme |= names(_CHANNELS, prefix=f"{block}feed_forward.", to=halves[1])
    return scheme


@arch("RwkvForCausalLM", config=RwkvConfig, hf=_names)
def rwkv(c: RwkvConfig) -> Decoder:
    norm = LayerNorm(c.hidden_size, c.norm_eps)
    time = Layer(norm_in=norm, mix=TimeMix(c.hidden_size, c.attention_hidden_size))
    channels = Layer(norm_in=norm, mix=ChannelMix(c.hidden_size, c.intermediate_size))
    layers = [time, channels] * c.num_hidden_layers
    return Decoder(c, layers, norm_out=LayerNorm(c.hidden_size, _LAST_EPS), on_embed=norm)
