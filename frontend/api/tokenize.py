"""POST /tokenize and /detokenize, in vLLM's form."""

from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from cableway.frontend.api.generation import find_model, json_response
from cableway.frontend.api.messages import Messages, chat_prompt, in_thread_if_long
from cableway.frontend.api.sampling import check_tokens
from cableway.frontend.api.schema import PromptFields, read_json
from cableway.frontend.errors import RequestError
from cableway.frontend.keys import MODELS
from cableway.frontend.served import ServedModel

routes = web.RouteTableDef()

MAX_TOKENS = 1 << 20


class TokenizeRequest(PromptFields, kw_only=True):
    """A text as `prompt`, or a chat as `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: Annotated[list[int], Meta(max_length=MAX_TOKENS)]
    model: str | None = None


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


@routes.post("/tokenize")
async def tokenize(request: web.Request) -> web.Response:
    body = await read_json(request, _tokenize_decoder)
    model = _model(request, body.model)
    tokenizer = model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(400, "Give either `prompt` or `messages`.", param="prompt", code="invalid_value")
    if body.messages is not None:
        token_ids = await chat_prompt(body.messages, body, model)
    else:
        text, adds_special_tokens = body.prompt or "", body.add_special_tokens is not False
        token_ids = await in_thread_if_long(len(text), lambda: tokenizer.encode(text, adds_special_tokens))
    names = None
    if body.return_token_strs:
        names = await in_thread_if_long(len(token_ids), lambda: [tokenizer.token_name(i) for i in token_ids])
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": token_ids,
        "token_strs": names,
    }
    return json_response(answer)


@routes.post("/detokenize")
async def detokenize(request: web.Request) -> web.Response:
    body = await read_json(request, _detokenize_decoder)
    model = _model(request, body.model)
    check_tokens(body.tokens, model, "tokens")
    return json_response({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _model(request: web.Request, name: str | None) -> ServedModel:
    """The model asked for; the first one when none is named."""
    return next(iter(request.app[MODELS].values())) if name is None else find_model(request, name)
