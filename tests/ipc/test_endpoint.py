"""Endpoints over real sockets: typed both ways, and a peer's death is told at once."""

import asyncio
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from cableway.ipc.endpoint import Arrival, AsyncEndpoint, Endpoint, PeerDown, PeerUp, Undecodable, identity
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Choice,
    Generate,
    Hello,
    Sampling,
    ToCore,
    ToFrontend,
    Tokens,
    Welcome,
    ints,
    unpack_ints,
)

HELLO = Hello(PROTOCOL_VERSION, "frontend", 0, 1)


@pytest.fixture
def address():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders exceed a socket's path length
        yield f"ipc://{folder}/s"


def wait(endpoint: Endpoint, count: int = 1, timeout_s: float = 5.0) -> list[Arrival]:
    arrivals: list[Arrival] = []
    deadline = time.monotonic() + timeout_s
    poller = zmq.Poller()
    for socket in endpoint.sockets:
        poller.register(socket, zmq.POLLIN)
    while len(arrivals) < count and time.monotonic() < deadline:
        poller.poll(50)
        arrivals += endpoint.receive()
    return arrivals


@pytest.fixture
def pair(address):
    router = Endpoint(address, ToCore, bind=True)
    dealer = Endpoint(address, ToFrontend, own_identity=identity("frontend", 0))
    assert [arrival.message for arrival in wait(dealer)] == [PeerUp()]
    yield router, dealer
    for endpoint in (router, dealer):
        if not endpoint.socket.closed:
            endpoint.close()


def test_messages_and_frames_cross_whole(pair):
    router, dealer = pair
    request = Generate("r1", ints([1, 2, 3]), [Choice(7, 0)], Sampling(seed=2**63 - 1, logit_bias={5: -1.5}))
    dealer.send(request, b"pixels" * 20_000)
    (arrival,) = wait(router)
    assert arrival.message == request
    assert bytes(arrival.frames[0]) == b"pixels" * 20_000
    answer = Tokens(1, ints([7]), ints([0]), ints([2]), ints([11, -12]))
    assert router.send(answer, to=arrival.peer)
    (arrival,) = wait(dealer)
    assert arrival.message == answer
    assert unpack_ints(arrival.message.token_ids).tolist() == [11, -12]


def test_a_dead_peer_is_told_at_once_and_refuses_what_is_sent(pair):
    router, dealer = pair
    dealer.send(HELLO)
    peer = wait(router)[0].peer
    dealer.close()
    began = time.monotonic()
    assert [arrival.message for arrival in wait(router)] == [PeerDown()]
    assert time.monotonic() - began < 1
    assert not router.send(Welcome(1, 1), to=peer)


def test_a_dealer_meets_the_next_router_by_itself(pair, address):
    router, dealer = pair
    router.close()
    assert wait(dealer)[0].message == PeerDown()
    successor = Endpoint(address, ToCore, bind=True)
    assert wait(dealer)[0].message == PeerUp()
    dealer.send(HELLO)
    assert wait(successor)[0].message == HELLO
    successor.close()


@pytest.mark.parametrize("garbage", [b"", b"\xc1", msgspec.msgpack.encode(["nonsense", 1]), b"\x93\xa5hello\x01"])
def test_garbage_is_an_arrival_like_any_other(pair, garbage):
    router, dealer = pair
    dealer.socket.send(garbage)
    dealer.send(HELLO)
    first, second = wait(router, 2)
    assert isinstance(first.message, Undecodable)
    assert second.message == HELLO


async def test_async_endpoint_misses_nothing_under_two_way_traffic(address):
    router = Endpoint(address, ToCore, bind=True)
    received: list[object] = []
    dealer = AsyncEndpoint(Endpoint(address, ToFrontend, own_identity=identity("frontend", 0)), received.extend)
    dealer.send(HELLO)
    (hello,) = await asyncio.to_thread(wait, router)
    for epoch in range(500):
        router.send(Welcome(1, epoch), to=hello.peer)
        dealer.send(HELLO)
        await asyncio.sleep(0)
    await asyncio.sleep(0.5)
    epochs = [arrival.message.epoch for arrival in received if isinstance(arrival.message, Welcome)]
    assert epochs == list(range(500))
    dealer.close()
    router.close()


def test_socket_files_are_where_the_address_says(pair, address):
    assert Path(address.removeprefix("ipc://")).is_socket()
