"""The scheduler under random events: whatever happens, everybody gets the tokens of an undisturbed run."""

from fake_worker import VOCAB, undisturbed
from harness import PAGED, Harness, generate
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cableway.ipc.messages import StateGroup, StepResult, ints

MAX_MODEL_LEN = 24
SLIDING, RECURRENT, ENCODER = StateGroup("sliding", 1, 5), StateGroup("recurrent", 1), StateGroup("encoder", 1)
GROUPS = [
    (PAGED,),
    (SLIDING,),
    (PAGED, SLIDING),
    (RECURRENT,),
    (RECURRENT, PAGED),
    (PAGED, ENCODER),
    (ENCODER, SLIDING),
]
SOURCES = [[7] * 5, [7] * 6, [8] * 5]
FRONTENDS = [b"frontend.0", b"frontend.1"]
STEM = [1 + (7 * position) % (VOCAB - 1) for position in range(MAX_MODEL_LEN)]  # prompts share beginnings of it


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.sampled_from(GROUPS),
        num_blocks=st.integers(14, 30),
        block_size=st.sampled_from([2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from([2, 7, 16]),
        depth=st.integers(0, 2),
        prefix_cache=st.booleans(),
        by_priority=st.booleans(),
        plans_runs=st.booleans(),
    )
    def begin(self, **options):
        self.harness = Harness(max_model_len=MAX_MODEL_LEN, **options)
        self.keys = 0

    @rule(
        frontend=st.sampled_from(FRONTENDS),
        num_stem=st.integers(0, MAX_MODEL_LEN - 4),
        tail=st.lists(st.integers(1, VOCAB - 1), max_size=3),
        num_choices=st.sampled_from([1, 1, 1, 2, 4]),
        max_tokens=st.integers(1, 12),
        min_tokens=st.sampled_from([0, 0, 4]),
        num_delivered=st.sampled_from([0, 0, 0, 2]),
        scores=st.sampled_from([-1, -1, 0]),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from(["", "tenant"]),
        source=st.sampled_from(SOURCES),
    )
    def submit(
        self, frontend, num_stem, tail, num_choices, num_delivered, scores, priority, cache_salt, source, **lengths
    ):
        assume(self.harness.scheduler.num_live < 12)
        prompt = (STEM[:num_stem] + tail or [1])[: self.harness.scheduler.max_len - 1]
        keys = list(range(self.keys, self.keys + num_choices))
        self.keys += num_choices
        options = {"priority": priority, "cache_salt": cache_salt, "prompt_logprobs": scores, "logprobs": scores}
        if ENCODER in self.harness.groups:
            options["source"] = source[: min(self.harness.budget, self.harness.scheduler.max_len) - 1]
        asked = generate(prompt, keys, **options, **lengths)
        if num_delivered:  # an earlier life of the core had begun it
            begun = {key: self.truth(asked, index)[:num_delivered] for index, key in enumerate(keys)}
            asked = generate(prompt, keys, outputs=begun, resumed=True, **options, **lengths)
        self.harness.submit(asked, frontend)

    def truth(self, asked, index):
        return undisturbed(asked, index, self.harness.scheduler.max_len)[0]

    @precondition(lambda self: self.harness.scheduler.num_live)
    @rule(data=st.data())
    def abort(self, data):
        frontend, key = data.draw(st.sampled_from([at for at, got in self.harness.received.items() if not got.ended]))
        self.harness.abort(key, frontend)

    @rule(frontend=st.sampled_from(FRONTENDS))
    def frontend_dies(self, frontend):
        for at in [at for at in self.harness.received if at[0] == frontend]:
            del self.harness.received[at]
        self.harness.scheduler.drop(frontend)

    @precondition(lambda self: self.harness.worker and self.harness.scheduler.has_room(self.harness.depth))
    @rule()
    def plan(self):
        self.harness.plan()

    @precondition(lambda self: self.harness.plans)
    @rule(leaves=st.booleans())
    def step_ends(self, leaves):
        self.harness.finish_step(leaves)

    @rule(turns=st.integers(1, 5))
    def some_turns(self, turns):
        if self.harness.worker:
            for _ in range(turns):
                self.harness.turn()

    @precondition(lambda self: self.harness.worker)
    @rule()
    def worker_dies(self):
        late = [StepResult(plan.epoch, plan.step, ints([]), 1) for plan in self.harness.plans]
        self.harness.worker_down()
        for result in late:
            assert not self.harness.scheduler.commit(result)

    @precondition(lambda self: not self.harness.worker)
    @rule()
    def worker_comes(self):
        self.harness.worker_up()

    @invariant()
    def books_are_right(self):
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self):
        if not hasattr(self, "harness"):
            return
        if not self.harness.worker:
            self.harness.worker_up()
        self.harness.run()
        self.harness.check_outputs()
        self.harness.check_empty()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
