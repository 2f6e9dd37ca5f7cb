"""The worker process: loads the model once, then does what the core's plans say, in order.

When the core dies the worker keeps its weights and waits; a Welcome with another epoch means that nothing of the former
life counts any more. Broken model files end the process with one clear line; any other error ends it loudly.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
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
    Shutdown,
    Sleep,
    StateGroup,
    StepPlan,
    Wake,
    Welcome,
)
from cableway.ipc.modelfiles import ModelError

_LEAST_SHARE = 0.25
_QUIET_S = 0.2
"""Without messages for so long, a worker does what would make somebody wait: far more than between the steps of one."""


class Worker:
    """Speaks with the core for one `Runner`.

    Args:
        config: this worker's slice.
        rank: which worker of its engine this is.
        runner: a `runner.Runner`.
        compilations: counts the kernels that were compiled since the runner was made.
        load_s: how long the runner took to make.
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
        self._begun: deque[tuple[float, Any]] = deque()  # (how long it may take, as `_share` tells; a `runner.Begun`)
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
            if (self._wake_up, zmq.POLLIN) in self._wait(sources):
                os.read(self._wake_up, 1)
            for arrival in self._endpoint.receive():
                self._handle(arrival.message)
            while self._begun and (len(self._begun) > self._runner.num_ahead or self._begun[0][1].is_done):
                self._finish()
            if self._stop_at_s is not None and (self._epoch is None or time.monotonic() >= self._stop_at_s):
                self._exit_code = self._exit_code or EXIT_STOPPED
        return self._exit_code

    def _wait(self, sources: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Wait for messages. While the device computes, only look: the next step is begun before it ends.

        When none have come for a while there is time to make the steps to come faster.
        """
        if self._begun:
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
                    share = self._share(message)
                    self._lifeline.beat(share)
                    self._begun.append((share, self._runner.begin(message)))
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
                self._epoch = None
            case Refused(reason) | Undecodable(reason):
                self._log.error("refused_by_core", reason=reason)
                self._exit_code = EXIT_FAILED
            case Shutdown():
                self._exit_code = EXIT_STOPPED
            case Ping():
                pass

    def _finish(self) -> None:
        """Wait for the oldest step that was begun. One of a former life of the core was for nothing."""
        _, begun = self._begun.popleft()
        result = self._runner.finish(begun)
        if result.epoch == self._epoch:
            self._endpoint.send(result)
        self._lifeline.beat(self._begun[0][0] if self._begun else 0.0)
        if (num := self._compilations.num) != self._num_compilations_told:
            self._endpoint.send(Compiled(num - self._num_compilations_told))
            self._log.warning("compiled_after_ready", num=num - self._num_compilations_told)
            self._num_compilations_told = num

    def _welcome(self, epoch: int) -> None:
        self._epoch = epoch
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
    arguments = child_arguments(argv)
    config = msgspec.json.decode(Path(arguments.config_path).read_bytes(), type=Config).worker
    lifeline = Lifeline(arguments.lifeline_fd, config.patience)
    logger = log.setup("worker", arguments.rank, level=config.log.level, as_json=config.log.as_json)
    from cableway.kernels import compilation  # torch takes a second to import: the lifeline beats meanwhile
    from cableway.workers.runner import build

    loads_beforehand = arguments.standby == "loaded" and config.device == "cpu"  # no GPU has room for two
    if arguments.standby and not loads_beforehand:
        lifeline.stand_by()
    began_s = time.monotonic()
    try:
        runner = build(config)
    except ModelError as error:
        lifeline.give_up(str(error))
    load_s = time.monotonic() - began_s
    if loads_beforehand:
        lifeline.stand_by()
    payload = {"num_blocks": runner.num_blocks, "load_s": load_s}
    logger.info("worker_ready", **payload)
    worker = Worker(config, arguments.rank, runner, compilation.watch(), load_s, lifeline, logger)
    garbage.settle()
    lifeline.ready(payload)
    return worker.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
