"""The worker process over real sockets, with a core that this test plays."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from cableway.ipc import messages
from cableway.ipc.config import Config, Options, workers_address
from cableway.ipc.endpoint import Endpoint, PeerDown
from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_UNMENDABLE
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Hello,
    NewRow,
    Ready,
    Refused,
    RunLeft,
    Sampling,
    Shutdown,
    StepPlan,
    StepResult,
    StepResults,
    Welcome,
    ints,
    unpack_ints,
)
from cableway.ipc.resolve import resolve
from tests.workers.running import expected_greedy, prompt_of

Kind = TypeVar("Kind")
TIMEOUT_S = 60.0


@pytest.fixture
def resolved(checkpoint: Path, tmp_path: Path) -> Config:
    options = Options(model=str(checkpoint), runtime_dir=str(tmp_path), max_num_seqs=4, num_threads=1, block_size=8)
    config = resolve(options)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    return config


def start(config: Config) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cableway.workers.main"]
    path = Path(config.worker.runtime_dir) / "config.json"
    return subprocess.Popen([*command, "--config", str(path)], stderr=subprocess.PIPE, text=True)


@pytest.fixture
def worker(resolved: Config) -> Iterator[subprocess.Popen[str]]:
    process = start(resolved)
    yield process
    process.kill()
    print(process.communicate()[1])  # shown beside a failure


class Core:
    """The core's side of one worker."""

    def __init__(self, config: Config) -> None:
        self._endpoint = Endpoint(workers_address(config.worker.runtime_dir, "0"), messages.FromWorker, bind=True)
        self._arrived: list[Any] = []
        self.worker = b""

    def send(self, message: Any) -> None:
        assert self._endpoint.send(message, to=self.worker)

    def expect(self, kind: type[Kind]) -> Kind:
        """The next message, which is one of this kind."""
        poller = zmq.Poller()
        for socket in self._endpoint.sockets:
            poller.register(socket, zmq.POLLIN)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not self._arrived:
            assert time.monotonic() < deadline_s, f"no {kind.__name__} came"
            poller.poll(100)
            self._arrived.extend(self._endpoint.receive())
        arrival = self._arrived.pop(0)
        self.worker = arrival.peer
        assert isinstance(arrival.message, kind), arrival
        return arrival.message

    def expect_result(self) -> StepResult:
        """Of a step that is told alone."""
        (result,) = self.expect(StepResults).results
        return result

    def join(self, epoch: int) -> Ready:
        """Meet the worker as the core of this epoch."""
        hello = self.expect(Hello)
        assert (hello.version, hello.role, hello.rank, hello.engine) == (PROTOCOL_VERSION, "worker", 0, "0")
        self.send(Welcome(PROTOCOL_VERSION, epoch))
        return self.expect(Ready)

    def close(self) -> None:
        """Die; a second time does nothing."""
        if not self._endpoint.socket.closed:
            self._endpoint.close()


@pytest.fixture
def core(resolved: Config) -> Iterator[Core]:
    with closing(Core(resolved)) as core:
        yield core


def first_plan(epoch: int, prompt: list[int]) -> StepPlan:
    new = NewRow(2, ints(prompt), len(prompt), 0, 0, Sampling(temperature=0.0), [ints([3, 1])])
    one, none = ints([1]), ints([])
    return StepPlan(epoch, 0, ints([2]), ints([len(prompt)]), one, [new], none, none, ints([0]), none)


def next_plan(epoch: int, step: int) -> StepPlan:
    one, none = ints([1]), ints([])
    return StepPlan(epoch, step, ints([2]), one, one, [], none, none, ints([0]), none)


def test_plans_are_carried_out_across_the_lives_of_the_core(worker, core, oracle, resolved: Config):
    """Two plans are under way at once; a new core finds the same process, with empty rows; the old epoch is ignored."""
    prompt = prompt_of(9)
    expected = expected_greedy(oracle, prompt, 3)
    ready = core.join(epoch=11)
    assert (ready.rank, ready.block_size, ready.max_num_seqs) == (0, 8, 4)
    assert [(group.kind, group.num_layers) for group in ready.groups] == [("paged", 3)]
    assert ready.num_blocks >= 32
    core.send(first_plan(11, prompt))
    for step in (1, 2):
        core.send(next_plan(11, step))
    results = [core.expect_result() for _ in range(3)]
    assert [(r.epoch, r.step) for r in results] == [(11, 0), (11, 1), (11, 2)]
    assert [unpack_ints(r.token_ids).tolist() for r in results] == [[token] for token in expected]

    core.close()
    with closing(Core(resolved)) as second:
        assert second.join(epoch=12).num_blocks == ready.num_blocks
        second.send(next_plan(11, 3))  # a plan of the former life
        second.send(first_plan(12, prompt))
        result = second.expect_result()
        assert (result.epoch, result.step, unpack_ints(result.token_ids).tolist()) == (12, 0, expected[:1])
        second.send(Shutdown())
        second.expect(PeerDown)
    assert worker.wait(TIMEOUT_S) == EXIT_STOPPED
    (line,) = (line for line in worker.stderr if "worker_ready" in line)  # or the weights were loaded again
    account = json.loads(line)
    phases = [account[f"{phase}_s"] for phase in ("imports", "weights", "memory", "warm_up")]
    assert account["load_s"] == pytest.approx(sum(phases), abs=0.01)
    assert min(phases) >= 0


def test_a_refused_worker_says_why_and_ends(worker, core):
    core.expect(Hello)
    core.send(Refused("version 7 is spoken here"))
    assert worker.wait(TIMEOUT_S) == EXIT_FAILED
    assert "version 7 is spoken here" in worker.stderr.read()


def test_a_drained_worker_stays_until_its_core_is_gone(worker, core, oracle):
    core.join(epoch=5)
    os.kill(worker.pid, signal.SIGTERM)
    prompt = prompt_of(9)
    core.send(first_plan(5, prompt))
    assert unpack_ints(core.expect_result().token_ids).tolist() == expected_greedy(oracle, prompt, 1)
    core.close()
    assert worker.wait(TIMEOUT_S) == EXIT_STOPPED


def test_a_plan_that_cannot_be_carried_out_ends_the_worker_loudly(worker, core):
    core.join(epoch=5)
    core.send(next_plan(5, 0))
    assert worker.wait(TIMEOUT_S) == EXIT_FAILED
    assert "ValueError: step 0 computes tokens that its rows do not have" in worker.stderr.read()


def test_a_broken_model_is_one_line_and_exit_code_3(resolved: Config, checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-1000])
    worker_slice = msgspec.structs.replace(resolved.worker, model=str(broken))
    config = msgspec.structs.replace(resolved, worker=worker_slice)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    process = start(config)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == EXIT_UNMENDABLE
    assert len(errors.strip().splitlines()) == 1
    assert "model.safetensors" in errors


def run_plan(epoch: int, step: int, num_steps: int) -> StepPlan:
    return msgspec.structs.replace(next_plan(epoch, step), num_steps=num_steps)


def drawn_in(results: StepResults) -> list[tuple[int, int]]:
    """(step, token) of each step."""
    return [(result.step, *unpack_ints(result.token_ids).tolist()) for result in results.results]


class TestRuns:
    """Prompt and first token are a step, and a run of others follows."""

    @pytest.fixture
    def resolved(self, resolved: Config) -> Config:
        """Told in between only at the end of a run."""
        patient = msgspec.structs.replace(resolved.worker, stream_interval_s=1000.0)
        config = msgspec.structs.replace(resolved, worker=patient)
        (Path(config.worker.runtime_dir) / "config.json").write_bytes(msgspec.json.encode(config))
        return config

    def test_tokens_are_told_together_and_before_the_last(self, worker, core, oracle):
        prompt = prompt_of(9)
        expected = list(enumerate(expected_greedy(oracle, prompt, 7)))
        core.join(epoch=3)
        core.send(first_plan(3, prompt))
        core.send(run_plan(3, 1, 4))
        assert drawn_in(core.expect(StepResults)) == expected[:1]
        assert drawn_in(core.expect(StepResults)) == expected[1:4]
        assert drawn_in(core.expect(StepResults)) == expected[4:5]  # nothing else is planned
        core.send(run_plan(3, 5, 2))
        assert drawn_in(core.expect(StepResults)) == expected[5:6]
        assert drawn_in(core.expect(StepResults)) == expected[6:]

    def test_a_row_that_ends_ends_the_run(self, worker, core, oracle):
        prompt = prompt_of(9)
        tokens = expected_greedy(oracle, prompt, 7)
        plan = first_plan(3, prompt)
        sampling = msgspec.structs.replace(plan.new[0].sampling, stop_token_ids=ints([tokens[2]]))
        new = msgspec.structs.replace(plan.new[0], sampling=sampling)
        core.join(epoch=3)
        core.send(msgspec.structs.replace(plan, new=[new]))
        core.send(run_plan(3, 1, 6))
        assert drawn_in(core.expect(StepResults)) == [(0, tokens[0])]
        num_steps = tokens.index(tokens[2], 1)
        assert drawn_in(core.expect(StepResults)) == list(enumerate(tokens))[1 : num_steps + 1]
        assert core.expect(RunLeft) == RunLeft(3, num_steps + 1)

    def test_another_plan_ends_a_run_at_once(self, worker, core, oracle):
        """What the core hears is in order, and its row goes on from where the run was left."""
        prompt, num_steps = prompt_of(9), 40
        new = msgspec.structs.replace(first_plan(3, prompt).new[0], blocks=[ints(range(1, 8))])
        expected = list(enumerate(expected_greedy(oracle, prompt, num_steps)))
        core.join(epoch=3)
        core.send(msgspec.structs.replace(first_plan(3, prompt), new=[new]))
        core.send(run_plan(3, 1, num_steps))
        core.send(next_plan(3, 1 + num_steps))
        assert drawn_in(core.expect(StepResults)) == expected[:1]
        before = core.expect(StepResults)
        left = core.expect(RunLeft)
        assert drawn_in(before) == expected[1 : left.step]
        ((step, token),) = drawn_in(core.expect(StepResults))
        assert (step, token) == (1 + num_steps, expected[left.step][1])
