"""Block pool and KV manager: laws under random events, and the few numbers that are worth saying."""

from collections import Counter

import pytest
from harness import generate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cableway.enginecore.kv.groups import Encoder, Paged, Recurrent, Sliding, group_of
from cableway.enginecore.kv.manager import HOLE, KVManager
from cableway.enginecore.kv.pool import BlockPool
from cableway.enginecore.kv.prefix import PrefixChain
from cableway.enginecore.request import Request
from cableway.ipc.messages import StateGroup, unpack_ints

SALTS = ["", "tenant"]
SOURCES = [[5] * 3, [5] * 4, [6] * 3]
KINDS = st.one_of(st.just(Paged()), st.builds(Sliding, st.integers(1, 9)), st.just(Recurrent()))
STATE = -1
"""Where in a block the state of a recurrent group is."""


def request_of(tokens, salt="", source=(), **sampling):
    asked = generate(tokens, [0], cache_salt=salt, source=source, **sampling)
    return Request(asked, asked.choices[0], order=(0, 0), max_model_len=1000, now_s=0.0)


def manager(*groups, num_blocks=32, block_size=4, prefix_cache=True):
    return KVManager(groups or [Paged()], num_blocks, block_size, chunk_len=8, prefix_cache=prefix_cache)


def compute(kv, request, until=None):
    """Reserve and commit the first `until` tokens (all by default), 8 at a time."""
    until = len(request.tokens) if until is None else until
    while request.num_computed < until:
        request.num_planned = min(request.num_computed + 8, until)
        assert kv.reserve(request, request.num_planned) is not None
        request.num_computed = request.num_planned
        if request.num_computed >= request.next_border:
            kv.commit(request)


def computed(kv, tokens, salt=""):
    """A request that owns the blocks of its tokens, all computed."""
    request = request_of(tokens, salt)
    kv.adopt(request, kv.lookup(request))
    compute(kv, request)
    return request


class KVMachine(RuleBasedStateMachine):
    """Random use of a manager beside the plainest model of it: what is written where, and who may look at it.

    A recurrent group writes one thing a block, the state after its last token so far, and looks at the newest alone. An
    encoder group writes a source once, in the first step of whoever brings it, and looks at all of it.
    """

    @initialize(
        groups=st.lists(KINDS, min_size=1, max_size=3),
        encoder_at=st.sampled_from([None, 0, 1]),
        num_blocks=st.integers(8, 40),
        block_size=st.sampled_from([1, 2, 4]),
        prefix_cache=st.booleans(),
    )
    def build(self, groups, encoder_at, num_blocks, block_size, prefix_cache):
        groups = groups if encoder_at is None else [*groups[:encoder_at], Encoder(), *groups[encoder_at:]]
        self.kv = KVManager(groups, num_blocks, block_size, chunk_len=8, prefix_cache=prefix_cache)
        self.groups, self.num_blocks, self.block_size = groups, num_blocks, block_size
        self.has_encoder = encoder_at is not None
        self.requests: list[tuple[Request, str]] = []
        self.written: dict[tuple[int, int], tuple] = {}  # (block, offset) -> (group, salt, source, tokens up to there)

    @rule(
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=20),
        salt=st.sampled_from(SALTS),
        source=st.sampled_from(SOURCES),
    )
    def enters(self, tokens, salt, source):
        request = request_of(tokens, salt, source if self.has_encoder else ())
        match = self.kv.lookup(request)
        assert match.num_tokens < len(tokens)
        assert match.num_tokens % self.block_size == 0
        self.admit(request, salt, match)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def forks(self, data):
        leader, salt = data.draw(st.sampled_from(self.requests))
        num_shared = data.draw(st.integers(0, leader.num_computed))
        assume(num_shared < len(leader.tokens))
        match = self.kv.fork(leader, num_shared)
        if match is None:
            of_tokens = [(i, group) for i, group in enumerate(self.groups) if not isinstance(group, Encoder)]
            assert any(
                group.first_needed(num_shared) // self.block_size < leader.num_windowed[i]
                or (num_shared % self.block_size and not group.splits_blocks)
                for i, group in of_tokens
            )
        else:
            self.admit(request_of(leader.tokens.tolist(), salt, unpack_ints(leader.source)), salt, match)

    def admit(self, request, salt, match):
        needed = self.kv.num_new_blocks(match, request)
        if needed > self.kv.num_available:
            return
        available = self.kv.num_available
        self.kv.adopt(request, match)
        pairs = self.kv.copies
        for source, target in zip(pairs[::2], pairs[1::2], strict=True):
            for offset in range(self.block_size):
                self.written[target, offset] = self.written.get((source, offset))
        self.kv.copies = []
        if request.source_is_new:  # its first step is in flight, and whatever comes after it sees what that wrote
            self.encode(request, salt)
        self.requests.append((request, salt))
        self.look(request, salt)
        promised = needed - (available - self.kv.num_available)
        assert self.kv.num_owed(request) >= promised - len(self.groups)

    def encode(self, request, salt):
        group = self.groups.index(Encoder())
        for index in range(request.source_len):
            block = request.tables[group][index // self.block_size]
            assert self.kv.pool.references[block] == 1, "written to while shared"
            self.written[block, index % self.block_size] = group, salt, request.source, index

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 8))
    def computes(self, data, count):
        request, salt = data.draw(st.sampled_from(self.requests))
        begin = request.num_computed
        end = min(begin + count, len(request.tokens))
        grown = self.kv.reserve(request, end)
        if grown is None:
            return
        self.look(request, salt)
        request.num_planned = end
        for group, table in enumerate(request.tables):
            for position in range(begin, 0 if isinstance(self.groups[group], Encoder) else end):
                block = table[position // self.block_size]
                assert self.kv.pool.references[block] == 1, "written to while shared"
                offset = STATE if isinstance(self.groups[group], Recurrent) else position % self.block_size
                self.written[block, offset] = group, salt, request.source, tuple(request.tokens[: position + 1])
        request.num_computed = end
        self.look(request, salt)
        if end >= request.next_border:
            self.kv.commit(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(1, 2))
    def draws(self, data, token):
        request, _ = data.draw(st.sampled_from(self.requests))
        request.tokens.append(token)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leaves(self, data):
        entry = data.draw(st.sampled_from(self.requests))
        self.requests.remove(entry)
        self.kv.release(entry[0])

    def look(self, request, salt):
        """Everything that the next token's layers read is there, and is what it should be."""
        num_computed, size = request.num_computed, self.block_size
        for position, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            if isinstance(group, Encoder):
                for index in range(request.source_len):
                    kept = self.written[table[index // size], index % size]
                    assert kept == (position, salt, request.source, index)
                continue
            is_recurrent = isinstance(group, Recurrent)
            first = max(num_computed - 1, 0) if is_recurrent else group.first_needed(num_computed)
            for index in range(first, num_computed):
                offset = STATE if is_recurrent else index % size
                kept = self.written[table[index // size], offset]
                assert kept == (position, salt, request.source, tuple(request.tokens[: index + 1]))

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "kv"):
            return
        pool = self.kv.pool
        uses = Counter(b for request, _ in self.requests for table in request.tables for b in table if b != HOLE)
        assert [uses[block] for block in range(self.num_blocks)] == pool.references
        assert pool.num_free + pool.num_cached + len(uses) == self.num_blocks
        assert sorted([*pool._free, *pool._cached, *uses]) == list(range(self.num_blocks))
        for key, block in pool._block.items():
            assert pool._key[block] == key
            assert block not in pool._free
        for request, salt in self.requests:
            self.look(request, salt)


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class TestPool:
    def test_least_recently_used_goes_first(self):
        pool = BlockPool(3)
        blocks = [pool.allocate() for _ in range(3)]
        for block, key in zip(blocks, [b"a", b"b", b"c"], strict=True):
            pool.publish(block, key)
        for block in [blocks[1], blocks[2], blocks[0]]:
            pool.release(block)
        pool.share(blocks[1])  # used again: the youngest now
        pool.release(blocks[1])
        assert pool.allocate() == blocks[2]
        assert pool.find(b"c") is None
        assert pool.find(b"a") == blocks[0]
        assert [pool.allocate(), pool.allocate()] == [blocks[0], blocks[1]]
        with pytest.raises(IndexError):
            pool.allocate()

    def test_free_blocks_go_before_cached_ones(self):
        pool = BlockPool(2)
        block = pool.allocate()
        pool.publish(block, b"a")
        pool.release(block)
        assert pool.allocate() != block

    def test_equal_content_is_found_under_the_first(self):
        pool = BlockPool(2)
        first, second = pool.allocate(), pool.allocate()
        pool.publish(first, b"a")
        pool.publish(second, b"a")
        assert pool.find(b"a") == first
        pool.release(second)
        assert (pool.num_free, pool.num_cached) == (1, 0)

    def test_a_block_is_not_given_back_twice(self):
        pool = BlockPool(1)
        block = pool.allocate()
        pool.release(block)
        with pytest.raises(ValueError, match="nobody's"):
            pool.release(block)


class TestPrefix:
    def test_keys_tell_position_content_and_salt_apart(self):
        one, same = PrefixChain("s"), PrefixChain("s")
        tokens = request_of([1, 2, 3, 4, 1, 2, 3, 4]).tokens
        assert one.key(0, tokens, 4) != one.key(1, tokens, 4)  # same tokens, other beginning
        assert same.key(1, tokens, 4) == one.key(1, tokens, 4)
        assert PrefixChain("t").key(0, tokens, 4) != one.key(0, tokens, 4)

    def test_hit_leaves_a_token_to_compute(self):
        kv = manager()
        kv.release(computed(kv, list(range(1, 9))))
        assert kv.lookup(request_of(list(range(1, 9)))).num_tokens == 4
        assert kv.lookup(request_of(list(range(1, 10)))).num_tokens == 8

    def test_only_full_committed_blocks_are_found(self):
        kv = manager()
        request = request_of(list(range(1, 12)))
        kv.adopt(request, kv.lookup(request))
        kv.reserve(request, 11)
        request.num_planned = 11
        assert kv.lookup(request_of(list(range(1, 13)))).num_tokens == 0  # planned is not committed
        request.num_computed = 11
        kv.commit(request)
        assert kv.lookup(request_of(list(range(1, 13)))).num_tokens == 8  # the third block is not full

    def test_what_is_in_flight_is_not_found_when_what_came_before_is_committed(self):
        kv = manager()
        request = request_of(list(range(1, 12)))
        kv.adopt(request, kv.lookup(request))
        kv.reserve(request, 8)
        request.num_planned, request.num_computed = 8, 5
        kv.commit(request)
        assert kv.lookup(request_of(list(range(1, 13)))).num_tokens == 4

    def test_tenants_do_not_meet(self):
        kv = manager()
        kv.release(computed(kv, list(range(1, 10)), salt="a"))
        assert kv.lookup(request_of(list(range(1, 10)), salt="b")).num_tokens == 0
        assert kv.lookup(request_of(list(range(1, 10)), salt="a")).num_tokens == 8

    def test_no_lookup_when_prompt_logprobs_are_wanted(self):
        kv = manager()
        kv.release(computed(kv, list(range(1, 10))))
        assert kv.lookup(request_of(list(range(1, 10)), prompt_logprobs=0)).num_tokens == 0

    def test_switched_off(self):
        kv = manager(prefix_cache=False)
        kv.release(computed(kv, list(range(1, 10))))
        assert kv.pool.num_free == 32
        assert kv.lookup(request_of(list(range(1, 10)))).num_tokens == 0

    def test_ends_of_sequences_are_given_up_first(self):
        kv = manager(num_blocks=4)
        kv.release(computed(kv, list(range(1, 17))))
        kv.pool.allocate()
        assert kv.lookup(request_of(list(range(1, 18)))).num_tokens == 12


class TestSliding:
    def test_blocks_out_of_the_window_are_given_back(self):
        kv = manager(Sliding(5))
        request = computed(kv, list(range(1, 25)))
        # The next token, number 24, sees 20 … 24.
        assert [block == HOLE for block in request.tables[0]] == [True] * 5 + [False]
        assert kv.num_available == 31

    def test_hit_needs_only_the_window(self):
        kv = manager(Sliding(5), num_blocks=6)
        kv.release(computed(kv, list(range(1, 25))))
        for _ in range(3):
            kv.pool.allocate()  # the first blocks of the sequence, given back first, are gone
        match = kv.lookup(request_of(list(range(1, 26))))
        assert match.num_tokens == 24
        assert [block == HOLE for block in match.tables[0]] == [True] * 5 + [False]

    def test_groups_agree_on_a_prefix(self):
        kv = manager(Paged(), Sliding(5))
        request = computed(kv, list(range(1, 25)))
        kv.release(request)
        assert kv.lookup(request_of(list(range(1, 26)))).num_tokens == 24
        assert kv.lookup(request_of([*range(1, 13), 99, 98, 97])).num_tokens == 12
        kv = manager(Paged(), Sliding(5), num_blocks=12)
        kv.release(computed(kv, list(range(1, 25))))
        while kv.lookup(request_of(list(range(1, 26)))).num_tokens == 24:
            kv.pool.allocate()
        assert kv.lookup(request_of(list(range(1, 26)))).num_tokens % 4 == 0

    def test_a_leader_past_the_prompt_cannot_be_forked(self):
        kv = manager(Sliding(5))
        request = computed(kv, list(range(1, 25)))
        assert kv.fork(request, 8) is None
        assert kv.fork(request, 24) is not None

    def test_window_of_a_worker(self):
        assert group_of(StateGroup("sliding", 2, 7)) == Sliding(7)
        assert group_of(StateGroup("paged", 2)) == Paged()
        with pytest.raises(ValueError, match="sideways"):
            group_of(StateGroup("sideways", 2))

    def test_longest_sequence(self):
        assert manager(num_blocks=10).longest_len(1000) == 40
        assert manager(num_blocks=10).longest_len(30) == 30
        assert manager(Sliding(5), num_blocks=10).longest_len(1000) == 1000
        assert manager(Paged(), Paged(), num_blocks=10).longest_len(1000) == 20


@given(
    groups=st.lists(st.one_of(KINDS, st.builds(Sliding, st.integers(1, 20))), min_size=1, max_size=3),
    has_encoder=st.booleans(),
    block_size=st.integers(1, 5),
    chunk_len=st.integers(1, 9),
    num_tokens=st.integers(1, 80),
    data=st.data(),
)
def test_a_lone_request_never_lacks_blocks(groups, has_encoder, block_size, chunk_len, num_tokens, data):
    groups = [*groups, Encoder()] if has_encoder else groups
    kv = KVManager(groups, 1000, block_size, chunk_len=chunk_len, prefix_cache=False)
    most = kv.blocks_for(num_tokens, num_tokens)
    kv = KVManager(groups, most, block_size, chunk_len=chunk_len, prefix_cache=False)
    assert kv.longest_len(num_tokens) == num_tokens
    request = request_of([1] * num_tokens, source=[1] * num_tokens)
    kv.adopt(request, kv.lookup(request))
    while request.num_computed < num_tokens:
        count = data.draw(st.integers(1, min(chunk_len, num_tokens - request.num_computed)))
        assert kv.reserve(request, request.num_computed + count) is not None
        request.num_computed = request.num_planned = request.num_computed + count
        if request.num_computed >= request.next_border:
            kv.commit(request)


class TestRecurrent:
    def test_only_the_newest_state_is_kept(self):
        kv = manager(Recurrent())
        request = computed(kv, list(range(1, 25)))
        # The next token, number 24, goes on from the state after number 23.
        assert [block == HOLE for block in request.tables[0]] == [True] * 5 + [False]
        assert kv.num_available == 31

    def test_a_hit_needs_the_state_at_its_end_alone(self):
        kv = manager(Recurrent(), num_blocks=6)
        kv.release(computed(kv, list(range(1, 25))))
        for _ in range(3):
            kv.pool.allocate()  # the first blocks of the sequence, given back first, are gone
        match = kv.lookup(request_of(list(range(1, 26))))
        assert match.num_tokens == 24
        assert [block == HOLE for block in match.tables[0]] == [True] * 5 + [False]

    def test_a_part_of_a_block_cannot_be_forked(self):
        kv = manager(Recurrent())
        request = computed(kv, list(range(1, 11)))
        assert kv.fork(request, 9) is None
        assert kv.fork(computed(kv, list(range(11, 19))), 8) is not None


class TestEncoder:
    def test_a_source_is_shared_once_it_is_encoded(self):
        kv = manager(Paged(), Encoder())
        first = request_of([1], source=[5] * 9)
        kv.adopt(first, kv.lookup(first))
        assert (first.source_is_new, len(first.tables[1])) == (True, 3)
        same = request_of([1], source=[5] * 9)
        assert kv.num_to_encode(kv.lookup(same), same) == 9
        compute(kv, first)
        assert kv.lookup(same).tables[1] == first.tables[1]
        assert kv.num_to_encode(kv.lookup(same), same) == 0
        assert kv.lookup(request_of([1], source=[5] * 8)).tables[1] == []
        assert kv.lookup(request_of([1], salt="tenant", source=[5] * 9)).tables[1] == []

    def test_a_prefix_is_found_beside_its_own_source_alone(self):
        kv = manager(Paged(), Encoder())
        request = request_of(list(range(1, 10)), source=[5] * 4)
        kv.adopt(request, kv.lookup(request))
        compute(kv, request)
        kv.release(request)
        assert kv.lookup(request_of(list(range(1, 12)), source=[5] * 4)).num_tokens == 8
        assert kv.lookup(request_of(list(range(1, 12)), source=[6] * 4)).num_tokens == 0

    def test_choices_share_a_source_before_it_is_encoded(self):
        kv = manager(Paged(), Encoder())
        leader = request_of([1, 2], source=[5] * 9)
        kv.adopt(leader, kv.lookup(leader))
        other = request_of([1, 2], source=[5] * 9)
        kv.adopt(other, kv.fork(leader, 0))
        assert other.tables[1] == leader.tables[1]
        assert not other.source_is_new
        kv.release(leader)
        assert [kv.pool.references[block] for block in other.tables[1]] == [1, 1, 1]


def test_fork_shares_full_blocks_and_copies_the_last():
    kv = manager()
    leader = computed(kv, list(range(1, 11)))  # 10 tokens: two full blocks and a half
    child = request_of(list(range(1, 11)))
    kv.adopt(child, kv.fork(leader, 9))
    assert child.tables[0][:2] == leader.tables[0][:2]
    assert kv.copies == [leader.tables[0][2], child.tables[0][2]]
    assert child.tables[0][2] != leader.tables[0][2]
    assert [kv.pool.references[block] for block in child.tables[0]] == [2, 2, 1]
    kv.release(leader)
    assert [kv.pool.references[block] for block in child.tables[0]] == [1, 1, 1]
