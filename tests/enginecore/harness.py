"""A scheduler with a worker that keeps books and a client that checks what it gets: no processes, no time."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fake_worker import EOS, FakeWorker, undisturbed

from cableway.enginecore.kv.groups import group_of
from cableway.enginecore.kv.manager import HOLE
from cableway.enginecore.limits import Limits
from cableway.enginecore.request import State
from cableway.enginecore.scheduler import Memory, Scheduler
from cableway.enginecore.trials import HEARD_S, WELL_S
from cableway.ipc.messages import (
    Choice,
    Failed,
    Finish,
    Generate,
    IfLost,
    RunLeft,
    Sampling,
    Standing,
    StateGroup,
    StepPlan,
    Tokens,
    ints,
    unpack_ints,
)
from cableway.workers.plans import rest_of_run

FRONTEND = b"frontend.0"
PAGED = StateGroup("paged", 1)


def generate(
    prompt: list[int],
    keys: list[int],
    *,
    outputs: dict[int, list[int]] | None = None,
    priority: int = 0,
    cache_salt: str = "",
    resumed: bool = False,
    source: Sequence[int] = (),
    **sampling: int | bytes,
) -> Generate:
    """A request with one choice a key. `outputs` (by key) is what was delivered before."""
    sampling = {"max_tokens": 8, "eos_token_ids": ints([EOS])} | sampling
    choices = [Choice(key, index, ints((outputs or {}).get(key, []))) for index, key in enumerate(keys)]
    return Generate(
        f"r{keys[0]}", ints(prompt), choices, Sampling(**sampling), priority, cache_salt, resumed, ints(source)
    )


@dataclass
class Received:
    """What a client has of one choice."""

    asked: Generate
    index: int
    output: list[int] = field(default_factory=list)
    finish: Finish | None = None
    failed: Failed | None = None
    prompt_logprobs: dict[int, int] = field(default_factory=dict)  # index in the prompt -> token
    logprobs: dict[int, int] = field(default_factory=dict)  # index in the output -> token
    first_step: int | None = None
    last_step: int | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.failed is not None


class Harness:
    """Drives a scheduler; `depth` steps are planned ahead of the one whose result is awaited."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        groups: tuple[StateGroup, ...] = (PAGED,),
        max_num_seqs: int = 4,
        budget: int = 16,
        max_model_len: int = 64,
        depth: int = 0,
        prefix_cache: bool = True,
        by_priority: bool = False,
        max_queued_requests: int = 1000,
        max_queued_tokens: int = 100_000,
        plans_runs: bool = False,
        epoch: int = 7,
    ):
        limits = Limits(
            max_num_seqs, budget, max_model_len, max_queued_requests, max_queued_tokens, prefix_cache, by_priority,
            plans_runs,
        )  # fmt: skip
        self.depth, self.groups, self.num_blocks, self.block_size = depth, list(groups), num_blocks, block_size
        self.budget, self.max_num_seqs, self.epoch = budget, max_num_seqs, epoch
        self.scheduler = Scheduler(limits, epoch)
        self.workers_epoch = epoch
        self.plans: deque[StepPlan] = deque()
        self.history: list[StepPlan] = []
        self.received: dict[tuple[bytes, int], Received] = {}
        self.wills: dict[tuple[bytes, int], Standing] = {}  # what is to be said of a choice if the core dies
        self.quarantined: list[tuple[bytes, int]] = []
        self.now_s = 2.0
        self.worker: FakeWorker | None = None
        self.worker_up()

    # What happens

    def worker_up(self) -> None:
        self.worker = FakeWorker(self.groups, self.num_blocks, self.block_size, self.budget, self.max_num_seqs)
        groups = [group_of(group) for group in self.groups]
        self.scheduler.start(Memory(groups, self.num_blocks, self.block_size, self.max_num_seqs), self.workers_epoch)

    def worker_down(self) -> None:
        self.worker = None
        self.plans.clear()
        self.workers_epoch += 1
        self.quarantined += [(request.frontend, request.key) for request in self.scheduler.stop()]
        self.deliver()

    def submit(self, asked: Generate, frontend: bytes = FRONTEND) -> None:
        for choice in asked.choices:
            received = Received(asked, choice.index, unpack_ints(choice.output).tolist())
            self.received[frontend, choice.key] = received
        assert not self.scheduler.submit(frontend, asked, now_s=1.0)
        self.deliver()

    def abort(self, key: int, frontend: bytes = FRONTEND) -> None:
        del self.received[frontend, key]
        self.scheduler.abort(frontend, [key])

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now_s)
        self.deliver()
        if self.scheduler.wants_turn and plan is None:
            self.now_s += 2 * HEARD_S
            plan = self.scheduler.plan(self.now_s)
        if plan is not None:
            self.plans.append(plan)
            self.history.append(plan)
        return plan

    def finish_step(self, leaves: bool = False) -> None:
        """The worker executes a step of the oldest plan, and its result is committed. A run is left when a row has
        ended, another plan waits, or the worker likes to."""
        assert self.worker is not None
        plan = self.plans.popleft()
        assert self.scheduler.commit(self.worker.execute(plan))
        if rest := rest_of_run(plan):
            if leaves or self.worker.has_ended or self.plans:
                assert self.scheduler.leave_run(RunLeft(rest.epoch, rest.step))
            else:
                self.plans.appendleft(rest)
        self.deliver()

    def turn(self) -> bool:
        """One turn of the loop; False when there was nothing to do."""
        while self.scheduler.has_room(self.depth) and self.plan():
            pass
        if not self.plans:
            if not self.scheduler.trials.waiting.num_requests:
                return False
            self.now_s += WELL_S
            return True
        self.finish_step()
        return True

    def run(self, most_turns: int = 10_000) -> None:
        """Until everything has ended."""
        for _ in range(most_turns):
            if not self.turn():
                break
            self.check()
        assert not self.scheduler.num_live

    def deliver(self) -> None:
        for frontend, message in self.scheduler.take_messages():
            if isinstance(message, Failed):
                received = self.received[frontend, message.key]
                assert not received.ended
                received.failed = message
            elif isinstance(message, IfLost):
                self.wills[frontend, message.key] = message.standing
            else:
                self._take(frontend, message)

    def _take(self, frontend: bytes, message: Tokens) -> None:
        assert message.epoch == self.epoch
        columns = [unpack_ints(part) for part in (message.keys, message.first_index, message.num_tokens)]
        token_ids = iter(unpack_ints(message.token_ids))
        for key, first_index, num_tokens in zip(*columns, strict=True):
            received = self.received[frontend, key]
            assert not received.ended
            assert first_index == len(received.output), "a token was doubled or skipped"
            received.output += [next(token_ids) for _ in range(num_tokens)]
            if received.first_step is None:
                received.first_step = len(self.history)
        assert next(token_ids, None) is None
        for chunk in message.logprobs:
            received = self.received[frontend, chunk.key]
            kept = received.prompt_logprobs if chunk.prompt else received.logprobs
            kept.update(enumerate(unpack_ints(chunk.token_ids), chunk.first_index))
        for finish in message.finished:
            received = self.received[frontend, finish.key]
            assert not received.ended
            received.finish, received.last_step = finish, len(self.history)

    # What must hold

    def check(self) -> None:
        """Invariants that hold between any two events."""
        scheduler, kv = self.scheduler, self.scheduler.kv
        owners = [*scheduler.running, *scheduler._draining]
        assert scheduler.running == sorted(scheduler.running, key=lambda request: request.order)
        for request in owners:
            steps = [step for step in scheduler._in_flight if request in step.requests]
            num_pending = sum(step.samples[step.requests.index(request)] * step.num_steps for step in steps)
            assert 0 <= request.num_computed <= request.num_planned
            if request.state is not State.FINISHED:  # what is drawn for one that has ended is dropped
                assert request.num_planned <= len(request.tokens) + num_pending
            assert request.num_planned <= request.num_slots
            assert request.is_in_flight == bool(steps)
            assert sum(step.num_steps for step in steps) <= request.num_planned - request.num_computed
        for request in scheduler.waiting:
            assert request.state is State.WAITING
            assert not request.tables
        assert scheduler.waiting.num_requests == sum(1 for _ in scheduler.waiting)
        num_waiting = sum(len(request.tokens) + request.source_len for request in scheduler.waiting)
        assert scheduler.waiting.num_tokens == num_waiting
        if kv is None:
            assert not owners
            return
        rows = [request.row for request in owners] + scheduler._free_rows
        assert sorted(rows) == list(range(self.max_num_seqs))
        pool = kv.pool
        uses = Counter(block for request in owners for table in request.tables for block in table if block != HOLE)
        assert [uses[block] for block in range(self.num_blocks)] == pool.references
        assert pool.num_free + pool.num_cached + len(uses) == self.num_blocks
        assert sorted([*pool._free, *pool._cached, *uses]) == list(range(self.num_blocks))
        for block, count in uses.items():
            holders = [request for request in owners if any(block in table for table in request.tables)]
            assert len(holders) == count
            if count > 1:  # shared: nobody writes there any more
                for request in holders:
                    group = next(group for group, table in enumerate(request.tables) if block in table)
                    place = request.tables[group].index(block)
                    if self.groups[group].kind != "encoder":
                        assert (place + 1) * self.block_size <= request.num_planned

    def check_outputs(self) -> None:
        """Everybody got what an undisturbed run gives."""
        for received in self.received.values():
            assert received.failed is None
            assert received.finish is not None
            tokens, reason = undisturbed(received.asked, received.index, self.scheduler.max_len)
            assert (received.output, received.finish.reason) == (tokens, reason)
            sampling = received.asked.sampling
            if sampling.logprobs >= 0:
                resumed = len(received.asked.choices[received.index].output) // 4
                assert received.logprobs == dict(list(enumerate(tokens))[resumed:])

    def check_empty(self) -> None:
        """Nothing is left of anybody."""
        assert not self.scheduler.running
        assert not self.scheduler._draining
        assert not self.scheduler.waiting.num_requests
        if self.scheduler.kv is not None:
            assert self.scheduler.kv.num_available == self.num_blocks
            assert len(self.scheduler._free_rows) == self.max_num_seqs
