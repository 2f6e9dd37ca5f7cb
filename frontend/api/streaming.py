"""Server-sent events of a generation."""

import asyncio
from collections.abc import Callable
from typing import cast

import structlog
from aiohttp import web

from cableway.frontend import sse
from cableway.frontend.api.generation import Generation
from cableway.frontend.connection import Connection
from cableway.frontend.errors import RequestError
from cableway.frontend.keys import REQUEST_ID
from cableway.frontend.text import Delta

log = structlog.get_logger()


async def stream(
    request: web.Request, generation: Generation, chunk: Callable[[Delta], bytes], ending: Callable[[], bytes]
) -> web.StreamResponse:
    """Send deltas as events, then `ending()`; an error after the first is told as an event.

    Headers wait for the first deltas, so that a request which the engine refuses still gets a status of its own.
    """
    deltas = await generation.next_deltas()
    response = web.StreamResponse(headers=sse.HEADERS)
    await response.prepare(request)
    try:
        await response.write(b"".join(map(chunk, deltas)))
        await _Pump(request, response, generation, chunk).run()
        last_words = ending()
    except ConnectionError:
        raise
    except RequestError as error:
        generation.failed()
        last_words = sse.event(error.body())
    except Exception:
        generation.failed()
        log.exception("stream_failed", request_id=request[REQUEST_ID])
        told = RequestError(500, "Internal error.", type="server_error", code="internal_error")
        last_words = sse.event(told.body())
    await response.write_eof(last_words + sse.DONE)
    return response


class _Pump:
    """Writes events as tokens come, from the very callback that says so: no task is woken for a token.

    While the client's connection takes no more, tokens wait in the mailbox and go out in one event later.

    PERF: TODO
    """

    __slots__ = ("_chunk", "_connection", "_ended", "_generation", "_is_chunked", "_job", "_transport")

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        generation: Generation,
        chunk: Callable[[Delta], bytes],
    ):
        self._connection = cast(Connection, request.protocol)
        self._transport = cast(asyncio.Transport, request.transport)
        self._generation = generation
        self._job = generation.job
        self._chunk = chunk
        self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until every choice has ended; raises what the generation raises."""
        self._job.notify(self._push)
        self._connection.on_writable = self._push
        try:
            self._push()
            await self._ended
        finally:
            self._job.notify(None)
            self._connection.on_writable = None

    def _push(self) -> None:
        if self._connection.is_unread or self._transport.is_closing() or self._ended.done():
            return
        try:
            payload = b"".join(map(self._chunk, self._generation.take(self._job.collect())))
            if payload:
                # aiohttp's writer has sent the headers, and will end the body: between them its framing is ours.
                self._transport.write(b"%x\r\n%b\r\n" % (len(payload), payload) if self._is_chunked else payload)
        except Exception as error:
            self._ended.set_exception(error)
            return
        if self._job.has_ended:
            self._ended.set_result(None)
