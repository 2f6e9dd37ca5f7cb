"""Sparse attention: an index with narrow keys of its own chooses the tokens that each token sees.

Key: T tokens, H heads of the index, of D numbers, K chosen tokens.
"""

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan
from cableway.kernels.index_scores import TokenPlan, index_scores
from cableway.kernels.latent_write import latent_write
from cableway.kernels.rope import rope as rotate
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Mixer
from cableway.workers.blocks.latent import LatentAttention
from cableway.workers.blocks.linear import Linear
from cableway.workers.blocks.norm import LayerNorm
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.parallel import Axis, Mesh

_MOST_SCORES = 1 << 26
"""That are looked at together: 256 MiB."""


class Index(Mixer):
    """The tokens of its sequence that a token is to see: the `top_k` with the highest scores, or all of fewer.

    Each head scores a key by what is positive of their product, and counts by a weight that the token gives it. Every
    rank makes the same choice.
    """

    def __init__(self, hidden_size: int, q_latent: int, num_heads: int, head_dim: int, top_k: int, *, rope: Rope):
        embed = Axis("embed", hidden_size)
        self.q = Linear(Axis("index", num_heads, head_dim), Axis("latent", q_latent))
        key = Axis("index", 1, head_dim)
        self.k = Linear(key, embed)
        self.k_norm = LayerNorm(head_dim, 1e-6, heads=key)
        self.weights = Linear(Axis("index", num_heads), embed)
        self.num_heads, self.head_dim, self.top_k, self.rope = num_heads, head_dim, top_k, rope

    def state(self, mesh: Mesh) -> StateSpec:
        return StateSpec("latent", (self.number,), 1, self.head_dim, num_planes=1)

    def ropes(self) -> list[Rope]:
        return [self.rope]

    def __call__(self, x: Tensor, narrow: Tensor, step: Step) -> tuple[Tensor, TokenPlan] | None:
        """x [T, E] and what queries are made from [T, R] -> chosen positions [T, K] i64, ascending, those of
        tokens to come last, and whose; None where all are chosen. This index's cache takes the keys of the T tokens."""
        q = self.q(narrow).unflatten(1, (self.num_heads, self.head_dim))
        k = self.k_norm(self.k(x))
        rotate(q, k[:, None], step.angles(self.rope))
        cache, tokens, slots = step.tokens(self.number)
        latent_write(k, cache, slots)
        if tokens.max_keys <= self.top_k and not step.invariant:
            return None
        weights = self.weights(x).float().mul_((self.num_heads * self.head_dim) ** -0.5)
        most, top_k = max(_MOST_SCORES // tokens.max_keys, 1), min(self.top_k, tokens.max_keys)
        parts = zip(q.split(most), weights.split(most), tokens.split(most), strict=True)
        chosen = [index_scores(q, w, cache, some).topk(top_k, sorted=False).indices for q, w, some in parts]
        return torch.cat(chosen).sort().values, tokens


class SparseLatentAttention(LatentAttention):
    """Attention over the latents that an index chooses: pages of one token each.

    Args:
        index: None = what the last one before has chosen.
    """

    def __init__(self, *sizes: int, index: Index | None, **options: object):
        super().__init__(*sizes, **options)
        self.index = index

    def seen(self, x: Tensor, narrow: Tensor, step: Step) -> tuple[Tensor, AttentionPlan]:
        cache, plan, _ = step.state(self.number)
        _, num_blocks, size, _, width = cache.shape
        if self.index is not None:
            step.chosen = None
            if (found := self.index(x, narrow, step)) is not None:
                chosen, tokens = found
                blocks = plan.block_table[tokens.sequence[:, None], chosen // size].long()
                slots, top_k = blocks.mul_(size).add_(chosen % size).int(), chosen.shape[1]
                step.chosen = step.one_by_one(tokens.lengths.clamp(max=top_k), slots, top_k)
        if step.chosen is None:
            return cache, plan
        return cache.view(1, num_blocks * size, 1, 1, width), step.chosen
