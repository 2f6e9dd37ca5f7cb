"""The gated feed-forward block."""

from typing import Any, Self

from torch import Tensor

from cableway.workers.blocks.block import Block
from cableway.workers.blocks.linear import Linear
from cableway.workers.formats.base import Sum
from cableway.workers.parallel import Axis


class MLP(Block):
    """y = down(silu(gate(x)) * up(x))"""

    takes_sum = True

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool | None = False):
        hidden, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.gate_up = Linear({"gate": ffn, "up": ffn}, hidden, bias=bias)
        self.down = Linear(hidden, ffn, bias=bias)

    @classmethod
    def of(cls, c: Any, **options: Any) -> Self:
        return cls(c.hidden_size, c.intermediate_size, **options)

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, E] -> [T, E]"""
        return self.down(self.gate_up.gated(x))
