"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from aiohttp import web

from cableway.frontend.api.generation import find_model, json_response
from cableway.frontend.keys import MODELS
from cableway.frontend.served import ServedModel

routes = web.RouteTableDef()


@routes.get("/v1/models")
async def list_models(request: web.Request) -> web.Response:
    return json_response({"object": "list", "data": [_card(model) for model in request.app[MODELS].values()]})


@routes.get("/v1/models/{name:.+}")
async def show_model(request: web.Request) -> web.Response:
    return json_response(_card(find_model(request, request.match_info["name"])))


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "cableway",
        "root": model.path,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
