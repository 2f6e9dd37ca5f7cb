"""Whole servers: which processes there are, and the folder, lock and sockets they share."""

import atexit
import contextlib
import itertools
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from cableway.ipc import config as configuration
from cableway.ipc import log as logging
from cableway.ipc import runtime
from cableway.ipc.child import Child, python_module
from cableway.ipc.config import Config, Options
from cableway.ipc.errors import UserError
from cableway.ipc.listen import Listener
from cableway.ipc.notify import activated_fds
from cableway.ipc.reload import Reloader, with_port
from cableway.ipc.resolve import resolve
from cableway.ipc.supervise import Supervisor

MODULES = {
    "frontend": "cableway.frontend.main",
    "enginecore": "cableway.enginecore.main",
    "worker": "cableway.workers.main",
}
_OFFLINE_DRAIN_S = 2.0
_engine_numbers = itertools.count()


def serve(options: Options, show: Callable[[str], None], reread: Callable[[dict[str, Any]], Options]) -> int:
    """Run a server in the foreground until a signal stops it; the exit code (see `ipc.errors`).

    SIGTERM and SIGINT drain it, SIGHUP replaces its processes one by one.

    Args:
        options: what the user asked for.
        show: prints a line for the user.
        reread: what the user asks for now, with some flags over the former ones.

    Raises:
        AddressError, RuntimeFolderError: another server is there already.
        EngineError: a process could not be started, or not be kept alive.
        ConfigError, ModelError: the options or the model are wrong.
    """
    with contextlib.closing(Listener(options.host, options.port, options.uds)) as listener:
        config = resolve(with_port(options, listener.port))
        log = logging.setup("supervisor", level=config.supervisor.log.level, as_json=config.supervisor.log.as_json)
        for note in config.notes:
            log.info("chosen", note=note)
        with _runtime_folder(config) as config_path:
            supervisor = Supervisor(
                config.supervisor,
                config_path,
                [*_frontends(config, listener), *_engine(config)],
                log=log,
                url=listener.url,
                on_ready=lambda: show(_welcome(config, listener)),
                reconfigure=Reloader(options, listener.port, config, reread).reconfigure,
            )
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: supervisor.stop())
            signal.signal(signal.SIGHUP, lambda *_: supervisor.restart())
            exit_code = supervisor.run()
        if supervisor.failure:
            raise EngineError(supervisor.failure, exit_code)
        return exit_code


def become(role: str, rank: int, options: Options, listen_fds: Sequence[int] = ()) -> NoReturn:
    """Turn this process into one of a server's processes, watched by an outside supervisor; it drains on SIGTERM.

    Every one resolves the same options to the same runtime folder, where they find each other in any order.

    Args:
        listen_fds: listening sockets that a frontend inherits; those of systemd's socket activation come by themselves.

    Raises:
        RuntimeFolderError: a server, or another process of this role and rank, is there already.
        ConfigError, ModelError: the options or the model are wrong.
    """
    config = resolve(options)
    lock = runtime.Lock(Path(config.supervisor.runtime_dir), f"{role}-{rank}")
    command = [*python_module(MODULES[role]), "--rank", str(rank), "--config", configuration.write(config)]
    for fd in [*listen_fds, *activated_fds()]:
        os.set_inheritable(fd, True)
        command += ["--lent-sockets", "--listen-fd", str(fd)]
    lock.keep_over_exec()
    os.execv(command[0], command)


class EngineError(UserError):
    """A process could not be started or kept alive; the text says why."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


class EngineProcesses:
    """Core and workers of one engine, kept alive from a background thread of a synchronous program.

    They listen in a runtime folder of their own, `config` tells where, and end with `close`, or with the program
    however that ends. Children are started as programs, so a script needs no `__main__` guard.

    Args:
        options: as for a server; what concerns HTTP is not used.

    Raises:
        EngineError: a process failed before all were ready, with what it said.
        ConfigError, ModelError: the options or the model are wrong.
    """

    def __init__(self, options: Options):
        folder = options.runtime_dir or str(runtime.base_folder() / f"llm-{os.getpid()}-{next(_engine_numbers)}")
        drain_timeout_s = min(options.drain_timeout_s, _OFFLINE_DRAIN_S)
        options = msgspec.structs.replace(
            options, runtime_dir=folder, drain_timeout_s=drain_timeout_s, frontends=1, standby=False
        )
        self.config = resolve(options, is_watched=False)
        self._settled = threading.Event()
        self._supervisor: Supervisor | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._settled.wait()
        if self._failure is not None:
            self.close()
            raise self._failure

    @property
    def failure(self) -> BaseException | None:
        """Why the processes ended by themselves; None as long as they are kept alive."""
        return self._failure

    def close(self) -> None:
        """Stop the processes and wait for their end; the second time does nothing."""
        if self._supervisor is not None:
            self._supervisor.stop()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            settings = self.config.supervisor.log
            log = logging.private("supervisor", level=settings.level, as_json=settings.as_json)
            with _runtime_folder(self.config) as config_path:
                self._supervisor = Supervisor(
                    self.config.supervisor, config_path, _engine(self.config), log=log, on_ready=self._settled.set
                )
                exit_code = self._supervisor.run()
                if self._supervisor.failure:
                    self._failure = EngineError(self._supervisor.failure, exit_code)
        except BaseException as error:  # told to the thread that waits for it
            self._failure = error
        finally:
            self._settled.set()


def _frontends(config: Config, listener: Listener) -> list[Child]:
    ranks = range(config.supervisor.frontends)
    command = python_module(MODULES["frontend"])
    return [Child("frontend", rank, command, listen_fds=listener.descriptors(), overlaps=True) for rank in ranks]


def _engine(config: Config) -> list[Child]:
    engine = config.core.engine
    workers = range(config.supervisor.workers)
    return [
        Child("enginecore", 0, python_module(MODULES["enginecore"]), engine=engine),
        *(Child("worker", rank, python_module(MODULES["worker"]), engine=engine) for rank in workers),
    ]


@contextlib.contextmanager
def _runtime_folder(config: Config) -> Iterator[str]:
    """The runtime folder, locked, clean, with `config.json` in it, whose path is given; removed at the end."""
    folder = Path(config.supervisor.runtime_dir)
    lock = runtime.Lock(folder)
    try:
        runtime.clean(folder)
        runtime.announce(folder)
        yield configuration.write(config)
    finally:
        lock.remove_folder()


def _welcome(config: Config, listener: Listener) -> str:
    """What is printed when the server is ready: its address, and a request to try."""
    name = next(iter(config.frontend.engines))
    body = {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    command = ["curl", *(["--unix-socket", listener.uds] if listener.uds else [])]
    command.append(f"{'http://localhost' if listener.uds else listener.url}/v1/chat/completions")
    command += ["-H", "Content-Type: application/json"]
    if config.frontend.api_key:
        command += ["-H", "Authorization: Bearer YOUR_KEY"]
    command += ["-d", msgspec.json.encode(body).decode()]
    return f"Cableway serves {name} at {listener.url}\nTry:  {shlex.join(command)}"
