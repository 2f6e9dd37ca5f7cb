"""Listening sockets: claimed by the supervisor before anything starts, and inherited by its frontends."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from cableway.ipc import runtime
from cableway.ipc.errors import EXIT_IN_USE, UserError

BACKLOG = 4096
"""Connections that may wait to be taken; one more asks again after a second, as TCP does."""
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}


class AddressError(UserError):
    """The address cannot be listened on."""

    exit_code = EXIT_IN_USE


class Listener:
    """Sockets that listen on one host and port (one a family where the host has several), or on one Unix path.

    Args:
        host, port: where to listen; port 0 takes any free one.
        uds: path of a Unix socket in place of host and port; only this user may connect to it.

    Raises:
        AddressError: somebody else listens there, or it is no address of this machine.
    """

    def __init__(self, host: str, port: int, uds: str = ""):
        self.host = host
        self.uds = uds
        self.sockets = [_unix_socket(uds)] if uds else _tcp_sockets(host, port)
        self.port = 0 if uds else self.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        if self.uds:
            return f"unix:{self.uds}"
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{_WILDCARDS.get(self.host, shown)}:{self.port}"

    def descriptors(self) -> list[int]:
        """For the processes that are to inherit them."""
        return [each.fileno() for each in self.sockets]

    def close(self) -> None:
        for each in self.sockets:
            each.close()
        if self.uds:
            Path(self.uds).unlink(missing_ok=True)


def _tcp_sockets(host: str, port: int) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise AddressError(f"host {host!r}: no such address") from None
    sockets: list[socket.socket] = []
    refusal: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            sockets.append(_listening(family, (address[0], port, *address[2:])))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                _close(sockets)
                raise AddressError(_refusal(host, port, error)) from None
            refusal = error  # a family this machine knows by name only; another may do
        else:
            port = sockets[0].getsockname()[1]
    if not sockets:
        raise AddressError(_refusal(host, port, refusal or OSError(errno.EADDRNOTAVAIL, "no such address")))
    return sockets


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(BACKLOG)  # two sockets may bind with SO_REUSEADDR; only one may listen
    except OSError:
        opened.close()
        raise
    return opened


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another program; choose one with --port"
    return f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}"


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def _unix_socket(path: str) -> socket.socket:
    if len(os.fsencode(path)) > runtime.MAX_SOCKET_PATH_BYTES:
        raise AddressError(f"uds {path}: longer than {runtime.MAX_SOCKET_PATH_BYTES} bytes")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressError(f"uds {path}: there is something else in its place")
        if runtime.answers(Path(path)):
            raise AddressError(f"uds {path} is taken by another program")
        os.unlink(path)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    earlier = os.umask(0o177)  # the socket's file is never open to others, not even for a moment
    try:
        opened.bind(path)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise AddressError(f"uds {path}: {error.strerror}") from None
    finally:
        os.umask(earlier)
    return opened
