"""Who keeps killing is found and failed; who is only often hit never is."""

import random

import msgspec
import pytest
from harness import Harness, generate
from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.enginecore.trials import WELL_S
from cableway.ipc.messages import Choice, Standing, StepPlan, unpack_ints

STEP_S, RESTART_S = 0.05, 1.0


class Killer(Harness):
    """A harness with a clock, whose worker dies when it computes certain tokens of certain requests, or at random."""

    def __init__(self, pills: dict[int, int], kill_times_s: list[float] | None = None, **options):
        super().__init__(**options)
        self.pills = pills  # key -> position whose computing kills
        self.kill_times_s = sorted(kill_times_s or [])
        self.num_deaths = 0

    def live(self, most_turns: int = 20_000) -> None:
        """Until everything has ended."""
        for _ in range(most_turns):
            if not self.scheduler.num_live:
                return
            self.now_s += STEP_S
            if self.kill_times_s and self.now_s >= self.kill_times_s[0]:
                self.kill_times_s.pop(0)
                self.die()
                continue
            while self.scheduler.has_room(self.depth) and self.plan():
                pass
            self.check()
            if self.plans:
                if self.is_deadly(self.plans[0]):
                    self.die()
                else:
                    self.finish_step()
        raise AssertionError("it never ends")

    def is_deadly(self, plan: StepPlan) -> bool:
        step = self.scheduler._in_flight[0]
        assert unpack_ints(plan.rows).tolist() == [request.row for request in step.requests]
        counts = zip(step.requests, step.counts, strict=True)
        return any(
            request.num_computed <= self.pills.get(request.key, -1) < request.num_computed + count
            for request, count in counts
        )

    def die(self) -> None:
        self.num_deaths += 1
        self.worker_down()
        self.check()
        self.now_s += RESTART_S
        self.worker_up()

    def check_innocent(self) -> None:
        """All but the quarantined got everything."""
        for _, key in self.quarantined:
            assert self.received.pop((b"frontend.0", key)).failed.code == "quarantined"
        self.check_outputs()
        self.check_empty()


def ask_all(harness: Harness, num: int, prompt_len: int = 6) -> None:
    for key in range(num):
        prompt = [1 + (key + 3 * position) % 40 for position in range(prompt_len)]
        harness.submit(generate(prompt, [key], seed=key, max_tokens=12, eos_token_ids=b""))


@given(
    pills=st.dictionaries(st.integers(0, 7), st.integers(0, 16), max_size=3),
    depth=st.integers(0, 1),
    max_num_seqs=st.integers(1, 5),
    budget=st.sampled_from([3, 16]),
    num_blocks=st.integers(16, 40),
    prefix_cache=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_all_poison_is_found_and_nothing_else(pills, **options):
    harness = Killer(pills, **options)
    ask_all(harness, 8)
    harness.live()
    assert sorted(key for _, key in harness.quarantined) == sorted(pills)
    assert harness.num_deaths <= 6 * len(pills)
    harness.check_innocent()


@given(
    seed=st.integers(0, 2**32),
    every_s=st.sampled_from([0.3, 1.2, 3.0]),
    budget=st.sampled_from([3, 16]),
    depth=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_random_kills_blame_nobody(seed, every_s, budget, depth):
    rng = random.Random(seed)
    times_s = [0.0]
    for _ in range(200):
        times_s.append(times_s[-1] + rng.expovariate(1 / every_s) + RESTART_S)
    harness = Killer({}, times_s, budget=budget, depth=depth, num_blocks=24)
    ask_all(harness, 12)
    harness.live()
    assert not harness.quarantined
    harness.check_innocent()


def test_kills_as_soon_as_a_worker_is_ready_blame_nobody():
    """A worker that cannot live a second, whatever it does, is not its requests' fault."""
    for life_s in (0.0, STEP_S, 2 * STEP_S, 0.9):
        harness = Killer({}, [2.0 + number * (RESTART_S + life_s) for number in range(30)])
        ask_all(harness, 4)
        harness.live()
        assert not harness.quarantined
        harness.check_innocent()


def test_others_run_while_a_suspect_waits_for_its_trial():
    harness = Killer({0: 8}, budget=64)
    ask_all(harness, 3)
    for _ in range(200):
        if harness.scheduler.trials.waiting.num_requests:
            break
        plan = harness.plan()
        harness.die() if harness.is_deadly(plan) else harness.finish_step()
    assert [request.key for request in harness.scheduler.trials.waiting] == [0, 1, 2]  # all were in that step
    harness.submit(generate([1, 2, 3], [9], max_tokens=40, eos_token_ids=b""))
    harness.turn()
    assert [request.key for request in harness.scheduler.running] == [9]
    harness.now_s += WELL_S
    harness.plan()
    assert [request.key for request in harness.scheduler._in_flight[0].requests] == [0]
    harness.die()
    harness.now_s += WELL_S
    alone = []
    while harness.scheduler.trials.waiting.num_requests:
        assert not (harness.is_deadly(harness.plan()) and harness.die())
        if harness.plans:
            alone.append([request.key for request in harness.scheduler._in_flight[0].requests])
            harness.finish_step()
        harness.now_s += WELL_S
    assert alone[:1] == [[9]]
    assert alone[-2:] == [[1], [2]]
    harness.live()
    assert harness.quarantined == [(b"frontend.0", 0)]
    assert harness.num_deaths == 4


@pytest.mark.parametrize("prompt_len", [5, 12, 30])
def test_a_core_that_dies_is_told_by_frontends(prompt_len):
    """Each core knows only what the frontends say of their choices, which they have from the core before."""
    pill = prompt_len - 1  # the step that draws the first token
    standing, num_lives = Standing(), 0
    while not standing.is_convicted:
        num_lives += 1
        assert num_lives <= 5
        harness = Killer({0: pill}, budget=8)
        asked = generate(list(range(1, prompt_len + 1)), [0])
        (choice,) = asked.choices
        choice = type(choice)(choice.key, choice.index, b"", standing)
        harness.submit(type(asked)(asked.request_id, asked.prompt, [choice], asked.sampling, resumed=num_lives > 1))
        while True:
            plan = harness.plan()
            if plan is None:
                harness.now_s += WELL_S
            elif harness.is_deadly(plan):
                break  # the core dies as it plans this
            else:
                harness.finish_step()
        standing = harness.wills.get((b"frontend.0", 0), Standing(deaths=1))
    assert num_lives == 4


def test_the_convicted_are_not_taken_in():
    harness = Harness()
    asked = generate([1, 2, 3], [0])
    choice = type(asked.choices[0])(0, 0, b"", Standing(4, 2, 5))
    harness.submit(type(asked)(asked.request_id, asked.prompt, [choice], asked.sampling))
    assert harness.received[b"frontend.0", 0].failed.code == "quarantined"
    assert not harness.scheduler.num_live


@pytest.mark.parametrize("leaves", ["drop", "abort"])
def test_a_suspect_that_leaves_in_the_middle_of_its_trial_is_not_planned_again(leaves):
    """Between the commit of one of its steps and the next plan: its row is nobody's, and a worker would die of it."""
    harness = Killer({}, budget=4)
    asked = generate([1, 2, 3, 4, 5, 6, 7, 8, 9], [0], max_tokens=12, eos_token_ids=b"")
    suspect = Choice(0, 0, b"", Standing(deaths=2))
    harness.submit(msgspec.structs.replace(asked, choices=[suspect]), b"frontend.1")
    harness.turn()  # all has to be well for a while first
    harness.now_s += WELL_S
    harness.turn()
    assert harness.scheduler.trials.current.key == 0
    if leaves == "drop":  # as when its frontend connects anew
        del harness.received[b"frontend.1", 0]
        harness.scheduler.drop(b"frontend.1")
    else:
        harness.abort(0, b"frontend.1")
    assert harness.plan() is None
    assert harness.scheduler.trials.current is None
    ask_all(harness, 2)
    harness.live()
    harness.check_innocent()
