"""`python -m cableway.bench.frontend_chunks`: what one frontend process costs a streamed token.

A real frontend process between a fake engine core, which makes a token for every stream each `--step-ms`, and a process
of raw-socket clients. Counted is the CPU time of the frontend, all threads, so that sharing the machine with the other
two matters little: from the first token to the end of the last answer for each token, and before that for each request
(its connection, parsing, checks and submission). Aim: at most 10 µs a token, 60,000 tokens/s a process.
"""

import asyncio
import json
import multiprocessing
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import click
import msgspec
import zmq
from rich.console import Console
from rich.table import Table

from cableway.ipc import config, messages
from cableway.ipc.child import python_module
from cableway.ipc.endpoint import Endpoint
from cableway.ipc.listen import Listener
from cableway.ipc.messages import Finish, Generate, Hello, Ping, Status, Tokens, Welcome, ints
from cableway.ipc.resolve import resolve

AIM_US = 10.0
_EPOCH = 1
_MODEL = "bench"
_START_TIMEOUT_S = 30


class Timing(msgspec.Struct, frozen=True):
    """One run. `cpu_us` is the frontend's, a token; `request_us` that of taking in a request; `chunks` counts events
    sent a token."""

    streams: int
    step_ms: float
    tokens: int
    wall_s: float
    cpu_us: float
    request_us: float
    chunks: float

    @property
    def tokens_a_cpu_second(self) -> float:
        return 1e6 / self.cpu_us


class FakeCore:
    """Takes requests until told to make tokens for all of them."""

    def __init__(self, runtime_dir: str):
        self._endpoint = Endpoint(config.frontends_address(runtime_dir, "0"), receives=messages.ToCore, bind=True)
        self._keys: list[int] = []
        self._peer = b""

    def serve(self, *, until_streams: int = 0, until_s: float = 0.0) -> None:
        """Answer, until so many choices are live or so much time has passed."""
        deadline_s = time.monotonic() + (until_s or _START_TIMEOUT_S)
        poller = zmq.Poller()
        poller.register(self._endpoint.socket, zmq.POLLIN)
        while time.monotonic() < deadline_s and not (until_streams and len(self._keys) >= until_streams):
            poller.poll(20)
            self.hear()

    def hear(self) -> None:
        for arrival in self._endpoint.receive():
            match arrival.message:
                case Hello():
                    self._peer = arrival.peer
                    self._endpoint.send(Welcome(messages.PROTOCOL_VERSION, _EPOCH), to=self._peer)
                case Ping():
                    self._endpoint.send(Status(_EPOCH, True, 0.0, 1, 1, 0, 0, 0.5, 100, 0, 0, 0), to=self._peer)
                case Generate() as generate:
                    self._keys += [choice.key for choice in generate.choices]

    def stream(self, num_steps: int, step_s: float) -> None:
        """Make a token a step for every choice."""
        num = len(self._keys)
        keys, ones = ints(self._keys), ints([1] * num)
        next_s = time.perf_counter()
        for step in range(num_steps):
            is_last = step == num_steps - 1
            token_ids = ints(1000 + (step * 37 + i * 11) % 9000 for i in range(num))
            finished = [Finish(key, "length") for key in self._keys] if is_last else []
            self._endpoint.send(Tokens(_EPOCH, keys, ints([step] * num), ones, token_ids, finished), to=self._peer)
            self.hear()
            next_s += step_s
            time.sleep(max(0.0, next_s - time.perf_counter()))
        self._keys.clear()

    def close(self) -> None:
        self._endpoint.close()


def measure(core: FakeCore, pid: int, port: int, streams: int, step_ms: float, steps: int, chat: bool) -> Timing:
    """One run of `streams` concurrent requests of `steps` tokens each."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    clients = context.Process(target=_read_streams, args=(port, streams, steps, chat, sending))
    asked_cpu_s = _cpu_s(pid)
    clients.start()
    core.serve(until_streams=streams)
    began_s, began_cpu_s = time.perf_counter(), _cpu_s(pid)
    core.stream(steps, step_ms / 1e3)
    while not receiving.poll():
        core.serve(until_s=0.01)
    wall_s = time.perf_counter() - began_s
    cpu_s, request_cpu_s = _cpu_s(pid) - began_cpu_s, began_cpu_s - asked_cpu_s
    num_chunks, num_done = receiving.recv()
    clients.join()
    assert num_done == streams, f"{streams - num_done} streams did not end as they should"
    tokens = streams * steps
    cpu_us, request_us = cpu_s / tokens * 1e6, request_cpu_s / streams * 1e6
    return Timing(streams, step_ms, tokens, wall_s, cpu_us, request_us, num_chunks / tokens)


def _cpu_s(pid: int) -> float:
    """CPU time of all threads, in nanoseconds' resolution: `stat` counts clock ticks only."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _read_streams(
    port: int, streams: int, steps: int, chat: bool, sending: "multiprocessing.connection.Connection"
) -> None:
    """The clients: read every stream to its end; sends the number of events, and of streams that ended well."""
    what = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": [5, 6, 7]}
    body = json.dumps({"model": _MODEL, "max_tokens": steps, "stream": True} | what).encode()
    path = b"/v1/chat/completions" if chat else b"/v1/completions"
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (path, len(body))

    async def read_one() -> tuple[int, bool]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        num, tail = 0, b""
        while data := await reader.read(1 << 16):
            num += data.count(b"data: {")
            tail = (tail + data)[-64:]
        writer.close()
        return num, b"data: [DONE]" in tail

    async def read_all() -> list[tuple[int, bool]]:
        return await asyncio.gather(*(read_one() for _ in range(streams)))

    results = asyncio.run(read_all())
    sending.send((sum(num for num, _ in results), sum(ended for _, ended in results)))


def _wait_ready(core: FakeCore, port: int) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        core.serve(until_s=0.05)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=1).close()
        except OSError:
            continue
        return
    raise SystemExit("the frontend did not start")


@click.command(help=__doc__)
@click.option("--streams", default="64,256", help="Numbers of concurrent streams.")
@click.option("--step-ms", default="20,5,1", help="Times between two tokens of a stream.")
@click.option("--steps", default=200, help="Tokens a stream.")
@click.option("--chat/--completions", default=True, help="Which endpoint.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a run.")
def main(streams: str, step_ms: str, steps: int, chat: bool, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as runtime_dir:
        listener = Listener("127.0.0.1", 0)
        options = config.Options(
            runtime_dir=runtime_dir,
            port=listener.port,
            served_model_name=[_MODEL],
            access_log=False,
            log_level="warning",
        )
        path = config.write(resolve(options))
        (fd,) = listener.descriptors()
        core = FakeCore(runtime_dir)
        command = [*python_module("cableway.frontend.main"), "--config", path, "--listen-fd", str(fd)]
        frontend = subprocess.Popen(command, pass_fds=[fd])
        try:
            _wait_ready(core, listener.port)
            timings = [
                measure(core, frontend.pid, listener.port, int(num), float(each_ms), steps, chat)
                for num in streams.split(",")
                for each_ms in step_ms.split(",")
            ]
        finally:
            frontend.kill()
            frontend.wait()
            core.close()
            listener.close()
    _show(timings, as_json)


def _show(timings: list[Timing], as_json: bool) -> None:
    if as_json:
        for timing in timings:
            click.echo(json.dumps(msgspec.to_builtins(timing) | {"tokens_a_cpu_second": timing.tokens_a_cpu_second}))
        return
    headings = "streams", "step ms", "tokens/s", "events/token", "CPU µs/token", "tokens/CPU s", "CPU µs/request"
    table = Table(*headings, f"≤ {AIM_US} µs")
    for timing in timings:
        table.add_row(
            str(timing.streams),
            f"{timing.step_ms:g}",
            f"{timing.tokens / timing.wall_s:,.0f}",
            f"{timing.chunks:.2f}",
            f"{timing.cpu_us:.1f}",
            f"{timing.tokens_a_cpu_second:,.0f}",
            f"{timing.request_us:,.0f}",
            "yes" if timing.cpu_us <= AIM_US else "no",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
