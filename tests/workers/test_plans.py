"""Plans and runs as a worker takes them, step by step."""

from cableway.ipc.messages import StepPlan, ints
from cableway.workers.plans import Plans, rest_of_run


def plan(step: int, num_steps: int = 1) -> StepPlan:
    one = ints([1])
    return StepPlan(7, step, ints([2]), one, one, [], ints([3]), ints([4]), one, ints([5, 6]), num_steps)


def test_a_run_changes_rows_once():
    rest = rest_of_run(plan(10, 3))
    assert (rest.step, rest.num_steps, rest.rows, rest.num_tokens, rest.samples) == (
        11,
        2,
        *[ints([2]), *[ints([1])] * 2],
    )
    assert (rest.new, rest.freed, rest.blocks, rest.num_new_blocks, rest.copies) == ([], b"", b"", ints([0]), b"")
    assert rest_of_run(rest_of_run(rest)) is None


def test_plans_are_taken_step_by_step():
    plans = Plans()
    assert not plans
    for each in (plan(0), plan(1, 3), plan(4)):
        plans.add(each)
    taken = []
    while plans:
        num_steps = plans.num_steps
        step, is_of_run = plans.take()
        taken.append((num_steps, step.step, is_of_run))
    assert taken == [(5, 0, False), (4, 1, True), (3, 2, True), (2, 3, True), (1, 4, False)]


def test_a_run_is_overtaken_by_a_plan_behind_it_once_it_is_begun():
    plans = Plans()
    plans.add(plan(0, 3))
    assert not plans.is_run_overtaken
    plans.add(plan(3))
    assert not plans.is_run_overtaken
    plans.take()
    assert plans.is_run_overtaken
    assert plans.leave_run().step == 1
    assert not plans.is_run_overtaken
    assert plans.leave_run() is None
    assert plans.take()[0].step == 3
    assert not plans


def test_nothing_is_left_of_another_life():
    plans = Plans()
    plans.add(plan(0, 3))
    plans.take()
    plans.add(plan(3))
    plans.clear()
    assert not plans
    assert plans.num_steps == 0
