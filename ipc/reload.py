"""`cableway reload`: what has changed in the configuration, and which processes have to be replaced for it."""

from collections.abc import Callable
from typing import Any

import msgspec

from cableway.ipc import config as configuration
from cableway.ipc.config import Config, Options, SupervisorConfig
from cableway.ipc.resolve import resolve

_SLICES = {"worker": "worker", "enginecore": "core", "frontend": "frontend"}
_FIXED = {
    "host": "the listening socket stays open",
    "port": "the listening socket stays open",
    "uds": "the listening socket stays open",
    "runtime_dir": "the processes meet there",
    "frontends": "their number is that of the start",
    "model": "requests under way could not go on with another model",
    "load_format": "requests under way could not go on with another model",
    "seed": "requests under way could not go on with another model",
    "log_level": "the supervisor logs too",
    "log_format": "the supervisor logs too",
}
"""Options that only a stop and a new start can change, and why."""


class Change:
    """A configuration that has been written for whoever is started from now on.

    Attributes:
        roles: whose processes have to be replaced for it to be in force.
        notes: what is changed and what is not, a line each.
    """

    def __init__(self, config: Config, roles: list[str], notes: list[str], undo: Callable[[], None]):
        self.config: SupervisorConfig = config.supervisor
        self.roles = roles
        self.notes = notes
        self.undo = undo


class Reloader:
    """Compares what the user asks for now with what the server runs with.

    Args:
        options: as the user gave them at the start.
        port: the one listened on, where the options leave it open.
        config: what they were resolved to.
        reread: what the user asks for now, with some flags over the former ones.
    """

    def __init__(self, options: Options, port: int, config: Config, reread: Callable[[dict[str, Any]], Options]):
        self._options = options
        self._port = port
        self._config = config
        self._reread = reread
        self._flags: dict[str, Any] = {}

    def reconfigure(self, flags: dict[str, Any]) -> Change:
        """Write the configuration as it is to be from now on.

        Raises:
            ConfigError, ModelError: the options are wrong; nothing has changed.
        """
        flags = self._flags | flags
        wanted = self._reread(flags)
        changed = [name for name in Options.__struct_fields__ if getattr(wanted, name) != getattr(self._options, name)]
        kept = [name for name in changed if self._is_fixed(name, wanted)]
        options = msgspec.structs.replace(wanted, **{name: getattr(self._options, name) for name in kept})
        config = resolve(with_port(options, self._port))
        roles = [role for role, name in _SLICES.items() if getattr(config, name) != getattr(self._config, name)]
        notes = [self._note(name, wanted, name in kept) for name in changed]
        if not changed and not roles:
            notes.append("nothing has changed")
        former = self._flags, self._options, self._config

        def undo() -> None:
            self._keep(*former)

        # A flag that was refused once is not one for later.
        self._keep({name: value for name, value in flags.items() if name not in kept}, options, config)
        return Change(config, roles, notes, undo)

    def _keep(self, flags: dict[str, Any], options: Options, config: Config) -> None:
        self._flags, self._options, self._config = flags, options, config
        configuration.write(config)

    def _is_fixed(self, name: str, wanted: Options) -> bool:
        return name in _FIXED or (name == "max_model_len" and self._shortens(wanted))

    def _shortens(self, wanted: Options) -> bool:
        return 0 < wanted.max_model_len < self._config.core.max_model_len

    def _note(self, name: str, wanted: Options, is_kept: bool) -> str:
        if name == "api_key":
            return "api_key: changed"  # never shown
        before, after = (msgspec.json.encode(getattr(options, name)).decode() for options in (self._options, wanted))
        if not is_kept:
            return f"{name}: {before} -> {after}"
        why = _FIXED.get(name, "requests under way may be longer")
        if not getattr(self._options, name):  # what was chosen for the user
            before = getattr(self._config.supervisor, name, getattr(self._config.core, name, before))
        return f"{name}: stays {before}, not {after}: {why}; stop and start the server to change it"


def with_port(options: Options, port: int) -> Options:
    """The options with the port that is listened on, which they may leave open."""
    return options if options.uds else msgspec.structs.replace(options, port=port)
