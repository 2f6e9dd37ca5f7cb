"""The scheduler: who computes what in the next step, and what a finished step means for its requests.

Pure: messages and times come in, messages go out; no socket, no clock, no randomness. `plan` makes the next step's
message, `commit` takes a step's result; any number of steps may be in flight between the two.
"""

import bisect
import itertools
import operator
from collections.abc import Iterable
from typing import NamedTuple

from cableway.enginecore import runs
from cableway.enginecore.admission import Admission
from cableway.enginecore.clients import Clients
from cableway.enginecore.kv.groups import Encoder, Group
from cableway.enginecore.kv.manager import KVManager, Match
from cableway.enginecore.limits import SHUTTING_DOWN, Limits, Refusal, length_refusal, refusal
from cableway.enginecore.request import Family, Request, State
from cableway.enginecore.step import Step, new_row
from cableway.enginecore.trials import QUARANTINED, Trials
from cableway.enginecore.waiting import WaitingQueue
from cableway.ipc.messages import Failed, Generate, IfLost, RunLeft, StepPlan, StepResult, Tokens, unpack_ints


class Memory(NamedTuple):
    """What the workers have for the state of requests."""

    groups: list[Group | Encoder]
    num_blocks: int
    block_size: int
    max_num_seqs: int


class BadResult(Exception):
    """A worker's result does not fit the step that it claims to be of."""


_order = operator.attrgetter("order")


class Scheduler:
    """Requests run in the order of (priority, arrival), and that order decides who is preempted.

    Liveness: the first request in this order is never preempted for another, and any one fits into the whole pool
    alone (`max_len`), so the first one always ends.

    Args:
        limits: from the configuration.
        epoch: this life of the core, told to frontends with every token.
    """

    def __init__(self, limits: Limits, epoch: int):
        self.max_len = limits.max_model_len
        self.kv: KVManager | None = None  # None while the workers are not there
        self.waiting = WaitingQueue()
        self.trials = Trials()
        self.running: list[Request] = []  # in order
        self.refuses_new = False  # told to drain
        self.num_steps = self.num_preemptions = self.num_prefix_queries = self.num_prefix_hits = 0
        self._limits = limits
        self._epoch = self._workers_epoch = epoch
        self._next_number = 0
        self._arrivals = itertools.count()
        self._live = Clients()
        self._admission = Admission(self.waiting, self.trials)
        self._in_flight = runs.InFlight()
        self._draining: list[Request] = []  # preempted or finished, but in a step in flight
        self._free_rows: list[int] = []
        self._freed_rows: list[int] = []  # to be told to the workers

    @property
    def num_in_flight(self) -> int:
        """Steps that are planned and have no result yet."""
        return self._in_flight.num_steps

    def has_room(self, depth: int) -> bool:
        """Whether to plan on: at most `depth` steps are in flight, or a run that the next plan is to cut short."""
        return self._in_flight.num_steps <= depth or self._in_flight.has_run_to_cut

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return self._live.num_live

    @property
    def wants_turn(self) -> bool:
        """Whether frontends have to be told something before more can be planned."""
        return self.trials.wants_turn

    # -----------------------------------------------------------------------------------------------------------------
    # Requests come and go

    def submit(self, frontend: bytes, generate: Generate, now_s: float) -> list[int]:
        """Queue a request's choices, or fail them. Returns the keys ignored because a live choice has them already."""
        live, outbox = self._live.of(frontend)
        duplicates = [choice.key for choice in generate.choices if choice.key in live]
        choices = {choice.key: choice for choice in generate.choices if choice.key not in live}
        declined = SHUTTING_DOWN if self.refuses_new else refusal(generate, self._limits, self.waiting, self.max_len)
        if declined:
            outbox.failed += [Failed(key, *declined) for key in choices]
            return duplicates
        family = Family() if len(choices) > 1 else None
        priority = generate.priority if self._limits.by_priority else 0
        for choice in choices.values():
            if choice.standing.is_convicted:
                outbox.failed.append(Failed(choice.key, *QUARANTINED))
                continue
            order = (priority, next(self._arrivals))
            request = Request(generate, choice, order=order, max_model_len=self.max_len, now_s=now_s)
            request.frontend, request.outbox, request.family = frontend, outbox, family
            live[choice.key] = request
            self._queue_of(request).push(request)
            self._in_flight.is_overtaken = True
            self._finish_if_ended(request)
        return duplicates

    def abort(self, frontend: bytes, keys: Iterable[int]) -> None:
        """End these choices without a word. Unknown keys have just ended by themselves: no fault."""
        live = self._live.get(frontend, {})
        for key in keys:
            if request := live.get(key):
                self._leave(request)

    def drop(self, frontend: bytes) -> None:
        """The frontend is gone, and all that it asked for."""
        self.abort(frontend, list(self._live.get(frontend, ())))
        self._live.forget(frontend)

    def fail_all(self, why: Refusal) -> None:
        for live in list(self._live.values()):
            for request in list(live.values()):
                self._fail(request, why)

    def take_messages(self) -> list[tuple[bytes, Tokens | Failed | IfLost]]:
        """What is to be sent, and to which frontend."""
        return self._live.take_messages(self._epoch)

    # -----------------------------------------------------------------------------------------------------------------
    # Workers come and go

    def start(self, memory: Memory, workers_epoch: int) -> None:
        """All workers are there, with nothing in their memory. ValueError when that is too small for any request."""
        kv = KVManager(
            memory.groups,
            memory.num_blocks,
            memory.block_size,
            chunk_len=self._limits.max_num_batched_tokens,
            prefix_cache=self._limits.prefix_cache,
        )
        max_len = kv.longest_len(self._limits.max_model_len)
        if max_len < 2:
            raise ValueError(f"{memory.num_blocks} blocks of {memory.block_size} tokens cannot hold any request")
        self.kv, self.max_len, self._workers_epoch = kv, max_len, workers_epoch
        self._free_rows = list(range(min(memory.max_num_seqs, self._limits.max_num_seqs) - 1, -1, -1))
        for request in [*self.waiting, *self.trials.waiting]:
            request.limit(max_len)
            counts = request.num_prompt, request.sampling.max_tokens
            if why := length_refusal(*counts, max_len, request.source_len):
                self._fail(request, why)
            else:
                self._finish_if_ended(request)

    def stop(self) -> list[Request]:
        """A worker is gone, and with it all state: what runs goes back to the queue with the tokens so far.

        Returns the requests that are failed, because it was they that it died of.
        """
        hit = {request for step in self._in_flight for request in step.requests}
        convicted = []
        for request in self.running + self._draining:
            if request in hit:
                alone = request is self.trials.current
                counts = request.num_computed, request.num_planned
                request.standing = request.standing.after_death(*counts, alone=alone)
            request.reset()
            if request.state is State.FINISHED:
                continue
            request.move(State.WAITING)
            self._queue_of(request).push(request)
            if request.standing.is_convicted:
                self._fail(request, QUARANTINED)
                convicted.append(request)
        self.trials.workers_lost()
        self.kv = None
        self.running, self._draining, self._freed_rows = [], [], []
        self._in_flight.clear()
        self._admission.forget()
        return convicted

    # -----------------------------------------------------------------------------------------------------------------
    # Plan

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, in flight from now on; None when there is nothing to compute before a commit or a submit."""
        self.trials.wants_turn = False
        if self.kv is None:
            return None
        self.trials.judge()  # whoever stood trial may have left since the last commit, and its row with it
        if self.trials.are_due(now_s):
            return self._plan_trial(self.kv, now_s)
        step = Step(self._next_number, self._limits.max_num_batched_tokens, self._num_steps(self.kv))
        num_preemptions = self.num_preemptions
        behind = step.add_decodes(self.running, self._reserve)
        if behind or self.waiting.num_requests:
            self._plan_prompts(step, self.kv, behind, num_preemptions, now_s)
        return self._launch(step, self.kv) if step.requests or self._in_flight.has_run_to_cut else None

    def _num_steps(self, kv: KVManager) -> int:
        """How many steps the next plan is for: one at a time while anybody waits."""
        somebody_waits = self.waiting.num_requests or self.trials.waiting.num_requests
        if somebody_waits or not self._limits.plans_runs or len(self.running) > self._limits.max_num_batched_tokens:
            return 1
        return runs.num_steps(self.running, kv)

    def cut_run(self) -> StepPlan | None:
        """An empty plan, with which the workers leave the run that is in flight; None when there is none."""
        if self.kv is None or not self._in_flight.ends_with_run:
            return None
        return self._launch(Step(self._next_number, 0), self.kv)

    def _launch(self, step: Step, kv: KVManager) -> StepPlan:
        message = step.message(self._workers_epoch, len(kv.groups), self._freed_rows, kv.copies)
        self._freed_rows, kv.copies = [], []
        self._in_flight.launch(step)
        self._next_number += step.num_steps
        return message

    def _plan_trial(self, kv: KVManager, now_s: float) -> StepPlan | None:
        """One suspect computes, and nobody else; its frontend is told before. None while others' steps end."""
        if self._in_flight:
            return None
        request = self.trials.current or self.trials.waiting.first()
        assert request is not None
        self._clear_out(request)
        match = kv.lookup(request) if request is not self.trials.current else None
        num_computed = match.num_tokens if match else request.num_computed
        step = Step(self._next_number, self._limits.max_num_batched_tokens)
        count = min(len(request.tokens) - num_computed, step.budget)
        if self.trials.announces(request, (num_computed, num_computed + count), now_s, alone=True):
            return None
        if match:
            self.trials.begin(request)
            self._enter(step, kv, request, match, now_s)
        elif self._reserve(step, request, num_computed + count):
            step.add(request, count)
        return self._launch(step, kv)

    def _clear_out(self, suspect: Request) -> None:
        """Everybody else waits; nothing is in flight."""
        others = [request for request in self.running if request is not suspect]
        self.running = [request for request in self.running if request is suspect]
        for request in others:
            self._preempt(request)

    def _preempt(self, request: Request) -> None:
        """Send it back to the queue; it is no longer among those that run."""
        request.move(State.PREEMPTED)
        self.num_preemptions += 1
        self._vacate(request)

    def _plan_prompts(
        self, step: Step, kv: KVManager, behind: list[Request], num_preemptions: int, now_s: float
    ) -> None:
        """Spend what is left of the budget on prompts, and let in who waits unless this plan preempted somebody.

        A prompt that takes many steps leaves half of each to shorter ones, so that these soon get through.
        """
        long = [request for request in behind if request.num_left > self._limits.max_num_batched_tokens]
        set_aside = step.budget // 2 if long else 0
        step.budget -= set_aside
        step.add_chunks([request for request in behind if request not in long], self._reserve)
        if num_preemptions == self.num_preemptions:
            self._admit(step, kv, sum(map(kv.num_owed, behind)), now_s)
        step.budget += set_aside
        step.add_chunks(long, self._reserve)

    def _reserve(self, step: Step, request: Request, num_tokens: int) -> bool:
        """Get blocks for the row that is added next, if need be from requests that come later in the order."""
        assert self.kv is not None
        while (grown := self.kv.reserve(request, num_tokens)) is None:
            victim = self.running[-1]
            if self._draining or victim is request:
                return False  # whoever drains gives its blocks back soon
            self._preempt(self.running.pop())
        step.grow(grown)
        return True

    def _admit(self, step: Step, kv: KVManager, num_owed: int, now_s: float) -> None:
        """Let in who waits; `num_owed` blocks are for the prompts that are computed in part already."""
        num_rows, num_others = len(self._free_rows), len(self.running) + len(self._draining)
        for request, match in self._admission.entering(
            step, kv, num_rows=num_rows, num_others=num_others, num_owed=num_owed, now_s=now_s
        ):
            self._enter(step, kv, request, match, now_s)

    def _enter(self, step: Step, kv: KVManager, request: Request, match: Match, now_s: float) -> None:
        kv.adopt(request, match)
        request.move(State.RUNNING)
        request.row = self._free_rows.pop()
        if match.leader is None:
            num_encoded = request.source_len if request.source_is_new else 0
            self.num_prefix_queries += len(request.tokens) + request.source_len
            self.num_prefix_hits += match.num_tokens + request.source_len - num_encoded
            if request.family:
                request.family.leader = request
        if request.queue_s < 0:
            request.queue_s = now_s - request.arrived_s
            # What a fork shares was just computed, but for what its leader had found in the cache.
            # Where an encoder takes what the client calls the prompt, that is counted.
            num_own = 0 if request.source_is_new else request.source_len or match.num_tokens
            num_found = match.leader.num_cached if match.leader else num_own
            request.num_cached = min(num_found, request.source_len or request.num_prompt)
        bisect.insort(self.running, request, key=_order)
        step.new.append(new_row(request))
        if request.source_is_new:
            step.budget -= request.source_len
        count = min(request.num_left, step.budget)
        grown = kv.reserve(request, request.num_planned + count)
        assert grown is not None, "there was room"
        step.grow(grown)
        step.add(request, count)

    # -----------------------------------------------------------------------------------------------------------------
    # Commit

    def commit(self, result: StepResult) -> bool:
        """Take what the oldest step in flight made; False when the result is of no such step (late, or twice).

        Raises:
            BadResult: it claims to be of this step, and cannot be.
        """
        if not self._in_flight or result.epoch != self._workers_epoch or result.step != self._in_flight[0].number:
            return False
        step = self._in_flight[0]
        if len(result.token_ids) != 4 * sum(step.samples):
            raise BadResult(f"{len(result.token_ids)} bytes of token ids for {sum(step.samples)} rows")
        assert self.kv is not None
        if result.logprobs or result.failed:
            step.take_extras(result, self._fail)
        step.take_tokens(unpack_ints(result.token_ids).tolist(), self.kv, self._finish_if_ended)
        self._in_flight.done()
        self.num_steps += 1
        self._vacate_drained()
        self.trials.judge()
        return True

    def leave_run(self, left: RunLeft) -> bool:
        """What is left of a run will not be done; False when it is not in flight (late, or twice)."""
        if left.epoch != self._workers_epoch or not self._in_flight.leave(left.step):
            return False
        self._vacate_drained()
        return True

    def _vacate_drained(self) -> None:
        if self._draining:
            draining, self._draining = self._draining, []
            for request in draining:
                self._vacate(request)

    # -----------------------------------------------------------------------------------------------------------------
    # Ends

    def _finish_if_ended(self, request: Request) -> None:
        if finish := request.ending():
            request.outbox.finished.append(finish)
            self._leave(request)

    def _fail(self, request: Request, why: Refusal) -> None:
        request.outbox.failed.append(Failed(request.key, *why))
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """The request has ended."""
        del self._live[request.frontend][request.key]
        state = request.state
        request.move(State.FINISHED)
        if state is State.WAITING:
            self._queue_of(request).forget(request)
        elif state is State.RUNNING:
            del self.running[bisect.bisect_left(self.running, request.order, key=_order)]
            self._in_flight.is_overtaken |= request.is_in_flight
            self._vacate(request)

    def _queue_of(self, request: Request) -> WaitingQueue:
        return self.trials.waiting if request.standing.is_suspect else self.waiting

    def _vacate(self, request: Request) -> None:
        """Take row and blocks back, now or when the last step in flight that uses them is committed."""
        assert self.kv is not None
        if request.is_in_flight:
            self._draining.append(request)
            return
        self.kv.release(request)
        self._free_rows.append(request.row)
        self._freed_rows.append(request.row)
        if request.state is State.PREEMPTED:
            request.reset()
            request.move(State.WAITING)
            self.waiting.push(request)
