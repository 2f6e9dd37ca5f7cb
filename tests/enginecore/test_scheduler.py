"""What the scheduler decides, case by case; test_scheduler_machine.py says what holds whatever happens."""

import pytest
from fake_worker import EOS, next_token, undisturbed
from harness import FRONTEND, PAGED, Harness, generate

from cableway.enginecore.request import IllegalTransition, State
from cableway.enginecore.scheduler import BadResult
from cableway.ipc.messages import Failed, StateGroup, StepResult, ints, unpack_ints

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def got(harness, key, frontend=FRONTEND):
    return harness.received[frontend, key]


def rows_of(plan):
    """(tokens to compute, draws) a row."""
    return list(zip(unpack_ints(plan.num_tokens), unpack_ints(plan.samples), strict=True))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("budget", [1, 3, 64])
def test_same_tokens_at_any_depth_and_chunking(depth, budget):
    harness = Harness(depth=depth, budget=budget)
    for key in range(6):
        harness.submit(generate(PROMPT[key:], [key], max_tokens=9, seed=key))
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_one_step_ahead_means_two_in_flight():
    harness = Harness(depth=1)
    harness.submit(generate(PROMPT, [0], eos_token_ids=b"", max_tokens=3))
    first, second = harness.plan(), harness.plan()
    assert rows_of(first) == [(10, 1)]
    assert rows_of(second) == [(1, 1)]  # its token is not known here yet
    assert rows_of(harness.plan()) == [(1, 1)]
    assert harness.plan() is None  # three tokens are all it may draw
    for _ in range(3):
        harness.finish_step()
    assert got(harness, 0).finish.reason == "length"


class TestBudget:
    def test_chunks_ride_with_decodes(self):
        harness = Harness(budget=6)
        harness.submit(generate(PROMPT[:2], [0], eos_token_ids=b""))
        harness.turn()
        harness.submit(generate(PROMPT, [1], eos_token_ids=b""))
        assert rows_of(harness.plan()) == [(1, 1), (5, 0)]
        harness.finish_step()
        assert rows_of(harness.plan()) == [(1, 1), (5, 1)]

    def test_decodes_come_before_chunks(self):
        harness = Harness(budget=4, max_num_seqs=4)
        harness.submit(generate(PROMPT, [0], eos_token_ids=b""))
        for key in (1, 2):
            harness.submit(generate([key], [key], eos_token_ids=b""))
        plan = harness.plan()
        assert rows_of(plan) == [(4, 0)]
        harness.finish_step()
        counts = []
        while not got(harness, 0).output:
            counts.append(rows_of(harness.plan()))
            harness.finish_step()
        assert all((1, 1) in rows for rows in counts[1:])

    def test_a_long_prompt_does_not_hold_up_short_ones(self):
        harness = Harness(budget=8, max_model_len=100, num_blocks=64)
        harness.submit(generate(PROMPT * 8, [0], eos_token_ids=b""))
        harness.turn()
        harness.submit(generate(PROMPT[:3], [1], eos_token_ids=b""))
        assert sorted(rows_of(harness.plan())) == [(3, 1), (5, 0)]  # the rest of the step goes to the long one
        harness.finish_step()
        assert len(got(harness, 1).output) == 1
        assert sum(count for count, _ in rows_of(harness.plan())) == 8

    def test_short_prompts_do_not_hold_up_a_long_one(self):
        harness = Harness(budget=8, max_model_len=100, num_blocks=64)
        harness.submit(generate(PROMPT * 8, [0], eos_token_ids=b""))
        harness.turn()
        for key in range(1, 4):
            harness.submit(generate([40 + key] * 6, [key], eos_token_ids=b"", max_tokens=1))
        assert rows_of(harness.plan()) == [(4, 0), (4, 0)]

    def test_a_prompt_of_one_step_is_not_cut_for_others(self):
        harness = Harness(budget=12)
        for key in range(3):
            harness.submit(generate(PROMPT[: 8 - key], [key]))
        assert rows_of(harness.plan()) == [(8, 1), (4, 0)]


class TestOrder:
    def test_first_come_first_served(self):
        harness = Harness(max_num_seqs=1, by_priority=False)
        for key, priority in enumerate([5, 0, 3]):
            harness.submit(generate(PROMPT, [key], priority=priority))
        harness.run()
        steps = [got(harness, key).first_step for key in range(3)]
        assert steps == sorted(steps)

    def test_priority(self):
        harness = Harness(max_num_seqs=1, by_priority=True)
        for key, priority in enumerate([5, 0, 3, 0]):
            harness.submit(generate(PROMPT, [key], priority=priority))
        harness.run()
        assert sorted(range(4), key=lambda key: got(harness, key).first_step) == [1, 3, 2, 0]

    def test_one_that_finds_no_room_is_not_overtaken(self):
        harness = Harness(num_blocks=8, max_model_len=32, prefix_cache=False)
        harness.submit(generate(PROMPT + PROMPT[:4], [0], max_tokens=12, eos_token_ids=b""))
        harness.turn()
        harness.submit(generate(PROMPT * 2, [1], eos_token_ids=b""))
        harness.submit(generate([1], [2], eos_token_ids=b""))
        harness.run()
        assert got(harness, 0).finish is not None
        assert 10 < got(harness, 1).first_step <= got(harness, 2).first_step

    def test_the_next_is_let_in_when_the_one_without_room_is_aborted(self):
        harness = Harness(num_blocks=8, max_model_len=32, prefix_cache=False)
        harness.submit(generate(PROMPT + PROMPT[:4], [0], max_tokens=12, eos_token_ids=b""))
        harness.turn()
        harness.submit(generate(PROMPT * 2, [1], eos_token_ids=b""))
        harness.submit(generate([1], [2], eos_token_ids=b""))
        harness.turn()
        harness.abort(1)
        harness.turn()
        assert len(got(harness, 2).output) == 1

    def test_blocks_of_a_prompt_in_progress_are_not_promised_to_others(self):
        harness = Harness(num_blocks=12, budget=4, max_model_len=48, prefix_cache=False)
        for key in range(2):
            harness.submit(generate(PROMPT * 2 + PROMPT[: 4 - key], [key], max_tokens=12, eos_token_ids=b""))
            harness.turn()
        harness.run()
        assert not harness.scheduler.num_preemptions

    def test_none_is_let_in_where_those_who_run_will_grow(self):
        harness = Harness(num_blocks=4, max_model_len=16, prefix_cache=False)
        for key in range(2):
            harness.submit(generate(PROMPT[:7], [key], max_tokens=5, eos_token_ids=b""))
            harness.turn()
        harness.run()
        assert not harness.scheduler.num_preemptions

    def test_no_more_are_preempted_than_needed(self):
        harness = Harness(num_blocks=12, max_num_seqs=4, depth=1, prefix_cache=False)
        for key in range(4):
            harness.submit(generate(PROMPT[:7], [key], max_tokens=9, eos_token_ids=b"", seed=key))
        harness.run()
        assert harness.scheduler.num_preemptions == 1
        harness.check_outputs()

    @pytest.mark.parametrize("depth", [0, 1])
    def test_the_first_gets_its_blocks_from_the_last(self, depth):
        options = {"max_num_seqs": 2, "max_model_len": 32, "prefix_cache": False, "by_priority": True}
        harness = Harness(num_blocks=8, depth=depth, budget=4, **options)
        harness.submit(generate(PROMPT[:7], [0], max_tokens=20, eos_token_ids=b"", priority=1))
        for _ in range(8):
            harness.turn()
        harness.submit(generate(PROMPT[:7], [1], max_tokens=20, eos_token_ids=b"", priority=0))
        harness.run()
        harness.check_outputs()
        assert got(harness, 1).last_step < got(harness, 0).last_step

    def test_the_last_in_order_is_preempted_and_comes_back(self):
        harness = Harness(num_blocks=7, max_model_len=28, prefix_cache=False)
        for key in range(3):
            harness.submit(generate(PROMPT[:7], [key], max_tokens=20, eos_token_ids=b"", seed=key))
        harness.run()
        assert harness.scheduler.num_preemptions
        harness.check_outputs()
        assert got(harness, 0).finish.queue_s == 1.0  # of its first admission

    @pytest.mark.parametrize("depth", [0, 1])
    def test_preempted_in_flight_drains_first(self, depth):
        harness = Harness(num_blocks=6, max_model_len=24, depth=depth, prefix_cache=False)
        for key in range(2):
            harness.submit(generate(PROMPT[:7], [key], max_tokens=14, eos_token_ids=b"", seed=key))
        saw_draining = False
        while harness.scheduler.num_live:
            while len(harness.plans) <= depth and harness.plan():
                pass
            harness.check()
            draining = [request.state for request in harness.scheduler._draining]
            saw_draining = saw_draining or State.PREEMPTED in draining
            harness.finish_step()
        assert harness.scheduler.num_preemptions
        assert saw_draining == (depth > 0)
        harness.check_outputs()


class TestEnds:
    def truth(self, **sampling):
        return undisturbed(generate(PROMPT, [0], **sampling), 0, 64)[0]

    def test_end_of_sequence(self):
        token = self.truth(eos_token_ids=b"", max_tokens=4)[3]
        harness = Harness()
        harness.submit(generate(PROMPT, [0], max_tokens=20, eos_token_ids=ints([token])))
        harness.run()
        assert got(harness, 0).finish.reason == "stop"
        assert got(harness, 0).finish.stop_token is None
        assert got(harness, 0).output[-1] == token

    def test_stop_token_is_named(self):
        token = self.truth(eos_token_ids=b"", max_tokens=4)[3]
        harness = Harness(depth=1)
        harness.submit(generate(PROMPT, [0], max_tokens=20, stop_token_ids=ints([token])))
        harness.run()
        assert (got(harness, 0).finish.reason, got(harness, 0).finish.stop_token) == ("stop", token)

    def test_min_tokens(self):
        tokens = self.truth(eos_token_ids=b"", max_tokens=6)
        harness = Harness()
        asked = generate(PROMPT, [0], max_tokens=6, min_tokens=3, eos_token_ids=ints(tokens[:2]))
        harness.submit(asked)
        harness.run()
        assert got(harness, 0).output[:3] == tokens[:3]
        harness.check_outputs()

    def test_length_of_the_model(self):
        harness = Harness(max_model_len=14)
        harness.submit(generate(PROMPT, [0], max_tokens=50, eos_token_ids=b""))
        harness.run()
        assert (len(got(harness, 0).output), got(harness, 0).finish.reason) == (4, "length")

    def test_no_tokens_wanted(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0], max_tokens=0))
        assert got(harness, 0).finish.reason == "length"
        assert harness.plan() is None

    @pytest.mark.parametrize("depth", [0, 1])
    def test_prompt_scored_without_a_token(self, depth):
        harness = Harness(depth=depth, budget=4)
        harness.submit(generate(PROMPT, [0], max_tokens=0, prompt_logprobs=0))
        harness.run()
        assert got(harness, 0).prompt_logprobs == dict(list(enumerate(PROMPT))[1:])
        assert (got(harness, 0).output, got(harness, 0).finish.reason) == ([], "length")

    @pytest.mark.parametrize("depth", [0, 1])
    def test_row_and_blocks_drain_with_the_step_in_flight(self, depth):
        token = self.truth(eos_token_ids=b"", max_tokens=1)[0]
        harness = Harness(depth=depth, max_num_seqs=1)
        harness.submit(generate(PROMPT, [0], max_tokens=9, eos_token_ids=ints([token])))
        harness.submit(generate(PROMPT, [1], max_tokens=1))
        for _ in range(depth + 1):
            harness.plan()
        harness.finish_step()
        assert got(harness, 0).finish is not None
        assert len(harness.scheduler._draining) == depth
        harness.check()
        assert (harness.plan() is None) == (depth > 0)  # the only row is not free before that
        harness.run()
        assert len(got(harness, 0).output) == 1
        assert len(got(harness, 1).output) == 1

    def test_failure_of_a_row_harms_nobody_else(self):
        harness = Harness(depth=1)
        for key in range(2):
            harness.submit(generate(PROMPT, [key], seed=key, eos_token_ids=b""))
        harness.plan()
        harness.plan()
        result = harness.worker.execute(harness.plans.popleft())
        row = unpack_ints(harness.history[0].rows)[0]
        failed = [Failed(row, 500, "not_a_number", "no finite logit")]
        fields = (result.epoch, result.step, result.token_ids, 1)
        assert harness.scheduler.commit(StepResult(*fields, failed=failed))
        harness.deliver()
        assert (got(harness, 0).failed.status, got(harness, 0).output) == (500, [])
        harness.check()
        harness.run()
        assert len(got(harness, 1).output) == 8


class TestChoices:
    @pytest.mark.parametrize("prefix_cache", [True, False])
    @pytest.mark.parametrize("depth", [0, 1])
    @pytest.mark.parametrize("num_prompt", [1, 5, 8, 10])
    def test_children_fork_from_the_leader(self, num_prompt, depth, prefix_cache):
        harness = Harness(depth=depth, prefix_cache=prefix_cache)
        harness.submit(generate(PROMPT[:num_prompt], [0, 1, 2], eos_token_ids=b""))
        harness.run()
        harness.check_outputs()
        # The leader computes the prompt, each child its last token again; nobody computes the last token drawn.
        assert harness.worker.num_computed == num_prompt + 2 + 3 * 7
        copies = sum(len(unpack_ints(plan.copies)) // 2 for plan in harness.history)
        assert copies == (0 if (num_prompt - 1) % 4 == 0 else 2)
        assert {got(harness, key).finish.num_cached_tokens for key in range(3)} == {0}

    def test_a_leader_that_ends_leaves_the_rest_to_the_next(self):
        harness = Harness(max_num_seqs=1)
        harness.submit(generate(PROMPT, [0, 1, 2], max_tokens=3))
        harness.run()
        harness.check_outputs()

    def test_waiting_for_a_leader_lets_others_pass(self):
        harness = Harness(budget=4)
        harness.submit(generate(PROMPT, [0, 1], eos_token_ids=b""))
        harness.turn()
        harness.submit(generate([7], [2], eos_token_ids=b"", max_tokens=1))
        harness.turn()
        harness.turn()
        assert got(harness, 2).finish is not None

    def test_aborted_leader(self):
        harness = Harness(budget=4, depth=1)
        harness.submit(generate(PROMPT, [0, 1, 2], eos_token_ids=b""))
        harness.turn()
        harness.abort(0)
        harness.run()
        harness.check_outputs()


class TestPrefixCache:
    def test_a_second_request_starts_behind_the_first_ones_blocks(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0], max_tokens=1))
        harness.run()
        harness.submit(generate(PROMPT, [1], max_tokens=1))
        assert rows_of(harness.plan()) == [(2, 1)]
        harness.finish_step()
        assert got(harness, 1).finish.num_cached_tokens == 8
        assert harness.scheduler.num_prefix_hits == 8
        assert harness.scheduler.num_prefix_queries == 20

    def test_sources_are_counted(self):
        harness = Harness(groups=(PAGED, StateGroup("encoder", 1)))
        for key, source in enumerate(([7] * 9, [7] * 9, [8] * 5)):
            harness.submit(generate([1], [key], source=source))
            harness.run()
        harness.check_outputs()
        assert [got(harness, key).finish.num_cached_tokens for key in range(3)] == [0, 9, 0]
        assert harness.worker.num_encoded == 14
        assert (harness.scheduler.num_prefix_queries, harness.scheduler.num_prefix_hits) == (26, 9)

    def test_a_source_waits_for_a_step_with_room_for_all_of_it(self):
        harness = Harness(groups=(PAGED, StateGroup("encoder", 1)), budget=16)
        for key, length in enumerate((9, 9, 15)):
            harness.submit(generate([1], [key], source=[key] * length))
        harness.submit(generate([1], [3], source=[3] * 16))
        assert got(harness, 3).failed.code == "context_length_exceeded"
        del harness.received[FRONTEND, 3]
        harness.run()
        harness.check_outputs()
        assert [len(plan.new) for plan in harness.history[:4]] == [1, 1, 0, 0]
        assert max(len(new.source) // 4 for plan in harness.history for new in plan.new) == 15

    def test_prompt_logprobs_hold_every_token_of_the_prompt(self):
        harness = Harness(budget=4, depth=1)
        for key in range(2):
            harness.submit(generate(PROMPT, [key], prompt_logprobs=0, logprobs=0))
            harness.run()
            assert got(harness, key).prompt_logprobs == dict(list(enumerate(PROMPT))[1:])
        harness.check_outputs()
        assert harness.scheduler.num_prefix_hits == 0

    def test_nothing_is_found_after_a_workers_death(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0], max_tokens=1))
        harness.run()
        harness.worker_down()
        harness.worker_up()
        harness.submit(generate(PROMPT, [1], max_tokens=1))
        harness.run()
        assert got(harness, 1).finish.num_cached_tokens == 0

    def test_sliding_windows_give_blocks_back(self):
        harness = Harness(groups=(StateGroup("sliding", 1, 6),), num_blocks=12, max_model_len=64)
        harness.submit(generate(PROMPT, [0], max_tokens=50, eos_token_ids=b""))
        harness.run()
        harness.check_outputs()
        assert len(got(harness, 0).output) == 50  # 60 tokens in a pool of 48


class TestLimits:
    def refused(self, harness, asked):
        harness.submit(asked)
        return [got(harness, choice.key).failed for choice in asked.choices]

    def test_queued_requests(self):
        harness = Harness(max_queued_requests=3)
        harness.worker_down()
        harness.submit(generate(PROMPT, [0, 1]))
        failed = self.refused(harness, generate(PROMPT, [2, 3]))
        assert [(each.status, each.code) for each in failed] == [(429, "rate_limit_exceeded")] * 2
        assert self.refused(harness, generate(PROMPT, [4])) == [None]
        assert self.refused(harness, generate(PROMPT, [5], resumed=True)) == [None]

    def test_aborted_requests_are_not_kept(self):
        harness = Harness()
        harness.worker_down()
        for key in range(500):
            harness.submit(generate(PROMPT, [key]))
            if key:
                harness.abort(key)
        assert harness.scheduler.waiting.num_requests == 1
        assert len(harness.scheduler.waiting._heap) < 100

    def test_queued_tokens(self):
        harness = Harness(max_queued_tokens=25)
        harness.worker_down()
        assert self.refused(harness, generate(PROMPT * 3, [0])) == [None]  # nobody else waits: let it pass
        assert self.refused(harness, generate(PROMPT, [1]))[0].status == 429

    def test_running_requests_are_not_queued(self):
        harness = Harness(max_queued_requests=1)
        for key in range(4):
            assert self.refused(harness, generate(PROMPT, [key])) == [None]
            harness.turn()

    def test_prompt_too_long(self):
        harness = Harness(max_model_len=10)
        assert self.refused(harness, generate(PROMPT, [0]))[0].code == "context_length_exceeded"
        assert self.refused(harness, generate(PROMPT[:9], [1])) == [None]
        assert self.refused(harness, generate(PROMPT, [2], max_tokens=0, prompt_logprobs=0)) == [None]

    def test_a_small_pool_limits_the_length(self):
        harness = Harness(num_blocks=3, max_model_len=64)
        assert harness.scheduler.max_len == 12
        assert self.refused(harness, generate(PROMPT + PROMPT, [0]))[0].status == 400

    def test_a_smaller_pool_than_before(self):
        harness = Harness(num_blocks=32)
        harness.submit(generate(PROMPT * 2, [0]))
        harness.submit(generate(PROMPT, [1], max_tokens=30, eos_token_ids=b""))
        harness.worker_down()
        harness.num_blocks = 4
        harness.worker_up()
        harness.deliver()
        assert got(harness, 0).failed.code == "context_length_exceeded"
        harness.run()
        assert (len(got(harness, 1).output), got(harness, 1).finish.reason) == (6, "length")

    def test_no_request_fits_at_all(self):
        harness = Harness(num_blocks=1, block_size=2)
        harness.worker_down()
        harness.num_blocks = 0
        with pytest.raises(ValueError, match="cannot hold any request"):
            harness.worker_up()

    @pytest.mark.parametrize(
        ("asked", "code"),
        [
            (generate([], [0]), "empty_prompt"),
            (generate([1], [0], stop_token_ids=b"abc"), "invalid_request"),
            (generate([1], [2**31]), "invalid_request"),
            (generate([1], [-1]), "invalid_request"),
        ],
    )
    def test_nonsense(self, asked, code):
        assert self.refused(Harness(), asked)[0].code == code

    def test_draining(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0]))
        harness.scheduler.refuses_new = True
        assert self.refused(harness, generate(PROMPT, [1]))[0].status == 503
        harness.run()
        assert got(harness, 0).finish is not None

    def test_duplicate_key(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0, 1]))
        assert harness.scheduler.submit(FRONTEND, generate(PROMPT, [1, 2]), 0.0) == [1]
        assert harness.scheduler.num_live == 3


class TestLives:
    def test_resumed_output_goes_on(self):
        asked = generate(PROMPT, [0], eos_token_ids=b"")
        truth = undisturbed(asked, 0, 64)[0]
        harness = Harness()
        harness.submit(generate(PROMPT, [0], outputs={0: truth[:3]}, eos_token_ids=b""))
        harness.run()
        assert got(harness, 0).output == truth

    def test_resumed_at_its_end_just_ends(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0], outputs={0: [1, 2, EOS]}))
        harness.submit(generate(PROMPT, [1], outputs={1: [1, 2, 3]}, max_tokens=3))
        assert [got(harness, key).finish.reason for key in range(2)] == ["stop", "length"]
        assert harness.plan() is None

    def test_a_workers_death_requeues_in_order(self):
        harness = Harness(depth=1, max_num_seqs=2)
        for key in range(4):
            harness.submit(generate(PROMPT, [key], seed=key, eos_token_ids=b""))
        harness.turn()
        harness.plan()
        harness.worker_down()
        harness.check()
        assert harness.plan() is None
        assert harness.scheduler.waiting.num_requests == 4
        harness.worker_up()
        plan = harness.plan()
        assert len(unpack_ints(plan.new[0].tokens)) == len(PROMPT) + 1  # with its token so far
        harness.run()
        harness.check_outputs()

    def test_late_results_are_ignored(self):
        harness = Harness(depth=1)
        harness.submit(generate(PROMPT, [0], eos_token_ids=b""))
        plan = harness.plan()
        result = harness.worker.execute(plan)
        harness.worker_down()
        harness.worker_up()
        assert not harness.scheduler.commit(result)  # of an earlier life
        harness.plan()
        assert not harness.scheduler.commit(StepResult(plan.epoch, harness.plans[0].step, ints([5]), 1))
        harness.turn()
        assert not harness.scheduler.commit(StepResult(harness.workers_epoch, 1, ints([5]), 1))  # twice
        harness.run()
        harness.check_outputs()

    def test_result_that_does_not_fit(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0]))
        harness.plan()
        with pytest.raises(BadResult):
            harness.scheduler.commit(StepResult(harness.workers_epoch, 0, ints([5, 6]), 1))

    def test_a_frontend_that_leaves_takes_its_requests_along(self):
        harness = Harness(depth=1)
        harness.submit(generate(PROMPT, [0]))
        harness.submit(generate(PROMPT, [0], seed=5), b"other")
        harness.turn()
        harness.scheduler.drop(FRONTEND)
        del harness.received[FRONTEND, 0]
        harness.run()
        harness.check_outputs()
        harness.check_empty()

    def test_illegal_transition(self):
        harness = Harness()
        harness.submit(generate(PROMPT, [0]))
        request = harness.scheduler.waiting.first()
        with pytest.raises(IllegalTransition):
            request.move(State.PREEMPTED)


def test_the_model_of_these_tests_depends_on_everything():
    sampling = generate(PROMPT, [0]).sampling
    tokens = {next_token([*PROMPT, extra], sampling, choice, 0) for extra in range(10) for choice in range(3)}
    assert len(tokens) > 10
