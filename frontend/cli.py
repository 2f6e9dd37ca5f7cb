"""`cableway …`: reads flags, starts what is asked for, and imports nothing before it is needed.

The flags are the fields of `Options`, so that a flag, a key of a config file and a keyword of `LLM` are one thing.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import click
import msgspec

import cableway
from cableway.ipc import config as configuration
from cableway.ipc.config import Options
from cableway.ipc.errors import UserError

if TYPE_CHECKING:
    from cableway.ipc.control import Processes, Reload, Restart

_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


def main() -> NoReturn:
    """Entry point of the console script: what a user can mend ends in one line and an exit code."""
    try:
        commands.main(prog_name="cableway", standalone_mode=True)
    except UserError as error:
        click.echo(f"cableway: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(cableway.__version__, prog_name="cableway")
def commands() -> None:
    """An LLM inference engine of separate processes, with the OpenAI API."""


# ---------------------------------------------------------------------------------------------------------------------
# Servers


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command MODEL, `--config` and one flag a field of `Options`; those not given are left out."""
    for field in reversed(msgspec.inspect.type_info(Options).fields):  # type: ignore[attr-defined]
        command = _flag(field)(command)
    command = click.option("--config", type=click.Path(), help="TOML file with these names; flags win over it.")(
        command
    )
    return click.argument("model_argument", metavar="[MODEL]", required=False)(command)


def _flag(field: msgspec.inspect.Field) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    metadata = field.type
    assert isinstance(metadata, msgspec.inspect.Metadata)
    name = field.name.replace("_", "-")
    default = "" if field.default in (msgspec.NODEFAULT, "") else f"  [{field.default}]"
    settings: dict[str, Any] = {
        "default": None,
        "help": f"{(metadata.extra_json_schema or {})['description']}{default}",
    }
    match metadata.type:
        case msgspec.inspect.BoolType():
            name = f"{name}/--no-{name}"
        case msgspec.inspect.ListType():
            settings |= {"multiple": True}
        case msgspec.inspect.IntType():
            settings |= {"type": int}
        case msgspec.inspect.FloatType():
            settings |= {"type": float}
        case msgspec.inspect.StrType(pattern=str(pattern)) if pattern.startswith("^("):
            settings |= {"type": click.Choice(pattern[2:-2].split("|"))}
    return click.option(f"--{name}", field.name, **settings)


def _options(config: str | None, model_argument: str | None, flags: dict[str, Any]) -> Options:
    """The config file's values under the flags'."""
    from_file = configuration.read_toml(config) if config else {}
    values = {name.replace("-", "_"): value for name, value in from_file.items()}
    values |= {name: value for name, value in flags.items() if value is not None and value != ()}
    if model_argument is not None:
        values["model"] = model_argument
    return configuration.options({name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})


@commands.command()
@_with_options
def serve(config: str | None, model_argument: str | None, **flags: Any) -> None:
    """Serve MODEL (an alias, .gguf file, folder or hub id) until SIGTERM or Ctrl-C.

    Starts and watches one engine core, its workers and the frontends; prints its address when it is ready.
    """
    from cableway.ipc.server import serve as run

    def reread(changed: dict[str, Any]) -> Options:
        return _options(config, model_argument, flags | changed)

    sys.exit(run(_options(config, model_argument, flags), click.echo, reread))


def _alone(role: str, what: str) -> None:
    @commands.command(role, help=f"Run {what} alone, for an outside supervisor. Start the roles in any order.")
    @click.option("--rank", type=click.IntRange(0), default=0, help="Which of the processes of this role.  [0]")
    @_with_options
    def command(
        rank: int, config: str | None, model_argument: str | None, listen_fd: tuple[int, ...] = (), **flags: Any
    ) -> None:
        from cableway.ipc.server import become

        become(role, rank, _options(config, model_argument, flags), listen_fd)

    if role == "frontend":
        inherited = click.Option(
            ["--listen-fd"], type=click.IntRange(0), multiple=True, help="Listening socket that is inherited."
        )
        command.params.insert(0, inherited)


_alone("frontend", "one HTTP frontend")
_alone("enginecore", "the engine core")
_alone("worker", "one worker")


# ---------------------------------------------------------------------------------------------------------------------
# Servers that run


def _which_server(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags that choose among this user's servers."""
    command = click.option("--pid", type=int, help="The server with this process.")(command)
    return click.option("--port", type=int, help="The server that listens on this port.")(command)


def _servers(port: int | None, pid: int | None) -> "list[tuple[Path, Processes]]":
    """Runtime folder and processes of the servers that fit."""
    from cableway.ipc import control, runtime

    found = []
    for folder in runtime.live_folders():
        answer = control.ask(folder)
        if answer is None:
            click.echo(f"cableway: the supervisor of {folder} does not answer", err=True)
        elif port in (None, urlsplit(answer.url).port) and (
            pid is None or pid in [process.pid for process in answer.processes]
        ):
            found.append((folder, answer))
    return found


def _one_server(port: int | None, pid: int | None) -> Path:
    """Runtime folder of the one server that fits; UserError when there is none, or more than one."""
    found = _servers(port, pid)
    if not found:
        which = f" on port {port}" * (port is not None) + f" with process {pid}" * (pid is not None)
        raise UserError(f"no server of yours runs{which}; see `cableway ps`")
    if len(found) > 1:
        shown = ", ".join(f"{answer.url} (pid {answer.processes[0].pid})" for _, answer in found)
        raise UserError(f"{len(found)} servers of yours run: {shown}; choose one with --port or --pid")
    return found[0][0]


def _carry_out(folder: Path, question: "Restart | Reload") -> None:
    from cableway.ipc import control

    if failure := control.carry_out(folder, question, click.echo):
        raise UserError(failure)


@commands.command()
@click.argument("role", type=click.Choice(["frontend", "enginecore", "worker", "all"]))
@_which_server
def restart(role: str, port: int | None, pid: int | None) -> None:
    """Replace the processes of ROLE one by one, without losing a request."""
    from cableway.ipc.control import Restart

    _carry_out(_one_server(port, pid), Restart("" if role == "all" else role))


@commands.command()
@_which_server
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def reload(port: int | None, pid: int | None, flags: tuple[str, ...]) -> None:
    """Apply what has changed in the config file, by replacing the processes that it concerns one by one.

    FLAGS of `cableway serve`, given after `--`, win over those that the server was started with.
    """
    from cableway.ipc.control import Reload

    given = serve.make_context("cableway reload --", list(flags)).params
    if given.pop("config") is not None:
        raise click.UsageError("the config file stays the one that the server was started with")
    if given.pop("model_argument") is not None:
        raise click.UsageError("another model is served by another server")
    changed = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v not in (None, ())}
    _carry_out(_one_server(port, pid), Reload(changed))


@commands.command()
@_which_server
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of objects.")
def ps(as_json: bool, port: int | None, pid: int | None) -> None:
    """List the processes of this user's servers."""
    rows: list[dict[str, Any]] = []
    for _, answer in _servers(port, pid):
        rows += [msgspec.structs.asdict(process) | {"url": answer.url} for process in answer.processes]
    click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2) if as_json else _table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [("URL", "ROLE", "ENGINE", "RANK", "PID", "UPTIME", "RESTARTS", "STATE")]
    for row in rows:
        uptime = f"{row['uptime_s']:.0f} s"
        shown = (row["url"], row["role"], row["engine"], row["rank"], row["pid"], uptime, row["restarts"], row["state"])
        lines.append(tuple(str(value) for value in shown))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Commands that live in other modules, each as `command`


@commands.group()
def bench() -> None:
    """Measure."""


def _elsewhere(group: click.Group, name: str, module: str, what: str) -> None:
    @group.command(name, help=what, add_help_option=False, context_settings=_PASS_ON)
    @click.pass_context
    def command(context: click.Context) -> None:
        found: click.Command = importlib.import_module(module).command
        alike: dict[str, Any] = {
            "help_option_names": context.help_option_names,
            "max_content_width": context.max_content_width,
        }
        found.main(args=context.args, prog_name=context.command_path, **alike)


_elsewhere(commands, "chat", "cableway.frontend.chat", "Talk with a model in this terminal.")
_elsewhere(commands, "models", "cableway.workers.listing", "List the architectures that can be loaded.")
_elsewhere(commands, "tune", "cableway.bench.tune", "Measure configurations of kernels on this machine's GPU.")
_elsewhere(bench, "kernels", "cableway.bench.kernels", "Time every kernel beside what the machine can copy.")
_elsewhere(bench, "offline", "cableway.bench.offline", "Time the engine without HTTP.")
_elsewhere(bench, "overhead", "cableway.bench.overhead", "Compare a token over HTTP with the step that makes it.")
_elsewhere(bench, "serve", "cableway.bench.serve", "Load any OpenAI server and time its answers.")
_elsewhere(bench, "step", "cableway.bench.step", "Show where the time of a step goes.")
