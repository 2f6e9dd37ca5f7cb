"""The core's loop over real sockets: a worker thread that keeps books, and a frontend that reads on demand."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest
import structlog
import zmq
from fake_worker import FakeWorker, undisturbed
from harness import PAGED, generate
from structlog.testing import capture_logs

from cableway.enginecore.loop import EngineCore
from cableway.ipc import config
from cableway.ipc.endpoint import Endpoint, PeerUp, identity
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Choice,
    Compiled,
    Failed,
    Hello,
    Ping,
    Ready,
    Refused,
    Sleep,
    Status,
    StepPlan,
    StepResult,
    StepResults,
    ToFrontend,
    Tokens,
    ToWorker,
    Wake,
    Welcome,
    ints,
    unpack_ints,
)
from cableway.ipc.resolve import resolve

NUM_BLOCKS, BLOCK_SIZE, BUDGET, MAX_NUM_SEQS, MAX_MODEL_LEN = 64, 4, 16, 4, 64
PATIENCE_S = 10.0


class Lifeline:
    """Notes that the loop tells when it turns and when it waits."""

    def __init__(self):
        self.beats = self.idles = 0

    def beat(self):
        self.beats += 1

    def idle(self):
        self.idles += 1


class WorkerThread:
    """A worker that answers plans as the process would; it can be held up, and killed without a goodbye."""

    def __init__(self, settings, rank=0, num_blocks=NUM_BLOCKS, hold=False):
        self.rank, self.num_blocks = rank, num_blocks
        self.go, self.dead = threading.Event(), threading.Event()
        self.epochs, self.refusals, self.plans = [], [], []
        self.asleep = False
        self.stray: list[StepResults] = []  # sent before anything else, once
        if not hold:
            self.go.set()
        self._address = config.workers_address(settings.runtime_dir, settings.engine)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def die(self):
        self.dead.set()
        self.go.set()
        self._thread.join()

    def _run(self):
        endpoint = Endpoint(self._address, ToWorker, own_identity=identity("worker", self.rank))
        try:
            while not self.dead.is_set():
                for arrival in endpoint.receive():
                    self._handle(endpoint, arrival.message)
                zmq.select(endpoint.sockets, [], [], 0.01)
        finally:
            endpoint.close()

    def _handle(self, endpoint, message):
        match message:
            case PeerUp():
                endpoint.send(Hello(PROTOCOL_VERSION, "worker", self.rank, os.getpid()))
            case Welcome(_, epoch):
                self.epochs.append(epoch)
                self._begin(endpoint)
            case Sleep() | Wake():
                self.asleep = isinstance(message, Sleep)
                self._begin(endpoint)
            case Refused(reason):
                self.refusals.append(reason)
            case StepPlan():
                assert not self.asleep
                self.plans.append(message)
                self.go.wait()
                if message.epoch == self.epochs[-1] and not self.dead.is_set():
                    while self.stray:
                        endpoint.send(self.stray.pop())
                    for said in self.worker.run(message):
                        if self.rank == 0:
                            endpoint.send(said)

    def _begin(self, endpoint):
        """Empty, and all that it had is forgotten."""
        self.worker = FakeWorker([PAGED], self.num_blocks, BLOCK_SIZE, BUDGET, MAX_NUM_SEQS)
        endpoint.send(Ready(self.rank, self.num_blocks, BLOCK_SIZE, [PAGED], MAX_NUM_SEQS, 0.1, self.asleep))


class Client:
    """A frontend: keeps what it was sent."""

    def __init__(self, settings, version=PROTOCOL_VERSION, role="frontend", engine="0", hello=True):
        address = config.frontends_address(settings.runtime_dir, settings.engine)
        self.endpoint = Endpoint(address, ToFrontend, own_identity=identity("frontend", 0))
        self.output, self.finished, self.failed = {}, {}, {}
        self.welcomes, self.refusals, self.status = [], [], None
        self.until(lambda: self.is_up)
        if hello:
            self.send(Hello(version, role, 0, os.getpid(), engine))

    is_up = False

    def send(self, message):
        self.endpoint.send(message)

    def until(self, condition):
        """Read until it holds."""
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up_s, "waited too long"
            zmq.select(self.endpoint.sockets, [], [], 0.05)
            for arrival in self.endpoint.receive():
                self._take(arrival.message)

    def _take(self, message):
        match message:
            case PeerUp():
                self.is_up = True
            case Welcome(_, epoch):
                self.welcomes.append(epoch)
            case Refused(reason):
                self.refusals.append(reason)
            case Status():
                self.status = message
            case Failed():
                self.failed[message.key] = message
            case Tokens():
                assert message.epoch == self.welcomes[-1]
                token_ids = iter(unpack_ints(message.token_ids))
                for key, first, num in zip(
                    *map(unpack_ints, (message.keys, message.first_index, message.num_tokens)), strict=True
                ):
                    output = self.output.setdefault(key, [])
                    assert first == len(output)
                    output += [next(token_ids) for _ in range(num)]
                for finish in message.finished:
                    self.finished[finish.key] = finish

    def ask_status(self):
        self.status = None
        self.send(Ping())
        self.until(lambda: self.status)
        return self.status

    def close(self):
        self.endpoint.close()


@pytest.fixture
def folder():
    path = tempfile.mkdtemp(prefix="cw-", dir="/tmp")  # pytest's own is too long a path for a Unix socket
    yield path
    shutil.rmtree(path)


def core_settings(folder, **changes):
    settings = config.CoreConfig(
        runtime_dir=folder,
        engine="0",
        num_workers=1,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET,
        prefix_cache=True,
        scheduling_policy="fcfs",
        overlap=1,
        stream_interval_s=0.03,
        max_queued_requests=100,
        max_queued_tokens=10_000,
        lease_s=30.0,
        step_timeout_s=30.0,
        drain_timeout_s=5.0,
        log=config.LogConfig("info", True),
    )
    return msgspec.structs.replace(settings, **changes)


@contextmanager
def running(settings):
    """A core in a thread of its own; drained at the end, if it was not before. Yields it and what it logs."""
    with capture_logs() as logs:
        core = EngineCore(settings, Lifeline(), structlog.get_logger())
        core.logs = logs
        thread = threading.Thread(target=core.run)
        thread.start()
        try:
            yield core
        finally:
            core.drain(0.0)
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def settings(folder):
    return core_settings(folder)


@pytest.fixture
def workers():
    """Makes worker threads, and ends them."""
    made = []

    def make(*arguments, **options):
        made.append(WorkerThread(*arguments, **options))
        return made[-1]

    yield make
    for worker in made:
        worker.die()


@pytest.fixture
def clients():
    made = []

    def make(*arguments, **options):
        made.append(Client(*arguments, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


def truth(asked, index=0):
    return undisturbed(asked, index, MAX_MODEL_LEN)


def events(core):
    return [entry["event"] for entry in core.logs]


@pytest.mark.parametrize(("overlap", "stream_interval_s"), [(0, 0.03), (1, 0), (1, 0.03)])
def test_requests_of_two_frontends(folder, workers, clients, overlap, stream_interval_s):
    settings = core_settings(folder, overlap=overlap, stream_interval_s=stream_interval_s)
    with running(settings) as core:
        workers(settings)
        first, second = clients(settings), clients(settings)
        asked = [generate([5, 6, 7, key], [key, key + 100], max_tokens=12, seed=key) for key in range(8)]
        for each in asked:
            (first if each.choices[0].key % 2 else second).send(each)
        for client in (first, second):
            client.until(lambda client=client: len(client.finished) == 8)
            for key, finish in client.finished.items():
                tokens, reason = truth(asked[key % 100], key // 100)
                assert (client.output[key], finish.reason) == (tokens, reason)
        status = first.ask_status()
        assert (status.ready, status.num_running, status.num_waiting, status.step_age_s) == (True, 0, 0, 0.0)
        assert (status.epoch, status.num_blocks) == (core.epoch, NUM_BLOCKS)
        assert status.steps > 0
        assert core._lifeline.beats <= core._lifeline.idles


def test_requests_wait_for_the_worker(settings, workers, clients):
    with running(settings):
        client = clients(settings)
        asked = generate([1, 2, 3], [0])
        client.send(asked)
        status = client.ask_status()
        assert (status.ready, status.num_waiting, status.num_waiting_tokens) == (False, 1, 3)
        workers(settings)
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]


def test_a_worker_dies_and_streams_go_on(settings, workers, clients):
    with running(settings) as core:
        dying, client = workers(settings), clients(settings)
        asked = [generate([5, 6, 7, key], [key], max_tokens=40, eos_token_ids=b"", seed=key) for key in range(6)]
        for each in asked:
            client.send(each)
        client.until(lambda: sum(map(len, client.output.values())) > 30)
        dying.die()
        client.until(lambda: "worker_lost" in events(core))
        assert not client.ask_status().ready
        workers(settings)
        client.until(lambda: len(client.finished) == 6)
        for key in range(6):
            assert client.output[key] == truth(asked[key])[0]


def test_survivors_begin_anew_under_another_epoch(folder, workers, clients):
    settings = core_settings(folder, num_workers=2)
    with running(settings) as core:
        survivor, dying = workers(settings), workers(settings, rank=1, num_blocks=40)
        client = clients(settings)
        asked = generate([5, 6, 7], [0], max_tokens=50, eos_token_ids=b"")
        client.send(asked)
        client.until(lambda: len(client.output.get(0, ())) > 5)
        assert client.ask_status().num_blocks == 40  # the fewest of any rank
        dying.die()
        workers(settings, rank=1)
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]
        assert survivor.epochs == [core.epoch, core.epoch + 1]


def test_all_ranks_sleep_and_nothing_is_held_against_what_ran(folder, workers, clients):
    settings = core_settings(folder, num_workers=2)
    with running(settings) as core:
        ranks, client, other = [workers(settings), workers(settings, rank=1)], clients(settings), clients(settings)
        asked = [generate([5, 6, 7, key], [key], max_tokens=40, eos_token_ids=b"", seed=key) for key in range(6)]
        for each in asked:
            client.send(each)
        client.until(lambda: sum(map(len, client.output.values())) > 30)
        client.send(Sleep())
        for told in (client, other):
            told.until(lambda told=told: told.status and told.status.asleep)
        assert all(worker.asleep for worker in ranks)
        status = client.ask_status()
        assert (status.ready, status.num_running, status.num_waiting) == (False, 0, 6 - len(client.finished))
        ranks[1].die()
        client.until(lambda: not client.ask_status().asleep)
        replaced = workers(settings, rank=1)  # it comes with its memory, and is told
        client.until(lambda: client.ask_status().asleep)
        assert replaced.asleep
        other.send(Wake())
        client.until(lambda: len(client.finished) == 6)
        for key in range(6):
            assert client.output[key] == truth(asked[key])[0]
        assert "request_quarantined" not in events(core)


def test_a_core_that_has_not_heard_of_sleep_leaves_its_workers_asleep(settings, workers, clients):
    with running(settings):
        worker, client = workers(settings), clients(settings)
        client.send(Sleep())
        client.until(lambda: client.status and client.status.asleep)
    with running(settings):
        client = clients(settings)
        client.until(lambda: client.ask_status().asleep)
        asked = generate([1, 2, 3], [0])
        client.send(asked)
        assert client.ask_status().num_waiting == 1
        client.send(Wake())
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]
        assert not worker.asleep


def test_whoever_changes_their_mind_is_awake(settings, workers, clients):
    with running(settings):
        workers(settings)
        client = clients(settings)
        asked = generate([5, 6, 7], [0], max_tokens=40, eos_token_ids=b"")
        client.send(asked)
        for _ in range(20):
            client.send(Sleep())
            client.send(Wake())
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]


def test_compilations_are_summed(settings, workers, clients):
    with running(settings):
        worker, client = workers(settings), clients(settings)
        worker.stray = [Compiled(2), Compiled(3)]
        client.send(generate([1, 2, 3], [0]))
        client.until(lambda: client.finished)
        assert client.ask_status().compilations == 5


def test_late_and_foreign_results_are_ignored(settings, workers, clients):
    with running(settings) as core:
        worker, client = workers(settings, hold=True), clients(settings)
        asked = generate([5, 6, 7], [0])
        client.send(asked)
        client.until(lambda: client.ask_status().num_running)
        worker.stray = [
            StepResults([StepResult(core.epoch - 1, 0, ints([9]), 1)]),  # another life
            StepResults([StepResult(core.epoch, 99, ints([9]), 1)]),  # a step never planned
        ]
        worker.go.set()
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]
        assert events(core).count("late_result_ignored") == 2


def test_a_worker_that_talks_nonsense_is_refused(settings, workers, clients):
    with running(settings) as core:
        worker, client = workers(settings, hold=True), clients(settings)
        asked = generate([5, 6, 7], [0])
        client.send(asked)
        client.until(lambda: client.ask_status().num_running)
        worker.stray = [StepResults([StepResult(core.epoch, 0, ints([1, 2, 3]), 1)])]  # three tokens for one row
        worker.go.set()
        client.until(lambda: worker.refusals)
        worker.die()
        workers(settings)
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]


def test_a_second_worker_of_a_rank_takes_it_over(settings, workers, clients):
    with running(settings):
        stuck, client = workers(settings, hold=True), clients(settings)
        client.send(generate([5, 6, 7], [0]))
        client.until(lambda: client.ask_status().num_running)
        workers(settings)
        client.until(lambda: client.finished)
        stuck.go.set()
        client.until(lambda: stuck.refusals)
        assert client.ask_status().ready


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (
            {"version": PROTOCOL_VERSION + 1},
            f"protocol version {PROTOCOL_VERSION + 1} does not fit the core's {PROTOCOL_VERSION}",
        ),
        ({"role": "worker"}, "role"),
        ({"engine": "other"}, "engine"),
    ],
)
def test_a_peer_that_does_not_fit_is_refused(settings, clients, hello, reason):
    with running(settings) as core:
        client = clients(settings, **hello)
        client.until(lambda: client.refusals)
        assert reason in client.refusals[0]
        assert not client.welcomes
        assert "peer_refused" in events(core)


def test_workers_that_do_not_fit_are_refused(folder, workers, clients):
    settings = core_settings(folder, num_workers=1)
    with running(settings):
        client = clients(settings)
        tiny, of_no_rank = workers(settings, num_blocks=0), workers(settings, rank=1)
        client.until(lambda: tiny.refusals and of_no_rank.refusals)
        assert "cannot hold any request" in tiny.refusals[0]
        assert "rank 1 of 1" in of_no_rank.refusals[0]
        workers(settings)
        client.until(lambda: client.ask_status().ready)


def test_garbage_harms_nobody(settings, workers, clients):
    with running(settings) as core:
        workers(settings)
        client, stranger = clients(settings), clients(settings, hello=False)
        client.until(lambda: client.welcomes)
        stranger.endpoint.socket.send(b"\xc1 no message at all")
        stranger.until(lambda: stranger.refusals)
        client.endpoint.socket.send(b"\x93\xa5again")
        client.endpoint.socket.send_multipart([b"", b""])
        client.send(Abort(b"odd"))
        client.send(Abort(ints([4711])))
        asked = generate([5, 6, 7], [0])
        client.send(asked)
        client.send(asked)  # twice
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]
        client.ask_status()
        assert events(core).count("message_ignored") == 3


def test_abort_frees_the_row_and_says_nothing(settings, workers, clients):
    with running(settings):
        worker, client = workers(settings, hold=True), clients(settings)
        client.send(generate([5, 6, 7], [0], max_tokens=60, eos_token_ids=b""))
        client.until(lambda: client.ask_status().num_running)
        client.send(Abort(ints([0])))
        client.until(lambda: not client.ask_status().num_running)
        worker.go.set()
        client.send(generate([5, 6, 7], [1]))
        client.until(lambda: client.finished)
        assert client.output.keys() == client.finished.keys() == {1}


def test_a_frontend_that_dies_takes_its_requests_along(settings, workers, clients):
    with running(settings):
        workers(settings, hold=True)
        dying, client = Client(settings), clients(settings)
        dying.send(generate([5, 6, 7], [0]))
        client.until(lambda: client.ask_status().num_running)
        dying.close()
        client.until(lambda: not client.ask_status().num_running)


def test_a_silent_frontend_loses_its_lease_and_begins_anew(folder, workers, clients):
    settings = core_settings(folder, lease_s=0.3)
    with running(settings) as core:
        workers(settings, hold=True)
        silent, client = clients(settings), clients(settings)
        silent.send(generate([5, 6, 7], [0]))
        client.until(lambda: client.ask_status().num_running)
        client.until(lambda: not client.ask_status().num_running)
        assert "frontend_lapsed" in events(core)
        silent.until(lambda: silent.welcomes)
        silent.send(Ping())
        silent.until(lambda: len(silent.welcomes) == 2)  # submit again what you have
        assert silent.ask_status().num_running == 0


def test_hello_again_drops_what_was_asked_before(settings, workers, clients):
    with running(settings):
        workers(settings)
        client = clients(settings)
        asked = generate([5, 6, 7], [0], max_tokens=60, eos_token_ids=b"")
        client.send(asked)
        client.until(lambda: client.output)
        client.send(Hello(PROTOCOL_VERSION, "frontend", 0, os.getpid()))
        client.until(lambda: len(client.welcomes) == 2)
        choice = Choice(0, 0, ints(client.output[0]))
        client.send(msgspec.structs.replace(asked, choices=[choice], resumed=True))
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]


class TestDrain:
    def test_what_runs_is_finished(self, settings, workers, clients):
        with running(settings) as core:
            worker, client = workers(settings, hold=True), clients(settings)
            asked = generate([5, 6, 7], [0])
            client.send(asked)
            client.until(lambda: client.ask_status().num_running)
            core.drain(PATIENCE_S)
            client.until(lambda: "draining" in events(core))
            client.send(generate([1], [1]))
            client.until(lambda: 1 in client.failed)
            assert client.failed[1].status == 503
            assert not client.ask_status().ready
            worker.go.set()
            client.until(lambda: client.finished)
            assert client.output[0] == truth(asked)[0]

    def test_the_rest_fails_at_the_deadline(self, settings, workers, clients):
        with running(settings) as core:
            workers(settings, hold=True)
            client = clients(settings)
            client.send(generate([5, 6, 7], [0]))
            client.until(lambda: client.ask_status().num_running)
            core.drain(0.2)
            client.until(lambda: client.failed)
            assert (client.failed[0].status, client.failed[0].code) == (503, "service_unavailable")


def test_the_process(folder, workers, clients):
    """Started alone, from the configuration it is given; SIGTERM drains it."""
    settings = core_settings(folder)
    whole = msgspec.structs.replace(resolve(config.Options(runtime_dir=folder)), core=settings)
    path = os.path.join(folder, "config.json")
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(whole))
    command = [sys.executable, "-m", "cableway.enginecore.main", "--config", path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        workers(settings)
        client = clients(settings)
        asked = generate([5, 6, 7], [0])
        client.send(asked)
        client.until(lambda: client.finished)
        assert client.output[0] == truth(asked)[0]
        process.terminate()
        log_lines = process.communicate(timeout=PATIENCE_S)[1].splitlines()
    assert process.returncode == 0
    assert [msgspec.json.decode(line)["role"] for line in log_lines] == ["enginecore"] * len(log_lines)
