"""One forward pass as the blocks see it: what is worked out once and used by every layer."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan
from cableway.kernels.index_scores import TokenPlan
from cableway.kernels.kv_cache import F8, NO_SCALES, KVScales
from cableway.kernels.recurrence import RecurrentPlan
from cableway.kernels.rope import Angles
from cableway.workers.batch import Batch
from cableway.workers.blocks.rope import Rope


class Step:
    """A batch, the caches it writes and reads, and the angles of its positions.

    Args:
        caches: one a mixer.
        group_of: the state group of each mixer.
        scales: of each mixer's keys and values, where they are kept as f8.
        tables: angles by position of each kind of rotation in the model.

    Attributes:
        positions: of the batch's tokens [T] i32.
        kept: what layers leave for later ones, by name.
        chosen: what tokens see in layers that take what an earlier one has chosen; None: all.
        invariant: see `Batch`.
    """

    def __init__(
        self, batch: Batch, caches: Sequence[Tensor], group_of: Sequence[int], scales: Sequence[KVScales],
        tables: Mapping[Rope, Tensor],
    ) -> None:  # fmt: skip
        self._batch, self._caches, self._group_of, self._slots = batch, caches, group_of, batch.slots
        self._scales = [s if c.dtype in F8 else NO_SCALES for s, c in zip(scales, caches, strict=True)]
        self._source_plans: dict[int, AttentionPlan] = {}
        self._lengths: Tensor | None = None  # [T] i32: keys that each token sees
        self.positions = batch.positions
        self.kept: dict[str, Tensor] = {}
        self.chosen: AttentionPlan | None = None
        self.invariant = batch.invariant
        self._angles = {rope: Angles(table, batch.positions) for rope, table in tables.items()}
        self._plans = [
            AttentionPlan(
                batch.query_start,
                batch.seq_lens,
                table,
                batch.max_query_len,
                batch.max_seq_len,
                batch.invariant,
                may_have_singles=batch.may_have_singles,
            )
            for table in batch.block_tables
        ]
        self.embeddings: Tensor | None = None  # [T, E] of the batch's tokens, where a layer sees them again
        self._recurrent = [
            RecurrentPlan(
                batch.query_start, batch.seq_lens, table, batch.block_size, batch.max_query_len, batch.invariant
            )
            for table in batch.block_tables
        ]

    def recurrent(self, mixer: int) -> tuple[Tensor, RecurrentPlan]:
        """A mixer's states [num_blocks, state_len], and which of them the batch's sequences have."""
        return self._caches[mixer][0].flatten(1), self._recurrent[self._group_of[mixer]]

    def source(self, mixer: int) -> tuple[Tensor, AttentionPlan]:
        """A mixer's cache of sources, and a plan in which each token is a sequence of its own that sees all of one."""
        group, batch = self._group_of[mixer], self._batch
        if group not in self._source_plans:
            lengths, table = batch.source_lens.index_select(0, self._sequence), batch.block_tables[group]
            most = table.shape[1] * batch.block_size
            self._source_plans[group] = self.one_by_one(lengths, table.index_select(0, self._sequence), most)
        return self._caches[mixer], self._source_plans[group]

    def tokens(self, mixer: int) -> tuple[Tensor, TokenPlan, Tensor]:
        """A mixer's cache, where the keys of each token's sequence lie in it, and the slots of the tokens."""
        cache, plan, slots = self.state(mixer)
        if self._lengths is None:
            batch = self._batch
            is_nobodys = batch.seq_lens.index_select(0, self._sequence) == 0
            self._lengths = (batch.positions + 1).masked_fill_(is_nobodys, 0)
        return cache, TokenPlan(self._sequence, self._lengths, plan.block_table, plan.max_seq_len), slots

    def one_by_one(self, lengths: Tensor, table: Tensor, max_len: int) -> AttentionPlan:
        """A plan in which each token is a sequence of its own, the last of it."""
        tokens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return AttentionPlan(tokens, lengths, table, 1, max_len, self._batch.invariant)

    @cached_property
    def _sequence(self) -> Tensor:
        """[T] i64: whose each token is."""
        batch = self._batch
        tokens = torch.arange(batch.num_tokens, dtype=torch.int32, device=batch.token_ids.device)
        return torch.searchsorted(batch.query_start[1:], tokens, right=True)

    def scales(self, mixer: int) -> KVScales:
        """By what a mixer's keys and values are divided in its cache."""
        return self._scales[mixer]

    def angles(self, rope: Rope) -> Angles:
        """By how much the batch's tokens are rotated."""
        return self._angles[rope]

    def state(self, mixer: int) -> tuple[Tensor, AttentionPlan, Tensor]:
        """A mixer's cache, where the batch's sequences lie in it, and the slots of the batch's tokens [T] i64."""
        group = self._group_of[mixer]
        return self._caches[mixer], self._plans[group], self._slots[group]
