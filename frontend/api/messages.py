"""Chat messages: their schema, and their way through the template to token ids; /tokenize takes them, too."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cableway.frontend.api.schema import PromptFields
from cableway.frontend.errors import RequestError
from cableway.frontend.served import ServedModel

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096

_RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"})
_THREAD_CHARS = 20_000
"""Texts longer than this are tokenized in a thread; shorter ones take less than the loop may be held up."""

T = TypeVar("T")


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


async def chat_prompt(
    messages: list[ChatMessage], fields: PromptFields, model: ServedModel, variables: dict[str, Any] | None = None
) -> list[int]:
    """Render and tokenize a chat; RequestError 400 when the messages or the template do not allow it."""
    _check(fields)
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    continues = bool(fields.continue_final_message)

    def make() -> list[int]:
        text = model.template.render(
            plain,
            add_generation_prompt=not continues and fields.add_generation_prompt is not False,
            continue_final_message=continues,
            **((variables or {}) | (fields.chat_template_kwargs or {})),
        )
        return model.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))

    return await in_thread_if_long(sum(len(message["content"]) for message in plain), make)


async def in_thread_if_long(num_chars: int, make: Callable[[], T]) -> T:
    """Call `make` here, or in a thread when the text that it works on is long, all of it together."""
    return make() if num_chars <= _THREAD_CHARS else await asyncio.to_thread(make)


def _check(fields: PromptFields) -> None:
    if fields.chat_template is not None:
        raise RequestError(
            400, "`chat_template` is not taken from clients.", param="chat_template", code="unsupported_parameter"
        )
    if fields.continue_final_message and fields.add_generation_prompt:
        raise RequestError(
            400,
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            param="continue_final_message",
            code="invalid_value",
        )
    for name in fields.chat_template_kwargs or ():
        if name in _RESERVED_VARIABLES:
            param = f"chat_template_kwargs.{name}"
            raise RequestError(400, f"`{name}` cannot be set here.", param=param, code="invalid_value")


def _plain(message: ChatMessage, path: str) -> dict[str, Any]:
    """A message as templates take it, its content one string."""
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise RequestError(400, "Tool calls are not supported yet.", param=path, code="unsupported_parameter")
    if message.role not in ROLES:
        raise RequestError(
            400,
            f"Unknown role `{message.role[:64]}`: one of {', '.join(ROLES)}.",
            param=f"{path}.role",
            code="invalid_value",
        )
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise RequestError(400, "A message needs `content`.", param=f"{path}.content", code="invalid_value")
        content = ""
    # Templates know the older name of the developer's role.
    plain = {"role": "system" if message.role == "developer" else message.role, "content": _text(content, path)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text(content: str | list[ContentPart], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if part.type != "text":
            raise RequestError(
                400,
                f"Content of type `{part.type[:64]}` is not supported yet.",
                param=f"{path}.content[{i}].type",
                code="unsupported_parameter",
            )
        if part.text is None:
            raise RequestError(
                400, "A text part needs `text`.", param=f"{path}.content[{i}].text", code="invalid_value"
            )
        texts.append(part.text)
    return "\n".join(texts)
