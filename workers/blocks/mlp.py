"""Feed-forward blocks, gated and not."""

import math
from statistics import NormalDist
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.kernels.activation import activation
from cableway.kernels.silu_mul import silu_mul
from cableway.workers.blocks.block import Block
from cableway.workers.blocks.linear import Embedding, Linear, Vector
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis

_POLY_EPS = 1e-6
_MOST_NUMBERS = 1 << 26
"""That units are retrieved with together."""
_ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish", "swiglu"), "silu"),
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh"), "gelu_tanh"),
    "relu": "relu",
    **dict.fromkeys(("relu2", "relu_squared", "squared_relu"), "relu2"),
}
"""Name in a config -> kind of activation.py"""


class Activation(Block):
    """An activation by its name in a config; ModelError when it is not known."""

    def __init__(self, name: str):
        if name not in _ACTIVATIONS:
            raise ModelError(f"activation {name!r} is not supported (known: {', '.join(_ACTIVATIONS)})")
        self.kind = _ACTIVATIONS[name]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, F] -> [T, F]"""
        return activation(x, kind=self.kind)

    def gate(self, gate_up: Tensor) -> Tensor:
        """gate, then up [T, 2 F] -> act(gate) * up [T, F]"""
        return silu_mul(gate_up) if self.kind == "silu" else activation(gate_up, kind=self.kind, gated=True)


class ClampedGate(Block):
    """GPT-OSS: g / (1 + exp(-alpha g)) * (u + 1), with both clamped to `limit`."""

    def __init__(self, alpha: float, limit: float):
        self.alpha, self.limit = alpha, limit

    def gate(self, gate_up: Tensor) -> Tensor:
        return activation(gate_up, kind="swiglu_oai", gated=True, a=self.alpha, c=self.limit)


class XIELU(Block):
    """Apertus' activation, whose two shapes a checkpoint holds as the inverse of a softplus."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = Vector(Axis("one", 1)), Vector(Axis("one", 1))

    def prepare(self, place: Place) -> None:
        is_outline = place.device.type == "meta"
        p, n = (1.0 if is_outline else float(F.softplus(alpha.weight)) for alpha in (self.alpha_p, self.alpha_n))
        self._a, self._c = p, 0.5 + n

    def __call__(self, x: Tensor) -> Tensor:
        return activation(x, kind="xielu", a=self._a, c=self._c)


class PolyNorm(Block):
    """w0 norm(x³) + w1 norm(x²) + w2 norm(x) + b, with norm(x) = x / sqrt(mean(x²) + eps) over all that is gated."""

    def __init__(self, ffn_size: int):
        self.factors, self.offset = Vector(Axis("terms", 3)), Vector(Axis("one", 1))
        self.ffn = Axis("ffn", ffn_size)

    def prepare(self, place: Place) -> None:
        self._mesh = place.mesh

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        x = gate.float()
        powers = (x**3, x.square(), x)
        squares = torch.stack([power.square().sum(-1) for power in powers], -1)
        if self._mesh.is_cut(self.ffn):
            squares = self._mesh.all_reduce(squares)
        factors = self.factors.weight * torch.rsqrt(squares / self.ffn.size + _POLY_EPS)
        y = sum(power * factors[:, i, None] for i, power in enumerate(powers)) + self.offset.weight
        return (y * up).to(gate_up.dtype)


class FeedForward(Block):
    """What is said of it when nothing else is: sizes, activation and biases of the config."""

    takes_sum = True

    @classmethod
    def of(cls, c: Any, **options: Any) -> Self:
        if "act" not in options:
            options["act"] = Activation(c.hidden_act)
        return cls(c.hidden_size, **{"ffn_size": c.intermediate_size, "bias": c.mlp_bias, **options})


class MLP(FeedForward):
    """y = down(act(gate(x)) * up(x))

    Args:
        act: SiLU unless it is said otherwise.
        bias: of every matrix, or with `out_bias` of those before the last.
        norm: of what goes into `down`.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, *, act: Activation | ClampedGate | PolyNorm | None = None,
        bias: bool | None = False, out_bias: bool | None = None, norm: Block | None = None,
    ):  # fmt: skip
        hidden, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.gate_up = Linear({"gate": ffn, "up": ffn}, hidden, bias=bias)
        self.act = act or Activation("silu")
        self._is_silu = isinstance(self.act, Activation) and self.act.kind == "silu"
        self.norm = norm
        self.down = Linear(hidden, ffn, bias=bias if out_bias is None else out_bias)

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, E] -> [T, E]"""
        y = self.gate_up.gated(x) if self._is_silu else self.act.gate(self.gate_up(x))
        return self.down(y if self.norm is None else self.norm(y))


class SparseMLP(MLP):
    """Of a gate's numbers only what stands out counts: by how much it is above their mean and some deviations.

    Args:
        sparsity: part of numbers from a normal distribution that would not count.
    """

    def __init__(self, hidden_size: int, ffn_size: int, *, sparsity: float, **options: Any):
        super().__init__(hidden_size, ffn_size, **options)
        self.ffn, self.deviations = Axis("ffn", ffn_size), NormalDist().inv_cdf(sparsity)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._mesh = place.mesh

    def __call__(self, x: Tensor | Sum) -> Tensor:
        gate_up = self.gate_up(x)
        gate = gate_up[:, : gate_up.shape[1] // 2]
        wide = gate.float()
        sums = torch.stack((wide.sum(-1), wide.square().sum(-1)))
        if self._mesh.is_cut(self.ffn):
            sums = self._mesh.all_reduce(sums)
        mean, square = sums.div_(self.ffn.size)[..., None]
        deviation = (square - mean.square()).clamp_(min=0).sqrt_()
        gate.copy_((wide - mean - self.deviations * deviation).clamp_(min=0))
        return self.down(self.act.gate(gate_up))


class RetrievingMLP(MLP):
    """Beside an MLP, many units of one number each, of which a token uses a few: those with the best sum of two scores,
    one for the row and one for the column where the unit stands in a square of them. They count by a softmax of it.

    Args:
        num_units: of which there are as many as make a whole square. top_k: that a token uses.
    """

    takes_sum = False

    def __init__(self, hidden_size: int, ffn_size: int, *, num_units: int, top_k: int, **options: Any):
        super().__init__(hidden_size, ffn_size, **options)
        embed, units = Axis("embed", hidden_size), Axis("units", num_units)
        self.side, self.top_k = math.isqrt(num_units), top_k
        self.score = Linear(Axis("scores", 2, self.side), embed)
        self.units_in, self.units_out = Embedding(units, embed), Embedding(units, embed)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, E]"""
        most = max(_MOST_NUMBERS // (self.top_k * x.shape[1]), 1)
        retrieved = [self.retrieved(*some) for some in zip(x.split(most), self.score(x).split(most), strict=True)]
        return self.down(self.act.gate(self.gate_up(x))).add_(torch.cat(retrieved))

    def retrieved(self, x: Tensor, scores: Tensor) -> Tensor:
        """What units make of x [T, E], with the scores of rows and of columns [T, 2 side] -> [T, E]"""
        rows, columns = scores.float().chunk(2, 1)
        best, units = (rows[:, :, None] + columns[:, None]).flatten(1).topk(self.top_k)
        into, out = (table(units.flatten()).unflatten(0, units.shape) for table in (self.units_in, self.units_out))
        inner = self.act((into * x[:, None]).float().sum(-1)) * best.softmax(-1)
        return (inner[..., None] * out).sum(1).to(x.dtype)


class PlainMLP(FeedForward):
    """y = down(act(up(x)))"""

    def __init__(self, hidden_size: int, ffn_size: int, *, act: Activation | XIELU, bias: bool | None = False):
        hidden, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.up = Linear(ffn, hidden, bias=bias)
        self.act = act
        self.down = Linear(hidden, ffn, bias=bias)

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, E] -> [T, E]"""
        return self.down(self.act(self.up(x)))
