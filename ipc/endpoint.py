"""Typed ZeroMQ sockets. Frame 0 is a struct, further frames are raw buffers.

Whoever binds is a ROUTER and names the peer it sends to; whoever connects is a DEALER. Peers that come and go are told
as `PeerUp` and `PeerDown` in the stream of messages, taken from the socket's monitor, so that a death is seen at once
and not after a time-out.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from cableway.ipc.messages import Ping

_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 500
_PROBE_TRIES = 5
_PROBE_PAUSE_S = 0.001
_DONTWAIT = int(zmq.DONTWAIT)
_AND_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)


class PeerUp(NamedTuple):
    """A DEALER's connection stands; time to say Hello (again)."""


class PeerDown(NamedTuple):
    """The peer is gone: its socket closed, or it cannot be reached any more."""


class Undecodable(NamedTuple):
    """The peer sent something that is no message of this direction (another version, most likely)."""

    reason: str


class Arrival(NamedTuple):
    peer: bytes  # identity on a ROUTER, b"" on a DEALER
    message: Any  # of the union given as `receives`, or PeerUp, PeerDown, Undecodable
    frames: Sequence[memoryview] = ()


def identity(role: str, rank: int) -> bytes:
    """Identity of this process: role, rank, and an incarnation no earlier or later process shares."""
    return f"{role}.{rank}.{os.getpid()}.{os.urandom(4).hex()}".encode()


def inputs(sources: Iterable[Any]) -> list[tuple[Any, int]]:
    """Sockets and file descriptors, as `wait` takes them."""
    return [(source, int(zmq.POLLIN)) for source in sources]


def wait(sources: list[tuple[Any, int]], timeout_s: float | None) -> list[tuple[Any, int]]:
    """Wait until one of the `inputs` has something to read, or the time is over; those that have."""
    ready: list[tuple[Any, int]] = zmq.zmq_poll(sources, -1 if timeout_s is None else math.ceil(timeout_s * 1000))
    return ready


class Endpoint:
    """A socket of one direction each way, for synchronous loops.

    Args:
        address: `ipc://path` or `tcp://host:port`.
        receives: union of message structs accepted.
        bind: bind as ROUTER; otherwise connect as DEALER under `own_identity`.
    """

    def __init__(self, address: str, receives: Any, *, bind: bool = False, own_identity: bytes = b""):
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(receives).decode
        self._is_router = bind
        self._peers: dict[bytes, None] = {}
        self.socket: Any = zmq.Context.instance().socket(zmq.ROUTER if bind else zmq.DEALER)
        # Nothing lingers after a death, and queues are bounded by credits and leases of our own, never by silent drops.
        options = {zmq.LINGER: 0, zmq.SNDHWM: 0, zmq.RCVHWM: 0}
        if bind:
            options |= {zmq.ROUTER_MANDATORY: 1, zmq.ROUTER_HANDOVER: 1}
        else:
            self.socket.setsockopt(zmq.IDENTITY, own_identity)
            options |= {zmq.RECONNECT_IVL: _RECONNECT_MS, zmq.RECONNECT_IVL_MAX: _RECONNECT_MAX_MS}
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        events = zmq.EVENT_DISCONNECTED if bind else zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        self.monitor: Any = self.socket.get_monitor_socket(events)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self._inputs = inputs(self.sockets)
        # PERF: what `zmq.Socket` puts before and around these costs more than they do, most of all out of the caches.
        self._send_part: Any = super(zmq.Socket, self.socket).send  # type: ignore[misc]
        self._receive_part: Any = self.socket.recv
        if bind:
            self.socket.bind(address)
        else:
            self.socket.connect(address)

    def send(self, message: Any, *frames: Any, to: bytes = b"") -> bool:
        """Queue one message; False when a ROUTER's peer is gone. Buffers must not be reused by the caller."""
        encoded = self._encode(message)
        try:
            if self._is_router:
                self._send_part(to, _AND_MORE)
            if frames:
                self.socket.send_multipart([encoded, *frames], zmq.DONTWAIT, copy=False)
            else:
                self._send_part(encoded, _DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ECONNREFUSED):
                return False
            raise
        return True

    def receive(self) -> list[Arrival]:
        """Everything that has arrived, oldest first; never blocks. `wait` for the `inputs` of `sockets` before."""
        arrivals: list[Arrival] = []
        # PERF: to ask both costs 1.5 us, an `Again` that is raised and caught 3.7, an option of a socket 1.5.
        while ready := zmq.zmq_poll(self._inputs, 0):
            if ready[0][0] is self.socket:  # what a peer said comes before that it left
                arrivals.append(self._next_arrival())
            else:
                arrivals.extend(self._next_event())
        return arrivals

    @property
    def sockets(self) -> list[Any]:
        """What to wait on for input."""
        return [self.socket, self.monitor]

    def forget(self, peer: bytes) -> None:
        """Stop watching a peer that said it leaves, or was found gone."""
        self._peers.pop(peer, None)

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def _next_arrival(self) -> Arrival:
        peer = self._receive_part(_DONTWAIT) if self._is_router else b""
        self._peers[peer] = None
        part = self._receive_part(_DONTWAIT, copy=False)
        encoded, frames = part.buffer, []
        while part.more:
            part = self._receive_part(_DONTWAIT, copy=False)
            frames.append(part.buffer)
        try:
            return Arrival(peer, self._decode(encoded), frames)
        except msgspec.DecodeError as error:
            return Arrival(peer, Undecodable(str(error)))

    def _next_event(self) -> list[Arrival]:
        event = recv_monitor_message(self.monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return [Arrival(b"", PeerUp())]
        return [Arrival(peer, PeerDown()) for peer in (self._unreachable() if self._is_router else [b""])]

    def _unreachable(self) -> list[bytes]:
        """Peers that ROUTER_MANDATORY refuses to send a Ping to: the monitor says that someone left, not who.

        The monitor speaks some microseconds before the pipe is taken down, so look again for a moment.
        """
        gone: list[bytes] = []
        for _ in range(_PROBE_TRIES):
            self.socket.getsockopt(zmq.EVENTS)  # makes ZeroMQ take note of pipes that ended
            gone = [peer for peer in self._peers if not self.send(Ping(), to=peer)]
            if gone or not self._peers:
                break
            time.sleep(_PROBE_PAUSE_S)
        for peer in gone:
            del self._peers[peer]
        return gone


class AsyncEndpoint:
    """An `Endpoint` driven by the running asyncio loop: `on_arrivals` is called with all that has come, in order.

    A callback and not an awaitable: one step's tokens for hundreds of streams come in one message, and a task switch
    for each would cost more than handling it.
    """

    def __init__(self, endpoint: Endpoint, on_arrivals: Callable[[list[Arrival]], None]):
        self._endpoint = endpoint
        self._on_arrivals = on_arrivals
        self._loop = asyncio.get_running_loop()
        self._descriptors = [socket.getsockopt(zmq.FD) for socket in endpoint.sockets]
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._drain)
        self._loop.call_soon(self._drain)

    def send(self, message: Any, *frames: Any) -> bool:
        sent = self._endpoint.send(message, *frames)
        # ZeroMQ's descriptor is edge-triggered, and sending may swallow the edge of a message that came in meanwhile.
        self._loop.call_soon(self._drain)
        return sent

    def close(self) -> None:
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._descriptors = []
        self._endpoint.close()

    def _drain(self) -> None:
        # Once is enough: nothing was left when `receive` returned, and what a handler sends makes for another look.
        if self._descriptors and (arrivals := self._endpoint.receive()):
            self._on_arrivals(arrivals)
