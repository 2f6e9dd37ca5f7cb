"""A worker that keeps real books: it does to its memory what a plan says, and notices every misplaced block.

Its "model" is a function of the tokens so far. What it keeps for a token is the hash of the prefix up to it, and to
compute a token it looks up what the layers of each state group would look at, through the block table it was told: a
block that was shared, copied, given back or reused wrongly is a mismatch at once. A recurrent group keeps one hash a
block, that of its last token so far; an encoder group keeps hashes of a source, of which all others are made too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cableway.ipc.messages import (
    Generate,
    Logprobs,
    NewRow,
    RunLeft,
    Sampling,
    StateGroup,
    StepPlan,
    StepResult,
    StepResults,
    ints,
    unpack_ints,
)
from cableway.workers.plans import rest_of_run

VOCAB = 50
EOS = 0


STATE = -1
"""Where in a block the state of a recurrent group is."""


def next_token(tokens: Sequence[int], sampling: Sampling, choice: int, source: int) -> int:
    """The model: one of VOCAB, decided by everything that may decide it. Stop tokens wait for min_tokens."""
    digest = hashlib.blake2b(repr((list(tokens), sampling.seed, choice, source)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def undisturbed(generate: Generate, index: int, max_model_len: int) -> tuple[list[int], str]:
    """What choice `index` of a request yields when nothing else ever happens: its tokens and its finish reason."""
    sampling = generate.sampling
    tokens = unpack_ints(generate.prompt).tolist()
    num_prompt, source = len(tokens), hash(generate.source)
    eos = set(unpack_ints(sampling.eos_token_ids).tolist()) | set(unpack_ints(sampling.stop_token_ids).tolist())
    while len(tokens) - num_prompt < sampling.max_tokens and len(tokens) < max_model_len:
        token = next_token(tokens, sampling, index, source)
        tokens.append(token)
        if token in eos and len(tokens) - num_prompt > sampling.min_tokens:
            return tokens[num_prompt:], "stop"
    return tokens[num_prompt:], "length"


def prefix_hashes(tokens: Sequence[int], source: int) -> list[int]:
    value, hashes = source, []
    for token in tokens:
        value = hash((value, token))
        hashes.append(value)
    return hashes


@dataclass
class Row:
    new: NewRow
    tokens: list[int]
    num_computed: int
    tables: list[list[int]] = field(default_factory=list)
    source: int = hash(b"")  # of what is kept of its source


class FakeWorker:
    """Executes plans in order. `execute` raises AssertionError on a plan that no real worker could carry out."""

    def __init__(self, groups: list[StateGroup], num_blocks: int, block_size: int, budget: int, max_num_seqs: int):
        self.groups, self.num_blocks, self.block_size = groups, num_blocks, block_size
        self.budget, self.max_num_seqs = budget, max_num_seqs
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (group, prefix hash)
        self.rows: dict[int, Row] = {}
        self.num_computed = self.num_encoded = 0
        self.has_ended = False  # whether a row drew a token that ends it, in the last step

    def run(self, plan: StepPlan) -> list[StepResults | RunLeft]:
        """What it says when it carries out a plan that no other follows: a run is left when a row ends."""
        results = [self.execute(plan)]
        while (rest := rest_of_run(plan)) and not self.has_ended:
            plan = rest
            results.append(self.execute(plan))
        return [StepResults(results), *([RunLeft(rest.epoch, rest.step)] if rest else [])]

    def execute(self, plan: StepPlan) -> StepResult:
        """One step, the first where the plan is of a run."""
        for row in unpack_ints(plan.freed):
            del self.rows[row]
        for new in plan.new:
            assert new.row not in self.rows
            assert 0 <= new.row < self.max_num_seqs
            tables = [unpack_ints(blocks).tolist() for blocks in new.blocks]
            self.rows[new.row] = Row(new, unpack_ints(new.tokens).tolist(), new.num_computed, tables)
            self._encode(new, tables)
        copies = unpack_ints(plan.copies)
        for source, target in zip(copies[::2], copies[1::2], strict=True):
            for offset in (*range(self.block_size), STATE):
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        self._grow(plan)
        return self._forward(plan)

    def _encode(self, new: NewRow, tables: list[list[int]]) -> None:
        """Keep a source that is new, each token of which knows all of it."""
        for group, places in self._encoder(tables, new.source_len):
            if new.source:
                assert len(new.source) == 4 * new.source_len
                self.num_encoded += new.source_len
                self.memory |= {(block, STATE): (group, hash(new.source)) for block, _ in places}

    def _encoder(self, tables: list[list[int]], source_len: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """(group, places of the source's tokens), where there is such a group."""
        size = self.block_size
        return [
            (group, [(table[i // size], i % size) for i in range(source_len)])
            for group, (described, table) in enumerate(zip(self.groups, tables, strict=True))
            if described.kind == "encoder"
        ]

    def _find_source(self, row: Row) -> None:
        """What is kept of a row's source: of one source all of it."""
        for group, places in self._encoder(row.tables, row.new.source_len):
            assert len(places) == row.new.source_len > 0
            of_group, row.source = self.memory[places[0][0], STATE]
            assert of_group == group
            assert all(self.memory[block, STATE] == (group, row.source) for block, _ in places)

    def _grow(self, plan: StepPlan) -> None:
        blocks, counts = iter(unpack_ints(plan.blocks)), iter(unpack_ints(plan.num_new_blocks))
        for row in unpack_ints(plan.rows):
            for table in self.rows[row].tables:
                table += [next(blocks) for _ in range(next(counts))]
                assert all(0 <= block < self.num_blocks for block in table)
        assert next(blocks, None) is None
        assert next(counts, None) is None

    def _forward(self, plan: StepPlan) -> StepResult:
        scheduled = list(
            zip(unpack_ints(plan.rows), unpack_ints(plan.num_tokens), unpack_ints(plan.samples), strict=True)
        )
        assert len({row for row, _, _ in scheduled}) == len(scheduled)
        num_encoded = sum(len(new.source) // 4 for new in plan.new)
        assert sum(count for _, count, _ in scheduled) + num_encoded <= self.budget
        for row, count, _ in scheduled:
            assert count > 0
            self._find_source(self.rows[row])
            self._write(self.rows[row], count)
        self.has_ended = False
        drawn: list[int] = []
        logprobs: list[Logprobs] = []
        for number, count, samples in scheduled:
            row = self.rows[number]
            self._look(row, count)
            begin, row.num_computed = row.num_computed, row.num_computed + count
            self.num_computed += count
            if row.new.sampling.prompt_logprobs >= 0:
                logprobs += self._prompt_logprobs(number, row, begin)
            if samples:
                assert row.num_computed == len(row.tokens)
                token = next_token(row.tokens, row.new.sampling, row.new.choice, row.source)
                if row.new.sampling.logprobs >= 0:
                    logprobs.append(_logprobs(number, len(row.tokens), [token]))
                row.tokens.append(token)
                drawn.append(token)
                stop_ids = row.new.sampling.eos_token_ids + row.new.sampling.stop_token_ids
                self.has_ended |= token in unpack_ints(stop_ids)
        return StepResult(plan.epoch, plan.step, ints(drawn), elapsed_us=1, logprobs=logprobs)

    def _write(self, row: Row, count: int) -> None:
        hashes, begin = prefix_hashes(row.tokens, row.source), row.num_computed
        for group, (described, table) in enumerate(zip(self.groups, row.tables, strict=True)):
            if described.kind == "recurrent" and begin:
                before = table[(begin - 1) // self.block_size], STATE
                assert self.memory[before] == (group, hashes[begin - 1]), f"the state before position {begin}"
            for position in range(begin, begin + count if described.kind != "encoder" else 0):
                offset = STATE if described.kind == "recurrent" else position % self.block_size
                self.memory[table[position // self.block_size], offset] = group, hashes[position]

    def _look(self, row: Row, count: int) -> None:
        hashes = prefix_hashes(row.tokens, row.source)
        for group, (described, table) in enumerate(zip(self.groups, row.tables, strict=True)):
            begin = max(0, row.num_computed - described.window + 1) if described.window else 0
            for position in range(begin, row.num_computed + count if described.kind in ("paged", "sliding") else 0):
                place = table[position // self.block_size], position % self.block_size
                assert self.memory.get(place) == (group, hashes[position]), f"position {position} of group {group}"

    def _prompt_logprobs(self, number: int, row: Row, begin: int) -> list[Logprobs]:
        end = min(row.num_computed + 1, row.new.num_prompt_tokens)
        tokens = row.tokens[begin + 1 : end]
        return [_logprobs(number, begin + 1, tokens, prompt=True)] if tokens else []


def _logprobs(row: int, first_index: int, tokens: list[int], prompt: bool = False) -> Logprobs:
    num = len(tokens)
    return Logprobs(row, first_index, num, 1, ints(tokens), b"\0\0\0\0" * num, ints([1] * num), prompt)
