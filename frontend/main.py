"""A frontend process: HTTP in, messages to the engine core out."""

import asyncio
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

import cableway
from cableway.frontend import served
from cableway.frontend.app import Server, make_app
from cableway.frontend.client import EngineClient
from cableway.frontend.metrics import Metrics
from cableway.ipc import config as configuration
from cableway.ipc import garbage, runtime
from cableway.ipc import log as logging
from cableway.ipc.config import FrontendConfig
from cableway.ipc.errors import UserError
from cableway.ipc.lifeline import Lifeline, child_arguments
from cableway.ipc.listen import Listener

_BEAT_INTERVAL_S = 0.5


def main(argv: Sequence[str]) -> None:
    """Run until drained; see `ipc.lifeline` for the arguments."""
    arguments = child_arguments(argv)
    config = configuration.read(arguments.config_path).frontend
    lifeline = Lifeline(arguments.lifeline_fd, config.patience)
    logging.setup("frontend", arguments.rank, level=config.log.level, as_json=config.log.as_json)
    try:
        models = served.load(config, cableway.__version__)
        sockets = [socket.socket(fileno=fd) for fd in arguments.listen_fds]
        sockets = sockets or Listener(config.host, config.port, config.uds).sockets
    except UserError as error:
        lifeline.give_up(str(error))
    garbage.settle()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, arguments.rank, lifeline, models, sockets, arguments.lent_sockets))


async def _serve(
    config: FrontendConfig,
    rank: int,
    lifeline: Lifeline,
    models: dict[str, served.ServedModel],
    sockets: list[socket.socket],
    lent_sockets: bool,
) -> None:
    loop = asyncio.get_running_loop()
    engine = EngineClient(config, rank)
    await engine.start()
    metrics = Metrics(str(Path(config.runtime_dir) / runtime.METRICS), config.metrics_prefix, engine, config.engines)
    server = Server(make_app(config, engine, models, metrics), sockets)
    drained: asyncio.Future[float] = loop.create_future()
    retired: asyncio.Future[float] = loop.create_future()

    def end(deadline_s: float) -> None:
        if not drained.done():
            drained.set_result(deadline_s)

    def retire(deadline_s: float) -> None:
        if not retired.done():
            retired.set_result(deadline_s)

    def abort() -> None:
        end(0.0)
        server.abort()

    def on_drain(deadline_s: float) -> None:
        loop.call_soon_threadsafe(end, deadline_s)

    def on_retire(deadline_s: float) -> None:
        loop.call_soon_threadsafe(retire, deadline_s)

    def on_abort() -> None:
        loop.call_soon_threadsafe(abort)

    lifeline.on_drain(on_drain)
    lifeline.on_retire(on_retire)
    lifeline.on_abort(on_abort)
    beating = loop.create_task(_beat(lifeline, metrics))
    await server.start()
    lifeline.ready({"port": sockets[0].getsockname()[1] if sockets[0].family != socket.AF_UNIX else 0})
    try:
        watched: list[asyncio.Future[Any]] = [drained, engine.failed, beating]
        await _first_of([*watched, retired])
        if retired.done() and not drained.done():
            leaving = loop.create_task(server.retire())
            await _first_of([*watched, leaving], within_s=retired.result())
            leaving.cancel()
        if lent_sockets:
            server.accept_no_more()
        await server.drain(drained.result() if drained.done() else config.drain_timeout_s)
    finally:
        beating.cancel()
        await server.stop()
        engine.close()


async def _first_of(futures: list[asyncio.Future[Any]], within_s: float | None = None) -> None:
    """Until one of them is done or the time is over; an exception that one ended with is raised here."""
    done, _ = await asyncio.wait(futures, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        future.result()


async def _beat(lifeline: Lifeline, metrics: Metrics) -> None:
    """Tell that the event loop turns. It is never idle: a turn that ends late is one that somebody held up."""
    while True:
        lifeline.beat(share=1.0)  # a long prompt is tokenized in one turn
        metrics.flush()
        await asyncio.sleep(_BEAT_INTERVAL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
