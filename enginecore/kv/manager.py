"""KV manager: the block tables of requests, over one pool and any number of state groups."""

import bisect
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cableway.enginecore.kv.groups import Encoder, Group
from cableway.enginecore.kv.pool import BlockPool
from cableway.enginecore.request import Request

HOLE = -1
"""In a block table: no layer of the group looks here any more, and the block was given back."""


class Match(NamedTuple):
    """Blocks that hold the first `num_tokens` tokens of a request already; one table a group."""

    num_tokens: int
    tables: list[list[int]]
    leader: Request | None = None  # whose blocks they are, when they were not found in the cache


class KVManager:
    """Invariant: free + cached + owned == num_blocks, and an owned block has one reference a table that holds it.

    Args:
        groups: the model's state groups, in the worker's order.
        num_blocks: blocks of the pool, shared by all groups.
        block_size: tokens a block holds.
        chunk_len: tokens of one request computed in one step, at most.
        prefix_cache: publish full blocks, so that later requests find them.
    """

    def __init__(
        self, groups: Sequence[Group | Encoder], num_blocks: int, block_size: int, *, chunk_len: int, prefix_cache: bool
    ):
        self.groups = groups
        self._by_token = [(index, group) for index, group in enumerate(groups) if not isinstance(group, Encoder)]
        self._encoder = next((index for index, group in enumerate(groups) if isinstance(group, Encoder)), None)
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.copies: list[int] = []  # pairs (from_block, to_block) for the next plan
        self._chunk_len = chunk_len
        self._publishes = prefix_cache
        # One key names a prefix; a group's own suffix tells apart the blocks that hold its layers' state.
        self._suffixes = [bytes([index]) if index else b"" for index in range(len(groups))]
        self._forgetful = [(position, group) for position, group in self._by_token if not group.keeps_all]
        self._watches_borders = prefix_cache or bool(self._forgetful)

    @property
    def num_available(self) -> int:
        return self.pool.num_available

    @property
    def usage_frac(self) -> float:
        return 1 - self.pool.num_available / self.pool.num_blocks

    def blocks_for(self, num_tokens: int, source_len: int = 0) -> int:
        """Blocks that a sequence of `num_tokens` owns at once, at most, while it is computed chunk by chunk."""
        size = self.block_size
        total = 0 if self._encoder is None else -(-source_len // size)
        for _, group in self._by_token:
            kept = group.most_tokens(num_tokens, self._chunk_len)
            # A window's ends fall inside blocks, and what leaves it is given back at block borders only.
            total += min(-(-num_tokens // size), -(-kept // size) + 2)
        return total

    def longest_len(self, max_len: int) -> int:
        """Tokens, at most `max_len`, of the longest sequence that the whole pool can hold, with a source as long."""
        return bisect.bisect_right(range(max_len + 1), self.pool.num_blocks, key=lambda n: self.blocks_for(n, n)) - 1

    def lookup(self, request: Request) -> Match:
        """The longest prefix of `request` that every group has cached; at least one token is left to compute."""
        tokens, size = request.tokens, self.block_size
        found: list[list[int]] = [[] for _ in self.groups]
        num_blocks = 0
        if self._publishes and request.reads_prefix_cache:
            run_begin = [0] * len(self.groups)  # first block of the unbroken run that ends here
            for index in range((len(tokens) - 1) // size):
                key = request.chain.key(index, tokens, size)
                fits = True
                for position, group in self._by_token:
                    block_id = self.pool.find(key + self._suffixes[position])
                    found[position].append(HOLE if block_id is None else block_id)
                    if block_id is None:
                        run_begin[position] = index + 1
                    fits = fits and run_begin[position] * size <= group.first_needed((index + 1) * size)
                if fits:
                    num_blocks = index + 1
                elif any(run_begin[position] and group.keeps_all for position, group in self._by_token):
                    break
            if self._encoder is not None:
                found[self._encoder] = self._find_source(request)
        return self._match(num_blocks * size, found)

    def fork(self, leader: Request, num_tokens: int) -> Match | None:
        """The blocks of a running `leader` that hold its first `num_tokens`; None when it gave back some of them."""
        if num_tokens % self.block_size and not all(group.splits_blocks for _, group in self._by_token):
            return None
        if any(
            leader.num_windowed[position] * self.block_size > group.first_needed(num_tokens)
            for position, group in self._by_token
        ):
            return None
        return self._match(num_tokens, leader.tables)._replace(leader=leader)

    def num_new_blocks(self, match: Match, request: Request) -> int:
        """Available blocks that `request`, with one more token, takes when it begins with `match`."""
        held = [block_id for table in match.tables for block_id in table if block_id != HOLE]
        copied = len(self._by_token) if match.num_tokens % self.block_size else 0  # of blocks filled in part
        idle = sum(not self.pool.references[block_id] for block_id in held)
        wanted = self.blocks_for(len(request.tokens) + 1, request.source_len)
        return max(wanted - len(held) + copied, 0) + idle

    def num_to_encode(self, match: Match, request: Request) -> int:
        """Tokens of the source that are to be encoded when `request` begins with `match`."""
        return 0 if self._encoder is None or match.tables[self._encoder] else request.source_len

    def num_owed(self, request: Request) -> int:
        """Blocks that `request` still takes for the tokens it has."""
        held = sum(map(len, request.tables)) - sum(request.num_windowed)
        return max(self.blocks_for(len(request.tokens) + 1, request.source_len) - held, 0)

    def adopt(self, request: Request, match: Match) -> None:
        """Give `request` the blocks of `match`, shared; a last block that is filled in part becomes a copy of its own,
        since the request writes to it at once."""
        for table in match.tables:
            for block_id in table:
                if block_id != HOLE:
                    self.pool.share(block_id)
        request.tables = match.tables
        request.num_slots = len(match.tables[self._by_token[0][0]]) * self.block_size
        request.num_computed = request.num_planned = match.num_tokens
        request.num_windowed = [0] * len(self.groups)
        for position, group in self._by_token:
            request.num_windowed[position] = self._num_windowed(group, match.num_tokens)
            if match.num_tokens % self.block_size:
                table, copy = request.tables[position], self.pool.allocate()
                self.copies += (table[-1], copy)
                self.pool.release(table[-1])
                table[-1] = copy
        if self._encoder is not None:
            request.source_is_new = self.num_to_encode(match, request) > 0
            if request.source_is_new:
                num_blocks = -(-request.source_len // self.block_size)
                request.tables[self._encoder] += [self.pool.allocate() for _ in range(num_blocks)]
        self._set_border(request)

    def reserve(self, request: Request, num_tokens: int) -> list[list[int]] | None:
        """Blocks for the first `num_tokens` tokens: the new ids, one list a group, or None when too few are there."""
        num_new = -(-(num_tokens - request.num_slots) // self.block_size)
        if num_new <= 0:
            return [[] for _ in self.groups]
        if num_new * len(self._by_token) > self.pool.num_available:
            return None
        grown: list[list[int]] = [[] for _ in self.groups]
        for position, _ in self._by_token:
            grown[position] += [self.pool.allocate() for _ in range(num_new)]
            request.tables[position] += grown[position]
        request.num_slots += num_new * self.block_size
        return grown

    def commit(self, request: Request) -> None:
        """`request.num_computed` passed a block border: publish the blocks it filled, give back those it left.

        Also after its first step where it brought a source, which is encoded then.
        """
        size = self.block_size
        if request.source_is_new:
            self._publish_source(request)
        if self._publishes:
            for index in range(max(request.next_border // size - 1, 0), request.num_computed // size):
                key = request.chain.key(index, request.tokens, size)
                for position, _ in self._by_token:
                    self.pool.publish(request.tables[position][index], key + self._suffixes[position])
        for position, group in self._forgetful:
            table, until = request.tables[position], self._num_windowed(group, request.num_computed)
            for index in range(request.num_windowed[position], until):
                self.pool.release(table[index])
                table[index] = HOLE
            request.num_windowed[position] = until
        self._set_border(request)

    def release(self, request: Request) -> None:
        """Give back all blocks; the ends of sequences first, since a cached block is of no use without those before."""
        tables = [request.tables[position] for position, _ in self._by_token]
        for index in range(len(tables[0]) - 1, -1, -1):
            for table in tables:
                if table[index] != HOLE:
                    self.pool.release(table[index])
        if self._encoder is not None:
            for block_id in request.tables[self._encoder]:
                self.pool.release(block_id)
        request.tables = []

    def _match(self, num_tokens: int, tables: Sequence[list[int]]) -> Match:
        cut, num_blocks = [table.copy() for table in tables], -(-num_tokens // self.block_size)
        for position, group in self._by_token:
            windowed = self._num_windowed(group, num_tokens)
            cut[position] = [HOLE] * windowed + tables[position][windowed:num_blocks]
        return Match(num_tokens, cut)

    def _find_source(self, request: Request) -> list[int]:
        """The blocks of all that a request's source was encoded to, or none."""
        found = []
        for index in range(-(-request.source_len // self.block_size)):
            block_id = self.pool.find(request.chain.source_key(index))
            if block_id is None:
                return []
            found.append(block_id)
        return found

    def _publish_source(self, request: Request) -> None:
        request.source_is_new = False
        if self._publishes and self._encoder is not None:
            for index, block_id in enumerate(request.tables[self._encoder]):
                self.pool.publish(block_id, request.chain.source_key(index))

    def _num_windowed(self, group: Group, num_tokens: int) -> int:
        return group.first_needed(num_tokens) // self.block_size

    def _set_border(self, request: Request) -> None:
        passed = request.num_computed // self.block_size if self._watches_borders else sys.maxsize >> 16
        request.next_border = request.num_computed + 1 if request.source_is_new else (passed + 1) * self.block_size
