"""Runs: when workers may go on by themselves, what ends it, and that nobody's tokens depend on it."""

import pytest
from fake_worker import undisturbed
from harness import FRONTEND, Harness, generate

from cableway.enginecore.runs import LONGEST
from cableway.ipc.messages import Choice, Generate, RunLeft, Standing, ints, unpack_ints
from cableway.workers.plans import rest_of_run

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def harness_with(*keys, max_tokens=60, **options):
    """Requests whose prompts are computed; the first token of each is told."""
    harness = Harness(**{"depth": 1, "plans_runs": True, "num_blocks": 128, "max_model_len": 80} | options)
    for key in keys:
        harness.submit(generate(PROMPT, [key], eos_token_ids=b"", max_tokens=max_tokens, seed=key))
    while not all(harness.received[FRONTEND, key].output for key in keys):
        harness.plan()
        harness.finish_step()
    return harness


def num_steps(harness):
    return [plan.num_steps for plan in harness.plans]


def test_a_run_goes_as_far_as_nothing_is_to_be_decided():
    harness = harness_with(0)
    harness.plan()
    assert num_steps(harness) == [LONGEST]
    assert not harness.scheduler.has_room(1)
    for _ in range(LONGEST - 1):
        harness.finish_step()
    assert harness.scheduler.has_room(1)  # the last step is being done: what comes next is planned meanwhile
    harness.plan()
    assert num_steps(harness) == [1, 60 - 2 - LONGEST + 1]  # to the length limit
    harness.run()
    harness.check_outputs()
    harness.check_empty()


@pytest.mark.parametrize(
    "options", [{"plans_runs": False}, {"num_blocks": 14}], ids=["not allowed", "blocks for so many steps are missing"]
)
def test_no_run(options):
    harness = harness_with(0, 1, max_tokens=25, **options)
    assert harness.plan().num_steps == 1
    harness.run()
    harness.check_outputs()


def test_while_somebody_waits_steps_are_planned_one_by_one():
    harness = harness_with(0, max_num_seqs=1)
    harness.submit(generate(PROMPT, [1]))
    assert harness.plan().num_steps == 1


def test_whom_a_death_has_hit_goes_step_by_step():
    harness = Harness(depth=1, plans_runs=True)
    choice = Choice(0, 0, standing=Standing(1))
    asked = generate(PROMPT, [0], eos_token_ids=b"", max_tokens=20)
    harness.submit(Generate("r0", asked.prompt, [choice], asked.sampling))
    harness.plan()
    harness.finish_step()
    assert harness.plan().num_steps == 1


def test_who_comes_cuts_a_run_short():
    harness = harness_with(0)
    harness.plan()
    harness.finish_step()
    harness.submit(generate(PROMPT, [1], eos_token_ids=b"", max_tokens=5, seed=1))
    assert harness.scheduler.has_room(1)
    assert unpack_ints(harness.plan().num_tokens).tolist() == [1, 2]  # all but two tokens are in the prefix cache
    assert not harness.scheduler.has_room(1)
    harness.finish_step()  # one more of the run, which the worker leaves then
    assert num_steps(harness) == [1]
    harness.finish_step()
    assert len(harness.received[FRONTEND, 1].output) == 1
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_who_leaves_cuts_a_run_short():
    harness = harness_with(0, 1)
    harness.plan()
    harness.finish_step()
    harness.abort(0)
    plan = harness.plan()
    assert (len(plan.rows) // 4, plan.num_steps) == (1, 60 - 1 - LONGEST)  # as if the run had been done
    harness.finish_step()
    assert num_steps(harness) == [60 - 1 - LONGEST]
    harness.check()
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def test_the_last_who_leaves_ends_the_run_by_an_empty_plan():
    harness = harness_with(0)
    harness.plan()
    harness.abort(0)
    assert not harness.plan().rows
    assert harness.plan() is None
    harness.finish_step()
    harness.finish_step()
    assert not harness.plans
    harness.check_empty()


def test_a_run_is_cut_for_nobody_to_sleep():
    harness = harness_with(0)
    assert harness.scheduler.cut_run() is None
    harness.plan()
    harness.plans.append(harness.scheduler.cut_run())
    assert not harness.plans[-1].rows
    assert harness.scheduler.cut_run() is None
    harness.finish_step()
    harness.finish_step()
    assert not harness.scheduler.num_in_flight
    harness.run()
    harness.check_outputs()


@pytest.mark.parametrize("leaves_at", range(1, 6))
def test_a_row_that_ends_within_a_run_gets_no_more(leaves_at):
    """Its token is the last one told, whether the worker leaves the run at once or some steps later."""
    tokens, _ = undisturbed(generate(PROMPT, [0], eos_token_ids=b"", max_tokens=20), 0, 80)
    harness = Harness(depth=1, plans_runs=True)
    harness.submit(generate(PROMPT, [0], eos_token_ids=b"", stop_token_ids=ints([tokens[2]]), max_tokens=20))
    harness.plan()
    run = harness.plan()
    harness.finish_step()
    for number in range(leaves_at):
        assert harness.scheduler.commit(harness.worker.execute(next_step(run, number)))
        harness.check()
    assert harness.scheduler.leave_run(RunLeft(run.epoch, run.step + leaves_at))
    harness.deliver()
    harness.plans.clear()
    end = tokens.index(tokens[2]) + 1
    assert harness.received[FRONTEND, 0].output == tokens[: min(end, leaves_at + 1)]
    harness.check()
    harness.run()
    harness.check_outputs()
    harness.check_empty()


def next_step(run, number):
    for _ in range(number):
        run = rest_of_run(run)
    return run


def test_a_run_that_is_not_in_flight_cannot_be_left():
    harness = harness_with(0)
    plan = harness.plan()
    harness.finish_step()
    for epoch, step in [
        (plan.epoch, plan.step),  # done
        (plan.epoch, plan.step + LONGEST),  # not planned
        (plan.epoch - 1, plan.step + 1),
    ]:
        assert not harness.scheduler.leave_run(RunLeft(epoch, step))
    harness.check()
    assert harness.scheduler.leave_run(RunLeft(plan.epoch, plan.step + 1))
    assert not harness.scheduler.leave_run(RunLeft(plan.epoch, plan.step + 1))
    harness.plans.clear()
    harness.run()
    harness.check_outputs()
