"""`cableway chat`: talk with a model in a terminal, on a server that runs or on one started for the occasion."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import click
from rich.console import Console

from cableway.ipc.child import python_module
from cableway.ipc.errors import UserError
from cableway.ipc.lifeline import die_with_parent

_HELP = """\
/system TEXT  set the system message (without TEXT: none), and begin anew
/clear        begin anew
/retry        answer the last message again
/help         show this
/exit         leave; so does Ctrl-D. Ctrl-C stops an answer."""
_CONNECT_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0
_READY = "Cableway serves "


class ChatError(UserError):
    """The server cannot be reached or started, or does not take a message."""


class Server:
    """An OpenAI server, over HTTP or a Unix socket.

    Args:
        base_url: without `/v1`.
        uds: path of a Unix socket to reach it by.
    """

    def __init__(self, base_url: str, api_key: str = "", uds: str = ""):
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._uds = uds

    async def model(self) -> str:
        """The first model it serves."""
        async with self._session() as session, session.get(f"{self._base_url}/v1/models") as response:
            answer = await _checked(response)
            return str(answer["data"][0]["id"])

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed chat completion."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        url = f"{self._base_url}/v1/chat/completions"
        async with self._session() as session, session.post(url, json=body) as response:
            if response.status != 200:
                await _checked(response)
            async for line in response.content:
                event = line.decode().strip()
                if event == "data: [DONE]":
                    return
                if event.startswith("data: "):
                    chunk = json.loads(event.removeprefix("data: "))
                    if "error" in chunk:
                        raise ChatError(chunk["error"]["message"])
                    yield chunk

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(self._uds) if self._uds else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout) as session:
                yield session
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatError(f"{self._base_url}: {error or type(error).__name__}") from None


class Conversation:
    """What was said, and how the next answer is asked for."""

    def __init__(self, server: Server, console: Console, parameters: dict[str, Any], system: str):
        self._server = server
        self._console = console
        self._parameters = parameters
        self._messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Forget everything but the system message, which may be another one."""
        if system is None:
            kept = [message for message in self._messages if message["role"] == "system"]
        else:
            kept = [{"role": "system", "content": system}] if system else []
        self._messages = kept

    def say(self, text: str) -> None:
        """Send a message and show the answer as it comes. One that the server does not take is forgotten."""
        self._messages.append({"role": "user", "content": text})
        self._answer()

    def retry(self) -> None:
        """Have the last message answered again."""
        if self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages and self._messages[-1]["role"] == "user":
            self._answer()

    def _answer(self) -> None:
        parts: list[str] = []
        try:
            asyncio.run(self._show(parts))
        except KeyboardInterrupt:
            self._console.print(" (stopped)", style="dim")
        except ChatError as error:
            self._console.print(f"\n{error}", style="red", markup=False, highlight=False)
        if parts:
            self._messages.append({"role": "assistant", "content": "".join(parts)})
        else:
            self._messages.pop()

    async def _show(self, parts: list[str]) -> None:
        begin_s = time.perf_counter()
        async for chunk in self._server.stream(self._parameters | {"messages": self._messages}):
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    parts.append(text)
                    self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
                if choice["finish_reason"] == "length":
                    self._console.print(" …", end="", style="dim")
            if usage := chunk.get("usage"):
                num, elapsed_s = usage["completion_tokens"], time.perf_counter() - begin_s
                self._console.print(f"\n{num} tokens, {num / elapsed_s:.0f} a second", style="dim", highlight=False)


def _talk(conversation: Conversation, console: Console) -> None:
    """Read lines until the end of input or `/exit`."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its history and editing keys)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                conversation.begin()
            case "/system":
                conversation.begin(rest.strip())
            case "/retry":
                conversation.retry()
            case _ if command.startswith("/"):
                console.print(_HELP, style="dim", markup=False, highlight=False)
            case _:
                conversation.say(line)


@contextlib.contextmanager
def _own_server(arguments: tuple[str, ...], console: Console) -> Iterator[Server]:
    """A server for this conversation alone, on a socket that only this user can reach."""
    with tempfile.TemporaryDirectory(prefix="cableway-chat-") as name:
        folder = Path(name)
        uds = str(folder / "http.sock")
        quiet = ("--uds", uds, "--log-level", "error", "--no-access-log")
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*python_module("cableway"), "serve", *quiet, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the answer, not for the server
                preexec_fn=die_with_parent,
            )
        try:
            assert process.stdout is not None
            with console.status("Starting the engine …"):
                first_line = process.stdout.readline().decode()
            if not first_line.startswith(_READY):
                process.wait()
                last_words = (folder / "stderr").read_text(errors="replace").strip()
                raise ChatError(last_words.rpartition("\n")[2].removeprefix("cableway: ") or "the server did not start")
            yield Server("http://localhost", uds=uds)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


@click.command(
    "chat",
    context_settings={"ignore_unknown_options": True},
    epilog="Without --url, MODEL and any flags of `cableway serve` say what is started.",
)
@click.option("--url", default="", help="A running OpenAI server, such as http://127.0.0.1:8000.")
@click.option("--api-key", default="", help="Key for that server.")
@click.option("--served-model", default="", help="Which of that server's models; the first by default.")
@click.option("--system", default="", help="System message.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 = always the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.argument("serve_arguments", metavar="[MODEL] [FLAGS]", nargs=-1, type=click.UNPROCESSED)
def command(
    url: str,
    api_key: str,
    served_model: str,
    system: str,
    temperature: float | None,
    max_tokens: int | None,
    serve_arguments: tuple[str, ...],
) -> None:
    """Talk with a model in this terminal."""
    console = Console()
    with contextlib.ExitStack() as stack:
        if url:
            if serve_arguments:
                raise click.UsageError(f"{serve_arguments[0]}: a server that runs has its model and flags already")
            server = Server(url, api_key)
        else:
            server = stack.enter_context(_own_server(serve_arguments, console))
        model = served_model or asyncio.run(server.model())
        chosen = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        parameters = {name: value for name, value in chosen.items() if value is not None}
        if sys.stdin.isatty():
            console.print(f"{model}. /help shows what there is besides talking.", style="dim", highlight=False)
        _talk(Conversation(server, console, parameters, system), console)


async def _checked(response: aiohttp.ClientResponse) -> Any:
    """The JSON of an answer; ChatError with the server's own words when it is an error."""
    try:
        answer = await response.json(content_type=None)
    except ValueError:
        answer = None
    if response.status == 200 and isinstance(answer, dict):
        return answer
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    raise ChatError(message or f"the server answered {response.status}")
