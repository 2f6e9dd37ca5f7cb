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

from cableway.ipc.child import DRAINING, READY, RESTARTING, STARTING, STOPPED, Child
from cableway.ipc.config import SupervisorConfig
from cableway.ipc.control import (
    Control,
    ListProcesses,
    Outcome,
    Process,
    Processes,
    Progress,
    Question,
    Reload,
    Reply,
    Restart,
)
from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_UNMENDABLE, UserError
from cableway.ipc.life import Life
from cableway.ipc.lifeline import AbortNow, Drain
from cableway.ipc.reload import Change
from cableway.ipc.rolling import Roll

_DRAIN_ORDER = ("frontend", "enginecore", "worker")
"""Requests end where they came in first: whoever serves them stays until then."""
_ROLL_ORDER = ("worker", "enginecore", "frontend")
"""What the others rely on comes first."""
_MAX_DEATHS_BEFORE_READY = 5
_TURN_S = 0.5
_DYING_TURN_S = 0.005
_ABORT_GRACE_S = 2.0
_SECOND_STOP_S = 1.0
_STOP, _ROLL = b"s", b"r"


class Supervisor:
    """Keeps `children` alive until it is told to stop, or one of them cannot be kept alive.

    Args:
        config: time-outs and the prepared, locked runtime folder.
        config_path: the file each child reads.
        children: what to run, in any order.
        log: structlog logger.
        url: where clients reach the server, for `cableway ps`.
        on_ready: called once, when every child is ready for the first time.
        reconfigure: reads the configuration again, with flags over the former ones; UserError when it is wrong.
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
        reconfigure: Callable[[dict[str, Any]], Change] | None = None,
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
        self._wishes, self._wishing = socket.socketpair()
        self._stop_asked_s: float | None = None
        self._abort_at_s = self._kill_at_s = math.inf
        self._reconfigure = reconfigure
        self._roll: Roll | None = None
        self._control = Control(Path(config.runtime_dir), self._answer)

    def stop(self) -> None:
        """Drain, within the configured time; asked again a second or more later, abort. For any thread or a signal."""
        self._wake_with(_STOP)

    def restart(self) -> None:
        """Replace every process, one by one, without losing a request. For any thread or a signal."""
        self._wake_with(_ROLL)

    def run(self) -> int:
        """Until the last child has stopped; the exit code. Children die with the thread that calls this."""
        try:
            while any(child.state != STOPPED or any(child.lives()) for child in self._children):
                self._wait()
                for child in self._children:
                    self._attend(child)
                    self._attend_others(child)
                self._announce()
                if self._roll is not None:
                    self._roll.advance()
                self._wind_down()
                self._control.answer()
        finally:
            for child in self._children:
                for life in child.lives():
                    life.kill()
            self._control.close()
            self._wishes.close()
            self._wishing.close()
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
            spare_pid, retiring_pids = child.spare.pid if child.spare else 0, tuple(life.pid for life in child.retiring)
            who = (child.role, child.engine, child.rank, pid)
            processes.append(Process(*who, uptime_s, child.restarts, child.state, spare_pid, retiring_pids))
        return Processes(self._url, processes)

    def _wake_with(self, wish: bytes) -> None:
        with contextlib.suppress(OSError):  # it has stopped already
            self._wishing.send(wish)

    def _wait(self) -> None:
        """Sleep until there may be something to do."""
        sources = [self._wishes.fileno(), *self._control.sockets]
        until_s = [self._abort_at_s, self._kill_at_s, time.monotonic() + _TURN_S]
        for child in self._children:
            for life in child.lives():
                sources += life.descriptors()
                if life.is_dying:
                    until_s.append(time.monotonic() + _DYING_TURN_S)
            if child.life is None and child.state in (STARTING, RESTARTING):
                until_s.append(child.start_at_s)
        timeout_ms = max(0, int(1000 * (min(until_s) - time.monotonic())) + 1)
        ready = dict(zmq.zmq_poll([(source, zmq.POLLIN) for source in sources], timeout_ms))
        self._excuse_all(time.monotonic() - min(until_s))
        if self._wishes.fileno() in ready:
            wishes = self._wishes.recv(64)
            if _STOP in wishes:
                self._asked_to_stop()
            elif _ROLL in wishes:
                self._roll_over(self._children, self._log_progress)

    def _excuse_all(self, late_s: float) -> None:
        """After the machine, or this process, was stopped for a while nobody's silence says anything."""
        if late_s > _TURN_S:
            for child in self._children:
                for life in child.lives():
                    life.excuse(late_s)

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
        else:
            self._kill_if_hung(child, life)

    def _attend_others(self, child: Child) -> None:
        """Spare, successor (whose end the roll notices), those retiring; a spare is made where one is wanted."""
        others = [life for life in child.lives() if life is not child.life]
        for life in others:
            life.listen()
            self._kill_if_hung(child, life)
        for life in [life for life in child.retiring if life.ended()]:
            child.retiring.remove(life)
            self._log.info("process_stopped", **_who(child, life), how=life.ended())
        if child.spare is not None and (how := child.spare.ended()):
            self._log.info("spare_ended", **_who(child, child.spare), how=how)
            child.spare_died(was_asked=child.spare.is_dying)
        wants_spare = self._config.standby and not child.overlaps and child.spare is None and child.state == READY
        if wants_spare and not self._busy() and time.monotonic() >= child.spare_at_s:
            try:
                child.prepare_spare(self._config_path)
            except OSError as error:
                self._log.warning("spare_not_started", process=child.name, error=str(error))
                child.spare_died(was_asked=False)

    def _kill_if_hung(self, child: Child, life: Life) -> None:
        if why := life.hung(self._config.patience):
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
        elif child.handed_over():
            self._log.info("process_replaced", **_who(child, life))
            self._start(child)
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
    # Questions and wishes

    def _answer(self, question: Question, reply: Reply) -> None:
        match question:
            case ListProcesses():
                reply(self.describe())
            case Restart(role):
                children = [child for child in self._children if role in ("", child.role)]
                self._roll_over(children, reply, "" if children else f"this server has no {role}")
            case Reload(flags):
                self._reload(flags, reply)

    def _reload(self, flags: dict[str, Any], reply: Reply) -> None:
        if failure := self._busy():
            reply(Outcome(failure))
            return
        if self._reconfigure is None:
            reply(Outcome("the processes of a program are not reloaded"))
            return
        try:
            change = self._reconfigure(flags)
        except UserError as error:
            reply(Outcome(f"{error}; nothing was changed"))
            return
        for note in change.notes:
            reply(Progress(note))
        self._log.info("reloading", roles=list(change.roles), notes=list(change.notes))
        former, self._config = self._config, change.config

        def done(answer: Any) -> None:
            if isinstance(answer, Outcome) and answer.failure:
                self._config = former
                change.undo()
            reply(answer)

        self._roll_over([child for child in self._children if child.role in change.roles], done)

    def _roll_over(self, children: Sequence[Child], reply: Reply, failure: str = "") -> None:
        """Replace `children` one by one; `reply` is told how it goes and when it is over."""
        if failure := failure or self._busy():
            reply(Outcome(failure))
            return

        def done(failure: str) -> None:
            self._roll = None
            if failure:
                self._log.error("restart_failed", reason=failure)
            else:
                self._log.info("restart_done")
            reply(Outcome(failure))

        self._log.info("restarting", processes=[child.name for child in children])
        self._roll = Roll(
            sorted(children, key=lambda child: _ROLL_ORDER.index(child.role)),
            self._config_path,
            self._config.restart_drain_timeout_s,
            lambda line: reply(Progress(line)),
            done,
        )

    def _busy(self) -> str:
        if self._stop_asked_s is not None:
            return "the server is stopping"
        if self._on_ready is not None:
            return "the server is starting"
        return "a restart is under way" if self._roll is not None else ""

    def _log_progress(self, answer: Any) -> None:
        """How a restart goes that a signal asked for."""
        if isinstance(answer, Progress):
            self._log.info("restart_progress", text=answer.text)
        elif answer.failure:
            self._log.error("restart_refused", reason=answer.failure)

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def _asked_to_stop(self) -> None:
        now_s = time.monotonic()
        if self._stop_asked_s is None:
            deadline_s = self._config.patience.drain_timeout_s
            self._log.info("draining", deadline_s=deadline_s)
            self._stop_asked_s = now_s
            self._abort_at_s = now_s + deadline_s
            self._let_others_go("the server is stopping")
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
                for life in child.lives():
                    life.kill()
        elif now_s >= self._abort_at_s:
            self._abort()
        else:
            self._drain(self._abort_at_s - now_s)

    def _let_others_go(self, reason: str) -> None:
        """Nobody is replaced any more."""
        if self._roll is not None:
            self._roll.cancel(reason)
        for child in self._children:
            if child.spare is not None:
                child.spare.kill()
            for life in child.retiring:
                life.tell(Drain(self._config.patience.drain_timeout_s))

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
            if any(child.state != STOPPED or child.retiring for child in children):
                return

    def _abort(self) -> None:
        if self._kill_at_s != math.inf:
            return
        self._log.warning("aborting")
        self._exit_code = self._exit_code or EXIT_FAILED
        self._abort_at_s = math.inf
        self._kill_at_s = time.monotonic() + _ABORT_GRACE_S
        self._let_others_go("the server is stopping")
        for child in self._children:
            for life in child.retiring:
                life.tell(AbortNow())
            if child.life is None:
                child.stopped()
            else:
                child.state = DRAINING
                child.life.tell(AbortNow())


def _who(child: Child, life: Life) -> dict[str, Any]:
    return {"process": child.name, "pid": life.pid}
