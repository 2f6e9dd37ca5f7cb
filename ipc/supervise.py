"""The supervisor's loop: start, watch, restart and stop the processes of a server.

It does nothing but wait: for a process's word, its stderr, its end, a question from `cableway ps`, or a signal.
"""

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from cableway.ipc.child import DRAINING, READY, RESTARTING, STARTING, STOPPED, Child, Life
from cableway.ipc.config import SupervisorConfig
from cableway.ipc.control import Control, Process, Processes
from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_UNMENDABLE
from cableway.ipc.lifeline import AbortNow, Drain

_DRAIN_ORDER = ("frontend", "enginecore", "worker")
"""Requests end where they came in first: whoever serves them stays until then."""
_MAX_DEATHS_BEFORE_READY = 5
_TURN_S = 0.5
_DYING_TURN_S = 0.005
_ABORT_GRACE_S = 2.0
_SECOND_STOP_S = 1.0


class Supervisor:
    """Keeps `children` alive until it is told to stop, or one of them cannot be kept alive.

    Args:
        config: time-outs and the prepared, locked runtime folder.
        config_path: the file each child reads.
        children: what to run, in any order.
        log: structlog logger.
        url: where clients reach the server, for `cableway ps`.
        on_ready: called once, when every child is ready for the first time.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        config_path: str,
        children: Sequence[Child],
        *,
        log: Any,
        url: str = "",
        on_ready: Callable[[], None] = lambda: None,
    ):
        self.failure = ""
        """Why it gave up; empty when it did not."""
        self._config = config
        self._config_path = config_path
        self._children = list(children)
        self._log = log
        self._url = url
        self._on_ready: Callable[[], None] | None = on_ready
        self._began_s = time.monotonic()
        self._exit_code = EXIT_STOPPED
        self._stop_asked, self._asks_stop = socket.socketpair()
        self._stop_asked_s: float | None = None
        self._abort_at_s = self._kill_at_s = math.inf
        self._control = Control(Path(config.runtime_dir), self.describe)

    def stop(self) -> None:
        """Drain, within the configured time; asked again a second or more later, abort. For any thread or a signal."""
        with contextlib.suppress(OSError):  # it has stopped already
            self._asks_stop.send(b"s")

    def run(self) -> int:
        """Until the last child has stopped; the exit code. Children die with the thread that calls this."""
        try:
            while any(child.state != STOPPED for child in self._children):
                self._wait()
                for child in self._children:
                    self._attend(child)
                self._announce()
                self._wind_down()
                self._control.answer()
        finally:
            for child in self._children:
                if child.life is not None:
                    child.life.kill()
            self._control.close()
            self._stop_asked.close()
            self._asks_stop.close()
        return self._exit_code

    def describe(self) -> Processes:
        """What `cableway ps` shows: this supervisor and every child."""
        now_s = time.monotonic()
        if self._stop_asked_s is not None:
            state = DRAINING
        else:
            state = STARTING if self._on_ready else READY
        processes = [Process("supervisor", "", 0, os.getpid(), now_s - self._began_s, 0, state)]
        for child in self._children:
            pid, uptime_s = (child.life.pid, now_s - child.life.began_s) if child.life else (0, 0.0)
            processes.append(Process(child.role, child.engine, child.rank, pid, uptime_s, child.restarts, child.state))
        return Processes(self._url, processes)

    def _wait(self) -> None:
        """Sleep until there may be something to do."""
        sources = [self._stop_asked.fileno(), *self._control.sockets]
        until_s = [self._abort_at_s, self._kill_at_s, time.monotonic() + _TURN_S]
        for child in self._children:
            if child.life is not None:
                sources += child.life.descriptors()
                if child.life.is_dying:
                    until_s.append(time.monotonic() + _DYING_TURN_S)
            elif child.state in (STARTING, RESTARTING):
                until_s.append(child.start_at_s)
        timeout_ms = max(0, int(1000 * (min(until_s) - time.monotonic())) + 1)
        ready = dict(zmq.zmq_poll([(source, zmq.POLLIN) for source in sources], timeout_ms))
        if self._stop_asked.fileno() in ready:
            self._stop_asked.recv(64)
            self._asked_to_stop()

    def _attend(self, child: Child) -> None:
        life = child.life
        if life is None:
            if child.state in (STARTING, RESTARTING) and time.monotonic() >= child.start_at_s:
                self._start(child)
            return
        life.listen()
        if child.became_ready():
            ready_s = round(life.ready_s - life.began_s, 3)
            self._log.info("process_ready", **_who(child, life), ready_s=ready_s, payload=life.payload)
        if how := life.ended():
            self._bury(child, life, how)
        elif why := life.hung(self._config.heartbeat_timeout_s, self._config.step_timeout_s):
            self._log.error("process_hung", **_who(child, life), why=why)
            life.kill()

    def _start(self, child: Child) -> None:
        try:
            child.start(self._config_path)
        except OSError as error:
            self._restart_later(child, str(error), str(error))

    def _bury(self, child: Child, life: Life, how: str) -> None:
        if child.state == DRAINING:
            child.stopped()
            self._log.info("process_stopped", **_who(child, life), how=how)
        elif life.unmendable:
            child.stopped()
            self._give_up(f"{child.name}: {life.unmendable}", EXIT_UNMENDABLE)
        else:
            self._restart_later(child, how, life.last_words)

    def _restart_later(self, child: Child, how: str, last_words: str) -> None:
        delay_s = child.died()
        if child.deaths_before_ready < _MAX_DEATHS_BEFORE_READY:
            self._log.error("process_died", process=child.name, how=how, restart_in_s=delay_s)
            return
        reason = f"{child.name} ended {child.deaths_before_ready} times before it was ready ({how})"
        self._give_up(f"{reason}; its last words:\n{last_words}", EXIT_FAILED)

    def _announce(self) -> None:
        if self._on_ready is not None and all(child.state == READY for child in self._children):
            on_ready, self._on_ready = self._on_ready, None
            on_ready()

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def _asked_to_stop(self) -> None:
        now_s = time.monotonic()
        if self._stop_asked_s is None:
            self._log.info("draining", deadline_s=self._config.drain_timeout_s)
            self._stop_asked_s = now_s
            self._abort_at_s = now_s + self._config.drain_timeout_s
        elif now_s - self._stop_asked_s >= _SECOND_STOP_S:
            self._abort()

    def _give_up(self, reason: str, exit_code: int) -> None:
        if not self.failure:
            self.failure = reason
            self._exit_code = exit_code
        self._stop_asked_s = self._stop_asked_s or time.monotonic()
        self._abort()

    def _wind_down(self) -> None:
        """Once asked to stop: drain role by role, abort what is late, kill what does not even abort."""
        if self._stop_asked_s is None:
            return
        now_s = time.monotonic()
        if now_s >= self._kill_at_s:
            for child in self._children:
                if child.life is not None:
                    child.life.kill()
        elif now_s >= self._abort_at_s:
            self._abort()
        else:
            self._drain(self._abort_at_s - now_s)

    def _drain(self, left_s: float) -> None:
        for role in _DRAIN_ORDER:
            children = [child for child in self._children if child.role == role]
            for child in children:
                if child.life is None:
                    child.stopped()
                elif child.state == READY:
                    child.life.tell(Drain(left_s))
                    child.state = DRAINING
                elif child.state == STARTING:
                    child.life.kill()  # it has nothing to finish
                    child.state = DRAINING
            if any(child.state != STOPPED for child in children):
                return

    def _abort(self) -> None:
        if self._kill_at_s != math.inf:
            return
        self._log.warning("aborting")
        self._exit_code = self._exit_code or EXIT_FAILED
        self._abort_at_s = math.inf
        self._kill_at_s = time.monotonic() + _ABORT_GRACE_S
        for child in self._children:
            if child.life is None:
                child.stopped()
            else:
                child.state = DRAINING
                child.life.tell(AbortNow())


def _who(child: Child, life: Life) -> dict[str, Any]:
    return {"process": child.name, "pid": life.pid}
