"""The whole core under random events: peers that come, die and come back, cores that die, messages late and twice.

The core is the real one, but for its sockets: here each peer's messages wait in a queue until the machine lets some
through, so that any of them may be late, and what was once sent may come again from a peer that is long dead.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from unittest import mock

import structlog
from fake_worker import VOCAB, FakeWorker, undisturbed
from harness import PAGED, generate
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cableway.enginecore import loop
from cableway.ipc import config
from cableway.ipc.endpoint import Arrival, PeerDown
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Choice,
    Failed,
    Generate,
    Hello,
    IfLost,
    Ping,
    Ready,
    Refused,
    RunLeft,
    Standing,
    Status,
    StepPlan,
    StepResult,
    StepResults,
    Tokens,
    Welcome,
    ints,
    unpack_ints,
)
from cableway.workers.plans import rest_of_run

NUM_BLOCKS, BLOCK_SIZE, BUDGET, MAX_NUM_SEQS, MAX_MODEL_LEN, LEASE_S = 16, 4, 8, 3, 40, 5.0
DEATHS_THAT_CONVICT = 4  # two make a suspect, two more while it is alone


class Wire:
    """In place of an `Endpoint`: what arrives is put in by hand, what is sent goes to its peer at once, if it lives."""

    def __init__(self, *_, **__):
        self.sockets: list[object] = []
        self.arrived: list[Arrival] = []
        self.peers: dict[bytes, object] = {}

    def receive(self) -> list[Arrival]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def send(self, message, *_, to: bytes) -> bool:
        if to in self.peers:
            self.peers[to].hear(message)
        return to in self.peers


class Peer:
    """A process on the other end. Messages to the core wait in `outgoing`."""

    def __init__(self, name: bytes):
        self.name = name
        self.outgoing: deque[object] = deque()


class Frontend(Peer):
    """Does what `EngineClient` does, and checks every token against the truth."""

    keys = itertools.count()

    def __init__(self, name: bytes, num_deaths: Callable[[], int]):
        super().__init__(name)
        self.num_deaths = num_deaths
        self.epoch = self.last_epoch = None
        self.live: dict[int, tuple[Generate, int, list[int]]] = {}
        self.wills: dict[int, tuple[Standing, int]] = {}
        self.standings: dict[int, Standing] = defaultdict(Standing)
        self.num_finished = 0

    def connect(self) -> None:
        self.epoch = None
        self.outgoing.append(Hello(PROTOCOL_VERSION, "frontend", 0, 1))

    def ask(self, asked: Generate) -> None:
        for choice in asked.choices:
            self.live[choice.key] = asked, choice.index, []
        if self.epoch is not None:
            self.outgoing.append(asked)

    def abort(self, key: int) -> None:
        del self.live[key]
        if self.epoch is not None:
            self.outgoing.append(Abort(ints([key])))

    def hear(self, message) -> None:
        match message:
            case Welcome(_, epoch):
                self.resume(died=self.last_epoch not in (None, epoch))
                self.epoch = self.last_epoch = epoch
            case Tokens() if self.epoch is not None:  # what comes before its Welcome a client leaves, too
                assert message.epoch == self.epoch
                self.take(message)
            case IfLost(key, standing) if key in self.live:
                self.wills[key] = standing, len(self.live[key][2])
            case Failed(key, _, "quarantined") if self.num_deaths() >= DEATHS_THAT_CONVICT:
                self.live.pop(key, None)  # kills that follow a suspect about look like its own; see test_trials.py
            case Failed(key):
                raise AssertionError(f"{self.live.pop(key, None)} failed: {message}")
            case Refused(reason):
                raise AssertionError(reason)
            case IfLost() | Status() | Tokens():
                pass

    def resume(self, died: bool) -> None:
        before, self.live = self.live, {}
        self.outgoing.append(Abort(ints(before)))
        for key, (asked, index, output) in before.items():
            standing, at = self.wills.pop(key, (self.standings[key], len(output)))
            if died:
                standing = standing if standing.deaths and at == len(output) else Standing(1)
            fresh = next(self.keys)
            self.live[fresh], self.standings[fresh] = (asked, index, output), standing
            choices = [Choice(fresh, index, ints(output), standing)]
            prompt = unpack_ints(asked.prompt).tolist()
            again = generate(prompt, [fresh], resumed=True)
            self.outgoing.append(type(again)("again", asked.prompt, choices, asked.sampling, resumed=True))

    def take(self, message: Tokens) -> None:
        token_ids = iter(unpack_ints(message.token_ids))
        for key, first in zip(unpack_ints(message.keys), unpack_ints(message.first_index), strict=True):
            token_id = next(token_ids)
            if key in self.live:
                assert first == len(self.live[key][2]), "a token was doubled or skipped"
                self.live[key][2].append(token_id)
        for finish in message.finished:
            if finish.key in self.live:
                asked, index, output = self.live.pop(finish.key)
                assert (output, finish.reason) == undisturbed(asked, index, MAX_MODEL_LEN)
                self.num_finished += 1


class Worker(Peer):
    def __init__(self, name: bytes):
        super().__init__(name)
        self.plans: deque[StepPlan] = deque()
        self.done: list[StepResult] = []
        self.epoch = None

    def connect(self) -> None:
        self.epoch = None
        self.outgoing.append(Hello(PROTOCOL_VERSION, "worker", 0, 1))

    def hear(self, message) -> None:
        match message:
            case Welcome(_, epoch):
                self.epoch = epoch
                self.plans.clear()
                self.done = []
                self.body = FakeWorker([PAGED], NUM_BLOCKS, BLOCK_SIZE, BUDGET, MAX_NUM_SEQS)
                self.outgoing.append(Ready(0, NUM_BLOCKS, BLOCK_SIZE, [PAGED], MAX_NUM_SEQS, 0.1))
            case StepPlan():
                self.plans.append(message)

    def step(self) -> None:
        """One step. What it drew is told now, or some steps later where it is of a run."""
        plan = self.plans.popleft()
        if plan.epoch != self.epoch:
            return
        self.done.append(self.body.execute(plan))
        rest = rest_of_run(plan)
        if rest and not self.plans and not self.body.has_ended:
            self.plans.append(rest)
            if len(self.done) % 3:
                return
        self.outgoing.append(StepResults(self.done))
        self.done = []
        if rest and rest not in self.plans:
            self.outgoing.append(RunLeft(rest.epoch, rest.step))


class CoreMachine(RuleBasedStateMachine):
    @initialize(overlap=st.integers(0, 1), prefix_cache=st.booleans(), stream_interval_s=st.sampled_from([0, 1]))
    def begin(self, **options):
        self.options, self.now_s, self.names, self.num_deaths = options, 0.0, itertools.count(), 0
        self.frontends: list[Frontend] = []
        self.worker: Worker | None = None
        self.graveyard: list[tuple[bool, bytes, object]] = []  # (was a worker's, from whom, what): said once, or lost
        self.start_core(1)
        self.frontend_comes()
        self.worker_comes()

    def start_core(self, epoch: int) -> None:
        log = config.LogConfig("info", True)
        core = config.CoreConfig(
            runtime_dir="", engine="0", num_workers=1, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=BUDGET, scheduling_policy="fcfs", max_queued_requests=1000, max_queued_tokens=10**6,
            lease_s=LEASE_S, step_timeout_s=30.0, drain_timeout_s=5.0, log=log, **self.options,
        )  # fmt: skip
        no_pipe = mock.patch.object(loop.os, "pipe", return_value=(0, 1))
        with mock.patch.object(loop, "Endpoint", Wire), no_pipe:
            self.core = loop.EngineCore(core, mock.Mock(), structlog.get_logger(), lambda: self.now_s)
        self.core.epoch = self.core._workers_epoch = self.core._scheduler._epoch = epoch

    def wire(self, peer: Peer) -> Wire:
        return self.core._to_workers if isinstance(peer, Worker) else self.core._to_frontends

    @property
    def peers(self) -> list[Peer]:
        return [*self.frontends, *([self.worker] if self.worker else [])]

    def bury(self, peer: Peer) -> None:
        """What it had not sent is lost, or comes late."""
        self.wire(peer).peers.pop(peer.name, None)
        self.graveyard += [(isinstance(peer, Worker), peer.name, message) for message in peer.outgoing]
        self.wire(peer).arrived.append(Arrival(peer.name, PeerDown()))

    # Events

    @precondition(lambda self: len(self.frontends) < 3)
    @rule()
    def frontend_comes(self):
        self.frontends.append(Frontend(b"frontend.%d" % next(self.names), lambda: self.num_deaths))
        self.meet(self.frontends[-1])

    @precondition(lambda self: not self.worker)
    @rule()
    def worker_comes(self):
        self.worker = Worker(b"worker.%d" % next(self.names))
        self.meet(self.worker)

    def meet(self, peer) -> None:
        self.wire(peer).peers[peer.name] = peer
        peer.connect()

    @precondition(lambda self: len(self.frontends) > 1)
    @rule(data=st.data())
    def frontend_dies(self, data):
        self.bury(self.frontends.pop(data.draw(st.integers(0, len(self.frontends) - 1))))

    @precondition(lambda self: self.worker)
    @rule()
    def worker_dies(self):
        self.num_deaths += 1
        self.bury(self.worker)
        self.worker = None

    @rule()
    def core_dies(self):
        self.num_deaths += 1
        self.start_core(self.core.epoch + 100)
        for peer in self.peers:
            self.graveyard += [(isinstance(peer, Worker), peer.name, message) for message in peer.outgoing]
            peer.outgoing.clear()
            self.meet(peer)

    @rule(frontend=st.integers(0, 2))
    def frontend_reconnects(self, frontend):
        self.frontends[frontend % len(self.frontends)].connect()

    @rule(
        frontend=st.integers(0, 2),
        prompt=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20),
        num=st.integers(1, 3),
        max_tokens=st.integers(1, 10),
    )
    def ask(self, frontend, prompt, num, max_tokens):
        chosen = self.frontends[frontend % len(self.frontends)]
        chosen.ask(generate(prompt, [next(Frontend.keys) for _ in range(num)], max_tokens=max_tokens))

    @rule(frontend=st.integers(0, 2), which=st.integers(0, 20))
    def abort(self, frontend, which):
        chosen = self.frontends[frontend % len(self.frontends)]
        if chosen.live:
            chosen.abort(list(chosen.live)[which % len(chosen.live)])

    @rule(peer=st.integers(0, 3), num=st.integers(1, 6))
    def messages_arrive(self, peer, num):
        chosen = self.peers[peer % len(self.peers)]
        for _ in range(min(num, len(chosen.outgoing))):
            message = chosen.outgoing.popleft()
            self.graveyard.append((isinstance(chosen, Worker), chosen.name, message))
            self.wire(chosen).arrived.append(Arrival(chosen.name, message))

    @precondition(lambda self: self.graveyard)
    @rule(age=st.integers(1, 12))
    def a_message_comes_late_or_twice(self, age):
        was_worker, name, message = self.graveyard[-min(age, len(self.graveyard))]
        lives = any(peer.name == name for peer in self.peers)
        if isinstance(message, Hello) or (lives and isinstance(message, Generate | Ready | Abort)):
            return  # a live peer says these again only for a reason, which other rules have
        wire = self.core._to_workers if was_worker else self.core._to_frontends
        wire.arrived.append(Arrival(name, message))

    @precondition(lambda self: self.worker and self.core._scheduler.num_in_flight)
    @rule(life=st.sampled_from([-100, -1, 1]))
    def a_step_of_another_life_has_the_same_number(self, life):
        step = self.core._scheduler._in_flight[0]
        drawn = ints([VOCAB] * sum(step.samples))
        epoch = self.core._workers_epoch + life
        results = StepResults([StepResult(epoch, step.number, drawn, 1)])
        for message in (results, RunLeft(epoch, step.number)):
            self.core._to_workers.arrived.append(Arrival(self.worker.name, message))

    @precondition(lambda self: self.worker and self.worker.plans)
    @rule()
    def worker_steps(self):
        self.worker.step()

    @rule(seconds=st.sampled_from([0.1, 1.1, LEASE_S + 1]))
    def time_passes(self, seconds):
        self.now_s += seconds
        for frontend in self.frontends:
            frontend.outgoing.append(Ping())

    @rule()
    def core_turns(self):
        self.core.turn()

    @rule(rounds=st.integers(1, 8))
    def all_goes_on(self, rounds):
        for _ in range(rounds):
            for number in range(len(self.peers)):
                self.messages_arrive(number, 100)
            self.core.turn()
            if self.worker and self.worker.plans:
                self.worker_steps()

    # Laws

    @invariant()
    def nothing_is_owned_twice_or_lost(self):
        if not hasattr(self, "core"):
            return
        scheduler = self.core._scheduler
        kv, owners = scheduler.kv, [*scheduler.running, *scheduler._draining]
        assert len(scheduler._in_flight) <= self.core._depth + 2  # one to be cut short, and what cuts it
        queued = [*scheduler.waiting, *scheduler.trials.waiting]
        live = [request for requests in scheduler._live.values() for request in requests.values()]
        assert sorted(map(id, live)) == sorted(id(r) for r in [*queued, *owners] if r.state.value != "finished")
        if kv is not None:
            assert sorted([*(r.row for r in owners), *scheduler._free_rows]) == list(range(MAX_NUM_SEQS))
            assert kv.pool.num_available + len({b for r in owners for t in r.tables for b in t}) == NUM_BLOCKS
        else:
            assert not owners

    def teardown(self):
        """Left in peace, it answers everything that anybody still waits for."""
        if not hasattr(self, "core"):
            return
        if not self.worker:
            self.worker_comes()
        for _ in range(400):
            for frontend in self.frontends:
                frontend.outgoing.append(Ping())
            for number in range(len(self.peers)):
                self.messages_arrive(number, 100)
            self.core.turn()
            while self.worker.plans:
                self.worker_steps()
            self.now_s += 0.5
            self.nothing_is_owned_twice_or_lost()
            if not any(frontend.live for frontend in self.frontends):
                break
        assert not any(frontend.live for frontend in self.frontends)
        assert all(peer in {frontend.name for frontend in self.frontends} for peer in self.core._scheduler._live)


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
