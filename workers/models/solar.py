"""Solar Pro: Llama, with the stream kept before some layers and blended into that of later ones."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import BridgedLayer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import DecoderConfig
from cableway.workers.models.hf_names import HF
from cableway.workers.models.registry import arch


class SolarConfig(DecoderConfig, frozen=True, kw_only=True):
    """Layers before which streams 1 and 2 are kept (bskcn_1, 2) and taken (3, 4); parts of a blend in training, now."""

    bskcn_1: tuple[int, ...]
    bskcn_2: tuple[int, ...]
    bskcn_3: tuple[int, ...]
    bskcn_4: tuple[int, ...]
    bskcn_tv: tuple[float, float]

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        for kept, taken in ((self.bskcn_1, self.bskcn_3), (self.bskcn_2, self.bskcn_4)):
            if taken and min(taken) < min(kept, default=self.num_hidden_layers):
                raise ValueError(f"a stream is taken before layer {min(taken)}, but not kept before")


@arch("SolarForCausalLM", config=SolarConfig, hf=HF, like="Llama")
def solar(c: SolarConfig) -> Decoder:
    norm, mix, mlp = RMSNorm(c.hidden_size, c.norm_eps), Attention.of(c), MLP.of(c)

    def layer(number: int) -> BridgedLayer:
        keeps = [name for name, at in (("first", c.bskcn_1), ("second", c.bskcn_2)) if number in at]
        takes = [name for name, at in (("first", c.bskcn_3), ("second", c.bskcn_4)) if number in at]
        blocks = {"norm_in": norm, "mix": mix, "norm_mlp": norm, "mlp": mlp}
        return BridgedLayer(keeps=keeps, takes=takes, part=c.bskcn_tv[1], **blocks)

    return Decoder(c, [layer(number) for number in range(c.num_hidden_layers)], norm_out=norm)
