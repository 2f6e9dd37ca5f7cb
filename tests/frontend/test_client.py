"""EngineClient against a core that does what cores should not: late, doubled, missing and former messages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import zmq

from cableway.frontend.client import EngineClient, EngineLost, Job
from cableway.frontend.errors import RequestError
from cableway.ipc.config import FrontendConfig, Options, frontends_address
from cableway.ipc.endpoint import Arrival, AsyncEndpoint, Endpoint, PeerDown, PeerUp
from cableway.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Choice,
    Failed,
    Finish,
    Generate,
    Hello,
    IfLost,
    Logprobs,
    Ping,
    Refused,
    Sampling,
    Standing,
    ToCore,
    Tokens,
    Welcome,
    ints,
    unpack_ints,
)
from cableway.ipc.resolve import resolve

PROMPT = [5, 6, 7]


class Core:
    """The other end, driven by the test, message by message."""

    def __init__(self, runtime_dir: str):
        self._address = frontends_address(runtime_dir, "0")
        self.received: list[Any] = []
        self._arrived = asyncio.Event()
        self.peer = b""
        self.open()

    def open(self) -> None:
        self.endpoint = Endpoint(self._address, receives=ToCore, bind=True)
        self._driven = AsyncEndpoint(self.endpoint, self._hear)

    def close(self) -> None:
        self._driven.close()

    def _hear(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            if not isinstance(arrival.message, Ping | PeerUp | PeerDown):
                self.peer = arrival.peer
                self.received.append(arrival.message)
                self._arrived.set()

    async def next(self, kind: type) -> Any:
        """The next message, which must be of this kind."""
        async with asyncio.timeout(5):
            while not self.received:
                self._arrived.clear()
                await self._arrived.wait()
        message = self.received.pop(0)
        assert isinstance(message, kind), message
        return message

    def send(self, message: Any) -> None:
        assert self.endpoint.send(message, to=self.peer)

    def welcome(self, epoch: int = 1) -> None:
        self.send(Welcome(PROTOCOL_VERSION, epoch))

    def tokens(self, key: int, first: int, token_ids: list[int], *, epoch: int = 1, **more: Any) -> None:
        self.send(Tokens(epoch, ints([key]), ints([first]), ints([len(token_ids)]), ints(token_ids), **more))


@pytest.fixture
def config(tmp_path: Any) -> FrontendConfig:
    return resolve(Options(runtime_dir=str(tmp_path), max_queued_requests=3)).frontend


@pytest.fixture
async def core(config: FrontendConfig) -> AsyncIterator[Core]:
    core = Core(config.runtime_dir)
    yield core
    core.close()


@pytest.fixture
async def client(config: FrontendConfig, core: Core) -> AsyncIterator[EngineClient]:
    client = EngineClient(config)
    await client.start()
    hello = await core.next(Hello)
    assert (hello.version, hello.role) == (PROTOCOL_VERSION, "frontend")
    core.welcome()
    await until(lambda: client._links["0"]._epoch is not None)
    yield client
    client.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


async def read(job: Job, num: int = 10**9) -> dict[int, list[int]]:
    """Token ids by choice, at least `num` of them when the job has as many."""
    got: dict[int, list[int]] = {}
    async with asyncio.timeout(5):
        async for updates in job:
            for update in updates:
                if update.error is not None:
                    raise update.error
                got.setdefault(update.index, []).extend(update.token_ids)
            if sum(map(len, got.values())) >= num:
                break
    return got


async def test_tokens_come_once_and_in_order(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling(max_tokens=9))
    generate = await core.next(Generate)
    assert unpack_ints(generate.prompt).tolist() == PROMPT
    assert not generate.resumed
    (choice,) = generate.choices
    core.tokens(choice.key, 0, [10, 11])
    core.tokens(choice.key, 0, [10, 11])  # doubled
    core.tokens(choice.key, 1, [66])  # late
    core.tokens(choice.key, 2, [77], epoch=0)  # of a former life
    core.tokens(choice.key + 1, 0, [88])  # of nobody
    core.tokens(choice.key, 2, [12], finished=[Finish(choice.key, "length")])
    assert await read(job) == {0: [10, 11, 12]}
    assert client.num_live == 0


async def test_a_late_reader_finds_its_tokens_merged(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling(max_tokens=100), n=2)
    one, two = (choice.key for choice in (await core.next(Generate)).choices)
    for i in range(50):
        core.tokens(one, i, [i])
        core.tokens(two, i, [100 + i])
    await until(lambda: client._links["0"]._live[two].output.buffer_info()[1] == 50)
    updates = await anext(job)
    assert [update.token_ids for update in updates] == [list(range(50)), list(range(100, 150))]


async def test_tokens_that_are_missing_are_asked_for_again(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling(max_tokens=9))
    (choice,) = (await core.next(Generate)).choices
    core.tokens(choice.key, 0, [10])
    core.tokens(choice.key, 2, [12])
    assert unpack_ints((await core.next(Abort)).keys).tolist() == [choice.key]
    again = await core.next(Generate)
    assert again.resumed
    (resumed,) = again.choices
    assert unpack_ints(resumed.output).tolist() == [10]
    assert resumed.key != choice.key
    core.tokens(choice.key, 1, [99])  # meant for the key of before
    core.tokens(resumed.key, 1, [11], finished=[Finish(resumed.key, "stop")])
    assert await read(job) == {0: [10, 11]}


async def test_a_new_core_gets_what_lives_with_what_was_delivered(client: EngineClient, core: Core) -> None:
    options = {"n": 3, "priority": 2, "cache_salt": "s", "request_id": "r", "source_ids": [5, 6]}
    job = client.submit(PROMPT, Sampling(max_tokens=9, seed=3), **options)
    first = await core.next(Generate)
    one, two, three = (choice.key for choice in first.choices)
    core.tokens(one, 0, [10])
    core.tokens(two, 0, [20, 21])
    core.tokens(three, 0, [30], finished=[Finish(three, "stop")])
    assert await read(job, 4) == {0: [10], 1: [20, 21], 2: [30]}
    core.close()
    core.received.clear()
    core.open()
    await core.next(Hello)
    core.welcome(2)
    await core.next(Abort)
    again = await core.next(Generate)
    outputs = [(choice.index, unpack_ints(choice.output).tolist()) for choice in again.choices]
    assert outputs == [(0, [10]), (1, [20, 21])]
    fields = ("request_id", "prompt", "sampling", "priority", "cache_salt", "source")
    assert unpack_ints(again.source).tolist() == [5, 6]
    assert [getattr(again, name) for name in fields] == [getattr(first, name) for name in fields]
    one, two = (choice.key for choice in again.choices)
    core.tokens(one, 1, [666], epoch=1)
    core.tokens(one, 1, [11], epoch=2, finished=[Finish(one, "stop")])
    core.tokens(two, 2, [22], epoch=2, finished=[Finish(two, "stop")])
    assert await read(job) == {0: [11], 1: [22]}


async def test_logprobs_that_a_resumed_request_says_again_are_not_taken_twice(client: EngineClient, core: Core) -> None:
    def logprobs(key: int, first: int, values: list[int], *, prompt: bool) -> Logprobs:
        num = len(values)
        return Logprobs(key, first, num, 1, ints(values), bytes(4 * num), ints([1] * num), prompt)

    job = client.submit(PROMPT, Sampling(max_tokens=9, logprobs=0, prompt_logprobs=0))
    (choice,) = (await core.next(Generate)).choices
    core.tokens(choice.key, 0, [], logprobs=[logprobs(choice.key, 1, [6], prompt=True)])
    core.tokens(choice.key, 0, [8], logprobs=[logprobs(choice.key, 0, [8], prompt=False)])
    core.welcome()  # the same core lost us from sight
    await core.next(Abort)
    (choice,) = (await core.next(Generate)).choices
    core.tokens(choice.key, 1, [], logprobs=[logprobs(choice.key, 1, [6, 7], prompt=True)])
    core.tokens(
        choice.key, 1, [9], logprobs=[logprobs(choice.key, 1, [9], prompt=False)], finished=[Finish(choice.key, "stop")]
    )
    found: list[list[int]] = [[], []]
    async for updates in job:
        for packed in updates[0].prompt_logprobs:
            found[0] += unpack_ints(packed.token_ids).tolist()
        for packed in updates[0].logprobs:
            found[1] += unpack_ints(packed.token_ids).tolist()
    assert found == [[6, 7], [8, 9]]


async def test_aborts(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling(), n=3)
    keys = [choice.key for choice in (await core.next(Generate)).choices]
    job.abort(1)
    assert unpack_ints((await core.next(Abort)).keys).tolist() == [keys[1]]
    job.abort(1)
    job.abort()
    gone = [unpack_ints((await core.next(Abort)).keys)[0] for _ in range(2)]
    assert sorted(gone) == [keys[0], keys[2]]
    core.tokens(keys[0], 0, [1])
    assert await read(job) == {}
    assert client.num_live == 0


async def test_failures_end_a_choice(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling())
    (choice,) = (await core.next(Generate)).choices
    core.send(Failed(choice.key, 429, "queue_full", "full"))
    with pytest.raises(RequestError) as caught:
        await read(job)
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "queue_full", 1)
    assert client.num_live == 0


async def test_many_prompts_share_a_mailbox(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling(), n=2)
    assert client.submit([9], Sampling(), first_index=2, job=job) is job
    keys = [choice.key for _ in range(2) for choice in (await core.next(Generate)).choices]
    for i, key in enumerate(keys):
        core.tokens(key, 0, [i], finished=[Finish(key, "stop")])
    assert await read(job) == {0: [0], 1: [1], 2: [2]}


async def test_a_core_that_refuses_ends_the_process(client: EngineClient, core: Core) -> None:
    job = client.submit(PROMPT, Sampling())
    await core.next(Generate)
    core.send(Refused("another version"))
    with pytest.raises(EngineLost, match="another version"):
        await asyncio.wait_for(client.failed, 5)
    with pytest.raises(RequestError, match="lost"):
        await read(job)


async def test_bytes_that_are_no_message_end_the_process(client: EngineClient, core: Core) -> None:
    core.endpoint.socket.send_multipart([core.peer, msgspec.msgpack.encode(["unheard_of", 1])], zmq.DONTWAIT)
    with pytest.raises(EngineLost):
        await asyncio.wait_for(client.failed, 5)


async def test_an_unknown_model(client: EngineClient) -> None:
    with pytest.raises(RequestError) as caught:
        client.submit(PROMPT, Sampling(), model="other")
    assert caught.value.status == 404


class TestStanding:
    """What a frontend says of a choice to the core after the one that died."""

    SUSPECT = Standing(deaths=2, reached=2)

    async def after(self, core: Core, epoch: int) -> Choice:
        """The core dies; what its successor is told of the only choice."""
        core.close()
        core.received.clear()
        core.open()
        await core.next(Hello)
        core.welcome(epoch)
        await core.next(Abort)
        (choice,) = (await core.next(Generate)).choices
        return choice

    async def test_the_cores_last_will_counts_until_more_comes(self, client: EngineClient, core: Core) -> None:
        client.submit(PROMPT, Sampling(max_tokens=9))
        (choice,) = (await core.next(Generate)).choices
        assert choice.standing == Standing()
        choice = await self.after(core, 2)
        assert choice.standing == Standing(deaths=1)
        core.send(IfLost(choice.key, self.SUSPECT))
        choice = await self.after(core, 3)
        assert choice.standing == self.SUSPECT
        core.send(IfLost(choice.key, Standing(3, 1, 2)))
        core.tokens(choice.key, 0, [10], epoch=3)
        choice = await self.after(core, 4)
        assert choice.standing == Standing(deaths=1)

    async def test_whoever_waits_while_cores_die_is_not_blamed(self, client: EngineClient, core: Core) -> None:
        client.submit(PROMPT, Sampling(max_tokens=9))
        await core.next(Generate)
        for epoch in range(2, 6):
            assert (await self.after(core, epoch)).standing == Standing(deaths=1)

    async def test_a_lost_connection_is_no_death(self, client: EngineClient, core: Core) -> None:
        client.submit(PROMPT, Sampling(max_tokens=9))
        await core.next(Generate)
        assert (await self.after(core, 1)).standing == Standing()


async def test_prompts_for_a_core_that_takes_none_are_bounded(config: FrontendConfig) -> None:
    limits = {"max_queued_requests": 100, "max_queued_tokens": 10, "max_num_seqs": 2, "max_model_len": 5}
    few = msgspec.structs.replace(config, **limits)
    core, client = Core(few.runtime_dir), EngineClient(few)
    await client.start()
    big = client.submit([1] * 15, Sampling())  # alone, it may be bigger than the limit
    with pytest.raises(RequestError) as caught:
        client.submit([1], Sampling())
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    big.abort()
    jobs = [client.submit([1] * 5, Sampling(), n=3), client.submit([1] * 5, Sampling())]
    with pytest.raises(RequestError):
        client.submit([1], Sampling())
    await core.next(Hello)
    core.welcome()  # a core may run max_num_seqs sequences beside its queue, but no more
    await until(lambda: client._links["0"]._epoch is not None)
    jobs.append(client.submit([1] * 10, Sampling()))
    with pytest.raises(RequestError):
        client.submit([1], Sampling())
    jobs[0].abort(1)
    with pytest.raises(RequestError):
        client.submit([1], Sampling())  # its siblings still hold the prompt
    jobs[0].abort()
    client.submit([1], Sampling())
    client.close()
    core.close()
