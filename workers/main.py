"""The worker process: loads the model once, then does what the core's plans say, in order.

When the core dies the worker keeps its weights and waits; a Welcome with another epoch means that nothing of the former
life counts any more. Broken model files end the process with one clear line; any other error ends it loudly.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from cableway.ipc import garbage, log, messages
from cableway.ipc.config import Config, WorkerConfig, workers_address
from cableway.ipc.endpoint import Endpoint, PeerDown, PeerUp, Undecodable, identity, inputs, wait
from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED
from cableway.ipc.lifeline import Lifeline, child_arguments
from cableway.ipc.messages import (
    Compiled,
    Hello,
    Ping,
    Ready,
    Refused,
    RunLeft,
    Shutdown,
    Sleep,
    StateGroup,
    StepPlan,
    StepResult,
    StepResults,
    Wake,
    Welcome,
)
from cableway.ipc.modelfiles import ModelError
from cableway.workers import head_start
from cableway.workers.account import Account
from cableway.workers.plans import Plans

_LEAST_SHARE = 0.25
_QUIET_S = 0.2
"""Without messages for so long, a worker does what would make somebody wait: far more than between the steps of one."""


@dataclass(slots=True)
class _Step:
    """A step that was begun.

    Args:
        share: how long it may take, as `_share` tells.
        begun: a `runner.Begun`.
    """

    share: float
    begun: Any
    is_of_run: bool


class Worker:
    """Speaks with the core for one `Runner`.

    Args:
        config: this worker's slice.
        rank: which worker of its engine this is.
        runner: a `runner.Runner`.
        compilations: counts the kernels that were compiled since the runner was made.
        load_s: how long all of this took to get ready.
    """

    def __init__(
        self,
        config: WorkerConfig,
        rank: int,
        runner: Any,
        compilations: Any,
        load_s: float,
        lifeline: Lifeline,
        logger: Any,
    ):
        self._config = config
        self._rank = rank
        self._runner = runner
        self._compilations = compilations
        self._num_compilations_told = 0
        self._is_asleep = False
        self._may_prepare = True
        self._lifeline = lifeline
        self._log = logger
        self._load_s = load_s
        self._epoch: int | None = None
        self._plans = Plans()
        self._begun: deque[_Step] = deque()
        self._done: list[StepResult] = []  # of a run, not told yet
        self._done_since_s = 0.0
        self._exit_code: int | None = None
        self._stop_at_s: float | None = None
        self._wake_up, self._wake = os.pipe()
        self._endpoint = Endpoint(
            workers_address(config.runtime_dir, config.engine),
            messages.ToWorker,
            own_identity=identity("worker", rank),
        )
        lifeline.on_drain(self._drain)

    def run(self) -> int:
        """Serve until told to stop; the exit code."""
        sources = inputs([*self._endpoint.sockets, self._wake_up])
        while self._exit_code is None:
            woken = self._wait(sources)
            if (self._wake_up, zmq.POLLIN) in woken:
                os.read(self._wake_up, 1)
            if woken:
                for arrival in self._endpoint.receive():
                    self._handle(arrival.message)
            self._compute()
            if self._stop_at_s is not None and (self._epoch is None or time.monotonic() >= self._stop_at_s):
                self._exit_code = self._exit_code or EXIT_STOPPED
        return self._exit_code

    def _wait(self, sources: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Wait for messages. While there are steps to do, only look: the next one is begun before the device is idle.

        When none have come for a while there is time to make the steps to come faster.
        """
        if self._begun or self._plans:
            return wait(sources, 0)
        self._lifeline.idle()
        may_prepare = self._may_prepare and self._stop_at_s is None
        woken = wait(sources, _QUIET_S if may_prepare else self._patience_s())
        self._lifeline.beat()
        while may_prepare and not woken:
            may_prepare = self._may_prepare = self._runner.capture_next()
            self._lifeline.beat()
            woken = wait(sources, 0)
        return woken

    def _handle(self, message: Any) -> None:
        match message:
            case StepPlan():
                if message.epoch == self._epoch:
                    self._plans.add(message)
            case PeerUp():
                version, config = messages.PROTOCOL_VERSION, self._config
                self._endpoint.send(Hello(version, "worker", self._rank, os.getpid(), config.engine))
            case Welcome(_, epoch):
                self._welcome(epoch)
            case Sleep():
                self._set_asleep(True)
            case Wake():
                self._set_asleep(False)
            case PeerDown():
                self._log.warning("core_lost", epoch=self._epoch)
                self._set_epoch(None)
            case Refused(reason) | Undecodable(reason):
                self._log.error("refused_by_core", reason=reason)
                self._exit_code = EXIT_FAILED
            case Shutdown():
                self._exit_code = EXIT_STOPPED
            case Ping():
                pass

    def _compute(self) -> None:
        """Begin a step, if the device is to have more, and finish what it has done."""
        if self._plans.is_run_overtaken:
            self._leave_run()
        if self._plans and len(self._begun) <= self._runner.num_ahead:
            plan, is_of_run = self._plans.take()
            share = self._share(plan)
            self._lifeline.beat(share)
            self._begun.append(_Step(share, self._runner.begin(plan), is_of_run))
        while self._begun and (len(self._begun) > self._runner.num_ahead or self._begun[0].begun.is_done):
            self._finish()

    def _leave_run(self) -> None:
        """Do no more of the run that was begun."""
        self._tell()
        if (left := self._plans.leave_run()) is not None:
            self._endpoint.send(RunLeft(left.epoch, left.step))

    def _finish(self) -> None:
        """Wait for the oldest step that was begun. One of a former life of the core was for nothing."""
        step = self._begun.popleft()
        result = self._runner.finish(step.begun)
        if result.epoch == self._epoch:
            self._done.append(result)
            if step.is_of_run and self._runner.has_ended(step.begun):
                self._leave_run()
            elif not step.is_of_run or self._is_time_to_tell(result.elapsed_us / 1e6):
                self._tell()
        self._lifeline.beat(self._begun[0].share if self._begun else 0.0)
        if kernels := self._compilations.kernels[self._num_compilations_told :]:
            self._endpoint.send(Compiled(len(kernels)))
            self._log.warning("compiled_after_ready", num=len(kernels), kernels=[kernel.name for kernel in kernels])
            self._num_compilations_told += len(kernels)

    def _is_time_to_tell(self, step_s: float) -> bool:
        """Whether what a run has drawn can wait no longer: another step of `step_s` would be too long, or the core has
        to plan on while the last step is done."""
        now_s = time.monotonic()
        if len(self._done) == 1:
            self._done_since_s = now_s
        is_late = now_s + step_s - self._done_since_s > self._config.stream_interval_s
        return is_late or len(self._begun) + self._plans.num_steps <= 1

    def _tell(self) -> None:
        if self._done:
            self._endpoint.send(StepResults(self._done))
            self._done = []

    def _set_epoch(self, epoch: int | None) -> None:
        """Nothing that another life of the core has planned counts any more."""
        self._epoch = epoch
        self._plans.clear()
        self._done = []

    def _welcome(self, epoch: int) -> None:
        self._set_epoch(epoch)
        self._runner.forget()
        self._tell_ready()
        self._log.info("core_joined", epoch=epoch)

    def _set_asleep(self, asleep: bool) -> None:
        while self._begun:
            self._finish()
        if asleep != self._is_asleep:
            self._lifeline.beat(1.0)  # as long as the longest step: all the weights are copied
            began_s = time.monotonic()
            (self._runner.sleep if asleep else self._runner.wake)()
            self._is_asleep, self._may_prepare = asleep, not asleep
            self._log.info("asleep" if asleep else "awake", seconds=round(time.monotonic() - began_s, 3))
        self._tell_ready()

    def _tell_ready(self) -> None:
        runner, config = self._runner, self._config
        groups = [StateGroup(spec.kind, spec.num_layers, spec.window) for spec in runner.state_groups]
        counts = runner.num_blocks, runner.block_size
        self._endpoint.send(Ready(self._rank, *counts, groups, config.max_num_seqs, self._load_s, self._is_asleep))

    def _drain(self, deadline_s: float) -> None:
        """From the lifeline's thread. The core drains too, and needs its workers until it says Shutdown or is gone."""
        self._stop_at_s = time.monotonic() + deadline_s
        os.write(self._wake, b"d")

    def _share(self, plan: StepPlan) -> float:
        """How long a step may take, in that of the longest: even a small one reads all the weights."""
        num_tokens = sum(messages.unpack_ints(plan.num_tokens))
        return _LEAST_SHARE + (1 - _LEAST_SHARE) * min(1.0, num_tokens / self._config.max_num_batched_tokens)

    def _patience_s(self) -> float | None:
        return None if self._stop_at_s is None else max(0.0, self._stop_at_s - time.monotonic())


def main(argv: Sequence[str]) -> int:
    """Run one worker; returns the exit code."""
    account = Account()
    arguments = child_arguments(argv)
    config = msgspec.json.decode(Path(arguments.config_path).read_bytes(), type=Config).worker
    lifeline = Lifeline(arguments.lifeline_fd, config.patience)
    logger = log.setup("worker", arguments.rank, level=config.log.level, as_json=config.log.as_json)
    if config.device == "cuda":
        head_start.begin(rank=arguments.rank, with_memory=not arguments.standby)
    with garbage.postponed():
        from cableway.kernels import compilation  # torch takes a second to import: the lifeline beats meanwhile
        from cableway.workers.runner import build

    account.note("imports_s")
    loads_beforehand = arguments.standby == "loaded" and config.device == "cpu"  # no GPU has room for two
    if arguments.standby and not loads_beforehand:
        lifeline.stand_by()
        account.skip()
    try:
        runner = build(config, account)
    except ModelError as error:
        lifeline.give_up(str(error))
    if loads_beforehand:
        lifeline.stand_by()
    payload = {"num_blocks": runner.num_blocks, "load_s": round(account.total_s, 3), **account.fields()}
    logger.info("worker_ready", **payload)
    worker = Worker(config, arguments.rank, runner, compilation.watch(), account.total_s, lifeline, logger)
    garbage.settle()
    lifeline.ready(payload)
    return worker.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
