"""Who is let in and what they are told when not: request ids, errors, origins, hosts, keys, log lines.

A server without a key on the loopback address can be reached by any web page in the user's browser. Hence two checks
that need no configuration: a request that a page of another origin makes is refused, and so is one whose Host is a name
that this server does not go by (a page can point its own name at 127.0.0.1).
"""

import functools
import hmac
import ipaddress
import re
import secrets
import time

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from cableway.frontend.errors import RequestError
from cableway.frontend.keys import ADMISSION, CONFIG, FACTS, REQUEST_ID
from cableway.ipc.config import FrontendConfig

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key."""
DRAINING_PATHS = frozenset({"/health", "/metrics", "/version"})
"""Answered while draining."""
CLIENT_LEFT_STATUS = 499
"""In the log: the client closed its connection before the answer was complete."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_BEARER = re.compile(r"Bearer +(\S+)", re.IGNORECASE)

log = structlog.get_logger()


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: gives the request its id, turns errors into OpenAI's body, writes the log line."""
    given_id = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = given_id if _REQUEST_ID.fullmatch(given_id) else secrets.token_hex(16)
    request[FACTS] = {}
    began_s = time.perf_counter()
    status = CLIENT_LEFT_STATUS
    try:
        response = await _answered(request, handler)
        status = response.status
        return response
    finally:
        if request.app[CONFIG].access_log:
            log.info(
                "request",
                method=request.method,
                path=request.path,
                status=status,
                seconds=round(time.perf_counter() - began_s, 6),
                request_id=request[REQUEST_ID],
                remote=request.remote,
                **request[FACTS],
            )


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return error_response(error)
    except web.HTTPNotFound:
        return error_response(RequestError(404, f"Unknown route: {request.method} {request.path}", code="not_found"))
    except web.HTTPMethodNotAllowed as error:
        told = RequestError(405, f"{request.path} does not take {request.method}.", code="method_not_allowed")
        return error_response(told, {"Allow": ", ".join(sorted(error.allowed_methods))})
    except web.HTTPException as error:
        return error_response(RequestError(error.status, error.reason))
    except ConnectionError:
        raise  # the client is gone: there is nobody to tell
    except Exception:
        log.exception("handler_failed", path=request.path, request_id=request[REQUEST_ID])
        return error_response(RequestError(500, "Internal error.", type="server_error", code="internal_error"))


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> web.Response:
    """OpenAI's error body as a response."""
    return web.Response(
        status=error.status,
        body=error.body(),
        content_type="application/json",
        headers={**error.headers(), **(headers or {})},
    )


@web.middleware
async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """403 for a web page of an origin, or a Host, that is not ours; answers the preflights of those allowed."""
    config = request.app[CONFIG]
    host = request.headers.get("Host", "")
    if not config.uds and host and not is_own_host(host, config):
        raise RequestError(
            403,
            f"This server does not go by the name `{_name_of(host)}`: see --allowed-hosts.",
            code="host_not_allowed",
        )
    origin = request.headers.get("Origin")
    if origin is not None and not _is_allowed_origin(origin, host, config):
        raise RequestError(403, "Origin not allowed: see --allowed-origins.", code="origin_not_allowed")
    if request.method == "OPTIONS" and origin is not None and "Access-Control-Request-Method" in request.headers:
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
                "Access-Control-Max-Age": "600",
            },
        )
    return await handler(request)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal before any response's headers leave: request id, CORS."""
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    response.headers["Server"] = "cableway"
    config = request.app[CONFIG]
    origin = request.headers.get("Origin")
    if origin is not None and ("*" in config.allowed_origins or origin in config.allowed_origins):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        response.headers["Vary"] = "Origin"
    if request.app[ADMISSION].is_draining or request.app[ADMISSION].is_retiring:
        response.force_close()
        response.headers["Connection"] = "close"


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """401 without one of the keys, when there are any; takes as long whichever key was nearly right."""
    keys = request.app[CONFIG].api_key
    if keys and request.path not in OPEN_PATHS:
        bearer = _BEARER.fullmatch(request.headers.get("Authorization", ""))
        given = bearer[1].encode("utf-8", "surrogateescape") if bearer else b""
        if not sum(hmac.compare_digest(given, key.encode()) for key in keys):
            message = "Incorrect API key provided." if bearer else "No API key: send `Authorization: Bearer KEY`."
            raise RequestError(401, message, code="invalid_api_key")
    return await handler(request)


@web.middleware
async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """503 while draining; counts what runs."""
    if request.path in DRAINING_PATHS:
        return await handler(request)
    admission = request.app[ADMISSION]
    admission.enter()
    try:
        return await handler(request)
    finally:
        admission.leave()


def is_own_host(host: str, config: FrontendConfig) -> bool:
    """Whether a Host header names this server: loopback, the address it is bound to, or one it was told of."""
    name = _name_of(host)
    if name in map(str.lower, config.allowed_hosts) or "*" in config.allowed_hosts or name == config.host.lower():
        return True
    address = _address(name)
    if address is None:
        # No name without a dot can be had on the internet: `localhost`, and what containers call each other.
        return "." not in name
    # Whoever is at an address of ours is us; an attacker's page has a name, not our address.
    return address.is_loopback or config.host in ("0.0.0.0", "::", "")


@functools.lru_cache(maxsize=64)  # PERF: 8 µs for a name that is none
def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """`[::1]:8000` -> `::1`, `Example.com:80` -> `example.com`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_allowed_origin(origin: str, host: str, config: FrontendConfig) -> bool:
    if "*" in config.allowed_origins or origin in config.allowed_origins:
        return True
    return bool(host) and origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())


MIDDLEWARES = (answer, check_origin, check_key, admit)
