"""Lightning attention: linear attention that forgets at a rate of each head's own."""

import torch
from torch import Tensor

from cableway.kernels.activation import activation
from cableway.kernels.state_scan import state_scan
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import Linear
from cableway.workers.blocks.mamba import Recurrent
from cableway.workers.blocks.norm import JointNorm
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh


class LightningAttention(Recurrent):
    """MiniMax: a head's state is exp(-rate) of the last one and k vᵀ, with SiLU of q, k and v; what q reads of it is
    normalised over all heads and counts by a sigmoid of a gate.

    Args:
        rate: of forgetting: head i of n has rate * 2^(-8 i / n).
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, *, rate: float, norm_eps: float):
        embed, self.values = Axis("embed", hidden_size), Axis("heads", num_heads, head_dim)
        self.project = Linear(dict.fromkeys(("q", "k", "v", "gate"), self.values), embed)
        self.norm = JointNorm(self.values, norm_eps)
        self.out = Linear(embed, self.values)
        self.head_dim, self.rate = head_dim, rate

    def state_len(self, mesh: Mesh) -> int:
        return mesh.span(self.values).size * self.head_dim

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        num, span = self.values.count, place.mesh.span(self.values)
        first, last = span.start // self.head_dim, span.stop // self.head_dim
        rates = self.rate * 2.0 ** (-8 / num * torch.arange(1, num + 1)[first:last, None])
        self._decay = -rates.to(place.device)
        self._none = torch.zeros(last - first, device=place.device)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        *qkv, gate = self.project(x).split(self.project.local_sizes, 1)
        q, k, v = (activation(part, kind="silu").unflatten(1, (-1, self.head_dim)) for part in qkv)
        # A state space whose steps are all one: what it takes in is v, b and c are k and q.
        steps = torch.ones(v.shape[:2], device=v.device)
        y = state_scan(v, steps, self._decay, k, q, self._none, *step.recurrent(self.number))
        return self.out(self.norm(y.flatten(1)).mul_(sigmoid(gate)))
