"""What the runner hands to a model: one step's tokens and where their state lives, and what state a model asks for."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A group of layers whose state is paged alike: one block table serves them all."""

    kind: str  # paged | sliding | latent | recurrent | encoder
    layers: tuple[int, ...]  # numbers of the model's mixers, ascending
    num_kv_heads: int
    head_dim: int
    window: int = 0  # tokens a sliding layer sees, itself included; 0 = all
    num_planes: int = 2  # rows a token keeps: its keys and its values, or one of both
    state_len: int = 0  # numbers of a state that stands for all tokens so far, one a block; 0 = rows by token

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: T tokens of S sequences, row after row. All tensors are on the model's device.

    A decode is a chunk of one token, so nothing here tells prefill from decode; a GPU is fastest where decodes come
    first. `block_tables` and `slots` have one entry a state group, in the order of `Decoder.state_groups()`. A sequence
    of length 0 is nobody's, as are its tokens, which pad a captured graph: their slots are -1.
    """

    token_ids: Tensor  # [T] i32
    positions: Tensor  # [T] i32
    query_start: Tensor  # [S + 1] i32; tokens query_start[i]:query_start[i + 1] belong to sequence i
    seq_lens: Tensor  # [S] i32; tokens computed before, and this chunk; 0: nobody's
    max_query_len: int
    max_seq_len: int
    block_tables: list[Tensor]  # a group: [S, max_blocks] i32; entries past a sequence's length are any valid block
    slots: list[Tensor]  # a group: [T] i64; block_id * block_size + offset where a token's state is written
    logits_at: Tensor | None  # [R] i64; tokens whose logits are wanted; None: all
    invariant: bool = False  # results of a sequence must not depend, to the bit, on the rest of the batch or on chunks
    may_have_singles: bool = True  # whether the first sequence may bring one token
    block_size: int = 0  # tokens of a block
    source_lens: Tensor | None = None  # [S] i32; tokens of what each sequence attends to besides, where there is that

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(frozen=True, slots=True)
class Source:
    """What some sequences attend to, whole: U tokens that an encoder takes before the sequences' own first step."""

    token_ids: Tensor  # [U] i32
    positions: Tensor  # [U] i32
    query_start: Tensor  # [P + 1] i32; tokens query_start[i]:query_start[i + 1] are one sequence's
    slots: Tensor  # [U] i64; where the state of group `encoder` is written
    max_len: int


class Decoder(Protocol):
    """What `weights.load` returns and the runner drives."""

    vocab_size: int
    has_encoder: bool

    def state_groups(self) -> list[StateSpec]:
        """Groups of layers by the state they keep; the order is that of `Batch.block_tables`."""

    def forward(self, batch: Batch, caches: list[Tensor]) -> Tensor:
        """Write the state of `batch` into `caches` (one a layer, see `memory.allocate`); hidden states [R, E]
        of the tokens whose logits are wanted."""

    def encode(self, source: Source, caches: list[Tensor]) -> None:
        """Write the state that sequences attend to into `caches`; for models that have an encoder."""

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, E] -> [R, vocab_size] float32, written to `out` if there is one."""
