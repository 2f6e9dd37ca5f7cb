"""Chat templates: messages to the text that a model was trained on, by the model's own Jinja2 template."""

from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import TemplateSyntaxError

from cableway.frontend import tokenizer_source
from cableway.frontend.errors import RequestError
from cableway.frontend.sandbox import BoundedContext, BoundedEnvironment, Budget
from cableway.ipc.gguf import ModelError, read_header
from cableway.ipc.modelfiles import ModelFiles, read_json

_DEFAULT, _TOOLS = "default", "tool_use"
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_MAX_TEMPLATE_CHARS = 1 << 20
_MAX_MESSAGE_CHARS = 2000  # of an error, to a client

_CONTINUE_MARK = "[cableway: the message goes on here] "  # its space shows whether the template trims contents


class ChatTemplate:
    """A model's chat template, or templates: some have one of their own for tools.

    Args:
        sources: Jinja2 sources by name; `default` is the one without a name. May be empty.
        special_tokens: variables such as `bos_token`.
        origin: where the templates are from, for error messages.
    """

    def __init__(self, sources: dict[str, str], special_tokens: dict[str, str], origin: str):
        environment = BoundedEnvironment()
        self._special_tokens = special_tokens
        self._sources = sources
        self._templates = {name: _compile(environment, source, origin) for name, source in sources.items()}

    @classmethod
    def load(cls, files: ModelFiles, override_path: str | None = None) -> "ChatTemplate":
        """Find the template of `files`, or read it from `override_path`; ModelError when it cannot be used."""
        sources, special_tokens = _from_gguf(files.path) if files.kind == "gguf" else _from_folder(Path(files.path))
        if override_path:
            sources = {_DEFAULT: _read_text(Path(override_path))}
        return cls(sources, special_tokens, override_path or files.path)

    def render(
        self,
        messages: list[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text; tokenize it without adding special tokens, which it brings along.

        Args:
            messages: at least one; plain JSON values.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: end within the last message, so that the model goes on with it; excludes
                `add_generation_prompt`.
            variables: further variables of the template; they outrank special tokens of the same name.

        Raises:
            RequestError: 400 when the template refuses the messages, fails on them, or does not end in time.
        """
        if not messages:
            raise RequestError(400, "There must be at least one message.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(400, "continue_final_message and add_generation_prompt exclude each other.")
        name = _TOOLS if tools is not None and _TOOLS in self._templates else _DEFAULT
        if name not in self._templates:
            raise RequestError(
                400, "This model has no chat template: the server can be given one with --chat-template.",
                code="no_chat_template",
            )  # fmt: skip
        given = [_as_templates_expect(message) for message in messages]
        continued = _mark_continuation(given) if continue_final_message else None
        variables = self._special_tokens | variables | {
            "messages": given,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        text = _render(self._templates[name], variables)
        return text if continued is None else _cut_at_mark(text, continued)


def _as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, since templates ask whether a key is there; and with reasoning under each name it goes by."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING_NAMES:
        if name in message:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _render(template: Template, variables: dict[str, Any]) -> str:
    context = template.new_context(variables)
    assert isinstance(context, BoundedContext)
    try:
        context.budget = Budget(list(variables.values()))
        return "".join(template.root_render_func(context))
    except Exception as error:
        # Templates are foreign programs: whatever one raises is between it and the messages it was given.
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        message = f"The chat template does not take these messages: {reason[:_MAX_MESSAGE_CHARS]}"
        raise RequestError(400, message, param="messages", code="chat_template_error") from None


def _mark_continuation(messages: list[dict[str, Any]]) -> str:
    """Put the mark behind the last message's text, in place; returns that text."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return content
    parts = list(content) if isinstance(content, list) else []
    for i, part in reversed(list(enumerate(parts))):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            parts[i] = {**part, "text": part["text"] + _CONTINUE_MARK}
            messages[-1]["content"] = parts
            return str(part["text"])
    raise RequestError(400, "continue_final_message needs a last message with text.", param="messages")


def _cut_at_mark(text: str, continued: str) -> str:
    position = text.rfind(_CONTINUE_MARK.rstrip())
    if position < 0 or continued.strip() not in text:
        raise RequestError(
            400, "The chat template changes the last message, so that it cannot be continued.", param="messages"
        )
    is_trimmed = not text.startswith(_CONTINUE_MARK, position)
    return text[:position].rstrip() if is_trimmed else text[:position]


# ---------------------------------------------------------------------------------------------------------------------
# Where templates are


def _compile(environment: BoundedEnvironment, source: str, origin: str) -> Template:
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise ModelError(f"{origin}: the chat template is longer than {_MAX_TEMPLATE_CHARS} characters")
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"{origin}: chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # nested too deep for Jinja or Python, for one
        raise ModelError(f"{origin}: chat template: {type(error).__name__}: {error}") from None


def _from_gguf(path: str) -> tuple[dict[str, str], dict[str, str]]:
    metadata = read_header(path).metadata
    prefix = "tokenizer.chat_template"
    sources = {
        key.removeprefix(prefix).lstrip(".") or _DEFAULT: metadata[key] for key in metadata if key.startswith(prefix)
    }
    sources = {name: source for name, source in sources.items() if isinstance(source, str)}
    return sources, tokenizer_source.gguf_special_tokens(metadata)


def _from_folder(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    settings = tokenizer_source.read_settings(folder)
    declared = settings.get("chat_template")
    sources: dict[str, str] = {}
    if isinstance(declared, str):
        sources[_DEFAULT] = declared
    elif isinstance(declared, list):
        sources = {entry["name"]: entry["template"] for entry in declared if _is_named_template(entry)}
    single = folder / "chat_template.json"
    if single.is_file() and isinstance(source := read_json(single).get("chat_template"), str):
        sources[_DEFAULT] = source
    if (folder / "chat_template.jinja").is_file():
        sources[_DEFAULT] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = _read_text(path)
    return sources, tokenizer_source.folder_special_tokens(settings)


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ModelError(f"{path}: {reason}") from None
