"""A client's connection: aiohttp's, with clocks against clients slow on purpose, and errors in OpenAI's shape."""

import asyncio
import resource
from collections.abc import Callable
from typing import Any

from aiohttp import web

from cableway.frontend.errors import RequestError
from cableway.frontend.guard import error_response

_RESERVED_DESCRIPTORS = 64
"""Left for logs, sockets to the core and files when all others are connections."""
_MAX_DESCRIPTORS = 1 << 16


class OpenConnections:
    """How many connections there are. aiohttp's own list holds some for a while after they have closed."""

    def __init__(self) -> None:
        self._num = 0
        self._none = asyncio.Event()
        self._none.set()

    def enter(self) -> None:
        self._num += 1
        self._none.clear()

    def leave(self) -> None:
        self._num -= 1
        if not self._num:
            self._none.set()

    async def wait_none(self) -> None:
        """Until the last one has closed."""
        await self._none.wait()


class Connection(web.RequestHandler):
    """Closes itself when a request's head takes too long, or when an answer is not read for too long.

    Idle connections are aiohttp's business (`keepalive_timeout`), slow bodies are `read_json`'s.

    Args:
        header_timeout_s: from the first byte of a request's head to its last.
        unread_timeout_s: how long a full send buffer may stay full.
        max_connections: closes itself at once when the server has as many already.
        open_connections: where it is counted.
    """

    __slots__ = (
        "_header_timeout_s",
        "_header_timer",
        "_in_request",
        "_is_one_too_many",
        "_open_connections",
        "_unread_timeout_s",
        "_unread_timer",
        "is_blocked",
        "on_writable",
    )

    def __init__(
        self,
        server: web.Server,
        *,
        header_timeout_s: float,
        unread_timeout_s: float,
        max_connections: int,
        open_connections: OpenConnections,
        **aiohttp_options: Any,
    ):
        super().__init__(server, **aiohttp_options)
        self._is_one_too_many = len(server.connections) >= max_connections
        self._open_connections = open_connections
        self._header_timeout_s = header_timeout_s
        self._unread_timeout_s = unread_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._in_request = False
        self.is_blocked = False
        """Whether nothing can be sent: the client does not read, and the send buffer is full; or it has left."""
        self.on_writable: Callable[[], None] | None = None
        """Called when a full send buffer has emptied."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._open_connections.enter()
        if self._is_one_too_many:
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_blocked = True
        self._header_timer = _cancelled(self._header_timer)
        self._unread_timer = _cancelled(self._unread_timer)
        super().connection_lost(exc)
        self._open_connections.leave()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if data and not self._in_request and self._header_timer is None:
            loop = asyncio.get_running_loop()
            self._header_timer = loop.call_later(self._header_timeout_s, self._refuse_slow_head)

    def request_begins(self) -> None:
        """A request's head is complete."""
        self._in_request = True
        self._header_timer = _cancelled(self._header_timer)

    def log_access(self, request: web.BaseRequest, response: web.StreamResponse, time: float | None) -> None:
        """Called by aiohttp when a response is complete; the log line itself is the middleware's."""
        self._in_request = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_blocked = True
        if self.transport is not None:
            loop = asyncio.get_running_loop()
            self._unread_timer = loop.call_later(self._unread_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread_timer = _cancelled(self._unread_timer)
        super().resume_writing()
        self.is_blocked = False
        if self.on_writable is not None:
            self.on_writable()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP never reaches the application; neither does a client that left amid its answer."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionError("the answer cannot be completed") from exc
        if status >= 500:
            self.log_exception("request outside of the application failed", exc_info=exc)
        response = error_response(
            RequestError(status, message or "The request is not valid HTTP.", code="invalid_http")
        )
        response.headers["Server"] = "cableway"
        response.force_close()
        return response

    def _refuse_slow_head(self) -> None:
        self._header_timer = None
        if self.transport is not None:
            body = RequestError(408, "The request's head did not arrive in time.", code="request_timeout").body()
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            self.force_close()


def connection_factory(server: web.Server, **options: Any) -> Callable[[], Connection]:
    """What to give to `loop.create_server`: makes a `Connection` for each client of an aiohttp server."""
    make_request = server.request_factory

    def request_factory(message: Any, payload: Any, connection: Connection, *rest: Any) -> web.BaseRequest:
        connection.request_begins()
        return make_request(message, payload, connection, *rest)

    server.request_factory = request_factory  # type: ignore[assignment]
    loop = asyncio.get_running_loop()
    max_connections = _raise_descriptor_limit() - _RESERVED_DESCRIPTORS
    return lambda: Connection(server, loop=loop, max_connections=max_connections, **options)


def _raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may have, within reason; returns that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer; returns what stands for none."""
    if timer is not None:
        timer.cancel()
    return None
