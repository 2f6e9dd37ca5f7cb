"""The loop of the engine core: messages in, plan, submit, commit, messages out. All I/O of the core is here."""

import os
import time
from collections.abc import Callable
from typing import Any

import zmq

from cableway.enginecore.limits import SHUTTING_DOWN, Limits
from cableway.enginecore.peers import Frontends, NotWelcome, Workers, check
from cableway.enginecore.scheduler import BadResult, Scheduler
from cableway.ipc import config
from cableway.ipc.endpoint import Arrival, Endpoint, PeerDown, Undecodable, inputs, wait
from cableway.ipc.lifeline import Lifeline
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Compiled,
    FromWorker,
    Generate,
    Hello,
    Ping,
    Ready,
    Refused,
    RunLeft,
    Sleep,
    Status,
    StepPlan,
    StepResult,
    StepResults,
    ToCore,
    Wake,
    Welcome,
    unpack_ints,
)

_LEASE_CHECK_S = 1.0
_SHORT_S = 0.005
_LAST_WORDS_MS = 1000


class EngineCore:
    """Plan, submit, commit; `depth` steps are planned ahead of the one that runs (0 = wait for each).

    Args:
        settings: this core's slice of the configuration.
        lifeline: told of every turn, so that a loop that hangs is noticed.
        log: structlog logger.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        settings: config.CoreConfig,
        lifeline: Lifeline,
        log: Any,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.epoch = time.time_ns() // 1_000_000
        self._settings = settings
        self._lifeline = lifeline
        self._log = log
        self._clock = clock
        self._depth = settings.overlap
        self._scheduler = Scheduler(_limits(settings), self.epoch)
        self._frontends = Frontends(settings.lease_s)
        self._workers = Workers(settings.num_workers)
        self._workers_epoch = self.epoch
        self._progress_s = clock()  # when the last step finished, or the first one in flight began
        self._wants_sleep = False  # as frontends said last; workers that sleep say so to a core that has not heard
        self._num_compilations = 0
        self._asked_status: list[bytes] = []  # frontends to answer at the end of the turn
        self._check_leases_at_s = 0.0
        self._drain_until_s: float | None = None
        self._to_frontends = Endpoint(
            config.frontends_address(settings.runtime_dir, settings.engine), ToCore, bind=True
        )
        self._to_workers = Endpoint(
            config.workers_address(settings.runtime_dir, settings.engine), FromWorker, bind=True
        )
        self._wake_read, self._wake_write = os.pipe()  # open to the end of the process: it may be drained twice
        self._inputs = inputs([*self._to_frontends.sockets, *self._to_workers.sockets, self._wake_read])

    def run(self) -> None:
        """Serve until drained."""
        while not self._is_drained():
            self._wait()
            self.turn()
        self._close()

    def turn(self) -> None:
        """Take in all that has arrived, and send all that follows from it."""
        for arrival in self._to_workers.receive():
            self._from_worker(arrival)
        for arrival in self._to_frontends.receive():
            self._from_frontend(arrival)
        self._lapse()
        if self._wants_sleep:
            self._fall_asleep()
        else:
            self._submit_steps()
        self._send_to_frontends()

    def drain(self, deadline_s: float) -> None:
        """From any thread: take in nothing new, and return from `run` when all has ended or `deadline_s` has passed."""
        self._drain_until_s = self._clock() + deadline_s
        os.write(self._wake_write, b"d")

    # -----------------------------------------------------------------------------------------------------------------
    # The turn

    def _wait(self) -> None:
        timeout_s = _SHORT_S if self._scheduler.wants_turn else _LEASE_CHECK_S
        if self._drain_until_s is not None:
            timeout_s = min(timeout_s, max(self._drain_until_s - self._clock(), 0.0))
        self._lifeline.idle()
        ready = wait(self._inputs, timeout_s)
        self._lifeline.beat()
        if (self._wake_read, zmq.POLLIN) in ready:
            os.read(self._wake_read, 64)
            self._scheduler.refuses_new = True
            self._log.info("draining", num_requests=self._scheduler.num_live)

    def _fall_asleep(self) -> None:
        """When no step is in flight any more: what runs goes back to the queue, where nothing is held against it."""
        if plan := self._scheduler.cut_run():
            self._tell_workers(plan)
        if self._scheduler.kv is not None and not self._scheduler.num_in_flight:
            self._log.info("falling_asleep", num_requeued=len(self._scheduler.running))
            self._scheduler.stop()
            self._workers.begin_anew()
            self._tell_workers(Sleep())

    def _submit_steps(self) -> None:
        while self._scheduler.has_room(self._depth) and (plan := self._scheduler.plan(self._clock())):
            if self._scheduler.num_in_flight == plan.num_steps:
                self._progress_s = self._clock()
            self._tell_workers(plan)

    def _tell_workers(self, message: StepPlan | Sleep | Wake) -> None:
        for peer in self._workers.peers:
            self._to_workers.send(message, to=peer)

    def _send_to_frontends(self) -> None:
        for frontend, message in self._scheduler.take_messages():
            self._to_frontends.send(message, to=frontend)
        for frontend in self._asked_status:
            self._to_frontends.send(self._status(), to=frontend)
        self._asked_status.clear()

    def _is_drained(self) -> bool:
        if self._drain_until_s is None or not self._scheduler.refuses_new:
            return False
        if self._scheduler.num_live and self._clock() >= self._drain_until_s:
            self._log.warning("drain_deadline_passed", num_failed=self._scheduler.num_live)
            self._scheduler.fail_all(SHUTTING_DOWN)
            self._send_to_frontends()
        return not self._scheduler.num_live

    def _close(self) -> None:
        self._to_frontends.socket.setsockopt(
            zmq.LINGER, 1000
        )  # last words still leave; a stopped reader is not awaited
        self._to_frontends.close()
        self._to_workers.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Frontends

    def _from_frontend(self, arrival: Arrival) -> None:
        peer, message = arrival.peer, arrival.message
        if isinstance(message, Hello):
            self._frontend_joins(peer, message)
        elif isinstance(message, PeerDown):
            if peer in self._frontends:
                self._log.info("frontend_left", peer=_name(peer))
                self._frontends.leave(peer)
                self._scheduler.drop(peer)
        elif peer not in self._frontends:
            self._heard_early(self._to_frontends, peer, message)
        elif self._frontends.heard(peer, self._clock()):
            # It was taken for dead, and its requests are gone: it submits them again, this one included.
            self._to_frontends.send(Welcome(PROTOCOL_VERSION, self.epoch), to=peer)
        else:
            self._frontend_says(peer, message)

    def _frontend_joins(self, peer: bytes, hello: Hello) -> None:
        try:
            check(hello, "frontend", self._settings.engine)
        except NotWelcome as error:
            self._refuse(self._to_frontends, peer, str(error))
            return
        # A second Hello means that the connection was lost, and tokens with it: it submits its requests again.
        self._scheduler.drop(peer)
        self._frontends.join(peer, self._clock())
        self._to_frontends.send(Welcome(PROTOCOL_VERSION, self.epoch), to=peer)
        self._log.info("frontend_joined", peer=_name(peer))

    def _frontend_says(self, peer: bytes, message: Any) -> None:
        match message:
            case Ping():
                self._asked_status.append(peer)
            case Sleep() | Wake():
                self._want_sleep(isinstance(message, Sleep))
                self._asked_status.append(peer)
            case Generate():
                duplicates = self._scheduler.submit(peer, message, self._clock())
                if duplicates:
                    self._log.warning("duplicate_ignored", request_id=message.request_id, keys=duplicates)
                if any(choice.standing.is_convicted for choice in message.choices):
                    self._log.error("request_quarantined", request_id=message.request_id)
            case Abort(keys) if len(keys) % 4 == 0:
                self._scheduler.abort(peer, unpack_ints(keys))
            case _:
                self._log.error("message_ignored", peer=_name(peer), message=_describe(message))

    def _want_sleep(self, wanted: bool) -> None:
        if wanted == self._wants_sleep:
            return
        self._log.info("sleep_asked" if wanted else "wake_asked")
        self._wants_sleep = wanted
        if not wanted and self._scheduler.kv is None:  # else they have not been told of sleep yet
            self._workers.begin_anew()
            self._tell_workers(Wake())

    def _lapse(self) -> None:
        now_s = self._clock()
        if now_s < self._check_leases_at_s:
            return
        self._check_leases_at_s = now_s + _LEASE_CHECK_S
        for peer in self._frontends.lapse(now_s):
            self._log.warning("frontend_lapsed", peer=_name(peer))
            self._scheduler.drop(peer)

    def _status(self) -> Status:
        scheduler, kv = self._scheduler, self._scheduler.kv
        step_age_s = self._clock() - self._progress_s if scheduler.num_in_flight else 0.0
        return Status(
            epoch=self.epoch,
            ready=kv is not None and not scheduler.refuses_new,
            step_age_s=step_age_s,
            steps=scheduler.num_steps,
            num_running=len(scheduler.running),
            num_waiting=scheduler.waiting.num_requests + scheduler.trials.waiting.num_requests,
            num_waiting_tokens=scheduler.waiting.num_tokens + scheduler.trials.waiting.num_tokens,
            kv_usage_frac=kv.usage_frac if kv else 0.0,
            num_blocks=kv.pool.num_blocks if kv else 0,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
            preemptions=scheduler.num_preemptions,
            worker_step_ages_s=[step_age_s] * len(self._workers.peers),
            asleep=self._wants_sleep and self._workers.all_asleep,
            compilations=self._num_compilations,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Workers

    def _from_worker(self, arrival: Arrival) -> None:
        peer, message = arrival.peer, arrival.message
        rank = self._workers.rank(peer)
        match message:
            case StepResults(results) if rank == 0:
                for result in results:
                    self._take_result(peer, result)
            case RunLeft(_, step) if rank == 0:
                if not self._scheduler.leave_run(message):
                    self._log.warning("late_result_ignored", epoch=message.epoch, step=step)
            case Hello():
                self._worker_joins(peer, message)
            case PeerDown():
                if rank is not None:
                    self._worker_lost(peer, rank)
            case _ if rank is None:
                self._heard_early(self._to_workers, peer, message)
            case Ping():
                pass
            case Ready():
                self._worker_ready(peer, rank, message)
            case Compiled(num):
                self._num_compilations += num
            case Undecodable():
                self._refuse(self._to_workers, peer, _describe(message))
                self._worker_lost(peer, rank)
            case _:
                self._log.error("message_ignored", peer=_name(peer), message=_describe(message))

    def _worker_joins(self, peer: bytes, hello: Hello) -> None:
        before = self._workers.peer(hello.rank)
        try:
            check(hello, "worker", self._settings.engine)
            if before is not None:
                self._worker_lost(before, hello.rank)  # it was restarted, or came back without what was sent meanwhile
                if before != peer:
                    self._refuse(self._to_workers, before, "another worker has taken this rank")
            self._workers.join(peer, hello.rank)
        except NotWelcome as error:
            self._refuse(self._to_workers, peer, str(error))
            return
        self._to_workers.send(Welcome(PROTOCOL_VERSION, self._workers_epoch), to=peer)
        self._log.info("worker_joined", worker=hello.rank, pid=hello.pid)

    def _worker_ready(self, peer: bytes, rank: int, ready: Ready) -> None:
        if self._workers.all_ready:
            return  # said once more by one that was told to begin anew
        if self._workers.hears_first(rank) and ready.asleep:
            self._wants_sleep = True  # as the core before this one had told it
        if ready.asleep != self._wants_sleep:
            if self._wants_sleep:
                self._workers.wakes(rank)
                self._to_workers.send(Sleep(), to=peer)
            return  # else it has been told to wake
        if ready.asleep:
            self._workers.sleeps(rank)
            self._asked_status = self._frontends.peers
            return
        try:
            self._workers.ready(rank, ready)
            if self._workers.all_ready:
                memory = self._workers.memory()
                self._scheduler.start(memory, self._workers_epoch)
                self._asked_status = self._frontends.peers
                self._log.info("workers_ready", num_blocks=memory.num_blocks, max_len=self._scheduler.max_len)
        except (NotWelcome, ValueError) as error:
            self._refuse(self._to_workers, peer, str(error))
            self._worker_lost(peer, rank)

    def _worker_lost(self, peer: bytes, rank: int) -> None:
        """What was running goes back to the queue; the other ranks forget their rows, under a new epoch."""
        num_requeued = len(self._scheduler.running)
        self._workers.leave(peer)
        self._workers.begin_anew()
        self._workers_epoch += 1
        convicted = self._scheduler.stop()
        num_suspects = self._scheduler.trials.waiting.num_requests
        self._log.warning("worker_lost", worker=rank, num_requeued=num_requeued, num_suspects=num_suspects)
        for request in convicted:
            self._log.error("request_quarantined", request_id=request.request_id)
        for survivor in self._workers.peers:
            self._to_workers.send(Welcome(PROTOCOL_VERSION, self._workers_epoch), to=survivor)

    def _take_result(self, peer: bytes, result: StepResult) -> None:
        try:
            if self._scheduler.commit(result):
                self._progress_s = self._clock()
            else:
                self._log.warning("late_result_ignored", epoch=result.epoch, step=result.step)
        except BadResult as error:
            self._refuse(self._to_workers, peer, str(error))
            self._worker_lost(peer, 0)

    def _heard_early(self, endpoint: Endpoint, peer: bytes, message: Any) -> None:
        """Something before Hello: what a survivor had queued for the core before this one, or another protocol."""
        if isinstance(message, Undecodable):
            self._refuse(endpoint, peer, f"the first message has to be Hello, not {_describe(message)}")
        else:
            self._log.info("early_message_ignored", peer=_name(peer), message=_describe(message))

    def _refuse(self, endpoint: Endpoint, peer: bytes, reason: str) -> None:
        self._log.error("peer_refused", peer=_name(peer), reason=reason)
        endpoint.send(Refused(reason), to=peer)


def _limits(settings: config.CoreConfig) -> Limits:
    return Limits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        prefix_cache=settings.prefix_cache,
        by_priority=settings.scheduling_policy == "priority",
        # Several workers would all have to leave a run at the same step; and a run is planned ahead.
        plans_runs=settings.stream_interval_s > 0 and settings.num_workers == 1 and settings.overlap > 0,
    )


def _name(peer: bytes) -> str:
    return peer.decode(errors="replace")


def _describe(message: Any) -> str:
    if isinstance(message, Undecodable):
        return f"bytes that are no message ({message.reason})"
    return type(message).__name__
