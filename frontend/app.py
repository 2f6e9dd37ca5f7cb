"""The aiohttp application of a frontend process, and the server around it."""

import asyncio
import socket
from collections.abc import Sequence

from aiohttp import web

from cableway.frontend import guard, keys
from cableway.frontend.admission import Admission
from cableway.frontend.api import admin, chat, completions, models, sleep, tokenize
from cableway.frontend.client import EngineClient
from cableway.frontend.connection import OpenConnections, connection_factory
from cableway.frontend.errors import RequestError
from cableway.frontend.metrics import Metrics
from cableway.frontend.served import ServedModel
from cableway.ipc.config import FrontendConfig
from cableway.ipc.listen import BACKLOG

ENDPOINTS = (chat, completions, models, tokenize, admin)
"""One module an endpoint family, each with its `routes`."""

_ABORT_GRACE_S = 2.0


def make_app(
    config: FrontendConfig, engine: EngineClient, served: dict[str, ServedModel], metrics: Metrics
) -> web.Application:
    """All routes, behind all checks. The engine's client has been started."""
    app = web.Application(middlewares=guard.MIDDLEWARES, client_max_size=config.max_body_bytes)
    app[keys.CONFIG] = config
    app[keys.ENGINE] = engine
    app[keys.MODELS] = served
    app[keys.METRICS] = metrics
    app[keys.ADMISSION] = Admission()
    app.on_response_prepare.append(guard.add_headers)
    for endpoint in ENDPOINTS:
        app.add_routes(endpoint.routes)
    if config.enable_sleep_mode:
        app.add_routes(sleep.routes)
    return app


class Server:
    """An application that listens on sockets made elsewhere."""

    def __init__(self, app: web.Application, sockets: Sequence[socket.socket]):
        self._app = app
        self._sockets = sockets
        self._config = app[keys.CONFIG]
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,  # a client that leaves cancels its handler, and that its choices
            keepalive_timeout=self._config.idle_timeout_s,
            access_log=None,
            auto_decompress=False,
            shutdown_timeout=_ABORT_GRACE_S,
        )
        self._listening: list[asyncio.Server] = []
        self._connections = OpenConnections()

    async def start(self) -> None:
        """Accept connections from now on."""
        await self._runner.setup()
        assert self._runner.server is not None
        factory = connection_factory(
            self._runner.server,
            header_timeout_s=self._config.header_timeout_s,
            unread_timeout_s=self._config.idle_timeout_s,
            open_connections=self._connections,
            keepalive_timeout=self._config.idle_timeout_s,
            access_log=None,
            auto_decompress=False,
        )
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            if listening.family == socket.AF_UNIX:
                self._listening.append(await loop.create_unix_server(factory, sock=listening, backlog=BACKLOG))
            else:
                self._listening.append(await loop.create_server(factory, sock=listening, backlog=BACKLOG))

    def accept_no_more(self) -> None:
        """Leave new connections to whoever else has the listening sockets."""
        for listening in self._listening:
            listening.close()

    async def retire(self) -> None:
        """Take no more connections, and serve those there are until each has closed.

        An answer tells its client that it is the connection's last. A connection is never closed that a request may be
        on its way over: idle ones close when they have been idle for too long, as always.
        """
        self._app[keys.ADMISSION].is_retiring = True
        self.accept_no_more()
        await self._connections.wait_none()

    async def drain(self, deadline_s: float) -> None:
        """Refuse new requests with 503, let running ones end, give those left shortly before the deadline an error."""
        admission = self._app[keys.ADMISSION]
        if not await admission.drain(deadline_s - min(_ABORT_GRACE_S, deadline_s / 4)):
            self.abort()
            await admission.drain(_ABORT_GRACE_S)

    def abort(self) -> None:
        """Give every running request an error at once."""
        self._app[keys.ENGINE].fail_all(
            RequestError(503, "The server is shutting down.", type="server_error", code="shutting_down")
        )

    async def stop(self) -> None:
        """Close every socket."""
        self.accept_no_more()
        await self._runner.cleanup()
