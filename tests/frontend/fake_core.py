"""An engine core without an engine: speaks ipc/messages to real frontends, and says what a script tells it to.

By default the model says back its prompt's tokens, then ends.
"""

import array
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from cableway.ipc import messages
from cableway.ipc.config import frontends_address
from cableway.ipc.endpoint import Arrival, Endpoint, PeerDown
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Failed,
    Finish,
    Generate,
    Hello,
    Logprobs,
    Ping,
    Sampling,
    Status,
    Tokens,
    Welcome,
    ints,
    unpack_ints,
)

FromFrontend = messages.ToCore
IDLE_S = 0.002


def say_back(generate: Generate, _: int) -> list[int]:
    """The prompt's tokens, then the first end-of-sequence token."""
    return [*unpack_ints(generate.prompt), *unpack_ints(generate.sampling.eos_token_ids)[:1]]


class Stream:
    """A choice under way."""

    def __init__(self, peer: bytes, generate: Generate, choice: messages.Choice, script: list[int]):
        self.peer = peer
        self.key = choice.key
        self.sampling = generate.sampling
        self.prompt = unpack_ints(generate.prompt).tolist()
        self.num_out = len(choice.output) // 4
        self.script = script or [0]
        self.has_prompt_logprobs = generate.sampling.prompt_logprobs < 0

    def next_tokens(self, num: int) -> tuple[list[int], Finish | None]:
        new: list[int] = []
        while len(new) < num:
            token_id = self.script[self.num_out % len(self.script)]
            new.append(token_id)
            self.num_out += 1
            if (reason := self._ending(token_id)) is not None:
                return new, reason
        return new, None

    def _ending(self, token_id: int) -> Finish | None:
        sampling = self.sampling
        is_eos = token_id in unpack_ints(sampling.eos_token_ids).tolist()
        is_stop = token_id in unpack_ints(sampling.stop_token_ids).tolist()
        if (is_eos or is_stop) and self.num_out > sampling.min_tokens:
            return Finish(self.key, "stop", None if is_eos else token_id, num_cached_tokens=3, queue_s=0.25)
        if self.num_out >= sampling.max_tokens:
            return Finish(self.key, "length", num_cached_tokens=3, queue_s=0.25)
        return None


class FakeCore:
    """Runs in a thread of its own until closed; `die()` and `live()` play a core's death and the next core.

    Args:
        runtime_dir: where the frontends look for it.
        step_s: pause between steps.
        tokens_a_step: tokens that each choice gets in one.
    """

    def __init__(self, runtime_dir: str, engine: str = "0", *, step_s: float = 0.0, tokens_a_step: int = 1):
        self.script: Callable[[Generate, int], list[int]] = say_back
        self.step_s = step_s
        self.tokens_a_step = tokens_a_step
        self.generates: list[Generate] = []
        self.aborted: dict[int, float] = {}
        self.refuses: Failed | None = None  # every request, with this
        self.fails = False  # whatever is under way
        self.loses_logprobs = False
        self.is_ready = True
        self.is_silent = False
        self.step_age_s = 0.0
        self._address = frontends_address(runtime_dir, engine)
        self._epoch = 1000
        self._streams: dict[tuple[bytes, int], Stream] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.fault: BaseException | None = None
        self.live()

    def live(self) -> None:
        """A new life, under a new epoch, knowing nothing."""
        self._epoch += 1
        self._streams.clear()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def die(self) -> None:
        """Be gone, with all that was under way."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self.fault is not None:
            raise self.fault

    @property
    def num_live(self) -> int:
        return len(self._streams)

    def _run(self) -> None:
        endpoint = Endpoint(self._address, receives=FromFrontend, bind=True)
        poller = zmq.Poller()
        for each in endpoint.sockets:
            poller.register(each, zmq.POLLIN)
        try:
            while not self._stop.is_set():
                poller.poll(0 if self._streams and not self.step_s else 1000 * (self.step_s or IDLE_S))
                for arrival in endpoint.receive():
                    self._hear(endpoint, arrival)
                self._step(endpoint)
        except BaseException as error:
            self.fault = error
        finally:
            endpoint.close()

    def _hear(self, endpoint: Endpoint, arrival: Arrival) -> None:
        peer = arrival.peer
        match arrival.message:
            case Hello():
                endpoint.send(Welcome(PROTOCOL_VERSION, self._epoch), to=peer)
            case Ping() if not self.is_silent:
                endpoint.send(self._status(), to=peer)
            case Generate() as generate:
                self.generates.append(generate)
                for choice in generate.choices:
                    if self.refuses is not None:
                        endpoint.send(Failed(choice.key, *_values(self.refuses)[1:]), to=peer)
                    else:
                        stream = Stream(peer, generate, choice, self.script(generate, choice.index))
                        self._streams[peer, choice.key] = stream
            case Abort(keys):
                for key in unpack_ints(keys):
                    if self._streams.pop((peer, key), None) is not None:
                        self.aborted[key] = time.monotonic()
            case PeerDown():
                self._streams = {at: stream for at, stream in self._streams.items() if at[0] != peer}

    def _step(self, endpoint: Endpoint) -> None:
        by_peer: dict[bytes, list[Stream]] = {}
        for stream in self._streams.values():
            by_peer.setdefault(stream.peer, []).append(stream)
        for peer, streams in by_peer.items():
            if self.fails:
                for stream in streams:
                    del self._streams[peer, stream.key]
                    endpoint.send(Failed(stream.key, 500, "broken", "it broke"), to=peer)
            else:
                endpoint.send(self._tokens(streams), to=peer)

    def _tokens(self, streams: list[Stream]) -> Tokens:
        keys, first, num, token_ids = [], [], [], []
        finished, logprobs = [], []
        for stream in streams:
            keys.append(stream.key)
            first.append(stream.num_out)
            if not stream.has_prompt_logprobs:
                stream.has_prompt_logprobs = True
                width = stream.sampling.prompt_logprobs
                logprobs.append(_logprobs(stream.key, 1, stream.prompt[1:], width, prompt=True))
            new, finish = stream.next_tokens(self.tokens_a_step)
            num.append(len(new))
            token_ids += new
            if stream.sampling.logprobs >= 0 and not self.loses_logprobs:
                logprobs.append(_logprobs(stream.key, first[-1], new, stream.sampling.logprobs))
            if finish is not None:
                finished.append(finish)
                del self._streams[stream.peer, stream.key]
        return Tokens(self._epoch, ints(keys), ints(first), ints(num), ints(token_ids), finished, logprobs)

    def _status(self) -> Status:
        return Status(
            epoch=self._epoch, ready=self.is_ready, step_age_s=self.step_age_s, steps=7,
            num_running=len(self._streams), num_waiting=5, num_waiting_tokens=50, kv_usage_frac=0.5, num_blocks=100,
            prefix_queries=200, prefix_hits=80, preemptions=2, worker_step_ages_s=[self.step_age_s],
        )  # fmt: skip


def _logprobs(key: int, first: int, token_ids: list[int], num_top: int, *, prompt: bool = False) -> Logprobs:
    """Each token at -0.5, rank 2; in its place the ids above it at -0.25, -1.25, …"""
    ids, values = [], []
    for token_id in token_ids:
        ids += [token_id, *(token_id + 1 + i for i in range(num_top))]
        values += [-0.5, *(-0.25 - i for i in range(num_top))]
    num = len(token_ids)
    return Logprobs(key, first, num, 1 + num_top, ints(ids), _floats(values), ints([2] * num), prompt)


def _floats(values: list[float]) -> bytes:
    return array.array("f", values).tobytes()


def _values(message: Any) -> tuple[Any, ...]:
    return tuple(getattr(message, name) for name in message.__struct_fields__)


def sampling_of(core: FakeCore) -> Sampling:
    """The parameters of the last request."""
    return core.generates[-1].sampling
