"""State groups: layers whose state is paged alike. What a group keeps, and for how long, is all that tells them apart.

Every group has a block table of its own for each request; all of them take their blocks from one pool.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from cableway.ipc.messages import StateGroup


class Group(Protocol):
    """A group whose blocks are of a sequence's tokens."""

    keeps_all: ClassVar[bool]
    splits_blocks: ClassVar[bool]
    """Whether what a block holds for its first tokens is of use without the others'."""

    def first_needed(self, num_tokens: int) -> int:
        """First token whose state is still read once `num_tokens` tokens are computed."""

    def most_tokens(self, num_tokens: int, chunk_len: int) -> int:
        """Tokens a sequence of `num_tokens` keeps at most, computed `chunk_len` at a time."""


@dataclass(frozen=True, slots=True)
class Paged:
    """Full attention, to keys and values or to latents of them: every token is read for ever."""

    keeps_all: ClassVar[bool] = True
    splits_blocks: ClassVar[bool] = True

    def first_needed(self, num_tokens: int) -> int:
        return 0

    def most_tokens(self, num_tokens: int, chunk_len: int) -> int:
        return num_tokens


@dataclass(frozen=True, slots=True)
class Sliding:
    """Attention to the last `window` tokens, the one that looks included."""

    window: int
    keeps_all: ClassVar[bool] = False
    splits_blocks: ClassVar[bool] = True

    def first_needed(self, num_tokens: int) -> int:
        return max(0, num_tokens + 1 - self.window)

    def most_tokens(self, num_tokens: int, chunk_len: int) -> int:
        return min(num_tokens, self.window - 1 + chunk_len)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A state that stands for all tokens so far, kept at the end of each block: the last one goes on."""

    keeps_all: ClassVar[bool] = False
    splits_blocks: ClassVar[bool] = False

    def first_needed(self, num_tokens: int) -> int:
        return max(0, num_tokens - 1)

    def most_tokens(self, num_tokens: int, chunk_len: int) -> int:
        return min(num_tokens, 1 + chunk_len)


@dataclass(frozen=True, slots=True)
class Encoder:
    """What the decoder's tokens attend to besides: a source, encoded whole before the first of them is computed.

    Its blocks are of the source's tokens, not of the sequence's.
    """


def group_of(described: StateGroup) -> "Group | Encoder":
    """The group a worker describes; ValueError when this core does not know its kind."""
    match described.kind:
        case "paged" | "latent":
            return Paged()
        case "recurrent":
            return Recurrent()
        case "encoder":
            return Encoder()
        case "sliding" if described.window > 0:
            return Sliding(described.window)
    raise ValueError(f"state group of kind {described.kind!r} with window {described.window} is not known")
